package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ExpandVolume implements control.Agents.
func (n *Node) ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, size int64) error {
	return n.ResizeReplica(ctx, r.Node, r.Pool, r.ID, size)
}

// Fence implements control.Agents. A replica is written by this node's own device only: there is nothing to refuse where
// none uses it, and no lease.
func (n *Node) Fence(_ context.Context, r volume.Replica, id volume.ID, _ volume.Epoch) (time.Duration, error) {
	p, err := n.pool(r.Node, r.Pool)
	if err != nil {
		return 0, err
	}
	if !p.HasReplica(r.ID) {
		return 0, fmt.Errorf("pool %s has no replica %s: %w", r.Pool, r.ID, volume.ErrNotFound)
	}
	if n.user(r.ID) != nil {
		return 0, fmt.Errorf("replica %s is in use by volume %s on node %s; detach that: %w", r.ID, id, n.cfg.ID, volume.ErrBusy)
	}
	return 0, nil
}

// Inspect implements control.Agents.
func (n *Node) Inspect(_ context.Context, r volume.Replica, _ volume.ID) (control.ReplicaReport, error) {
	p, err := n.pool(r.Node, r.Pool)
	if err != nil {
		return control.ReplicaReport{}, err
	}
	return control.ReplicaReport{Present: p.HasReplica(r.ID), Role: r.Role}, nil
}

// oneReplica is what this node answers where several replicas are to act together.
func (n *Node) oneReplica(node volume.NodeID, id volume.ID) error {
	if err := n.here(node); err != nil {
		return err
	}
	return fmt.Errorf("node %s runs volumes of one replica only, not %s: %w", node, id, volume.ErrUnavailable)
}

// OpenEngine implements control.Agents.
func (n *Node) OpenEngine(_ context.Context, node volume.NodeID, id volume.ID, _ volume.Epoch) error {
	return n.oneReplica(node, id)
}

// Evict implements control.Agents.
func (n *Node) Evict(_ context.Context, node volume.NodeID, id volume.ID, _ volume.ReplicaID) error {
	return n.oneReplica(node, id)
}

// Drain implements control.Agents.
func (n *Node) Drain(_ context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	return n.oneReplica(node, s.Volume)
}

// Release implements control.Agents.
func (n *Node) Release(_ context.Context, node volume.NodeID, _ control.SnapshotSpec) error {
	return n.here(node)
}
