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
