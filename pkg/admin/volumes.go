package admin

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// unwell are the volumes that have conditions.
func (s *Service) unwell(ctx context.Context) (map[volume.ID]control.Health, error) {
	return every(ctx, s.o.Control.Unhealthy)
}

// every reads a list of healths to its end.
func every(ctx context.Context, list func(context.Context, control.Page) ([]control.Health, string, error)) (map[volume.ID]control.Health, error) {
	m := map[volume.ID]control.Health{}
	for token := ""; ; {
		hs, next, err := list(ctx, control.Page{Max: pageSize, Token: token, All: true})
		if err != nil {
			return nil, err
		}
		for _, h := range hs {
			m[h.Volume] = h
		}
		if token = next; token == "" {
			return m, nil
		}
	}
}

// ListVolumes implements adminpb.AdminServer.
func (s *Service) ListVolumes(ctx context.Context, r *adminpb.ListVolumesRequest) (*adminpb.ListVolumesReply, error) {
	if r.Max < 0 {
		return nil, fmt.Errorf("max is negative: %w", volume.ErrInvalid)
	}
	var unwell map[volume.ID]control.Health
	if r.WithHealth {
		var err error
		if unwell, err = s.unwell(ctx); err != nil {
			return nil, err
		}
	}
	vs, next, err := s.o.Control.Volumes(ctx, control.Page{Max: int(r.Max), Token: r.PageToken, All: true})
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListVolumesReply{NextPageToken: next}
	for _, v := range vs {
		if r.Tenant != "" && v.Tenant != r.Tenant {
			continue
		}
		out.Volumes = append(out.Volumes, volumeInFull(v, unwell[v.ID], at))
	}
	return out, nil
}

// GetVolume implements adminpb.AdminServer.
func (s *Service) GetVolume(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Volume, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	h, err := s.o.Control.Health(ctx, v.ID)
	if err != nil && !errors.Is(err, volume.ErrNotFound) { // one that is being deleted has no health
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	return volumeInFull(v, h, at), nil
}

// CreateVolume implements adminpb.AdminServer.
func (s *Service) CreateVolume(ctx context.Context, r *adminpb.CreateVolumeRequest) (*adminpb.Volume, error) {
	c := control.CreateVolume{
		Name:          r.Name,
		Tenant:        r.Tenant,
		RequiredBytes: r.SizeBytes,
		Parameters: volume.Parameters{
			Replicas:     int(r.Replicas),
			MinInSync:    int(r.MinInSync),
			DataLocality: volume.DataLocality(r.DataLocality),
			Pool:         r.Pool,
			FSType:       r.FsType,
			BlockSize:    int(r.BlockSize),
		},
		QoS: volume.QoS{IOPS: r.IopsLimit, Bandwidth: r.BandwidthLimit},
	}
	capability := volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, FSType: r.FsType}
	switch r.Access {
	case "", string(volume.AccessMount):
	case string(volume.AccessBlock):
		if r.FsType != "" {
			return nil, fmt.Errorf("a filesystem (%s) is for mount access, not for block: %w", r.FsType, volume.ErrInvalid)
		}
		capability = volume.Capability{Access: volume.AccessBlock, Mode: volume.SingleNodeWriter}
	default:
		return nil, fmt.Errorf("access %q is neither mount nor block: %w", r.Access, volume.ErrInvalid)
	}
	c.Capabilities = []volume.Capability{capability}
	switch {
	case r.FromVolume != "" && r.FromSnapshot != "":
		return nil, fmt.Errorf("a volume is made from a volume or from a snapshot, not from both: %w", volume.ErrInvalid)
	case r.FromVolume != "":
		src, err := s.resolveVolume(ctx, r.FromVolume)
		if err != nil {
			return nil, err
		}
		c.Source = &volume.Source{Volume: src.ID}
	case r.FromSnapshot != "":
		src, err := s.resolveSnapshot(ctx, r.FromSnapshot)
		if err != nil {
			return nil, err
		}
		c.Source = &volume.Source{Snapshot: src.ID}
	}
	v, err := s.o.Control.CreateVolume(ctx, c)
	if err != nil {
		return nil, err
	}
	return volumeToProto(v, nil), nil
}

// DeleteVolume implements adminpb.AdminServer.
func (s *Service) DeleteVolume(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.o.Control.DeleteVolume(ctx, v.ID); err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: string(v.ID)}, nil
}

