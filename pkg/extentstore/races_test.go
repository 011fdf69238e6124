package extentstore

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
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
	r, err := check(context.Background(), m.file, m.kv, nil)
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
	must(t, p.DeleteSnapshot(ctx, "s", "", 0))
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
	must(t, p.DeleteSnapshot(ctx, "a", "", 0))
	f.write = func(int64) error { return disk.ErrInjected }
	for more := true; more; {
		var err error
		if more, err = p.step(); err != nil && !errors.Is(err, disk.ErrInjected) {
			t.Fatal(err)
		}
	}
	f.write = nil
	sound(t, m)
	must(t, p.DeleteSnapshot(ctx, "b", "", 0))
	settle(t, p)
	sound(t, m)
	got := make([]byte, 2*layer.ExtentSize)
	must(t, d.ReadAt(ctx, got, 0))
	if !bytes.Equal(got, one) {
		t.Fatal("bytes are lost")
	}
}

// TestPageMovesWhileItIsLookedFor moves a page from layer to layer, as a merge does, while the chain is walked.
func TestPageMovesWhileItIsLookedFor(t *testing.T) {
	m := newMachine()
	p, _ := openGate(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	parent, child := &chain{id: 1}, &chain{id: 2}
	child.parent.Store(parent)
	parent.pages.add(7)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for from, to := parent, child; ; from, to = to, from {
			select {
			case <-stop:
				return
			default:
			}
			st := p.stripe(7)
			st.Lock()
			to.pages.add(7)
			p.forget(st, from, 7)
			st.Unlock()
		}
	}()
	for range 10_000 {
		if _, ok := p.nextInChain(child, nil, 0); !ok {
			t.Fatal("the page was in neither layer")
		}
	}
	close(stop)
	<-done
}

// slowKV lets a test hold up commits.
type slowKV struct {
	*memKV
	before func()
}

func (k slowKV) Commit(ops []op) error { k.before(); return k.memKV.Commit(ops) }

// TestWritesWaitForFlushes is a database that does not keep up with the pages that writes make dirty.
func TestWritesWaitForFlushes(t *testing.T) {
	m := newMachine()
	slow := make(chan struct{})
	var stuck atomic.Bool
	before := func() {
		if stuck.Load() {
			<-slow
		}
	}
	const most = 50
	p, err := start("/memory", deps{file: m.file, kv: slowKV{m.kv, before}, space: m.space}, Options{Capacity: 64 * mib, maxDirty: most})
	must(t, err)
	defer p.Close()
	d := newReplica(t, p, "r", 8<<30, "")
	stuck.Store(true)
	done := make(chan error, 1)
	go func() {
		var err error
		for i := int64(0); i < 10*most && err == nil; i++ {
			err = d.WriteAt(context.Background(), make([]byte, layer.BlockSize), i*layer.PageSpan)
		}
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("nothing waited: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	// Those of the flush under way, of the next, and of the bound.
	if n := p.dirtyPages.Load(); n > 4*most {
		t.Fatalf("%d pages are dirty", n)
	}
	close(slow)
	must(t, <-done)
}

// TestCommitIsNotRepeated is a database that finds no space: what it had written before may be lost though it goes on.
func TestCommitIsNotRepeated(t *testing.T) {
	m := newMachine()
	p, _ := openGate(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	d := newReplica(t, p, "r", mib, "")
	must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), 0))
	m.kv.fail = disk.ErrNoSpace
	for range 2 {
		if err := d.Flush(t.Context()); !errors.Is(err, volume.ErrUnavailable) {
			t.Fatalf("flush: %v", err)
		}
	}
}

// TestCloseEndsLongZero closes a device while a large range is zeroed.
func TestCloseEndsLongZero(t *testing.T) {
	m := newMachine()
	p, _ := openGate(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	d := newReplica(t, p, "r", 8<<30, "")
	for i := range int64(200) {
		must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), i*layer.PageSpan))
	}
	st := p.stripe(0)
	st.Lock()
	zeroed, closed := make(chan error, 1), make(chan error, 1)
	go func() { zeroed <- d.Zero(context.Background(), 0, 8<<30) }()
	time.Sleep(5 * time.Millisecond)
	go func() { closed <- d.Close() }()
	eventually(t, "the close", d.isClosed)
	st.Unlock()
	if err := <-zeroed; !errors.Is(err, block.ErrClosed) {
		t.Fatalf("zero: %v", err)
	}
	must(t, <-closed)
}

// A commit that does not end, as on a disk that hangs, holds up nobody who asks what the pool has.
func TestPresenceDoesNotWaitForCommits(t *testing.T) {
	m := newMachine()
	slow := make(chan struct{})
	var stuck atomic.Bool
	waits := make(chan struct{}, 1)
	before := func() {
		if stuck.Load() {
			waits <- struct{}{}
			<-slow
		}
	}
	p, err := start("/memory", deps{file: m.file, kv: slowKV{m.kv, before}, space: m.space}, Options{Capacity: 64 * mib, manual: true})
	must(t, err)
	defer p.Close()
	newReplica(t, p, "r", 64*mib, "")
	stuck.Store(true)
	done := make(chan error, 1)
	go func() { done <- p.Resize(context.Background(), "r", 128*mib) }()
	<-waits
	answers := make(chan [2]bool, 1)
	go func() { answers <- [2]bool{p.HasReplica("r"), p.HasReplica("other")} }()
	select {
	case got := <-answers:
		if got != [2]bool{true, false} {
			t.Errorf("r, and another, are there: %t", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("whether a replica is there is not answered while a commit hangs")
	}
	stuck.Store(false)
	close(slow)
	must(t, <-done)
}
