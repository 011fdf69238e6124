package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
	"github.com/ballast-csi/ballast/test/admintest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) {
	flag.Parse()
	now = func() time.Time { return admintest.Now }
	time.Local = time.UTC
	for _, v := range []string{"NO_COLOR", "CLICOLOR_FORCE", socketEnv, serverEnv, certEnv} {
		os.Unsetenv(v)
	}
	os.Exit(m.Run())
}

type result struct {
	code     int
	out, err string
}

func ctl(socket string, args ...string) result {
	var out, errs bytes.Buffer
	code := run(context.Background(), append([]string{"--socket", socket}, args...), streams{in: strings.NewReader(""), out: &out, err: &errs})
	return result{code, out.String(), errs.String()}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got; -update rewrites it):\n%s", path, diff)
	}
}

// The column is as wide as the process id.
var pids = regexp.MustCompile(`pid=\d+ +|WHO +`)

func TestWhatIsShown(t *testing.T) {
	socket := admintest.Serve(t, admintest.Sample())
	for _, args := range []string{
		"status", "volume list", "volume list -o wide", "volume list --tenant lab", "volume get orders", "volume get vol-00000000000000000002",
		"volume why orders", "snapshot list", "snapshot list -o wide", "snapshot get monday", "snapshot why orphan", "snapshot list --volume orders",
		"pool list", "pool list -o wide", "pool list --node node-1", "pool get fast", "pool why fast", "pool why default", "node list", "node get node-1",
		"node why node-1", "node why node-2", "quota list", "quota get shop", "quota why shop", "quota why lab", "quota why nobody", "pool strays",
		"volume list -o json", "volume get orders -o yaml", "snapshot list -o json", "pool list -o json", "node list -o json", "quota list -o json",
		"status -o json", "volume why orders -o json", "pool strays -o json",
	} {
		t.Run(args, func(t *testing.T) {
			r := ctl(socket, strings.Fields(args)...)
			if r.code != exitOK {
				t.Fatalf("exit %d: %s", r.code, r.err)
			}
			golden(t, strings.NewReplacer(" ", "_", "-", "").Replace(args), r.out)
		})
	}
}

// Only data is on stdout with -o json and yaml, also where there is nothing, and for changes.
func TestDataIsData(t *testing.T) {
	empty := admintest.Serve(t, &admintest.Cluster{NodeList: []volume.Node{{ID: "node-1"}}})
	full := admintest.Serve(t, admintest.Sample())
	for _, c := range []struct{ socket, args string }{
		{empty, "volume list"}, {empty, "snapshot list"}, {empty, "pool list"}, {empty, "quota list"}, {empty, "pool strays"},
		{full, "volume create new --size 1Gi"}, {full, "volume expand new 2Gi"}, {full, "volume set new --iops 10"}, {full, "snapshot create new s"},
		{full, "snapshot delete s --yes"}, {full, "volume delete new --yes"}, {full, "quota set lab --volumes 3"}, {full, "quota delete lab"},
		{full, "volume detach orders --yes"}, {full, "version"},
	} {
		for _, format := range []string{"json", "yaml"} {
			r := ctl(c.socket, append(strings.Fields(c.args), "-o", format)...)
			if r.code != exitOK {
				// Deleting for the second time, in the other format, finds nothing.
				if format == "yaml" && strings.Contains(c.args, "delete") && r.code == exitNotFound {
					continue
				}
				t.Errorf("%s: exit %d: %s", c.args, r.code, r.err)
				continue
			}
			var v any
			err := json.Unmarshal([]byte(r.out), &v)
			if format == "yaml" {
				err = yaml.Unmarshal([]byte(r.out), &v)
			}
			if err != nil || v == nil {
				t.Errorf("%s -o %s is no data (%v): %q", c.args, format, err, r.out)
			}
		}
		if r := ctl(c.socket, strings.Fields(c.args)...); r.code == exitOK && strings.Contains(c.args, "list") && r.out != "" {
			t.Errorf("%s of nothing prints %q to stdout", c.args, r.out)
		}
	}
}

