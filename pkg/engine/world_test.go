package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	mib     = int64(1) << 20
	volName = volume.ID("vol-1")
)

// quickTiming is the protocol's, in less time.
func quickTiming() replication.Timing {
	ms := replication.Millisecond
	t := replication.DefaultTiming()
	t.Lease, t.LeaseMargin, t.OpTimeout, t.Blip, t.AttachWait = 600*ms, 50*ms, 400*ms, 150*ms, 200*ms
	t.CommitRetry, t.FlushEvery, t.ClearAfter, t.ResyncRetry = 30*ms, 500*ms, 500*ms, 50*ms
	t.MirrorBelow = 1 << 20
	return t
}

func testLog() *slog.Logger {
	if os.Getenv("BALLAST_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.DiscardHandler)
}

// host is a node with one replica.
type host struct {
	node volume.NodeID
	id   volume.ReplicaID
	disk *disk

	replica *Replica // nil while it is down
	boot    replication.BootID
	cut     bool
	wires   map[*wire]bool
}

// world is controllers, and hosts with replicas of one volume. It is the engines' Controllers and Peers.
type world struct {
	t   *testing.T
	cfg Config

	mu      sync.Mutex
	record  replication.Membership
	down    bool // controllers do not answer
	lost    bool // what is committed is applied, and the answer lost
	hosts   map[volume.ReplicaID]*host
	boots   replication.BootID
	engines []*Engine
	// wired has even local replicas reached as if they were remote.
	wired bool
}

func member(i int) replication.Member {
	return replication.Member{ID: volume.ReplicaID(fmt.Sprintf("r%d", i)), Node: volume.NodeID(fmt.Sprintf("n%d", i)), Pool: volume.PoolID(fmt.Sprintf("p%d", i))}
}

func newWorld(t *testing.T, replicas int, size int64) *world {
	t.Helper()
	before := runtime.NumGoroutine()
	w := &world{t: t, hosts: map[volume.ReplicaID]*host{}}
	w.cfg = Config{Node: "n1", Controllers: w, Peers: w, Logger: testLog(), Geometry: replication.DefaultGeometry(), Timing: quickTiming()}
	var members []replication.Member
	for i := range replicas {
		m := member(i + 1)
		members = append(members, m)
		w.host(m, size)
	}
	var err error
	if w.record, err = replication.NewMembership(volName, size, 1, members); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, h := range w.hosts {
			w.stop(h.id)
		}
		for i := 0; runtime.NumGoroutine() > before; i++ {
			if i == 200 {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines are left:\n%s", runtime.NumGoroutine()-before, stacks[:runtime.Stack(stacks, true)])
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	return w
}

func (w *world) host(m replication.Member, size int64) {
	w.mu.Lock()
	w.hosts[m.ID] = &host{node: m.Node, id: m.ID, disk: newDisk(size), wires: map[*wire]bool{}}
	w.mu.Unlock()
	w.start(m.ID)
}

// start has a replica served by a new life of its process.
func (w *world) start(id volume.ReplicaID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.hosts[id]
	w.boots++
	h.boot = w.boots
	var err error
	h.replica, err = NewReplica(replication.ReplicaConfig{
		Volume: volName, Replica: id, Incarnation: 7, BootID: h.boot, Geometry: w.cfg.Geometry, Timing: w.cfg.Timing,
	}, h.disk.openStore(), w.cfg.Logger)
	if err != nil {
		w.t.Fatal(err)
	}
}

// stop ends a replica's process; its disk is as it was.
func (w *world) stop(id volume.ReplicaID) {
	w.mu.Lock()
	h := w.hosts[id]
	r := h.replica
	h.replica = nil
	w.mu.Unlock()
	if r == nil {
		return
	}
	if err := r.Close(); err != nil {
		w.t.Error(err)
	}
}

// partition cuts a host off, or connects it again.
func (w *world) partition(id volume.ReplicaID, cut bool) {
	w.mu.Lock()
	h := w.hosts[id]
	h.cut = cut
	var broken []*wire
	for x := range h.wires {
		broken = append(broken, x)
	}
	w.mu.Unlock()
	if cut {
		for _, x := range broken {
			x.breaks(errors.New("cut"))
		}
	}
}

// wire carries messages as a network would: data is copied, and it can be cut.
type wire struct {
	h    *host
	w    *world
	conn *Conn
	down func(error)
	once sync.Once
	mu   sync.Mutex
	dead bool
}

func (x *wire) Send(m *replication.Message) {
	x.mu.Lock()
	dead := x.dead
	x.mu.Unlock()
	if dead {
		return
	}
	c := *m
	c.Data = nil // a read's
	if m.Kind == replication.KindWrite {
		c.Data = append([]byte(nil), m.Data...)
	}
	x.conn.Send(&c)
}

func (x *wire) Flush() {}

func (x *wire) breaks(err error) {
	x.once.Do(func() {
		x.mu.Lock()
		x.dead = true
		x.mu.Unlock()
		x.w.mu.Lock()
		delete(x.h.wires, x)
		x.w.mu.Unlock()
		if err != nil {
			x.down(err)
		}
		x.conn.Close()
	})
}

func (x *wire) Close() { x.breaks(nil) }

// Dial implements Peers.
func (w *world) Dial(_ context.Context, node volume.NodeID, _ volume.ID, id volume.ReplicaID, receive func(*replication.Message), down func(error)) (Transport, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.hosts[id]
	if h == nil || h.node != node || h.replica == nil || h.cut {
		return nil, volume.ErrUnavailable
	}
	if node == w.cfg.Node && !w.wired {
		return h.replica.Connect(receive, down)
	}
	x := &wire{h: h, w: w, down: down}
	h.wires[x] = true
	var err error
	x.conn, err = h.replica.Connect(func(m *replication.Message) {
		x.mu.Lock()
		dead := x.dead
		x.mu.Unlock()
		if !dead {
			receive(m)
		}
	}, func(err error) { x.breaks(err) })
	return x, err
}

// Commit implements Controllers.
func (w *world) Commit(_ context.Context, _ volume.ID, c replication.Change) (replication.Membership, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down {
		return replication.Membership{}, volume.ErrUnavailable
	}
	m, err := w.record.Apply(c)
	if err != nil {
		return w.record, err
	}
	w.record = m
	if w.lost {
		return replication.Membership{}, volume.ErrUnavailable
	}
	return m, nil
}

// Membership implements Controllers.
func (w *world) Membership(context.Context, volume.ID) (replication.Membership, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down {
		return replication.Membership{}, volume.ErrUnavailable
	}
	return w.record, nil
}

func (w *world) members() replication.Membership {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.record
}

// begin attaches the volume to a node, without waiting for it.
func (w *world) begin(node volume.NodeID, force bool) *Engine {
	w.t.Helper()
	m, err := w.Commit(w.t.Context(), volName, replication.Change{Attach: &replication.Attach{Node: node, Force: force}})
	if err != nil {
		w.t.Fatal(err)
	}
	cfg := w.cfg
	cfg.Node = node
	e, err := Open(cfg, m)
	if err != nil {
		w.t.Fatal(err)
	}
	e.SetResyncPace(replication.MaxWindow, 0)
	w.engines = append(w.engines, e)
	w.t.Cleanup(func() {
		if err := e.Close(); err != nil {
			w.t.Error(err)
		}
	})
	return e
}

func (w *world) attach(node volume.NodeID, force bool) *Engine {
	w.t.Helper()
	e := w.begin(node, force)
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	if err := e.Live(ctx); err != nil {
		w.t.Fatal(err)
	}
	return e
}

func (w *world) detach(e *Engine) {
	w.t.Helper()
	if err := e.Detach(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.Commit(w.t.Context(), volName, replication.Change{Detach: &replication.Detach{Clean: true}}); err != nil {
		w.t.Fatal(err)
	}
}

// waitFor waits until the controllers' record is as wanted.
func (w *world) waitFor(what string, is func(m replication.Membership) bool) {
	w.t.Helper()
	for start := time.Now(); !is(w.members()); {
		if time.Since(start) > 20*time.Second {
			for _, e := range w.engines {
				w.t.Logf("%+v", e.Status())
				for _, m := range e.Status().Members {
					w.t.Logf("%+v %+v", m, m.Resync)
				}
			}
			w.t.Fatalf("not %s: %+v", what, w.members())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (w *world) waitISR(ids ...string) {
	w.t.Helper()
	w.waitFor("in sync: "+strings.Join(ids, " "), func(m replication.Membership) bool {
		var have []string
		for _, id := range m.ISR() {
			have = append(have, string(id))
		}
		return strings.Join(have, " ") == strings.Join(ids, " ")
	})
}

// equal checks that replicas read the same; nothing is under way.
func (w *world) equal(ids ...volume.ReplicaID) {
	w.t.Helper()
	want := w.hosts[ids[0]].disk.content()
	for _, id := range ids[1:] {
		got := w.hosts[id].disk.content()
		if len(got) < len(want) {
			w.t.Fatalf("replica %s has %d bytes, %s has %d", id, len(got), ids[0], len(want))
		}
		for i := range want {
			if got[i] != want[i] {
				w.t.Fatalf("replicas %s and %s differ at %d (region %d)", ids[0], id, i, i>>20)
			}
		}
	}
}

// load writes and reads at random and knows what must be read.
type load struct {
	t      *testing.T
	model  []byte
	rng    *rand.Rand
	offset int64 // where its own part begins
}

// parts are writers of the volume's parts, each n bytes.
func parts(t *testing.T, count int, n int64) []*load {
	var all []*load
	for i := range count {
		all = append(all, &load{t: t, model: make([]byte, n), rng: rand.New(rand.NewPCG(1, uint64(i))), offset: int64(i) * n})
	}
	return all
}

func (l *load) step(ctx context.Context, e *Engine) error {
	off := l.rng.Int64N(int64(len(l.model)) - 1)
	n := 1 + l.rng.Int64N(min(16<<10, int64(len(l.model))-off))
	if l.rng.IntN(2) == 0 {
		off, n = off&^4095, (n+4095)&^4095
		n = min(n, int64(len(l.model))-off)
	}
	switch l.rng.IntN(12) {
	case 0, 1, 2, 3:
		got := make([]byte, n)
		if err := e.ReadAt(ctx, got, l.offset+off); err != nil {
			return err
		}
		if string(got) != string(l.model[off:off+n]) {
			return fmt.Errorf("read %d bytes at %d: not what was written", n, l.offset+off)
		}
	case 4:
		if err := e.Zero(ctx, l.offset+off, n); err != nil {
			return err
		}
		clear(l.model[off : off+n])
	case 5:
		return e.Flush(ctx)
	default:
		p := make([]byte, n)
		fill, step := byte(l.rng.Uint32()), byte(l.rng.Uint32())
		for i := range p {
			p[i] = fill
			fill += step
		}
		write := e.WriteAt
		if l.rng.IntN(6) == 0 {
			write = e.WriteDurably
		}
		if err := write(ctx, p, l.offset+off); err != nil {
			return err
		}
		copy(l.model[off:], p)
		clear(p) // it is the caller's again
	}
	return nil
}

// run keeps writers going until stop.
func run(t *testing.T, e *Engine, loads []*load) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, l := range loads {
		wg.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(200 * time.Microsecond)
				if err := l.step(context.WithoutCancel(ctx), e); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// check reads all that was written.
func check(t *testing.T, e *Engine, loads []*load) {
	t.Helper()
	for _, l := range loads {
		got := make([]byte, len(l.model))
		if err := e.ReadAt(t.Context(), got, l.offset); err != nil {
			t.Fatal(err)
		}
		for i := range got {
			if got[i] != l.model[i] {
				t.Fatalf("byte %d is not what was written", l.offset+int64(i))
			}
		}
	}
}
