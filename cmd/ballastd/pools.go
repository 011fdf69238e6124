package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
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
func (p measuredPool) OpenReplica(ctx context.Context, id volume.ReplicaID) (engine.Store, volume.ID, error) {
	store, err := p.Pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, "", err
	}
	for _, r := range p.Pool.Replicas() {
		if r.ID == id {
			return &measuredReplica{Store: store, dev: p.metrics.Device(r.Volume, store), forget: func() { p.metrics.Forget(r.Volume) }}, r.Volume, nil
		}
	}
	return nil, "", errors.Join(fmt.Errorf("replica %s: %w", id, volume.ErrNotFound), store.Close())
}

// measuredReplica is an open replica whose I/O is counted.
type measuredReplica struct {
	engine.Store
	dev    block.Device
	forget func()
}

func (r *measuredReplica) ReadAt(ctx context.Context, p []byte, off int64) error {
	return r.dev.ReadAt(ctx, p, off)
}

func (r *measuredReplica) WriteAt(ctx context.Context, p []byte, off int64) error {
	return r.dev.WriteAt(ctx, p, off)
}

func (r *measuredReplica) Zero(ctx context.Context, off, n int64) error {
	return r.dev.Zero(ctx, off, n)
}

func (r *measuredReplica) Flush(ctx context.Context) error { return r.dev.Flush(ctx) }

// Close implements engine.Store.
func (r *measuredReplica) Close() error {
	defer r.forget()
	return r.Store.Close()
}
