package metrics

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	b, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(b)
}

type fakeDevice struct {
	block.Device
	err error
}

func (f fakeDevice) ReadAt(context.Context, []byte, int64) error  { return f.err }
func (f fakeDevice) WriteAt(context.Context, []byte, int64) error { return f.err }
func (f fakeDevice) Zero(context.Context, int64, int64) error     { return f.err }
func (f fakeDevice) Flush(context.Context) error                  { return f.err }

func well() Health {
	ok := func(context.Context) error { return nil }
	return Health{Alive: ok, Ready: ok}
}

func TestStateIsShown(t *testing.T) {
	m := New("v1.2.3")
	state := State{
		Volumes: []volume.Volume{
			{ID: "vol-1", Name: "data", Tenant: "shop", State: volume.Ready, Size: 1 << 30, PhysicalBytes: 4096, Attachment: &volume.Attachment{Node: "n1"},
				Parameters: volume.Parameters{Replicas: 3}, Replicas: []volume.Replica{{Role: volume.InSync}, {Role: volume.InSync}, {Role: volume.Stale}}},
			{ID: "vol-2", Name: "other", Tenant: "shop", State: volume.Creating, Size: 1 << 20},
		},
		Snapshots: []volume.Snapshot{{ID: "snap-1", State: volume.Ready}, {ID: "snap-2", State: volume.Ready,
			Holders: []volume.Replica{{Pool: "p1"}, {Pool: "p2"}}, Differs: &volume.Difference{Alike: [][]volume.PoolID{{"p1"}, {"p2"}}}}},
		Conditions: map[volume.ID][]volume.Condition{"vol-1": {
			{Severity: volume.Inaccessible, Reason: "PoolFull", Message: "a"},
			{Severity: volume.Inaccessible, Reason: "PoolFull", Message: "b"},
		}},
		Nodes:  []volume.Node{{ID: "n1", LastSeen: 5e9, Pools: []volume.Pool{{Name: "default", Capacity: 100, Used: 40, Provisioned: 150, OverProvision: 2}}}},
		Quotas: []volume.Quota{{Tenant: "shop", Limit: volume.Amounts{Volumes: 3}, Used: volume.Amounts{Volumes: 2}}},
	}
	var lookErr error
	if err := m.Watch(func(context.Context) (State, error) { return state, lookErr }); err != nil {
		t.Fatal(err)
	}
	engines := map[volume.ID]volume.EngineReport{
		"vol-1": {Phase: "live", Waiting: 4, Resyncs: []volume.Resync{{Replica: "rep-3", Done: 100, Left: 50, Rate: 25}}},
		"vol-2": {Phase: "fencing", Dirty: 1 << 20},
	}
	if err := m.WatchEngines(func() map[volume.ID]volume.EngineReport { return engines }); err != nil {
		t.Fatal(err)
	}
	if err := m.WatchRaft(func() Raft { return Raft{Leads: true, HasLeader: true, Term: 7, Applied: 41, Committed: 42, Voters: 3} }); err != nil {
		t.Fatal(err)
	}
	code, body := get(t, m.Handler(well()), "/metrics")
	if code != http.StatusOK {
		t.Fatalf("status %d: %s", code, body)
	}
	for _, line := range []string{
		`ballast_build_info{goversion=`,
		`ballast_ready 1`,
		`ballast_volumes{state="ready"} 1`,
		`ballast_volumes{state="deleting"} 0`,
		`ballast_snapshots{state="ready"} 2`,
		`ballast_snapshots_differing 1`,
		`ballast_volume_info{name="data",tenant="shop",volume="vol-1"} 1`,
		`ballast_volume_size_bytes{volume="vol-1"} 1.073741824e+09`,
		`ballast_volume_attached{node="n1",volume="vol-1"} 1`,
		`ballast_volume_condition{reason="PoolFull",severity="Inaccessible",volume="vol-1"} 1`,
		`ballast_pool_used_bytes{node="n1",pool="default"} 40`,
		`ballast_node_last_seen_timestamp_seconds{node="n1"} 5`,
		`ballast_quota_limit{resource="volumes",tenant="shop"} 3`,
		`ballast_volume_replicas_in_sync{volume="vol-1"} 2`,
		`ballast_volume_replicas_wanted{volume="vol-1"} 3`,
		`ballast_replicas{role="in-sync"} 2`,
		`ballast_replicas{role="stale"} 1`,
		`ballast_replicas{role="filling"} 0`,
		`ballast_volumes_health{health="Inaccessible"} 1`,
		`ballast_volumes_health{health="Degraded"} 0`,
		`ballast_node_info{node="n1",state="active",zone=""} 1`,
		`ballast_raft_leader 1`,
		`ballast_raft_leader_known 1`,
		`ballast_raft_term 7`,
		`ballast_raft_applied_index 41`,
		`ballast_raft_commit_index 42`,
		`ballast_raft_voters 3`,
		`ballast_engine_live{volume="vol-1"} 1`,
		`ballast_engine_live{volume="vol-2"} 0`,
		`ballast_engine_waiting_requests{volume="vol-1"} 4`,
		`ballast_engine_dirty_bytes{volume="vol-2"} 1.048576e+06`,
		`ballast_resync_done_bytes{replica="rep-3",volume="vol-1"} 100`,
		`ballast_resync_left_bytes{replica="rep-3",volume="vol-1"} 50`,
		`ballast_resync_bytes_per_second{replica="rep-3",volume="vol-1"} 25`,
		`ballast_quota_used{resource="logical_bytes",tenant="shop"} 0`,
	} {
		if !strings.Contains(body, line) {
			t.Errorf("no %q", line)
		}
	}
	if strings.Contains(body, `ballast_quota_limit{resource="snapshots"`) {
		t.Error("an absent limit has a series")
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}

	lookErr = errors.New("starting")
	if _, body = get(t, m.Handler(well()), "/metrics"); !strings.Contains(body, "ballast_ready 0") || strings.Contains(body, "ballast_volumes") || !strings.Contains(body, "ballast_raft_term 7") {
		t.Error("not shown as not ready, with what is known of the log")
	}
}

