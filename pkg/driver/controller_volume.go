package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// CreateVolume implements csi.ControllerServer.
func (c *Controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	r, err := createRequest(req)
	if err != nil {
		return nil, err
	}
	identity := r
	if r.TenantImplied {
		identity.Tenant = ""
	}
	v, err := keylock.Do(ctx, c.locks, fmt.Sprintf("volume named %q", r.Name), print("create", identity),
		func(ctx context.Context) (volume.Volume, error) { return c.cluster.CreateVolume(ctx, r) })
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: volumeMessage(v)}, nil
}

func createRequest(req *csi.CreateVolumeRequest) (control.CreateVolume, error) {
	r := control.CreateVolume{Name: req.GetName()}
	if err := volume.CheckName("name", r.Name); err != nil {
		return r, err
	}
	var err error
	if r.Capabilities, err = capabilities(req.GetVolumeCapabilities()); err != nil {
		return r, err
	}
	p, err := parseParameters(req.GetParameters(), req.GetMutableParameters())
	if err != nil {
		return r, err
	}
	r.Parameters, r.QoS, r.Tenant, r.TenantImplied = p.Parameters, p.qos, p.tenant, p.implied
	for _, v := range r.Capabilities {
		if v.FSType != "" && p.FSType != "" && v.FSType != p.FSType {
			return r, fmt.Errorf("parameter %s is %s, a volume_capability asks for %s: %w", paramFSType, p.FSType, v.FSType, volume.ErrInvalid)
		}
	}
	if r.RequiredBytes, r.LimitBytes, err = checkRange(req.GetCapacityRange()); err != nil {
		return r, err
	}
	if r.Source, err = source(req.GetVolumeContentSource()); err != nil {
		return r, err
	}
	r.Requisite, r.Preferred, err = requirement(req.GetAccessibilityRequirements())
	return r, err
}

func source(s *csi.VolumeContentSource) (*volume.Source, error) {
	if s == nil {
		return nil, nil
	}
	switch t := s.GetType().(type) {
	case *csi.VolumeContentSource_Volume:
		id := t.Volume.GetVolumeId()
		return &volume.Source{Volume: volume.ID(id)}, required("volume_content_source.volume_id", id)
	case *csi.VolumeContentSource_Snapshot:
		id := t.Snapshot.GetSnapshotId()
		return &volume.Source{Snapshot: volume.SnapshotID(id)}, required("volume_content_source.snapshot_id", id)
	}
	return nil, fmt.Errorf("volume_content_source is neither a volume nor a snapshot: %w", volume.ErrInvalid)
}

// volumeMessage has no volume_context: the id says all, and what is not there cannot go stale or leak.
func volumeMessage(v volume.Volume) *csi.Volume {
	m := &csi.Volume{
		VolumeId:           string(v.ID),
		CapacityBytes:      v.Size,
		AccessibleTopology: accessible(v.Parameters.DataLocality, v.Replicas),
	}
	if s := v.Source; s != nil && s.Snapshot != "" {
		m.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: string(s.Snapshot)}}}
	} else if s != nil {
		m.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: string(s.Volume)}}}
	}
	return m
}

// publishedOn are the nodes to which a volume is attached.
func publishedOn(v volume.Volume) []string {
	if v.Attachment == nil {
		return nil
	}
	return []string{string(v.Attachment.Node)}
}

// DeleteVolume implements csi.ControllerServer.
func (c *Controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	id := volume.ID(req.GetVolumeId())
	_, err := keylock.Do(ctx, c.locks, volumeKey(id), "delete", func(ctx context.Context) (nothing, error) {
		return nothing{}, c.cluster.DeleteVolume(ctx, id)
	})
	if err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (c *Controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("volume_capabilities are missing: %w", volume.ErrInvalid)
	}
	v, err := c.cluster.Volume(ctx, volume.ID(req.GetVolumeId()))
	if err != nil {
		return nil, err
	}
	if err := supports(v, req); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	// What was asked for, word for word: some orchestrators compare.
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
		MutableParameters:  req.GetMutableParameters(),
	}}, nil
}

