package harness

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Orchestrator calls a driver the way orchestrators do: a call that failed is made again, the same, until it is OK.
// Its methods may be called at once, for different claims.
type Orchestrator struct {
	CSI    *CSI
	NodeID string
	// Dir holds the staging and target paths.
	Dir string
	// PerCall bounds one attempt; 10 s where it is 0, as with the external provisioner.
	PerCall time.Duration
	// Patience bounds all attempts of a call together. 0 is one attempt.
	Patience time.Duration
	// Failed, where it is set, hears of each failed attempt.
	Failed func(what string, err error)
}

// Claim is one volume in an orchestrator's books. Name, Size and FSType are given; the rest fills in as calls succeed.
type Claim struct {
	Name string
	// Size in bytes.
	Size int64
	// FSType "" asks for a raw block volume.
	FSType     string
	Mode       csi.VolumeCapability_AccessMode_Mode // SINGLE_NODE_WRITER where it is unknown
	MountFlags []string
	Parameters map[string]string
	Source     *csi.VolumeContentSource

	Volume  *csi.Volume       // after Create
	Context map[string]string // after Attach: the publish context
}

// ID of the volume; "" before Create.
func (c *Claim) ID() string { return c.Volume.GetVolumeId() }

// Capability that the claim asks for.
func (c *Claim) Capability() *csi.VolumeCapability {
	mode := c.Mode
	if mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	}
	vc := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	if c.FSType == "" {
		vc.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		vc.AccessType = &csi.VolumeCapability_Mount{
			Mount: &csi.VolumeCapability_MountVolume{FsType: c.FSType, MountFlags: c.MountFlags},
		}
	}
	return vc
}

// FromSnapshot and FromVolume are content sources.
func FromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

// FromVolume makes a clone's content source.
func FromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// StagingPath and TargetPath of a claim.
func (o *Orchestrator) StagingPath(c *Claim) string { return filepath.Join(o.Dir, c.Name, "staging") }

// TargetPath is where the workload finds the claim.
func (o *Orchestrator) TargetPath(c *Claim) string { return filepath.Join(o.Dir, c.Name, "target") }

// final tells that an orchestrator gives up: the same call can never succeed.
func final(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.AlreadyExists, codes.OutOfRange, codes.NotFound, codes.Unimplemented,
		codes.Unauthenticated, codes.PermissionDenied, codes.DataLoss:
		return true
	}
	return false
}

// Call makes one call until it is OK, fails for good, or Patience or ctx end.
func (o *Orchestrator) Call(ctx context.Context, what string, fn func(context.Context) error) error {
	per := o.PerCall
	if per == 0 {
		per = 10 * time.Second
	}
	end := time.Now().Add(o.Patience)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		one, cancel := context.WithTimeout(ctx, per)
		err := fn(one)
		cancel()
		if err == nil {
			return nil
		}
		if o.Failed != nil {
			o.Failed(what, err)
		}
		if final(err) || time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

// Create makes the volume.
func (o *Orchestrator) Create(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "CreateVolume "+c.Name, func(ctx context.Context) error {
		r, err := o.CSI.CreateVolume(ctx, o.CreateRequest(c))
		if err == nil {
			c.Volume = r.GetVolume()
		}
		return err
	})
}

// CreateRequest is what Create sends.
func (o *Orchestrator) CreateRequest(c *Claim) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: c.Name, Parameters: c.Parameters, VolumeContentSource: c.Source,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: c.Size},
		VolumeCapabilities: []*csi.VolumeCapability{c.Capability()},
	}
}

// Delete deletes the volume.
func (o *Orchestrator) Delete(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "DeleteVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: c.ID()})
		return err
	})
}

// Attach publishes the volume on the node, as seen by the controller.
func (o *Orchestrator) Attach(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "ControllerPublishVolume "+c.Name, func(ctx context.Context) error {
		r, err := o.CSI.ControllerPublishVolume(ctx, o.AttachRequest(c))
		if err == nil {
			c.Context = r.GetPublishContext()
		}
		return err
	})
}

// AttachRequest is what Attach sends.
func (o *Orchestrator) AttachRequest(c *Claim) *csi.ControllerPublishVolumeRequest {
	return &csi.ControllerPublishVolumeRequest{
		VolumeId: c.ID(), NodeId: o.NodeID, VolumeCapability: c.Capability(), VolumeContext: c.Volume.GetVolumeContext(),
	}
}

// Detach undoes Attach.
func (o *Orchestrator) Detach(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "ControllerUnpublishVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: c.ID(), NodeId: o.NodeID})
		return err
	})
}

// Stage stages the volume; the staging directory is made first.
func (o *Orchestrator) Stage(ctx context.Context, c *Claim) error {
	if err := os.MkdirAll(o.StagingPath(c), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		// A mount whose server is dead stands there; the driver clears it away.
		if _, e := os.Lstat(filepath.Dir(o.StagingPath(c))); e != nil {
			return err
		}
	}
	return o.Call(ctx, "NodeStageVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.NodeStageVolume(ctx, o.StageRequest(c))
		return err
	})
}

// StageRequest is what Stage sends.
func (o *Orchestrator) StageRequest(c *Claim) *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{
		VolumeId: c.ID(), PublishContext: c.Context, StagingTargetPath: o.StagingPath(c), VolumeCapability: c.Capability(),
		VolumeContext: c.Volume.GetVolumeContext(),
	}
}