func TestPoolForget(t *testing.T) {
	c := admintest.Sample()
	socket := admintest.Serve(t, c)
	forget := func(args ...string) result {
		return ctl(socket, append([]string{"pool", "forget", "default", "--yes"}, args...)...)
	}
	if r := forget(); r.code != exitRefused || !strings.Contains(r.err, "is open") {
		t.Errorf("an open pool: exit %d: %s", r.code, r.err)
	}
	c.Mu.Lock()
	for n := range c.NodeList {
		for p := range c.NodeList[n].Pools {
			c.NodeList[n].Pools[p].Capacity = 0
		}
	}
	c.Mu.Unlock()
	if r := ctl(socket, "pool", "forget", "default"); r.code != exitUsage {
		t.Errorf("nobody was asked: exit %d", r.code)
	}
	if r := forget(); r.code != exitRefused || !strings.Contains(r.err, "only copy") {
		t.Errorf("the only copy: exit %d: %s", r.code, r.err)
	}
	if r := forget("--accept-data-loss"); r.code != exitOK || !strings.Contains(r.out, "is forgotten") || !strings.Contains(r.out, "vol-00000000000000000001 has no copy") {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
	if r := forget(); r.code != exitNotFound {
		t.Errorf("a pool that is forgotten: exit %d: %s", r.code, r.err)
	}
	if r := ctl(socket, "pool", "forget", "fast", "--yes", "-o", "json"); r.code != exitOK || !strings.Contains(r.out, `"lostVolumes": []`) {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
}

func TestChanges(t *testing.T) {
	c := admintest.Sample()
	socket := admintest.Serve(t, c)
	for _, step := range []struct{ args, want string }{
		{"volume create copy --from-snapshot monday --size 10Gi --tenant shop --iops 500 --bandwidth 10Mi", "Volume copy (vol-00000000000000000004, 10 GiB) is ready."},
		{"volume create raw --access block --size 4096", "Volume raw"},
		{"volume expand copy 12Gi", "Volume copy has 12 GiB now."},
		{"volume set copy --iops 0 --bandwidth 20Mi --replicas 3 --min-in-sync 2 --data-locality none", "Volume copy: IOPS unlimited, bandwidth 20 MiB/s, replicas 3, min-in-sync 2, data-locality none."},
		{"snapshot create copy tuesday --freeze", "Snapshot tuesday (snap-00000000000000000003) of volume copy is ready."},
		{"snapshot delete tuesday -y", "Snapshot tuesday is deleted."},
		{"volume detach scratch", "Volume scratch is not attached."},
		{"volume detach orders -y", "Volume orders is detached from node node-1."},
		{"volume delete copy -y", "Volume copy is deleted."},
		{"quota set team --logical 100Gi --snapshots 5", "100 GiB"},
		{"quota set team --volumes 7", "0 / 7"},
		{"quota set team --snapshots none", "0 / ∞"},
		{"quota delete team", "The quota of team is deleted."},
	} {
		r := ctl(socket, strings.Fields(step.args)...)
		if r.code != exitOK || !strings.Contains(r.out, step.want) {
			t.Errorf("%s: exit %d\n%s%s", step.args, r.code, r.out, r.err)
		}
		if step.args == "quota set team --volumes 7" {
			want := volume.Amounts{LogicalBytes: 100 << 30, Snapshots: 5, Volumes: 7}
			if got := c.QuotaList[len(c.QuotaList)-1].Limit; got != want {
				t.Errorf("limits that were not given changed: %+v", got)
			}
		}
	}
	c.Mu.Lock()
	raw := c.Vols[len(c.Vols)-1]
	c.Mu.Unlock()
	if raw.Capabilities[0].Access != volume.AccessBlock || raw.Size != volume.MinSize {
		t.Errorf("raw is %+v", raw)
	}
	r := ctl(socket, "audit", "--last", "100")
	golden(t, "audit", pids.ReplaceAllString(r.out, "WHO  "))
}

func TestErrorsSayWhatToDo(t *testing.T) {
	socket := admintest.Serve(t, admintest.Sample())
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	starting := admintest.Sample()
	starting.NotReady = errors.New("ballastd is opening its pools")
	busy := admintest.Serve(t, starting)
	for _, c := range []struct {
		socket, args string
		code         int
		want         []string
	}{
		{filepath.Join(dir, "none.sock"), "volume list", exitUnreachable, []string{"no socket", "ballastd does not run", "systemctl start ballastd", "--socket"}},
		{dead, "volume list", exitUnreachable, []string{"nobody listens", "start it"}},
		{socket, "volume get nothing", exitNotFound, []string{`no volume has the id or the name "nothing"`}},
		{socket, "snapshot why nothing", exitNotFound, []string{`no snapshot`}},
		{socket, "pool get nothing", exitNotFound, []string{`no pool`}},
		{socket, "node get nothing", exitNotFound, []string{`no node`}},
		{socket, "quota get nobody", exitNotFound, []string{`neither a quota nor a volume`}},
		{socket, "volume delete orders --yes", exitRefused, []string{"attached to node node-1; detach it there first"}},
		{socket, "volume delete scratch", exitUsage, []string{"say --yes"}},
		{socket, "volume create big --size 2Ti --tenant shop", exitRefused, []string{`"shop" may have 30 GiB`}},
		{socket, "volume expand orders 1Gi", exitUsage, []string{"never shrink"}},
		{socket, "volume expand orders lots", exitUsage, []string{`"lots" is no size`, "10Gi"}},
		{socket, "volume create x --from-snapshot a --from-volume b", exitUsage, []string{"from-snapshot", "from-volume"}},
		{socket, "volume create x --access block --fs-type xfs", exitUsage, []string{"for mount access"}},
		{socket, "volume get", exitUsage, []string{"VOLUME is missing", "usage: ballastctl volume get VOLUME"}},
		{socket, "volume get a b", exitUsage, []string{`"b" is one argument too many`}},
		{socket, "volume lst", exitUsage, []string{"Did you mean get or list"}},
		{socket, "volume list -o xml", exitUsage, []string{"table, wide, json, yaml"}},
		{socket, "volume list --nope", exitUsage, []string{"--nope"}},
		{socket, "quota set shop", exitUsage, []string{"logical"}},
		{socket, "quota set shop --volumes -1", exitUsage, []string{"at least 1"}},
		{socket, "quota set shop --volumes 0", exitUsage, []string{"at least 1", "none"}},
		{socket, "quota set shop --logical 0", exitUsage, []string{"at least 1", "none"}},
		{socket, "quota set shop --volumes many", exitUsage, []string{"no number"}},
		{socket, "bogus", exitUsage, []string{"bogus"}},
		{socket, "pool check " + filepath.Join(dir, "nothing"), exitNotFound, []string{"no pool in"}},
		{socket, "pool export " + dir + " @ " + filepath.Join(dir, "x"), exitUsage, []string{"VOLUME@SNAPSHOT"}},
	} {
		r := ctl(c.socket, strings.Fields(c.args)...)
		if r.code != c.code {
			t.Errorf("%s: exit %d, want %d: %s", c.args, r.code, c.code, r.err)
		}
		for _, w := range c.want {
			if !strings.Contains(r.err, w) {
				t.Errorf("%s: %q is not in %q", c.args, w, r.err)
			}
		}
		if c.code != exitOK && (r.out != "" || strings.Count(r.err, "\n") != 1 || strings.Contains(r.err, "rpc error")) {
			t.Errorf("%s: stdout %q, stderr %q", c.args, r.out, r.err)
		}
	}
	if r := ctl(busy, "status"); r.code != exitUnreachable || !strings.Contains(r.out, "not ready: ballastd is opening its pools") {
		t.Errorf("status: exit %d, %s", r.code, r.out)
	}
}

func TestNamesCannotControlTheTerminal(t *testing.T) {
	c := admintest.Sample()
	c.Vols[0].Name = "evil\x1b[2J\x9bname"
	c.Sick["vol-00000000000000000001"][0].Message = "multi\nline\x1b]0;x\x07"
	socket := admintest.Serve(t, c)
	for _, args := range [][]string{{"volume", "list"}, {"volume", "get", "vol-00000000000000000001"}, {"volume", "list", "-o", "wide"}, {"snapshot", "list"}} {
		r := ctl(socket, args...)
		for _, b := range r.out {
			if b != '\n' && b < 0x20 || b == 0x9b || b == 0x7f {
				t.Errorf("%v prints %q", args, r.out)
			}
		}
	}
}

func TestCompletion(t *testing.T) {
	socket := admintest.Serve(t, admintest.Sample())
	for _, c := range []struct {
		args []string
		want []string
		not  []string
	}{
		{[]string{"volume", "get", ""}, []string{"orders\t", "orders-restored\t", "vol-00000000000000000001\torders"}, nil},
		{[]string{"volume", "why", "orders-"}, []string{"orders-restored\t"}, []string{"scratch"}},
		{[]string{"volume", "get", "orders", ""}, nil, []string{"orders"}},
		{[]string{"snapshot", "delete", "mo"}, []string{"monday\t"}, []string{"orphan"}},
		{[]string{"snapshot", "list", "--volume", ""}, []string{"orders\t"}, nil},
		{[]string{"pool", "get", ""}, []string{"default\t", "pool-2\t"}, nil},
		{[]string{"node", "why", ""}, []string{"node-1", "node-2"}, nil},
		{[]string{"quota", "set", ""}, []string{"shop", "lab"}, nil},
		{[]string{"volume", "create", "x", "--from-snapshot", ""}, []string{"monday\t"}, nil},
		{[]string{"volume", "list", "-o", ""}, []string{"json", "yaml"}, nil},
		{[]string{"vol"}, []string{"volume\t"}, nil},
	} {
		r := ctl(socket, append([]string{"__complete"}, c.args...)...)
		if r.code != exitOK {
			t.Fatalf("%v: exit %d: %s", c.args, r.code, r.err)
		}
		for _, w := range c.want {
			if !strings.Contains(r.out, w) {
				t.Errorf("%v: %q is not in %q", c.args, w, r.out)
			}
		}
		for _, n := range c.not {
			if strings.Contains(r.out, n) {
				t.Errorf("%v: %q is in %q", c.args, n, r.out)
			}
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := ctl(socket, "completion", shell); r.code != exitOK || !strings.Contains(r.out, "ballastctl") {
			t.Errorf("completion %s: exit %d", shell, r.code)
		}
	}
	if r := ctl(filepath.Join(t.TempDir(), "none"), "__complete", "volume", "get", ""); r.code != exitOK {
		t.Errorf("completion without a daemon: exit %d %s", r.code, r.err)
	}
}

// running is a ballastctl that goes on until it is stopped or ends.
type running struct {
	mu       sync.Mutex
	out, err bytes.Buffer
	stop     context.CancelFunc
	code     chan int
}

// Write implements io.Writer for standard output.
func (r *running) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.Write(p)
}

func (r *running) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.String()
}

func startCtl(t *testing.T, socket string, args ...string) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{stop: cancel, code: make(chan int, 1)}
	go func() {
		r.code <- run(ctx, append([]string{"--socket", socket}, args...), streams{in: strings.NewReader(""), out: r, err: &r.err})
	}()
	t.Cleanup(cancel)
	return r
}

