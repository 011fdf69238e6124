package replication

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// stage is how far the return of a replica has got.
type stage uint8

const (
	stageResize    stage = iota // it gets the volume's size
	stageConfigure              // role SYNC becomes durable there
	stageList                   // what it lacks is found out
	stageCopy                   // copies; writes are not mirrored but copied again
	stageSeal                   // its head is a snapshot's, and is sealed as that
	stageDrain                  // unlocked copies end
	stageMirror                 // copies under lock; writes are mirrored
	stageFinal                  // acknowledgements wait for it; what is under way to it ends
	stageFlush                  // all of it becomes durable
	stageVerify                 // what was copied is compared
	stageAdopt                  // it learns what others missed
	stageAdd                    // it may be added
	stagePaused                 // its session was lost
)

var stageNames = [...]string{"resize", "configure", "list", "copy", "seal", "drain", "mirror", "final", "flush", "verify", "adopt",
	"add", "paused"}

func (s stage) String() string { return stageNames[s] }

// maxPasses bounds the passes without mirroring: a client that writes faster than is copied must not go on for ever.
const maxPasses = 4

// maxMismatches bounds the rounds of copying again what was found to differ.
const maxMismatches = 3

// resync is the return of a replica.
type resync struct {
	m     *member
	stage stage
	dead  bool
	reset bool // the next configuration begins it
	// partial: what it missed since it was removed is copied, if anyone knows; full: everything.
	partial, full bool
	// common is the newest snapshot that source and target have: sealed layers do not change.
	common volume.SnapshotID

	// todo is still to be copied, copied still to be compared, in extents. since is what was written while snapshots were
	// filled in.
	todo, copied, since region.Set
	// suspects are extents that may well be equal at source and target: those of todo are compared before they are copied.
	suspects region.Set
	// fills are the snapshots that it lacks, oldest first: its head is made equal to the first and sealed, and so on.
	fills []SealedSnapshot
	// wil is what copies and mirrored writes marked in its write-intent log, own what was marked there when it came: in
	// regions.
	wil region.Generations
	own region.Set

	cursor     uint32
	passes     int
	mismatches int
	ops        int // copies and comparisons under way
	flushing   bool
	resizing   bool
	compared   bool // the flush under way is the one after the comparison
	adopted    PeerSet
	tried      PeerSet // asked for what it missed
	// A question to a member is under way, whose answer the resync awaits; again asks it anew if that member is lost.
	asked *member
	again func()
	done  int64 // bytes copied
	seen  int64 // bytes compared
}

func (rs *resync) snapshot() volume.SnapshotID {
	if len(rs.fills) > 0 {
		return rs.fills[0].ID
	}
	return ""
}

// SetResyncPace bounds the bytes of copies in flight, where one copy is always allowed, and those that begin in a second;
// rate 0 is no bound.
func (e *Engine) SetResyncPace(now Now, window, rate int64) {
	if e.begin(now) {
		e.window, e.rate = window, rate
		if rate == 0 {
			e.copyAt = 0
		}
		e.pump()
	}
}

// mayCopy tells whether the pace allows a copy or comparison of n bytes to begin.
func (e *Engine) mayCopy(n int64) bool {
	return e.now >= e.copyAt && (e.copying == 0 || e.copying+n <= e.window)
}

// copies notes that one begins.
func (e *Engine) copies(n int64) {
	e.copying += n
	if e.rate > 0 {
		// What was not used is not saved up: a burst is what the foreground would feel.
		e.copyAt = e.now + Now(float64(n)*float64(Second)/float64(e.rate))
	}
}

// resyncProgress begins and carries on the return of replicas.
func (e *Engine) resyncProgress() {
	if e.phase != phaseLive || !e.dirty.Empty() || e.detaching {
		return
	}
	for _, m := range e.members {
		switch {
		case m == nil || e.isr.Has(m.slot) || e.adding.Has(m.slot):
		case m.rs != nil:
			e.resyncStep(m)
		case m.open && e.now >= m.retryAt && e.barrier == nil && !e.failed.Has(m.slot) && e.reader(0) != nil:
			e.beginResync(m)
		}
	}
}

