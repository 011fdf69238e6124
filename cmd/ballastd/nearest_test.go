package main

import (
	"context"
	"testing"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// askedCluster counts what it is asked.
type askedCluster int

func (a *askedCluster) Record(context.Context, volume.ID) (volume.Volume, error) {
	*a++
	return volume.Volume{}, nil
}

func (a *askedCluster) SetFilesystem(context.Context, volume.ID, volume.Filesystem) error {
	*a++
	return nil
}

func (a *askedCluster) RegisterNode(context.Context, volume.Node) error { *a++; return nil }

func (a *askedCluster) ReportUsage(context.Context, volume.NodeID, control.Usage) error {
	*a++
	return nil
}

func (a *askedCluster) AddHolder(context.Context, volume.SnapshotID, volume.ReplicaID) error {
	*a++
	return nil
}

func (a *askedCluster) Ended(context.Context, map[volume.ID]volume.Epoch) ([]volume.ID, error) {
	*a++
	return nil, nil
}

func (a *askedCluster) Commit(context.Context, volume.ID, replication.Change) (replication.Membership, error) {
	*a++
	return replication.Membership{}, nil
}

func (a *askedCluster) Membership(context.Context, volume.ID) (replication.Membership, error) {
	*a++
	return replication.Membership{}, nil
}

// A node asks its own controller while that knows who leads, and others while it does not.
func TestNearest(t *testing.T) {
	var own, others askedCluster
	led := true
	n := nearest{own: &own, others: &others, led: func() bool { return led }}
	calls := func(c agent.Cluster) (errs int) {
		ctx := t.Context()
		_, e1 := c.Record(ctx, "v")
		_, e2 := c.Commit(ctx, "v", replication.Change{})
		_, e3 := c.Membership(ctx, "v")
		_, e4 := c.Ended(ctx, nil)
		for _, err := range []error{e1, e2, e3, e4, c.SetFilesystem(ctx, "v", volume.Filesystem{}), c.RegisterNode(ctx, volume.Node{}),
			c.ReportUsage(ctx, "n", control.Usage{}), c.AddHolder(ctx, "s", "r")} {
			if err != nil {
				t.Error(err)
			}
			errs++
		}
		return errs
	}
	made := calls(n)
	if int(own) != made || others != 0 {
		t.Errorf("while one leads: own %d, others %d of %d calls", own, others, made)
	}
	led = false
	calls(n)
	if int(own) != made || int(others) != made {
		t.Errorf("while nobody leads: own %d, others %d of %d calls", own, others, made)
	}
}
