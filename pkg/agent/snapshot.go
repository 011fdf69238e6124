package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// hold is a snapshot of several volumes that one volume's writes wait for.
type hold struct {
	number uint64
	// thaw ends the freeze of the filesystem; nil where there is none.
	thaw func() error
	// over is closed with the hold.
	over chan struct{}
}

func barrierOf(s control.SnapshotSpec) replication.Barrier {
	return replication.Barrier{
		Number: s.Barrier.Number, Snapshot: s.ID, Epoch: s.Barrier.Epoch, ConfigVersion: s.Barrier.ConfigVersion,
	}
}

// CutSnapshot implements control.Agents.
func (n *Node) CutSnapshot(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	if s.Barrier.Number == 0 {
		p, err := n.pool(node, s.Pool)
		if err != nil {
			return nil, err
		}
		return []volume.ReplicaID{s.Replica}, n.host.alone(ctx, s.Replica, func() error { return p.Cut(ctx, s.Replica, s.ID) })
	}
	v, i, err := n.engineOf(ctx, node, s.Volume, s.Barrier.Epoch)
	if err != nil {
		return nil, err
	}
	defer n.release(v)
	if h := v.held; h != nil && h.number == s.Barrier.Number {
		return i.e.CutGroup(ctx, h.number)
	}
	if i.drained == s.Barrier.Number {
		// Cut now it would be of another instant than the others of its group.
		return nil, fmt.Errorf("volume %s was held for snapshot %s, and its writes have gone on: %w", v.id, s.ID, volume.ErrBusy)
	}
	if err := n.pending(ctx, v, i, s); err != nil {
		return nil, err
	}
	thaw, err := n.freeze(ctx, v, s)
	if err != nil {
		return nil, err
	}
	cut, err := i.e.Snapshot(ctx, barrierOf(s))
	if thaw == nil {
		return cut.Holders, err
	}
	if late := thaw(); late != nil {
		// Writes may have gone on before the cut: it is not what was asked for.
		return nil, errors.Join(fmt.Errorf("volume %s: %w", v.id, late), err, volume.ErrBusy)
	}
	return cut.Holders, err
}

// pending returns volume.ErrBusy unless the controllers still want a snapshot: one that they gave up meanwhile is not to be cut.
func (n *Node) pending(ctx context.Context, v *vol, i *instance, s control.SnapshotSpec) error {
	m, err := n.learn(ctx, v, i)
	if b := m.Barrier; err == nil && (b == nil || b.Number != s.Barrier.Number) {
		err = fmt.Errorf("snapshot %s of volume %s was given up: %w", s.ID, v.id, volume.ErrBusy)
	}
	return err
}

// freeze freezes the volume's filesystem where that is asked for and there is one; else thaw is nil. The freeze is recorded
// first: a crash within it is mended by the next start.
func (n *Node) freeze(ctx context.Context, v *vol, s control.SnapshotSpec) (thaw func() error, err error) {
	if at := v.get(); !s.Freeze || v.eng == nil || at.anchor == "" || at.readOnly {
		return nil, nil
	}
	record := func(frozen bool) error {
		rec := v.rec.clone()
		rec.Frozen = frozen
		return n.save(v, rec)
	}
	if err := record(true); err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	end, err := n.cfg.Mounter.Freeze(wait, n.anchor(v.id), freezeHold)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("volume %s: no snapshot was cut: %w", v.id, err), record(false))
	}
	return func() error { return errors.Join(end(), record(false)) }, nil
}

// Drain implements control.Agents.
func (n *Node) Drain(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	v, i, err := n.engineOf(ctx, node, s.Volume, s.Barrier.Epoch)
	if err != nil {
		return err
	}
	defer n.release(v)
	switch {
	case v.held != nil && v.held.number == s.Barrier.Number:
		return nil
	case v.held != nil:
		if err := n.letGo(ctx, v, i); err != nil {
			return err
		}
	}
	if err := n.pending(ctx, v, i, s); err != nil {
		return err
	}
	thaw, err := n.freeze(ctx, v, s)
	if err != nil {
		return err
	}
	i.drained = s.Barrier.Number
	if err := i.e.Drain(ctx, barrierOf(s)); err != nil {
		if thaw != nil {
			err = errors.Join(err, thaw())
		}
		return err
	}
	h := &hold{number: s.Barrier.Number, thaw: thaw, over: make(chan struct{})}
	v.held = h
	n.spawn(func() { n.watchHold(v.id, h) })
	return nil
}

// watchHold ends a hold whose coordinator is gone: the engine lets its writes go on by itself, and the filesystem is thawed.
func (n *Node) watchHold(id volume.ID, h *hold) {
	select {
	case <-h.over:
		return
	case <-n.ctx.Done():
		return
	case <-time.After(time.Duration(n.cfg.Timing.BarrierWait)):
	}
	v, err := n.acquire(n.ctx, id, false)
	if err != nil || v == nil {
		return
	}
	defer n.release(v)
	if v.held != h || v.inst == nil {
		return
	}
	if err := n.letGo(n.ctx, v, v.inst); err != nil {
		n.log.Warn("writes of a volume were held for a snapshot that was given up", "volume", id, "err", err)
	}
}

// letGo lets a volume's writes go on.
func (n *Node) letGo(ctx context.Context, v *vol, i *instance) error {
	h := v.held
	if h == nil {
		return nil
	}
	v.held = nil
	close(h.over)
	_, err := i.e.Release(ctx, h.number)
	if errors.Is(err, volume.ErrBusy) {
		err = nil // they do already
	}
	if h.thaw != nil {
		err = errors.Join(err, h.thaw())
	}
	return err
}

// Release implements control.Agents.
func (n *Node) Release(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	if err := n.here(node); err != nil {
		return err
	}
	v, err := n.acquire(ctx, s.Volume, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	if v.held == nil || v.held.number != s.Barrier.Number || v.inst == nil {
		return nil
	}
	return n.letGo(ctx, v, v.inst)
}
