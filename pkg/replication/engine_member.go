package replication

import (
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const longAgo Now = -1 << 62

// member is one replica of the volume, in the in-sync set or not, as the engine knows it.
type member struct {
	slot  Slot
	id    volume.ReplicaID
	rec   Member
	local bool

	// up: the carrier has a transport. open: the fence of session was answered. ready: it is configured and may be sent
	// data; what it has not acknowledged was sent.
	up, open, ready bool
	session         Session
	seq             uint64
	downSince       Now
	boot            BootID
	bootsAt         BootID // the one that the record has
	incarnation     Incarnation
	fence           *FenceReply
	// lastAck is when the newest request that it answered was sent.
	lastAck Now
	pinging bool
	nudged  Now // when a request was last taken for lost

	confSent, confDone uint64
	confBusy           bool
	// marks are what absent peers missed and this member has not made durable yet, in extents.
	marks [MaxMembers]*region.Set
	// u is what only this member was sent: copies, and writes while it was no member.
	u region.Generations

	pending pendingList
	rs      *resync
	retryAt Now // of a resync
}

// pending is a request that awaits its answer.
type pending struct {
	id         uint64
	m          *member
	kind       Kind
	session    Session
	sentAt     Now
	o          *op
	then       func(*Message)
	prev, next *pending
	idx        uint32
}

// pendingList is a member's requests, oldest first.
type pendingList struct{ first, last *pending }

func (l *pendingList) push(p *pending) {
	p.prev, p.next = l.last, nil
	if l.last != nil {
		l.last.next = p
	} else {
		l.first = p
	}
	l.last = p
}

func (l *pendingList) remove(p *pending) {
	if p.prev != nil {
		p.prev.next = p.next
	} else {
		l.first = p.next
	}
	if p.next != nil {
		p.next.prev = p.prev
	} else {
		l.last = p.prev
	}
}

// pendingTable finds requests by number: the low half is an index.
type pendingTable struct {
	all  []*pending
	free []uint32
	gen  uint64
}

func (t *pendingTable) add() *pending {
	var i uint32
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
	} else {
		i = uint32(len(t.all))
		t.all = append(t.all, &pending{idx: i})
	}
	t.gen++
	p := t.all[i]
	p.id = t.gen<<32 | uint64(i)
	return p
}

func (t *pendingTable) get(id uint64) *pending {
	i := id & (1<<32 - 1)
	if i >= uint64(len(t.all)) || t.all[i].id != id {
		return nil
	}
	return t.all[i]
}

func (t *pendingTable) remove(p *pending) {
	i := p.idx
	*p = pending{idx: i}
	t.free = append(t.free, i)
}

// send makes a request of a member and returns the message to be completed.
func (e *Engine) send(m *member, kind Kind, o *op, then func(*Message)) *Message {
	p := e.calls.add()
	p.m, p.kind, p.session, p.sentAt, p.o, p.then = m, kind, m.session, e.now, o, then
	m.pending.push(p)
	if kind != KindFence {
		m.seq++
	}
	msg := &e.emit(EffectSend).Msg
	msg.Kind, msg.Volume, msg.Replica, msg.Epoch, msg.Session = kind, e.m.Volume, m.id, e.m.Epoch, m.session
	msg.Seq, msg.Op = m.seq, p.id
	return msg
}

// Connected tells that there is a transport to a replica; any before it is gone.
func (e *Engine) Connected(now Now, id volume.ReplicaID) {
	if !e.begin(now) {
		return
	}
	if m := e.member(id); m != nil {
		e.disconnect(m)
		m.up = true
		e.openSession(m)
	}
	e.pump()
}

// Disconnected tells that the transport is gone.
func (e *Engine) Disconnected(now Now, id volume.ReplicaID) {
	if !e.begin(now) {
		return
	}
	if m := e.member(id); m != nil {
		e.disconnect(m)
	}
	e.pump()
}

// disconnect forgets a member's session: what it was sent and did not answer may or may not have happened.
func (e *Engine) disconnect(m *member) {
	if m.open || m.up {
		m.downSince = e.now
	}
	m.up, m.open, m.ready, m.pinging, m.confBusy = false, false, false, false, false
	m.confSent = 0
	e.expand.forget(m.slot)
	e.markUnsynced(m)
	for p := m.pending.first; p != nil; {
		next := p.next
		o := p.o
		e.calls.remove(p)
		if o != nil {
			e.unsent(o, m)
		}
		p = next
	}
	m.pending = pendingList{}
	e.askedLost(m)
	if m.rs != nil {
		e.pauseResync(m)
	}
	if e.flush.sent.Has(m.slot) && !e.flush.acked.Has(m.slot) {
		e.flush.sent = e.flush.sent.Without(m.slot)
	}
	if b := e.barrier; b != nil {
		e.barrierLost(m)
	}
	e.recheck = true
}

