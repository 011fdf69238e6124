package extentstore

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
)

// Races that need two things to happen in a certain order: the tests hold a lock, or a step of the file, to get it.

// gateFile lets a test hold up or fail the writes to a place.
type gateFile struct {
	*disk.Mem
	write func(off int64) error
}

func (f *gateFile) WriteAt(p []byte, off int64) error {
	if f.write != nil {
		if err := f.write(off); err != nil {
			return err
		}
	}
	return f.Mem.WriteAt(p, off)
}

func openGate(t *testing.T, m *machine, o Options) (*Pool, *gateFile) {
	t.Helper()
	f := &gateFile{Mem: m.file}
	p, err := start("/memory", deps{file: f, kv: m.kv, space: m.space}, o)
	must(t, err)
	return p, f
}

func sound(t *testing.T, m *machine) {
	t.Helper()
	r, err := check(context.Background(), m.file, m.kv)
	must(t, err)
	if len(r.Problems) > 0 {
		t.Fatalf("check: %v", r.Problems)
	}
}

// TestMergeBeginsDuringFlush is a merge into a head whose dirty pages are just being copied: the page that an entry
// came from must go into the same transaction all the same.
func TestMergeBeginsDuringFlush(t *testing.T) {
	m := newMachine()
	p, _ := openGate(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	one := bytes.Repeat([]byte{1}, layer.ExtentSize)
	must(t, d.WriteAt(ctx, one, layer.PageSpan))
	must(t, p.Cut(ctx, "r", "s"))
	must(t, p.DeleteSnapshot(ctx, "s"))
	must(t, d.WriteAt(ctx, one, 0))
	must(t, d.WriteAt(ctx, one, layer.PageSpan+layer.ExtentSize))
	head := p.replicas["r"].head.Load()
	parent := head.parent.Load()

	st := p.stripe(0)
	st.Lock() // the flush has begun and waits for its first page
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(ctx) }()
	eventually(t, "a flush", func() bool {
		head.dirtyMu.Lock()
		defer head.dirtyMu.Unlock()
		return len(head.dirty) == 0
	})
	stepped := make(chan error, 1)
	go func() { _, err := p.step(); stepped <- err }()
	eventually(t, "a merged page", func() bool {
		other := p.stripe(1)
		other.Lock()
		defer other.Unlock()
		from := other.pages[pageID{parent.id, 1}]
		return from != nil && from.dirty
	})
	st.Unlock()
	must(t, <-flushed)
	must(t, <-stepped)
	sound(t, m)
	settle(t, p)
	sound(t, m)
}

// TestFailedWriteBesideAnother is a write that fails after it has reserved a slot that another write uses as well,
// while its page is committed and evicted.
func TestFailedWriteBesideAnother(t *testing.T) {
	m := newMachine()
	p, f := openGate(t, m, Options{Capacity: 64 * mib, manual: true, CacheBytes: 1})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	one := bytes.Repeat([]byte{1}, layer.BlockSize)
	reserved, failed, second, goOn := make(chan bool), make(chan bool), make(chan bool), make(chan bool)
	f.write = func(off int64) error {
		switch off % layer.ExtentSize / layer.BlockSize {
		case 0:
			reserved <- true
			<-failed
			return disk.ErrInjected
		case 1:
			second <- true
			<-goOn
		}
		return nil
	}
	results := make(chan error, 2)
	go func() { results <- d.WriteAt(ctx, one, 0) }()
	<-reserved
	go func() { results <- d.WriteAt(ctx, one, layer.BlockSize) }()
	<-second
	close(failed)
	evict := func() {
		must(t, d.WriteAt(ctx, one, 3*layer.PageSpan+2*layer.BlockSize)) // something to flush
		must(t, d.Flush(ctx))
		// Other pages of the stripe push the page out.
		for idx, n := uint32(1), 0; n < 20; idx++ {
			if p.stripe(idx) == p.stripe(0) {
				st := p.stripe(0)
				st.Lock()
				p.insert(st, &page{pageID: pageID{1 << 40, idx}})
				st.Unlock()
				n++
			}
		}
	}
	for range 50 {
		evict()
	}
	close(goOn)
	a, b := <-results, <-results
	if (a == nil) == (b == nil) || !errors.Is(errors.Join(a, b), disk.ErrInjected) {
		t.Fatalf("two writes: %v, %v", a, b)
	}
	f.write = nil
	evict()
	got := make([]byte, 2*layer.BlockSize)
	must(t, d.ReadAt(ctx, got, 0))
	if !bytes.Equal(got, append(make([]byte, layer.BlockSize), one...)) {
		t.Fatal("the write that succeeded is lost")
	}
	must(t, d.Flush(ctx))
	sound(t, m)
	if u := p.Usage(); u.Replicas["r"] != 2*layer.ExtentSize || p.alloc.used != 2 {
		t.Fatalf("usage %v, %d slots", u, p.alloc.used)
	}
}

// TestFailedMerge is a merge that fails in the middle, and a merge of the child it went into: what was moved must be
// stored as a pair even so.
func TestFailedMerge(t *testing.T) {
	m := newMachine()
	p, f := openGate(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	one := bytes.Repeat([]byte{1}, 2*layer.ExtentSize)
	must(t, d.WriteAt(ctx, one, 0))
	must(t, p.Cut(ctx, "r", "a"))
	must(t, d.WriteAt(ctx, one[:layer.BlockSize], layer.ExtentSize)) // the second extent is copied, and fails
	must(t, p.Cut(ctx, "r", "b"))
	must(t, d.WriteAt(ctx, one[:layer.BlockSize], 2*layer.ExtentSize))
	must(t, p.DeleteSnapshot(ctx, "a"))
	f.write = func(int64) error { return disk.ErrInjected }
	for more := true; more; {
		var err error
		if more, err = p.step(); err != nil && !errors.Is(err, disk.ErrInjected) {
			t.Fatal(err)
		}
	}
	f.write = nil
	sound(t, m)
	must(t, p.DeleteSnapshot(ctx, "b"))
	settle(t, p)
	sound(t, m)
	got := make([]byte, 2*layer.ExtentSize)
	must(t, d.ReadAt(ctx, got, 0))
	if !bytes.Equal(got, one) {
		t.Fatal("bytes are lost")
	}
}
