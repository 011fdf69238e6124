package sim

import (
	"encoding/binary"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// lanes are the carrier's parallel connections of one transport: what goes over different ones may overtake.
const lanes = 3

// conn is one transport between an engine and a replica. Messages in flight when it is given up may still arrive at the
// replica; nothing arrives at the engine any more.
type conn struct {
	id     uint64
	engine *engine
	place  *place
	life   uint64 // of the replica's process
	closed bool   // by the engine's side
	broken bool   // a message was lost on it, or its other end is gone
	dead   [2][lanes]bool
	last   [2][lanes]int64 // when the last message of a lane arrives
}

// Directions.
const (
	request = 0
	answer  = 1
)

// dial makes the carrier try to connect an engine to a replica, until it has.
func (g *engine) dial(p *place, delay int64) {
	w := g.w
	w.after(delay, func() {
		w.on(g.node, g.life, func() {
			if g.over || g.conns[p.index] != nil {
				return
			}
			if _, ok := g.known.Member(p.id); !ok {
				g.dialing &^= 1 << p.index
				return
			}
			if !p.node.up || p.node.paused > w.now || p.machine == nil || !w.passes(g.node.index, p.node.index) || !w.passes(p.node.index, g.node.index) {
				g.dial(p, w.between(10*millisecond, 60*millisecond))
				return
			}
			g.dialing &^= 1 << p.index
			w.ids++
			c := &conn{id: w.ids, engine: g, place: p, life: p.life}
			g.conns[p.index] = c
			g.v.conns[c.id] = c
			w.count.Connected++
			if w.opt.Trace {
				w.tracef("e%d connected to %s", g.epoch, p.id)
			}
			g.step(func(now replication.Now) { g.machine.Connected(now, p.id) })
		})
	})
}

// hangUp makes the engine's carrier notice that a transport is gone, after delay.
func (c *conn) hangUp(delay int64) {
	g := c.engine
	g.w.after(delay, func() {
		g.w.on(g.node, g.life, func() {
			if c.closed || g.over {
				return
			}
			c.close()
			if g.w.opt.Trace {
				g.w.tracef("e%d disconnected from %s", g.epoch, c.place.id)
			}
			g.step(func(now replication.Now) { g.machine.Disconnected(now, c.place.id) })
		})
	})
}

func (c *conn) close() {
	c.closed = true
	if c.engine.conns[c.place.index] == c {
		c.engine.conns[c.place.index] = nil
	}
	c.engine.dialMembers(c.engine.w.between(millisecond, 20*millisecond))
}

// breaks marks the transport as lost: the engine's side learns of it soon, or only by its own timeout.
func (c *conn) breaks() {
	if c.broken || c.closed {
		return
	}
	c.broken = true
	w := c.engine.w
	w.count.Broken++
	delay := w.between(0, 2*millisecond)
	switch w.pick(10) {
	case 0, 1, 2, 3:
		delay = w.between(20*millisecond, 400*millisecond)
	case 4:
		// The carrier does not notice: the engine's own patience ends first.
		if !w.calm {
			w.count.Unnoticed++
			delay = w.between(second, 4*second)
		}
	}
	c.hangUp(delay)
}

// send puts a message on the way.
func (c *conn) send(m replication.Message, direction int) {
	w := c.engine.w
	m.Conn = c.id
	m = copyOf(m)
	from, to := c.engine.node.index, c.place.node.index
	if direction == answer {
		from, to = to, from
	}
	local := from == to
	lane := w.pick(lanes)
	if c.dead[direction][lane] && !local {
		return
	}
	delay := w.prof.netDelay(&w.schedule, local)
	if !local && w.chance(w.prof.drop) {
		w.count.Dropped++
		c.dead[direction][lane] = true
		c.breaks()
		return
	}
	arrive := w.now + delay
	if w.prof.laneOrder {
		// Within a lane nothing overtakes.
		arrive = max(arrive, c.last[direction][lane]+1)
		c.last[direction][lane] = arrive
	}
	if w.now+delay != arrive || delay > 20*millisecond {
		w.count.Delayed++
	}
	w.after(arrive-w.now, func() { c.arrive(m, direction, lane, from, to) })
	if w.chance(w.prof.duplicate) {
		w.count.Duplicated++
		w.after(arrive-w.now+w.wide(100*microsecond, 100*millisecond), func() { c.arrive(m, direction, lane, from, to) })
	}
}

func (c *conn) arrive(m replication.Message, direction, lane, from, to int) {
	w := c.engine.w
	if !w.passes(from, to) {
		// The sender goes on trying, or gives up.
		if w.chance(0.5) && !c.closed {
			w.count.Held++
			w.after(w.between(5*millisecond, 60*millisecond), func() { c.arrive(m, direction, lane, from, to) })
			return
		}
		w.count.Dropped++
		c.dead[direction][lane] = true
		c.breaks()
		return
	}
	if direction == request {
		if c.place.life != c.life || !c.place.node.up {
			c.breaks()
			return
		}
		if c.closed {
			w.count.Late++
		}
		c.place.on(c.life, func() {
			if w.opt.Trace && m.Kind != replication.KindPing {
				w.tracef("  %s gets %s", c.place.id, describeMessage(&m))
			}
			c.place.receive(&m)
		})
		return
	}
	if c.closed && !w.chance(w.prof.lateAnswers) {
		return
	}
	g := c.engine
	w.on(g.node, g.life, func() {
		if !g.over {
			if w.opt.Trace && m.Kind != replication.KindPing {
				w.tracef("  e%d gets from %s %s", g.epoch, c.place.id, describeMessage(&m))
			}
			g.step(func(now replication.Now) { g.machine.Receive(now, &m) })
		}
	})
}

// reply sends a replica's answer back on the transport on which its request came.
func (v *vol) reply(m replication.Message) {
	if c := v.conns[m.Conn]; c != nil {
		c.send(m, answer)
	}
}

// stamp is what travels behind a message's data, out of the machines' sight: the epoch and session that it was sent in.
const stampLen = 16

// copyOf is a copy that shares nothing with m, as one that went through a wire.
func copyOf(m replication.Message) replication.Message {
	if m.Data != nil {
		b := make([]byte, len(m.Data), len(m.Data)+stampLen)
		copy(b, m.Data)
		s := b[len(b):cap(b)]
		binary.LittleEndian.PutUint64(s, uint64(m.Epoch))
		binary.LittleEndian.PutUint64(s[8:], uint64(m.Session))
		m.Data = b
	}
	if m.Fence != nil {
		f := *m.Fence
		f.ISR, f.WIL, f.Missed, f.Snapshots = slices.Clone(f.ISR), slices.Clone(f.WIL), slices.Clone(f.Missed), slices.Clone(f.Snapshots)
		m.Fence = &f
	}
	if m.Config != nil {
		c := *m.Config
		c.ISR, c.Absent = slices.Clone(c.ISR), slices.Clone(c.Absent)
		m.Config = &c
	}
	if m.Set != nil {
		s := *m.Set
		s.Runs = slices.Clone(s.Runs)
		m.Set = &s
	}
	if m.Seal != nil {
		s := *m.Seal
		m.Seal = &s
	}
	return m
}

func stampOf(data []byte) (volume.Epoch, replication.Session, bool) {
	if cap(data)-len(data) != stampLen {
		return 0, 0, false
	}
	s := data[len(data):cap(data)]
	return volume.Epoch(binary.LittleEndian.Uint64(s)), replication.Session(binary.LittleEndian.Uint64(s[8:])), true
}
