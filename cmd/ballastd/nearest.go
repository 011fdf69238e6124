package main

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// nearest is what the node of a controller asks: its own controller while that knows who leads, else another. One that the
// network has cut off from the leader alone would follow no more, and volumes here would wait, although a majority works.
type nearest struct {
	own, others agent.Cluster
	// led tells whether the own controller knows who leads.
	led func() bool
}

var _ agent.Cluster = nearest{}

func (n nearest) ask() agent.Cluster {
	if n.led() {
		return n.own
	}
	return n.others
}

func (n nearest) Record(ctx context.Context, id volume.ID) (volume.Volume, error) {
	return n.ask().Record(ctx, id)
}

func (n nearest) SetFilesystem(ctx context.Context, id volume.ID, fs volume.Filesystem) error {
	return n.ask().SetFilesystem(ctx, id, fs)
}

func (n nearest) RegisterNode(ctx context.Context, node volume.Node) error {
	return n.ask().RegisterNode(ctx, node)
}

func (n nearest) ReportUsage(ctx context.Context, node volume.NodeID, u control.Usage) error {
	return n.ask().ReportUsage(ctx, node, u)
}

func (n nearest) AddHolder(ctx context.Context, id volume.SnapshotID, r volume.ReplicaID) error {
	return n.ask().AddHolder(ctx, id, r)
}

func (n nearest) Ended(ctx context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error) {
	return n.ask().Ended(ctx, engines)
}

func (n nearest) Commit(ctx context.Context, id volume.ID, c replication.Change) (replication.Membership, error) {
	return n.ask().Commit(ctx, id, c)
}

func (n nearest) Membership(ctx context.Context, id volume.ID) (replication.Membership, error) {
	return n.ask().Membership(ctx, id)
}
