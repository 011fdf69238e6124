package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// idleReplica is how long a replica stays open that no engine is connected to.
	idleReplica = 30 * time.Second
	sweepEvery  = 10 * time.Second
)

// replicaHost serves the replicas of the node's pools to engines, those of this node and of others. A replica is opened when it is
// asked for, and closed when nobody has asked for long.
type replicaHost struct {
	n *Node
	// boot names this life of the process.
	boot replication.BootID

	mu sync.Mutex
	m  map[volume.ReplicaID]*hosted
}

// hosted is a replica of a pool.
type hosted struct {
	id   volume.ReplicaID
	pool Pool

	// lock holds one token; who took it may use what follows.
	lock  chan struct{}
	r     *engine.Replica // nil while it is closed
	store *identified
	of    volume.ID
	boot  replication.BootID
	// leased is until when an engine may serve reads because of what the replica answered before it was closed; 0 is not known.
	leased replication.Now
	// taken: somebody uses the replica without the protocol, and no engine may.
	taken bool
	quiet time.Time // since when nobody was connected; zero while somebody is
}

func randomID() (uint64, error) {
	for {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return 0, fmt.Errorf("random number: %w", err)
		}
		if id := binary.BigEndian.Uint64(b[:]); id != 0 {
			return id, nil
		}
	}
}

// find returns a replica of this node; volume.ErrNotFound where no pool has it.
func (h *replicaHost) find(id volume.ReplicaID) (*hosted, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	x := h.m[id]
	if x == nil || !x.pool.HasReplica(id) {
		x = nil
		for _, p := range h.n.cfg.Pools {
			if p.HasReplica(id) {
				x = &hosted{id: id, pool: p, lock: make(chan struct{}, 1), boot: h.boot, quiet: time.Now()}
				x.lock <- struct{}{}
				h.m[id] = x
				break
			}
		}
	}
	if x == nil {
		return nil, fmt.Errorf("node %s has no replica %s: %w", h.n.cfg.ID, id, volume.ErrNotFound)
	}
	return x, nil
}

// take locks a replica.
func (x *hosted) take(ctx context.Context) error {
	select {
	case <-x.lock:
		return nil
	case <-ctx.Done():
		return x.hangs(ctx)
	}
}

func (x *hosted) hangs(ctx context.Context) error {
	return fmt.Errorf("replica %s is being opened or closed, and its disk does not answer: %w: %w", x.id, ctx.Err(), volume.ErrBusy)
}

