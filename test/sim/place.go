package sim

import (
	"encoding/binary"
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// place is one replica of a volume: its disk, and while the node's process runs, its machine.
type place struct {
	w  *world
	v  *vol
	id volume.ReplicaID
	// index is its place in vol.places.
	index int
	node  *node
	disk  *disk
	life  uint64 // of the machine: a new one each time it is opened
	host  uint64 // the node's process in which it was opened
	boot  replication.BootID
	// leased is what the machine before this one said of the lease, if it was closed in good order in this life of the node.
	leased replication.Now

	machine *replication.Replica
	running []*storeOp
	opened  int64 // when the machine was opened
	addedAt int64 // when it was last added to the in-sync set

	// What was answered to fences, for the checks.
	fenced   volume.Epoch
	session  replication.Session
	seen     highest
	poisoned bool // a sync failed in this life of the machine
	// poisonedBefore: one failed in an earlier life, and nothing was copied to it since.
	poisonedBefore bool
	// asked are the versions of configurations that are not answered yet, by operation; version is the newest answered.
	asked   map[uint64]volume.ConfigVersion
	version volume.ConfigVersion
}

// highest is what a replica once said was durable.
type highest struct {
	incarnation replication.Incarnation
	epoch       volume.Epoch
	lineage     replication.Lineage
	version     volume.ConfigVersion
}

// storeOp is an operation under way on a disk.
type storeOp struct {
	replication.StoreOp
	executed bool
	result   replication.StoreResult
	seq      uint64            // of the disk when it was asked for
	marks    map[string]absent // what was missed when it was asked for
}

// open starts the machine on what the disk has.
func (p *place) open() {
	d := p.disk
	st := replication.Stored{State: slices.Clone(d.state), Size: int64(len(d.cells)) * blockSize, WIL: runsOf(d.wil)}
	for _, peer := range d.peers() {
		st.Missed = append(st.Missed, replication.MissedTag{Peer: volume.ReplicaID(peer), Since: volume.ConfigVersion(d.missed[peer].since)})
	}
	for i := range d.snapshots {
		st.Snapshots = append(st.Snapshots, replication.SealedSnapshot{ID: d.snapshots[i].id, Number: d.snapshots[i].number})
	}
	p.w.ids++
	p.life, p.host, p.running = p.w.ids, p.node.life, nil
	p.poisoned, p.version, p.asked = false, 0, map[uint64]volume.ConfigVersion{}
	if p.leased == 0 {
		p.opened, p.session = p.w.now, 0
		p.boot = replication.BootID(p.w.id())
	}
	m, err := replication.NewReplica(replication.ReplicaConfig{
		Volume: p.v.id, Replica: p.id, Incarnation: replication.Incarnation(d.incarnation), BootID: p.boot, LeaseUntil: p.leased,
		Geometry: p.w.geo, Timing: p.w.timing, Rules: p.w.opt.Rules,
	}, st, p.w.clockOf(p.node))
	if err != nil {
		p.w.fail("open", "%s: %v", p.id, err)
		return
	}
	p.machine = m
	p.effects()
}

// on has the machine's process do something, if the machine still lives the life it had then.
func (p *place) on(life uint64, do func()) {
	p.w.on(p.node, p.host, func() {
		if p.life == life && p.machine != nil {
			do()
		}
	})
}

// reopen is what a node does with a replica whose disk failed to sync: it is closed, and opened again.
func (p *place) reopen() {
	p.on(p.life, func() {
		p.w.count.Reopened++
		p.w.tracef("%s is opened again", p.id)
		p.close(false)
		for _, g := range p.v.engines {
			if c := g.conns[p.index]; c != nil {
				c.breaks()
			}
		}
		p.open()
	})
}

// rest is what a node does with a replica that no engine is connected to: it is closed in good order, and opened again when it is
// asked for. Its boot id stays, unless what was written could not be made durable.
func (p *place) rest() {
	if p.machine == nil || p.poisoned || len(p.running) > 0 || p.disk.hungUntil > p.w.now || p.disk.untold > 0 {
		return
	}
	for _, g := range p.v.engines {
		if g.conns[p.index] != nil {
			return
		}
	}
	p.w.count.Rested++
	if p.w.opt.Trace {
		p.w.tracef("%s is closed, and opened again", p.id)
	}
	d := p.disk
	if d.failSync(&p.w.schedule) {
		p.close(false)
		p.open()
		return
	}
	d.sync(d.seq)
	d.syncMissed(d.missed)
	p.leased = p.machine.LeaseUntil()
	p.open()
	p.leased = 0
}

// close is the end of the process. What the kernel had been asked to do may still be done; power tells whether the cache is
// lost.
func (p *place) close(power bool) {
	for _, op := range p.running {
		if !op.executed && p.w.chance(0.5) {
			p.execute(op)
		}
	}
	p.running, p.machine = nil, nil
	if power {
		p.disk.cut(&p.w.schedule)
	} else {
		p.disk.kill(&p.w.schedule)
	}
	p.w.dirty = true
}

// receive delivers a request.
func (p *place) receive(m *replication.Message) {
	if p.machine == nil {
		return
	}
	p.w.count.Messages++
	if m.Kind == replication.KindConfigure && m.Config != nil {
		if c := m.Config; p.poisonedBefore && m.Epoch == p.fenced && m.Session == p.session {
			if !c.Reset && c.Role == replication.RoleISR && len(c.ISR) > 1 {
				p.w.fail("S11", "%s is made a member beside others although a sync failed on it", p.id)
			}
			p.poisonedBefore = false
		}
		p.asked[m.Op] = m.Config.ConfigVersion
	}
	p.machine.Receive(p.w.clockOf(p.node), m)
	p.effects()
}

func (p *place) effects() {
	if p.machine == nil {
		return
	}
	for _, e := range p.machine.Effects() {
		if e.Answer {
			p.answered(&e.Msg)
			p.v.reply(e.Msg)
			continue
		}
		p.start(e.Store)
	}
}

// answered checks what a fence says, and notes which configuration is in force.
func (p *place) answered(m *replication.Message) {
	if m.Kind == replication.KindConfigure {
		if m.Status == replication.StatusOK && m.Epoch == p.fenced && m.Session == p.session {
			p.version = p.asked[m.Op]
		}
		delete(p.asked, m.Op)
		return
	}
	if m.Kind != replication.KindFence || m.Status != replication.StatusOK {
		return
	}
	if m.Epoch > p.fenced || m.Epoch == p.fenced && m.Session > p.session {
		p.fenced, p.session = m.Epoch, m.Session
	}
	f := m.Fence
	h := highest{f.Incarnation, f.Epoch, f.Lineage, f.ConfigVersion}
	s := p.seen
	if s.incarnation == h.incarnation && (h.epoch < s.epoch || h.lineage < s.lineage || h.lineage == s.lineage && h.version < s.version) {
		p.w.fail("S12", "%s told %+v after %+v", p.id, h, s)
	}
	p.seen = h
	p.poisonedBefore = f.PoisonedBefore
	if p.w.opt.Trace {
		p.w.tracef("%s fenced by e%d session %d: role %v cfgver %d boot %x wil %v missed %v lease %dms", p.id, m.Epoch, m.Session,
			f.Role, f.ConfigVersion, uint64(f.BootID), f.WIL, f.Missed, f.LeaseLeft/replication.Millisecond)
	}
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

func bitsOf(runs []region.Run) uint64 {
	var b uint64
	for _, r := range runs {
		for i := r.First; i < r.End() && i < 64; i++ {
			b |= 1 << i
		}
	}
	return b
}

func rangeBits(first, last int) uint64 { return (1<<(last-first+1) - 1) << first }

func runsOf(b uint64) []region.Run {
	var runs []region.Run
	for i := uint32(0); i < 64; i++ {
		if b>>i&1 == 0 {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].End() == i {
			runs[n-1].N++
		} else {
			runs = append(runs, region.Run{First: i, N: 1})
		}
	}
	return runs
}

// pageOf cuts a set into pages of at most two runs, so that paging is exercised.
func pageOf(set uint64, ask replication.SetPage) *replication.SetPage {
	page := ask
	page.Runs, page.More = nil, false
	if ask.From < 64 {
		set = set >> ask.From << ask.From
	} else {
		set = 0
	}
	runs := runsOf(set)
	if len(runs) > 2 {
		page.From, page.More = runs[2].First, true
		runs = runs[:2]
	} else {
		page.From = 64
	}
	page.Runs = runs
	return &page
}

func encode(values []uint64) []byte {
	b := make([]byte, 0, len(values)*blockSize)
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func decode(b []byte) []uint64 {
	v := make([]uint64, len(b)/blockSize)
	for i := range v {
		v[i] = binary.LittleEndian.Uint64(b[i*blockSize:])
	}
	return v
}