// ExpandVolume implements adminpb.AdminServer.
func (s *Service) ExpandVolume(ctx context.Context, r *adminpb.ExpandVolumeRequest) (*adminpb.Volume, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if r.SizeBytes < v.Size {
		return nil, fmt.Errorf("volume %s has %d bytes, and %d are less: volumes never shrink: %w", v.Name, v.Size, r.SizeBytes, volume.ErrInvalid)
	}
	if v, err = s.o.Control.ExpandVolume(ctx, v.ID, r.SizeBytes, 0); err != nil {
		return nil, err
	}
	return volumeToProto(v, nil), nil
}

// DetachVolume implements adminpb.AdminServer.
func (s *Service) DetachVolume(ctx context.Context, r *adminpb.DetachVolumeRequest) (*adminpb.Volume, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if len(r.Node) > volume.MaxNodeIDLen {
		return nil, fmt.Errorf("node has %d bytes, the limit is %d: %w", len(r.Node), volume.MaxNodeIDLen, volume.ErrInvalid)
	}
	if a := v.Attachment; a != nil && r.Node != "" && string(a.Node) != r.Node {
		return nil, fmt.Errorf("volume %s is attached to node %s, not to %s: %w", v.Name, a.Node, r.Node, volume.ErrInUse)
	}
	if err := s.o.Control.Detach(ctx, v.ID, volume.NodeID(r.Node)); err != nil {
		return nil, err
	}
	if v, err = s.o.Control.Volume(ctx, v.ID); err != nil {
		return nil, err
	}
	return volumeToProto(v, nil), nil
}

// volumeName is for people: "" where the volume is gone.
func (s *Service) volumeName(ctx context.Context, id volume.ID) (string, error) {
	v, err := s.o.Control.Volume(ctx, id)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return "", err
	}
	return v.Name, nil
}

// volumeNames of every volume.
func (s *Service) volumeNames(ctx context.Context) (map[volume.ID]string, error) {
	m := map[volume.ID]string{}
	return m, s.everyVolume(ctx, func(v volume.Volume) bool {
		m[v.ID] = v.Name
		return true
	})
}

// ListSnapshots implements adminpb.AdminServer.
func (s *Service) ListSnapshots(ctx context.Context, r *adminpb.ListSnapshotsRequest) (*adminpb.ListSnapshotsReply, error) {
	if r.Max < 0 {
		return nil, fmt.Errorf("max is negative: %w", volume.ErrInvalid)
	}
	var f control.SnapshotFilter
	if r.Volume != "" {
		v, err := s.resolveVolume(ctx, r.Volume)
		switch {
		case err == nil:
			f.Volume = v.ID
		case errors.Is(err, volume.ErrNotFound):
			// Snapshots outlive their volume: its id still finds them.
			f.Volume = volume.ID(r.Volume)
		default:
			return nil, err
		}
	}
	ss, next, err := s.o.Control.Snapshots(ctx, f, control.Page{Max: int(r.Max), Token: r.PageToken, All: true})
	if err != nil {
		return nil, err
	}
	names, err := s.volumeNames(ctx)
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListSnapshotsReply{NextPageToken: next}
	for _, sn := range ss {
		out.Snapshots = append(out.Snapshots, snapshotToProto(sn, names[sn.Volume], at))
	}
	return out, nil
}

// GetSnapshot implements adminpb.AdminServer.
func (s *Service) GetSnapshot(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Snapshot, error) {
	sn, err := s.resolveSnapshot(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	name, err := s.volumeName(ctx, sn.Volume)
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	return snapshotToProto(sn, name, at), nil
}

// CreateSnapshot implements adminpb.AdminServer.
func (s *Service) CreateSnapshot(ctx context.Context, r *adminpb.CreateSnapshotRequest) (*adminpb.Snapshot, error) {
	v, err := s.resolveVolume(ctx, r.Volume)
	if err != nil {
		return nil, err
	}
	sn, err := s.o.Control.CreateSnapshot(ctx, control.CreateSnapshot{Name: r.Name, Volume: v.ID, Freeze: r.Freeze})
	if err != nil {
		return nil, err
	}
	return snapshotToProto(sn, v.Name, places{}), nil
}

// DeleteSnapshot implements adminpb.AdminServer.
func (s *Service) DeleteSnapshot(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	sn, err := s.resolveSnapshot(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.o.Control.DeleteSnapshot(ctx, sn.ID); err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: string(sn.ID)}, nil
}
