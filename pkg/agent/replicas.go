package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
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

// find returns a replica of this node, locked; volume.ErrNotFound where no pool has it.
func (h *replicaHost) find(ctx context.Context, id volume.ReplicaID) (*hosted, error) {
	h.mu.Lock()
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
	h.mu.Unlock()
	if x == nil {
		return nil, fmt.Errorf("node %s has no replica %s: %w", h.n.cfg.ID, id, volume.ErrNotFound)
	}
	select {
	case <-x.lock:
		return x, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("replica %s is being opened or closed: %w: %w", id, ctx.Err(), volume.ErrBusy)
	}
}

func (x *hosted) unlock() { x.lock <- struct{}{} }

// open opens a locked replica, unless it is. One that was poisoned begins another life: what it did not sync may be lost.
func (h *replicaHost) open(ctx context.Context, x *hosted) error {
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
	x, err := h.find(ctx, id)
	if err != nil {
		return err
	}
	defer x.unlock()
	return h.open(ctx, x)
}

// Connect opens a connection to a replica of this node for an engine; see engine.Replica.
func (n *Node) Connect(ctx context.Context, of volume.ID, id volume.ReplicaID, reply func(*replication.Message), down func(error)) (*engine.Conn, error) {
	h := &n.host
	x, err := h.find(ctx, id)
	if err != nil {
		return nil, err
	}
	defer x.unlock()
	if n.isClosed() {
		return nil, n.stopping()
	}
	if err := h.open(ctx, x); err != nil {
		return nil, err
	}
	if x.of != of {
		return nil, fmt.Errorf("replica %s is one of volume %s, not of %s: %w", id, x.of, of, volume.ErrNotFound)
	}
	x.quiet = time.Time{}
	return x.r.Connect(reply, down)
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
	x, err := h.find(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		return fn() // the pool says it better
	}
	if err != nil {
		return err
	}
	defer x.unlock()
	if x.r != nil && x.r.Conns() > 0 {
		return fmt.Errorf("replica %s is in use by an engine: %w", id, volume.ErrBusy)
	}
	if err := x.close(); err != nil {
		return err
	}
	return fn()
}

// take gives a replica to somebody who uses it without the protocol, until done.
func (h *replicaHost) take(ctx context.Context, id volume.ReplicaID) (store engine.Store, done func() error, err error) {
	x, err := h.find(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	defer x.unlock()
	switch {
	case x.r != nil && x.r.Conns() > 0:
		return nil, nil, fmt.Errorf("replica %s is in use by an engine: %w", id, volume.ErrInUse)
	case x.taken:
		return nil, nil, fmt.Errorf("replica %s is exported: %w", id, volume.ErrInUse)
	}
	if err := x.close(); err != nil {
		return nil, nil, err
	}
	if store, _, err = x.pool.OpenReplica(ctx, id); err != nil {
		return nil, nil, fmt.Errorf("open replica %s: %w", id, err)
	}
	x.taken = true
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
	x, err := h.find(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		return fn()
	}
	if err != nil {
		return err
	}
	defer x.unlock()
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

// forget tells the open replicas of a pool that a snapshot is deleted, as Pool.DeleteSnapshot does it. After an error it is to be
// called again.
func (h *replicaHost) forget(ctx context.Context, p Pool, s volume.SnapshotID, upTo uint64) error {
	for _, x := range h.all() {
		if x.pool != p {
			continue
		}
		select {
		case <-x.lock:
		case <-ctx.Done(): // its disk hangs
			return fmt.Errorf("replica %s is being opened or closed: %w: %w", x.id, ctx.Err(), volume.ErrBusy)
		}
		if x.r != nil {
			x.r.Forget(s, upTo)
		}
		x.unlock()
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
				if err := x.close(); err != nil {
					h.n.log.Error("replica closed with an error", "replica", x.id, "err", err)
				}
			}
			x.unlock()
		}
	}
}

// closeAll closes every replica; none is opened any more.
func (h *replicaHost) closeAll() error {
	var err error
	for _, x := range h.all() {
		<-x.lock
		err = errors.Join(err, x.close())
		x.unlock()
	}
	return err
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
