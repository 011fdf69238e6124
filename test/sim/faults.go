package sim

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
)

func (w *world) startFaults() {
	w.after(w.between(w.prof.faultEvery/4, w.prof.faultEvery*2), func() {
		if w.calm || w.failure != nil {
			return
		}
		w.strike(fault(w.prof.faults.draw(&w.schedule)))
		w.startFaults()
	})
}

// strike breaks something, and often plans its repair.
func (w *world) strike(f fault) {
	n := w.nodes[w.pick(len(w.nodes))]
	d := w.anyDisk()
	repair := func(least, most int64, do func()) {
		w.after(w.wide(least, most), do)
	}
	switch f {
	case faultKill:
		w.kill(n)
	case faultPower:
		w.powerOff(n)
	case faultSite:
		w.count.SitePowerLosses++
		w.tracef("all nodes lose power")
		for _, n := range w.nodes {
			w.powerOff(n)
		}
	case faultPause:
		if n.up && n.paused <= w.now {
			n.paused = w.now + w.wide(5*millisecond, 2*second)
			w.count.Pauses++
			w.tracef("%s is stopped until %s", n.id, clock(n.paused))
		}
	case faultPartition:
		w.count.Partitions++
		w.cutOff(n, func() int64 { return w.wide(10*millisecond, 3*second) })
		if w.chance(0.5) {
			w.cutCtl(n, w.wide(20*millisecond, 2*second))
		}
	case faultPowerTarget:
		// One that is being copied to loses power, and is back soon.
		for _, v := range w.vols {
			for i := range v.m.Members {
				p := v.place(v.m.Members[i].ID)
				if v.m.Members[i].Role == replication.RoleISR || p == nil || p.machine == nil || p.machine.Role() != replication.RoleSYNC || !w.chance(0.5) {
					continue
				}
				w.count.TargetsLost++
				w.powerOff(p.node)
			}
		}
	case faultIsolate:
		if g := w.vols[w.pick(len(w.vols))].current(); g != nil {
			w.count.Isolated++
			d := w.between(700*millisecond, 2*second)
			w.cutOff(g.node, func() int64 { return d })
			w.cutCtl(g.node, d)
		}
	case faultOneWay:
		o := w.nodes[w.pick(len(w.nodes))]
		if o != n {
			w.count.OneWay++
			w.tracef("%s cannot reach %s", n.id, o.id)
			w.block(n.index, o.index, w.wide(10*millisecond, 3*second))
			if w.chance(0.3) {
				w.block(o.index, n.index, w.wide(10*millisecond, 3*second))
			}
		}
	case faultBreak:
		v := w.vols[w.pick(len(w.vols))]
		for _, g := range v.engines {
			for _, c := range g.conns {
				if c != nil && w.chance(0.5) {
					c.breaks()
				}
			}
		}
	case faultSwap:
		w.swap()
	case faultHang:
		if d != nil {
			w.count.Hangs++
			d.hungUntil = w.now + w.wide(20*millisecond, 3*second)
			w.tracef("a disk hangs until %s", clock(d.hungUntil))
		}
	case faultFull:
		if d != nil {
			w.count.Full++
			d.fullUntil = w.now + w.wide(20*millisecond, 3*second)
		}
	case faultSlow:
		if d != nil {
			w.count.Slow++
			d.slow = oneOf[int64](&w.schedule, 5, 30, 100)
			repair(50*millisecond, 3*second, func() { d.slow = 1 })
		}
	case faultSync:
		if d != nil {
			d.failSyncs = 1
		}
	case faultWrite:
		if d != nil {
			d.failWrites = 1 + w.pick(2)
		}
	case faultRead:
		if d != nil {
			d.failReads = 1 + w.pick(2)
		}
	case faultMeta:
		if d != nil {
			d.failMetas = 1
		}
	case faultCorrupt:
		if d != nil {
			d.corrupt = 1 + w.pick(2)
		}
	case faultCtlCut:
		w.cutCtl(n, w.wide(20*millisecond, 2*second))
	case faultCtlDown:
		w.count.CtlDowns++
		w.ctlDown = w.now + w.wide(20*millisecond, 2*second)
		w.tracef("controllers are unreachable until %s", clock(w.ctlDown))
	}
}

