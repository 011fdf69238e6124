package sim

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// pending is a snapshot that is being cut.
type pending struct {
	v       *vol
	barrier replication.Barrier
	began   int64
	engine  *engine // that was told
	toldAt  int64
	cut     *view // what the blocks might hold when the first member sealed
	group   *group
	drained bool
	sealed  bool
	holders []volume.ReplicaID
	version volume.ConfigVersion
}

// group is several pending snapshots that are cut at one instant.
type group struct {
	members []*pending
	cut     bool
	over    bool
}

// snapshot announces a snapshot at the controllers and tells the engine.
func (v *vol) snapshot(grouped bool) *pending {
	w := v.w
	if v.current() == nil || v.pend != nil {
		return nil
	}
	if _, err := v.apply(replication.Change{Prepare: &replication.Prepare{Snapshot: v.snapName()}}); err != nil {
		return nil
	}
	w.count.Prepared++
	v.barriers[v.m.Barrier.Number] = *v.m.Barrier
	p := &pending{v: v, barrier: *v.m.Barrier, began: w.now}
	v.retryName = p.barrier.Snapshot
	v.pend = p
	if !grouped {
		p.tell()
	}
	return p
}

// tell orders the engine to cut.
func (p *pending) tell() {
	w, v := p.v.w, p.v
	g := v.current()
	if g == nil {
		return
	}
	p.engine = g
	w.after(w.prof.controlDelay(&w.schedule), func() {
		if g.node.cut || w.chance(w.prof.ctlLost) {
			return
		}
		w.on(g.node, g.life, func() {
			if !g.over && v.pend == p && g.barrier != p.barrier.Number {
				g.barrier = p.barrier.Number
				p.toldAt = w.now
				g.learn(v.m)
				g.step(func(now replication.Now) { g.machine.Learned(now, v.m) })
				g.step(func(now replication.Now) { g.machine.Barrier(now, p.barrier, p.group != nil) })
			}
		})
	})
}

// groupSnapshot cuts all volumes at one instant.
func (w *world) groupSnapshot() {
	gr := &group{}
	for _, v := range w.vols {
		if p := v.snapshot(true); p != nil {
			p.group = gr
			gr.members = append(gr.members, p)
		}
	}
	if len(gr.members) < len(w.vols) {
		gr.abort()
		return
	}
	w.count.Groups++
	for _, p := range gr.members {
		p.tell()
	}
}

func (gr *group) abort() {
	gr.over = true
	for _, p := range gr.members {
		if p.v.pend == p {
			_, _ = p.v.apply(replication.Change{AbortBarrier: &replication.AbortBarrier{Number: p.barrier.Number}})
		}
	}
}

// watch gives a snapshot up that nobody carries on.
func (p *pending) watch() {
	if p.v.w.now-p.began > 400*millisecond {
		if p.group != nil {
			p.group.abort()
			return
		}
		_, _ = p.v.apply(replication.Change{AbortBarrier: &replication.AbortBarrier{Number: p.barrier.Number}})
	}
}

// aborted is called when the controllers dropped the pending snapshot.
func (v *vol) aborted() {
	if v.pend != nil {
		v.w.count.Aborted++
	}
	v.pend = nil
}

// barrierStep is a group's coordinator at work: when all have drained all cut, when all have sealed all go on.
func (v *vol) barrierStep(g *engine, e *replication.Effect) {
	p := v.pend
	if p == nil || p.group == nil || p.engine != g || e.Number != p.barrier.Number || p.group.over {
		return
	}
	w, gr := v.w, p.group
	if e.Kind == replication.EffectDrained {
		p.drained = true
	} else {
		p.sealed = true
	}
	all := func(f func(*pending) bool) bool {
		return !slices.ContainsFunc(gr.members, func(p *pending) bool { return !f(p) })
	}
	order := func(do func(g *engine, now replication.Now, number uint64)) {
		for _, p := range gr.members {
			g, number := p.engine, p.barrier.Number
			w.after(w.prof.controlDelay(&w.schedule), func() {
				if !g.node.cut {
					w.on(g.node, g.life, func() { g.step(func(now replication.Now) { do(g, now, number) }) })
				}
			})
		}
	}
	switch {
	case e.Kind == replication.EffectDrained && !gr.cut && all(func(p *pending) bool { return p.drained }):
		gr.cut = true
		order(func(g *engine, now replication.Now, number uint64) { g.machine.Cut(now, number) })
	case e.Kind == replication.EffectSealed && all(func(p *pending) bool { return p.sealed }):
		order(func(g *engine, now replication.Now, number uint64) { g.machine.Release(now, number) })
	}
}

