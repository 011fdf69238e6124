package sim

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// cell is one block: what a read returns, what is on the platter, and what was written since the last sync, any of which
// the platter may hold when the power goes.
type cell struct {
	cache, durable uint64
	unsynced       []written
}

type written struct {
	value uint64
	seq   uint64
}

// layer is what a snapshot sealed: all blocks as they were.
type layer struct {
	id     volume.SnapshotID
	number uint64
	cells  []cell
}

// absent is what a replica keeps of a peer that is away: bits of extents, and the version since which they are complete.
type absent struct {
	since uint64
	bits  uint64
}

// disk is where one replica lives. A change of metadata is durable at the moment when it executes, which is some time
// between the call and the answer; data stays in the cache until a sync. What the process knows of absent peers is in its
// memory (missed) until it is synced (missedOnIt).
type disk struct {
	incarnation uint64
	seq         uint64 // of the last write of a block
	state       []byte
	cells       []cell
	snapshots   []*layer // oldest first
	wil         uint64   // regions marked, as the process sees them
	wilDurable  uint64   // and as they may be found after a crash: a cleared bit may be back
	missed      map[string]absent
	missedOnIt  map[string]absent
	syncFailed  bool // something that was promised may be missing
	cacheLies   bool // the cache shows what a failed sync lost, until the disk is opened again
	untold      int  // syncs that failed and were not answered yet: until then all others fail too

	// Faults.
	hungUntil  int64 // nothing executes
	fullUntil  int64 // writes wait for space
	slow       int64 // factor on every delay
	failSyncs  int
	failWrites int
	failReads  int
	failMetas  int
	corrupt    int // so many copies that are written come out as something else
}

func newDisk(incarnation uint64, blocks int) *disk {
	d := &disk{incarnation: incarnation, missed: map[string]absent{}, missedOnIt: map[string]absent{}, slow: 1}
	d.resize(blocks)
	return d
}

func (d *disk) resize(blocks int) {
	for len(d.cells) < blocks {
		d.cells = append(d.cells, cell{})
	}
}

// hungFor tells how long an operation of the kind still has to wait.
func (d *disk) hungFor(kind replication.StoreKind, now int64) int64 {
	until := d.hungUntil
	if kind == replication.StoreWrite || kind == replication.StoreZero {
		until = max(until, d.fullUntil)
	}
	return max(0, until-now)
}

// failSync tells whether a sync that executes now fails.
func (d *disk) failSync(s *schedule) bool {
	if d.failSyncs > 0 {
		d.failSyncs--
	} else if d.untold == 0 {
		return false
	}
	d.loseSync(s)
	return true
}

func (d *disk) failMeta() bool {
	if d.failMetas > 0 {
		d.failMetas--
		return true
	}
	return false
}

func (d *disk) write(b int, v uint64) {
	d.seq++
	c := &d.cells[b]
	if c.durable == corruptValue {
		// A comparison sees what was written over it; that the old bytes could be back after a loss of power is too much.
		c.durable = v
	}
	c.cache = v
	c.unsynced = append(c.unsynced, written{v, d.seq})
}

// valuesOf reads blocks of the head ("") or of a snapshot.
func (d *disk) valuesOf(id volume.SnapshotID, first, count int) ([]uint64, replication.Status) {
	cells := d.cells
	if id != "" {
		l := d.layer(id)
		if l == nil {
			return nil, replication.StatusNotFound
		}
		cells = l.cells
	}
	if id == "" && first+count > len(cells) {
		return nil, replication.StatusRange
	}
	values := make([]uint64, count)
	for i := range values {
		if first+i < len(cells) { // a snapshot is smaller than the volume that grew since: zeros
			values[i] = cells[first+i].cache
		}
	}
	return values, replication.StatusOK
}

func (d *disk) layer(id volume.SnapshotID) *layer {
	for _, l := range d.snapshots {
		if l.id == id {
			return l
		}
	}
	return nil
}

func (d *disk) dropLayer(id volume.SnapshotID) {
	d.snapshots = slices.DeleteFunc(d.snapshots, func(l *layer) bool { return l.id == id })
}

