package extentstore

import (
	"bytes"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

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
	must(t, p.DeleteReplica(ctx, "r"))
	must(t, p.DeleteSnapshot(ctx, "s"))
	settle(t, p)
	if r := reasons(p); len(r) > 0 || p.alloc.used != 0 {
		t.Fatalf("%v, %d slots", r, p.alloc.used)
	}
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
	must(t, p.DeleteSnapshot(ctx, "a"))
	settle(t, p)
	// 15 blocks to copy, and the page they are in to sum.
	if n := f.n.Load(); n > layer.PageSpan+layer.ExtentSize {
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