// reconnect asks for a new transport, so that nothing of the old session lingers.
func (e *Engine) reconnect(m *member) {
	up := m.up
	e.disconnect(m)
	if up {
		e.emit(EffectReconnect).Replica = m.id
	}
}

// openSession fences the member.
func (e *Engine) openSession(m *member) {
	e.session++
	m.session, m.seq = e.session, 0
	e.send(m, KindFence, nil, func(a *Message) { e.fenced(m, a) })
}

// Receive takes an answer of a replica.
func (e *Engine) Receive(now Now, a *Message) {
	if !e.begin(now) || !a.Reply {
		return
	}
	p := e.calls.get(a.Op)
	if p == nil || a.Epoch != e.m.Epoch || a.Session != p.session || p.m.session != p.session || a.Kind != p.kind || a.Replica != p.m.id {
		return // of a session that is closed, or given before
	}
	m, o, then := p.m, p.o, p.then
	if a.Status == StatusOK && p.kind != KindFence {
		m.lastAck = max(m.lastAck, p.sentAt)
	}
	m.pending.remove(p)
	e.calls.remove(p)
	switch a.Status {
	case StatusStaleEpoch:
		if a.Fence != nil && a.Fence.Epoch > e.m.Epoch && !e.cfg.Rules.WithoutSupersededStop {
			e.over(EffectFailed, ReasonSuperseded)
			return
		}
		if o != nil {
			e.unsent(o, m)
		}
	case StatusStaleSession:
		if o != nil {
			e.unsent(o, m)
		}
		e.reconnect(m)
	case StatusPoisoned:
		if o != nil {
			e.unsent(o, m)
		}
		e.lose(m)
	default:
		if o != nil {
			e.answered(o, m, a)
		} else {
			then(a)
		}
	}
	e.pump()
}

// fenced takes a member's account of itself.
func (e *Engine) fenced(m *member, a *Message) {
	f := a.Fence
	if a.Status != StatusOK || f == nil {
		e.reconnect(m)
		return
	}
	rebooted := m.boot != 0 && m.boot != f.BootID
	m.open, m.fence, m.boot, m.incarnation = true, f, f.BootID, f.Incarnation
	higher := f.Lineage > e.m.Lineage || f.Lineage == e.m.Lineage && f.ConfigVersion > e.m.ConfigVersion
	if higher && e.phase == phaseFencing && !e.cfg.Rules.WithoutHigherVersionRefusal {
		e.over(EffectFailed, ReasonRolledBack)
		return
	}
	if e.phase == phaseFencing {
		if e.isr.Has(m.slot) {
			e.leased = max(e.leased, e.now+f.LeaseLeft)
			e.firstFence = min(e.firstFence, e.now)
		}
		return
	}
	switch {
	case e.isr.Has(m.slot) || e.adding.Has(m.slot):
		e.returned(m, rebooted)
	case m.rs != nil:
		e.resumeResync(m, rebooted)
	}
}

// valid tells whether a member is one that the record speaks of, and whole.
func (e *Engine) valid(m *member) bool {
	// After a crash of the client the only one in sync is a source even so: what was flushed is there, and from its next
	// life on it reads the same.
	only := e.isr.Len() == 1 && e.phase < phaseLive && !e.cfg.DeviceKept
	switch {
	case (m.fence.Poisoned || m.fence.PoisonedBefore && !only) && !e.cfg.Rules.WithoutPoisonedExcluded:
		return false
	case m.rec.Incarnation != 0 && m.rec.Incarnation != m.incarnation && !e.cfg.Rules.WithoutIncarnationCheck:
		return false
	case m.fence.Size < e.size:
		return false
	}
	return true
}

// sole tells whether the volume has one replica only.
func (e *Engine) sole() bool { return len(e.m.Members) == 1 }

