package driver

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestIdentity(t *testing.T) {
	w := newWorld(t)
	info, err := w.GetPluginInfo(w.ctx, &csi.GetPluginInfoRequest{})
	if err != nil || info.GetName() != "csi.ballast.dev" || info.GetVendorVersion() != "1.2.3" {
		t.Errorf("got %v, %v", info, err)
	}
	caps, err := w.GetPluginCapabilities(w.ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, c := range caps.GetCapabilities() {
		if s := c.GetService(); s != nil {
			got[s.GetType().String()] = true
		}
		if e := c.GetVolumeExpansion(); e != nil {
			got["expansion "+e.GetType().String()] = true
		}
	}
	for _, want := range []string{"CONTROLLER_SERVICE", "VOLUME_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_METADATA_SERVICE", "GROUP_CONTROLLER_SERVICE",
		"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS", "expansion ONLINE"} {
		if !got[want] {
			t.Errorf("%s is not advertised", want)
		}
	}
	if len(got) != 6 {
		t.Errorf("advertised: %v", got)
	}
}

// TestAdvertisedIsImplemented calls every controller RPC that a capability stands for.
func TestAdvertisedIsImplemented(t *testing.T) {
	w := newWorld(t)
	caps, err := w.ControllerGetCapabilities(w.ctx, &csi.ControllerGetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(caps.GetCapabilities()); n != 16 { // all of specification 1.13
		t.Errorf("%d capabilities", n)
	}
	for _, m := range csi.Controller_ServiceDesc.Methods {
		_, err := m.Handler(NewController(w.gate, keylock.New(time.Minute)), w.ctx, func(any) error { return nil }, nil)
		if status.Code(err) == codes.Unimplemented {
			t.Errorf("%s is not implemented", m.MethodName)
		}
	}
}

// TestAdvertisedGroupIsImplemented does so for group snapshots.
func TestAdvertisedGroupIsImplemented(t *testing.T) {
	w := newWorld(t)
	caps, err := w.GroupControllerGetCapabilities(w.ctx, &csi.GroupControllerGetCapabilitiesRequest{})
	if err != nil || len(caps.GetCapabilities()) != 1 {
		t.Fatal(caps, err)
	}
	for _, m := range csi.GroupController_ServiceDesc.Methods {
		_, err := m.Handler(NewGroupController(w.gate, keylock.New(time.Minute)), w.ctx, func(any) error { return nil }, nil)
		if status.Code(err) == codes.Unimplemented {
			t.Errorf("%s is not implemented", m.MethodName)
		}
	}
}

// TestPoint40_Probe: within a second, whatever others do.
func TestPoint40_Probe(t *testing.T) {
	w := newWorld(t)
	for name, tt := range map[string]struct {
		ready func(context.Context) error
		code  codes.Code
		want  bool
	}{
		"ready":     {nil, codes.OK, true},
		"starting":  {func(context.Context) error { return volume.ErrUnavailable }, codes.OK, false},
		"unhealthy": {func(context.Context) error { return errors.New("the database is damaged") }, codes.FailedPrecondition, false},
		"peers are down": {func(ctx context.Context) error {
			time.Sleep(2 * time.Second) // deaf to ctx
			return nil
		}, codes.OK, false},
	} {
		w.gate.mu.Lock()
		w.gate.ready = tt.ready
		w.gate.mu.Unlock()
		for range 3 {
			start := time.Now()
			resp, err := w.Probe(w.ctx, &csi.ProbeRequest{})
			if d := time.Since(start); d > 900*time.Millisecond {
				t.Errorf("%s: took %v", name, d)
			}
			wantCode(t, err, tt.code)
			if tt.code == codes.OK && (resp.GetReady() == nil || resp.GetReady().GetValue() != tt.want) {
				t.Errorf("%s: ready %v", name, resp.GetReady())
			}
		}
		if name == "peers are down" {
			time.Sleep(2 * time.Second) // let the answer come, for the cases after this
		}
	}
}

// TestPoint39_SecretsAreNeverLogged: whatever happens to a call, nothing of what may be secret is in the log.
func TestPoint39_SecretsAreNeverLogged(t *testing.T) {
	w := newWorld(t)
	const secret = "hunter2"
	m := map[string]string{"token": secret}
	cap := mountCap(1)
	cap.GetMount().MountFlags = []string{"password=" + secret}
	v := w.mustCreate("v").VolumeId
	for _, fail := range []func(context.Context, string) error{nil, func(context.Context, string) error { return volume.ErrNoSpace },
		func(context.Context, string) error { panic("out of luck") }} {
		w.gate.disturb(fail, nil)
		_, _ = w.CreateVolume(w.ctx, create("c", func(r *csi.CreateVolumeRequest) {
			r.Secrets, r.VolumeCapabilities = m, []*csi.VolumeCapability{cap}
		}))
		_, _ = w.ControllerPublishVolume(w.ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v, NodeId: "n1", VolumeCapability: cap, Secrets: m, VolumeContext: m})
		_, _ = w.ControllerPublishVolume(w.ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v, NodeId: "n2", VolumeCapability: cap, Secrets: m, VolumeContext: m})
		_, _ = w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v, Secrets: m})
		_, _ = w.ValidateVolumeCapabilities(w.ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: v, VolumeCapabilities: []*csi.VolumeCapability{cap}, VolumeContext: m, Secrets: m})
		_, _ = w.ControllerExpandVolume(w.ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v, CapacityRange: &csi.CapacityRange{RequiredBytes: gib}, Secrets: m, VolumeCapability: cap})
		_, _ = w.ControllerModifyVolume(w.ctx, &csi.ControllerModifyVolumeRequest{VolumeId: v, Secrets: m})
		_, _ = w.CreateSnapshot(w.ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v, Secrets: m})
		_, _ = w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{Secrets: m})
		_, _ = w.GetSnapshot(w.ctx, &csi.GetSnapshotRequest{SnapshotId: "s", Secrets: m})
		_, _ = w.allocated(w.ctx, "s", 0, 0, 0)
		s, err := w.GetMetadataDelta(w.ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: "a", TargetSnapshotId: "b", Secrets: m})
		if err == nil {
			_, _ = s.Recv()
		}
		_, _ = w.DeleteSnapshot(w.ctx, &csi.DeleteSnapshotRequest{SnapshotId: "s", Secrets: m})
		_, _ = w.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: "none", Secrets: m})
	}
	log := w.log.String()
	if strings.Contains(log, secret) {
		for line := range strings.Lines(log) {
			if strings.Contains(line, secret) {
				t.Errorf("the log has a secret: %s", line)
			}
		}
	}
	for _, want := range []string{"ControllerPublishVolume", "GetMetadataDelta", "stripped", v} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not have %s", want)
		}
	}
	for _, req := range []proto.Message{
		&csi.NodeStageVolumeRequest{Secrets: m, PublishContext: m, VolumeContext: m, VolumeCapability: cap},
		&csi.NodePublishVolumeRequest{Secrets: m, PublishContext: m, VolumeContext: m, VolumeCapability: cap},
	} {
		if s := sanitize(req); strings.Contains(s, secret) || !strings.Contains(s, "token") {
			t.Errorf("got %s", s)
		}
	}
	if cap.GetMount().MountFlags[0] != "password="+secret {
		t.Error("the request itself was changed")
	}
}

