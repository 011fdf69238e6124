package replication

import (
	"bytes"

	"github.com/ballast-csi/ballast/pkg/region"
)

// resyncStep carries a resync on as far as it goes.
func (e *Engine) resyncStep(m *member) {
	rs := m.rs
	if !m.ready || e.barrier != nil && e.barrier.holds() {
		return
	}
	e.resizeTarget(m)
	switch rs.stage {
	case stageList:
		if rs.asked == nil && rs.again != nil {
			rs.again()
		}
	case stageCopy:
		if e.targetNeedsFlush(rs) {
			return
		}
		left := int64(rs.todo.Len()) * e.g.Extent
		switch {
		case len(rs.fills) > 0:
			if e.copySome(rs, true); rs.todo.Empty() && rs.ops == 0 {
				e.verifySome(rs)
				if rs.ops == 0 && rs.todo.Empty() && rs.copied.Empty() {
					e.sealFill(m)
				}
			}
		case left <= e.cfg.Timing.MirrorBelow || rs.passes >= maxPasses:
			rs.stage = stageDrain
			e.resyncStep(m)
		default:
			if e.copySome(rs, true); rs.passes >= maxPasses {
				e.resyncStep(m)
			}
		}
	case stageDrain:
		if rs.ops > 0 && !e.cfg.Rules.WithoutCopyDrain {
			return
		}
		rs.stage = stageMirror
		if !e.cfg.Rules.WithoutMirror {
			e.mirrors = e.mirrors.With(m.slot)
		}
		e.resyncStep(m)
	case stageMirror:
		if e.targetNeedsFlush(rs) {
			return
		}
		if e.copySome(rs, false); rs.todo.Empty() && rs.ops == 0 {
			rs.stage = stageFinal
			if !e.cfg.Rules.WithoutMirror {
				e.final = e.final.With(m.slot)
			}
			e.resyncStep(m)
		}
	case stageFinal:
		if e.underWayTo(m) && !e.cfg.Rules.WithoutTargetDrain {
			return
		}
		rs.stage, rs.compared = stageFlush, false
		if e.cfg.Rules.WithoutFlushBeforeAdd {
			rs.stage = stageVerify
			e.resyncStep(m)
			return
		}
		e.flushTarget(m)
	case stageVerify:
		if !e.cfg.Rules.WithoutVerify {
			if e.verifySome(rs); rs.ops > 0 || !rs.copied.Empty() {
				return
			}
		}
		switch {
		case !rs.todo.Empty():
			rs.stage = stageMirror
			e.resyncStep(m)
		case !m.u.Empty() && !e.cfg.Rules.WithoutFlushBeforeAdd:
			// What was compared may have been written since the flush, over something else.
			rs.stage, rs.compared = stageFlush, true
			e.flushTarget(m)
		default:
			rs.stage = stageAdopt
			e.adoptMissed(m)
		}
	case stageAdopt:
		if rs.asked == nil {
			e.adoptMissed(m)
		}
	case stageAdd:
		if (e.absent.Without(m.slot))&^rs.adopted != 0 {
			rs.stage = stageAdopt
			e.adoptMissed(m)
		}
	}
}

// resizeTarget gives a target the size that was exposed while it was being copied to.
func (e *Engine) resizeTarget(m *member) {
	rs := m.rs
	size := e.size
	if m.fence.Size >= size || rs.resizing || e.cfg.Rules.WithoutExpandOnFence {
		return
	}
	rs.resizing = true
	e.send(m, KindResize, nil, func(a *Message) {
		if m.rs != rs || rs.dead {
			return
		}
		rs.resizing = false
		if a.Status != StatusOK {
			e.dropTarget(m)
			return
		}
		m.fence.Size = max(m.fence.Size, size)
	}).Len = size
}

// copySome keeps copies under way, as many as the window allows.
func (e *Engine) copySome(rs *resync, unlocked bool) {
	for !rs.todo.Empty() {
		run, ok := rs.todo.NextRun(rs.cursor, uint32(e.g.MaxCopy/e.g.Extent))
		if !ok {
			rs.cursor = 0
			rs.passes++
			if unlocked && len(rs.fills) == 0 && rs.passes >= maxPasses {
				return
			}
			continue
		}
		probe := rs.clip(&run)
		off := int64(run.First) * e.g.Extent
		n := min(int64(run.N)*e.g.Extent, e.size-off)
		if n <= 0 {
			rs.todo.RemoveRange(run.First, run.End())
			continue
		}
		if !e.mayCopy(n) {
			return
		}
		rs.todo.RemoveRange(run.First, run.End())
		rs.cursor = run.End()
		if probe {
			rs.suspects.Remove(run.First)
			e.compare(rs, off, n, true)
			continue
		}
		o := e.newOp(opCopy, off, n)
		o.fill = rs
		switch {
		case len(rs.fills) > 0 || unlocked && e.cfg.Rules.WithoutCopyReadLock || e.cfg.Rules.WithoutCopyLock:
			o.unlocked = true // a snapshot does not change
		case unlocked:
			// Only while it reads, so that it reads nothing that not all members have: one of them could be left
			// alone with the target, and know of no difference.
			o.shared, o.reads = true, true
		}
		rs.ops++
		e.copies(n)
		from, to := e.g.regions(off, n)
		rs.wil.AddRange(from, to)
		e.admit(o)
	}
}