// locked calls fn while the replica is locked. A disk that hangs holds up fn, and the lock with it, but not the caller: when ctx ends
// that one gets volume.ErrBusy, and undo, unless it is nil, takes back what fn comes to do for it.
func (x *hosted) locked(ctx context.Context, fn func() error, undo func()) error {
	if err := x.take(ctx); err != nil {
		return err
	}
	var decided atomic.Bool // whether the caller gets what fn did
	done := make(chan error, 1)
	go func() {
		defer x.unlock()
		err := fn()
		if !decided.CompareAndSwap(false, true) && err == nil && undo != nil {
			undo()
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if !decided.CompareAndSwap(false, true) {
			return <-done
		}
		return x.hangs(ctx)
	}
}

func (x *hosted) unlock() { x.lock <- struct{}{} }

// open opens a locked replica, unless it is. One that was poisoned begins another life: what it did not sync may be lost.
func (h *replicaHost) open(ctx context.Context, x *hosted) error {
	if h.n.isClosed() {
		return h.n.stopping()
	}
	if x.r != nil && x.r.Poisoned() {
		if err := x.close(); err != nil {
			h.n.log.Warn("poisoned replica closed", "replica", x.id, "err", err)
		}
	}
	switch {
	case x.r != nil:
		return nil
	case x.taken:
		return fmt.Errorf("replica %s is exported: %w", x.id, volume.ErrInUse)
	}
	store, of, err := x.pool.OpenReplica(ctx, x.id)
	if err != nil {
		return fmt.Errorf("open replica %s: %w", x.id, err)
	}
	x.of = of
	if x.store, err = identify(ctx, store); err == nil {
		x.r, err = engine.NewReplica(replication.ReplicaConfig{
			Volume: of, Replica: x.id, Incarnation: x.store.incarnation, BootID: x.boot, LeaseUntil: x.leased,
			Geometry: replication.DefaultGeometry(), Timing: h.n.cfg.Timing,
		}, x.store, h.n.log)
	}
	if err != nil {
		x.r = nil
		return errors.Join(fmt.Errorf("open replica %s: %w", x.id, err), store.Close())
	}
	return nil
}

// close closes a locked replica. Where that fails, or a sync had failed, something may be lost: the next life is another.
func (x *hosted) close() error {
	if x.r == nil {
		return nil
	}
	lost := x.r.Poisoned()
	err := x.r.Close()
	x.leased = x.r.LeaseUntil()
	x.r, x.store, x.quiet = nil, nil, time.Now()
	if err == nil && !lost {
		return nil
	}
	id, idErr := randomID()
	x.boot = replication.BootID(id)
	return errors.Join(err, idErr)
}

// ready returns why a replica of this node cannot be served; nil where it can.
func (h *replicaHost) ready(ctx context.Context, id volume.ReplicaID) error {
	x, err := h.find(id)
	if err != nil {
		return err
	}
	return x.locked(ctx, func() error { return h.open(ctx, x) }, nil)
}

// Connect opens a connection to a replica of this node for an engine; see engine.Replica.
func (n *Node) Connect(ctx context.Context, of volume.ID, id volume.ReplicaID, reply func(*replication.Message), down func(error)) (*engine.Conn, error) {
	h := &n.host
	x, err := h.find(id)
	if err != nil {
		return nil, err
	}
	var c *engine.Conn
	err = x.locked(ctx, func() (err error) {
		if err = h.open(ctx, x); err != nil {
			return err
		}
		if x.of != of {
			return fmt.Errorf("replica %s is one of volume %s, not of %s: %w", id, x.of, of, volume.ErrNotFound)
		}
		x.quiet = time.Time{}
		c, err = x.r.Connect(reply, down)
		return err
	}, func() { c.Close() })
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Dial implements engine.Peers.
func (n *Node) Dial(ctx context.Context, node volume.NodeID, of volume.ID, id volume.ReplicaID,
	receive func(*replication.Message), down func(error)) (engine.Transport, error) {
	switch {
	case node == n.cfg.ID:
		c, err := n.Connect(ctx, of, id, receive, down)
		if err != nil {
			return nil, err
		}
		return c, nil
	case n.cfg.Remote == nil:
		return nil, fmt.Errorf("node %s reaches no others: %w", n.cfg.ID, volume.ErrUnavailable)
	}
	return n.cfg.Remote.Dial(ctx, node, of, id, receive, down)
}

// alone calls fn while a replica is closed and no engine can open it; volume.ErrBusy while one is connected.
func (h *replicaHost) alone(ctx context.Context, id volume.ReplicaID, fn func() error) error {
	x, err := h.find(id)
	if err != nil {
		return fn() // the pool says it better
	}
	return x.locked(ctx, func() error {
		if x.r != nil && x.r.Conns() > 0 {
			return fmt.Errorf("replica %s is in use by an engine: %w", id, volume.ErrBusy)
		}
		if err := errors.Join(x.close(), ctx.Err()); err != nil {
			return err
		}
		return fn()
	}, nil)
}

// lend gives a replica to somebody who uses it without the protocol, until done.
func (h *replicaHost) lend(ctx context.Context, id volume.ReplicaID) (_ engine.Store, done func() error, err error) {
	x, err := h.find(id)
	if err != nil {
		return nil, nil, err
	}
	var store engine.Store
	err = x.locked(ctx, func() (err error) {
		switch {
		case x.r != nil && x.r.Conns() > 0:
			return fmt.Errorf("replica %s is in use by an engine: %w", id, volume.ErrInUse)
		case x.taken:
			return fmt.Errorf("replica %s is exported: %w", id, volume.ErrInUse)
		}
		if err := x.close(); err != nil {
			return err
		}
		if store, _, err = x.pool.OpenReplica(ctx, id); err != nil {
			return fmt.Errorf("open replica %s: %w", id, err)
		}
		x.taken = true
		return nil
	}, func() {
		if err := store.Close(); err != nil {
			h.n.log.Warn("replica closed with an error", "replica", id, "err", err)
		}
		x.taken = false
	})
	if err != nil {
		return nil, nil, err
	}
	return store, func() error {
		err := store.Close()
		<-x.lock
		x.taken = false
		x.unlock()
		return err
	}, nil
}

// drop ends whatever uses a replica, and calls fn, which deletes it.
func (h *replicaHost) drop(ctx context.Context, id volume.ReplicaID, fn func() error) error {
	x, err := h.find(id)
	if err != nil {
		return fn()
	}
	return x.locked(ctx, func() error {
		if err := x.close(); err != nil {
			h.n.log.Warn("replica that is to be deleted closed with an error", "replica", id, "err", err)
		}
		if err := fn(); err != nil {
			return err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.m[id] == x {
			delete(h.m, id)
		}
		return nil
	}, nil)
}

func (h *replicaHost) all() []*hosted {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*hosted, 0, len(h.m))
	for _, x := range h.m {
		out = append(out, x)
	}
	return out
}

// forget tells the open replicas of a pool that a snapshot is deleted, as Pool.DeleteSnapshot does it: with of some may have it
// still, of another replica. After an error it is to be called again.
func (h *replicaHost) forget(ctx context.Context, p Pool, s volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	for _, x := range h.all() {
		if x.pool != p {
			continue
		}
		err := x.locked(ctx, func() error {
			is := func(o replication.SealedSnapshot) bool { return o.ID == s }
			if x.r != nil && (of == "" || !slices.ContainsFunc(x.store.Snapshots(), is)) {
				x.r.Forget(s, upTo)
			}
			return nil
		}, nil)
		if err != nil {
			return err
		}
	}
	return nil
}

// sweep closes replicas that nobody has used for a while, until ctx ends.
func (h *replicaHost) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, x := range h.all() {
			select {
			case <-x.lock:
			default:
				continue // it is in use
			}
			switch {
			case x.r == nil:
			case x.r.Conns() > 0:
				x.quiet = time.Time{}
			case x.quiet.IsZero():
				x.quiet = time.Now()
			case time.Since(x.quiet) >= idleReplica:
				go func() { // its disk may hang, the others are seen to all the same
					defer x.unlock()
					if err := x.close(); err != nil {
						h.n.log.Error("replica closed with an error", "replica", x.id, "err", err)
					}
				}()
				continue
			}
			x.unlock()
		}
	}
}

