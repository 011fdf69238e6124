package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Groups are the use cases of group snapshots, under the same terms as Volumes.
type Groups interface {
	// CreateGroup returns when all snapshots are cut, at one instant; of one that fails nothing is left.
	CreateGroup(ctx context.Context, r control.CreateGroup) (control.Group, error)
	// DeleteGroup returns nil for a group that is not there.
	DeleteGroup(ctx context.Context, id volume.GroupID) error
	Group(ctx context.Context, id volume.GroupID) (control.Group, error)
}

// GroupController is the CSI GroupController service.
type GroupController struct {
	csi.UnimplementedGroupControllerServer
	groups Groups
	locks  *keylock.Locks
}

// NewGroupController makes the GroupController service. Locks may be shared; they outlive it and are closed by their owner.
func NewGroupController(g Groups, locks *keylock.Locks) *GroupController {
	return &GroupController{groups: g, locks: locks}
}

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (c *GroupController) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{
			Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}}}}, nil
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer.
func (c *GroupController) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	r := control.CreateGroup{Name: req.GetName()}
	if err := volume.CheckName("name", r.Name); err != nil {
		return nil, err
	}
	if n := len(req.GetSourceVolumeIds()); n == 0 || n > volume.MaxGroup {
		return nil, fmt.Errorf("source_volume_ids: %d of them, 1 to %d are possible: %w", n, volume.MaxGroup, volume.ErrInvalid)
	}
	for _, id := range req.GetSourceVolumeIds() {
		if err := required("source_volume_ids", id); err != nil {
			return nil, err
		}
		r.Volumes = append(r.Volumes, volume.ID(id))
	}
	slices.Sort(r.Volumes)
	r.Volumes = slices.Compact(r.Volumes)
	var err error
	if r.Freeze, err = parseSnapshotParameters(req.GetParameters()); err != nil {
		return nil, err
	}
	g, err := keylock.Do(ctx, c.locks, fmt.Sprintf("group named %q", r.Name), print("create", r),
		func(ctx context.Context) (control.Group, error) { return c.groups.CreateGroup(ctx, r) })
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: groupMessage(g)}, nil
}

func groupMessage(g control.Group) *csi.VolumeGroupSnapshot {
	m := &csi.VolumeGroupSnapshot{
		GroupSnapshotId: string(g.ID),
		CreationTime:    timestamppb.New(time.Unix(0, int64(g.CreatedAt))),
		ReadyToUse:      g.State == volume.Ready,
	}
	for _, s := range g.Members {
		m.Snapshots = append(m.Snapshots, snapshotMessage(s))
	}
	return m
}

// same returns volume.ErrInvalid unless ids are the group's snapshots, in any order.
func same(g control.Group, ids []string) error {
	have := slices.Clone(g.Snapshots)
	slices.Sort(have)
	var want []volume.SnapshotID
	for _, id := range ids {
		want = append(want, volume.SnapshotID(id))
	}
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fmt.Errorf("snapshot_ids are not the %d snapshots of group snapshot %s: %w", len(have), g.ID, volume.ErrInvalid)
	}
	return nil
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer.
func (c *GroupController) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	if err := required("group_snapshot_id", req.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	id := volume.GroupID(req.GetGroupSnapshotId())
	g, err := c.groups.Group(ctx, id)
	if err == nil {
		err = same(g, req.GetSnapshotIds())
	}
	if errors.Is(err, volume.ErrNotFound) {
		return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = keylock.Do(ctx, c.locks, "group "+string(id), "delete", func(ctx context.Context) (nothing, error) {
		return nothing{}, c.groups.DeleteGroup(ctx, id)
	})
	if err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (c *GroupController) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if err := required("group_snapshot_id", req.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	g, err := c.groups.Group(ctx, volume.GroupID(req.GetGroupSnapshotId()))
	if err == nil {
		err = same(g, req.GetSnapshotIds())
	}
	if err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: groupMessage(g)}, nil
}
