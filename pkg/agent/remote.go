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

// ExpandVolume implements control.Agents.
func (n *Node) ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch, size int64) error {
	v, i, err := n.engineIn(ctx, r.Node, id, epoch)
	if err != nil {
		return err
	}
	defer n.release(v)
	if _, err := n.learn(ctx, v, i); err != nil {
		return err
	}
	if err := i.grown(ctx, size); errors.Is(err, volume.ErrNoSpace) {
		return fmt.Errorf("volume %s: %w", id, err)
	} else if err != nil {
		return fmt.Errorf("volume %s is not grown yet (%s): %w: %w", id, why(i.e.Status()), err, volume.ErrUnavailable)
	}
	if v.eng == nil {
		return nil
	}
	return n.resizeDevice(ctx, v)
}

// growLook is how often it is looked whether an engine exposes a size.
const growLook = 5 * time.Millisecond

// grown waits until the engine exposes a size; volume.ErrNoSpace: a replica has no room for it.
func (i *instance) grown(ctx context.Context, size int64) error {
	tick := time.NewTicker(growLook)
	defer tick.Stop()
	for i.e.Size() < size {
		for _, m := range i.e.Status().Members {
			if m.InSync && m.NoRoom >= size {
				return fmt.Errorf("replica %s on node %s has no room to grow to %d bytes: %w", m.ID, m.Node, m.NoRoom, volume.ErrNoSpace)
			}
		}
		select {
		case <-tick.C:
		case <-i.e.Over():
			return i.e.Live(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Fence implements control.Agents.
func (n *Node) Fence(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch) (time.Duration, error) {
	if _, err := n.pool(r.Node, r.Pool); err != nil {
		return 0, err
	}
	answers := make(chan replication.Message, 1)
	ended := make(chan error, 1)
	c, err := n.Connect(ctx, id, r.ID, func(m *replication.Message) { answers <- *m }, func(err error) { ended <- err })
	if err != nil {
		return 0, err
	}
	defer c.Close()
	// A session that nobody has had: the same fence may be asked for again.
	c.Send(&replication.Message{
		Kind: replication.KindFence, Volume: id, Replica: r.ID, Epoch: epoch, Session: replication.Session(time.Now().UnixNano()), Op: 1,
	})
	select {
	case a := <-answers:
		switch {
		case a.Status == replication.StatusOK && a.Fence != nil:
			return time.Duration(a.Fence.LeaseLeft), nil
		case a.Status == replication.StatusStaleEpoch:
			// It refuses that already, and for how long its last engine is served is not said.
			return time.Duration(n.cfg.Timing.Lease + n.cfg.Timing.LeaseMargin), nil
		}
		return 0, fmt.Errorf("replica %s cannot be fenced (%v): %w", r.ID, a.Status, volume.ErrUnavailable)
	case err := <-ended:
		return 0, err
	case <-ctx.Done():
		return 0, fmt.Errorf("replica %s has I/O under way that does not end: %w: %w", r.ID, ctx.Err(), volume.ErrUnavailable)
	}
}

var roles = map[replication.Role]volume.ReplicaRole{
	replication.RoleISR: volume.InSync, replication.RoleSTALE: volume.Stale, replication.RoleSYNC: volume.Filling, replication.RoleNEW: volume.Filling,
}

// Inspect implements control.Agents.
func (n *Node) Inspect(ctx context.Context, r volume.Replica, _ volume.ID) (control.ReplicaReport, error) {
	if _, err := n.pool(r.Node, r.Pool); err != nil {
		return control.ReplicaReport{}, err
	}
	x, err := n.host.find(r.ID)
	if err != nil {
		return control.ReplicaReport{}, nil // there is none
	}
	var out control.ReplicaReport
	err = x.locked(ctx, func() error {
		if err := n.host.open(ctx, x); err != nil {
			return err
		}
		s, err := replication.ReadState(x.store.State())
		out = control.ReplicaReport{
			Present: true, Role: roles[s.Role], Poisoned: s.Poisoned, Lineage: uint64(s.Lineage), Epoch: s.Epoch,
			ConfigVersion: s.ConfigVersion, LastFlush: x.pool.LastFlush(r.ID), Size: x.store.Size(),
		}
		return err
	}, nil)
	if err != nil {
		return control.ReplicaReport{}, err
	}
	return out, nil
}

// OpenEngine implements control.Agents.
func (n *Node) OpenEngine(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) error {
	v, i, err := n.engineOf(ctx, node, id, epoch)
	if err != nil {
		return err
	}
	defer n.release(v)
	_, err = n.learn(ctx, v, i)
	return err
}

// evictLook is how often it is looked whether a replica has left the in-sync set.
const evictLook = 10 * time.Millisecond

// Evict implements control.Agents.
func (n *Node) Evict(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, r volume.ReplicaID) error {
	v, i, err := n.engineIn(ctx, node, id, epoch)
	if err != nil {
		return err
	}
	defer n.release(v)
	c, err := n.connected()
	if err != nil {
		return err
	}
	tick := time.NewTicker(evictLook)
	defer tick.Stop()
	for {
		m, err := c.Membership(ctx, id)
		if err != nil {
			return err
		}
		a, there := m.Member(r)
		switch {
		case !there || a.Role != replication.RoleISR:
			return nil
		case len(m.ISR()) == 1:
			return fmt.Errorf("replica %s is the only one of volume %s that is in sync: %w", r, id, volume.ErrInUse)
		}
		i.e.Evict(r)
		select {
		case <-tick.C:
		case <-i.e.Over():
			return i.e.Live(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