func (e *Engine) resyncWake() Now {
	at := Never
	if e.phase != phaseLive || !e.dirty.Empty() {
		return at
	}
	if e.copyAt > e.pumped {
		at = e.copyAt
	}
	for _, m := range e.members {
		if m != nil && m.open && m.rs == nil && !e.isr.Has(m.slot) && !e.adding.Has(m.slot) && e.barrier == nil && e.pumped < m.retryAt {
			at = min(at, m.retryAt)
		}
	}
	return at
}

func (e *Engine) beginResync(m *member) {
	rs := &resync{m: m, reset: true, stage: stageResize}
	m.rs = rs
	m.u.Clear()
	m.marks = [MaxMembers]*region.Set{}
	rs.own.AddRuns(m.fence.WIL)
	for o := e.ops.first; o != nil; o = o.next {
		if o.started && o.kind.changes() && o.fill == nil {
			rs.since.AddRange(e.g.extents(o.off, o.n))
		}
	}
	rs.partial = m.rec.RemovedAt > 0 && (m.rec.Incarnation == m.incarnation || e.cfg.Rules.WithoutIncarnationCheck)
	e.chooseFills(rs)
	size := e.size // the greater one of an expand under way is given to it with the others
	if m.fence.Size >= size || e.cfg.Rules.WithoutExpandOnFence {
		rs.stage = stageConfigure
		e.syncMember(m)
		return
	}
	e.send(m, KindResize, nil, func(a *Message) {
		if m.rs != rs {
			return
		}
		if a.Status != StatusOK {
			e.dropTarget(m)
			return
		}
		m.fence.Size = size
		rs.stage = stageConfigure
		e.syncMember(m)
	}).Len = size
}

// chooseFills finds the snapshots that the target lacks and can be given: where only what it missed is copied, those that
// were cut since it was removed; where everything is, all that are newer than the newest it has.
func (e *Engine) chooseFills(rs *resync) {
	rs.fills, rs.common = nil, ""
	chain := e.chain()
	for i := len(chain) - 1; i >= 0 && !slices.Contains(rs.m.fence.Snapshots, chain[i]); i-- {
		if rs.partial && chain[i].Number <= rs.m.rec.RemovedBarriers {
			break
		}
		rs.fills = append(rs.fills, chain[i])
	}
	if n := len(chain) - len(rs.fills); n > 0 && slices.Contains(rs.m.fence.Snapshots, chain[n-1]) {
		rs.common = chain[n-1].ID
	}
	slices.Reverse(rs.fills)
}

// resyncReady is called when the target is configured and may be sent data.
func (e *Engine) resyncReady(m *member) {
	rs := m.rs
	switch rs.stage {
	case stageConfigure:
		rs.stage = stageList
		if rs.partial {
			e.listMissed(m)
		} else {
			e.listAll(m)
		}
	case stagePaused:
		rs.stage = stageCopy
	}
}

// written notes a write that the target does not get.
func (rs *resync) written(e *Engine, m *member, from, to uint32) {
	switch {
	case e.mirrors.Has(m.slot):
		regions := uint32(e.g.Region / e.g.Extent)
		rs.wil.AddRange(from/regions, (to+regions-1)/regions)
	case e.cfg.Rules.WithoutMarkedPass && rs.stage == stageCopy:
	case len(rs.fills) > 0 || rs.stage <= stageList:
		rs.since.AddRange(from, to)
	default:
		rs.todo.AddRange(from, to)
	}
}

// dropTarget gives a resync up. Its session ends with it, so that nothing of it arrives late.
func (e *Engine) dropTarget(m *member) {
	rs := m.rs
	if rs == nil {
		return
	}
	rs.dead = true
	m.rs = nil
	e.mirrors, e.final = e.mirrors.Without(m.slot), e.final.Without(m.slot)
	m.u.Clear()
	m.marks = [MaxMembers]*region.Set{}
	m.retryAt = e.now + e.cfg.Timing.ResyncRetry
	e.recheck = true
	e.reconnect(m)
}

