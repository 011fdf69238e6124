package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Volumes are the use cases of volumes. Every method may be called again after it was cut off, and then goes on. Errors
// wrap the sentinels of package volume; one that is final means that nothing was changed.
type Volumes interface {
	// CreateVolume returns the volume of that name if it is compatible, volume.ErrExists if not.
	CreateVolume(ctx context.Context, r control.CreateVolume) (volume.Volume, error)
	// DeleteVolume returns nil for a volume that is not there, volume.ErrInUse for one that is attached.
	DeleteVolume(ctx context.Context, id volume.ID) error
	Volume(ctx context.Context, id volume.ID) (volume.Volume, error)
	Volumes(ctx context.Context, p control.Page) ([]volume.Volume, string, error)
	// Attach returns volume.ErrNotFound for an unknown volume or node, volume.ErrExists if the volume is attached to
	// that node in another way, volume.ErrInUse, naming the node, if it is attached to another, and volume.ErrNoSpace if
	// the node takes no more volumes.
	Attach(ctx context.Context, r control.Attach) (volume.Volume, error)
	// Detach returns when the node's workloads cannot write any more; nil for a volume that is not there or not attached.
	// Node "" means all.
	Detach(ctx context.Context, id volume.ID, node volume.NodeID) error
	// ExpandVolume takes sizes in bytes; 0 is not given.
	ExpandVolume(ctx context.Context, id volume.ID, required, limit int64) (volume.Volume, error)
	ModifyVolume(ctx context.Context, id volume.ID, q control.Modify) (volume.Volume, error)
	Capacity(ctx context.Context, q control.CapacityQuery) (control.Capacity, error)
	// Node returns volume.ErrNotFound for one that is not known.
	Node(ctx context.Context, id volume.NodeID) (volume.Node, error)
	Health(ctx context.Context, id volume.ID) (control.Health, error)
	// Unhealthy lists the volumes that have conditions.
	Unhealthy(ctx context.Context, p control.Page) ([]control.Health, string, error)
}

// Snapshots are the use cases of snapshots, under the same terms as Volumes.
type Snapshots interface {
	// CreateSnapshot returns when the snapshot is cut: writes that are made later are not in it.
	CreateSnapshot(ctx context.Context, r control.CreateSnapshot) (volume.Snapshot, error)
	// DeleteSnapshot returns nil for a snapshot that is not there.
	DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error
	Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error)
	Snapshots(ctx context.Context, f control.SnapshotFilter, p control.Page) ([]volume.Snapshot, string, error)
}

// Cluster is what the Controller service needs.
type Cluster interface {
	Volumes
	Snapshots
}

// Controller is the CSI Controller service.
type Controller struct {
	csi.UnimplementedControllerServer
	cluster Cluster
	locks   *keylock.Locks
}

// NewController makes the Controller service. Locks may be shared; they outlive it and are closed by their owner.
func NewController(c Cluster, locks *keylock.Locks) *Controller {
	return &Controller{cluster: c, locks: locks}
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (c *Controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_READONLY,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return resp, nil
}

// GetCapacity implements csi.ControllerServer. Capabilities or a topology that no volume can have leave no capacity.
func (c *Controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	p, err := parseParameters(req.GetParameters(), nil)
	if err != nil {
		return nil, err
	}
	q := control.CapacityQuery{Parameters: p.Parameters}
	mounted := len(req.GetVolumeCapabilities()) == 0
	for _, in := range req.GetVolumeCapabilities() {
		v, err := capability(in)
		if err != nil {
			return &csi.GetCapacityResponse{}, nil
		}
		mounted = mounted || v.Access == volume.AccessMount
		if q.Parameters.FSType == "" {
			q.Parameters.FSType = v.FSType
		}
	}
	if !mounted {
		q.Parameters.FSType = "" // raw devices may be smaller than a filesystem
	}
	if t := req.GetAccessibleTopology(); len(t.GetSegments()) > 0 {
		node, ok := topologyNode(t)
		if !ok {
			return &csi.GetCapacityResponse{}, nil
		}
		q.Node = node
	}
	got, err := c.cluster.Capacity(ctx, q)
	if errors.Is(err, volume.ErrNotFound) { // a pool or a node that is not there has no room
		return &csi.GetCapacityResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: max(0, got.Available),
		MaximumVolumeSize: wrapperspb.Int64(max(0, got.MaximumVolume)),
		MinimumVolumeSize: wrapperspb.Int64(max(0, got.MinimumVolume)),
	}, nil
}

// page translates the paging fields that all lists have.
func page(maxEntries int32, token string) (control.Page, error) {
	if maxEntries < 0 {
		return control.Page{}, fmt.Errorf("max_entries is negative: %w", volume.ErrInvalid)
	}
	return control.Page{Max: int(maxEntries), Token: token}, nil
}

// print is a call's fingerprint: two calls on one key join if it is the same.
func print(op string, request any) string {
	b, err := json.Marshal(request)
	if err != nil {
		panic(fmt.Sprintf("%T cannot be encoded: %v", request, err))
	}
	return op + " " + string(b)
}

func volumeKey(id volume.ID) string { return "volume " + string(id) }

// nothing is the result of calls that have none.
type nothing struct{}