func (d *disk) seal(id volume.SnapshotID, number uint64) {
	l := &layer{id: id, number: number, cells: make([]cell, len(d.cells))}
	for i := range d.cells {
		l.cells[i] = cell{cache: d.cells[i].cache, durable: d.cells[i].durable, unsynced: slices.Clone(d.cells[i].unsynced)}
	}
	d.snapshots = append(d.snapshots, l)
	d.commit()
}

// sync makes durable what was written up to seq: a sync covers what was there when it started.
func (d *disk) sync(seq uint64) {
	for i := range d.cells {
		d.cells[i].sync(seq)
	}
	for _, l := range d.snapshots {
		for i := range l.cells {
			l.cells[i].sync(seq)
		}
	}
	d.commit()
}

func (d *disk) syncRange(first, count int) {
	for i := first; i < first+count; i++ {
		d.cells[i].sync(d.seq)
	}
}

func (c *cell) sync(seq uint64) {
	k := 0
	for k < len(c.unsynced) && c.unsynced[k].seq <= seq {
		c.durable = c.unsynced[k].value
		k++
	}
	c.unsynced = slices.Delete(c.unsynced, 0, k)
}

// commit is what every durable change of metadata brings along: cleared regions are cleared on the platter too.
func (d *disk) commit() { d.wilDurable = d.wil }

// syncMissed makes durable what was known of absent peers when a sync was asked for.
func (d *disk) syncMissed(then map[string]absent) {
	for p, a := range d.missed {
		if t, ok := then[p]; ok && t.since == a.since {
			t.bits |= d.missedOnIt[p].bits
			d.missedOnIt[p] = t
		}
	}
	d.commit()
}

// peers are the absent peers that are tracked, in order.
func (d *disk) peers() []string {
	var ids []string
	for p := range d.missed {
		ids = append(ids, p)
	}
	slices.Sort(ids)
	return ids
}

// loseSync is a failed fsync: of what was to be written some is on the platter, some is not and never will be, although
// the cache still shows it.
func (d *disk) loseSync(s *schedule) {
	d.syncFailed, d.cacheLies = true, true
	d.untold++
	for i := range d.cells {
		c := &d.cells[i]
		if n := len(c.unsynced); n > 0 && s.chance(0.5) {
			c.durable = c.unsynced[n-1].value
		}
		c.unsynced = c.unsynced[:0]
	}
}

// kill is the end of the process: what is in the kernel's cache stays, what is in its memory does not.
func (d *disk) kill(s *schedule) {
	for i := range maxRegions {
		if back := uint64(1) << i; d.wilDurable&^d.wil&back != 0 && s.chance(0.5) {
			d.wil |= back
		}
	}
	d.wilDurable = d.wil
	d.untold = 0
	if d.cacheLies {
		d.cacheLies = false
		// What the failed sync left in the cache is dropped by who opens the file next (disk.OpenFile): the platter is read.
		for i := range d.cells {
			if c := &d.cells[i]; len(c.unsynced) == 0 {
				c.cache = c.durable
			}
		}
	}
	clear(d.missed)
	for p, a := range d.missedOnIt {
		d.missed[p] = a
	}
}

// cut is a loss of power: of what was not synced each block keeps any version, or none. How much survives is drawn once
// per cut, so that some lose all and some nothing.
func (d *disk) cut(s *schedule) {
	d.kill(s)
	keep := [...]float64{0, 0.5, 1}[s.pick(3)]
	for i := range d.cells {
		d.cells[i].cut(s, keep)
	}
	for _, l := range d.snapshots {
		for i := range l.cells {
			l.cells[i].cut(s, keep)
		}
	}
}

func (c *cell) cut(s *schedule, keep float64) {
	if n := len(c.unsynced); n > 0 && s.chance(keep) {
		c.durable = c.unsynced[s.pick(n)].value
		if s.chance(0.5) {
			c.durable = c.unsynced[n-1].value
		}
	}
	c.unsynced = c.unsynced[:0]
	c.cache = c.durable
}

// holds tells whether the block is v, and stays so whatever happens.
func (c *cell) holds(v uint64) bool {
	if c.cache != v || c.durable != v {
		return false
	}
	for _, u := range c.unsynced {
		if u.value != v {
			return false
		}
	}
	return true
}