// clip shortens a run of extents to be copied to one that is to be compared first, which it tells, or to those before the
// next such one. A digest covers one extent: of a region that was written, few are different. What is filled in for a
// snapshot is copied at once.
func (rs *resync) clip(run *region.Run) (probe bool) {
	if len(rs.fills) > 0 {
		return false
	}
	if rs.suspects.Has(run.First) {
		run.N = 1
		return true
	}
	for i := uint32(1); i < run.N; i++ {
		if rs.suspects.Has(run.First + i) {
			run.N = i
		}
	}
	return false
}

// filled notes that a copy has arrived.
func (e *Engine) filled(o *op) {
	o.fill.copied.AddRange(e.g.extents(o.off, o.n))
	o.fill.done += o.n
}

// underWayTo tells whether a write that the client may take for done has not arrived at a target.
func (e *Engine) underWayTo(m *member) bool {
	for o := e.ops.first; o != nil; o = o.next {
		if o.kind.changes() && o.fill == nil && o.started && o.answered && o.want.Has(m.slot) && !o.acked.Has(m.slot) {
			return true
		}
	}
	return false
}

// targetNeedsFlush flushes a target before the copies fill its write-intent log.
func (e *Engine) targetNeedsFlush(rs *resync) bool {
	if rs.flushing {
		return true
	}
	var set region.Set
	rs.wil.Into(&set)
	if set.Len() < max(1, e.g.MaxActive/2) {
		return false
	}
	e.flushTarget(rs.m)
	return true
}

// flushTarget makes durable what a target was sent, and takes it out of the target's write-intent log.
func (e *Engine) flushTarget(m *member) {
	rs := m.rs
	rs.flushing = true
	m.u.Begin()
	rs.wil.Begin()
	var busy region.Set
	for o := e.ops.first; o != nil; o = o.next {
		if !o.kind.changes() || !o.want.Has(m.slot) && o.fill != rs {
			continue
		}
		m.u.AddRange(e.g.extents(o.off, o.n))
		from, to := e.g.regions(o.off, o.n)
		rs.wil.AddRange(from, to)
		busy.AddRange(from, to)
	}
	upto := m.seq
	e.send(m, KindFlush, nil, func(a *Message) {
		if m.rs != rs || rs.dead {
			return
		}
		if a.Status != StatusOK || a.Boot != m.boot {
			e.dropTarget(m)
			return
		}
		rs.flushing = false
		m.u.Succeed()
		// What it had marked itself stays until it is a member: it is known to be equal only when it has been compared.
		clear := rs.wil.Old().Clone()
		clear.Subtract(&rs.own)
		clear.Subtract(&busy)
		rs.wil.Succeed()
		runs, _, _ := clear.Runs(0, clear.Len())
		e.sendClear(m, upto, runs)
		switch {
		case rs.stage != stageFlush:
		case rs.compared:
			rs.stage = stageAdopt
			e.adoptMissed(m)
		default:
			rs.stage = stageVerify
		}
	})
}

// verifySome keeps comparisons under way of what was copied.
func (e *Engine) verifySome(rs *resync) {
	if e.cfg.Rules.WithoutVerify {
		rs.copied.Clear()
		return
	}
	for {
		run, ok := rs.copied.NextRun(0, uint32(e.g.MaxCopy/e.g.Extent))
		if !ok {
			return
		}
		off := int64(run.First) * e.g.Extent
		n := min(int64(run.N)*e.g.Extent, e.size-off)
		if !e.mayCopy(n) {
			return
		}
		rs.copied.RemoveRange(run.First, run.End())
		e.compare(rs, off, n, false)
	}
}

// compare has a range compared at source and target.
func (e *Engine) compare(rs *resync, off, n int64, probe bool) {
	o := e.newOp(opHash, off, n)
	o.fill, o.probe, o.unlocked = rs, probe, probe && e.cfg.Rules.WithoutProbeLock
	rs.ops++
	e.copies(n)
	e.admit(o)
}

// startHash asks source and target for digests of the same range, which nobody writes meanwhile.
func (e *Engine) startHash(o *op) {
	rs := o.fill
	q := e.reader(o.bad)
	if rs.dead || q == nil || !rs.m.ready {
		o.doomed = e.isr&^o.bad == 0
		e.recheck = e.recheck || rs.dead || o.doomed
		return
	}
	o.src, o.digests = q.slot, [2][]byte{}
	for _, m := range []*member{q, rs.m} {
		o.sent = o.sent.With(m.slot)
		msg := e.send(m, KindHash, o, nil)
		msg.Off, msg.Len = o.off, o.n
		if m == q {
			msg.Snapshot = rs.snapshot()
		}
	}
}