func TestSizeLimits(t *testing.T) {
	s := func(n int) string { return strings.Repeat("x", n) }
	m := func(n int) map[string]string { return map[string]string{"k": s(n - 1)} }
	flags := func(n int) *csi.VolumeCapability {
		c := mountCap(1)
		c.GetMount().MountFlags = []string{s(n / 2), s(n - n/2)}
		return c
	}
	for name, tt := range map[string]struct {
		req func(n int) proto.Message
		n   int
	}{
		"string":      {func(n int) proto.Message { return &csi.DeleteVolumeRequest{VolumeId: s(n)} }, 128},
		"nested":      {func(n int) proto.Message { return &csi.CreateVolumeRequest{VolumeContentSource: fromSnapshot(s(n))} }, 128},
		"map":         {func(n int) proto.Message { return &csi.CreateVolumeRequest{Parameters: m(n)} }, 4096},
		"secrets":     {func(n int) proto.Message { return &csi.CreateVolumeRequest{Secrets: m(n)} }, 4096},
		"node_id":     {func(n int) proto.Message { return &csi.ControllerPublishVolumeRequest{NodeId: s(n)} }, 256},
		"path":        {func(n int) proto.Message { return &csi.NodePublishVolumeRequest{TargetPath: s(n)} }, 4096},
		"mount flags": {func(n int) proto.Message { return &csi.NodeStageVolumeRequest{VolumeCapability: flags(n)} }, 4096},
		"list of caps": {func(n int) proto.Message {
			return &csi.CreateVolumeRequest{VolumeCapabilities: []*csi.VolumeCapability{flags(n)}}
		}, 4096},
	} {
		if err := checkLimits(tt.req(tt.n)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := checkLimits(tt.req(tt.n + 1)); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: %d bytes are not refused", name, tt.n+1)
		}
	}
	w := newWorld(t)
	_, err := w.CreateVolume(w.ctx, create("v", func(r *csi.CreateVolumeRequest) { r.Secrets = m(2 << 20) }))
	wantCode(t, err, codes.ResourceExhausted) // by the transport, before it is kept in memory
}

