package driver

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// fakeHost answers every call with err, after block was closed where there is one.
type fakeHost struct {
	mu    sync.Mutex
	calls []string
	err   error
	block chan struct{}

	usage   agent.Usage
	health  []volume.Condition
	storage []volume.Condition
}

func (h *fakeHost) call(format string, args ...any) error {
	h.mu.Lock()
	h.calls = append(h.calls, fmt.Sprintf(format, args...))
	err, block := h.err, h.block
	h.mu.Unlock()
	if block != nil {
		<-block
	}
	return err
}

func (h *fakeHost) ID() volume.NodeID { return "n1" }

func (h *fakeHost) Stage(_ context.Context, s agent.Stage) error { return h.call("stage %+v", s) }

func (h *fakeHost) Unstage(_ context.Context, id volume.ID, path string) error {
	return h.call("unstage %s %s", id, path)
}

func (h *fakeHost) Publish(_ context.Context, p agent.Publish) error { return h.call("publish %+v", p) }

func (h *fakeHost) Unpublish(_ context.Context, id volume.ID, path string) error {
	return h.call("unpublish %s %s", id, path)
}

func (h *fakeHost) Stats(_ context.Context, id volume.ID, path string) (agent.Usage, error) {
	return h.usage, h.call("stats %s %s", id, path)
}

func (h *fakeHost) Expand(_ context.Context, e agent.Expand) (int64, error) {
	return 42, h.call("expand %+v", e)
}

func (h *fakeHost) Health(_ context.Context, id volume.ID) ([]volume.Condition, error) {
	return h.health, h.call("health %s", id)
}

func (h *fakeHost) StorageHealth() []volume.Condition { return h.storage }

func newNode(t *testing.T) (*fakeHost, csi.NodeClient) {
	t.Helper()
	h, locks := &fakeHost{}, keylock.New(time.Minute)
	t.Cleanup(func() {
		if err := locks.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	conn := serve(t, Services{
		Identity: NewIdentity("1", readyFunc(func(context.Context) error { return nil }), locks), Node: NewNode(h, locks),
	}, ServerOptions{})
	return h, csi.NewNodeClient(conn)
}

func mountOf(mode csi.VolumeCapability_AccessMode_Mode, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "xfs", MountFlags: flags}},
	}
}

const oneWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER

// nodeCalls are well-formed calls, by name.
func nodeCalls(ctx context.Context, n csi.NodeClient) map[string]func() error {
	return map[string]func() error{
		"stage": func() error {
			_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: "/s", VolumeCapability: mountOf(oneWriter)})
			return err
		},
		"unstage": func() error {
			_, err := n.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: "/s"})
			return err
		},
		"publish": func() error {
			_, err := n.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
				VolumeId: "v", StagingTargetPath: "/s", TargetPath: "/t", VolumeCapability: mountOf(oneWriter), Readonly: true})
			return err
		},
		"unpublish": func() error {
			_, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: "/t"})
			return err
		},
		"stats": func() error {
			_, err := n.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: "/t"})
			return err
		},
		"expand": func() error {
			_, err := n.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: "/t", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
			return err
		},
		"health": func() error {
			_, err := n.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
			return err
		},
	}
}

// Every Node row of the table of codes: what the host says, and what the caller sees.
func TestPoint02_NodeCodes(t *testing.T) {
	h, n := newNode(t)
	for sentinel, code := range map[error]codes.Code{
		nil:                   codes.OK,
		volume.ErrNotFound:    codes.NotFound,
		volume.ErrExists:      codes.AlreadyExists,
		volume.ErrInUse:       codes.FailedPrecondition,
		volume.ErrOutOfRange:  codes.OutOfRange,
		volume.ErrInvalid:     codes.InvalidArgument,
		volume.ErrUnavailable: codes.Unavailable,
	} {
		h.err = nil
		if sentinel != nil {
			h.err = fmt.Errorf("because: %w", sentinel)
		}
		for name, call := range nodeCalls(t.Context(), n) {
			if got := status.Code(call()); got != code {
				t.Errorf("%s, host says %v: %v, want %v", name, sentinel, got, code)
			}
		}
	}
	for _, want := range []string{
		"stage {Volume:v Path:/s Capability:{Access:mount Mode:SINGLE_NODE_WRITER FSType:xfs MountFlags:[]}}",
		"publish {Volume:v Staging:/s Path:/t Capability:{Access:mount Mode:SINGLE_NODE_WRITER FSType:xfs MountFlags:[]} ReadOnly:true}",
		"unstage v /s", "unpublish v /t", "stats v /t", "health v", "expand {Volume:v Path:/t RequiredBytes:1 LimitBytes:0}",
	} {
		if !slices.Contains(h.calls, want) {
			t.Errorf("no call %q in %v", want, h.calls)
		}
	}
}