// pauseResync keeps a resync whose target's session was lost: what was under way is copied again.
func (e *Engine) pauseResync(m *member) {
	rs := m.rs
	if e.adding.Has(m.slot) {
		return // the commit decides
	}
	mirrored := e.mirrors.Has(m.slot)
	e.mirrors, e.final = e.mirrors.Without(m.slot), e.final.Without(m.slot)
	e.recheck = true
	if rs.stage <= stageList || rs.stage == stageSeal {
		rs.dead = true
		m.rs = nil
		m.retryAt = e.now + e.cfg.Timing.ResyncRetry
		return
	}
	old := *rs
	next := old
	rs.dead = true // for the copies under way
	next.dead, next.ops, next.stage, next.flushing, next.resizing, next.passes = false, 0, stagePaused, false, false, 0
	next.adopted, next.tried, next.asked, next.again = 0, 0, nil, nil
	m.rs = &next
	for o := e.ops.first; o != nil; o = o.next {
		from, to := e.g.extents(o.off, o.n)
		switch {
		case o.fill == rs && (o.kind == opCopy || o.probe):
			next.todo.AddRange(from, to)
		case o.fill == rs:
			next.copied.AddRange(from, to)
		case mirrored && o.want.Has(m.slot) && !o.acked.Has(m.slot) && o.kind.changes():
			next.todo.AddRange(from, to)
		}
	}
}

// resumeResync goes on with a target that has come back.
func (e *Engine) resumeResync(m *member, rebooted bool) {
	rs := m.rs
	if rs.stage != stagePaused {
		return
	}
	if m.fence.Poisoned || m.fence.PoisonedBefore || m.fence.Role != RoleSYNC || m.fence.Size < e.size {
		rs.dead = true
		m.rs = nil
		m.u.Clear()
		m.retryAt = e.now
		return
	}
	if rebooted {
		if !e.cfg.Rules.WithoutTargetUnflushed {
			lost := e.unflushedBy(m)
			rs.todo.Union(lost)
		}
		m.u.Clear()
	}
	rs.own.AddRuns(m.fence.WIL)
	e.syncMember(m)
}

func (e *Engine) unflushedBy(m *member) *region.Set {
	set := new(region.Set)
	m.u.Into(set)
	return set
}

// reader is a member to ask or to copy from.
func (e *Engine) reader(not PeerSet) *member {
	set := e.isr &^ e.failed &^ e.removing &^ not
	if m := e.members[e.src]; m != nil && set.Has(e.src) && m.ready {
		return m
	}
	for _, m := range e.members {
		if m != nil && set.Has(m.slot) && m.ready {
			return m
		}
	}
	return nil
}

// ask has a member answer a question on behalf of a resync.
func (e *Engine) ask(rs *resync, q *member, kind Kind, again func(), then func(*Message)) *Message {
	rs.asked, rs.again = q, again
	return e.send(q, kind, nil, func(a *Message) {
		if rs.m.rs == rs && !rs.dead && rs.asked == q {
			rs.asked = nil
			then(a)
		}
	})
}

// askedLost is called when a member's session is lost: what it was asked is asked again.
func (e *Engine) askedLost(q *member) {
	for _, m := range e.members {
		if m != nil && m.rs != nil && m.rs.asked == q {
			m.rs.asked = nil
		}
	}
}

// listMissed asks members for what the target missed, one after another until one has tracked it since it was removed.
func (e *Engine) listMissed(m *member) {
	rs := m.rs
	rs.again = func() { rs.tried = 0; e.listMissed(m) }
	q := e.reader(rs.tried)
	switch {
	case q == nil && e.reader(0) == nil:
		return // until one is there
	case q == nil:
		e.listAll(m)
		return
	}
	rs.tried = rs.tried.With(q.slot)
	e.listMissedPage(m, q, 0)
}

func (e *Engine) listMissedPage(m, q *member, from uint32) {
	rs := m.rs
	e.ask(rs, q, KindMissed, rs.again, func(a *Message) {
		tracked := a.Status == StatusOK && a.Set != nil && a.Set.Since <= m.rec.RemovedAt
		switch {
		case !tracked:
			e.listMissed(m)
		case a.Set.More && a.Set.From > from:
			rs.todo.AddRuns(a.Set.Runs)
			e.listMissedPage(m, q, a.Set.From)
		default:
			rs.todo.AddRuns(a.Set.Runs)
			e.listed(m)
		}
	}).Set = &SetPage{Peer: m.id, From: from}
}

