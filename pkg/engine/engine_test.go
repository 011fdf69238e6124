package engine

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestDevice(t *testing.T) {
	for name, replicas := range map[string]int{"1 replica": 1, "3 replicas": 3} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T, size int64) block.Device { return newWorld(t, replicas, size).attach("n1", false) })
		})
	}
}

func TestNoLocalReplica(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n9", false)
	loads := parts(t, 4, 2*mib)
	stop := run(t, e, loads)
	time.Sleep(100 * time.Millisecond)
	stop()
	check(t, e, loads)
	w.detach(e)
	w.equal("r1", "r2")
}

// TestBlip: a connection breaks and comes back before the member counts as failed.
func TestBlip(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	e := w.attach("n1", false)
	version := w.members().ConfigVersion
	loads := parts(t, 4, 2*mib)
	stop := run(t, e, loads)
	for range 5 {
		time.Sleep(20 * time.Millisecond)
		w.partition("r2", true)
		w.partition("r2", false)
	}
	stop()
	check(t, e, loads)
	if got := w.members().ConfigVersion; got != version {
		t.Errorf("configuration %d, want %d: a blip removes nobody", got, version)
	}
	w.detach(e)
	w.equal("r1", "r2", "r3")
}

// TestLostAndReturned: members go away under load, I/O goes on, and they come back by a resync.
func TestLostAndReturned(t *testing.T) {
	for name, gone := range map[string]struct {
		away, back func(*world, volume.ReplicaID)
	}{
		"partition": {func(w *world, id volume.ReplicaID) { w.partition(id, true) }, func(w *world, id volume.ReplicaID) { w.partition(id, false) }},
		"process":   {(*world).stop, (*world).start},
		"power": {(*world).stop, func(w *world, id volume.ReplicaID) {
			w.hosts[id].disk.power(rand.New(rand.NewPCG(1, 2)))
			w.start(id)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 3, 8*mib)
			w.wired = name == "partition"
			e := w.attach("n1", false)
			loads := parts(t, 4, 2*mib)
			stop := run(t, e, loads)
			for _, id := range []volume.ReplicaID{"r2", "r1", "r3"} { // the local one too
				gone.away(w, id)
				w.waitFor("removed", func(m replication.Membership) bool { return len(m.ISR()) == 2 })
				time.Sleep(20 * time.Millisecond)
				gone.back(w, id)
				w.waitISR("r1", "r2", "r3")
			}
			stop()
			check(t, e, loads)
			w.detach(e)
			w.equal("r1", "r2", "r3")
		})
	}
}

