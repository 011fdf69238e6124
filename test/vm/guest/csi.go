package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	mib = int64(1) << 20

	// callTimeout is generous: an emulated processor is slow, and a call that hangs is a failure in any case.
	callTimeout = 90 * time.Second
)

// client calls the driver as an orchestrator does.
type client struct {
	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
}

// dial returns once the driver says that it is ready.
func dial(ctx context.Context, socket string) (*client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(timed))
	if err != nil {
		return nil, err
	}
	c := &client{csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)}
	for {
		r, err := c.identity.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (r.GetReady() == nil || r.GetReady().GetValue()) {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w; the last probe: %w", context.Cause(ctx), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// timed bounds each call and says which one failed.
func timed(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := call(ctx, method, req, reply, cc, opts...); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(method), err)
	}
	return nil
}

// vol is a volume as its user asks for it.
type vol struct {
	name   string
	id     string
	fstype string // "" is raw block
	size   int64
}

func (v *vol) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
	if v.fstype == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fstype}}
	}
	return c
}

func (v *vol) staging() string { return filepath.Join("/var/staging", v.name) }

// target is where the volume's user finds it: a directory, or a block device.
func (v *vol) target() string { return filepath.Join("/var/target", v.name) }

// create makes the volume or finds it; snapshot is what it is restored from, "" is nothing.
func (c *client) create(ctx context.Context, v *vol, snapshot string) error {
	req := &csi.CreateVolumeRequest{
		Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: v.size},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
	}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	r, err := c.controller.CreateVolume(ctx, req)
	if err != nil {
		return err
	}
	v.id, v.size = r.GetVolume().GetVolumeId(), r.GetVolume().GetCapacityBytes()
	return nil
}

// publish attaches, stages and publishes.
func (c *client) publish(ctx context.Context, v *vol) error {
	r, err := c.controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
		VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.capability()})
	if err != nil {
		return err
	}
	for _, dir := range []string{v.staging(), filepath.Dir(v.target())} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := c.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, PublishContext: r.GetPublishContext(), StagingTargetPath: v.staging(), VolumeCapability: v.capability(),
	}); err != nil {
		return err
	}
	_, err = c.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, PublishContext: r.GetPublishContext(), StagingTargetPath: v.staging(), TargetPath: v.target(),
		VolumeCapability: v.capability()})
	return err
}

// unpublish takes publish back.
func (c *client) unpublish(ctx context.Context, v *vol) error {
	if _, err := c.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target()}); err != nil {
		return err
	}
	if _, err := c.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()}); err != nil {
		return err
	}
	_, err := c.controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})
	return err
}

func (c *client) delete(ctx context.Context, v *vol) error {
	_, err := c.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

// expand grows a published volume.
func (c *client) expand(ctx context.Context, v *vol, size int64) error {
	grow := &csi.CapacityRange{RequiredBytes: size}
	r, err := c.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: grow, VolumeCapability: v.capability()})
	if err != nil {
		return err
	}
	if !r.GetNodeExpansionRequired() {
		return nil
	}
	_, err = c.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: v.target(), StagingTargetPath: v.staging(), CapacityRange: grow, VolumeCapability: v.capability()})
	return err
}

func (c *client) snapshot(ctx context.Context, v *vol, name string) (id string, err error) {
	r, err := c.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: name})
	if err == nil && !r.GetSnapshot().GetReadyToUse() {
		err = fmt.Errorf("snapshot %s is not ready", name)
	}
	return r.GetSnapshot().GetSnapshotId(), err
}

func (c *client) deleteSnapshot(ctx context.Context, id string) error {
	_, err := c.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}
