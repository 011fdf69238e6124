package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var _ control.Agents = (*Node)(nil)

const (
	// freezeLimit bounds the wait for a filesystem to freeze, freezeHold how long it stays frozen.
	freezeLimit = 5 * time.Second
	freezeHold  = 5 * time.Second
	// detachPatience is how long Detach waits for another operation on the volume before it fails that one's I/O.
	detachPatience = 5 * time.Second
)

func (n *Node) here(node volume.NodeID) error {
	if node != n.cfg.ID {
		return fmt.Errorf("this is node %s, not %s: %w", n.cfg.ID, node, volume.ErrUnavailable)
	}
	return nil
}

// pool returns an open pool of this node.
func (n *Node) pool(node volume.NodeID, id volume.PoolID) (Pool, error) {
	if err := n.here(node); err != nil {
		return nil, err
	}
	p, ok := n.pools[id]
	if !ok {
		return nil, fmt.Errorf("node %s has no open pool %s: %w", node, id, volume.ErrUnavailable)
	}
	return p, nil
}

// CreateReplica implements control.Agents.
func (n *Node) CreateReplica(ctx context.Context, node volume.NodeID, r control.ReplicaSpec) error {
	p, err := n.pool(node, r.Pool)
	if err != nil {
		return err
	}
	return p.CreateReplica(ctx, r)
}

// DeleteReplica implements control.Agents.
func (n *Node) DeleteReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) error {
	p, err := n.pool(node, pool)
	if err != nil {
		return err
	}
	if err := n.unused(ctx, id); err != nil {
		return err
	}
	if err := n.endReplicaExport(ctx, id); err != nil {
		return err
	}
	return n.host.drop(ctx, id, func() error { return p.DeleteReplica(ctx, id) })
}

// unused returns volume.ErrInUse while a replica belongs to a volume whose engine runs on this node.
func (n *Node) unused(ctx context.Context, id volume.ReplicaID) error {
	for _, v := range n.all() {
		i := v.get().inst
		if i == nil || !i.member(id) {
			continue
		}
		if _, err := n.learn(ctx, v, i); err != nil && !errors.Is(err, volume.ErrNotFound) {
			return err
		}
		if i.member(id) && !i.over() {
			return fmt.Errorf("replica %s is in use by volume %s on node %s; detach that first: %w", id, v.id, n.cfg.ID, volume.ErrInUse)
		}
	}
	return nil
}

// HasReplica implements control.Agents.
func (n *Node) HasReplica(_ context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) (bool, error) {
	p, err := n.pool(node, pool)
	if err != nil {
		return false, err
	}
	return p.HasReplica(id), nil
}

// ResizeReplica implements control.Agents.
func (n *Node) ResizeReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID, size int64) error {
	p, err := n.pool(node, pool)
	if err != nil {
		return err
	}
	return n.host.alone(ctx, id, func() error { return p.Resize(ctx, id, size) })
}

// DeleteSnapshot implements control.Agents.
func (n *Node) DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	p, err := n.pool(node, pool)
	if err != nil {
		return err
	}
	if err := n.notExported(string(id)); err != nil {
		return err
	}
	if err := n.digests.without(ctx, pool, id, func() error { return p.DeleteSnapshot(ctx, id, of, upTo) }); err != nil {
		return err
	}
	return n.host.forget(ctx, p, id, of, upTo)
}

// Detach implements control.Agents.
func (n *Node) Detach(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) (clean bool, err error) {
	if err := n.here(node); err != nil {
		return false, err
	}
	patience, cancel := context.WithTimeout(ctx, n.detachPatience)
	v, err := n.acquire(patience, id, false)
	cancel()
	if err != nil && ctx.Err() == nil && errors.Is(err, volume.ErrBusy) {
		// What holds the volume may wait for I/O that never ends, or for an engine that never serves. A detach must not.
		var i *instance
		if v, known := n.known(id); known {
			if i = v.get().inst; i != nil && i.epoch > epoch {
				return false, late(id, epoch, i.epoch)
			}
		}
		if err := n.abortDevices(ctx, id); err != nil {
			return false, err
		}
		if i != nil {
			if err := i.e.Close(); err != nil {
				return false, err
			}
		}
		v, err = n.acquire(ctx, id, false)
	}
	if err != nil {
		return false, err
	}
	if v == nil {
		return n.wasClean(ctx, id), nil
	}
	defer n.release(v)
	newest := v.rec.Epoch
	if v.inst != nil {
		newest = v.inst.epoch
	}
	if newest > epoch {
		return false, late(id, epoch, newest)
	}
	if v.eng != nil {
		if err := n.stop(ctx, v); err != nil {
			return false, err
		}
	}
	n.endInstance(v)
	if err := n.bury(v); err != nil {
		return false, err
	}
	return n.wasClean(ctx, id), nil
}

func late(id volume.ID, asked, newest volume.Epoch) error {
	return fmt.Errorf("volume %s: it was asked in epoch %d, epoch %d has begun here since: %w", id, asked, newest, volume.ErrStale)
}

// stop ends the device: cleanly where nobody uses the volume, and else by failing its I/O.
func (n *Node) stop(ctx context.Context, v *vol) error {
	if !v.rec.published() {
		err := n.detachStaged(ctx, v)
		if err == nil {
			return nil
		}
		n.log.Warn("clean detach failed; its I/O fails from now on", "volume", v.id, "err", err)
	} else {
		n.log.Warn("volume is taken away while it is published; its I/O fails from now on", "volume", v.id)
	}
	return n.abort(ctx, v)
}

func (n *Node) detachStaged(ctx context.Context, v *vol) error {
	for _, s := range v.rec.Stages {
		if err := mount.Unmount(s.Path); err != nil {
			return err
		}
	}
	return n.detach(ctx, v)
}

// SetQoS implements control.Agents.
func (n *Node) SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, q volume.QoS) error {
	if err := n.here(node); err != nil {
		return err
	}
	v, err := n.acquire(ctx, id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	if v.inst != nil && v.inst.epoch > epoch {
		return late(id, epoch, v.inst.epoch)
	}
	if v.eng != nil {
		v.eng.dev.SetLimits(q)
	}
	return nil
}

// Extents implements control.Agents.
func (n *Node) Extents(ctx context.Context, holder volume.Replica, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error {
	p, err := n.pool(holder.Node, holder.Pool)
	if err != nil {
		return err
	}
	return p.Extents(ctx, s, base, offset, func(off, length int64) error { return fn(control.Extent{Offset: off, Length: length}) })
}
