package driver

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// ControllerGetVolumeHealth implements csi.ControllerServer.
func (c *Controller) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	h, err := c.cluster.Health(ctx, volume.ID(req.GetVolumeId()))
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: volumeHealth(h.Volume, h.Conditions)}, nil
}

// ControllerListVolumeHealth implements csi.ControllerServer.
func (c *Controller) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	p, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	list, next, err := c.cluster.Unhealthy(ctx, p)
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, h := range list {
		resp.Entries = append(resp.Entries, volumeHealth(h.Volume, h.Conditions))
	}
	return resp, nil
}

var severities = map[volume.Severity]csi.VolumeHealthErrorType{
	volume.Degraded:     csi.VolumeHealthErrorType_DEGRADED,
	volume.Inaccessible: csi.VolumeHealthErrorType_INACCESSIBLE,
	volume.DataLoss:     csi.VolumeHealthErrorType_DATA_LOSS,
}

// volumeHealth translates conditions. The specification allows each pair of status and reason once.
func volumeHealth(id volume.ID, conditions []volume.Condition) *csi.VolumeHealth {
	type pair struct {
		severity volume.Severity
		reason   string
	}
	seen := map[pair]bool{}
	h := &csi.VolumeHealth{VolumeId: string(id)}
	for _, c := range conditions {
		p := pair{c.Severity, c.Reason}
		if seen[p] {
			continue
		}
		seen[p] = true
		h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: severities[c.Severity], Reason: c.Reason, Message: c.Message,
		})
	}
	return h
}
