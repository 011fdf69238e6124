package replication

import (
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// commit is a change that the controllers were asked for and whose outcome is not known yet.
type commit struct {
	id      uint64
	change  Change
	asked   bool // an answer is awaited
	retryAt Now
}

// propose1 asks for a change.
func (e *Engine) propose1(c Change, add, remove PeerSet) {
	e.commits++
	e.commit = &commit{id: e.commits, change: c, asked: true, retryAt: Never}
	e.adding, e.removing = add, remove
	f := e.emit(EffectCommit)
	f.Commit, f.Change = e.commit.id, c
}

// propose asks for the change that is due most: to go on without failed members, before all others.
func (e *Engine) propose() {
	if e.commit != nil || e.phase != phaseMarking && e.phase != phaseLive {
		return
	}
	gone := e.isr & e.failed
	well, restarted := false, false
	for _, m := range e.members {
		if m != nil && (e.isr &^ e.failed).Has(m.slot) && m.open {
			well = true
			_, is := m.newBoot()
			restarted = restarted || is
		}
	}
	switch {
	case !well && !e.cfg.Rules.WithoutLastMemberGuard:
		return // whoever is left has to be there first
	case gone != 0:
	case e.expandPropose() || e.addPropose() || !restarted:
		return
	}
	r := &Reconfigure{Epoch: e.m.Epoch, ConfigVersion: e.m.ConfigVersion}
	for _, m := range e.members {
		if m == nil {
			continue
		}
		if gone.Has(m.slot) {
			r.Remove = append(r.Remove, m.id)
		} else if p, ok := m.newBoot(); ok && m.open && e.isr.Has(m.slot) {
			r.Boots = append(r.Boots, p)
		}
	}
	e.propose1(Change{Reconfigure: r}, 0, gone)
}

// Committed answers EffectCommit: id is its number, m the record as it is now (unless the outcome is unknown).
func (e *Engine) Committed(now Now, id uint64, outcome CommitOutcome, m Membership) {
	if !e.begin(now) {
		return
	}
	c := e.commit
	if c == nil || c.id != id {
		if outcome != CommitUnknown && m.Revision > e.m.Revision {
			e.learn(m)
		}
		e.pump()
		return
	}
	c.asked = false
	switch {
	case outcome == CommitUnknown && !e.cfg.Rules.WithoutUnknownKeeps:
		c.retryAt = e.now + e.cfg.Timing.CommitRetry
	case outcome == CommitDone:
		if !e.superseded(&m) {
			e.committedDone(m)
		}
	case outcome == CommitUnknown:
		e.commitRefused(e.m)
	case e.superseded(&m):
	case m.ConfigVersion > e.m.ConfigVersion:
		e.committedDone(m) // by an attempt before this one
	default:
		e.commitRefused(m)
	}
	e.pump()
}

func (e *Engine) commitTick() {
	if c := e.commit; c != nil && e.now >= c.retryAt {
		c.asked, c.retryAt = true, Never
		f := e.emit(EffectCommit)
		f.Commit, f.Change = c.id, c.change
	}
}

func (e *Engine) committedDone(m Membership) {
	if m.Revision < e.m.Revision {
		m = e.m // a newer record, which has the change as well, was learned meanwhile
	}
	e.commit = nil
	e.adding, e.removing = 0, 0
	e.adopt(m)
	if e.phase == phaseCommitting {
		e.startMarking()
	}
}

func (e *Engine) commitRefused(m Membership) {
	adding := e.adding
	e.commit = nil
	e.adding, e.removing = 0, 0
	for _, t := range e.members {
		if t != nil && adding.Has(t.slot) {
			e.failed = e.failed.Without(t.slot)
			e.lost = e.lost.Without(t.slot)
			e.dropTarget(t)
			e.reconnect(t)
		}
	}
	if m.Revision > e.m.Revision {
		e.adopt(m)
	}
	e.recheck = true
	if e.phase == phaseCommitting {
		e.phase = phaseFencing // look again who is there
	}
}

// adopt takes over a record of this epoch.
func (e *Engine) adopt(n Membership) {
	was, wasAbsent, version := e.isr, e.absent, e.m.ConfigVersion
	e.m = n
	e.placeMembers()
	e.isr = e.committed()
	e.trackAbsent()
	for _, m := range e.members {
		if m == nil {
			continue
		}
		s := m.slot
		m.bootsAt = m.rec.BootID
		switch {
		case was.Has(s) && !e.isr.Has(s):
			e.removed(m)
		case !was.Has(s) && e.isr.Has(s):
			e.removedHere = e.removedHere.Without(s)
			e.mirrors, e.final = e.mirrors.Without(s), e.final.Without(s)
			if rs := m.rs; rs != nil {
				wil := rs.own.Clone()
				rs.wil.Into(wil)
				runs, _, _ := wil.Runs(0, wil.Len())
				e.active.restore(runs, e.flush.round)
				m.rs = nil
			}
		}
	}
	for _, m := range e.members {
		for s := range Slot(MaxMembers) {
			if m != nil && !e.absent.Has(s) {
				m.marks[s] = nil
			}
		}
	}
	e.failed &= e.isr | e.adding
	e.lost &= e.isr | e.adding
	if e.isr.Len() == 1 && e.phase == phaseLive {
		e.dirty.Clear()
	}
	e.recheck, e.retry = true, true
	if n.Size > e.size {
		e.size = n.Size
		e.emit(EffectResized).Size = e.size
	}
	if e.isr&^e.lost == 0 {
		e.over(EffectFailed, ReasonLostWrites)
		return
	}
	if !e.isr.Has(e.src) {
		e.chooseSource()
	}
	if e.unlogged && len(n.Members) > 1 && e.phase > phaseCommitting {
		e.beginLog()
		return
	}
	if version != n.ConfigVersion || wasAbsent != e.absent {
		e.reconfigureAll()
	}
}

// beginLog has the only replica keep a write-intent log from now on. A new session makes sure that nothing is under way
// without it; a flush begun after that, that nothing before it is needed.
func (e *Engine) beginLog() {
	e.unlogged = false
	e.loggedFrom = e.flush.round + 1
	e.flush.wanted = true
	for o := e.ops.first; o != nil; o = o.next {
		if o.kind.changes() {
			from, to := e.g.regions(o.off, o.n)
			for i := from; i < to; i++ {
				e.active.touch(i, e.flush.round, e.now)
			}
		}
	}
	e.confGen++
	for _, m := range e.members {
		if m != nil && e.isr.Has(m.slot) {
			e.reconnect(m)
		}
	}
}

// removed is called for a member that the controllers took out: what it may lack is handed to the others before anything
// that waited for it is acknowledged.
func (e *Engine) removed(m *member) {
	s := m.slot
	if e.phase > phaseCommitting && !e.cfg.Rules.WithoutMissed {
		e.missed(m, e.unflushed(m))
	}
	e.removedHere = e.removedHere.With(s)
	m.u.Clear()
	m.marks = [MaxMembers]*region.Set{}
	m.retryAt = e.now + e.cfg.Timing.ResyncRetry
	for o := e.ops.first; o != nil; o = o.next {
		o.want, o.sent, o.acked = o.want.Without(s), o.sent.Without(s), o.acked.Without(s)
	}
	if m.ready || m.pending.first != nil {
		e.reconnect(m)
	}
}

// unflushed is what a member may lack, in extents: all that is not reconciled, or was sent since the last flush, which includes
// what is under way.
func (e *Engine) unflushed(m *member) *region.Set {
	set := new(region.Set)
	e.u.Into(set)
	per := uint32(e.g.Region / e.g.Extent)
	for i, ok := e.dirty.Next(0); ok; i, ok = e.dirty.Next(i + 1) {
		set.AddRange(i*per, (i+1)*per)
	}
	if m != nil {
		m.u.Into(set)
	}
	return set
}

// missed has all others mark what one lacks.
func (e *Engine) missed(p *member, set *region.Set) {
	if set.Empty() {
		return
	}
	for _, q := range e.members {
		if q == nil || q == p || !e.isr.Has(q.slot) && q.rs == nil {
			continue
		}
		if q.marks[p.slot] == nil {
			q.marks[p.slot] = new(region.Set)
		}
		q.marks[p.slot].Union(set)
	}
}

// reconfigureAll has all members and targets learn the newest configuration; writes to each go on when it has.
func (e *Engine) reconfigureAll() {
	e.confGen++
	for _, m := range e.members {
		if m == nil || !(e.isr|e.adding).Has(m.slot) && m.rs == nil {
			continue
		}
		m.ready = false
		e.markUnsynced(m)
		e.syncMember(m)
	}
}

func (e *Engine) markUnsynced(m *member) { e.unsynced = e.unsynced.With(m.slot) }

// syncMember brings a member's configuration up to date, one request at a time, and then sends what it lacks.
func (e *Engine) syncMember(m *member) {
	if !m.open || m.confBusy || m.ready || e.failed.Has(m.slot) || e.phase < phaseMarking {
		return
	}
	inSync := e.isr.Has(m.slot) || e.adding.Has(m.slot)
	if !inSync && (m.rs == nil || m.rs.stage == stageResize) {
		return
	}
	if m.confSent != e.confGen {
		e.sendConfig(m)
		return
	}
	for s := range Slot(MaxMembers) {
		if set := m.marks[s]; set != nil && !set.Empty() && e.members[s] != nil && s != m.slot {
			e.sendMarks(m, e.members[s].id, set)
			return
		}
	}
	m.ready = true
	e.unsynced = e.unsynced.Without(m.slot)
	e.catchUp(m)
	e.recheck = true
	if m.rs != nil {
		e.resyncReady(m)
	}
}

func (e *Engine) sendConfig(m *member) {
	gen := e.confGen
	m.confSent, m.confBusy = gen, true
	c := &Config{Lineage: e.m.Lineage, ConfigVersion: e.m.ConfigVersion, Role: RoleSYNC}
	if e.isr.Has(m.slot) {
		c.Role = RoleISR
	}
	c.Unlogged = e.unlogged
	if m.rs != nil && m.rs.reset {
		c.Reset = true
	}
	for _, q := range e.members {
		if q == nil {
			continue
		}
		if e.isr.Has(q.slot) {
			c.ISR = append(c.ISR, q.id)
		}
		if e.absent.Has(q.slot) && q != m {
			since := e.m.ConfigVersion
			if e.removedHere.Has(q.slot) && e.isr.Has(m.slot) {
				since = q.rec.RemovedAt
			}
			c.Absent = append(c.Absent, AbsentPeer{Slot: q.slot, ID: q.id, Since: since})
		}
	}
	e.send(m, KindConfigure, nil, func(a *Message) {
		m.confBusy = false
		switch a.Status {
		case StatusOK:
			m.confDone, m.fence.PoisonedBefore = gen, false
			if m.rs != nil {
				m.rs.reset = false
			}
			e.syncMember(m)
		default:
			e.fail(m)
		}
	}).Config = c
}

func (e *Engine) sendMarks(m *member, peer volume.ReplicaID, set *region.Set) {
	m.confBusy = true
	runs, _, _ := set.Runs(0, MaxRuns)
	e.send(m, KindMarkMissed, nil, func(a *Message) {
		m.confBusy = false
		switch a.Status {
		case StatusOK:
			set.RemoveRuns(runs)
			e.syncMember(m)
		default:
			e.fail(m)
		}
	}).Set = &SetPage{Peer: peer, Runs: runs}
}
