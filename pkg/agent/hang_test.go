package agent

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// hangingPool is a pool on whose disk nothing ends while it hangs.
type hangingPool struct {
	*filePool
	id     volume.PoolID
	hang   atomic.Pointer[chan struct{}] // nil: its disk answers
	closed atomic.Bool
}

func newHangingPool(t *testing.T, id volume.PoolID, replicas ...volume.ReplicaID) *hangingPool {
	p := &hangingPool{filePool: newFilePool(t.TempDir()), id: id}
	for _, r := range replicas {
		if err := copyFile("/dev/null", p.path(string(r))); err != nil {
			t.Fatal(err)
		}
		if err := p.filePool.Resize(t.Context(), r, mib); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p *hangingPool) wait() {
	if c := p.hang.Load(); c != nil {
		<-*c
	}
}

// stop has the disk hang until resume.
func (p *hangingPool) stop() (resume func()) {
	c := make(chan struct{})
	p.hang.Store(&c)
	return func() {
		p.hang.Store(nil)
		close(c)
	}
}

func (p *hangingPool) Info() volume.Pool {
	i := p.filePool.Info()
	i.ID, i.Name = p.id, string(p.id)
	return i
}

func (p *hangingPool) Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64) {
	p.wait()
	return map[volume.ReplicaID]int64{volume.ReplicaID("of-" + p.id): 1}, nil
}

func (p *hangingPool) Conditions(volume.ReplicaID) []volume.Condition {
	p.wait()
	return nil
}

func (p *hangingPool) OpenReplica(ctx context.Context, id volume.ReplicaID) (engine.Store, volume.ID, error) {
	p.wait()
	s, of, err := p.filePool.OpenReplica(ctx, id)
	return hangingStore{s, p}, of, err
}

func (p *hangingPool) Close() error {
	p.wait()
	p.closed.Store(true)
	return nil
}

type hangingStore struct {
	engine.Store
	pool *hangingPool
}

func (s hangingStore) Close() error {
	s.pool.wait()
	return s.Store.Close()
}

// noFrontend makes no devices.
type noFrontend struct{ Frontend }

func (noFrontend) Close() error { return nil }

// openNode opens a node without devices.
func openNode(t *testing.T, pools ...Pool) *Node {
	t.Helper()
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	n, err := Open(Config{
		ID: nodeID, DataDir: filepath.Join(dir, "node"), RunDir: filepath.Join(dir, "run"), Pools: pools, Frontend: noFrontend{},
		Mounter: mount.New(kmount.NewFakeMounter(nil), log), Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// soon is the deadline of calls that are to be given up.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func connect(ctx context.Context, n *Node, of volume.ID, id volume.ReplicaID) error {
	c, err := n.Connect(ctx, of, id, func(*replication.Message) {}, func(error) {})
	if err == nil {
		c.Close()
	}
	return err
}

// What is asked of a replica whose disk hangs ends with its caller's patience; other pools are as they were; and when the disk
// answers again nothing has leaked.
func TestHungDiskHoldsUpNobody(t *testing.T) {
	a, b := newHangingPool(t, "a", "rep-a", "rep-new"), newHangingPool(t, "b", "rep-b")
	n := openNode(t, a, b)
	defer n.Close()
	if err := connect(t.Context(), n, "a", "rep-a"); err != nil {
		t.Fatal(err)
	}
	resume := a.stop()
	deleted := func() error { return a.DeleteReplica(t.Context(), "rep-a") }
	for what, call := range map[string]func(context.Context) error{
		"open":   func(ctx context.Context) error { return connect(ctx, n, "new", "rep-new") },
		"close":  func(ctx context.Context) error { return n.host.alone(ctx, "rep-a", func() error { return nil }) },
		"delete": func(ctx context.Context) error { return n.host.drop(ctx, "rep-a", deleted) },
		"lend": func(ctx context.Context) error {
			_, _, err := n.host.lend(ctx, "rep-new")
			return err
		},
		"inspect": func(ctx context.Context) error {
			_, err := n.Inspect(ctx, volume.Replica{ID: "rep-new", Node: nodeID, Pool: "a"}, "new")
			return err
		},
	} {
		done := make(chan error, 1)
		go func() { done <- call(soon(t)) }()
		select {
		case err := <-done:
			wantErr(t, what, err, volume.ErrBusy)
		case <-time.After(20 * time.Second):
			t.Fatalf("%s waits for the disk", what)
		}
	}
	if err := connect(t.Context(), n, "b", "rep-b"); err != nil {
		t.Errorf("a replica beside the disk that hangs: %v", err)
	}
	resume()
	if err := connect(t.Context(), n, "new", "rep-new"); err != nil {
		t.Error(err)
	}
	x, err := n.host.find("rep-new")
	if err != nil {
		t.Fatal(err)
	}
	if err := x.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if x.taken || x.r.Conns() != 0 {
		t.Errorf("what was given up is kept: taken %t, %d connections", x.taken, x.r.Conns())
	}
	x.unlock()
}

// A disk that hangs does not keep a node from closing all else.
func TestCloseBesideHungDisk(t *testing.T) {
	a, b := newHangingPool(t, "a", "rep-a"), newHangingPool(t, "b", "rep-b")
	n := openNode(t, a, b)
	n.closeLimit = 200 * time.Millisecond
	for _, id := range []volume.ID{"a", "b"} {
		if err := connect(t.Context(), n, id, volume.ReplicaID("rep-"+id)); err != nil {
			t.Fatal(err)
		}
	}
	defer a.stop()()
	done := make(chan error, 1)
	go func() { done <- n.Close() }()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "rep-a") || strings.Contains(err.Error(), "rep-b") {
			t.Errorf("close: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("close waits for the disk")
	}
	if !b.closed.Load() || len(b.open) != 0 {
		t.Error("the other pool is not closed")
	}
}

// A node whose disk hangs goes on reporting, and says what is wrong.
func TestReportsBesideHungDisk(t *testing.T) {
	a, b := newHangingPool(t, "a", "rep-a"), newHangingPool(t, "b", "rep-b")
	synctest.Test(t, func(t *testing.T) {
		n := &Node{cfg: Config{ID: nodeID, Pools: []Pool{a, b}}, pools: map[volume.PoolID]Pool{"a": a, "b": b}}
		want := n.usage()
		if len(want.Replicas) != 2 {
			t.Fatalf("usage %+v", want)
		}
		resume := a.stop()
		of := volume.Replica{ID: "rep-a", Node: nodeID, Pool: "a"}
		start := time.Now()
		for range 3 {
			if got := n.usage(); !equalUsage(got, want) {
				t.Errorf("usage %+v, was %+v", got, want)
			}
			if got, at := n.observeReplica(of); reasons(got) != "Inaccessible/PoolSilent" || at != 0 {
				t.Errorf("conditions %q, flushed at %d", reasons(got), at)
			}
		}
		if took := time.Since(start); took != answerLimit {
			t.Errorf("it was waited %s for a disk that hangs, %s are enough", took, answerLimit)
		}
		resume()
		synctest.Wait()
		if got, at := n.observeReplica(of); len(got) > 0 || at != a.LastFlush("rep-a") {
			t.Errorf("conditions %q of a disk that answers again, flushed at %d", reasons(got), at)
		}
	})
}
