package agent

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/control"
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
func (p extentPool) OpenReplica(ctx context.Context, id volume.ReplicaID) (Replica, error) {
	r, err := p.Pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Usage implements Pool.
func (p extentPool) Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64) {
	u := p.Pool.Usage()
	return u.Replicas, u.Snapshots
}
