package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxBatch bounds the runs in one message of a stream: 32 KiB or less.
const maxBatch = 1024

// Extents tells which bytes of a snapshot there are, or differ.
type Extents interface {
	Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error)
	// Extents calls fn with the runs of a snapshot that may differ from base, or with base "" were ever written, in
	// order and not overlapping, from offset on. It stops at fn's first error and returns it.
	Extents(ctx context.Context, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error
}

// SnapshotMetadata is the CSI SnapshotMetadata service.
type SnapshotMetadata struct {
	csi.UnimplementedSnapshotMetadataServer
	extents Extents
}

// NewSnapshotMetadata makes the SnapshotMetadata service.
func NewSnapshotMetadata(e Extents) *SnapshotMetadata { return &SnapshotMetadata{extents: e} }

// GetMetadataAllocated implements csi.SnapshotMetadataServer.
func (m *SnapshotMetadata) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	target, err := m.snapshot(stream.Context(), "snapshot_id", req.GetSnapshotId())
	if err != nil {
		return err
	}
	return m.send(stream.Context(), target, "", req.GetStartingOffset(), req.GetMaxResults(), func(b []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataAllocatedResponse{
			BlockMetadataType:   csi.BlockMetadataType_VARIABLE_LENGTH,
			VolumeCapacityBytes: target.Size,
			BlockMetadata:       b,
		})
	})
}

// GetMetadataDelta implements csi.SnapshotMetadataServer.
func (m *SnapshotMetadata) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, stream csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	base, err := m.snapshot(stream.Context(), "base_snapshot_id", req.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	target, err := m.snapshot(stream.Context(), "target_snapshot_id", req.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	if base.Volume != target.Volume {
		return fmt.Errorf("snapshot %s is of volume %s, %s of %s: %w", base.ID, base.Volume, target.ID, target.Volume, volume.ErrInvalid)
	}
	return m.send(stream.Context(), target, base.ID, req.GetStartingOffset(), req.GetMaxResults(), func(b []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataDeltaResponse{
			BlockMetadataType:   csi.BlockMetadataType_VARIABLE_LENGTH,
			VolumeCapacityBytes: target.Size,
			BlockMetadata:       b,
		})
	})
}

func (m *SnapshotMetadata) snapshot(ctx context.Context, field, id string) (volume.Snapshot, error) {
	if err := required(field, id); err != nil {
		return volume.Snapshot{}, err
	}
	s, err := m.extents.Snapshot(ctx, volume.SnapshotID(id))
	if err == nil && s.State != volume.Ready {
		err = fmt.Errorf("snapshot %s is %s, not ready: %w", id, s.State, volume.ErrInUse)
	}
	return s, err
}

// send sends the runs of a snapshot in batches: joined where they touch, and cut to [offset, size).
func (m *SnapshotMetadata) send(ctx context.Context, s volume.Snapshot, base volume.SnapshotID, offset int64, maxResults int32,
	send func([]*csi.BlockMetadata) error) error {
	if offset < 0 || offset > s.Size {
		return fmt.Errorf("starting_offset %d is outside snapshot %s of %d bytes: %w", offset, s.ID, s.Size, volume.ErrOutOfRange)
	}
	if maxResults < 0 {
		return fmt.Errorf("max_results is negative: %w", volume.ErrInvalid)
	}
	limit := maxBatch
	if maxResults > 0 {
		limit = min(limit, int(maxResults))
	}
	var batch []*csi.BlockMetadata
	sent, end := false, offset
	err := m.extents.Extents(ctx, s.ID, base, offset, func(e control.Extent) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, to := max(e.Offset, offset), min(e.Offset+e.Length, s.Size)
		if from >= to {
			return nil
		}
		if from < end {
			return fmt.Errorf("the extents of snapshot %s are not in order: %d after %d", s.ID, from, end)
		}
		if n := len(batch); n > 0 && from == end {
			batch[n-1].SizeBytes += to - from
			end = to
			return nil
		}
		if len(batch) == limit {
			if err := send(batch); err != nil {
				return err
			}
			sent, batch = true, nil
		}
		batch = append(batch, &csi.BlockMetadata{ByteOffset: from, SizeBytes: to - from})
		end = to
		return nil
	})
	if err != nil {
		return err
	}
	if len(batch) == 0 && sent {
		return nil
	}
	return send(batch) // also where there is nothing: the message says how large the snapshot is
}
