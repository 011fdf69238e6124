package extentstore

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// hangingKV is a database on a disk that answers nothing while it hangs.
type hangingKV struct {
	*memKV
	disk  sync.RWMutex // held alone while it hangs
	asked atomic.Int64
}

func (k *hangingKV) Get(key []byte) ([]byte, error) {
	k.asked.Add(1)
	k.disk.RLock()
	defer k.disk.RUnlock()
	return k.memKV.Get(key)
}

// giveUp makes a call and ends its context when the disk that hangs is asked for something.
func (k *hangingKV) giveUp(t *testing.T, call func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	before := k.asked.Load()
	done := make(chan error, 1)
	go func() { done <- call(ctx) }()
	eventually(t, "a question to the disk", func() bool { return k.asked.Load() > before })
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, volume.ErrUnavailable) || !errors.Is(err, context.Canceled) {
			t.Errorf("on a disk that hangs: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for a disk that hangs")
	}
}

func (k *hangingKV) Commit(ops []op) error {
	k.asked.Add(1)
	k.disk.RLock()
	defer k.disk.RUnlock()
	return k.memKV.Commit(ops)
}

// openHanging opens a pool with replica r, which has data, and its snapshots s0 and s. No page of them is in memory.
func openHanging(t *testing.T) (*Pool, *hangingKV) {
	ctx := t.Context()
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 1 << 30})
	r := newReplica(t, p, "r", 64*mib, "")
	for _, s := range []volume.SnapshotID{"s0", "s"} {
		must(t, r.WriteAt(ctx, make([]byte, 3*mib), 5*mib))
		must(t, p.Cut(ctx, "r", s))
	}
	must(t, p.Close())
	m = m.reopen()
	kv := &hangingKV{memKV: m.kv}
	p, err := start("/memory", deps{file: m.file, kv: kv, space: m.space}, Options{Capacity: 1 << 30, manual: true})
	must(t, err)
	return p, kv
}

// idle waits until nothing awaits the disk.
func idle(t *testing.T, p *Pool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); len(p.awaited) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d calls still await the disk", len(p.awaited))
		}
	}
}

// calls are all that a caller may give up, none of which changes r.
func calls(p *Pool) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"create": func(ctx context.Context) error {
			return p.CreateReplica(ctx, ReplicaSpec{ID: "new", Volume: "v", Size: mib})
		},
		"create smaller": func(ctx context.Context) error {
			return p.CreateReplica(ctx, ReplicaSpec{ID: "c", Volume: "v", Size: mib, Parent: "s"})
		},
		"delete":          func(ctx context.Context) error { return p.DeleteReplica(ctx, "none") },
		"resize":          func(ctx context.Context) error { return p.Resize(ctx, "r", 64*mib) },
		"cut":             func(ctx context.Context) error { return p.Cut(ctx, "r", "s2") },
		"delete snapshot": func(ctx context.Context) error { return p.DeleteSnapshot(ctx, "s0", "", 0) },
		"open snapshot": func(ctx context.Context) error {
			d, err := p.OpenSnapshot(ctx, "s")
			if err == nil {
				err = d.Close()
			}
			return err
		},
		"written": func(ctx context.Context) error { _, err := p.Written(ctx, "r"); return err },
		"extents": func(ctx context.Context) error {
			return p.Extents(ctx, "s", "s0", 0, func(int64, int64) error { return nil })
		},
	}
}

// Whatever a pool is asked while its disk hangs is answered when the caller's context ends; tries do not add up, none takes effect
// later that had not begun, and nothing stays pinned.
func TestHungDisk(t *testing.T) { // alone: it counts goroutines
	p, kv := openHanging(t)
	kv.disk.Lock()
	kv.giveUp(t, func(ctx context.Context) error {
		return p.CreateReplica(ctx, ReplicaSpec{ID: "first", Volume: "v", Size: mib})
	})
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var tries sync.WaitGroup
	for name, call := range calls(p) {
		for range maxAwaited {
			tries.Go(func() {
				if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s on a disk that hangs: %v", name, err)
				}
			})
		}
	}
	answered := make(chan struct{})
	go func() { tries.Wait(); close(answered) }()
	select {
	case <-answered:
	case <-time.After(20 * time.Second):
		t.Fatal("calls wait for a disk that hangs")
	}
	if n := runtime.NumGoroutine() - before; n > 2*maxAwaited {
		t.Errorf("%d goroutines more than before the tries", n)
	}
	kv.disk.Unlock()
	idle(t, p)
	if !p.HasReplica("first") || p.HasReplica("new") || p.HasReplica("c") || hasSnapshot(p, "s2") || !hasSnapshot(p, "s0") {
		t.Errorf("what was begun is not done, or what was given up before is: %+v", p.Replicas())
	}
	must(t, p.DeleteSnapshot(t.Context(), "s", "", 0))
	must(t, p.Close())
	for name, call := range calls(p) {
		if err := call(t.Context()); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("%s of a closed pool: %v", name, err)
		}
	}
}

// Reading the map may wait for the disk as well: nothing else is asked of it first.
func TestHungDiskWhileRead(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"create smaller", "written", "extents", "delete snapshot", "cut", "create"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, kv := openHanging(t)
			call := calls(p)[name]
			kv.disk.Lock()
			kv.giveUp(t, call)
			kv.disk.Unlock()
			idle(t, p)
			must(t, p.DeleteSnapshot(t.Context(), "s", "", 0)) // it is not pinned
			must(t, p.Close())
		})
	}
}
