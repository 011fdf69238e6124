package sim

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// engine carries out the effects of one engine machine on one node.
type engine struct {
	w         *world
	v         *vol
	node      *node
	life      uint64 // of the node's process
	machine   *replication.Engine
	epoch     volume.Epoch
	known     replication.Membership // the newest record it was given
	conns     [maxPlaces]*conn
	dialing   uint64
	wakeAt    int64
	over      bool
	live      bool
	liveAt    int64
	fenceOnly bool
	kept      bool
	detaching bool
	client    *client
	// barrier is the number of the barrier that it was told of.
	barrier uint64
}

// startEngine runs an engine of the record m on a node.
func (v *vol) startEngine(n *node, m replication.Membership, fenceOnly, kept bool) {
	w := v.w
	machine, err := replication.NewEngine(replication.EngineConfig{
		Node: n.id, Geometry: w.geo, Timing: w.timing, Rules: w.opt.Rules, FenceOnly: fenceOnly, DeviceKept: kept,
	}, m, w.clockOf(n))
	if err != nil {
		w.fail("engine", "%v", err)
		return
	}
	g := &engine{w: w, v: v, node: n, life: n.life, machine: machine, epoch: m.Epoch, known: m, fenceOnly: fenceOnly, kept: kept}
	v.engines = append(v.engines, g)
	n.engines = append(n.engines, g)
	if w.opt.Trace {
		w.tracef("e%d of %s starts on %s (fence only %v, device kept %v)", g.epoch, v.id, n.id, fenceOnly, kept)
	}
	w.count.Attaches++
	if !fenceOnly {
		g.step(func(now replication.Now) { g.machine.SetResyncPace(now, w.prof.window, w.prof.rate) })
	}
	g.dialMembers(w.between(0, 2*millisecond))
	g.step(func(now replication.Now) { g.machine.Tick(now) })
}

// dialMembers connects to whoever the record names and is not connected.
func (g *engine) dialMembers(delay int64) {
	for _, p := range g.v.places {
		if _, ok := g.known.Member(p.id); ok && g.conns[p.index] == nil && g.dialing>>p.index&1 == 0 {
			g.dialing |= 1 << p.index
			g.dial(p, delay)
		}
	}
}

// stop is the end of the engine's process, or of its part in it.
func (g *engine) stop() {
	g.over = true
	if g.live {
		g.v.gone[g.node.id] = g.epoch
	}
	g.v.dropEngine(g)
	for _, c := range g.conns {
		if c != nil {
			c.closed = true
		}
	}
}

// step gives the machine an event, carries out what it wants, and sees to it that it is woken.
func (g *engine) step(event func(now replication.Now)) {
	if g.over {
		return
	}
	event(g.w.clockOf(g.node))
	g.effects()
	g.plan()
}

func (g *engine) plan() {
	if g.over {
		return
	}
	at := g.machine.NextWake()
	if at == replication.Never {
		g.wakeAt = 0
		return
	}
	when := g.w.now + max(g.w.until(g.node, at), 50*microsecond)
	if g.wakeAt > g.w.now && g.wakeAt <= when {
		return
	}
	g.wakeAt = when
	g.w.after(when-g.w.now, func() {
		g.w.on(g.node, g.life, func() {
			if g.over || g.wakeAt != when {
				return
			}
			g.wakeAt = 0
			g.w.count.Ticks++
			g.step(func(now replication.Now) { g.machine.Tick(now) })
		})
	})
}

