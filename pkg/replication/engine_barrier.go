package replication

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// barrierStage is how far a snapshot has got.
type barrierStage uint8

const (
	barrierWaiting  barrierStage = iota // for dirty regions to be reconciled; writes go on
	barrierDraining                     // writes wait; those under way end
	barrierDrained                      // a group: for the others
	barrierSealing                      // members seal
	barrierSealed                       // a group: for the others
)

// barrierState is a snapshot that is being cut.
type barrierState struct {
	b      Barrier
	group  bool
	stage  barrierStage
	until  Now
	sealed PeerSet
	failed bool
}

// holds tells whether writes wait.
func (b *barrierState) holds() bool { return b.stage >= barrierDraining }

// Barrier cuts a snapshot that the controllers have prepared: it ends with EffectBarrier, at the latest when BarrierWait
// is over. In a group the engine says EffectDrained and awaits Cut, says EffectSealed and awaits Release: a coordinator
// calls Cut when all of the group have drained and Release when all have sealed. Only if all of them then say OK the
// snapshots are of one instant.
func (e *Engine) Barrier(now Now, b Barrier, group bool) {
	if !e.begin(now) {
		return
	}
	if e.phase != phaseLive || e.barrier != nil || e.detaching || b.Epoch != e.m.Epoch || b.ConfigVersion != e.m.ConfigVersion {
		f := e.emit(EffectBarrier)
		f.Number, f.Result = b.Number, ResultIO
		e.pump()
		return
	}
	e.barrier = &barrierState{b: b, group: group, until: e.now + e.cfg.Timing.BarrierWait}
	e.pump()
}

// Cut goes on with a group's barrier after all of the group have drained.
func (e *Engine) Cut(now Now, number uint64) {
	if !e.begin(now) {
		return
	}
	if b := e.barrier; b != nil && b.b.Number == number && b.stage == barrierDrained {
		e.seal()
	}
	e.pump()
}

// Release ends a group's barrier after all of the group have sealed.
func (e *Engine) Release(now Now, number uint64) {
	if !e.begin(now) {
		return
	}
	if b := e.barrier; b != nil && b.b.Number == number {
		e.endBarrier(b.stage == barrierSealed)
	} else {
		f := e.emit(EffectBarrier)
		f.Number, f.Result = number, ResultIO
	}
	e.pump()
}

// barrierProgress goes on as far as nothing has to be waited for.
func (e *Engine) barrierProgress() {
	b := e.barrier
	if b == nil {
		return
	}
	if b.failed || b.b.ConfigVersion != e.m.ConfigVersion || e.commit != nil && e.commit.change.Reconfigure != nil {
		e.endBarrier(false)
		return
	}
	if b.stage == barrierWaiting {
		if !e.dirty.Empty() {
			return
		}
		b.stage = barrierDraining
	}
	if b.stage != barrierDraining {
		return
	}
	if !e.cfg.Rules.WithoutBarrierDrain {
		for o := e.ops.first; o != nil; o = o.next {
			if o.kind.changes() && o.fill == nil && !(o.answered && o.want&(e.isr|e.adding)&^o.acked == 0) {
				return
			}
		}
	}
	b.stage = barrierDrained
	if b.group {
		e.emit(EffectDrained).Number = b.b.Number
		if !e.cfg.Rules.WithoutGroupDrain {
			return
		}
	}
	if e.seal(); b.failed {
		e.endBarrier(false)
	}
}

// seal has all members cut.
func (e *Engine) seal() {
	b := e.barrier
	b.stage = barrierSealing
	for _, m := range e.members {
		if m == nil || !e.isr.Has(m.slot) {
			continue
		}
		if !m.ready {
			b.failed = true
			return
		}
		s := m.slot
		e.send(m, KindSeal, nil, func(a *Message) {
			if e.barrier != b {
				return
			}
			if a.Status != StatusOK {
				b.failed = true
				if a.Status == StatusIO {
					e.fail(m)
				}
				return
			}
			b.sealed = b.sealed.With(s)
			if b.sealed&e.isr == e.isr || e.cfg.Rules.WithoutSealAll {
				e.allSealed()
			}
		}).Seal = &Seal{Snapshot: b.b.Snapshot, Number: b.b.Number, ConfigVersion: b.b.ConfigVersion}
	}
}

func (e *Engine) allSealed() {
	b := e.barrier
	if b.stage != barrierSealing {
		return
	}
	b.stage = barrierSealed
	snap := SealedSnapshot{ID: b.b.Snapshot, Number: b.b.Number}
	e.unseal(snap.ID)
	for _, m := range e.members {
		switch {
		case m == nil:
		case e.isr.Has(m.slot):
			m.sealed(snap)
		case m.rs != nil:
			e.cutTarget(m, snap)
		}
	}
	if b.group {
		e.emit(EffectSealed).Number = b.b.Number
		return
	}
	e.endBarrier(true)
}

// unseal is called when a layer is to be deleted, or was cut anew: a target that is being given it begins again.
func (e *Engine) unseal(id volume.SnapshotID) {
	for _, m := range e.members {
		if m == nil {
			continue
		}
		if m.fence != nil {
			m.fence.Snapshots = slices.DeleteFunc(m.fence.Snapshots, func(s SealedSnapshot) bool { return s.ID == id })
		}
		if m.rs != nil && slices.ContainsFunc(m.rs.fills, func(s SealedSnapshot) bool { return s.ID == id }) {
			e.dropTarget(m)
		}
	}
}

