package agent

import (
	"context"
	"errors"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// extentPool is an extent store as a node's pool.
type extentPool struct{ *extentstore.Pool }

var _ Pool = extentPool{}

// CreateReplica implements Pool.
func (p extentPool) CreateReplica(ctx context.Context, r control.ReplicaSpec) error {
	return p.Pool.CreateReplica(ctx, extentstore.ReplicaSpec{ID: r.ID, Volume: r.Volume, Tenant: r.Tenant, Size: r.Size, Parent: r.Parent})
}

// OpenReplica implements Pool.
func (p extentPool) OpenReplica(ctx context.Context, id volume.ReplicaID) (engine.Store, volume.ID, error) {
	s, err := p.Pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, "", err
	}
	for _, r := range p.Pool.Replicas() {
		if r.ID == id {
			return s, r.Volume, nil
		}
	}
	return nil, "", errors.Join(volume.ErrNotFound, s.Close())
}

// Usage implements Pool.
func (p extentPool) Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64) {
	u := p.Pool.Usage()
	return u.Replicas, u.Snapshots
}
