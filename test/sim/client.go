package sim

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// opKind is what a client asks its device for.
type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opZero
	opFlush
)

var opNames = [...]string{"read", "write", "zero", "flush"}

// op is a client's call that was not answered yet.
type op struct {
	tag          uint64
	kind         opKind
	first, count int
	fua          bool
	id           int32 // of the write
	view         view  // of a read or flush
	began        int64 // simulated time of the call
	cancelled    bool
	ghost        bool // called on an engine of which a newer one was live already
	data         []byte
}

// client is what uses one kernel device: it lives on the node of its engine and dies with it, unless the device is kept.
type client struct {
	w          *world
	v          *vol
	engine     *engine
	node       *node
	ops        []*op
	busy       []*op // answered, but their buffers are still in use
	blocks     int
	dead       bool
	kept       bool   // the device waits for another engine
	foreign    uint64 // vol.foreign when its engine was attached
	superseded bool   // a newer client, or a fence, took over
	stopping   bool
	began      int64 // when it began to be served
	done       int64 // when an operation last succeeded
	timer      uint64
}

func newClient(v *vol, g *engine) *client {
	return &client{w: v.w, v: v, engine: g, node: g.node, blocks: int(g.known.Size / blockSize), foreign: v.foreignAt[g.epoch], began: v.w.now}
}

func (c *client) start() { c.next(c.w.between(0, 2*millisecond)) }

// resume goes on with a kept device: what was under way is asked for again.
func (c *client) resume() {
	for _, o := range slices.Clone(c.ops) {
		c.w.count.Reissued++
		c.submit(o)
	}
	c.next(c.w.between(0, 2*millisecond))
}

// next plans the next call.
func (c *client) next(delay int64) {
	c.timer++
	t := c.timer
	c.w.after(delay, func() {
		if c.timer != t || c.dead || c.kept || c.stopping {
			return
		}
		w := c.w
		if !w.quiet && c.engine != nil && !c.engine.over && len(c.ops) < w.prof.depth {
			c.call()
		}
		c.next(w.wide(w.prof.think/8, w.prof.think*4))
	})
}

// call draws an operation and submits it.
func (c *client) call() {
	w, v := c.w, c.v
	o := &op{began: w.now, tag: v.nextTag()}
	p := &w.prof
	count := 1 + w.pick(p.opBlocks)
	o.count = min(count, c.blocks)
	o.first = w.pick(c.blocks - o.count + 1)
	if hot := p.hotBlocks; hot > 0 && w.chance(0.7) {
		o.count = min(o.count, hot)
		o.first = w.pick(hot - o.count + 1)
	}
	x := w.rng.Float64()
	switch {
	case x < p.reads:
		o.kind = opRead
		w.count.Reads++
	case x < p.reads+p.flushes:
		o.kind = opFlush
		w.count.Flushes++
	case x < p.reads+p.flushes+p.zeros:
		o.kind = opZero
		w.count.Zeros++
	default:
		o.kind = opWrite
		w.count.Writes++
	}
	c.begin(o)
}

// begin starts a drawn operation.
func (c *client) begin(o *op) {
	w, v := c.w, c.v
	switch o.kind {
	case opRead:
		o.view = v.oracle.look(o.first, o.count)
	case opFlush:
		o.first, o.count = 0, c.blocks
		o.view = v.oracle.look(0, c.blocks)
	case opWrite, opZero:
		o.fua = w.chance(w.prof.fua)
		if o.fua {
			w.count.FUAs++
		}
		if c.superseded && !v.between {
			o.id = v.oracle.ghost(o.kind == opZero)
		} else {
			o.id = v.oracle.begin(o.first, o.count, o.kind == opZero)
		}
	}
	o.ghost = c.superseded
	c.ops = append(c.ops, o)
	c.submit(o)
	if w.chance(w.prof.cancel) {
		w.after(w.wide(millisecond, second/2), func() { c.cancel(o) })
	}
}

