package sim

import (
	"reflect"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// heal ends all faults, and checks what must come back by itself: L1 to L5.
func (w *world) heal() {
	w.tracef("-- faults end")
	w.calm = true
	w.blocked = [maxNodes][maxNodes]bool{}
	w.ctlDown = 0
	p := &w.prof
	p.drop, p.duplicate, p.tail, p.ctlLost, p.ctlAgain, p.cancel = 0, 0, 0, 0, 0, 0
	p.think = max(p.think, 15*millisecond)
	p.netMax, p.ctlMax, p.storeMax = min(p.netMax, 5*millisecond), min(p.ctlMax, 5*millisecond), min(p.storeMax, 3*millisecond)
	for _, n := range w.nodes {
		n.cut = false
		if n.paused > w.now {
			n.paused = w.now
		}
		if !n.up {
			w.boot(n)
		}
	}
	for _, v := range w.vols {
		for _, pl := range v.places {
			d := pl.disk
			d.hungUntil, d.fullUntil, d.slow = 0, 0, 1
			d.failSyncs, d.failWrites, d.failReads, d.failMetas = 0, 0, 0, 0
		}
		for _, g := range v.engines {
			for _, c := range g.conns {
				if c != nil && c.broken {
					c.hangUp(w.between(0, 400*millisecond))
				}
			}
		}
		if v.m.MinInSync > len(v.m.Members) {
			_, _ = v.apply(replication.Change{SetMinInSync: &replication.SetMinInSync{MinInSync: len(v.m.Members)}})
		}
		if v.want < 0 {
			v.want = w.pick(len(w.nodes))
		}
	}
	w.serves()
	if w.failure != nil {
		return
	}
	w.count.HealedLives++
	if w.chance(0.5) {
		w.cutAndGrow() // while replicas come back
	}
	w.rejoins()
	if w.failure != nil {
		return
	}
	w.count.Rejoined++
	for _, v := range w.vols {
		v.rollBack()
	}
	if w.failure == nil {
		w.serves()
	}
	if w.failure == nil {
		w.exercise()
	}
}

// rollBack has the controllers restored from an old copy, of before some replica was in sync or ceased to be: whoever attaches
// must find out, and refuse. Then the right record is restored.
func (v *vol) rollBack() {
	w := v.w
	if !w.expected(v) || v.fencing || v.asks > 0 || !w.chance(w.prof.rollback) {
		return
	}
	for i := len(v.past) - 1; i >= 0; i-- {
		old := v.past[i]
		if old.Lineage != v.m.Lineage || old.Deleted || slices.Equal(old.ISR(), v.m.ISR()) || !v.known(&old) {
			continue
		}
		w.tracef("controllers of %s are restored from an old copy: e%d cfgver %d isr %v", v.id, old.Epoch, old.ConfigVersion, old.ISR())
		w.count.Rollbacks++
		right := v.m
		old.Epoch, old.Revision, old.Barrier = v.m.Epoch, v.m.Revision+1, nil
		v.m, v.first, v.log, v.rolled, v.pend = old, old, nil, true, nil
		v.want = w.pick(len(w.nodes))
		v.attach(w.nodes[v.want], true)
		refused := w.count.RolledBack
		end := w.now + 3*second
		w.loop(func() bool { return w.now > end || w.count.RolledBack > refused || !v.rolled })
		if w.failure != nil {
			return
		}
		if !v.rolled {
			// It was believed: what that means for the data is for the checks to say.
			end = w.now + second
			w.loop(func() bool { return w.now > end })
			return
		}
		if w.count.RolledBack == refused {
			w.fail("S12", "%s: nobody noticed that the controllers were rolled back", v.id)
			return
		}
		right.Epoch, right.Revision, right.Owner, right.Clean, right.Barrier = v.m.Epoch+1, v.m.Revision+1, "", false, nil
		v.m, v.first, v.log, v.past, v.rolled = right, right, nil, nil, false
		v.foreign++
		for _, g := range slices.Clone(v.engines) {
			if g.client != nil {
				g.client.die()
			}
			g.stop()
		}
		return
	}
}

// known tells whether a replica in the old record has seen a newer one.
func (v *vol) known(old *replication.Membership) bool {
	for i := range old.Members {
		m := &old.Members[i]
		p := v.place(m.ID)
		if p == nil || p.machine == nil || !slices.Contains(p.node.places, p) || !v.sameDisk(m, p) {
			continue
		}
		st, err := replication.ReadState(p.disk.state)
		if err == nil && m.Role == replication.RoleISR && st.ConfigVersion > old.ConfigVersion && !st.Poisoned {
			return true
		}
	}
	return false
}

// serves is L1: operations succeed again.
func (w *world) serves() {
	began := w.now
	w.await("L1", "no operation succeeded", 4*second, func(v *vol) bool {
		return v.client != nil && !v.client.dead && !v.client.superseded && v.client.done > began
	})
}

// rejoins is L2: all replicas are in sync again, although clients go on writing.
func (w *world) rejoins() {
	w.await("L2", "not all replicas are in sync", 20*second, func(v *vol) bool {
		for i := range v.m.Members {
			if v.m.Members[i].Role != replication.RoleISR {
				return false
			}
		}
		return true
	})
}

// expected tells whether anything can be expected of a volume.
func (w *world) expected(v *vol) bool { return !v.lost && !v.m.Deleted && !v.deleted }

// await runs until done holds for each volume, and fails where it takes longer than most.
func (w *world) await(invariant, what string, most int64, done func(v *vol) bool) {
	end := w.now + most
	late := -1
	w.loop(func() bool {
		late = -1
		for i, v := range w.vols {
			if w.expected(v) && !done(v) {
				late = i
				break
			}
		}
		return late < 0 || w.now > end
	})
	if late >= 0 && w.failure == nil {
		v := w.vols[late]
		w.fail(invariant, "%s: %s %d ms after faults ended (owner %q, epoch %d, members %+v, engines %s)", v.id, what, most/millisecond, v.m.Owner, v.m.Epoch, v.m.Members, v.engineNames())
	}
}

func (v *vol) engineNames() string {
	s := ""
	for _, g := range v.engines {
		s += g.String() + " "
	}
	return s
}

// cutAndGrow asks each volume for a snapshot and for more space.
func (w *world) cutAndGrow() {
	for _, v := range w.vols {
		if !w.expected(v) {
			continue
		}
		v.expand()
		if v.pend == nil {
			v.snapshot(false)
		}
	}
}

// moves has volumes detached in good order and attached elsewhere: no lease is waited for then.
func (w *world) moves() {
	moving := map[*vol]bool{}
	for _, v := range w.vols {
		if g := v.current(); w.expected(v) && g != nil && g.live && !g.detaching && w.chance(0.3) {
			moving[v] = true
			v.moveClean(w.pick(len(w.nodes)))
		}
	}
	began := w.now
	w.await("L1", "a clean move took too long", int64(w.timing.Lease)*3/4, func(v *vol) bool {
		return !moving[v] || v.client != nil && !v.client.dead && v.client.began > began
	})
	w.count.HealedMoves += len(moving)
}

// exercise has a snapshot, an expand and a flush happen together, once all is well: L3 and L4. Then a member's disk hangs,
// and I/O must go on without it: L5.
func (w *world) exercise() {
	w.cutAndGrow()
	w.await("L4", "a snapshot or an expand did not end", 4*second, func(v *vol) bool { return v.pend == nil && v.m.Target == 0 })
	if w.failure != nil {
		return
	}
	w.count.HealedSnapshots++
	w.count.HealedExpands++
	// Whoever was too slow because of what happened before is evicted by now, and back.
	end := w.now + second
	w.loop(func() bool { return w.now > end })
	if w.failure == nil {
		w.rejoins()
	}
	if w.failure == nil {
		w.moves()
	}
	if w.failure != nil {
		return
	}
	hung := map[*vol]*place{}
	for _, v := range w.vols {
		if isr := v.isr(); w.expected(v) && len(isr) > max(1, v.m.MinInSync) && w.chance(0.3) {
			p := isr[w.pick(len(isr))]
			p.disk.hungUntil = w.now + 3*second
			hung[v] = p
			w.tracef("the disk of %s hangs", p.id)
		}
	}
	began := w.now + second
	w.await("L5", "I/O waits for a disk that hangs", 2*second, func(v *vol) bool { return hung[v] == nil || v.client != nil && v.client.done > began })
	w.count.HungEvicted += len(hung)
}

// finish stops the clients and looks at everything once more.
func (w *world) finish() {
	w.quiet = true
	w.tracef("-- clients stop")
	w.await("L4", "operations are still open", 4*second, func(v *vol) bool { return v.client != nil && len(v.client.ops) == 0 })
	if w.failure != nil {
		return
	}
	w.await("S7", "an engine that was replaced goes on", 2*second, func(v *vol) bool { return len(v.engines) == 1 })
	if w.failure != nil {
		return
	}
	for _, v := range w.vols {
		v.check()
		v.replay()
	}
}

// replay is S15: the same changes lead to the same record, and those that were applied are not applied again.
func (v *vol) replay() {
	m := v.first
	for i, c := range v.log {
		n, err := m.ApplyWithout(c, v.w.opt.Rules)
		if err != nil {
			v.w.fail("S15", "change %d, %s, is refused in a replay: %v", i, describeChange(&c), err)
			return
		}
		m = n
	}
	if !reflect.DeepEqual(m, v.m) {
		v.w.fail("S15", "a replay came to %+v instead of %+v", m, v.m)
	}
}
