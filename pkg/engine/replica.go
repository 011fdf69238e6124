package engine

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Replica serves one open copy of a volume to engines. The methods may be called at once.
type Replica struct {
	store Store
	log   *slog.Logger

	// ctx ends operations that wait in the store when the replica is closed.
	ctx    context.Context
	cancel context.CancelFunc
	ops    sync.WaitGroup // workers, and callers of deliver
	work   chan replication.StoreOp
	idle   atomic.Int32 // workers that wait for work

	mu     sync.Mutex
	m      *replication.Replica
	conns  map[uint64]*Conn
	last   uint64 // connection number
	closed bool
	// poisoned: the machine answered so.
	poisoned bool

	complained atomic.Int64 // when a failure of the store was logged last, replication.Now
	unlogged   atomic.Int64 // failures since then
}

// NewReplica serves a store. It is the store's only user until Close, which closes it.
func NewReplica(cfg replication.ReplicaConfig, store Store, log *slog.Logger) (*Replica, error) {
	m, err := replication.NewReplica(cfg, replication.Stored{
		State: store.State(), WIL: store.WIL(), Missed: store.Missed(), Size: store.Size(), Snapshots: store.Snapshots(),
	}, now())
	if err != nil {
		return nil, err
	}
	r := &Replica{store: store, log: log.With("volume", cfg.Volume, "replica", cfg.Replica), m: m,
		conns: map[uint64]*Conn{}, work: make(chan replication.StoreOp)}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Close ends every connection, waits for the operations under way, and closes the store.
func (r *Replica) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	conns := r.conns
	r.conns = nil
	r.mu.Unlock()
	for _, c := range conns {
		c.down(errReplicaClosed)
	}
	r.cancel()
	r.ops.Wait()
	return r.store.Close()
}

// Conns is the number of connections.
func (r *Replica) Conns() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.conns)
}

// Poisoned tells whether a sync has failed: nothing is served until it is closed, and opened as another life.
func (r *Replica) Poisoned() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.poisoned
}

// LeaseUntil is until when an engine may serve reads because of what this replica answered; for the next one of the store in
// this process.
func (r *Replica) LeaseUntil() replication.Now {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.m.LeaseUntil()
}

// Forget says that a snapshot's layer was deleted from the store, unless a barrier above upTo has cut it; 0 is any.
func (r *Replica) Forget(s volume.SnapshotID, upTo uint64) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.ops.Add(1)
	defer r.ops.Done()
	r.m.Forget(s, upTo)
	fx := r.take()
	r.mu.Unlock()
	r.carryOut(fx)
}

var errReplicaClosed = fmt.Errorf("replica is closed: %w", volume.ErrUnavailable)

// Conn is an engine's way to a replica in the same process, and what a server of remote engines hands requests to.
type Conn struct {
	r     *Replica
	id    uint64
	reply func(*replication.Message)
	down  func(error)
}

// Connect opens a connection. Answers come by reply, several at once perhaps, until Close. down is called when the replica
// is closed before.
func (r *Replica) Connect(reply func(*replication.Message), down func(error)) (*Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errReplicaClosed
	}
	r.last++
	c := &Conn{r: r, id: r.last, reply: reply, down: down}
	r.conns[c.id] = c
	return c, nil
}

// Send takes a request and does not wait for the store.
func (c *Conn) Send(m *replication.Message) { c.r.deliver(c.id, m) }

// Flush implements Transport.
func (c *Conn) Flush() {}

// Close ends the connection: nothing is answered any more, but for what is just being answered.
func (c *Conn) Close() {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	delete(c.r.conns, c.id)
}

// replicaEffect is one thing to be done after the mutex is released.
type replicaEffect struct {
	replication.ReplicaEffect
	conn *Conn // that an answer is for; nil where it is gone
}

type replicaEffects struct{ list []replicaEffect }

var replicaEffectLists = sync.Pool{New: func() any { return new(replicaEffects) }}

func (l *replicaEffects) done() {
	clear(l.list)
	l.list = l.list[:0]
	replicaEffectLists.Put(l)
}

func (r *Replica) deliver(conn uint64, m *replication.Message) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.ops.Add(1)
	defer r.ops.Done()
	req := *m
	req.Conn = conn
	r.m.Receive(now(), &req)
	fx := r.take()
	r.mu.Unlock()
	r.carryOut(fx)
}