// until waits for the output to have a text.
func (r *running) until(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !strings.Contains(r.output(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%q does not come: %q", text, r.output())
		}
	}
}

func (r *running) end(t *testing.T) (int, string) {
	t.Helper()
	select {
	case code := <-r.code:
		return code, r.err.String()
	case <-time.After(30 * time.Second):
		t.Fatal("it does not end")
		return 0, ""
	}
}

func TestWatch(t *testing.T) {
	c := admintest.Sample()
	socket := admintest.Serve(t, c)
	w := startCtl(t, socket, "volume", "watch", "orders-restored", "-o", "json")
	w.until(t, `"added"`)
	c.Mu.Lock()
	c.Vols[1].Size = c.Vols[1].Target
	c.Mu.Unlock()
	w.until(t, `"changed"`)
	if err := c.DeleteVolume(t.Context(), c.Vols[1].ID); err != nil {
		t.Fatal(err)
	}
	if code, errs := w.end(t); code != exitOK {
		t.Fatalf("exit %d: %s", code, errs)
	}
	var types []string
	for _, line := range strings.Split(strings.TrimSpace(w.output()), "\n") {
		var e struct {
			Type   string
			Object struct{ Name string }
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Object.Name != "orders-restored" {
			t.Fatalf("%q: %v", line, err)
		}
		types = append(types, e.Type)
	}
	if diff := cmp.Diff([]string{"added", "changed", "deleted"}, types); diff != "" {
		t.Error(diff)
	}

	w = startCtl(t, socket, "pool", "watch")
	w.until(t, "added    default")
	w.stop()
	if code, errs := w.end(t); code != exitOK || errs != "" {
		t.Errorf("exit %d: %s", code, errs)
	}
	if r := ctl(socket, "volume", "watch", "nothing"); r.code != exitNotFound {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
}

func TestAuditIsFollowed(t *testing.T) {
	c := admintest.Sample()
	socket := admintest.Serve(t, c)
	if err := c.SetQuota(t.Context(), "before", volume.Amounts{}); err != nil {
		t.Fatal(err)
	}
	f := startCtl(t, socket, "audit", "--follow", "-o", "json", "--last", "1")
	f.until(t, `"object":"before"`)
	for _, tenant := range []string{"one", "two"} {
		if err := c.SetQuota(t.Context(), tenant, volume.Amounts{}); err != nil {
			t.Fatal(err)
		}
		f.until(t, `"object":"`+tenant+`"`)
	}
	f.stop()
	if code, errs := f.end(t); code != exitOK || errs != "" {
		t.Errorf("exit %d: %s", code, errs)
	}
	if n := strings.Count(f.output(), "\n"); n != 3 {
		t.Errorf("%d entries: %s", n, f.output())
	}
}

func TestPages(t *testing.T) {
	c := &admintest.Cluster{}
	for i := range 2500 {
		_, err := c.CreateVolume(t.Context(), control.CreateVolume{Name: "v" + strings.Repeat("x", i%50) + string(rune('a'+i%26)) + time.Duration(i).String()})
		if err != nil {
			t.Fatal(err)
		}
	}
	r := ctl(admintest.Serve(t, c), "volume", "list", "-o", "json")
	var vs []volumeView
	if err := json.Unmarshal([]byte(r.out), &vs); err != nil || len(vs) != 2500 {
		t.Errorf("%d volumes, %v", len(vs), err)
	}
}

func TestDocsCoverEveryCommand(t *testing.T) {
	dir := t.TempDir()
	if r := ctl("", "docs", dir); r.code != exitOK {
		t.Fatal(r.err)
	}
	for _, name := range []string{"README", "volume", "snapshot", "replica", "pool", "node", "cluster", "salvage", "quota", "audit", "status", "version"} {
		b, err := os.ReadFile(filepath.Join(dir, name+".md"))
		if err != nil {
			t.Fatal(err)
		}
		kept, err := os.ReadFile(filepath.Join("../../docs/cli", name+".md"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, kept) {
			t.Errorf("docs/cli/%s.md is old; write it anew: go run ./cmd/ballastctl docs docs/cli", name)
		}
	}
}
