package sim

import (
	"encoding/binary"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// storeOp is an operation under way on a disk.
type storeOp struct {
	replication.StoreOp
	executed bool
	result   replication.StoreResult
	seq      uint64            // of the disk when it was asked for
	marks    map[string]absent // what was missed when it was asked for
}

// start asks the disk for an operation: it executes after a while, and ends after another.
func (p *place) start(s replication.StoreOp) {
	w, d := p.w, p.disk
	op := &storeOp{StoreOp: s, seq: d.seq}
	if s.Kind == replication.StoreSync || s.Kind == replication.StoreMarkMissed {
		op.marks = make(map[string]absent, len(d.missed))
		for k, a := range d.missed {
			op.marks[k] = a
		}
	}
	switch s.Kind {
	case replication.StoreRead:
		p.checkSource()
	case replication.StoreSeal:
		p.v.checkSeal(p, &s)
	}
	p.running = append(p.running, op)
	first, second := w.prof.storeDelay(&w.schedule, s.Kind)
	life := p.life
	p.work(first, func() { p.run(op, life, second) })
}

// work has the disk work for that long, longer while it is slow; what a slow disk had begun ends soon after it is well again.
func (p *place) work(left int64, then func()) {
	slow := p.disk.slow
	if slow == 1 || left*slow <= 20*millisecond {
		p.w.after(left*slow, then)
		return
	}
	p.w.after(20*millisecond, func() { p.work(left-20*millisecond/slow, then) })
}

func (p *place) run(op *storeOp, life uint64, rest int64) {
	w := p.w
	if p.life != life || p.machine == nil {
		return
	}
	if hung := p.disk.hungFor(op.Kind, w.now); hung > 0 {
		w.after(min(hung, 20*millisecond)+w.between(0, millisecond), func() { p.run(op, life, rest) })
		return
	}
	p.execute(op)
	p.work(rest, func() { p.on(life, func() { p.done(op) }) })
}

func (p *place) done(op *storeOp) {
	if p.machine == nil {
		return
	}
	if i := slices.Index(p.running, op); i >= 0 {
		p.running = slices.Delete(p.running, i, i+1)
	} else {
		return
	}
	p.w.dirty = true
	if failed := op.result.Status == replication.StatusIO; failed && (op.Kind == replication.StoreSync || op.Kind == replication.StoreSeal || op.FUA) {
		p.poisoned = true
		p.disk.untold--
		life := p.life
		p.w.after(p.w.wide(10*millisecond, second), func() {
			if p.life == life {
				p.reopen()
			}
		})
	}
	p.machine.Done(p.w.clockOf(p.node), op.ID, op.result)
	p.effects()
}

// execute carries an operation out.
func (p *place) execute(op *storeOp) {
	w, d := p.w, p.disk
	op.executed = true
	w.dirty = true
	w.count.StoreOps++
	ok := &op.result
	ok.Status = replication.StatusOK
	if metadata(op.Kind) && d.failMeta() {
		w.count.FailedMetas++
		ok.Status = replication.StatusIO
		if w.chance(0.5) {
			return // otherwise it is there all the same
		}
	}
	switch op.Kind {
	case replication.StorePersist:
		d.state = slices.Clone(op.State)
		d.commit()
	case replication.StoreMarkWIL:
		d.wil |= bitsOf(op.Runs)
		d.commit()
	case replication.StoreClearWIL:
		d.wil &^= bitsOf(op.Runs)
		w.count.Cleared++
	case replication.StoreRead, replication.StoreHash:
		p.executeRead(op)
	case replication.StoreWrite, replication.StoreZero:
		p.executeWrite(op)
	case replication.StoreSync:
		if d.failSync(&w.schedule) {
			ok.Status = replication.StatusIO
			w.count.FailedSyncs++
			w.tracef("%s sync fails", p.id)
			return
		}
		d.sync(op.seq)
		if !op.NoMarks {
			d.syncMissed(op.marks)
		}
	case replication.StoreAllocated:
		p.executeAllocated(op)
	case replication.StoreMissed:
		a, tracked := d.missed[string(op.Set.Peer)]
		if !tracked {
			ok.Status = replication.StatusNotFound
			return
		}
		ok.Set = pageOf(a.bits, op.Set)
		ok.Set.Since = volume.ConfigVersion(a.since)
	case replication.StoreTrack:
		if _, tracked := d.missed[string(op.Set.Peer)]; !tracked {
			d.missed[string(op.Set.Peer)] = absent{since: uint64(op.Set.Since)}
			d.missedOnIt[string(op.Set.Peer)] = absent{since: uint64(op.Set.Since)}
		}
		d.commit()
	case replication.StoreDropMissed:
		if op.Set.Peer == "" {
			clear(d.missed)
			clear(d.missedOnIt)
		} else {
			delete(d.missed, string(op.Set.Peer))
			delete(d.missedOnIt, string(op.Set.Peer))
		}
		d.commit()
	case replication.StoreMarkMissed:
		peer := string(op.Set.Peer)
		a := d.missed[peer]
		a.bits |= bitsOf(op.Set.Runs)
		a.since = uint64(op.Set.Since)
		d.missed[peer] = a
		op.marks[peer] = a
		d.syncMissed(op.marks)
	case replication.StoreSeal:
		p.executeSeal(op)
	case replication.StoreResize:
		if d.fullUntil > w.now {
			w.count.NoRoom++
			ok.Status = replication.StatusRefused
			return
		}
		d.resize(int(op.Len / blockSize))
		d.commit()
	}
	if w.opt.Trace && op.Kind != replication.StoreRead && op.Kind != replication.StoreHash && op.Kind != replication.StoreWrite {
		w.tracef("%s executes %s", p.id, describe(&op.StoreOp))
	}
}

// metadata tells whether an operation changes nothing but that, durably.
func metadata(k replication.StoreKind) bool {
	switch k {
	case replication.StorePersist, replication.StoreMarkWIL, replication.StoreTrack, replication.StoreDropMissed, replication.StoreMarkMissed, replication.StoreResize:
		return true
	}
	return false
}

func (p *place) executeRead(op *storeOp) {
	d := p.disk
	if d.failReads > 0 && op.Kind == replication.StoreRead {
		d.failReads--
		p.w.count.FailedReads++
		op.result.Status = replication.StatusIO
		return
	}
	values, status := d.valuesOf(op.Snapshot, int(op.Off/blockSize), int(op.Len/blockSize))
	op.result.Status = status
	if status != replication.StatusOK {
		return
	}
	hole := true
	for _, v := range values {
		hole = hole && v == 0
	}
	if hole && op.Kind == replication.StoreRead {
		op.result.Hole = true
		return
	}
	op.result.Data = encode(values)
}

func (p *place) executeWrite(op *storeOp) {
	w, d := p.w, p.disk
	n := op.Len
	if op.Kind == replication.StoreWrite {
		n = int64(len(op.Data))
	}
	first, count := int(op.Off/blockSize), int(n/blockSize)
	if first+count > len(d.cells) {
		op.result.Status = replication.StatusRange
		return
	}
	p.checkWrite(op, first, count)
	for _, t := range op.Marks {
		if a, tracked := d.missed[string(t.Peer)]; tracked {
			a.bits |= rangeBits(first/blocksPerExtent, (first+count-1)/blocksPerExtent)
			d.missed[string(t.Peer)] = a
		}
	}
	failing := d.failWrites > 0 || op.FUA && d.untold > 0
	if failing {
		d.failWrites = max(0, d.failWrites-1)
		w.count.FailedWrites++
		op.result.Status = replication.StatusIO
		if op.FUA {
			d.loseSync(&w.schedule)
		}
	}
	corrupt := op.Copy && d.corrupt > 0 && p.machine != nil && p.machine.Role() == replication.RoleSYNC
	if corrupt {
		d.corrupt--
		w.count.Corrupted++
	}
	for i := range count {
		if corrupt {
			d.write(first+i, corruptValue)
			continue
		}
		if failing && w.chance(0.5) {
			continue
		}
		v := uint64(0)
		if op.Kind == replication.StoreWrite {
			v = binary.LittleEndian.Uint64(op.Data[i*blockSize:])
		}
		d.write(first+i, v)
	}
	if op.FUA && !failing {
		d.syncRange(first, count)
	}
	if w.opt.Trace {
		w.tracef("%s executes %s -> %d", p.id, describe(&op.StoreOp), op.result.Status)
	}
}

// corruptValue is what nobody ever wrote.
const corruptValue = 1 << 40

// executeAllocated gives a page of the extents that may differ; now and then one that does not.
func (p *place) executeAllocated(op *storeOp) {
	d := p.disk
	size := len(d.cells)
	if op.Snapshot != "" {
		l := d.layer(op.Snapshot)
		if l == nil {
			op.result.Status = replication.StatusNotFound
			return
		}
		size = len(l.cells)
	}
	var baseValues []uint64
	if op.Set.Base != "" {
		l := d.layer(op.Set.Base)
		if l == nil {
			op.result.Status = replication.StatusNotFound
			return
		}
		baseValues, _ = d.valuesOf(op.Set.Base, 0, len(l.cells))
	}
	values, _ := d.valuesOf(op.Snapshot, 0, size)
	var set uint64
	for b, v := range values {
		old := uint64(0)
		if b < len(baseValues) {
			old = baseValues[b]
		}
		if v != old || p.w.chance(0.05) {
			set |= 1 << (b / blocksPerExtent)
		}
	}
	op.result.Set = pageOf(set, op.Set)
}

func (p *place) executeSeal(op *storeOp) {
	w, d := p.w, p.disk
	if d.fullUntil > w.now {
		w.count.NoRoom++
		op.result.Status = replication.StatusRefused
		return
	}
	if l := d.layer(op.Snapshot); l != nil {
		if l.number == op.Number {
			return
		}
		d.dropLayer(op.Snapshot)
	}
	if d.failSync(&w.schedule) {
		op.result.Status = replication.StatusIO
		w.count.FailedSyncs++
		return
	}
	if op.Sync {
		d.sync(d.seq)
	}
	d.seal(op.Snapshot, op.Number)
	p.v.sealed(op.Snapshot, op.Number)
}

// checkWrite is S6 and S9: what is written belongs to the newest session that was fenced, and its regions are in the log,
// unless there is nobody to differ from.
func (p *place) checkWrite(op *storeOp, first, count int) {
	w := p.w
	if epoch, session, ok := stampOf(op.Data); ok {
		if epoch < p.fenced || epoch == p.fenced && session < p.session {
			w.fail("S6", "%s executes a write of e%d session %d after it answered the fence of e%d session %d", p.id, epoch, session, p.fenced, p.session)
		}
	}
	if need := rangeBits(first/blocksPerRegion, (first+count-1)/blocksPerRegion); p.disk.wil&need != need && len(p.v.m.ISR()) > 1 && !p.v.rolled {
		w.fail("S9", "%s writes blocks %d+%d, write-intent log is %012b", p.id, first, count, p.disk.wil)
	}
}

// checkSource is S11.
func (p *place) checkSource() {
	if p.poisoned {
		p.w.fail("S11", "%s is read although a sync failed on it", p.id)
	}
}