func (g *engine) effects() {
	w := g.w
	effects := g.machine.Effects()
	for i := range effects {
		e := &effects[i]
		switch e.Kind {
		case replication.EffectSend:
			p := g.v.place(e.Msg.Replica)
			if p == nil || g.conns[p.index] == nil {
				continue
			}
			g.conns[p.index].send(e.Msg, request)
		case replication.EffectAnswer:
			g.client.answered(e)
		case replication.EffectReleased:
			g.client.released(e.Tag)
		case replication.EffectCommit:
			g.commit(e.Commit, e.Change)
		case replication.EffectReconnect:
			w.count.Reconnects++
			if p := g.v.place(e.Replica); p != nil {
				if c := g.conns[p.index]; c != nil {
					c.close()
				}
			}
		case replication.EffectLive:
			g.wentLive()
		case replication.EffectFenced:
			w.tracef("e%d of %s has fenced", g.epoch, g.v.id)
			w.count.FencedOnly++
			g.v.supersede(g.epoch)
			g.v.between = true
			g.v.fencedBy(g)
			g.stop()
			return
		case replication.EffectFailed:
			w.tracef("e%d of %s fails: %s", g.epoch, g.v.id, e.Reason)
			w.count.failed(e.Reason)
			if g.client != nil {
				g.client.die()
			} else if c := g.v.client; g.kept && c != nil && c.kept {
				c.die()
			}
			g.v.engineFailed(g, e.Reason)
			g.stop()
			return
		case replication.EffectResized:
			g.v.resized(g, e.Size)
		case replication.EffectDrained, replication.EffectSealed:
			g.v.barrierStep(g, e)
		case replication.EffectBarrier:
			g.v.barrierEnd(g, e)
		case replication.EffectDetached:
			g.v.detached(g, e.Result == replication.ResultOK)
			return
		}
	}
}

// commit asks the controllers for the engine's change.
func (g *engine) commit(id uint64, c replication.Change) {
	w := g.w
	if w.opt.Trace {
		w.tracef("e%d asks to commit %s", g.epoch, describeChange(&c))
	}
	g.v.ask(g.node, c, func(outcome replication.CommitOutcome, m replication.Membership) {
		if g.over {
			return
		}
		w.count.outcome(outcome)
		if w.opt.Trace {
			w.tracef("e%d commit %d: outcome %d", g.epoch, id, outcome)
		}
		if outcome != replication.CommitUnknown {
			g.learn(m)
		}
		g.step(func(now replication.Now) { g.machine.Committed(now, id, outcome, m) })
		g.dialMembers(w.between(0, 5*millisecond))
	})
}

func (g *engine) learn(m replication.Membership) {
	if m.Revision > g.known.Revision {
		g.known = m
	}
}

// tell gives the engine a record that the controllers sent.
func (g *engine) tell(m replication.Membership) {
	w := g.w
	w.after(w.prof.controlDelay(&w.schedule), func() {
		if g.node.cut || w.ctlDown > w.now {
			return
		}
		w.on(g.node, g.life, func() {
			if g.over {
				return
			}
			g.learn(m)
			g.step(func(now replication.Now) { g.machine.Learned(now, m) })
			g.dialMembers(w.between(0, 5*millisecond))
		})
	})
}

// wentLive gives the device to a client: a new one, or the one that was kept.
func (g *engine) wentLive() {
	w, v := g.w, g.v
	if g.live {
		w.fail("L", "e%d went live twice", g.epoch)
		return
	}
	g.live, g.liveAt = true, w.now
	w.count.Lives++
	w.tracef("e%d of %s is live, isr %v", g.epoch, v.id, g.known.ISR())
	if g.epoch <= v.liveEpoch {
		return // fenced already: whatever it does for its client is checked as a stale engine's
	}
	if g.kept && v.client != nil && v.client.kept {
		w.count.KeptLives++
		v.liveEpoch = g.epoch
		c := v.client
		c.kept = false
		g.client, c.engine = c, g
		c.blocks = max(c.blocks, int(g.known.Size/blockSize))
		v.oracle.grow(c.blocks)
		c.resume()
		return
	}
	v.rolled = false // the record that it went live with is the truth now
	v.supersede(g.epoch)
	v.between = false
	if p := v.salvaging; p != nil {
		v.oracle.restart(p.disk.cells)
		v.salvaging, v.lost = nil, false
	}
	v.oracle.grow(int(g.known.Size / blockSize))
	c := newClient(v, g)
	v.client, g.client = c, c
	c.start()
}

func (g *engine) String() string {
	st := g.machine.Status()
	s := fmt.Sprintf("e%d@%s %s size %d dirty %d waiting %d %v", g.epoch, g.node.id, st.Phase, st.Size/blockSize, st.Dirty, st.Waiting, st.Conditions)
	for _, m := range st.Members {
		s += fmt.Sprintf(" %s(in sync %v, connected %v, failed %v", m.ID, m.InSync, m.Connected, m.Failed)
		if m.Resync != nil {
			s += fmt.Sprintf(", resync %+v", *m.Resync)
		}
		s += ")"
	}
	return s
}
