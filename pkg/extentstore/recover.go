package extentstore

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// errUnknownPool: the database is empty though the data file is not.
var errUnknownPool = errors.New("the data file belongs to a pool whose database is missing; restore the directory \"db\" beside it")

// recover reads all of the database: records, then pages, from which it makes the map of free slots.
func (p *Pool) recover() error {
	if p.opts.salvage {
		return errors.Join(p.recognise(), p.readRecords(), p.salvagePages())
	}
	if err := p.identify(); err != nil {
		return err
	}
	if err := p.readRecords(); err != nil {
		return err
	}
	if err := p.findPurges(); err != nil {
		return err
	}
	return p.readPages()
}

// damaged is what is wrong with a record: the end of it, but for one who takes what there is.
func (p *Pool) damaged(err error) error {
	if p.opts.salvage {
		return nil
	}
	return err
}

// identify makes the pool where there is none. The record comes before the superblock, which a later open repeats if a
// crash came between.
func (p *Pool) identify() error {
	if p.file.Size() < layer.ExtentSize {
		if err := p.file.Grow(layer.ExtentSize); err != nil {
			return err
		}
	}
	block := make([]byte, layer.BlockSize)
	if err := p.file.ReadAt(block, 0); err != nil {
		return err
	}
	b, err := p.kv.Get([]byte{keyPool})
	if err != nil {
		return err
	}
	rec := poolRecord{version: formatVersion, id: p.opts.ID, kind: p.opts.Kind}
	if b == nil {
		if _, none, _ := decodeSuper(block); !none {
			return errUnknownPool
		}
		if rec.id == "" {
			rec.id = newPoolID()
		}
		if !p.keepRoom() {
			return fmt.Errorf("the filesystem of %s is too full for a new pool; delete something else on it: %w", p.dir, volume.ErrNoSpace)
		}
		if err := p.commitOps([]op{{[]byte{keyPool}, rec.encode()}}); err != nil {
			return err
		}
	} else if rec, err = decodePool(b); err != nil {
		return err
	}
	if p.opts.ID != "" && p.opts.ID != rec.id {
		return fmt.Errorf("pool in %s is %s, not %s: %w", p.dir, rec.id, p.opts.ID, volume.ErrInvalid)
	}
	if p.opts.Kind != rec.kind {
		return fmt.Errorf("pool %s is of kind %s, not %s: %w", rec.id, rec.kind, p.opts.Kind, volume.ErrInvalid)
	}
	p.id, p.kind = rec.id, rec.kind
	super, none, err := decodeSuper(block)
	switch {
	case err != nil:
		return err
	case !none && super.id != rec.id:
		return fmt.Errorf("the data file is of pool %s, the database beside it of pool %s: put the right one back", super.id, rec.id)
	case !none:
		return nil
	}
	clear(block)
	copy(block, encodeSuper(rec))
	if err := p.file.WriteAt(block, 0); err != nil {
		return err
	}
	return p.file.Sync()
}

// recognise refuses a format that is not ours, and the data file of another pool.
func (p *Pool) recognise() error {
	b, err := p.kv.Get([]byte{keyPool})
	if err != nil {
		return err
	}
	rec, err := decodePool(b)
	if errors.Is(err, layer.ErrCorrupt) {
		return nil
	}
	block := make([]byte, layer.BlockSize)
	if err = errors.Join(err, p.file.ReadAt(block, 0)); err != nil {
		return err
	}
	p.id, p.kind = rec.id, rec.kind
	if super, none, err := decodeSuper(block); err == nil && !none && super.id != rec.id {
		return fmt.Errorf("the data file is of pool %s, the database beside it of pool %s: put the right one back", super.id, rec.id)
	}
	return nil
}

func newPoolID() volume.PoolID {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	return volume.PoolID("pool-" + hex.EncodeToString(b[:]))
}

