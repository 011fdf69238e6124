package extentstore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func openMem(t *testing.T, m *machine, o Options) *Pool {
	t.Helper()
	p, err := m.open(o)
	must(t, err)
	return p
}

func reasons(p *Pool) (r []string) {
	for _, c := range p.Conditions("") {
		r = append(r, c.Reason)
	}
	return r
}

// eventually waits for what happens in the background.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come about", what)
		}
	}
}

func TestFullPoolWaits(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 8 * layer.ExtentSize})
	defer p.Close()
	bg := t.Context()
	extent := bytes.Repeat([]byte{1}, layer.ExtentSize)
	old := newReplica(t, p, "old", 64*mib, "")
	must(t, old.WriteAt(bg, bytes.Repeat(extent, 4), 0))
	must(t, old.Close())
	d := newReplica(t, p, "new", 64*mib, "")
	must(t, d.WriteAt(bg, bytes.Repeat(extent, 4), 0))

	// The order of waiting is the order of being served.
	var done []chan error
	for i := range int64(4) {
		c := make(chan error, 1)
		done = append(done, c)
		go func() { c <- d.WriteAt(bg, extent, (100+i)*layer.ExtentSize) }()
		eventually(t, "a waiting write", func() bool {
			p.alloc.mu.Lock()
			defer p.alloc.mu.Unlock()
			return len(p.alloc.waiters) == int(i)+1
		})
	}
	if !slices.Contains(reasons(p), "PoolFull") {
		t.Fatalf("conditions %v", reasons(p))
	}
	// The rest goes on: overwrites, reads, flushes, cuts, and writes that free space.
	must(t, d.WriteAt(bg, extent, 0))
	must(t, d.ReadAt(bg, make([]byte, 4*layer.ExtentSize), 0))
	must(t, d.Flush(bg))
	ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	if err := d.WriteAt(ctx, extent, 50*layer.ExtentSize); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a write that may wait 20 ms: %v", err)
	}
	must(t, d.Zero(bg, 0, layer.ExtentSize))
	must(t, d.Flush(bg))
	must(t, <-done[0])
	select {
	case err := <-done[1]:
		t.Fatalf("one extent was freed and two writes went on: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	must(t, p.DeleteReplica(bg, "old"))
	for _, c := range done[1:] {
		must(t, <-c)
	}
	eventually(t, "a healthy pool", func() bool { return len(reasons(p)) == 0 })

	// What waits for ever ends with the device.
	c := make(chan error, 1)
	go func() { c <- d.WriteAt(bg, bytes.Repeat(extent, 8), 200*layer.ExtentSize) }()
	eventually(t, "a waiting write", p.full)
	must(t, p.Cut(bg, "new", "s"))
	must(t, d.Close())
	if err := <-c; !errors.Is(err, block.ErrClosed) {
		t.Fatalf("a waiting write on a closed device: %v", err)
	}
	if err := d.ReadAt(bg, extent, 0); !errors.Is(err, block.ErrClosed) {
		t.Fatalf("a read on a closed device: %v", err)
	}
}

func TestFullFilesystemWaits(t *testing.T) {
	t.Parallel()
	m := newMachine()
	m.space.bytes = 100 * mib
	p := openMem(t, m, Options{Capacity: 1 << 30})
	defer p.Close()
	if !m.space.Held() {
		t.Fatal("the reserve is not held")
	}
	d := newReplica(t, p, "r", 64*mib, "")
	must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), 0))
	m.space.set(growFloor)
	c := make(chan error, 1)
	// What was taken ahead lasts for a while.
	go func() { c <- d.WriteAt(t.Context(), make([]byte, 32*mib), 16*mib) }()
	eventually(t, "a waiting write", p.full)
	m.space.set(mib)
	must(t, d.Flush(t.Context()))
	if m.space.Held() {
		t.Fatal("a commit on a full filesystem keeps the reserve")
	}
	// Without the reserve, and with the filesystem full to the last, nothing is committed: not even that.
	m.space.set(mib)
	if err := p.DeleteReplica(t.Context(), "x"); !errors.Is(err, volume.ErrNoSpace) {
		t.Fatalf("a change without room: %v", err)
	}
	f := make(chan error, 1)
	must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), 0))
	go func() { f <- d.Flush(t.Context()) }()
	select {
	case err := <-f:
		t.Fatalf("a flush without room: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	m.space.set(1 << 40)
	must(t, <-f)
	must(t, <-c)
	eventually(t, "the reserve's return", m.space.Held)
}

// TestNoSpaceFromTheFile is a filesystem that refuses what was allocated: one that copies on write.
func TestNoSpaceFromTheFile(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib})
	defer p.Close()
	d := newReplica(t, p, "r", 16*mib, "")
	m.file.FailWrite(disk.ErrNoSpace)
	must(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 3*layer.ExtentSize), 512))
	got := make([]byte, 3*layer.ExtentSize)
	must(t, d.ReadAt(t.Context(), got, 512))
	if bytes.Count(got, []byte{1}) != len(got) {
		t.Fatal("bytes are missing")
	}
	m.file.FailWrite(disk.ErrInjected)
	if err := d.WriteAt(t.Context(), got, 8*mib); !errors.Is(err, disk.ErrInjected) {
		t.Fatalf("a failed write: %v", err)
	}
	must(t, d.Flush(t.Context()))
	if u := p.Usage(); u.Replicas["r"] != 4*layer.ExtentSize {
		t.Fatalf("a failed write keeps its slots: %v", u.Replicas)
	}
}

