package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// liveLimit bounds how long a call waits for an engine to serve; the engine goes on, and the next call joins it.
	liveLimit = 30 * time.Second
	// endLimit bounds how long an engine's end waits for its replicas to have everything durably.
	endLimit = 5 * time.Second
	// pastEvery is how often the controllers are asked whether engines are of the past, pastLimit how long for an answer.
	pastEvery = 5 * time.Second
	pastLimit = 5 * time.Second
	// maxPast bounds the volumes whose last engine is remembered.
	maxPast = 4096
)

// instance is one run of a volume's engine, with an epoch of its own.
type instance struct {
	e     *engine.Engine
	epoch volume.Epoch
	// local is the replica on this node that was in sync at the beginning, with its pool; its ID is "" where there is none.
	local    volume.Replica
	pool     Pool
	progress progress
	// drained is the newest snapshot of several volumes that its writes were held for, by number; 0 is none. The volume's
	// lock guards it.
	drained uint64
	// syncing: replicas are being brought up.
	syncing atomic.Bool

	mu sync.Mutex
	// behind are replicas that were not in sync when it was looked last.
	behind map[volume.ReplicaID]bool
	// ended is closed before the node itself ends the engine.
	ended chan struct{}
}

// past is the last engine of a volume that this node ran.
type past struct {
	epoch volume.Epoch
	// clean: it left nothing that is not durable, and no lease.
	clean bool
}