func (c *client) cancel(o *op) {
	if g := c.engine; g != nil && slices.Contains(c.ops, o) && !g.over {
		c.w.on(g.node, g.life, func() {
			if slices.Contains(c.ops, o) {
				o.cancelled = true
				c.w.count.Cancels++
				g.step(func(now replication.Now) { g.machine.Cancel(now, o.tag) })
			}
		})
	}
}

// submit hands an operation to the engine, when its process next runs.
func (c *client) submit(o *op) {
	g := c.engine
	if g == nil {
		return
	}
	c.w.on(g.node, g.life, func() {
		if g.over || !slices.Contains(c.ops, o) {
			return
		}
		if c.w.opt.Trace {
			c.w.tracef("e%d client %s", g.epoch, o)
		}
		off, n := int64(o.first)*blockSize, int64(o.count)*blockSize
		g.step(func(now replication.Now) {
			switch o.kind {
			case opRead:
				g.machine.Read(now, o.tag, off, n, nil)
			case opWrite:
				o.data = encode(slices.Repeat([]uint64{uint64(o.id)}, o.count))
				g.machine.Write(now, o.tag, off, o.data, o.fua)
			case opZero:
				g.machine.Zero(now, o.tag, off, n, o.fua)
			case opFlush:
				g.machine.Flush(now, o.tag)
			}
		})
	})
}

func (o *op) String() string {
	s := fmt.Sprintf("%s#%d %d+%d", opNames[o.kind], o.tag, o.first, o.count)
	if o.kind == opWrite || o.kind == opZero {
		s += fmt.Sprintf(" w%d", o.id)
	}
	if o.fua {
		s += " FUA"
	}
	return s
}

// answered takes the end of an operation and has the oracle judge it.
func (c *client) answered(e *replication.Effect) {
	if c == nil {
		return
	}
	w, v := c.w, c.v
	i := slices.IndexFunc(c.ops, func(o *op) bool { return o.tag == e.Tag })
	if i < 0 {
		w.fail("answer", "operation %d was answered twice, or never asked for", e.Tag)
		return
	}
	o := c.ops[i]
	if w.opt.Trace {
		w.tracef("e%d answers %s: result %d %v", c.engine.epoch, o, e.Result, decode(e.Data))
	}
	w.dirty = true
	if e.Busy {
		w.count.Busy++
		c.busy = append(c.busy, o)
	} else {
		o.reuse()
	}
	switch e.Result {
	case replication.ResultGone:
		return // it stays open: it may have happened
	case replication.ResultRange:
		w.fail("S14", "%s is out of the range of %d blocks that was exposed", o, c.blocks)
		return
	case replication.ResultIO:
		c.ops = slices.Delete(c.ops, i, i+1)
		w.count.Errors++
		if !o.cancelled && w.prof.eio == 0 {
			w.fail("L1", "%s was answered with an error although no disk failed", o)
		}
		if (o.kind == opWrite || o.kind == opZero) && !c.superseded {
			v.oracle.failed(o.id)
		}
		return
	}
	c.ops = slices.Delete(c.ops, i, i+1)
	c.done = w.now
	w.count.Acked++
	v.checkAck(c, o, e)
}

// released gives a buffer back that was still in use when its write was answered.
func (c *client) released(tag uint64) {
	if c == nil {
		return
	}
	i := slices.IndexFunc(c.busy, func(o *op) bool { return o.tag == tag })
	if i < 0 {
		c.w.fail("answer", "the buffer of operation %d is released, but was not in use", tag)
		return
	}
	c.busy[i].reuse()
	c.busy = slices.Delete(c.busy, i, i+1)
}

// reuse puts something else into the operation's buffer, as its owner may.
func (o *op) reuse() {
	for i := range o.data {
		o.data[i] = 0xee
	}
}

// die ends the client: its device is gone.
func (c *client) die() {
	c.dead, c.kept = true, false
}