// Unstage undoes Stage.
func (o *Orchestrator) Unstage(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "NodeUnstageVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: c.ID(), StagingTargetPath: o.StagingPath(c)})
		return err
	})
}

// Publish makes the volume appear at the target path.
func (o *Orchestrator) Publish(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "NodePublishVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.NodePublishVolume(ctx, o.PublishRequest(c))
		return err
	})
}

// PublishRequest is what Publish sends.
func (o *Orchestrator) PublishRequest(c *Claim) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: c.ID(), PublishContext: c.Context, StagingTargetPath: o.StagingPath(c), TargetPath: o.TargetPath(c),
		VolumeCapability: c.Capability(), VolumeContext: c.Volume.GetVolumeContext(),
	}
}

// Unpublish undoes Publish.
func (o *Orchestrator) Unpublish(ctx context.Context, c *Claim) error {
	return o.Call(ctx, "NodeUnpublishVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: c.ID(), TargetPath: o.TargetPath(c)})
		return err
	})
}

// Up brings a claim to its workload: create, attach, stage, publish.
func (o *Orchestrator) Up(ctx context.Context, c *Claim) error {
	for _, step := range []func(context.Context, *Claim) error{o.Create, o.Attach, o.Stage, o.Publish} {
		if err := step(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// Down takes a claim from its workload: unpublish, unstage, detach. The volume stays.
func (o *Orchestrator) Down(ctx context.Context, c *Claim) error {
	for _, step := range []func(context.Context, *Claim) error{o.Unpublish, o.Unstage, o.Detach} {
		if err := step(ctx, c); err != nil {
			return err
		}
	}
	return o.clean(c)
}

// clean removes the claim's directories, as kubelet does: one by one, so that nothing that is still mounted is emptied.
func (o *Orchestrator) clean(c *Claim) error {
	if _, err := os.Lstat(o.TargetPath(c)); err == nil {
		return fmt.Errorf("%s is still there after NodeUnpublishVolume", o.TargetPath(c))
	}
	for _, p := range []string{o.StagingPath(c), filepath.Dir(o.StagingPath(c))} {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Again takes a claim from its workload and brings it back, as when a pod is replaced.
func (o *Orchestrator) Again(ctx context.Context, c *Claim) error {
	if err := o.Down(ctx, c); err != nil {
		return err
	}
	for _, step := range []func(context.Context, *Claim) error{o.Attach, o.Stage, o.Publish} {
		if err := step(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// Snapshot cuts a snapshot and returns its id.
func (o *Orchestrator) Snapshot(ctx context.Context, c *Claim, name string) (id string, err error) {
	err = o.Call(ctx, "CreateSnapshot "+name, func(ctx context.Context) error {
		r, err := o.CSI.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: c.ID(), Name: name})
		if err == nil && !r.GetSnapshot().GetReadyToUse() {
			return status.Error(codes.Unavailable, "the snapshot is not ready to use")
		}
		id = r.GetSnapshot().GetSnapshotId()
		return err
	})
	return id, err
}

// DeleteSnapshot deletes a snapshot.
func (o *Orchestrator) DeleteSnapshot(ctx context.Context, id string) error {
	return o.Call(ctx, "DeleteSnapshot "+id, func(ctx context.Context) error {
		_, err := o.CSI.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	})
}

// Expand grows a volume on the controller, and on the node where it is published.
func (o *Orchestrator) Expand(ctx context.Context, c *Claim, size int64, published bool) error {
	node := false
	err := o.Call(ctx, "ControllerExpandVolume "+c.Name, func(ctx context.Context) error {
		r, err := o.CSI.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: c.ID(), CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: c.Capability(),
		})
		if err == nil && r.GetCapacityBytes() < size {
			return fmt.Errorf("asked for %d bytes, was given %d", size, r.GetCapacityBytes())
		}
		node = r.GetNodeExpansionRequired()
		return err
	})
	if err != nil {
		return err
	}
	c.Size = size
	if !published || !node {
		return nil
	}
	return o.NodeExpand(ctx, c, size)
}

// NodeExpand grows what the workload sees.
func (o *Orchestrator) NodeExpand(ctx context.Context, c *Claim, size int64) error {
	return o.Call(ctx, "NodeExpandVolume "+c.Name, func(ctx context.Context) error {
		_, err := o.CSI.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: c.ID(), VolumePath: o.TargetPath(c), StagingTargetPath: o.StagingPath(c),
			CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: c.Capability(),
		})
		return err
	})
}

// Tally counts failed attempts by code; its Note is an Orchestrator's Failed.
type Tally struct {
	mu     sync.Mutex
	counts map[codes.Code]int
	last   map[codes.Code]string
}

// Note counts one failure.
func (t *Tally) Note(what string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts, t.last = map[codes.Code]int{}, map[codes.Code]string{}
	}
	code := status.Code(err)
	t.counts[code]++
	t.last[code] = fmt.Sprintf("%s: %v", what, err)
}

// String says how often each code was seen, with the newest example.
func (t *Tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := ""
	for code, n := range t.counts {
		s += fmt.Sprintf("%6d %-20s last: %s\n", n, code, t.last[code])
	}
	return s
}
