package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// probeTimeout is how long Probe waits for an answer about readiness.
const probeTimeout = 500 * time.Millisecond

// Readiness tells whether calls can be served: nil when they can, volume.ErrUnavailable while starting, any other
// error when the process needs help.
type Readiness interface {
	Ready(ctx context.Context) error
}

// Identity is the CSI Identity service.
type Identity struct {
	csi.UnimplementedIdentityServer
	version string
	ready   Readiness
	locks   *keylock.Locks
}

// NewIdentity makes the Identity service of a version of the plugin.
func NewIdentity(version string, r Readiness, locks *keylock.Locks) *Identity {
	return &Identity{version: version, ready: r, locks: locks}
}

// GetPluginInfo implements csi.IdentityServer.
func (i *Identity) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: volume.DriverName, VendorVersion: i.version}, nil
}

// GetPluginCapabilities implements csi.IdentityServer.
func (i *Identity) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	var out []*csi.PluginCapability
	for _, t := range []csi.PluginCapability_Service_Type{
		csi.PluginCapability_Service_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
		csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
		csi.PluginCapability_Service_SNAPSHOT_ACCESSIBILITY_CONSTRAINTS,
	} {
		out = append(out, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: t}}})
	}
	out = append(out, &csi.PluginCapability{Type: &csi.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}})
	return &csi.GetPluginCapabilitiesResponse{Capabilities: out}, nil
}

// Probe implements csi.IdentityServer. It answers within a second, whatever the state of other nodes: no answer about
// readiness counts as not ready.
func (i *Identity) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	// Probes share one question, so that an answer that never comes costs one goroutine and not one for each.
	_, err := keylock.Do(ctx, i.locks, "probe", "", func(ctx context.Context) (struct{}, error) {
		return struct{}{}, i.ready.Ready(ctx)
	})
	starting := errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
	if err != nil && !starting {
		return nil, fmt.Errorf("the plugin is unhealthy (%v): %w", err, volume.ErrInUse)
	}
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(err == nil)}, nil
}