// barrierEnd is the engine's word on a barrier.
func (v *vol) barrierEnd(g *engine, e *replication.Effect) {
	w, p := v.w, v.pend
	if w.opt.Trace {
		w.tracef("e%d ends barrier %d: result %d, holders %v", g.epoch, e.Number, e.Result, e.Holders)
	}
	if p == nil || p.engine != g || e.Number != p.barrier.Number {
		return
	}
	if held := w.now - p.toldAt; held > int64(w.timing.BarrierWait)*11/10+20*millisecond && g.node.paused == 0 {
		w.fail("L3", "a barrier held writes for %d ms", held/millisecond)
	}
	if e.Result != replication.ResultOK {
		if p.group != nil {
			p.group.abort()
		} else {
			v.say(g, e.Number, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: e.Number}})
		}
		return
	}
	p.holders, p.version = slices.Clone(e.Holders), e.Version
	complete := replication.Change{Complete: &replication.Complete{Number: e.Number, ConfigVersion: e.Version, Holders: p.holders}}
	if p.group == nil {
		v.say(g, e.Number, complete)
		return
	}
	gr := p.group
	if gr.over || slices.ContainsFunc(gr.members, func(p *pending) bool { return p.holders == nil }) {
		return
	}
	// The group's record is one transaction.
	w.after(w.prof.controlDelay(&w.schedule), func() {
		if gr.over || slices.ContainsFunc(gr.members, func(p *pending) bool {
			b := p.v.m.Barrier
			return p.v.pend != p || b == nil || b.Number != p.barrier.Number || b.ConfigVersion != p.version
		}) {
			gr.abort()
			return
		}
		gr.over = true
		w.count.GroupsReady++
		for _, p := range gr.members {
			_, _ = p.v.apply(replication.Change{Complete: &replication.Complete{Number: p.barrier.Number, ConfigVersion: p.version, Holders: p.holders}})
		}
	})
}

// say has an engine's node tell the controllers how a barrier ended, until it knows that they heard.
func (v *vol) say(g *engine, number uint64, c replication.Change) {
	v.ask(g.node, c, func(o replication.CommitOutcome, _ replication.Membership) {
		if o == replication.CommitUnknown && v.m.Barrier != nil && v.m.Barrier.Number == number {
			v.say(g, number, c)
		}
	})
}

// checkSeal is S13 where a seal begins: it is for the configuration that its replica has.
func (v *vol) checkSeal(p *place, op *replication.StoreOp) {
	if cut, ok := v.barriers[op.Number]; ok && p.machine.Role() == replication.RoleISR && p.version != cut.ConfigVersion {
		v.w.fail("S13", "%s seals %s for version %d, but is configured at %d", p.id, op.Snapshot, cut.ConfigVersion, p.version)
	}
}

// sealed is called when a replica seals: the first one fixes what the snapshot, or its whole group, may hold.
func (v *vol) sealed(id volume.SnapshotID, number uint64) {
	v.w.count.Sealed++
	p := v.pend
	if p == nil || p.barrier.Number != number || p.barrier.Snapshot != id || p.cut != nil {
		return
	}
	members := []*pending{p}
	if p.group != nil {
		members = p.group.members
	}
	for _, m := range members {
		if m.cut == nil {
			look := m.v.oracle.look(0, len(m.v.oracle.blocks))
			m.cut = &look
		}
	}
}

