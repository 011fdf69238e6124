package replication

import "github.com/ballast-csi/ballast/pkg/region"

// wilRegion is a region that is, or is about to be, in the write-intent log.
type wilRegion struct {
	state   wilState
	seq     uint64 // greatest of the session's writes here
	waiters []uint64
}

type wilState uint8

const (
	wilMarking  wilState = iota // the mark is being made durable
	wilActive                   // the mark is durable
	wilClearing                 // the mark is being taken out
)

// write carries out a write or a zero: first the write-intent log, then the data.
func (r *Replica) write(m *Message) {
	op := StoreOp{Kind: StoreWrite, Off: m.Off, Len: m.Len, Data: m.Data, FUA: m.FUA && !r.cfg.Rules.WithoutDurableFUA, Copy: m.Copy}
	if m.Kind == KindZero {
		op.Kind, op.Data = StoreZero, nil
		if m.Len > MaxZero(r.cfg.Geometry) {
			r.answer(m, StatusRange)
			return
		}
	} else {
		op.Len = int64(len(m.Data))
		if op.Len > MaxData || m.Len != op.Len {
			r.answer(m, StatusRange)
			return
		}
	}
	if !r.ready(m) || !r.inRange(m, op.Len) {
		return
	}
	op.Marks = r.tags(m.Missed)
	c := r.calls.add()
	c.req, c.op = *m, op
	if r.unlogged || r.cfg.Rules.WithoutWIL {
		r.emit(c)
		return
	}
	from, to := r.cfg.Geometry.regions(m.Off, op.Len)
	var mark []region.Run
	for i := from; i < to; i++ {
		w := r.wil[i]
		if w == nil {
			if len(r.wil) >= MaxWIL*r.cfg.Geometry.MaxActive {
				r.answer(m, StatusRefused) // the engine keeps to less
				r.calls.remove(c)
				r.markWIL(mark) // others may come to wait for these
				return
			}
			w = &wilRegion{state: wilMarking}
			r.wil[i] = w
			mark = appendRegion(mark, i)
		}
		w.seq = max(w.seq, m.Seq)
		if w.state != wilActive {
			c.wait++
			w.waiters = append(w.waiters, c.id)
		}
	}
	r.markWIL(mark)
	if c.wait == 0 || r.cfg.Rules.WithoutWILBeforeData {
		c.wait = 0
		r.emit(c)
	}
}

func appendRegion(runs []region.Run, i uint32) []region.Run {
	if n := len(runs); n > 0 && runs[n-1].End() == i {
		runs[n-1].N++
		return runs
	}
	return append(runs, region.Run{First: i, N: 1})
}

// markWIL makes marks durable, then lets go who waits for them.
func (r *Replica) markWIL(runs []region.Run) {
	if len(runs) == 0 {
		return
	}
	r.emitInternal(StoreOp{Kind: StoreMarkWIL, Runs: runs}, func(res StoreResult) {
		for _, run := range runs {
			for i := run.First; i < run.End(); i++ {
				w := r.wil[i]
				waiters := w.waiters
				w.waiters = nil
				if res.Status == StatusOK {
					w.state = wilActive
				} else {
					delete(r.wil, i)
				}
				for _, id := range waiters {
					r.marked(id, res.Status)
				}
			}
		}
	})
}

// marked tells a waiting call that one of its regions is marked, or could not be.
func (r *Replica) marked(id uint64, st Status) {
	c := r.calls.get(id)
	if c == nil || c.wait == 0 {
		return
	}
	if st != StatusOK {
		r.answer(&c.req, st)
		r.calls.remove(c)
		return
	}
	if c.wait--; c.wait == 0 {
		r.emit(c)
	}
}

// clearWIL takes regions out of the log which the engine knows to be durable everywhere. A later write keeps its mark, in
// whatever order the two arrive.
func (r *Replica) clearWIL(m *Message) {
	if m.Set == nil || !validRuns(m.Set.Runs) {
		r.answer(m, StatusRefused)
		return
	}
	var clear []region.Run
	for _, run := range m.Set.Runs {
		for i := run.First; i < run.End(); i++ {
			w := r.wil[i]
			if w == nil || w.state != wilActive || w.seq > m.Upto && !r.cfg.Rules.WithoutOrderedClear {
				continue
			}
			w.state = wilClearing
			clear = appendRegion(clear, i)
		}
	}
	r.answer(m, StatusOK)
	if len(clear) == 0 {
		return
	}
	r.emitInternal(StoreOp{Kind: StoreClearWIL, Runs: clear}, func(StoreResult) {
		var again []region.Run
		for _, run := range clear {
			for i := run.First; i < run.End(); i++ {
				if w := r.wil[i]; len(w.waiters) > 0 {
					w.state = wilMarking
					again = appendRegion(again, i)
				} else {
					delete(r.wil, i)
				}
			}
		}
		r.markWIL(again)
	})
}

// tags resolves a set of slots to the peers that are tracked. The result is shared and must not be changed.
func (r *Replica) tags(set PeerSet) []MissedTag {
	if set == 0 {
		return nil
	}
	if t, ok := r.marks[set]; ok {
		return t
	}
	var tags []MissedTag
	for s := range Slot(MaxMembers) {
		if set.Has(s) && r.tracks(r.slots[s].Peer) {
			tags = append(tags, r.slots[s])
		}
	}
	r.marks[set] = tags
	return tags
}

// forgetMarks is called when slots or tags change.
func (r *Replica) forgetMarks() {
	clear(r.marks)
	for s := range r.slots {
		for _, t := range r.missed {
			if t.Peer == r.slots[s].Peer {
				r.slots[s].Since = t.Since
			}
		}
	}
}

// MaxZero bounds one zero, in bytes: it takes that many regions of the write-intent log at once.
func MaxZero(g Geometry) int64 { return 32 * g.Region }
