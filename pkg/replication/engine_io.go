package replication

import "slices"

// client begins an operation of the client.
func (e *Engine) client(now Now, kind opKind, tag uint64, off, n, limit int64) *op {
	if !e.begin(now) || e.detaching {
		f := e.emit(EffectAnswer)
		f.Tag, f.Result = tag, ResultGone
		return nil
	}
	if off < 0 || n <= 0 || n > limit || off > e.size || n > e.size-off {
		f := e.emit(EffectAnswer)
		f.Tag, f.Result = tag, ResultRange
		return nil
	}
	o := e.newOp(kind, off, n)
	o.tag = tag
	return o
}

// Read asks for n bytes at off, at most MaxData. Tag names the operation in its answer. The first replica that is asked may
// read to dst, if that is not nil; the answer has it as Data then.
func (e *Engine) Read(now Now, tag uint64, off, n int64, dst []byte) {
	if o := e.client(now, opRead, tag, off, n, MaxData); o != nil {
		o.data = dst
		e.submit(o)
		e.pump()
	}
}

// Write stores data at off, at most MaxData bytes; with fua it is durable on all members when it is answered. Data must
// not change until then.
func (e *Engine) Write(now Now, tag uint64, off int64, data []byte, fua bool) {
	if o := e.client(now, opWrite, tag, off, int64(len(data)), MaxData); o != nil {
		o.data, o.fua = data, fua
		e.submit(o)
		e.pump()
	}
}

// Zero makes n bytes at off read as zeros, at most MaxZero.
func (e *Engine) Zero(now Now, tag uint64, off, n int64, fua bool) {
	if o := e.client(now, opZero, tag, off, n, MaxZero(e.g)); o != nil {
		o.fua = fua
		e.submit(o)
		e.pump()
	}
}

// Cancel answers an operation with ResultIO if it is not answered yet. A write that was begun is still carried out on all
// members, and its range kept locked until it is: it reads the same for ever after. Until then it is Busy.
func (e *Engine) Cancel(now Now, tag uint64) {
	if !e.begin(now) {
		return
	}
	if i := slices.IndexFunc(e.parked, func(o *op) bool { return o.tag == tag }); i >= 0 {
		e.answer(e.parked[i], ResultIO)
		e.parked = slices.Delete(e.parked, i, i+1)
	}
	for o := e.ops.first; o != nil; o = o.next {
		if o.client() && o.tag == tag && !o.answered {
			e.answer(o, ResultIO)
			if !o.started || o.kind == opRead || e.cfg.Rules.WithoutErrorReconcile {
				e.abandon(o)
			}
			break
		}
	}
	for _, list := range []*[]uint64{&e.short, &e.flush.waiting, &e.flush.current} {
		if i := slices.Index(*list, tag); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
			f := e.emit(EffectAnswer)
			f.Tag, f.Result = tag, ResultIO
		}
	}
	e.pump()
}

// abandon forgets an operation: answers that come are ignored.
func (e *Engine) abandon(o *op) {
	e.held = slices.DeleteFunc(e.held, func(h *op) bool { return h == o })
	e.finish(o)
}

// forget takes an operation's requests out of the tables.
func (e *Engine) forget(o *op) {
	for _, m := range e.members {
		for p := range m.requests() {
			if p.o == o {
				m.pending.remove(p)
				e.calls.remove(p)
			}
		}
	}
}

// requests iterates over a member's pending requests; the current one may be removed.
func (m *member) requests() func(func(*pending) bool) {
	return func(yield func(*pending) bool) {
		if m == nil {
			return
		}
		for p := m.pending.first; p != nil; {
			next := p.next
			if !yield(p) {
				return
			}
			p = next
		}
	}
}

// submit admits an operation now or later.
func (e *Engine) submit(o *op) {
	if !e.admissible(o) {
		e.parked = append(e.parked, o)
		return
	}
	e.admit(o)
}

func (e *Engine) admissible(o *op) bool {
	if e.phase != phaseLive {
		return false
	}
	if !e.dirty.Empty() && o.client() && !e.cfg.Rules.WithoutReconcileLock {
		from, to := e.g.regions(o.off, o.n)
		if e.dirty.HasRange(from, to) {
			e.reconcileFirst(from, to)
			return false
		}
	}
	if !o.kind.changes() {
		return true
	}
	if e.barrier != nil && e.barrier.holds() && !e.cfg.Rules.WithoutBarrierDrain {
		return false
	}
	if e.unlogged {
		return true
	}
	from, to := e.g.regions(o.off, o.n)
	return e.active.room(from, to, e.g.MaxActive) || e.pressed()
}

// admitParked tries again what had to wait.
func (e *Engine) admitParked() {
	rest := e.parked[:0]
	for _, o := range e.parked {
		if e.admissible(o) {
			e.admit(o)
		} else {
			rest = append(rest, o)
		}
	}
	clear(e.parked[len(rest):])
	e.parked = rest
}

