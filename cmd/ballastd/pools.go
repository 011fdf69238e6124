package main

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/metrics"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// measuredPool is a pool as the agent wants it, with the I/O of its open replicas counted.
type measuredPool struct {
	*extentstore.Pool
	metrics *metrics.Metrics
}

var _ agent.Pool = measuredPool{}

// CreateReplica implements agent.Pool.
func (p measuredPool) CreateReplica(ctx context.Context, r control.ReplicaSpec) error {
	return p.Pool.CreateReplica(ctx, extentstore.ReplicaSpec{ID: r.ID, Volume: r.Volume, Tenant: r.Tenant, Size: r.Size, Parent: r.Parent})
}

// Usage implements agent.Pool.
func (p measuredPool) Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64) {
	u := p.Pool.Usage()
	return u.Replicas, u.Snapshots
}

// OpenReplica implements agent.Pool.
func (p measuredPool) OpenReplica(ctx context.Context, id volume.ReplicaID) (agent.Replica, error) {
	dev, err := p.Pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, r := range p.Pool.Replicas() {
		if r.ID == id {
			forget := func() { p.metrics.Forget(r.Volume) }
			return measuredReplica{Device: p.metrics.Device(r.Volume, dev), close: dev.Close, forget: forget}, nil
		}
	}
	return dev, nil
}

type measuredReplica struct {
	block.Device
	close  func() error
	forget func()
}

// Close implements agent.Replica.
func (r measuredReplica) Close() error {
	defer r.forget()
	return r.close()
}