// cutTarget has a target get the snapshot as well: its head, once it equals the snapshot, is sealed before it goes on.
func (e *Engine) cutTarget(m *member, snap SealedSnapshot) {
	if rs := m.rs; rs.stage <= stageList || len(rs.fills) > 0 {
		if len(rs.fills) == 0 {
			// What is, or was, listed was the head: what was written since then is in the snapshot.
			rs.todo.Union(&rs.since)
			rs.since.Clear()
		}
		rs.fills = append(rs.fills, snap)
		return
	}
	// Copies under way are of the new head: they end with their session.
	e.reconnect(m)
	if m.rs != nil {
		m.rs.fills = append(m.rs.fills, snap)
	}
}

// barrierLost is called when a member's session is lost.
func (e *Engine) barrierLost(m *member) {
	if e.isr.Has(m.slot) && e.barrier.stage == barrierSealing {
		e.barrier.failed = true
	}
}

// barrierTick gives up what takes too long.
func (e *Engine) barrierTick() {
	if b := e.barrier; b != nil && e.now >= b.until {
		e.endBarrier(false)
	}
}

// endBarrier lets writes go on.
func (e *Engine) endBarrier(ok bool) {
	b := e.barrier
	e.barrier = nil
	e.retry = true
	f := e.emit(EffectBarrier)
	f.Number, f.Result, f.Version = b.b.Number, ResultIO, b.b.ConfigVersion
	if !ok {
		if b.sealed != 0 {
			e.unseal(b.b.Snapshot)
		}
		return
	}
	f.Result = ResultOK
	var holders []volume.ReplicaID
	for _, m := range e.members {
		if m != nil && b.sealed.Has(m.slot) {
			holders = append(holders, m.id)
		}
	}
	f.Holders = holders
}

// expandState is a size that members are being given.
type expandState struct {
	target int64
	sent   PeerSet
	done   PeerSet
	// refused have no room for it, and are asked again after until.
	refused PeerSet
	until   Now
}

// forget is for a member whose session ends: it may come back with another disk.
func (x *expandState) forget(s Slot) {
	x.sent, x.done, x.refused = x.sent.Without(s), x.done.Without(s), x.refused.Without(s)
}

// expandProgress gives all members and targets the size that was asked for.
func (e *Engine) expandProgress() {
	x := &e.expand
	if e.phase != phaseLive || e.m.Target <= e.size || e.detaching {
		return
	}
	if x.target != e.m.Target {
		*x = expandState{target: e.m.Target}
	}
	if e.now < x.until {
		return
	}
	for _, m := range e.members {
		if m == nil || !m.ready || x.sent.Has(m.slot) || x.done.Has(m.slot) || !e.isr.Has(m.slot) && m.rs == nil {
			continue
		}
		s := m.slot
		x.sent = x.sent.With(s)
		target := x.target
		e.send(m, KindResize, nil, func(a *Message) {
			x.sent = x.sent.Without(s)
			switch {
			case a.Status == StatusRefused || a.Status != StatusOK && e.isr.Has(s) && e.lastMember(m):
				// Who has no room is as good as before: it is the expand that comes to nothing.
				if x.until = e.now + Second; a.Status == StatusRefused && x.target == target {
					x.refused = x.refused.With(s)
				}
				e.retryAt = min(e.retryAt, x.until)
			case a.Status != StatusOK:
				if e.fail(m); m.rs != nil {
					e.dropTarget(m)
				}
			case x.target == target:
				x.done, x.refused = x.done.With(s), x.refused.Without(s)
				m.fence.Size = max(m.fence.Size, target)
			}
		}).Len = target
	}
}

// expandPropose asks to expose a size that all members have.
func (e *Engine) expandPropose() bool {
	x := &e.expand
	have := x.done&e.isr == e.isr
	if e.cfg.Rules.WithoutExpandAll {
		have = x.done != 0
	}
	if e.phase != phaseLive || e.m.Target <= e.size || x.target != e.m.Target || !have {
		return false
	}
	e.propose1(Change{ExpandCommit: &ExpandCommit{Epoch: e.m.Epoch, ConfigVersion: e.m.ConfigVersion, Size: x.target}}, 0, 0)
	return true
}

// Detach ends the engine in good order: what is under way ends, all is made durable, then EffectDetached is said.
// Operations that come later are answered with ResultGone.
func (e *Engine) Detach(now Now) {
	if !e.begin(now) {
		return
	}
	e.detaching = true
	if e.phase != phaseLive {
		e.over(EffectDetached, "")
		return
	}
	e.flush.wanted = true
	e.pump()
}

func (e *Engine) detachProgress() {
	if !e.detaching || e.phase != phaseLive {
		return
	}
	for o := e.ops.first; o != nil; o = o.next {
		if o.client() && !o.answered {
			return
		}
	}
	if len(e.parked) > 0 || len(e.held) > 0 || e.flush.running || e.flush.wanted || e.commit != nil {
		return
	}
	if !e.flushed() {
		e.flush.wanted = true
		e.flushProgress()
		return
	}
	e.over(EffectDetached, "")
}
