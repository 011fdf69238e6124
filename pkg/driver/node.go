package driver

import (
	"context"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Host is what the Node service needs of the node that it runs on. Every method may be called again after it was cut
// off, and then goes on. Errors wrap the sentinels of package volume.
type Host interface {
	ID() volume.NodeID
	// Stage returns volume.ErrExists if the path is staged with another capability, volume.ErrInUse if the volume is not
	// attached here or cannot be used in that way.
	Stage(ctx context.Context, s agent.Stage) error
	// Unstage returns nil for what is not staged.
	Unstage(ctx context.Context, id volume.ID, path string) error
	// Publish returns volume.ErrExists if the path is published with other arguments, volume.ErrInUse if the volume is not
	// staged or its access mode allows no second path.
	Publish(ctx context.Context, p agent.Publish) error
	// Unpublish returns nil for what is not published.
	Unpublish(ctx context.Context, id volume.ID, path string) error
	// Stats and Expand return volume.ErrNotFound for a volume that is not in use at the path.
	Stats(ctx context.Context, id volume.ID, path string) (agent.Usage, error)
	Expand(ctx context.Context, e agent.Expand) (int64, error)
	Health(ctx context.Context, id volume.ID) ([]volume.Condition, error)
	// StorageHealth returns each reason once.
	StorageHealth() []volume.Condition
}

// Node is the CSI Node service.
type Node struct {
	csi.UnimplementedNodeServer
	host  Host
	locks *keylock.Locks
}

// NewNode makes the Node service. Locks may be shared; they outlive it and are closed by their owner.
func NewNode(h Host, locks *keylock.Locks) *Node {
	return &Node{host: h, locks: locks}
}

// NodeGetInfo implements csi.NodeServer.
func (n *Node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	id := string(n.host.ID())
	return &csi.NodeGetInfoResponse{
		NodeId:             id,
		MaxVolumesPerNode:  volume.MaxAttached,
		AccessibleTopology: &csi.Topology{Segments: map[string]string{volume.TopologyKey: id}},
	}, nil
}

// NodeGetCapabilities implements csi.NodeServer.
func (n *Node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return resp, nil
}

// requiredAll takes pairs of a field's name and value.
func requiredAll(pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := required(pairs[i], pairs[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// pathKey is the key of calls for a volume at a path. Calls for other paths of the volume may run at once: the host
// orders them.
func pathKey(id, path string) string {
	return "path " + filepath.Clean(path) + " of volume " + id
}

// NodeStageVolume implements csi.NodeServer.
func (n *Node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := requiredAll("volume_id", req.GetVolumeId(), "staging_target_path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	c, err := capability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	s := agent.Stage{Volume: volume.ID(req.GetVolumeId()), Path: req.GetStagingTargetPath(), Capability: c}
	_, err = keylock.Do(ctx, n.locks, pathKey(req.GetVolumeId(), s.Path), print("stage", s),
		func(ctx context.Context) (nothing, error) { return nothing{}, n.host.Stage(ctx, s) })
	return &csi.NodeStageVolumeResponse{}, err
}

// NodeUnstageVolume implements csi.NodeServer.
func (n *Node) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	id, path := req.GetVolumeId(), req.GetStagingTargetPath()
	if err := requiredAll("volume_id", id, "staging_target_path", path); err != nil {
		return nil, err
	}
	_, err := keylock.Do(ctx, n.locks, pathKey(id, path), "unstage",
		func(ctx context.Context) (nothing, error) { return nothing{}, n.host.Unstage(ctx, volume.ID(id), path) })
	return &csi.NodeUnstageVolumeResponse{}, err
}

// NodePublishVolume implements csi.NodeServer.
func (n *Node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := requiredAll("volume_id", req.GetVolumeId(), "target_path", req.GetTargetPath()); err != nil {
		return nil, err
	}
	c, err := capability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	p := agent.Publish{
		Volume: volume.ID(req.GetVolumeId()), Staging: req.GetStagingTargetPath(), Path: req.GetTargetPath(),
		Capability: c, ReadOnly: req.GetReadonly(),
	}
	_, err = keylock.Do(ctx, n.locks, pathKey(req.GetVolumeId(), p.Path), print("publish", p),
		func(ctx context.Context) (nothing, error) { return nothing{}, n.host.Publish(ctx, p) })
	return &csi.NodePublishVolumeResponse{}, err
}

// NodeUnpublishVolume implements csi.NodeServer.
func (n *Node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	id, path := req.GetVolumeId(), req.GetTargetPath()
	if err := requiredAll("volume_id", id, "target_path", path); err != nil {
		return nil, err
	}
	_, err := keylock.Do(ctx, n.locks, pathKey(id, path), "unpublish",
		func(ctx context.Context) (nothing, error) {
			return nothing{}, n.host.Unpublish(ctx, volume.ID(id), path)
		})
	return &csi.NodeUnpublishVolumeResponse{}, err
}

// NodeGetVolumeStats implements csi.NodeServer.
func (n *Node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := requiredAll("volume_id", req.GetVolumeId(), "volume_path", req.GetVolumePath()); err != nil {
		return nil, err
	}
	u, err := n.host.Stats(ctx, volume.ID(req.GetVolumeId()), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	bytes := &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: u.Total, Used: u.Used, Available: u.Available}
	resp := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{bytes}}
	if u.Access == volume.AccessMount {
		resp.Usage = append(resp.Usage, &csi.VolumeUsage{
			Unit: csi.VolumeUsage_INODES, Total: u.TotalInodes, Used: u.UsedInodes, Available: u.AvailableInodes,
		})
	}
	return resp, nil
}

// NodeExpandVolume implements csi.NodeServer.
func (n *Node) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := requiredAll("volume_id", req.GetVolumeId(), "volume_path", req.GetVolumePath()); err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		if _, err := capability(req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	least, most, err := checkRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	e := agent.Expand{Volume: volume.ID(req.GetVolumeId()), Path: req.GetVolumePath(), RequiredBytes: least, LimitBytes: most}
	// Calls for several paths of a volume grow the same filesystem; the host orders them.
	size, err := keylock.Do(ctx, n.locks, "size at "+pathKey(req.GetVolumeId(), e.Path), print("expand", e),
		func(ctx context.Context) (int64, error) { return n.host.Expand(ctx, e) })
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

// NodeGetVolumeHealth implements csi.NodeServer.
func (n *Node) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	id := volume.ID(req.GetVolumeId())
	conditions, err := n.host.Health(ctx, id)
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: volumeHealth(id, conditions)}, nil
}

// NodeGetStorageHealth implements csi.NodeServer.
func (n *Node) NodeGetStorageHealth(context.Context, *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	resp := &csi.NodeGetStorageHealthResponse{}
	for _, c := range n.host.StorageHealth() {
		status := csi.StorageHealthErrorType_STORAGE_DEGRADED
		if c.Severity != volume.Degraded {
			status = csi.StorageHealthErrorType_STORAGE_UNREACHABLE
		}
		resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: status, Reason: c.Reason, Message: c.Message,
		})
	}
	return resp, nil
}
