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

// CreateSnapshot implements csi.ControllerServer.
func (c *Controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := required("source_volume_id", req.GetSourceVolumeId()); err != nil {
		return nil, err
	}
	r := control.CreateSnapshot{Name: req.GetName(), Volume: volume.ID(req.GetSourceVolumeId())}
	if err := volume.CheckName("name", r.Name); err != nil {
		return nil, err
	}
	var err error
	if r.Freeze, err = parseSnapshotParameters(req.GetParameters()); err != nil {
		return nil, err
	}
	if err := c.checkUsableFrom(ctx, r.Volume, req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	s, err := keylock.Do(ctx, c.locks, fmt.Sprintf("snapshot named %q", r.Name), print("create", r),
		func(ctx context.Context) (volume.Snapshot, error) { return c.cluster.CreateSnapshot(ctx, r) })
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshotMessage(s)}, nil
}

// checkUsableFrom returns volume.ErrNoSpace unless a snapshot of the volume meets the topology: one of a volume that must be
// local is where the replicas are, any other can be used from everywhere.
func (c *Controller) checkUsableFrom(ctx context.Context, id volume.ID, t *csi.TopologyRequirement) error {
	requisite, _, err := requirement(t)
	if err != nil || len(requisite) == 0 {
		return err
	}
	v, err := c.cluster.Volume(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		return nil // a repeat may come after the volume was deleted
	}
	if err != nil {
		return err
	}
	for _, n := range requisite {
		if v.Parameters.DataLocality != volume.LocalityRequired {
			if _, err = c.cluster.Node(ctx, n); !errors.Is(err, volume.ErrNotFound) {
				return err
			}
		} else if slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Node == n }) {
			return nil
		}
	}
	return fmt.Errorf("a snapshot of volume %s can be used from no requisite topology: %w", id, volume.ErrNoSpace)
}

func snapshotMessage(s volume.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:         string(s.ID),
		SourceVolumeId:     string(s.Volume),
		SizeBytes:          s.Size,
		CreationTime:       timestamppb.New(time.Unix(0, int64(s.CreatedAt))),
		ReadyToUse:         s.State == volume.Ready,
		GroupSnapshotId:    string(s.Group),
		AccessibleTopology: accessible(s.DataLocality, s.Holders),
	}
}

// DeleteSnapshot implements csi.ControllerServer.
func (c *Controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if err := required("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	id := volume.SnapshotID(req.GetSnapshotId())
	_, err := keylock.Do(ctx, c.locks, "snapshot "+string(id), "delete", func(ctx context.Context) (nothing, error) {
		return nothing{}, c.cluster.DeleteSnapshot(ctx, id)
	})
	if err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot implements csi.ControllerServer.
func (c *Controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if err := required("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	s, err := c.cluster.Snapshot(ctx, volume.SnapshotID(req.GetSnapshotId()))
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshotMessage(s)}, nil
}

// ListSnapshots implements csi.ControllerServer.
func (c *Controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	p, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	f := control.SnapshotFilter{Volume: volume.ID(req.GetSourceVolumeId()), Snapshot: volume.SnapshotID(req.GetSnapshotId())}
	list, next, err := c.cluster.Snapshots(ctx, f, p)
	if errors.Is(err, volume.ErrNotFound) {
		return &csi.ListSnapshotsResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, s := range list {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshotMessage(s)})
	}
	return resp, nil
}