// returned takes a member back after its session was lost: a blip, if it lost nothing.
func (e *Engine) returned(m *member, rebooted bool) {
	flushed := e.flushed() && m.u.Empty()
	if !e.valid(m) || rebooted && !flushed && !e.cfg.Rules.WithoutBootCheck && !(e.lastMember(m) && e.cfg.Rules.WithoutLastBootCheck) {
		e.lose(m)
		return
	}
	if !e.removing.Has(m.slot) && !e.lost.Has(m.slot) {
		e.failed = e.failed.Without(m.slot)
	}
	if e.failed.Has(m.slot) {
		return
	}
	e.active.restore(m.fence.WIL, e.flush.round)
	e.syncMember(m)
}

// lastMember tells whether no other member could go on.
func (e *Engine) lastMember(m *member) bool {
	return (e.isr|e.adding)&^e.failed&^(1<<m.slot) == 0 && !e.cfg.Rules.WithoutLastMemberGuard
}

// fail latches a member that is to be removed. The last one never is: it gets a new session, and I/O waits for it.
func (e *Engine) fail(m *member) {
	s := m.slot
	switch {
	case e.isr.Has(s) || e.adding.Has(s):
		if !e.lastMember(m) {
			e.failed = e.failed.With(s)
		}
		e.reconnect(m)
	case m.rs != nil:
		e.reconnect(m)
	}
}

// lose latches a member that can not be taken back as it is: it was restarted, replaced or poisoned.
func (e *Engine) lose(m *member) {
	s := m.slot
	if !e.isr.Has(s) && !e.adding.Has(s) {
		e.dropTarget(m)
		m.retryAt = e.now + e.cfg.Timing.ResyncRetry
		e.reconnect(m)
		return
	}
	e.lost = e.lost.With(s)
	e.failed = e.failed.With(s)
	m.ready = false
	e.markUnsynced(m)
	if e.isr&^e.lost == 0 && e.phase != phaseFencing {
		e.over(EffectFailed, ReasonLostWrites)
		return
	}
	e.reconnect(m)
}

// watch looks for a member that takes too long.
func (e *Engine) watch(m *member) {
	t := &e.cfg.Timing
	for p := m.pending.first; p != nil; p = p.next {
		if e.now < p.sentAt+t.OpTimeout {
			break
		}
		if e.now >= p.sentAt+e.limit(p.kind) {
			// One that answers what came later may never have got this: it is asked again, once in a while.
			lost := m.lastAck > p.sentAt && e.now >= m.nudged+8*t.OpTimeout
			if e.phase == phaseFencing || p.kind == KindFence || lost {
				m.nudged = e.now
				e.reconnect(m)
			} else {
				e.fail(m)
			}
			return
		}
	}
	member := e.isr.Has(m.slot) || e.adding.Has(m.slot)
	if member && e.phase > phaseFencing && !m.open && !e.failed.Has(m.slot) && !e.lastMember(m) && e.now >= m.downSince+t.Blip {
		e.fail(m)
	}
}

// limit is how long a request may take.
func (e *Engine) limit(k Kind) Now {
	t := &e.cfg.Timing
	switch k {
	case KindFlush, KindSeal, KindConfigure, KindMarkMissed, KindResize, KindAllocated:
		return 2 * t.OpTimeout
	}
	return t.OpTimeout
}

// watchAt is when watch may find something.
func (e *Engine) watchAt(m *member) Now {
	at := Never
	for p := m.pending.first; p != nil; p = p.next {
		if due := p.sentAt + e.limit(p.kind); due > e.ticked {
			at = min(at, due)
		}
		if p.sentAt+e.cfg.Timing.OpTimeout > at {
			break
		}
	}
	if e.phase > phaseFencing && (e.isr.Has(m.slot) || e.adding.Has(m.slot)) && !m.open && !e.failed.Has(m.slot) && !e.lastMember(m) {
		at = min(at, m.downSince+e.cfg.Timing.Blip)
	}
	return at
}

// Evict asks for a member to leave the in-sync set; the last one does not, and one that is only about to be added is none to
// go on with: its add may be refused.
func (e *Engine) Evict(now Now, id volume.ReplicaID) {
	if !e.begin(now) {
		return
	}
	if m := e.member(id); m != nil && e.isr.Has(m.slot) && e.isr&^e.failed&^(1<<m.slot) != 0 && e.phase > phaseFencing {
		e.lost = e.lost.With(m.slot)
		e.failed = e.failed.With(m.slot)
		e.reconnect(m)
	}
	e.pump()
}
