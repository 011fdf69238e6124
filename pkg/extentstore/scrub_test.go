package extentstore

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// readCounter counts the bytes that are read.
type readCounter struct {
	*disk.Mem
	n atomic.Int64
}

func (f *readCounter) ReadAt(p []byte, off int64) error {
	f.n.Add(int64(len(p)))
	return f.Mem.ReadAt(p, off)
}

// rot flips a bit of a slot behind the pool's back.
func rot(t *testing.T, m *machine, s layer.Slot) {
	t.Helper()
	b := make([]byte, layer.BlockSize)
	must(t, m.file.ReadAt(b, s.Offset()))
	b[17] ^= 4
	must(t, m.file.WriteAt(b, s.Offset()))
}

func TestScrubFindsDamage(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, MergeRate: 1 << 40, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 16*mib, "")
	newReplica(t, p, "other", 16*mib, "")
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 3*layer.ExtentSize), layer.PageSpan-layer.ExtentSize))
	must(t, p.Cut(ctx, "r", "s"))
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, layer.ExtentSize), 0)) // a head has no checksums
	must(t, d.Flush(ctx))
	settle(t, p)
	must(t, p.Scrub(ctx))
	if r := reasons(p); len(r) > 0 {
		t.Fatalf("a sound pool: %v", r)
	}
	rot(t, m, 2)
	must(t, p.Scrub(ctx))
	c := p.Conditions("r")
	if len(c) != 1 || c[0].Reason != "ExtentCorrupt" || c[0].Severity != volume.DataLoss || !strings.Contains(c[0].Message, "snapshot s") {
		t.Fatalf("conditions %+v", c)
	}
	if c := p.Conditions("other"); len(c) > 0 {
		t.Fatalf("conditions of another replica: %+v", c)
	}
	// What is damaged can be deleted all the same.
	must(t, d.Close())
	if got := damagedText(p); got != "r s" {
		t.Errorf("damaged: %s", got)
	}
	must(t, p.DeleteReplica(ctx, "r"))
	must(t, p.DeleteSnapshot(ctx, "s", "", 0))
	settle(t, p)
	if r := reasons(p); len(r) > 0 || p.alloc.used != 0 || damagedText(p) != "" || p.distrusted.Load() != 0 {
		t.Fatalf("%v, %d slots, damaged %s", r, p.alloc.used, damagedText(p))
	}
}

func damagedText(p *Pool) string {
	replicas, snapshots := p.Damaged()
	var out []string
	for id := range replicas {
		out = append(out, string(id))
	}
	for id := range snapshots {
		out = append(out, string(id))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestDamageIsNotRead: once damage is known, also after a restart, reads of that extent fail, and no others do.
func TestDamageIsNotRead(t *testing.T) {
	m := newMachine()
	o := Options{Capacity: 64 * mib, MergeRate: 1 << 40, manual: true}
	p := openMem(t, m, o)
	ctx := t.Context()
	d := newReplica(t, p, "r", 16*mib, "")
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 4*layer.ExtentSize), layer.PageSpan-2*layer.ExtentSize)) // in two pages
	must(t, p.Cut(ctx, "r", "s"))
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, 2*layer.BlockSize), layer.PageSpan)) // above the damage to come
	must(t, d.Flush(ctx))
	settle(t, p)
	l := p.layers[1]
	e, _, err := p.copyOf(l, 1)
	must(t, err)
	rot(t, m, e[0].Slot)
	must(t, p.Scrub(ctx))
	look := func(dev interface {
		ReadAt(context.Context, []byte, int64) error
	}, blocks ...int) {
		t.Helper()
		for i := range 4 * layer.BlocksPerExtent {
			block := i - 2*layer.BlocksPerExtent // from the damaged extent's first
			err := dev.ReadAt(ctx, make([]byte, layer.BlockSize), layer.PageSpan+int64(block)*layer.BlockSize)
			if bad := slices.Contains(blocks, block); bad != errors.Is(err, layer.ErrCorrupt) || !bad && err != nil {
				t.Errorf("block %d: %v", block, err)
			}
		}
		if err := dev.ReadAt(ctx, make([]byte, 4*layer.ExtentSize), layer.PageSpan-2*layer.ExtentSize); !errors.Is(err, layer.ErrCorrupt) {
			t.Errorf("all of it: %v", err)
		}
	}
	all := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	look(d, all[2:]...) // the head has the first two
	s, err := p.OpenSnapshot(ctx, "s")
	must(t, err)
	look(s, all...)
	must(t, s.Close())
	must(t, p.Close())
	p = openMem(t, m.reopen(), o)
	defer p.Close()
	d, err = p.OpenReplica(ctx, "r")
	must(t, err)
	look(d, all[2:]...)
	if got := damagedText(p); got != "r s" {
		t.Errorf("damaged: %s", got)
	}
	// A write of a part of a block that nobody knows any more would make the rest look sound.
	if err := d.WriteAt(ctx, make([]byte, 512), layer.PageSpan+2*layer.BlockSize); !errors.Is(err, layer.ErrCorrupt) {
		t.Errorf("a write of a part of a block: %v", err)
	}
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{3}, layer.ExtentSize), layer.PageSpan))
	must(t, d.ReadAt(ctx, make([]byte, 4*layer.ExtentSize), layer.PageSpan-2*layer.ExtentSize))
}

