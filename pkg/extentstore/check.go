package extentstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxProblems bounds a report.
const maxProblems = 1000

// Report is what Check found.
type Report struct {
	ID                                 volume.PoolID
	Replicas, Snapshots, Layers, Pages int
	Extents                            int64 // slots that hold data
	Verified                           int64 // extents whose checksum was compared
	Stale                              int64 // extents without a checksum yet: heads, and sealed a short while ago
	Unreferenced                       int   // layers and journals still to be freed in the background; not a problem
	Problems                           []string
	Truncated                          bool // there were more problems
}

func (r *Report) problem(format string, a ...any) {
	if len(r.Problems) >= maxProblems {
		r.Truncated = true
		return
	}
	r.Problems = append(r.Problems, fmt.Sprintf(format, a...))
}

// Check examines a pool that no process has open: records, chains, pages, owners of slots and checksums. It changes
// nothing. The error is of the examination itself; what is wrong with the pool is in the report. Progress may be nil.
func Check(ctx context.Context, dir string, progress Progress) (_ Report, err error) {
	var d deps
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.open(dir, true, true); err != nil {
		return Report{}, err
	}
	return check(ctx, d.file, d.kv, progress)
}

func (d *deps) close() error {
	var errs []error
	if d.kv != nil {
		errs = append(errs, d.kv.Close(), d.file.Close())
	}
	for _, f := range d.release {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// checker gathers what the records say, to compare the pages with.
type checker struct {
	Report
	file   disk.File
	layers map[uint64]layerRecord
	sizes  map[uint64]int64 // of the largest that sees the layer
	// journals are by whom each is.
	journals map[uint64]string
	owned    *layer.FreeMap
	twice    map[layer.Slot][]string // who owns what several do
	buf      []byte
}

func check(ctx context.Context, f disk.File, db kv, progress Progress) (Report, error) {
	c := &checker{file: f, layers: map[uint64]layerRecord{}, journals: map[uint64]string{}, sizes: map[uint64]int64{}, owned: layer.NewFreeMap(int(f.Size() / layer.ExtentSize)),
		twice: map[layer.Slot][]string{}, buf: disk.Aligned(layer.ExtentSize)}
	if err := c.identity(db); err != nil {
		return c.Report, err
	}
	if err := c.records(db); err != nil {
		return c.Report, err
	}
	err := db.Scan([]byte{keyPage}, func(k, v []byte) error {
		c.page(k, v)
		return ctx.Err()
	})
	if err == nil {
		err = c.owners(ctx, db)
	}
	if err != nil {
		return c.Report, err
	}
	var done int64
	err = db.Scan([]byte{keyPage}, func(k, v []byte) error {
		var pg layer.Page
		id, idx, ok := parsePageKey(k)
		if _, known := c.layers[id]; ok && known && pg.Decode(v) == nil {
			c.sums(db, id, idx, &pg, v)
			if done += int64(pg.Slots()) * layer.ExtentSize; progress != nil {
				progress(done, c.Extents*layer.ExtentSize)
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return c.Report, err
	}
	err = db.Scan([]byte{keySums}, func(k, _ []byte) error {
		id, idx, ok := parsePageKey(k)
		if _, known := c.layers[id]; !ok || !known {
			c.problem("checksums of page %d of layer %d, which is not there", idx, id)
		}
		return ctx.Err()
	})
	if err != nil {
		return c.Report, err
	}
	return c.Report, c.protocol(ctx, db)
}

func (c *checker) identity(db kv) error {
	b, err := db.Get([]byte{keyPool})
	if err != nil {
		return err
	}
	if b == nil {
		c.problem("the pool has no record: it was never opened, or its database is lost")
		return nil
	}
	rec, err := decodePool(b)
	if err != nil {
		c.problem("%v", err)
		return nil
	}
	c.ID = rec.id
	block := make([]byte, layer.BlockSize)
	if err := c.file.ReadAt(block, 0); err != nil {
		c.problem("read the superblock: %v", err)
		return nil
	}
	super, none, err := decodeSuper(block)
	switch {
	case err != nil:
		c.problem("%v", err)
	case none:
		c.problem("the data file has no superblock")
	case super.id != rec.id:
		c.problem("the data file is of pool %s, the database of pool %s", super.id, rec.id)
	}
	return nil
}

func (c *checker) records(db kv) error {
	err := db.Scan([]byte{keyLayer}, func(k, v []byte) error {
		r, err := decodeLayer(v)
		if err != nil || len(k) != 9 {
			c.problem("layer record %x: %v", k, err)
			return nil
		}
		c.layers[binary.BigEndian.Uint64(k[1:])] = r
		c.Layers++
		return nil
	})
	if err != nil {
		return err
	}
	for id, r := range c.layers {
		if _, ok := c.layers[r.parent]; r.parent != 0 && (!ok || r.parent >= id) {
			c.problem("layer %d has parent %d, which is missing or younger", id, r.parent)
		}
	}
	heads, sealed := map[uint64]string{}, map[uint64]string{}
	err = db.Scan([]byte{keySnapshot}, func(k, v []byte) error {
		c.Snapshots++
		r, err := decodeSnapshot(v)
		if err != nil {
			c.problem("snapshot %s: %v", k[1:], err)
			return nil
		}
		c.refer("snapshot "+string(k[1:]), r.layer, r.size, sealed)
		return nil
	})
	if err != nil {
		return err
	}
	err = db.Scan([]byte{keyReplica}, func(k, v []byte) error {
		c.Replicas++
		r, err := decodeReplica(v)
		if err != nil {
			c.problem("replica %s: %v", k[1:], err)
			return nil
		}
		c.refer("replica "+string(k[1:]), r.head, r.size, heads)
		if other := c.journals[r.journal]; other != "" {
			c.problem("journal %d is of %s and of %s", r.journal, other, k[1:])
		}
		c.journals[r.journal] = string(k[1:])
		return nil
	})
	if err != nil {
		return err
	}
	for id, who := range heads {
		if s := sealed[id]; s != "" {
			c.problem("layer %d is of %s and of %s", id, who, s)
		}
	}
	for id, r := range c.layers {
		if who := heads[r.parent]; r.parent != 0 && who != "" {
			c.problem("layer %d has the head of %s as its parent", id, who)
		}
		if _, seen := c.sizes[id]; !seen {
			c.Unreferenced++
		}
	}
	return nil
}

// refer notes that something refers to a layer, and how far it sees into the layers below.
func (c *checker) refer(who string, id uint64, size int64, taken map[uint64]string) {
	if _, ok := c.layers[id]; !ok {
		c.problem("%s refers to layer %d, which is missing", who, id)
		return
	}
	if other := taken[id]; other != "" {
		c.problem("layer %d is of %s and of %s", id, who, other)
	}
	taken[id] = who
	for steps := 0; id != 0 && steps <= len(c.layers); steps++ {
		c.sizes[id] = max(c.sizes[id], size)
		parent := c.layers[id].parent
		if parent >= id {
			return
		}
		id = parent
	}
}

// page checks everything about a page but the bytes that it refers to.
func (c *checker) page(k, v []byte) {
	c.Pages++
	id, idx, ok := parsePageKey(k)
	if _, known := c.layers[id]; !ok || !known || idx >= maxPages {
		c.problem("page %x belongs to no layer", k)
		return
	}
	var pg layer.Page
	if err := pg.Decode(v); err != nil {
		c.problem("page %d of layer %d: %v", idx, id, err)
		return
	}
	size, seen := c.sizes[id]
	for i, e := range pg {
		off := int64(idx)*layer.PageSpan + int64(i)*layer.ExtentSize
		if e.Covers() == 0 {
			continue
		}
		if seen && off+int64(highest(e.Covers())+1)*layer.BlockSize > size {
			c.problem("layer %d has blocks at %d, beyond the end at %d", id, off, size)
		}
		if e.Slot == 0 {
			continue
		}
		c.Extents++
		if e.Slot.Offset()+layer.ExtentSize > c.file.Size() {
			c.problem("layer %d at %d has slot %d, beyond the data file", id, off, e.Slot)
		} else if !c.owned.Add(e.Slot) && len(c.twice) < maxProblems {
			c.twice[e.Slot] = nil
		}
	}
}

// owners names all owners of slots that have several.
func (c *checker) owners(ctx context.Context, db kv) error {
	if len(c.twice) == 0 {
		return nil
	}
	err := db.Scan([]byte{keyPage}, func(k, v []byte) error {
		var pg layer.Page
		id, idx, ok := parsePageKey(k)
		if !ok || pg.Decode(v) != nil {
			return ctx.Err()
		}
		for i, e := range pg {
			if who, twice := c.twice[e.Slot]; twice {
				c.twice[e.Slot] = append(who, fmt.Sprintf("layer %d at %d", id, int64(idx)*layer.PageSpan+int64(i)*layer.ExtentSize))
			}
		}
		return ctx.Err()
	})
	for _, s := range slices.Sorted(maps.Keys(c.twice)) {
		c.problem("slot %d is of %s", s, strings.Join(c.twice[s], " and of "))
	}
	return err
}

func highest(m layer.Mask) int {
	n := -1
	for ; m != 0; m >>= 1 {
		n++
	}
	return n
}

// protocol checks what the replication protocol keeps with the replicas.
func (c *checker) protocol(ctx context.Context, db kv) error {
	type peer struct {
		id uint64
		no uint32
	}
	left, peers := map[uint64]bool{}, map[peer]bool{}
	for _, kind := range journalKinds {
		err := db.Scan([]byte{kind.kind}, func(k, v []byte) error {
			id, n, ok := parseJournalKey(k, kind.numbers)
			who := c.journals[id]
			if !ok || who == "" {
				left[id] = true
				return ctx.Err()
			}
			var err error
			switch kind.kind {
			case keyState:
				_, err = decodeState(v)
			case keyFlushed:
				_, err = decodeFlushed(v)
			case keyWIL:
				err = decodeWords("the write-intent log", v, make([]uint64, groupRegions/64))
				ok = n[0] <= maxWILGroup
			case keyPeer:
				_, err = decodePeer(v)
				peers[peer{id, n[0]}] = true
			case keyMissed:
				if !peers[peer{id, n[0]}] {
					return ctx.Err() // of one that was dropped
				}
				err = decodeWords("what a peer missed", v, make([]uint64, missedWords))
				ok = n[1] <= maxMissedPage
			}
			if err != nil || !ok {
				c.problem("replica %s, key %x: %v", who, k, errors.Join(err, badKey(k)))
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
	}
	c.Unreferenced += len(left)
	return nil
}

// sums compares the bytes of a page with their checksums, where those are of this very page.
func (c *checker) sums(db kv, id uint64, idx uint32, pg *layer.Page, stored []byte) {
	b, err := db.Get(pageKey(keySums, id, idx))
	if err != nil {
		c.problem("checksums of page %d of layer %d: %v", idx, id, err)
		return
	}
	var s sums
	if b != nil {
		if s, err = decodeSums(b); err != nil {
			c.problem("checksums of page %d of layer %d: %v", idx, id, err)
			return
		}
	}
	if b == nil || s.page != layer.PageSum(stored) || len(s.crcs) != pg.Slots() {
		if b == nil && c.layers[id].summed {
			c.problem("page %d of layer %d has lost its checksums", idx, id)
		}
		c.Stale += int64(pg.Slots())
		return
	}
	k := 0
	for i, e := range pg {
		if e.Slot == 0 {
			continue
		}
		off := int64(idx)*layer.PageSpan + int64(i)*layer.ExtentSize
		got, err := extentSum(c.file, e, c.buf)
		switch {
		case err != nil:
			c.problem("layer %d at %d: read slot %d: %v", id, off, e.Slot, err)
		case got != s.crcs[k]:
			c.problem("layer %d at %d: the bytes in slot %d have checksum %08x, want %08x", id, off, e.Slot, got, s.crcs[k])
		default:
			c.Verified++
		}
		k++
	}
}