// take collects what is to be done; the mutex is held.
func (r *Replica) take() *replicaEffects {
	out := r.m.Effects()
	if len(out) == 0 {
		return nil
	}
	l := replicaEffectLists.Get().(*replicaEffects)
	for _, e := range out {
		x := replicaEffect{ReplicaEffect: e}
		if e.Answer {
			x.conn = r.conns[e.Msg.Conn]
			r.poisoned = r.poisoned || e.Msg.Status == replication.StatusPoisoned
		}
		l.list = append(l.list, x)
	}
	return l
}

// carryOut gives answers and has store operations begun.
func (r *Replica) carryOut(fx *replicaEffects) {
	if fx == nil {
		return
	}
	for i := range fx.list {
		e := &fx.list[i]
		switch {
		case !e.Answer:
			r.begin(e.Store)
		case e.conn != nil:
			e.conn.reply(&e.Msg)
		}
	}
	fx.done()
}

// maxIdle bounds the workers that wait for work: a goroutine that has done some has the stack that the store needs.
const maxIdle = 8

// begin has a store operation done by a goroutine of its own: any of them may hang with its disk. The caller holds a share
// of ops.
func (r *Replica) begin(op replication.StoreOp) {
	select {
	case r.work <- op:
	default:
		r.hire(op)
	}
}

// hire begins another worker. It is apart from begin so that only here an operation is allocated.
//
//go:noinline
func (r *Replica) hire(op replication.StoreOp) { r.ops.Go(func() { r.worker(op) }) }

func (r *Replica) worker(op replication.StoreOp) {
	for {
		r.carryOut(r.perform(&op))
		if r.idle.Add(1) > maxIdle {
			r.idle.Add(-1)
			return
		}
		select {
		case op = <-r.work:
			r.idle.Add(-1)
		case <-r.ctx.Done():
			return
		}
	}
}