// closeAll closes the replicas of a pool, as far as its disk answers before ctx ends; none is opened any more.
func (h *replicaHost) closeAll(ctx context.Context, p Pool) error {
	of := slices.DeleteFunc(h.all(), func(x *hosted) bool { return x.pool != p })
	return atOnce(of, func(x *hosted) error { return x.locked(ctx, x.close, nil) })
}

// identified is a store whose state begins with the replica's incarnation, which is drawn when it is opened first.
type identified struct {
	engine.Store
	incarnation replication.Incarnation
}

// identityLen is the length of what is before the protocol's state: a format and the incarnation.
const (
	identityLen    = 9
	identityFormat = 1
)

func identify(ctx context.Context, s engine.Store) (*identified, error) {
	state := s.State()
	if len(state) == 0 {
		id, err := randomID()
		if err != nil {
			return nil, err
		}
		x := &identified{s, replication.Incarnation(id)}
		return x, x.SetState(ctx, nil)
	}
	incarnation, _, err := splitState(state)
	return &identified{s, incarnation}, err
}

// splitState returns what a replica's stored state is made of.
func splitState(state []byte) (replication.Incarnation, []byte, error) {
	if len(state) < identityLen || state[0] != identityFormat {
		return 0, nil, fmt.Errorf("replica's state of %d bytes is of no known format: %w", len(state), volume.ErrDataLoss)
	}
	return replication.Incarnation(binary.BigEndian.Uint64(state[1:])), state[identityLen:], nil
}

// State implements engine.Store.
func (s *identified) State() []byte {
	state := s.Store.State()
	if len(state) <= identityLen {
		return nil
	}
	return state[identityLen:]
}

// SetState implements engine.Store.
func (s *identified) SetState(ctx context.Context, state []byte) error {
	b := make([]byte, identityLen, identityLen+len(state))
	b[0] = identityFormat
	binary.BigEndian.PutUint64(b[1:], uint64(s.incarnation))
	return s.Store.SetState(ctx, append(b, state...))
}