// start sends an operation that has its lock.
func (e *Engine) start(o *op) {
	o.started = true
	switch {
	case o.fill != nil && o.fill.dead:
		e.recheck = true
	case o.kind == opRead || o.kind == opCopy && o.stage == copyReading:
		e.readSomewhere(o)
	case o.kind == opHash:
		e.startHash(o)
	default:
		o.want = e.isr | e.adding | e.mirrors
		e.sending(o)
		e.sendAll(o)
	}
}

// sending records what a write changes, before it is sent to anyone.
func (e *Engine) sending(o *op) {
	from, to := e.g.extents(o.off, o.n)
	if o.kind != opCopy || o.fill == nil {
		e.u.AddRange(from, to)
		e.uBytes += o.n
	}
	for _, m := range e.members {
		if m == nil || m.rs == nil && !o.want.Has(m.slot) {
			continue
		}
		s := m.slot
		if o.want.Has(s) && !e.isr.Has(s) {
			m.u.AddRange(from, to)
		}
		if m.rs != nil && o.kind != opCopy {
			m.rs.written(e, m, from, to)
		}
	}
}

func (e *Engine) sendAll(o *op) {
	for set := o.want &^ o.sent &^ o.acked; set != 0; {
		s := set.first()
		set = set.Without(s)
		if m := e.members[s]; m != nil && m.ready {
			e.sendTo(o, m)
		}
	}
}

// sendTo sends a write to one member.
func (e *Engine) sendTo(o *op, m *member) {
	o.sent = o.sent.With(m.slot)
	kind := KindWrite
	if o.kind == opZero || o.hole {
		kind = KindZero
	}
	msg := e.send(m, kind, o, nil)
	msg.Off, msg.Len, msg.FUA, msg.Copy = o.off, o.n, o.fua, o.kind == opCopy
	if kind == KindWrite {
		msg.Data = o.data
	}
	if o.kind == opCopy {
		return // those who are absent lack no more for it
	}
	msg.Missed = e.absent.Without(m.slot)
	if e.cfg.Rules.WithoutMirrorMissed {
		msg.Missed &^= e.mirrors
	}
}

// readSomewhere sends a read to the best member that has not failed it.
func (e *Engine) readSomewhere(o *op) {
	if o.sent != 0 || o.doomed {
		return
	}
	set := e.isr &^ e.failed &^ e.removing &^ o.bad
	if set == 0 {
		if e.isr&^o.bad == 0 {
			o.doomed, e.recheck = true, true
		}
		return
	}
	m := e.members[e.src]
	if !set.Has(e.src) || !m.ready {
		m = nil
		for ; set != 0 && m == nil; set = set.Without(set.first()) {
			if c := e.members[set.first()]; c.ready {
				m = c
			}
		}
	}
	if m == nil {
		return // until one is there
	}
	o.sent = o.sent.With(m.slot)
	o.src = m.slot
	msg := e.send(m, KindRead, o, nil)
	msg.Off, msg.Len = o.off, o.n
	if !o.lent {
		msg.Data, o.lent = o.data, true
	} else if o.data != nil {
		o.busy = true // another may still be reading to it
	}
	if o.fill != nil {
		msg.Snapshot = o.fill.snapshot()
	}
	if o.client() {
		e.keepLease(e.cfg.Timing.Lease / 3)
	}
}

// endDoomed ends reads and comparisons that no member could carry out.
func (e *Engine) endDoomed() {
	for o := e.ops.first; o != nil; {
		next := o.next
		if o.doomed {
			switch o.kind {
			case opCopy:
				e.copyFailed(o)
			case opHash:
				e.dropTarget(o.fill.m)
			default:
				e.answer(o, ResultIO)
			}
			e.finish(o)
		}
		o = next
	}
}

// unsent takes back that an operation was sent: it is sent again when the member is ready.
func (e *Engine) unsent(o *op, m *member) {
	o.sent = o.sent.Without(m.slot)
	if o.kind == opRead || o.kind == opCopy && o.stage == copyReading {
		e.recheck = true
	}
	if o.kind == opHash {
		e.forget(o)
		o.sent = 0
		e.recheck = true
	}
}

// catchUp sends a member that has become ready all that it has not acknowledged.
func (e *Engine) catchUp(m *member) {
	for o := e.ops.first; o != nil; {
		next := o.next
		if o.started && o.conflicts == 0 {
			switch {
			case o.kind == opRead || o.kind == opCopy && o.stage == copyReading:
				if !o.complete() {
					e.readSomewhere(o)
				}
			case o.kind == opHash:
			case o.want.Has(m.slot) && !o.sent.Has(m.slot) && !o.acked.Has(m.slot):
				e.sendTo(o, m)
			}
		}
		o = next
	}
	e.flushTo(m)
}

// complete tells whether a read has its data and only awaits the lease.
func (o *op) complete() bool { return o.acked != 0 }

