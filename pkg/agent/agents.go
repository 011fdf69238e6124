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
	if v := n.user(id); v != nil {
		return fmt.Errorf("replica %s is in use by volume %s on node %s; detach that first: %w", id, v.id, node, volume.ErrInUse)
	}
	n.endReplicaExport(id)
	return p.DeleteReplica(ctx, id)
}

// user returns the volume whose engine has a replica open.
func (n *Node) user(id volume.ReplicaID) *vol {
	for _, v := range n.all() {
		if v.get().replica == id {
			return v
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
	if err := p.Resize(ctx, id, size); err != nil {
		return err
	}
	user := n.user(id)
	if user == nil {
		return nil
	}
	v, err := n.acquire(ctx, user.id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	if v.eng == nil {
		return nil
	}
	return n.resizeDevice(ctx, v)
}

// CutSnapshot implements control.Agents.
func (n *Node) CutSnapshot(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	return []volume.ReplicaID{s.Replica}, n.cutSnapshot(ctx, node, s)
}

func (n *Node) cutSnapshot(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	p, err := n.pool(node, s.Pool)
	if err != nil {
		return err
	}
	if !s.Freeze {
		return p.Cut(ctx, s.Replica, s.ID)
	}
	v, err := n.acquire(ctx, s.Volume, false)
	if err != nil {
		return err
	}
	if v == nil {
		return p.Cut(ctx, s.Replica, s.ID)
	}
	defer n.release(v)
	if at := v.get(); v.eng == nil || at.anchor == "" || at.readOnly {
		return p.Cut(ctx, s.Replica, s.ID)
	}
	return n.cutFrozen(ctx, v, p, s)
}

// cutFrozen cuts a snapshot while the filesystem is frozen. The freeze is recorded first: a crash within it is mended by
// the next start.
func (n *Node) cutFrozen(ctx context.Context, v *vol, p Pool, s control.SnapshotSpec) (err error) {
	rec := v.rec.clone()
	rec.Frozen = true
	if err := n.save(v, rec); err != nil {
		return err
	}
	defer func() {
		rec := v.rec.clone()
		rec.Frozen = false
		err = errors.Join(err, n.save(v, rec))
	}()
	wait, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	thaw, err := n.cfg.Mounter.Freeze(wait, n.anchor(v.id), freezeHold)
	if err != nil {
		return fmt.Errorf("volume %s: no snapshot was cut: %w", v.id, err)
	}
	cut, stop := context.WithTimeout(ctx, freezeHold)
	defer stop()
	cutErr := p.Cut(cut, s.Replica, s.ID)
	if err := thaw(); err != nil {
		// Writes may have gone on before the cut: it is not what was asked for.
		return errors.Join(fmt.Errorf("volume %s: %w", v.id, err), cutErr, p.DeleteSnapshot(context.WithoutCancel(ctx), s.ID))
	}
	return cutErr
}

// DeleteSnapshot implements control.Agents.
func (n *Node) DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID) error {
	p, err := n.pool(node, pool)
	if err != nil {
		return err
	}
	if err := n.notExported(string(id)); err != nil {
		return err
	}
	return p.DeleteSnapshot(ctx, id)
}

// Detach implements control.Agents.
func (n *Node) Detach(ctx context.Context, node volume.NodeID, id volume.ID) (clean bool, err error) {
	err = n.takeAway(ctx, node, id)
	return err == nil, err
}

func (n *Node) takeAway(ctx context.Context, node volume.NodeID, id volume.ID) error {
	if err := n.here(node); err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, detachPatience)
	v, err := n.acquire(patience, id, false)
	cancel()
	if err != nil && ctx.Err() == nil && errors.Is(err, volume.ErrBusy) {
		// What holds the volume may wait for I/O that never ends. A detach must.
		if err := n.abortDevices(ctx, id); err != nil {
			return err
		}
		v, err = n.acquire(ctx, id, false)
	}
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	if v.eng != nil {
		if err := n.stop(ctx, v); err != nil {
			return err
		}
	}
	return n.bury(v)
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
func (n *Node) SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, q volume.QoS) error {
	if err := n.here(node); err != nil {
		return err
	}
	v, err := n.acquire(ctx, id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
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