// perform does one store operation, and returns what is to be done after it.
func (r *Replica) perform(op *replication.StoreOp) *replicaEffects {
	res, err := r.do(op)
	if err != nil {
		if r.ctx.Err() != nil {
			return nil // being closed is no failure of the store, and nobody waits for the answer
		}
		if res.Status = status(op.Kind, err); res.Status == replication.StatusIO {
			r.complain(op, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m.Done(now(), op.ID, res)
	return r.take()
}

// complainEvery is how often a failure of the store is logged: what has failed once fails for all that is under way.
const complainEvery = 10 * replication.Second

// complain logs a failure of the store, or counts it for the next that is logged.
func (r *Replica) complain(op *replication.StoreOp, err error) {
	last, at := r.complained.Load(), int64(now())
	if last != 0 && at-last < int64(complainEvery) || !r.complained.CompareAndSwap(last, at) {
		r.unlogged.Add(1)
		return
	}
	r.log.Error("store", "operation", op.Kind, "offset", op.Off, "length", op.Len, "error", err, "unlogged", r.unlogged.Swap(0))
}

// status is what an engine is told of an operation that failed. A seal or a resize that was refused has lost nothing, unless the
// store itself has failed (volume.ErrUnavailable): it must not be taken for a failed sync, or a failed replica.
func status(op replication.StoreKind, err error) replication.Status {
	refused := errors.Is(err, volume.ErrBusy) || errors.Is(err, volume.ErrNoSpace) || errors.Is(err, volume.ErrExists)
	switch {
	case (op == replication.StoreSeal || op == replication.StoreResize) && refused && !errors.Is(err, volume.ErrUnavailable):
		return replication.StatusRefused
	case errors.Is(err, block.ErrRange):
		return replication.StatusRange
	case errors.Is(err, volume.ErrNotFound):
		return replication.StatusNotFound
	}
	return replication.StatusIO
}

func (r *Replica) do(op *replication.StoreOp) (res replication.StoreResult, err error) {
	ctx := r.ctx
	switch op.Kind {
	case replication.StorePersist:
		err = r.store.SetState(ctx, op.State)
	case replication.StoreMarkWIL:
		err = r.store.MarkWIL(ctx, op.Runs)
	case replication.StoreClearWIL:
		err = r.store.ClearWIL(ctx, op.Runs)
	case replication.StoreRead:
		res.Data, res.Hole, err = r.read(ctx, op)
	case replication.StoreHash:
		res.Data, err = r.hash(ctx, op)
	case replication.StoreWrite, replication.StoreZero:
		err = r.change(ctx, op)
	case replication.StoreSync:
		err = r.store.Flush(ctx)
	case replication.StoreAllocated:
		res.Set, err = page(op, func(limit int) (p replication.SetPage, err error) {
			p.Runs, p.From, p.More, err = r.store.Allocated(ctx, op.Snapshot, op.Set.Base, op.Set.From, limit)
			return p, err
		})
	case replication.StoreMissed:
		res.Set, err = page(op, func(limit int) (p replication.SetPage, err error) {
			p.Since, p.Runs, p.From, p.More, err = r.store.MissedRuns(ctx, op.Set.Peer, op.Set.From, limit)
			return p, err
		})
	case replication.StoreTrack:
		err = r.store.TrackMissed(ctx, replication.MissedTag{Peer: op.Set.Peer, Since: op.Set.Since})
	case replication.StoreDropMissed:
		err = r.store.DropMissed(ctx, op.Set.Peer)
	case replication.StoreMarkMissed:
		err = r.store.AddMissed(ctx, replication.MissedTag{Peer: op.Set.Peer, Since: op.Set.Since}, op.Set.Runs)
	case replication.StoreSeal:
		err = r.store.Seal(ctx, op.Snapshot, op.Number)
	case replication.StoreResize:
		err = r.store.Resize(ctx, op.Len)
	default:
		err = fmt.Errorf("no store operation %d", op.Kind)
	}
	return res, err
}

// page fills in what a page repeats of its request.
func page(op *replication.StoreOp, get func(limit int) (replication.SetPage, error)) (*replication.SetPage, error) {
	p, err := get(replication.MaxRuns)
	if err != nil {
		return nil, err
	}
	p.Peer, p.Base = op.Set.Peer, op.Set.Base
	return &p, nil
}

// change writes or zeros. What absent peers miss is noted first: a flush that covers the write covers the note.
func (r *Replica) change(ctx context.Context, op *replication.StoreOp) error {
	for _, t := range op.Marks {
		r.store.NoteMissed(t.Peer, op.Off, op.Len)
	}
	var err error
	if op.Kind == replication.StoreZero {
		err = r.store.Zero(ctx, op.Off, op.Len)
	} else {
		err = r.store.WriteAt(ctx, op.Data, op.Off)
	}
	if err == nil && op.FUA {
		err = r.store.Flush(ctx)
	}
	return err
}

type reader interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// at returns the head or a sealed layer for reading.
func (r *Replica) at(ctx context.Context, s volume.SnapshotID) (reader, func(), error) {
	if s == "" {
		return r.store, func() {}, nil
	}
	sr, err := r.store.Snapshot(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	return sr, func() { _ = sr.Close() }, nil // it was only read
}

func (r *Replica) read(ctx context.Context, op *replication.StoreOp) (data []byte, hole bool, err error) {
	from, end, err := r.at(ctx, op.Snapshot)
	if err != nil {
		return nil, false, err
	}
	defer end()
	if data = op.Data; data != nil {
		return data, false, from.ReadAt(ctx, data, op.Off)
	}
	data = make([]byte, op.Len)
	if err := from.ReadAt(ctx, data, op.Off); err != nil {
		return nil, false, err
	}
	// It is sent: zeros need not be.
	if isZero(data) {
		return nil, true, nil
	}
	return data, false, nil
}

func (r *Replica) hash(ctx context.Context, op *replication.StoreOp) ([]byte, error) {
	from, end, err := r.at(ctx, op.Snapshot)
	if err != nil {
		return nil, err
	}
	defer end()
	select {
	case hashing <- struct{}{}:
		defer func() { <-hashing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h := sha256.New()
	b := getBuffer(int(min(op.Len, replication.MaxData)))
	defer b.release()
	for off, left := op.Off, op.Len; left > 0; {
		n := min(left, int64(len(b.b)))
		if err := from.ReadAt(ctx, b.b[:n], off); err != nil {
			return nil, err
		}
		h.Write(b.b[:n])
		off, left = off+n, left-n
	}
	return h.Sum(nil), nil
}

// hashing bounds how many hashes are computed at once: with one for each processor nothing else would run.
var hashing = make(chan struct{}, max(1, runtime.NumCPU()/4))

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if string(p[:n]) != zeros[:n] {
			return false
		}
		p = p[n:]
	}
	return true
}

// zeros is compared with: comparing is faster than looking at each byte.
var zeros = string(make([]byte, 4<<10))