// answered takes a member's answer to an operation.
func (e *Engine) answered(o *op, m *member, a *Message) {
	o.sent = o.sent.Without(m.slot)
	if o.kind == opHash {
		e.hashed(o, m, a)
		return
	}
	reading := o.kind == opRead || o.kind == opCopy && o.stage == copyReading
	if a.Status != StatusOK {
		if reading && o.fill != nil && a.Status == StatusNotFound {
			e.missingSnapshot(a.Status, o.fill.snapshot())
			e.dropTarget(o.fill.m)
			return
		}
		if reading {
			o.bad = o.bad.With(m.slot)
			e.readSomewhere(o)
			return
		}
		if e.sole() && o.client() { // nothing is to be made equal, nobody waited for
			switch {
			case !o.answered:
				f := e.emit(EffectAnswer)
				f.Tag, f.Result = o.tag, ResultIO
			case o.busy:
				e.emit(EffectReleased).Tag = o.tag
			}
			e.finish(o)
			return
		}
		if e.lastMember(m) && e.isr.Has(m.slot) {
			e.retryAt = min(e.retryAt, e.now+Second)
			return
		}
		if o.fill != nil || e.mirrors.Has(m.slot) && !e.isr.Has(m.slot) && !e.adding.Has(m.slot) {
			e.lose(m)
			return
		}
		e.fail(m)
		return
	}
	switch {
	case o.kind == opRead:
		o.data, o.hole, o.acked = a.Data, a.Hole, o.acked.With(m.slot)
		if !e.leaseHolds() {
			e.held = append(e.held, o)
			e.keepLease(0)
			return
		}
		e.answer(o, ResultOK)
		e.finish(o)
	case reading:
		o.data, o.hole, o.stage = a.Data, a.Hole, copyWriting
		e.startCopyWrite(o)
	default:
		o.acked = o.acked.With(m.slot)
		e.settle(o)
	}
	if len(e.held) > 0 {
		e.releaseHeld()
	}
}

// settle acknowledges a write that all who count have, and ends it when nobody has it under way.
func (e *Engine) settle(o *op) {
	need := e.acking()
	if o.kind == opCopy {
		e.settleCopy(o)
		return
	}
	if miss := need &^ o.want; miss != 0 {
		o.want |= miss
		e.sendAll(o)
	}
	all := o.want&(need|e.mirrors)&^o.acked == 0
	if !o.answered && o.acked&need == need && e.mayAck() {
		switch {
		case e.enough():
			e.answer(o, ResultOK)
		case all:
			// It is the same on all, and must not keep out the copies that will make them enough.
			e.short = append(e.short, o.tag)
			o.answered = true
		}
	}
	if o.answered && all {
		if o.busy {
			e.emit(EffectReleased).Tag = o.tag
		}
		e.finish(o)
	}
}

// enough tells whether there are as many members in sync as the volume asks for.
func (e *Engine) enough() bool {
	return e.isr.Len() >= e.m.MinInSync || e.cfg.Rules.WithoutMinInSync
}

// answerShort answers the writes that waited for there to be enough members. Those that were added since have them.
func (e *Engine) answerShort() {
	if len(e.short) == 0 || !e.enough() || !e.mayAck() {
		return
	}
	for _, tag := range e.short {
		e.emit(EffectAnswer).Tag = tag
	}
	e.short = e.short[:0]
}

// mayAck tells whether all members know the configuration.
func (e *Engine) mayAck() bool {
	unsynced := e.unsynced & (e.isr | e.adding)
	if e.cfg.Rules.WithoutShrinkBeforeAck {
		unsynced &^= e.failed
	}
	return unsynced == 0
}

// settleAll looks at all operations again after who counts has changed.
func (e *Engine) settleAll() {
	for o := e.ops.first; o != nil; {
		next := o.next
		if o.started && o.conflicts == 0 {
			switch {
			case o.fill != nil && o.fill.dead:
				e.finish(o)
			case o.kind == opHash:
				if o.sent == 0 {
					e.startHash(o)
				}
			case o.kind == opRead || o.kind == opCopy && o.stage == copyReading:
				if !o.complete() {
					e.readSomewhere(o)
				}
			default:
				e.settle(o)
			}
		}
		o = next
	}
	e.endDoomed()
	e.answerShort()
	e.releaseHeld()
	e.flushSettle()
}

// answer tells the client.
func (e *Engine) answer(o *op, r Result) {
	f := e.emit(EffectAnswer)
	f.Tag, f.Result = o.tag, r
	if o.kind == opRead {
		f.Busy = o.busy || o.lent && o.sent != 0
		if r == ResultOK {
			f.Data, f.Hole = o.data, o.hole
		}
	}
	if o.kind == opWrite && o.started && e.phase != phaseOver && (r != ResultOK || o.want&e.mirrors&^o.acked != 0) {
		f.Busy, o.busy = true, true
	}
	o.answered = true
}