// TestHungDisk: a write is answered though the disk of the node that it is on hangs.
func TestHungDisk(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	e := w.attach("n1", false)
	hung := w.hosts["r1"].disk.Faulty
	hung.Set(blocktest.Write, blocktest.Fault{Hang: true})
	p := bytes.Repeat([]byte{1}, 4096)
	for i := range 8 {
		if err := e.WriteAt(t.Context(), p, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	w.waitISR("r2", "r3")
	hung.Set(blocktest.Write, blocktest.Fault{})
	w.waitISR("r1", "r2", "r3")
	w.detach(e)
	w.equal("r1", "r2", "r3")
}

// TestHungRead: a read is answered though the disk of this node hangs, and what that disk says at last is in nobody's way.
func TestHungRead(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	p := bytes.Repeat([]byte{1}, minBuffer)
	if err := e.WriteAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	hung := w.hosts["r1"].disk.Faulty
	hung.Set(blocktest.Read, blocktest.Fault{Hang: true})
	got := make([]byte, len(p))
	if err := e.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, p) {
		t.Fatalf("%v, or another content", err)
	}
	// Whatever is there for others to use now.
	var taken []*buffer
	for range 16 {
		b := getBuffer(minBuffer)
		clear(b.b)
		taken = append(taken, b)
	}
	hung.Set(blocktest.Read, blocktest.Fault{})
	w.waitISR("r1", "r2")
	w.detach(e)
	w.stop("r1") // its operations have ended then
	for _, b := range taken {
		if len(bytes.Trim(b.b, "\x00")) > 0 {
			t.Error("a buffer that somebody else uses was read to")
		}
	}
}

// TestBrokenStore: a member whose store keeps nothing is not asked again and again without a pause, nor is each failure logged;
// it is taken back when it is sound.
func TestBrokenStore(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	var lines atomic.Int64
	w.stop("r2")
	w.cfg.Logger = slog.New(slog.NewTextHandler(counter{&lines}, &slog.HandlerOptions{Level: slog.LevelError}))
	w.start("r2")
	d := w.hosts["r2"].disk
	d.broken.Store(true)
	e := w.attach("n1", false)
	w.waitISR("r1")
	time.Sleep(1500 * time.Millisecond)
	if n := d.states.Load(); n < 2 || n > 12 {
		t.Errorf("the store was asked %d times", n)
	}
	if n := lines.Load(); n != 1 {
		t.Errorf("%d lines were logged", n)
	}
	d.broken.Store(false)
	w.waitISR("r1", "r2")
	w.detach(e)
	w.equal("r1", "r2")
}

// counter counts writes.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) { c.n.Add(1); return len(p), nil }

// TestFailedFlush: a member whose flush failed is out for this life.
func TestFailedFlush(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	if err := e.WriteAt(t.Context(), make([]byte, 8192), 0); err != nil {
		t.Fatal(err)
	}
	w.hosts["r2"].disk.Faulty.Set(blocktest.Flush, blocktest.Fault{Err: errors.New("EIO"), Count: 1})
	if err := e.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.waitISR("r1")
	w.stop("r2")
	w.start("r2")
	w.waitISR("r1", "r2")
	w.detach(e)
	w.equal("r1", "r2")
}

func TestRebuild(t *testing.T) {
	w := newWorld(t, 1, 16*mib)
	e := w.attach("n1", false)
	loads := parts(t, 4, 4*mib)
	stop := run(t, e, loads)
	time.Sleep(50 * time.Millisecond)
	for _, id := range []volume.SnapshotID{"s1", "s2"} {
		w.snapshot(e, id)
		time.Sleep(20 * time.Millisecond)
	}
	for i := 2; i <= 3; i++ {
		a := member(i)
		w.host(a, 16*mib)
		m, err := w.Commit(t.Context(), volName, replication.Change{AddReplica: &a})
		if err != nil {
			t.Fatal(err)
		}
		e.Learn(m)
	}
	w.waitISR("r1", "r2", "r3")
	stop()
	check(t, e, loads)
	w.detach(e)
	w.equal("r1", "r2", "r3")
	w.equalSnapshots("s1", "r1", "r2", "r3")
	w.equalSnapshots("s2", "r1", "r2", "r3")
}

func (w *world) snapshot(e *Engine, id volume.SnapshotID) Cut {
	w.t.Helper()
	for range 50 {
		m, err := w.Commit(w.t.Context(), volName, replication.Change{Prepare: &replication.Prepare{Snapshot: id}})
		if err != nil {
			w.t.Fatal(err)
		}
		e.Learn(m)
		cut, err := e.Snapshot(w.t.Context(), *m.Barrier)
		change := replication.Change{Complete: &replication.Complete{Number: m.Barrier.Number, ConfigVersion: cut.Version, Holders: cut.Holders}}
		if err != nil {
			change = replication.Change{AbortBarrier: &replication.AbortBarrier{Number: m.Barrier.Number}}
		}
		if _, err2 := w.Commit(w.t.Context(), volName, change); err2 != nil {
			w.t.Fatal(err2)
		}
		switch {
		case err == nil:
			return cut
		case !errors.Is(err, volume.ErrBusy):
			w.t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	w.t.Fatal("no snapshot could be cut")
	return Cut{}
}

func (w *world) equalSnapshots(id volume.SnapshotID, replicas ...volume.ReplicaID) {
	w.t.Helper()
	var first []byte
	for i, r := range replicas {
		s := &memStore{disk: w.hosts[r].disk}
		data, err := s.layer(id)
		if err != nil {
			w.t.Fatalf("replica %s has %v: %v", r, s.Snapshots(), err)
		}
		if i == 0 {
			first = data
		} else if !bytes.Equal(first, data) {
			w.t.Errorf("snapshot %s differs on %s and %s", id, replicas[0], r)
		}
	}
}

func TestSnapshot(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	e := w.attach("n1", false)
	loads := parts(t, 4, 2*mib)
	stop := run(t, e, loads)
	time.Sleep(30 * time.Millisecond)
	if cut := w.snapshot(e, "s1"); len(cut.Holders) != 3 {
		t.Errorf("holders %v", cut.Holders)
	}
	w.partition("r3", true)
	w.waitISR("r1", "r2")
	if cut := w.snapshot(e, "s2"); len(cut.Holders) != 2 {
		t.Errorf("holders %v", cut.Holders)
	}
	w.partition("r3", false)
	w.waitISR("r1", "r2", "r3")
	stop()
	check(t, e, loads)
	w.detach(e)
	w.equalSnapshots("s1", "r1", "r2", "r3")
	w.equalSnapshots("s2", "r1", "r2")
}

// TestGroup holds writes, cuts, and lets go; a coordinator that is lost holds nobody for long.
func TestGroup(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	m, err := w.Commit(t.Context(), volName, replication.Change{Prepare: &replication.Prepare{Snapshot: "s1"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := e.Drain(t.Context(), *m.Barrier); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := e.WriteAt(t.Context(), bytes.Repeat([]byte{2}, 4096), 0); err != nil {
			t.Error(err)
		}
	})
	if holders, err := e.CutGroup(t.Context(), m.Barrier.Number); err != nil || len(holders) != 2 {
		t.Fatal(holders, err)
	}
	cut, err := e.Release(t.Context(), m.Barrier.Number)
	if err != nil || len(cut.Holders) != 2 {
		t.Fatal(cut, err)
	}
	wg.Wait()
	for _, id := range []volume.ReplicaID{"r1", "r2"} {
		if data, _ := (&memStore{disk: w.hosts[id].disk}).layer("s1"); data[0] != 1 {
			t.Errorf("replica %s: the snapshot has byte %d", id, data[0])
		}
	}
	if _, err := e.Release(t.Context(), m.Barrier.Number); !errors.Is(err, volume.ErrBusy) {
		t.Errorf("a barrier that is over: %v", err)
	}
	if _, err := w.Commit(t.Context(), volName, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: m.Barrier.Number}}); err != nil {
		t.Fatal(err)
	}
	if m, err = w.Commit(t.Context(), volName, replication.Change{Prepare: &replication.Prepare{Snapshot: "s2"}}); err != nil {
		t.Fatal(err)
	}
	if err := e.Drain(t.Context(), *m.Barrier); err != nil {
		t.Fatal(err)
	}
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil { // nobody lets it go
		t.Fatal(err)
	}
	if _, err := e.CutGroup(t.Context(), m.Barrier.Number); !errors.Is(err, volume.ErrBusy) {
		t.Errorf("cut after the time was over: %v", err)
	}
}

// TestGroupEndsOnceSealed: nobody lets a group's volume go on; who sealed it is known even so.
func TestGroupEndsOnceSealed(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	m, err := w.Commit(t.Context(), volName, replication.Change{Prepare: &replication.Prepare{Snapshot: "s1"}})
	if err != nil {
		t.Fatal(err)
	}
	e.Learn(m)
	s := e.begin(*m.Barrier, true)
	<-s.drained
	e.step(func() { e.m.Cut(now(), m.Barrier.Number) })
	<-s.sealed
	<-s.ended
	e.mu.Lock()
	defer e.mu.Unlock()
	if s.ok || len(s.holders) != 2 {
		t.Errorf("ended well: %v, holders %v", s.ok, s.holders)
	}
}

func TestExpand(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	m, err := w.Commit(t.Context(), volName, replication.Change{ExpandIntent: &replication.ExpandIntent{Target: 12 * mib}})
	if err != nil {
		t.Fatal(err)
	}
	e.Learn(m)
	w.waitFor("expanded", func(m replication.Membership) bool { return m.Size == 12*mib && m.Target == 0 })
	for e.Size() != 12*mib {
		time.Sleep(time.Millisecond)
	}
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 12*mib-4096); err != nil {
		t.Error(err)
	}
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 12*mib); !errors.Is(err, block.ErrRange) {
		t.Errorf("write behind the end: %v", err)
	}
	for _, id := range []volume.ReplicaID{"r1", "r2"} {
		if got := w.hosts[id].disk.dev.Size(); got != 12*mib {
			t.Errorf("replica %s has %d bytes", id, got)
		}
	}
}