func TestNodeRequestsAreChecked(t *testing.T) {
	h, n := newNode(t)
	ctx := t.Context()
	multi := csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	for name, call := range map[string]func() error{
		"stage without id": func() error {
			_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{StagingTargetPath: "/s", VolumeCapability: mountOf(oneWriter)})
			return err
		},
		"stage without path": func() error {
			_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", VolumeCapability: mountOf(oneWriter)})
			return err
		},
		"stage without capability": func() error {
			_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: "/s"})
			return err
		},
		"point 21: stage a filesystem for many writers": func() error {
			_, err := n.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: "/s", VolumeCapability: mountOf(multi)})
			return err
		},
		"point 21: publish a filesystem for many writers": func() error {
			_, err := n.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: "/s", TargetPath: "/t", VolumeCapability: mountOf(multi)})
			return err
		},
		"publish without target": func() error {
			_, err := n.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: "/s", VolumeCapability: mountOf(oneWriter)})
			return err
		},
		"unstage without path": func() error {
			_, err := n.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "v"})
			return err
		},
		"unpublish without id": func() error {
			_, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{TargetPath: "/t"})
			return err
		},
		"stats without path": func() error {
			_, err := n.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v"})
			return err
		},
		"expand without path": func() error {
			_, err := n.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "v"})
			return err
		},
		"expand, contradictory range": func() error {
			_, err := n.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: "/t", CapacityRange: &csi.CapacityRange{RequiredBytes: 2, LimitBytes: 1}})
			return err
		},
		"health without id": func() error {
			_, err := n.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{})
			return err
		},
		"a path that is too long": func() error {
			_, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: "/" + strings.Repeat("x", 5000)})
			return err
		},
	} {
		if got := status.Code(call()); got != codes.InvalidArgument {
			t.Errorf("%s: %v", name, got)
		}
	}
	if len(h.calls) > 0 {
		t.Errorf("the host was asked: %v", h.calls)
	}
}

// Identical calls in flight are one; a conflicting one at the same path is ABORTED, others go on.
func TestNodeCallsJoin(t *testing.T) {
	h, n := newNode(t)
	h.block = make(chan struct{})
	calls := nodeCalls(t.Context(), n)
	results := make(chan error, 2)
	for range 2 {
		go func() { results <- calls["stage"]() }()
	}
	for {
		h.mu.Lock()
		started := len(h.calls) > 0
		h.mu.Unlock()
		if started {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if got := status.Code(calls["unstage"]()); got != codes.Aborted {
		t.Errorf("conflicting call: %v", got)
	}
	close(h.block)
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestNodeAnswers(t *testing.T) {
	h, n := newNode(t)
	ctx := t.Context()
	info, err := n.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil || info.NodeId != "n1" || info.MaxVolumesPerNode != volume.MaxAttached || info.AccessibleTopology.Segments[volume.TopologyKey] != "n1" {
		t.Errorf("info %v, %v", info, err)
	}
	caps, err := n.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil || len(caps.Capabilities) != 6 {
		t.Errorf("capabilities %v, %v", caps, err)
	}
	h.usage = agent.Usage{Access: volume.AccessMount, Total: 10, Used: 4, Available: 5, TotalInodes: 100, UsedInodes: 1, AvailableInodes: 99}
	stats, err := n.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: "/t"})
	if err != nil || len(stats.Usage) != 2 || stats.Usage[0].Used != 4 || stats.Usage[1].Available != 99 || stats.Usage[1].Unit != csi.VolumeUsage_INODES {
		t.Errorf("stats %v, %v", stats, err)
	}
	h.usage = agent.Usage{Access: volume.AccessBlock, Total: 10}
	stats, err = n.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: "/t"})
	if err != nil || len(stats.Usage) != 1 || stats.Usage[0].Total != 10 || stats.Usage[0].Unit != csi.VolumeUsage_BYTES {
		t.Errorf("stats %v, %v", stats, err)
	}
	grown, err := n.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: "/t"})
	if err != nil || grown.CapacityBytes != 42 {
		t.Errorf("expand %v, %v", grown, err)
	}
	h.health = []volume.Condition{{Severity: volume.DataLoss, Reason: "R"}, {Severity: volume.DataLoss, Reason: "R"}}
	health, err := n.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: "v"})
	if err != nil || len(health.VolumeHealth.HealthStatuses) != 1 || health.VolumeHealth.HealthStatuses[0].Status != csi.VolumeHealthErrorType_DATA_LOSS {
		t.Errorf("health %v, %v", health, err)
	}
	h.storage = []volume.Condition{{Severity: volume.Degraded, Reason: "PoolFull"}, {Severity: volume.Inaccessible, Reason: "Gone"}}
	storage, err := n.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(storage.BackendHealth) != 2 || storage.BackendHealth[0].Status != csi.StorageHealthErrorType_STORAGE_DEGRADED ||
		storage.BackendHealth[1].Status != csi.StorageHealthErrorType_STORAGE_UNREACHABLE {
		t.Errorf("storage health %v, %v", storage, err)
	}
}