// docs/metrics.md lists every metric, and no other.
func TestDocumented(t *testing.T) {
	m := New("v1")
	err := errors.Join(
		m.Watch(func(context.Context) (State, error) { return State{}, nil }),
		m.WatchEngines(func() map[volume.ID]volume.EngineReport { return nil }),
		m.WatchRaft(func() Raft { return Raft{} }),
	)
	if err != nil {
		t.Fatal(err)
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		m.registry.Describe(descs)
		close(descs)
	}()
	var there []string
	name := regexp.MustCompile(`fqName: "(ballast_\w+)"`)
	for d := range descs {
		if found := name.FindStringSubmatch(d.String()); found != nil {
			there = append(there, found[1])
		}
	}
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, found := range regexp.MustCompile("(?m)^\\| `(ballast_\\w+)`").FindAllStringSubmatch(string(text), -1) {
		listed = append(listed, found[1])
	}
	slices.Sort(there)
	slices.Sort(listed)
	if d := cmp.Diff(there, listed); d != "" {
		t.Errorf("metrics -, docs/metrics.md +\n%s", d)
	}
}

func TestSeriesAreBounded(t *testing.T) {
	m := New("v1")
	state := State{Volumes: make([]volume.Volume, maxVolumes+7)}
	for i := range state.Volumes {
		state.Volumes[i] = volume.Volume{ID: volume.ID(strings.Repeat("v", 4) + string(rune(0x4e00+i))), State: volume.Ready}
	}
	if err := m.Watch(func(context.Context) (State, error) { return state, nil }); err != nil {
		t.Fatal(err)
	}
	_, body := get(t, m.Handler(well()), "/metrics")
	if n := strings.Count(body, "\nballast_volume_size_bytes{"); n != maxVolumes {
		t.Errorf("%d series", n)
	}
	if !strings.Contains(body, "ballast_volumes_without_series 7") {
		t.Error("what is hidden is not counted")
	}
}

func TestIOIsCountedAndForgotten(t *testing.T) {
	m := New("v1")
	d := m.Device("vol-1", fakeDevice{})
	ctx := context.Background()
	for range 3 {
		if err := d.WriteAt(ctx, make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.ReadAt(ctx, make([]byte, 512), 0), d.Zero(ctx, 0, 8192), d.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := m.Device("vol-1", fakeDevice{err: broken}).Flush(ctx); !errors.Is(err, broken) {
		t.Fatalf("the error became %v", err)
	}
	_, body := get(t, m.Handler(well()), "/metrics")
	for _, line := range []string{
		`ballast_replica_io_operations_total{op="write",volume="vol-1"} 3`,
		`ballast_replica_io_bytes_total{op="write",volume="vol-1"} 12288`,
		`ballast_replica_io_bytes_total{op="discard",volume="vol-1"} 8192`,
		`ballast_replica_io_operations_total{op="flush",volume="vol-1"} 2`,
		`ballast_replica_io_errors_total{op="flush",volume="vol-1"} 1`,
		`ballast_replica_io_duration_seconds_count{op="read",volume="vol-1"} 1`,
	} {
		if !strings.Contains(body, line) {
			t.Errorf("no %q", line)
		}
	}
	m.Forget("vol-1")
	if _, body = get(t, m.Handler(well()), "/metrics"); strings.Contains(body, "vol-1") {
		t.Error("series of a volume that was forgotten are left")
	}
}

func TestCallsAreMeasured(t *testing.T) {
	m := New("v1")
	_, err := m.UnaryInterceptor()(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Identity/Probe"},
		func(context.Context, any) (any, error) { return nil, status.Error(codes.Aborted, "busy") })
	if status.Code(err) != codes.Aborted {
		t.Fatal(err)
	}
	_, body := get(t, m.Handler(well()), "/metrics")
	if !strings.Contains(body, `ballast_rpc_duration_seconds_count{code="Aborted",method="/csi.v1.Identity/Probe"} 1`) {
		t.Error(body)
	}
}

func TestHealth(t *testing.T) {
	h := well()
	h.Ready = func(context.Context) error { return errors.New("pools are being opened") }
	handler := New("v1").Handler(h)
	if code, _ := get(t, handler, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz is %d", code)
	}
	code, body := get(t, handler, "/readyz")
	if code != http.StatusServiceUnavailable || !strings.Contains(body, "pools are being opened") {
		t.Errorf("readyz is %d %q", code, body)
	}
}

func BenchmarkDevice(b *testing.B) {
	d := New("v1").Device("vol-1", fakeDevice{})
	p := make([]byte, 4096)
	for b.Loop() {
		if err := d.WriteAt(context.Background(), p, 0); err != nil {
			b.Fatal(err)
		}
	}
}