// A member that has no room to grow keeps its place, and nothing is exposed before it has room.
func TestExpandWithoutRoom(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	w.hosts["r2"].disk.full.Store(true)
	e := w.attach("n1", false)
	m, err := w.Commit(t.Context(), volName, replication.Change{ExpandIntent: &replication.ExpandIntent{Target: 12 * mib}})
	if err != nil {
		t.Fatal(err)
	}
	e.Learn(m)
	for deadline := time.Now().Add(10 * time.Second); e.Status().Members[1].NoRoom != 12*mib; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nothing is said of it: %+v", e.Status().Members)
		}
	}
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 8*mib); !errors.Is(err, block.ErrRange) {
		t.Errorf("write behind the end: %v", err)
	}
	if m := w.members(); len(m.ISR()) != 2 || m.Size != 8*mib {
		t.Errorf("in sync %v, %d bytes", m.ISR(), m.Size)
	}
	w.hosts["r2"].disk.full.Store(false)
	w.waitFor("expanded", func(m replication.Membership) bool { return m.Size == 12*mib && m.Target == 0 && len(m.ISR()) == 2 })
}

func TestDetachAndAttachElsewhere(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	loads := parts(t, 4, 2*mib)
	for i := range 4 {
		e := w.attach([]volume.NodeID{"n1", "n2"}[i%2], false)
		check(t, e, loads)
		stop := run(t, e, loads)
		time.Sleep(20 * time.Millisecond)
		stop()
		w.detach(e)
		if err := e.WriteAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, block.ErrClosed) {
			t.Errorf("write after the detach: %v", err)
		}
	}
	w.equal("r1", "r2", "r3")
}