// supports returns why a volume cannot be used as asked.
func supports(v volume.Volume, req *csi.ValidateVolumeCapabilitiesRequest) error {
	want, err := capabilities(req.GetVolumeCapabilities())
	if err != nil {
		return err
	}
	for _, w := range want {
		if err := control.CheckCapability(w); err != nil {
			return err
		}
		if fs := v.Filesystem; w.FSType != "" && fs.Phase == volume.Formatted && fs.Type != w.FSType {
			return fmt.Errorf("the volume carries %s, not %s: %w", fs.Type, w.FSType, volume.ErrInvalid)
		}
	}
	p, err := parseParameters(req.GetParameters(), req.GetMutableParameters())
	if err != nil {
		return err
	}
	have := v.Parameters
	for _, d := range []struct {
		key    string
		differ bool
	}{
		{paramReplicas, p.Replicas != 0 && p.Replicas != have.Replicas},
		{paramMinInSync, p.MinInSync != 0 && p.MinInSync != have.MinInSync},
		{paramDataLocality, p.DataLocality != "" && p.DataLocality != have.DataLocality},
		{paramPool, p.Pool != "" && p.Pool != have.Pool},
		{paramFSType, p.FSType != "" && have.FSType != "" && p.FSType != have.FSType},
		{paramBlockSize, p.BlockSize != 0 && p.BlockSize != have.BlockSize},
		{paramTenant, p.tenant != "" && !p.implied && p.tenant != v.Tenant},
	} {
		if d.differ {
			return fmt.Errorf("the volume has another %s: %w", d.key, volume.ErrInvalid)
		}
	}
	return nil
}

// ListVolumes implements csi.ControllerServer.
func (c *Controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	p, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	volumes, next, err := c.cluster.Volumes(ctx, p)
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range volumes {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: volumeMessage(v),
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: publishedOn(v)},
		})
	}
	return resp, nil
}

// ControllerGetVolume implements csi.ControllerServer.
func (c *Controller) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	v, err := c.cluster.Volume(ctx, volume.ID(req.GetVolumeId()))
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: volumeMessage(v),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: publishedOn(v)},
	}, nil
}

// ControllerExpandVolume implements csi.ControllerServer.
func (c *Controller) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	size := req.GetCapacityRange()
	if size.GetRequiredBytes() == 0 && size.GetLimitBytes() == 0 {
		return nil, fmt.Errorf("capacity_range is missing: %w", volume.ErrInvalid)
	}
	least, most, err := checkRange(size)
	if err != nil {
		return nil, err
	}
	var use *volume.Capability
	if req.GetVolumeCapability() != nil {
		v, err := capability(req.GetVolumeCapability())
		if err != nil {
			return nil, err
		}
		use = &v
	}
	id := volume.ID(req.GetVolumeId())
	v, err := keylock.Do(ctx, c.locks, volumeKey(id), print("expand", []int64{least, most}),
		func(ctx context.Context) (volume.Volume, error) { return c.cluster.ExpandVolume(ctx, id, least, most) })
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Size}
	if use != nil {
		resp.NodeExpansionRequired = use.Access == volume.AccessMount
	} else {
		resp.NodeExpansionRequired = slices.ContainsFunc(v.Capabilities, func(x volume.Capability) bool { return x.Access == volume.AccessMount })
	}
	return resp, nil
}

// ControllerModifyVolume implements csi.ControllerServer.
func (c *Controller) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	m, err := parseMutable(req.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	id := volume.ID(req.GetVolumeId())
	if m == (control.Modify{}) {
		if _, err := c.cluster.Volume(ctx, id); err != nil {
			return nil, err
		}
		return &csi.ControllerModifyVolumeResponse{}, nil
	}
	_, err = keylock.Do(ctx, c.locks, volumeKey(id), print("modify", m),
		func(ctx context.Context) (volume.Volume, error) { return c.cluster.ModifyVolume(ctx, id, m) })
	if err != nil {
		return nil, err
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}

// ControllerPublishVolume implements csi.ControllerServer. The node finds all it needs by the volume's id, so that
// publish_context is empty, and the same for every repeat.
func (c *Controller) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	err := errors.Join(required("volume_id", req.GetVolumeId()), required("node_id", req.GetNodeId()))
	if err != nil {
		return nil, err
	}
	use, err := capability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	r := control.Attach{
		Volume:     volume.ID(req.GetVolumeId()),
		Node:       volume.NodeID(req.GetNodeId()),
		ReadOnly:   req.GetReadonly(),
		Capability: use,
	}
	_, err = keylock.Do(ctx, c.locks, volumeKey(r.Volume), print("attach", r),
		func(ctx context.Context) (volume.Volume, error) { return c.cluster.Attach(ctx, r) })
	if err != nil {
		return nil, err
	}
	return &csi.ControllerPublishVolumeResponse{}, nil
}

// ControllerUnpublishVolume implements csi.ControllerServer.
func (c *Controller) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	id, node := volume.ID(req.GetVolumeId()), volume.NodeID(req.GetNodeId())
	_, err := keylock.Do(ctx, c.locks, volumeKey(id), print("detach", node), func(ctx context.Context) (nothing, error) {
		return nothing{}, c.cluster.Detach(ctx, id, node)
	})
	if err != nil {
		return nil, err
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}