// instance returns the volume's engine once it serves: the one that runs, or a new one. The volume is locked.
func (n *Node) instance(ctx context.Context, c Cluster, v *vol, cv volume.Volume) (*instance, error) {
	if i := v.inst; i != nil && (i.epoch != cv.Epoch || i.over()) {
		// It was superseded, or failed.
		if err := n.abort(ctx, v); err != nil {
			return nil, err
		}
		n.endInstance(v)
	}
	if v.inst == nil {
		i, err := n.newInstance(ctx, c, v, cv)
		if err != nil {
			return nil, err
		}
		v.inst = i
		v.set(func(s *state) { s.inst, s.failed = i, "" })
		n.spawn(func() { n.watch(v, i) })
	}
	i := v.inst
	wait, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	if err := i.e.Live(wait); err != nil {
		if wait.Err() == nil {
			return nil, fmt.Errorf("%w: %w", err, volume.ErrUnavailable)
		}
		return nil, fmt.Errorf("volume %s is not served yet (%s): %w: %w", v.id, why(i.e.Status()), err, volume.ErrUnavailable)
	}
	n.mu.Lock()
	for id := range n.past {
		if len(n.past) < maxPast || id == v.id {
			break
		}
		delete(n.past, id) // it costs its next attachment the wait for a lease
	}
	n.past[v.id] = past{epoch: i.epoch}
	n.mu.Unlock()
	if v.rec.live() && v.rec.Epoch != i.epoch {
		rec := v.rec.clone()
		rec.Epoch = i.epoch
		if err := n.save(v, rec); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// why is the worst of an engine's conditions.
func why(s replication.EngineStatus) string {
	if len(s.Conditions) > 0 {
		return s.Conditions[0].Message
	}
	return s.Phase
}

func (i *instance) over() bool {
	select {
	case <-i.e.Over():
		return true
	default:
		return false
	}
}

// newInstance begins an epoch and an engine for it.
func (n *Node) newInstance(ctx context.Context, c Cluster, v *vol, cv volume.Volume) (*instance, error) {
	i := &instance{ended: make(chan struct{}), behind: map[volume.ReplicaID]bool{}}
	for _, r := range cv.Replicas {
		if r.Node == n.cfg.ID && r.Role == volume.InSync {
			i.local, i.pool = r, n.pools[r.Pool]
		}
	}
	if i.local.ID != "" && len(cv.Replicas) == 1 {
		// Nobody else can serve it: better to say at once what is wrong than to wait.
		if i.pool == nil {
			return nil, fmt.Errorf("pool %s of volume %s is not open on node %s; bring its disk back and restart: %w", i.local.Pool, cv.ID, n.cfg.ID, volume.ErrUnavailable)
		}
		if err := n.host.ready(ctx, i.local.ID); err != nil {
			return nil, fmt.Errorf("volume %s: %w", cv.ID, err)
		}
	}
	attach := replication.Attach{Node: n.cfg.ID, Gone: v.rec.Epoch}
	n.mu.Lock()
	if p, ok := n.past[v.id]; ok {
		attach.Gone = p.epoch
	}
	n.mu.Unlock()
	m, err := c.Commit(ctx, v.id, replication.Change{Attach: &attach})
	if errors.Is(err, replication.ErrAttached) {
		// It was given to another node since it was asked for.
		return nil, fmt.Errorf("begin an epoch of volume %s: %v: %w", v.id, err, volume.ErrBusy)
	}
	if err != nil {
		return nil, fmt.Errorf("begin an epoch of volume %s: %w", v.id, err)
	}
	i.epoch = m.Epoch
	i.read(m)
	i.e, err = engine.Open(engine.Config{
		Node: n.cfg.ID, Controllers: c, Peers: n, Logger: n.log, Geometry: replication.DefaultGeometry(), Timing: n.cfg.Timing,
		Meter: &n.meter,
	}, m)
	return i, err
}

// watch waits for the end of an engine. Where that was not the node's own doing the device must fail for good: what its
// page cache still has reaches nobody.
func (n *Node) watch(v *vol, i *instance) {
	timer := time.NewTimer(untilLook())
	defer timer.Stop()
	for !i.over() {
		select {
		case <-n.ctx.Done():
			return
		case <-i.ended:
			return
		case <-i.e.Over():
		case <-timer.C:
			n.look(v, i)
			timer.Reset(untilLook())
		}
	}
	select {
	case <-i.ended: // the node itself closed it
		return
	default:
	}
	reason := i.e.Reason()
	n.log.Error("engine of a volume ended", "volume", v.id, "epoch", i.epoch, "reason", reason)
	held, err := n.acquire(n.ctx, v.id, false)
	if err != nil || held == nil {
		return
	}
	defer n.release(held)
	if held.inst != i {
		return
	}
	if err := n.abort(n.ctx, held); err != nil {
		n.log.Error("device of an ended engine stays", "volume", v.id, "err", err)
		return
	}
	n.endInstance(held)
	held.set(func(s *state) { s.failed = reason })
}

// endThePast ends engines whose epoch is over and that nobody has told so, until the node is closed: they may have nothing
// left to ask for, and nobody to refuse it.
func (n *Node) endThePast(c Cluster) {
	tick := time.NewTicker(pastEvery)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
		running, epochs := map[volume.ID]*instance{}, map[volume.ID]volume.Epoch{}
		for _, v := range n.all() {
			if i := v.get().inst; i != nil && !i.over() {
				running[v.id], epochs[v.id] = i, i.epoch
			}
		}
		if len(running) == 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(n.ctx, pastLimit)
		ended, err := c.Ended(ctx, epochs)
		cancel()
		if err != nil {
			n.log.Debug("which engines are of the past is not known", "err", err)
		}
		for _, id := range ended {
			if i := running[id]; i != nil {
				i.e.Learn(replication.Membership{Volume: id, Epoch: i.epoch, Revision: math.MaxUint64, Deleted: true})
			}
		}
	}
}

// endInstance ends the volume's engine, if it has one. Its device is gone already.
func (n *Node) endInstance(v *vol) {
	i := v.inst
	if i == nil {
		return
	}
	close(i.ended)
	ctx, cancel := context.WithTimeout(context.Background(), endLimit)
	defer cancel()
	if v.held != nil {
		if err := n.letGo(ctx, v, i); err != nil {
			n.log.Warn("thaw", "volume", v.id, "err", err)
		}
	}
	err := i.e.Detach(ctx)
	if err != nil {
		n.log.Warn("engine did not end cleanly", "volume", v.id, "epoch", i.epoch, "err", err)
	}
	err = errors.Join(err, i.e.Close())
	v.inst = nil
	v.set(func(s *state) { s.inst = nil })
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.past[v.id]; p.epoch == i.epoch {
		n.past[v.id] = past{epoch: i.epoch, clean: err == nil}
	}
}

// wasClean tells whether nothing of a volume that has no engine here can still be served or written by one of this node.
func (n *Node) wasClean(ctx context.Context, id volume.ID) bool {
	c, err := n.connected()
	if err != nil {
		return false
	}
	m, err := c.Membership(ctx, id)
	if err != nil {
		return false
	}
	n.mu.Lock()
	p := n.past[id]
	n.mu.Unlock()
	return m.Clean || p.clean && p.epoch == m.Epoch
}

// engineOf returns a volume, locked, with its engine, which runs already or is run for this. volume.ErrBusy: another node is
// to run it, as the controllers have it now, or the volume is in a later epoch than the one it was asked in: whoever asked has
// given up since. An engine that runs already is returned in any epoch.
func (n *Node) engineOf(ctx context.Context, node volume.NodeID, id volume.ID, asked volume.Epoch) (*vol, *instance, error) {
	return n.engineFor(ctx, node, id, asked, true)
}

// engineIn is engineOf for what would strike an engine that it was not meant for: one that runs is returned in that epoch only.
func (n *Node) engineIn(ctx context.Context, node volume.NodeID, id volume.ID, asked volume.Epoch) (*vol, *instance, error) {
	return n.engineFor(ctx, node, id, asked, false)
}

func (n *Node) engineFor(ctx context.Context, node volume.NodeID, id volume.ID, asked volume.Epoch, anyThatRuns bool) (*vol, *instance, error) {
	if err := n.here(node); err != nil {
		return nil, nil, err
	}
	c, v, cv, err := n.open(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	if cv.Owner != n.cfg.ID {
		n.release(v)
		return nil, nil, fmt.Errorf("the engine of volume %s is node %q's, not this node's: %w", id, cv.Owner, volume.ErrBusy)
	}
	if runs := v.inst != nil && v.inst.epoch == cv.Epoch; asked != cv.Epoch && !(runs && anyThatRuns) {
		n.release(v)
		return nil, nil, fmt.Errorf("the engine of volume %s was asked for in epoch %d, it is in epoch %d: %w", id, asked, cv.Epoch, volume.ErrBusy)
	}
	i, err := n.instance(ctx, c, v, cv)
	if err != nil {
		n.release(v)
		return nil, nil, err
	}
	return v, i, nil
}

// learn has an engine read the volume's record anew, and returns it.
func (n *Node) learn(ctx context.Context, v *vol, i *instance) (replication.Membership, error) {
	c, err := n.connected()
	if err != nil {
		return replication.Membership{}, err
	}
	m, err := c.Membership(ctx, v.id)
	if err == nil {
		i.read(m)
		i.e.Learn(m)
	}
	return m, err
}

// member tells whether an engine has a replica.
func (i *instance) member(id volume.ReplicaID) bool {
	return slices.ContainsFunc(i.e.Status().Members, func(m replication.MemberStatus) bool { return m.ID == id })
}

// inSync tells whether an engine has a replica in its in-sync set.
func (i *instance) inSync(id volume.ReplicaID) bool {
	return slices.ContainsFunc(i.e.Status().Members, func(m replication.MemberStatus) bool { return m.ID == id && m.InSync })
}