// TestEngineLost: the engine is gone with its requests, and the next one, elsewhere, finds all that was acknowledged.
func TestEngineLost(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	loads := parts(t, 4, 2*mib)
	for i := range 4 {
		e := w.attach([]volume.NodeID{"n1", "n2", "n3"}[i%3], true)
		check(t, e, loads)
		stop := run(t, e, loads)
		time.Sleep(20 * time.Millisecond)
		stop()
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		<-e.Over()
	}
	e := w.attach("n2", true)
	check(t, e, loads)
	w.detach(e)
	w.equal("r1", "r2", "r3")
}

// TestFenced: an engine that was superseded fails for good, and nothing that it does reaches a replica.
func TestFenced(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	old := w.attach("n1", false)
	next := w.attach("n2", true)
	if err := next.WriteAt(t.Context(), bytes.Repeat([]byte{2}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := old.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 4096), 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("write by the old engine: %v", err)
	}
	<-old.Over()
	if got := old.Reason(); got != replication.ReasonSuperseded {
		t.Errorf("reason %q", got)
	}
	p := make([]byte, 4096)
	if err := next.ReadAt(t.Context(), p, 0); err != nil || p[0] != 2 {
		t.Error(p[0], err)
	}
}

// TestControllersAway: I/O waits, and is not answered with an error; Close and a deadline end it.
func TestControllersAway(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	e := w.attach("n1", false)
	w.mu.Lock()
	w.down = true
	w.mu.Unlock()
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil { // all are well
		t.Fatal(err)
	}
	w.stop("r2")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := e.WriteAt(ctx, make([]byte, 4096), 4096); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("write = %v", err)
	}
	waits := make(chan error, 1)
	go func() { waits <- e.WriteAt(t.Context(), make([]byte, 4096), 8192) }()
	select {
	case err := <-waits:
		t.Fatalf("a write was answered: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	w.mu.Lock()
	w.down, w.lost = false, true // it is applied, and the answer lost
	w.mu.Unlock()
	w.waitISR("r1")
	time.Sleep(50 * time.Millisecond)
	w.mu.Lock()
	w.lost = false
	w.mu.Unlock()
	if err := <-waits; err != nil {
		t.Fatal(err)
	}
}

func TestCloseWhileWaiting(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	w.stop("r1")
	w.stop("r2")
	e := w.begin("n1", false)
	results := make(chan error, 3)
	go func() { results <- e.WriteAt(t.Context(), make([]byte, 4096), 0) }()
	go func() { results <- e.ReadAt(t.Context(), make([]byte, 4096), 0) }()
	go func() { results <- e.Flush(t.Context()) }()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := e.Live(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Live = %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := <-results; !errors.Is(err, block.ErrClosed) {
			t.Errorf("a request that waited: %v", err)
		}
	}
	if err := e.Live(t.Context()); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Live = %v", err)
	}
}

// TestDetachBeforeLive: it is no clean one.
func TestDetachBeforeLive(t *testing.T) {
	w := newWorld(t, 1, 8*mib)
	w.stop("r1")
	if err := w.begin("n1", false).Detach(t.Context()); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("Detach = %v", err)
	}
}

// TestBuffers breaks connections and cancels requests under load: no buffer is used twice at once (the race detector and
// the model would see it).
func TestBuffers(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	w.wired = true
	e := w.attach("n1", false)
	loads := parts(t, 6, mib)
	stop := run(t, e, loads)
	cancelled := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(3, 3))
		for {
			select {
			case <-cancelled:
				return
			default:
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rng.IntN(200))*time.Microsecond)
			p := make([]byte, 16<<10)
			_ = e.WriteAt(ctx, p, 7*mib) // it may be cut off, which is what it is for
			_ = e.ReadAt(ctx, p, 7*mib)
			cancel()
		}
	})
	for i := range 12 {
		id := []volume.ReplicaID{"r2", "r3", "r1"}[i%3]
		w.partition(id, true)
		if i%4 == 3 {
			w.waitFor("removed", func(m replication.Membership) bool { return len(m.ISR()) == 2 })
		}
		w.partition(id, false)
		time.Sleep(10 * time.Millisecond)
		w.waitISR("r1", "r2", "r3")
	}
	close(cancelled)
	wg.Wait()
	stop()
	check(t, e, loads)
	w.detach(e)
	w.equal("r1", "r2", "r3")
}

// TestIdle: an engine without requests sleeps.
func TestIdle(t *testing.T) {
	w := newWorld(t, 3, 8*mib)
	e := w.attach("n1", false)
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		e.mu.Lock()
		asleep := e.alarm == replication.Never
		e.mu.Unlock()
		if asleep {
			return
		}
		if time.Since(start) > 20*time.Second {
			t.Fatal("it never sleeps")
		}
	}
}