func (p *Pool) readRecords() error {
	parents := map[uint64]uint64{}
	err := p.kv.Scan([]byte{keyLayer}, func(k, v []byte) error {
		r, err := decodeLayer(v)
		if err != nil || len(k) != 9 {
			return p.damaged(errors.Join(err, fmt.Errorf("layer record %x", k)))
		}
		id := binary.BigEndian.Uint64(k[1:])
		l := &chain{id: id, summed: r.summed}
		if r.damaged {
			l.damaged.Store(true)
			p.distrusted.Add(1)
			l.bad = errDamaged
		}
		p.layers[id] = l
		parents[id] = r.parent
		p.nextLayer = max(p.nextLayer, id)
		return nil
	})
	if err != nil {
		return err
	}
	for id, parent := range parents {
		if parent == 0 {
			continue
		}
		// Ids grow: a layer is younger than its parent, so a chain has no circle.
		above := p.layers[parent]
		if above == nil || parent >= id {
			if err := p.damaged(fmt.Errorf("layer %d has parent %d, which is not there: %w", id, parent, layer.ErrCorrupt)); err != nil {
				return err
			}
			p.layers[id].bad = layer.ErrCorrupt
			continue
		}
		p.layers[id].parent.Store(above)
		above.children++
	}
	err = p.kv.Scan([]byte{keySnapshot}, func(k, v []byte) error {
		r, err := decodeSnapshot(v)
		if err != nil {
			return p.damaged(fmt.Errorf("%s: %w", k[1:], err))
		}
		l := p.layers[r.layer]
		if l == nil || l.snap != nil {
			return p.damaged(fmt.Errorf("snapshot %s has layer %d, which is missing or another's: %w", k[1:], r.layer, layer.ErrCorrupt))
		}
		s := &snapshot{id: volume.SnapshotID(k[1:]), layer: l, number: r.number, size: r.size, volume: volume.ID(r.volume), tenant: r.tenant,
			replica: volume.ReplicaID(r.replica)}
		l.snap, p.snapshots[s.id] = s, s
		return nil
	})
	if err != nil {
		return err
	}
	journals := map[uint64]*replica{}
	err = p.kv.Scan([]byte{keyReplica}, func(k, v []byte) error {
		r, err := decodeReplica(v)
		if err != nil {
			return p.damaged(fmt.Errorf("%s: %w", k[1:], err))
		}
		l := p.layers[r.head]
		if l == nil || l.head != nil || l.snap != nil || l.children != 0 {
			return p.damaged(fmt.Errorf("replica %s has layer %d, which is missing or not its own: %w", k[1:], r.head, layer.ErrCorrupt))
		}
		n := &replica{p: p, id: volume.ReplicaID(k[1:]), volume: volume.ID(r.volume), tenant: r.tenant, journal: r.journal}
		n.size.Store(r.size)
		n.head.Store(l)
		l.head, p.replicas[n.id], journals[n.journal] = n, n, n
		p.present.Store(n.id, true)
		return nil
	})
	if err != nil {
		return err
	}
	return p.kv.Scan([]byte{keyFlushed}, func(k, v []byte) error {
		id, _, ok := parseJournalKey(k, 0)
		at, err := decodeFlushed(v)
		if !ok || err != nil {
			return p.damaged(errors.Join(err, badKey(k)))
		}
		if r := journals[id]; r != nil {
			r.flushedAt.Store(at)
			r.savedAt = at
		}
		return nil
	})
}

// readPages fills the map of free slots: all are free but those that a page owns.
func (p *Pool) readPages() error {
	capacity, err := p.measure()
	if err != nil {
		return err
	}
	limit := int(capacity / layer.ExtentSize)
	fileSlots := int(p.file.Size() / layer.ExtentSize)
	total := max(limit+1, fileSlots)
	owned := layer.NewFreeMap(total)
	a := &p.alloc
	var pg layer.Page
	err = p.kv.Scan([]byte{keyPage}, func(k, v []byte) error {
		id, idx, ok := parsePageKey(k)
		l := p.layers[id]
		if !ok || l == nil || idx >= maxPages {
			return fmt.Errorf("page %x belongs to no layer: %w", k, layer.ErrCorrupt)
		}
		if err := pg.Decode(v); err != nil {
			return fmt.Errorf("page %d of layer %d: %w", idx, id, err)
		}
		l.pages.add(idx)
		for i := range pg {
			s := pg[i].Slot
			if s == 0 {
				continue
			}
			if int(s) >= fileSlots {
				return fmt.Errorf("page %d of layer %d refers to slot %d, the data file has %d: %w", idx, id, s, fileSlots, layer.ErrCorrupt)
			}
			if !owned.Add(s) {
				return fmt.Errorf("slot %d has two owners, one is page %d of layer %d; look with \"ballastctl pool check\": %w",
					s, idx, id, layer.ErrCorrupt)
			}
			a.used++
			l.slots.Add(1)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if p.opts.Capacity == 0 && p.thin {
		limit += a.used
		total = max(total, limit+1)
	}
	a.limit = limit
	a.ready, a.holes = layer.NewFreeMap(total), layer.NewFreeMap(total)
	free := a.ready
	if p.thin {
		free = a.holes
	}
	for s := layer.Slot(1); int(s) < total; s++ {
		if !owned.Has(s) {
			free.Add(s)
		}
	}
	return p.file.Grow(int64(total) * layer.ExtentSize)
}

// salvagePages notes which pages there are: a bad one fails those who read it.
func (p *Pool) salvagePages() error {
	return p.kv.Scan([]byte{keyPage}, func(k, v []byte) error {
		id, idx, ok := parsePageKey(k)
		if l := p.layers[id]; ok && l != nil && idx < maxPages {
			var pg layer.Page
			_ = pg.Decode(v) // its slots are not counted then
			l.slots.Add(int64(pg.Slots()))
			l.pages.add(idx)
		}
		return nil
	})
}

// measure is the pool's capacity in bytes; where none was given for a thin pool, what is free beside what it occupies.
func (p *Pool) measure() (int64, error) {
	c := p.opts.Capacity
	switch {
	case c > 0:
	case !p.thin:
		c = p.file.Size() - layer.ExtentSize
	default:
		free, err := p.space.Free()
		if err != nil {
			return 0, err
		}
		c = max(0, free-growFloor)
		if !p.space.Held() {
			c = max(0, c-p.opts.Reserve)
		}
	}
	return min(c, (1<<32-2)*layer.ExtentSize), nil
}