// slow is an Identity whose Probe waits for its context or release.
type slow struct {
	csi.UnimplementedIdentityServer
	entered  chan time.Duration
	released chan struct{}
}

func (s slow) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	d, _ := ctx.Deadline()
	s.entered <- time.Until(d)
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.released:
		return &csi.ProbeResponse{}, nil
	}
}

func TestDefaultDeadline(t *testing.T) {
	s := slow{entered: make(chan time.Duration, 1)}
	client := csi.NewIdentityClient(serve(t, Services{Identity: s}, ServerOptions{Timeout: 50 * time.Millisecond}))
	_, err := client.Probe(t.Context(), &csi.ProbeRequest{})
	wantCode(t, err, codes.DeadlineExceeded)
	<-s.entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() { _, _ = client.Probe(ctx, &csi.ProbeRequest{}) }()
	if d := <-s.entered; d < 10*time.Second {
		t.Errorf("the caller's own deadline was cut to %v", d)
	}
	cancel()
}

func TestOuterInterceptorsSeeTheCode(t *testing.T) {
	var got []codes.Code
	client := csi.NewIdentityClient(serve(t, Services{Identity: NewIdentity("", readyFunc(func(context.Context) error { panic("x") }), keylock.New(time.Minute))},
		ServerOptions{Unary: func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			got = append(got, status.Code(err))
			return resp, err
		}}))
	_, err := client.Probe(t.Context(), &csi.ProbeRequest{})
	wantCode(t, err, codes.FailedPrecondition)
	if len(got) != 1 || got[0] != codes.FailedPrecondition {
		t.Errorf("got %v", got)
	}
}

// An orchestrator probes every few seconds, and a plugin that is unhealthy may be so for days.
func TestProbesDoNotFillTheLog(t *testing.T) {
	log, sick := &syncBuffer{}, errors.New("its disk is older than it was")
	locks := keylock.New(time.Minute)
	t.Cleanup(func() {
		if err := locks.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	client := csi.NewIdentityClient(serve(t, Services{Identity: NewIdentity("", readyFunc(func(context.Context) error { return sick }), locks)},
		ServerOptions{Logger: slog.New(slog.NewTextHandler(log, nil))}))
	for range 10 {
		_, err := client.Probe(t.Context(), &csi.ProbeRequest{})
		wantCode(t, err, codes.FailedPrecondition)
	}
	sick = nil
	for range 10 {
		_, err := client.Probe(t.Context(), &csi.ProbeRequest{})
		wantCode(t, err, codes.OK)
	}
	if got := log.String(); strings.Count(got, "disk is older") != 1 || strings.Count(got, "well again") != 1 || strings.Count(got, "\n") != 2 {
		t.Errorf("the log:\n%s", got)
	}
}

type readyFunc func(context.Context) error

func (f readyFunc) Ready(ctx context.Context) error { return f(ctx) }

// TestStop: calls in flight end, or are broken off when time is up.
func TestStop(t *testing.T) {
	for _, graceful := range []bool{true, false} {
		s := slow{entered: make(chan time.Duration, 1), released: make(chan struct{})}
		server, err := NewServer(Services{Identity: s}, ServerOptions{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "csi.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() {
			_, err := csi.NewIdentityClient(conn).Probe(t.Context(), &csi.ProbeRequest{})
			result <- err
		}()
		<-s.entered
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if graceful {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
			time.AfterFunc(50*time.Millisecond, func() { close(s.released) })
		}
		err = server.Stop(ctx)
		cancel()
		if graceful != (err == nil) {
			t.Errorf("graceful %v: Stop returned %v", graceful, err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve returned %v", err)
		}
		if err := <-result; graceful != (err == nil) {
			t.Errorf("graceful %v: the call returned %v", graceful, err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestServerNeedsIdentity(t *testing.T) {
	if _, err := NewServer(Services{}, ServerOptions{}); err == nil {
		t.Error("a server without Identity was made")
	}
}