// TestMergeCarriesChecksums: a merge reads only what it copies, and damage does not get a checksum of its own.
func TestMergeCarriesChecksums(t *testing.T) {
	m := newMachine()
	f := &readCounter{Mem: m.file}
	p, err := start("/memory", deps{file: f, kv: m.kv, space: m.space}, Options{Capacity: 64 * mib, manual: true})
	must(t, err)
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 16*mib), 0))
	must(t, p.Cut(ctx, "r", "a"))
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, layer.ExtentSize), 3*layer.ExtentSize))    // covers one
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, layer.BlockSize), layer.PageSpan+12*4096)) // a part of one: copied
	must(t, p.Cut(ctx, "r", "b"))
	settle(t, p)
	rot(t, m, 2)
	f.n.Store(0)
	must(t, p.DeleteSnapshot(ctx, "a", "", 0))
	settle(t, p)
	// An extent to verify and copy 15 blocks of, and the page they are in to sum.
	if n := f.n.Load(); n > layer.PageSpan+2*layer.ExtentSize {
		t.Errorf("%d bytes were read", n)
	}
	r, err := check(ctx, m.file, m.kv, nil)
	must(t, err)
	if r.Stale != 0 || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "slot 2 have checksum") {
		t.Errorf("check: %+v", r)
	}
	must(t, p.Scrub(ctx))
	if !slices.Contains(reasons(p), "ExtentCorrupt") {
		t.Errorf("conditions %v", reasons(p))
	}
}

// TestMergeDoesNotHideDamage: blocks of an extent that is not what was summed are not copied, for they would get a sum that
// fits, and a restart does not make them any better.
func TestMergeDoesNotHideDamage(t *testing.T) {
	for name, into := range map[string]string{"a head": "", "a sealed layer": "b"} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			o := Options{Capacity: 64 * mib, MergeRate: 1 << 40, manual: true}
			p := openMem(t, m, o)
			ctx := t.Context()
			d := newReplica(t, p, "r", 16*mib, "")
			must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, 3*layer.ExtentSize), 0))
			must(t, p.Cut(ctx, "r", "a"))
			settle(t, p)
			must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, layer.BlockSize), layer.ExtentSize+3*layer.BlockSize))
			if into != "" {
				must(t, p.Cut(ctx, "r", volume.SnapshotID(into)))
				settle(t, p)
			}
			rot(t, m, p.layers[1].slotAt(t, p, 1))
			must(t, p.DeleteSnapshot(ctx, "a", "", 0))
			for {
				if more, err := p.step(); !more {
					break
				} else if err != nil && !errors.Is(err, errChecksum) {
					t.Fatal(err)
				}
			}
			if got := reasons(p); !slices.Equal(got, []string{"ExtentCorrupt"}) {
				t.Fatalf("conditions %v", got)
			}
			must(t, p.Close())
			m = m.reopen()
			p = openMem(t, m, o)
			defer p.Close()
			settle(t, p) // leaves it alone
			must(t, p.Scrub(ctx))
			if got := reasons(p); !slices.Equal(got, []string{"ExtentCorrupt"}) || !p.layers[1].mergeable() {
				t.Fatalf("conditions after a restart: %v", got)
			}
			r, err := check(ctx, m.file, m.kv, nil)
			must(t, err)
			if len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "have checksum") {
				t.Errorf("check: %v", r.Problems)
			}
			// Once the disk gives back what was summed, all goes on.
			rot(t, m, p.layers[1].slotAt(t, p, 1))
			must(t, p.Scrub(ctx))
			settle(t, p)
			if got := reasons(p); len(got) > 0 || p.layers[1] != nil {
				t.Errorf("conditions of a sound pool: %v", got)
			}
		})
	}
}