func (e *Engine) hashed(o *op, m *member, a *Message) {
	rs := o.fill
	if rs.dead {
		e.recheck = true
		return
	}
	if a.Status == StatusIO && m != rs.m { // another member may be able to read it
		o.bad = o.bad.With(m.slot)
		e.forget(o)
		o.sent = 0
		e.startHash(o)
		return
	}
	if a.Status != StatusOK {
		e.missingSnapshot(a.Status, rs.snapshot())
		e.dropTarget(rs.m)
		return
	}
	at := 0
	if m == rs.m {
		at = 1
	}
	if o.digests[at] = a.Data; o.digests[1-at] == nil {
		return
	}
	rs.seen += o.n
	equal := bytes.Equal(o.digests[0], o.digests[1])
	switch {
	case equal && o.probe && e.cfg.Rules.WithoutEqualUnflushed:
	case equal && o.probe:
		// It may be durable there no more than what was just copied.
		rs.m.u.AddRange(e.g.extents(o.off, o.n))
	case equal:
	case o.probe:
		rs.todo.AddRange(e.g.extents(o.off, o.n))
	default:
		rs.todo.AddRange(e.g.extents(o.off, o.n))
		rs.mismatches++
		e.mismatches++
	}
	e.finish(o)
	if rs.mismatches > maxMismatches {
		e.dropTarget(rs.m)
	}
}

// sealFill seals a target's head, which has become equal to a snapshot, as that snapshot's layer.
func (e *Engine) sealFill(m *member) {
	rs := m.rs
	rs.stage = stageSeal
	s := rs.fills[0]
	msg := e.send(m, KindSeal, nil, func(a *Message) {
		if m.rs != rs || rs.dead {
			return
		}
		if a.Status != StatusOK {
			e.dropTarget(m)
			return
		}
		m.sealed(s)
		rs.fills = rs.fills[1:]
		rs.stage = stageList
		rs.again = func() {
			if q := e.reader(0); q != nil {
				e.listAllocated(m, q, SetPage{Base: s.ID}, rs.snapshot(), func() { e.beginCopy(rs) })
			}
		}
		rs.again()
	})
	msg.Seal = &Seal{Snapshot: s.ID, Number: s.Number, ConfigVersion: e.m.ConfigVersion, Fill: true}
}

// sealed notes a snapshot that a member has now.
func (m *member) sealed(s SealedSnapshot) {
	if m.fence != nil {
		m.fence.Snapshots = append(m.fence.Snapshots, s)
	}
}

// adoptMissed tells the target what others missed, with the tags of the member that tracked it.
func (e *Engine) adoptMissed(m *member) {
	rs := m.rs
	left := e.absent.Without(m.slot) &^ rs.adopted
	if left == 0 {
		rs.stage = stageAdd
		return
	}
	q := e.reader(0)
	if q == nil {
		return // until one is there
	}
	e.adoptPage(m, q, e.members[left.first()], 0)
}

func (e *Engine) adoptPage(m, q, peer *member, from uint32) {
	rs := m.rs
	e.ask(rs, q, KindMissed, nil, func(a *Message) {
		if a.Status != StatusOK || a.Set == nil {
			e.dropTarget(m)
			return
		}
		page := *a.Set
		runs := page.Runs
		if e.cfg.Rules.WithoutAdoptMissed {
			runs = nil
		}
		e.ask(rs, m, KindMarkMissed, nil, func(b *Message) {
			if b.Status != StatusOK {
				e.dropTarget(m)
				return
			}
			if page.More && page.From > from {
				e.adoptPage(m, q, peer, page.From)
				return
			}
			rs.adopted = rs.adopted.With(peer.slot)
			e.adoptMissed(m)
		}).Set = &SetPage{Peer: peer.id, Since: page.Since, Adopt: true, Runs: runs}
	}).Set = &SetPage{Peer: peer.id, From: from}
}

// addPropose asks for a complete target to be added.
func (e *Engine) addPropose() bool {
	if e.phase != phaseLive || e.barrier != nil {
		return false
	}
	for _, m := range e.members {
		if m == nil || m.rs == nil || m.rs.stage != stageAdd || !m.ready || e.absent.Without(m.slot)&^m.rs.adopted != 0 {
			continue
		}
		if m.fence.Size < e.size && !e.cfg.Rules.WithoutExpandOnFence {
			continue
		}
		if e.flush.done < e.loggedFrom && !e.cfg.Rules.WithoutLogFirst {
			if !e.flush.running && !e.flush.wanted {
				e.flush.wanted, e.retry = true, true
			}
			continue
		}
		e.propose1(Change{Reconfigure: &Reconfigure{Epoch: e.m.Epoch, ConfigVersion: e.m.ConfigVersion,
			Add: []Proof{{ID: m.id, Incarnation: m.incarnation, BootID: m.boot}}}}, PeerSet(0).With(m.slot), 0)
		return true
	}
	return false
}
