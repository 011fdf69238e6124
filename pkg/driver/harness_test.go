package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// world is the real services over an in-memory state of n1 with a pool of 100 GiB, n2 with one of 10 GiB and n3 without,
// behind a real socket.
type world struct {
	t      testing.TB
	ctx    context.Context
	gate   *gate
	agents *fakeAgents
	log    *syncBuffer
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.SnapshotMetadataClient
}

func newWorld(t testing.TB) *world {
	t.Helper()
	store, err := meta.Open("", meta.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, ctx: t.Context(), agents: &fakeAgents{store: store,
		replicas: map[volume.ReplicaID]int64{}, snapshots: map[volume.SnapshotID][]control.Extent{}}, log: &syncBuffer{}}
	w.gate = &gate{Service: control.New(store, w.agents, control.Options{})}
	for id, size := range map[volume.NodeID]int64{"n1": 100 * gib, "n2": 10 * gib} {
		err := w.gate.RegisterNode(w.ctx, volume.Node{ID: id, Pools: []volume.Pool{{ID: volume.PoolID("pool-" + id), Name: "default",
			Node: id, Kind: volume.PoolDir, Path: "/pool", Capacity: size, OverProvision: 1}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.gate.RegisterNode(w.ctx, volume.Node{ID: "n3"}); err != nil { // it has no pool
		t.Fatal(err)
	}
	locks := keylock.New(time.Minute)
	t.Cleanup(func() {
		if err := locks.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	conn := serve(t, Services{
		Identity:         NewIdentity("1.2.3", w.gate, locks),
		Controller:       NewController(w.gate, locks),
		GroupController:  NewGroupController(w.gate, locks),
		SnapshotMetadata: NewSnapshotMetadata(w.gate),
	}, ServerOptions{Logger: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	w.GroupControllerClient = csi.NewGroupControllerClient(conn)
	w.IdentityClient, w.ControllerClient, w.SnapshotMetadataClient =
		csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewSnapshotMetadataClient(conn)
	return w
}

// serve runs a server for the time of the test and returns a connection to it.
func serve(t testing.TB, s Services, o ServerOptions) *grpc.ClientConn {
	t.Helper()
	server, err := NewServer(s, o)
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
	conn, err := grpc.NewClient("passthrough:///csi", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path) // a test's name may have what URLs may not
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := server.Stop(ctx); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return conn
}

// gate lets a test see and disturb calls of the use cases.
type gate struct {
	*control.Service
	mu            sync.Mutex
	before, after func(ctx context.Context, method string) error
	ready         func(ctx context.Context) error
	calls         map[string]int
}

// disturb sets what happens before and after each call; nil is nothing.
func (g *gate) disturb(before, after func(ctx context.Context, method string) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.before, g.after, g.calls = before, after, map[string]int{}
}

func (g *gate) count(method string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.calls[method]
}

func (g *gate) pass(ctx context.Context, method string, fn func() error) error {
	g.mu.Lock()
	before, after := g.before, g.after
	if g.calls != nil {
		g.calls[method]++
	}
	g.mu.Unlock()
	if before != nil {
		if err := before(ctx, method); err != nil {
			return err
		}
	}
	if err := fn(); err != nil {
		return err
	}
	if after != nil {
		return after(ctx, method)
	}
	return nil
}

func (g *gate) CreateVolume(ctx context.Context, r control.CreateVolume) (v volume.Volume, err error) {
	err = g.pass(ctx, "CreateVolume", func() error { v, err = g.Service.CreateVolume(ctx, r); return err })
	return v, err
}

func (g *gate) DeleteVolume(ctx context.Context, id volume.ID) error {
	return g.pass(ctx, "DeleteVolume", func() error { return g.Service.DeleteVolume(ctx, id) })
}

func (g *gate) Attach(ctx context.Context, r control.Attach) (v volume.Volume, err error) {
	err = g.pass(ctx, "Attach", func() error { v, err = g.Service.Attach(ctx, r); return err })
	return v, err
}

func (g *gate) ModifyVolume(ctx context.Context, id volume.ID, q control.Modify) (v volume.Volume, err error) {
	err = g.pass(ctx, "ModifyVolume", func() error { v, err = g.Service.ModifyVolume(ctx, id, q); return err })
	return v, err
}

func (g *gate) ExpandVolume(ctx context.Context, id volume.ID, required, limit int64) (v volume.Volume, err error) {
	err = g.pass(ctx, "ExpandVolume", func() error { v, err = g.Service.ExpandVolume(ctx, id, required, limit); return err })
	return v, err
}

func (g *gate) CreateSnapshot(ctx context.Context, r control.CreateSnapshot) (s volume.Snapshot, err error) {
	err = g.pass(ctx, "CreateSnapshot", func() error { s, err = g.Service.CreateSnapshot(ctx, r); return err })
	return s, err
}

func (g *gate) Volumes(ctx context.Context, p control.Page) (v []volume.Volume, next string, err error) {
	err = g.pass(ctx, "Volumes", func() error { v, next, err = g.Service.Volumes(ctx, p); return err })
	return v, next, err
}

func (g *gate) Ready(ctx context.Context) error {
	g.mu.Lock()
	ready := g.ready
	g.mu.Unlock()
	if ready != nil {
		return ready(ctx)
	}
	return g.Service.Ready(ctx)
}

// fakeAgents is the data plane of every node: sizes of replicas, extents of snapshots.
type fakeAgents struct {
	store      control.Store
	mu         sync.Mutex
	replicas   map[volume.ReplicaID]int64
	snapshots  map[volume.SnapshotID][]control.Extent
	conditions []volume.Condition
	detached   []string
	// down does not answer a detach; fenced are the replicas that were fenced, with their epochs.
	down   volume.NodeID
	fenced map[volume.ReplicaID]volume.Epoch
	// cutting says what becomes of a cut; nil is fine.
	cutting func(volume.ID) error
}

func (a *fakeAgents) locked(fn func()) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	fn()
	return nil
}

func (a *fakeAgents) CreateReplica(_ context.Context, _ volume.NodeID, r control.ReplicaSpec) error {
	return a.locked(func() { a.replicas[r.ID] = r.Size })
}

func (a *fakeAgents) DeleteReplica(_ context.Context, _ volume.NodeID, _ volume.PoolID, id volume.ReplicaID) error {
	return a.locked(func() { delete(a.replicas, id) })
}

func (a *fakeAgents) HasReplica(_ context.Context, _ volume.NodeID, _ volume.PoolID, id volume.ReplicaID) (ok bool, err error) {
	return ok, a.locked(func() { _, ok = a.replicas[id] })
}

func (a *fakeAgents) ResizeReplica(_ context.Context, _ volume.NodeID, _ volume.PoolID, id volume.ReplicaID, size int64) error {
	return a.locked(func() { a.replicas[id] = size })
}

func (a *fakeAgents) ExpandVolume(ctx context.Context, r volume.Replica, _ volume.ID, _ volume.Epoch, size int64) error {
	return a.ResizeReplica(ctx, r.Node, r.Pool, r.ID, size)
}

func (a *fakeAgents) Fence(_ context.Context, r volume.Replica, _ volume.ID, epoch volume.Epoch) (time.Duration, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.Node == a.down {
		return 0, fmt.Errorf("node %s is down: %w", r.Node, volume.ErrUnavailable)
	}
	if a.fenced == nil {
		a.fenced = map[volume.ReplicaID]volume.Epoch{}
	}
	a.fenced[r.ID] = epoch
	return 20 * time.Millisecond, nil
}

func (a *fakeAgents) Inspect(context.Context, volume.Replica, volume.ID) (control.ReplicaReport, error) {
	return control.ReplicaReport{Present: true}, nil
}

func (a *fakeAgents) OpenEngine(context.Context, volume.NodeID, volume.ID, volume.Epoch) error {
	return nil
}

func (a *fakeAgents) Evict(context.Context, volume.NodeID, volume.ID, volume.Epoch, volume.ReplicaID) error {
	return nil
}

func (a *fakeAgents) Drain(context.Context, volume.NodeID, control.SnapshotSpec) error { return nil }

func (a *fakeAgents) Release(context.Context, volume.NodeID, control.SnapshotSpec) error { return nil }

// CutSnapshot has every replica of the volume that it knows cut.
func (a *fakeAgents) CutSnapshot(ctx context.Context, _ volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	holders := []volume.ReplicaID{s.Replica}
	if s.Barrier.Number != 0 {
		v, err := a.store.Volume(ctx, s.Volume)
		if err != nil {
			return nil, err
		}
		holders = nil
		for _, r := range v.InSync() {
			holders = append(holders, r.ID)
		}
	}
	err := a.locked(func() { a.snapshots[s.ID] = nil })
	a.mu.Lock()
	cutting := a.cutting
	a.mu.Unlock()
	if cutting != nil {
		err = cutting(s.Volume)
	}
	return holders, err
}

func (a *fakeAgents) DeleteSnapshot(_ context.Context, _ volume.NodeID, _ volume.PoolID, id volume.SnapshotID, _ volume.ReplicaID, _ uint64) error {
	return a.locked(func() { delete(a.snapshots, id) })
}

func (a *fakeAgents) Detach(_ context.Context, n volume.NodeID, id volume.ID, _ volume.Epoch) (bool, error) {
	a.mu.Lock()
	down := a.down
	a.mu.Unlock()
	if n == down {
		return false, fmt.Errorf("node %s is down: %w", n, volume.ErrUnavailable)
	}
	return true, a.locked(func() { a.detached = append(a.detached, fmt.Sprintf("%s from %s", id, n)) })
}

func (a *fakeAgents) SetQoS(context.Context, volume.NodeID, volume.ID, volume.Epoch, volume.QoS) error {
	return nil
}

func (a *fakeAgents) Observe(_ context.Context, _ volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	out := make([]control.Observation, len(of))
	return out, a.locked(func() {
		for i := range out {
			out[i].Replica = slices.Clone(a.conditions)
		}
	})
}

func (a *fakeAgents) Digest(context.Context, volume.Replica, volume.SnapshotID, int64, int) (control.Digest, error) {
	return control.Digest{}, volume.ErrUnavailable
}

func (a *fakeAgents) Extents(ctx context.Context, _ volume.Replica, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error {
	var list []control.Extent
	_ = a.locked(func() { list = a.snapshots[s] })
	for _, e := range list {
		if e.Offset+e.Length <= offset {
			continue
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

// held is what exists: replicas with sizes, and snapshots.
func (a *fakeAgents) held() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return fmt.Sprint(a.replicas, slices.Sorted(maps.Keys(a.snapshots)))
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func mountCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
}

func blockCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

var writer = mountCap(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)

func create(name string, change ...func(*csi.CreateVolumeRequest)) *csi.CreateVolumeRequest {
	r := &csi.CreateVolumeRequest{
		Name:               name,
		VolumeCapabilities: []*csi.VolumeCapability{writer},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: gib},
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func (w *world) mustCreate(name string, change ...func(*csi.CreateVolumeRequest)) *csi.Volume {
	w.t.Helper()
	resp, err := w.CreateVolume(w.ctx, create(name, change...))
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.GetVolume()
}

func (w *world) mustSnapshot(name, source string) *csi.Snapshot {
	w.t.Helper()
	resp, err := w.CreateSnapshot(w.ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: source})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.GetSnapshot()
}

func (w *world) publish(id, node string) *csi.ControllerPublishVolumeRequest {
	return &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: node, VolumeCapability: writer}
}

func (w *world) mustPublish(id, node string) *csi.ControllerPublishVolumeResponse {
	w.t.Helper()
	resp, err := w.ControllerPublishVolume(w.ctx, w.publish(id, node))
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

// state is everything that exists, for comparing before and after.
func (w *world) state() string {
	w.t.Helper()
	vs, _, err := w.gate.Service.Volumes(w.ctx, control.Page{All: true})
	if err != nil {
		w.t.Fatal(err)
	}
	ss, _, err := w.gate.Service.Snapshots(w.ctx, control.SnapshotFilter{}, control.Page{All: true})
	if err != nil {
		w.t.Fatal(err)
	}
	qs, err := w.gate.Quotas(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	gs, err := w.agents.store.Groups(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := range vs { // what a cut that was taken back leaves
		vs[i].Revision, vs[i].Barriers, vs[i].GivenUp = 0, 0, nil
	}
	b, err := json.Marshal([]any{vs, ss, gs, qs, w.agents.held()})
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	s := status.Convert(err)
	if s.Code() != want {
		t.Errorf("got %s (%s), want %s", s.Code(), s.Message(), want)
	}
	if len(s.Details()) != 0 {
		t.Errorf("status.details are not empty: %v", s.Details())
	}
	if err != nil && s.Message() == "" {
		t.Error("status.message is empty")
	}
}