func (l *chain) slotAt(t *testing.T, p *Pool, i int) layer.Slot {
	t.Helper()
	e, ok, err := p.copyOf(l, 0)
	must(t, err)
	if !ok || e[i].Slot == 0 {
		t.Fatalf("layer %d has nothing at extent %d", l.id, i)
	}
	return e[i].Slot
}

// TestScrubGoesOn: a scrub that was cut off goes on where it was, and the week is counted from its end.
func TestScrubGoesOn(t *testing.T) {
	m := newMachine()
	o := Options{Capacity: 256 * mib, MergeRate: 1 << 40, manual: true}
	p := openMem(t, m, o)
	ctx := t.Context()
	d := newReplica(t, p, "r", 128*mib, "")
	for _, snap := range []volume.SnapshotID{"a", "b"} {
		for off := int64(0); off < 64*mib; off += layer.PageSpan {
			must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, layer.ExtentSize), off))
		}
		must(t, p.Cut(ctx, "r", snap))
	}
	settle(t, p)
	cut, stop := context.WithCancel(ctx)
	stop()
	if err := p.Scrub(cut); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	at, err := p.lastScrub()
	must(t, err)
	if at.layer != 1 || at.page == 0 || at.due(time.Now()) != scrubSoon {
		t.Fatalf("a scrub that was cut off is at %+v", at)
	}
	must(t, p.Close())
	m = m.reopen()
	f := &readCounter{Mem: m.file}
	p, err = start("/memory", deps{file: f, kv: m.kv, space: m.space}, o)
	must(t, err)
	defer p.Close()
	must(t, p.saveScrub(scrubRecord{layer: 2, page: 5}))
	f.n.Store(0)
	must(t, p.Scrub(ctx))
	if n := f.n.Load(); n != 3*layer.ExtentSize {
		t.Errorf("the rest of the scrub read %d bytes, want %d", n, 3*layer.ExtentSize)
	}
	last, err := p.lastScrub()
	must(t, err)
	if last.layer != 0 || time.Since(time.Unix(last.ended, 0)) > time.Hour {
		t.Errorf("after a scrub: %+v", last)
	}
}

func TestScrubIsDue(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for name, c := range map[string]struct {
		last scrubRecord
		want time.Duration
	}{
		"just ended":     {scrubRecord{ended: now.Unix()}, scrubEvery},
		"a day ago":      {scrubRecord{ended: now.Add(-24 * time.Hour).Unix()}, scrubEvery - 24*time.Hour},
		"overdue":        {scrubRecord{ended: now.Add(-2 * scrubEvery).Unix()}, scrubSoon},
		"in the future":  {scrubRecord{ended: now.Add(scrubEvery).Unix()}, scrubEvery},
		"never":          {scrubRecord{}, scrubSoon},
		"under way":      {scrubRecord{ended: now.Unix(), layer: 3}, scrubSoon},
		"senseless time": {scrubRecord{ended: -1 << 62}, scrubSoon},
	} {
		if got := c.last.due(now); got != c.want {
			t.Errorf("%s: due in %v, want %v", name, got, c.want)
		}
	}
}