// completed is S13: a ready snapshot is the same on all holders, and what the volume held at its barrier.
func (v *vol) completed(c *replication.Complete) {
	w, p := v.w, v.pend
	v.pend = nil
	if p == nil || p.barrier.Number != c.Number {
		w.fail("S13", "barrier %d was completed, but is not pending", c.Number)
		return
	}
	v.retryName = ""
	w.count.Ready++
	s := &snapshot{id: p.barrier.Snapshot, number: c.Number, holders: c.Holders}
	var from *place
	for _, id := range c.Holders {
		h := v.place(id)
		m, ok := v.m.Member(id)
		if h == nil || !ok || !v.sameDisk(&m, h) {
			continue
		}
		l := h.disk.layer(s.id)
		if l == nil || l.number != s.number && !w.opt.Rules.WithoutSealNumber {
			w.fail("S13", "%s is ready, but its holder %s has not got it", s.id, id)
			return
		}
		content := l.content()
		if from == nil {
			from, s.content = h, content
			if p.cut == nil {
				w.fail("S13", "%s is ready, but was never sealed", s.id)
				return
			}
			for b, x := range content {
				if b < len(p.cut.sets) && !v.oracle.in(p.cut.sets[b], x) {
					w.fail("S13", "%s: block %d of holder %s is %s, at the barrier it was %s", s.id, b, id, v.oracle.name(x), v.oracle.names(p.cut.sets[b]))
					return
				}
			}
			continue
		}
		if !slices.Equal(content, s.content) {
			w.fail("S13", "%s differs: %s has %v, %s has %v", s.id, from.id, s.content, id, content)
			return
		}
	}
	if from != nil {
		v.snaps = append(v.snaps, s)
		v.checkSnapshots()
	}
}

func (l *layer) content() []uint64 {
	c := make([]uint64, len(l.cells))
	for i := range c {
		c[i] = l.cells[i].cache
	}
	for len(c) > 0 && c[len(c)-1] == 0 {
		c = c[:len(c)-1] // beyond a layer's end there are zeros
	}
	return c
}

// checkSnapshots is S13 for as long as a snapshot lives: whoever has it, has its bytes, whatever happens to the power.
func (v *vol) checkSnapshots() {
	for _, s := range v.snaps {
		for _, p := range v.places {
			l := p.disk.layer(s.id)
			if l == nil || l.number != s.number {
				continue
			}
			for b := range s.content {
				if b < len(l.cells) && !l.cells[b].holds(s.content[b]) || b >= len(l.cells) && s.content[b] != 0 {
					v.w.fail("S13", "%s on %s: block %d is not %s", s.id, p.id, b, v.oracle.name(s.content[b]))
					return
				}
			}
		}
	}
}

// deleteSnapshot deletes a ready snapshot.
func (v *vol) deleteSnapshot() {
	if len(v.snaps) == 0 {
		return
	}
	i := v.w.pick(len(v.snaps))
	v.snaps = slices.Delete(v.snaps, i, i+1)
	v.w.count.Unsnapped++
}

// cleanLayers has nodes delete, some day, the layers of snapshots that are neither ready nor pending.
func (v *vol) cleanLayers() {
	w := v.w
	for _, p := range v.places {
		if !p.node.up || p.machine == nil {
			continue
		}
		for _, l := range slices.Clone(p.disk.snapshots) {
			if v.keeps(l) || !w.chance(0.1) {
				continue
			}
			p.disk.dropLayer(l.id)
			p.machine.Forget(l.id, l.number)
			w.count.LayersDeleted++
		}
	}
}

func (v *vol) keeps(l *layer) bool {
	return v.pend != nil && v.pend.barrier.Number == l.number ||
		slices.ContainsFunc(v.snaps, func(s *snapshot) bool { return s.id == l.id && s.number == l.number })
}