func (w *world) anyDisk() *disk {
	v := w.vols[w.pick(len(w.vols))]
	if len(v.places) == 0 {
		return nil
	}
	return v.places[w.pick(len(v.places))].disk
}

// cutOff blocks all links of a node.
func (w *world) cutOff(n *node, span func() int64) {
	w.tracef("%s is cut off", n.id)
	for _, o := range w.nodes {
		if o != n {
			w.block(n.index, o.index, span())
			w.block(o.index, n.index, span())
		}
	}
}

// block makes one direction of a link lose everything, for a while.
func (w *world) block(from, to int, span int64) {
	w.blocked[from][to] = true
	w.after(span, func() { w.blocked[from][to] = false })
}

func (w *world) cutCtl(n *node, span int64) {
	n.cut = true
	w.count.CtlCuts++
	w.tracef("%s cannot reach the controllers", n.id)
	w.after(span, func() { n.cut = false })
}

// kill ends a node's process; it is started again soon. The kernel's devices may live on.
func (w *world) kill(n *node) {
	if !n.up {
		return
	}
	w.count.Kills++
	keep := w.chance(w.prof.keepDevice)
	w.tracef("%s: the process is killed (devices kept: %v)", n.id, keep)
	w.down(n, false, keep)
	life := n.life
	w.after(w.wide(millisecond, second), func() { w.bootAgain(n, life) })
}

func (w *world) powerOff(n *node) {
	if !n.up {
		return
	}
	w.count.PowerLosses++
	w.tracef("%s loses power", n.id)
	w.down(n, true, false)
	life := n.life
	w.after(w.wide(10*millisecond, w.prof.outage), func() { w.bootAgain(n, life) })
}

func (w *world) bootAgain(n *node, life uint64) {
	if n.up || n.life != life {
		return
	}
	w.count.Boots++
	w.tracef("%s starts", n.id)
	w.boot(n)
}

// down is the end of a process: its engines, clients and replicas end with it.
func (w *world) down(n *node, power, keep bool) {
	n.up = false
	for _, g := range slices.Clone(n.engines) {
		if c := g.client; c != nil && !c.dead {
			if keep && g.live && !c.superseded && !g.detaching {
				c.kept, c.engine = true, nil
				w.count.KeptKills++
			} else {
				c.die()
			}
		}
		g.stop()
	}
	for _, v := range w.vols {
		if c := v.client; c != nil && c.node == n && power {
			c.die()
		}
		for _, g := range v.engines {
			for _, c := range g.conns {
				if c != nil && c.place.node == n {
					c.breaks()
				}
			}
		}
	}
	for _, p := range n.places {
		p.close(power)
	}
}

// swap replaces a disk by an empty one, while its node is down. Where it would take the last good copy of a volume, it is
// left for another time, mostly.
func (w *world) swap() {
	v := w.vols[w.pick(len(w.vols))]
	for _, i := range shuffled(w.rng, len(v.m.Members)) {
		m := v.m.Members[i]
		p := v.place(m.ID)
		if p == nil || p.node.up || m.Incarnation == 0 {
			continue
		}
		if m.Role == replication.RoleISR {
			left := 0
			for _, q := range v.isr() {
				if q != p && !q.disk.syncFailed && q.node.up {
					left++
				}
			}
			if (left == 0 || v.asks > 0) && !w.chance(0.05) {
				continue
			}
		}
		w.count.Swaps++
		w.tracef("%s gets a new disk", p.id)
		p.disk = newDisk(w.id(), int(v.m.Size/blockSize))
		p.seen, p.fenced, p.poisoned = highest{}, 0, false
		return
	}
	// Have one ready for it next time.
	w.powerOff(w.nodes[w.pick(len(w.nodes))])
}
