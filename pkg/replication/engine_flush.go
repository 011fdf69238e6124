package replication

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
)

// flushRound is one flush of all members. It serves all clients that asked before it began.
type flushRound struct {
	running bool
	wanted  bool // without a client
	// round counts the rounds begun; done is the newest that succeeded.
	round, done uint64
	// Members and targets for whom acknowledgements wait take part; aged are those whose own generations it began.
	sent, acked, aged PeerSet
	waiting, current  []uint64 // tags
	last              Now      // when the newest one began
	nextClear         Now
}

// Flush makes all writes durable that were answered before.
func (e *Engine) Flush(now Now, tag uint64) {
	if !e.begin(now) || e.detaching {
		f := e.emit(EffectAnswer)
		f.Tag, f.Result = tag, ResultGone
		return
	}
	e.flush.waiting = append(e.flush.waiting, tag)
	e.pump()
}

// flushProgress begins a round where one is due.
func (e *Engine) flushProgress() {
	f := &e.flush
	if f.running || e.phase != phaseLive {
		return
	}
	due := !e.flushed() && (e.uBytes >= e.cfg.Timing.FlushBytes || e.now >= f.last+e.cfg.Timing.FlushEvery)
	if !due && !f.wanted && len(f.waiting) == 0 {
		e.clearWIL(false)
		return
	}
	f.running, f.wanted, f.last = true, false, e.now
	f.sent, f.acked, f.aged = 0, 0, 0
	f.current, f.waiting = append(f.current, f.waiting...), f.waiting[:0]
	f.round++
	e.u.Begin()
	e.uBytes = 0
	for _, m := range e.members {
		if m != nil && (e.isr | e.adding).Has(m.slot) {
			m.u.Begin()
			f.aged = f.aged.With(m.slot)
		}
	}
	if !e.cfg.Rules.WithoutYoungGeneration {
		for o := e.ops.first; o != nil; o = o.next {
			e.underWay(o)
		}
	}
	for _, m := range e.members {
		if m != nil && m.ready {
			e.flushTo(m)
		}
	}
}

// underWay counts an operation among what comes after a flush that just began.
func (e *Engine) underWay(o *op) {
	if !o.kind.changes() || o.fill != nil {
		return
	}
	from, to := e.g.regions(o.off, o.n)
	for i := from; i < to && !e.unlogged; i++ {
		e.active.touch(i, e.flush.round, e.now)
	}
	if o.started {
		e.u.AddRange(e.g.extents(o.off, o.n))
	}
}

// flushTo sends the flush to a member that takes part and has not got it.
func (e *Engine) flushTo(m *member) {
	f := &e.flush
	s := m.slot
	if !f.running || f.sent.Has(s) || f.acked.Has(s) || !(e.isr | e.adding | e.final).Has(s) {
		return
	}
	f.sent = f.sent.With(s)
	round := f.round
	e.send(m, KindFlush, nil, func(a *Message) {
		switch {
		case a.Status == StatusOK && a.Boot == m.boot:
			if f.running && f.round == round {
				f.acked = f.acked.With(s)
				e.flushSettle()
			}
		case e.cfg.Rules.WithoutPoison:
			f.sent = f.sent.Without(s)
			e.flushTo(m)
		default:
			e.lose(m)
		}
	})
}

// flushSettle ends the round when all members have flushed.
func (e *Engine) flushSettle() {
	f := &e.flush
	if !f.running || e.phase != phaseLive {
		return
	}
	need := e.acking()
	enough := f.acked&need == need
	if e.cfg.Rules.WithoutFlushAll {
		enough = f.acked != 0
	}
	if !enough || !e.mayAck() {
		for _, m := range e.members {
			if m != nil && m.ready && need.Has(m.slot) {
				e.flushTo(m) // a member that joined meanwhile
			}
		}
		return
	}
	f.running = false
	f.done = f.round
	e.u.Succeed()
	e.unknown = false
	for _, m := range e.members {
		if m != nil && f.aged.Has(m.slot) {
			m.u.Succeed()
		}
	}
	for _, tag := range f.current {
		e.emit(EffectAnswer).Tag = tag
	}
	f.current = f.current[:0]
	e.clearWIL(true)
}

// flushWake is when a round or a clear of the write-intent log is due.
func (e *Engine) flushWake() Now {
	f := &e.flush
	if f.running || e.phase != phaseLive {
		return Never
	}
	at := Never
	if !e.flushed() {
		at = f.last + e.cfg.Timing.FlushEvery
	}
	if len(e.active.all) > 0 && e.dirty.Empty() {
		at = min(at, f.nextClear)
	}
	return at
}