// listAll takes everything that source or target has stored since the newest snapshot that both have.
func (e *Engine) listAll(m *member) {
	rs := m.rs
	if rs.full = true; rs.partial {
		rs.partial = false
		e.chooseFills(rs)
	}
	rs.again = func() { e.listAll(m) }
	q := e.reader(0)
	if q == nil {
		return // until one is there
	}
	e.listAllocated(m, q, SetPage{Base: rs.common}, rs.snapshot(), func() {
		e.listAllocated(m, m, SetPage{Base: rs.common}, "", func() { e.listed(m) })
	})
}

// listAllocated adds the extents in which a snapshot or the head differs from another, as q has it.
func (e *Engine) listAllocated(m, q *member, page SetPage, snapshot volume.SnapshotID, then func()) {
	rs := m.rs
	msg := e.ask(rs, q, KindAllocated, rs.again, func(a *Message) {
		if a.Status != StatusOK || a.Set == nil {
			if a.Status == StatusNotFound && page.Base != "" && snapshot != "" {
				e.findMissing(m, q, page.Base, snapshot)
				return
			}
			e.missingSnapshot(a.Status, snapshot)
			e.missingSnapshot(a.Status, page.Base)
			e.dropTarget(m)
			return
		}
		rs.todo.AddRuns(a.Set.Runs)
		if q == m {
			rs.suspects.AddRuns(a.Set.Runs)
		}
		if a.Set.More && a.Set.From > page.From {
			page.From = a.Set.From
			e.listAllocated(m, q, page, snapshot, then)
			return
		}
		then()
	})
	msg.Set, msg.Snapshot = &page, snapshot
}

// findMissing forgets the one of two snapshots that a member does not have any more. The other is there: forgotten with it, it would
// not be filled in.
func (e *Engine) findMissing(m, q *member, base, snapshot volume.SnapshotID) {
	rs := m.rs
	msg := e.ask(rs, q, KindAllocated, rs.again, func(a *Message) {
		if a.Status == StatusOK {
			e.missingSnapshot(StatusNotFound, snapshot)
		} else {
			e.missingSnapshot(a.Status, base)
		}
		e.dropTarget(m)
	})
	msg.Set, msg.Snapshot = &SetPage{}, base
}

// listed begins to copy. What the target itself had under way is looked at whatever others know of it.
func (e *Engine) listed(m *member) {
	rs := m.rs
	if !e.cfg.Rules.WithoutOwnWIL {
		per := uint32(e.g.Region / e.g.Extent)
		for i, ok := rs.own.Next(0); ok; i, ok = rs.own.Next(i + 1) {
			rs.todo.AddRange(i*per, (i+1)*per)
			rs.suspects.AddRange(i*per, (i+1)*per)
		}
	}
	e.beginCopy(rs)
}

// beginCopy begins with a snapshot's bytes or the head's.
func (e *Engine) beginCopy(rs *resync) {
	rs.stage, rs.cursor, rs.passes = stageCopy, 0, 0
	if len(rs.fills) == 0 {
		rs.todo.Union(&rs.since)
		rs.since.Clear()
	}
}

// chain is the snapshots of the volume, oldest first, as the source has them.
func (e *Engine) chain() []SealedSnapshot {
	if m := e.reader(0); m != nil && m.fence != nil {
		return m.fence.Snapshots
	}
	return nil
}

// missingSnapshot forgets a snapshot that was deleted.
func (e *Engine) missingSnapshot(st Status, id volume.SnapshotID) {
	if st != StatusNotFound || id == "" {
		return
	}
	for _, m := range e.members {
		if m != nil && m.fence != nil {
			m.fence.Snapshots = slices.DeleteFunc(m.fence.Snapshots, func(s SealedSnapshot) bool { return s.ID == id })
		}
	}
}