// failedSync is what a pool must do when the disk fails a sync.
func failedSync(broken rules) error {
	m := newMachine()
	p, err := m.open(Options{Capacity: 64 * mib, broken: broken, manual: true})
	if err != nil {
		return err
	}
	ctx := context.Background()
	must := func(e error) {
		if err == nil {
			err = e
		}
	}
	must(p.CreateReplica(ctx, ReplicaSpec{ID: "r", Volume: "v", Size: mib}))
	d, e := p.OpenReplica(ctx, "r")
	must(e)
	one, two := bytes.Repeat([]byte{1}, layer.BlockSize), bytes.Repeat([]byte{2}, layer.BlockSize)
	must(d.WriteAt(ctx, one, 0))
	must(d.Flush(ctx))
	must(d.WriteAt(ctx, two, 0))
	m.file.FailSync(disk.ErrInjected)
	if err != nil {
		return err
	}
	for range 2 {
		if d.Flush(ctx) == nil {
			return errors.New("a flush after a failed sync returns nil")
		}
	}
	if d.WriteAt(ctx, two, 0) == nil || p.Cut(ctx, "r", "s") == nil || !slices.Contains(reasons(p), "PoolFailed") || !p.Info().Failed {
		return errors.New("a pool goes on after a failed sync")
	}
	got := make([]byte, layer.BlockSize)
	if err := d.ReadAt(ctx, got, 0); err != nil {
		return err
	}
	if p.Close() == nil {
		return errors.New("close after a failed sync returns nil")
	}
	if p, err = m.crash(1).open(Options{Capacity: 64 * mib}); err != nil {
		return err
	}
	if d, err = p.OpenReplica(ctx, "r"); err != nil {
		return err
	}
	if err := d.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, one) {
		return errors.Join(err, errors.New("the last flushed bytes are lost"))
	}
	if p.Info().Failed {
		return errors.New("a pool that was opened again has failed")
	}
	return p.Close()
}

func TestFailedSyncStopsThePool(t *testing.T) {
	must(t, failedSync(rules{}))
	if failedSync(rules{retryFailedSync: true}) == nil {
		t.Error("nothing noticed that a failed sync is tried again")
	}
}

func TestFailedCommitStopsThePool(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	d := newReplica(t, p, "r", mib, "")
	must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), 0))
	m.kv.fail = disk.ErrInjected
	for range 2 {
		if err := d.Flush(t.Context()); !errors.Is(err, disk.ErrInjected) || !errors.Is(err, volume.ErrUnavailable) {
			t.Fatalf("flush: %v", err)
		}
	}
	if err := p.CreateReplica(t.Context(), ReplicaSpec{ID: "q", Volume: "v", Size: mib}); !errors.Is(err, volume.ErrUnavailable) {
		t.Fatalf("create: %v", err)
	}
	if p.Close() == nil {
		t.Fatal("close says nothing of it")
	}
}

// TestRealFullFilesystem fills a small filesystem under a pool from outside.
func TestRealFullFilesystem(t *testing.T) {
	t.Parallel()
	device := loopDevice(t, 400*mib)
	must(t, run(t.Context(), "mkfs.ext4", "-q", "-m", "0", device))
	dir := t.TempDir()
	must(t, run(t.Context(), "mount", device, dir))
	t.Cleanup(func() { must(t, run(context.Background(), "umount", dir)) })
	p := openDir(t, filepath.Join(dir, "pool"), Options{Capacity: 1 << 30, Reserve: 32 * mib})
	defer func() { must(t, p.Close()) }()
	d := newReplica(t, p, "r", 1<<30, "")
	buf := bytes.Repeat([]byte{3}, mib)
	must(t, d.WriteAt(t.Context(), buf, 0))
	must(t, d.Flush(t.Context()))

	hog, err := os.Create(filepath.Join(dir, "hog"))
	must(t, err)
	for err == nil {
		_, err = hog.Write(buf)
	}
	must(t, hog.Close())
	c := make(chan error, 1)
	go func() {
		for off := int64(0); off < 64*mib; off += mib {
			if err := d.WriteAt(t.Context(), buf, off); err != nil {
				c <- err
				return
			}
		}
		c <- nil
	}()
	eventually(t, "a waiting write", p.full)
	// Overwrites, deletes and commits work meanwhile.
	must(t, d.WriteAt(t.Context(), buf[:layer.BlockSize], 0))
	must(t, d.Flush(t.Context()))
	for i := range 50 {
		id := volume.SnapshotID(string(rune('A' + i)))
		must(t, p.Cut(t.Context(), "r", id))
		must(t, p.DeleteSnapshot(t.Context(), id, "", 0))
	}
	must(t, os.Remove(hog.Name()))
	must(t, <-c)
	must(t, d.Flush(t.Context()))
	eventually(t, "the reserve's return", p.space.Held)
}