// clearWIL takes regions out of the members' write-intent logs that all have flushed since they were last written, and
// that were not written for a while: a clear costs little, but the mark that a new write needs does.
func (e *Engine) clearWIL(flushed bool) {
	f := &e.flush
	a := &e.active
	pressed := a.starved || flushed && len(a.all) > e.g.MaxActive*3/4
	if len(a.all) == 0 || e.now < f.nextClear && !pressed && !e.detaching {
		return
	}
	f.nextClear = e.now + e.cfg.Timing.ClearAfter
	if e.isr&^e.failed != e.isr || e.unsynced&e.isr != 0 {
		return
	}
	var clear []uint32
	for i, t := range a.all {
		idle := e.now >= t.at+e.cfg.Timing.ClearAfter || pressed || e.detaching
		durable := t.round < f.done || e.cfg.Rules.WithoutClearAfterFlush
		if idle && durable && !e.dirty.Has(i) {
			clear = append(clear, i)
		}
	}
	if len(clear) == 0 {
		return
	}
	slices.Sort(clear)
	var runs []region.Run
	for _, i := range clear {
		a.remove(i)
		runs = appendRegion(runs, i)
	}
	for _, m := range e.members {
		if m == nil || !e.isr.Has(m.slot) || !m.open {
			continue
		}
		e.sendClear(m, m.seq, runs)
	}
	if a.starved {
		a.starved, e.retry = false, true
	}
}

// sendClear tells a member to clear regions, unless it has seen a write of them after upto.
func (e *Engine) sendClear(m *member, upto uint64, runs []region.Run) {
	for len(runs) > 0 {
		n := min(len(runs), MaxRuns)
		msg := e.send(m, KindClearWIL, nil, func(*Message) {})
		msg.Upto, msg.Set = upto, &SetPage{Runs: runs[:n:n]}
		runs = runs[n:]
	}
}

// flushed tells whether members can lose nothing that was sent to all of them.
func (e *Engine) flushed() bool { return e.u.Empty() && !e.unknown }

// pressed is called when the write-intent log has no room: a flush is begun, so that some can be made.
func (e *Engine) pressed() bool {
	e.active.starved = true
	e.flush.wanted = true
	return false
}

// activeRegions are the regions that may be marked in members' write-intent logs.
type activeRegions struct {
	all map[uint32]*activeRegion
	// starved: a write waits for room.
	starved bool
	spare   []*activeRegion
}

type activeRegion struct {
	round uint64 // the flush round that had begun when it was last written
	at    Now
}

func (a *activeRegions) init() { a.all = map[uint32]*activeRegion{} }

func (a *activeRegions) touch(i uint32, round uint64, now Now) {
	t := a.all[i]
	if t == nil {
		if n := len(a.spare); n > 0 {
			t, a.spare = a.spare[n-1], a.spare[:n-1]
		} else {
			t = new(activeRegion)
		}
		a.all[i] = t
	}
	t.round, t.at = round, now
}

func (a *activeRegions) remove(i uint32) {
	if len(a.spare) < 64 {
		a.spare = append(a.spare, a.all[i])
	}
	delete(a.all, i)
}

// restore adds regions that a member reports.
func (a *activeRegions) restore(runs []region.Run, round uint64) {
	for _, run := range runs {
		for i := run.First; i < run.End(); i++ {
			if a.all[i] == nil {
				a.touch(i, round, longAgo/2)
			}
		}
	}
}

// room tells whether [from, to) may be written without more than limit regions being active.
func (a *activeRegions) room(from, to uint32, limit int) bool {
	if len(a.all)+int(to-from) <= limit {
		return true
	}
	more := 0
	for i := from; i < to; i++ {
		if a.all[i] == nil {
			more++
		}
	}
	return more == 0 || len(a.all)+more <= limit || len(a.all) == 0
}

// leaseHolds tells whether all who could be part of another engine's in-sync set answered recently.
func (e *Engine) leaseHolds() bool {
	if e.cfg.Rules.WithoutLease {
		return true
	}
	set := e.maxISR()
	for _, m := range e.members {
		if m != nil && set.Has(m.slot) && e.now-m.lastAck >= e.cfg.Timing.Lease {
			return false
		}
	}
	return true
}

// keepLease asks members for a sign of life whose last one is older than age.
func (e *Engine) keepLease(age Now) {
	set := e.maxISR()
	for _, m := range e.members {
		if m != nil && set.Has(m.slot) && m.open && !m.pinging && !e.failed.Has(m.slot) && e.now-m.lastAck > age {
			m.pinging = true
			e.send(m, KindPing, nil, func(*Message) {
				m.pinging = false
				e.releaseHeld()
			})
		}
	}
}

// releaseHeld answers reads that awaited the lease.
func (e *Engine) releaseHeld() {
	if len(e.held) == 0 {
		return
	}
	if !e.leaseHolds() {
		e.keepLease(e.cfg.Timing.Lease / 3)
		return
	}
	held := e.held
	e.held = nil
	for _, o := range held {
		e.answer(o, ResultOK)
		e.finish(o)
	}
}