// TestFilledDuringTheSync: others fill the filesystem after a flush was found to have room.
func TestFilledDuringTheSync(t *testing.T) {
	m := newMachine()
	var armed atomic.Bool
	m.plug(&power{left: -1, during: func(op string) {
		if op == "synced" && armed.CompareAndSwap(true, false) {
			m.space.set(mib)
		}
	}})
	p := openMem(t, m, Options{Capacity: 1 << 30, manual: true})
	defer func() { must(t, p.Close()) }()
	d := newReplica(t, p, "r", 64*mib, "")
	must(t, d.WriteAt(t.Context(), make([]byte, layer.BlockSize), 0))
	armed.Store(true)
	f := make(chan error, 1)
	go func() { f <- d.Flush(t.Context()) }()
	select {
	case err := <-f:
		t.Errorf("a flush without room: %v", err)
		f <- nil
	case <-time.After(50 * time.Millisecond):
	}
	m.space.set(1 << 40)
	must(t, <-f)
}

// TestReserveIsNotForData: what was given up for the database must not be filled with data.
func TestReserveIsNotForData(t *testing.T) {
	m := newMachine()
	m.space.bytes = 100 * mib
	p := openMem(t, m, Options{Capacity: 1 << 30, Reserve: 100 * mib, manual: true})
	defer p.Close()
	d := newReplica(t, p, "r", 64*mib, "")
	m.space.set(mib)
	must(t, p.CreateReplica(t.Context(), ReplicaSpec{ID: "q", Volume: "v", Size: mib}))
	if free, _ := m.space.Free(); m.space.Held() || free != 101*mib {
		t.Fatalf("the reserve is held, %d bytes are free", free)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.WriteAt(ctx, make([]byte, layer.BlockSize), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("data went into the reserve: %v", err)
	}
}

// narrowKV has room for one commit at a time.
type narrowKV struct {
	*memKV
	room    atomic.Bool
	commits atomic.Int64
}

func (k *narrowKV) Room() bool { return k.room.Load() }

func (k *narrowKV) Commit(ops []op) error {
	k.room.Store(false)
	k.commits.Add(1)
	return k.memKV.Commit(ops)
}

func openNarrow(t *testing.T) (*Pool, *narrowKV) {
	t.Helper()
	m := newMachine()
	kv := &narrowKV{memKV: m.kv}
	kv.room.Store(true)
	p, err := start("/memory", deps{file: m.file, kv: kv, space: m.space}, Options{Capacity: 1 << 30, manual: true})
	must(t, err)
	kv.room.Store(true)
	kv.commits.Store(0)
	return p, kv
}

// A scrub waits for room for what it notes.
func TestScrubAsksForRoom(t *testing.T) {
	t.Parallel()
	p, kv := openNarrow(t)
	kv.room.Store(false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Scrub(ctx) }()
	eventually(t, "a wait for room", func() bool { return p.starved.Load() > 0 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || kv.commits.Load() > 0 {
		t.Errorf("%d commits without room, %v", kv.commits.Load(), err)
	}
	kv.room.Store(true)
	must(t, p.Scrub(t.Context()))
	kv.room.Store(true)
	must(t, p.Close())
}

// A pool that fails is not waited for.
func TestNobodyWaitsForAFailedPool(t *testing.T) {
	t.Parallel()
	p, kv := openNarrow(t)
	d := newReplica(t, p, "r", mib, "") // takes the room
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(t.Context()) }()
	eventually(t, "a wait for room", func() bool { return p.starved.Load() > 0 })
	_ = p.fail(errors.New("its disk is gone"))
	select {
	case err := <-flushed:
		if !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("flush: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a flush waits for room in a pool that has failed")
		kv.room.Store(true)
	}
	_ = p.Close()
}

// What is stored in several commits asks for room before each of them: the filesystem may have been filled in between.
func TestEachCommitAsksForRoom(t *testing.T) {
	t.Parallel()
	p, kv := openNarrow(t)
	units := make([][]op, 3)
	for i := range units {
		units[i] = []op{{[]byte{keyPage, byte(i)}, make([]byte, maxCommit-16)}}
	}
	stored := make(chan error, 1)
	store := func() {
		kv.commits.Store(0)
		kv.room.Store(true)
		go func() { stored <- p.store(units) }()
		eventually(t, "a wait for room", func() bool { return p.starved.Load() > 0 })
		if n := kv.commits.Load(); n != 1 {
			t.Errorf("%d commits where there was room for one", n)
		}
	}
	store()
	for kv.commits.Load() < int64(len(units)) {
		kv.room.Store(true)
		time.Sleep(time.Millisecond)
	}
	must(t, <-stored)
	store()
	p.cancel()
	if err := <-stored; !errors.Is(err, volume.ErrUnavailable) || p.failure() == nil {
		t.Errorf("a pool of which a part was stored: %v, %v", err, p.failure())
	}
	_ = p.Close()
}
