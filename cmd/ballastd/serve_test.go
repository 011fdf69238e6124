package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// output is a buffer that may be read while it is written.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// daemonUnderTest is a ballastd in this process.
type daemonUnderTest struct {
	dir    string
	stderr *output
	stop   context.CancelFunc
	code   chan int
}

func start(t *testing.T, dir string, args ...string) *daemonUnderTest {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &daemonUnderTest{dir: dir, stderr: &output{}, stop: cancel, code: make(chan int, 1)}
	args = append([]string{"--data-dir", filepath.Join(dir, "data"), "--run-dir", filepath.Join(dir, "run"), "--node-id", "node-1", "--pool-capacity", "1Gi"}, args...)
	go func() { p.code <- run(ctx, args, process{io.Discard, p.stderr, func(*slog.Logger) {}}) }()
	t.Cleanup(cancel)
	return p
}

// end asks the process to stop and returns its exit code.
func (p *daemonUnderTest) end(t *testing.T) int {
	t.Helper()
	p.stop()
	return p.wait(t)
}

func (p *daemonUnderTest) wait(t *testing.T) int {
	t.Helper()
	select {
	case code := <-p.code:
		return code
	case <-time.After(30 * time.Second):
		t.Fatalf("it does not end:\n%s", p.stderr)
		return 0
	}
}

func (p *daemonUnderTest) socket(name string) string { return filepath.Join(p.dir, "run", name) }

func client(t *testing.T, socket string) adminpb.AdminClient {
	t.Helper()
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return adminpb.NewAdminClient(c)
}

func (p *daemonUnderTest) ready(t *testing.T) adminpb.AdminClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	a := client(t, p.socket("admin.sock"))
	for {
		h, err := a.Health(ctx, &adminpb.HealthRequest{})
		if err == nil && h.Ready {
			return a
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not ready (%v, %v):\n%s", h, err, p.stderr)
		case code := <-p.code:
			t.Fatalf("it ended with %d:\n%s", code, p.stderr)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Socket names have a limit that t.TempDir may exceed.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestStartStopStart(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir)
	a := p.ready(t)
	if _, err := a.CreateVolume(t.Context(), &adminpb.CreateVolumeRequest{Name: "kept", SizeBytes: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"admin.sock", "csi.sock"} {
		fi, err := os.Stat(p.socket(name))
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, fi, err)
		}
	}
	if fi, err := os.Stat(filepath.Join(dir, "data")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the data directory: %v %v", fi, err)
	}
	// A stream that goes on for ever does not hold up the stop.
	w, err := a.Watch(t.Context(), &adminpb.WatchRequest{Kind: adminpb.Kind_VOLUME})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if code := p.end(t); code != exitOK {
		t.Fatalf("exit %d:\n%s", code, p.stderr)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if _, err := os.Stat(p.socket("admin.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	p = start(t, dir)
	if _, err := p.ready(t).GetVolume(t.Context(), &adminpb.GetRequest{Ref: "kept"}); err != nil {
		t.Error(err)
	}
	if code := p.end(t); code != exitOK {
		t.Fatalf("exit %d:\n%s", code, p.stderr)
	}
}

func TestSecondInstanceIsRefused(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir)
	p.ready(t)
	second := start(t, dir, "--run-dir", filepath.Join(dir, "run2"))
	if code := second.wait(t); code != exitLocked {
		t.Errorf("exit %d", code)
	}
	for _, want := range []string{fmt.Sprintf("pid %d", os.Getpid()), "another ballastd", "--data-dir"} {
		if !strings.Contains(second.stderr.String(), want) {
			t.Errorf("%q is not in %q", want, second.stderr)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "run2")); !os.IsNotExist(err) {
		t.Error("the refused process made a directory")
	}
	third := start(t, dir, "--data-dir", filepath.Join(dir, "data3"))
	if code := third.wait(t); code != exitFailed || !strings.Contains(third.stderr.String(), "another process serves") {
		t.Errorf("exit %d: %s", code, third.stderr)
	}
	if code := p.end(t); code != exitOK {
		t.Errorf("exit %d:\n%s", code, p.stderr)
	}
}

func TestSocketsThatAreInTheWay(t *testing.T) {
	dir := shortDir(t)
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(dir, "run", "admin.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	p := start(t, dir)
	p.ready(t)
	if code := p.end(t); code != exitOK {
		t.Errorf("exit %d:\n%s", code, p.stderr)
	}
	if err := os.WriteFile(stale, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	p = start(t, dir)
	if code := p.wait(t); code != exitFailed || !strings.Contains(p.stderr.String(), "is no socket") {
		t.Errorf("exit %d: %s", code, p.stderr)
	}
	if b, err := os.ReadFile(stale); err != nil || string(b) != "precious" {
		t.Error("a file was replaced by a socket")
	}
}

// Whatever fails while starting ends the process, with what was opened closed again.
func TestFailingStart(t *testing.T) {
	dir := shortDir(t)
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	meta := filepath.Join(dir, "data", "meta")
	if err := os.WriteFile(meta, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, dir)
	if code := p.wait(t); code != exitFailed || !strings.Contains(p.stderr.String(), "meta") {
		t.Errorf("exit %d: %s", code, p.stderr)
	}
	if err := os.Remove(meta); err != nil {
		t.Fatal(err)
	}
	p = start(t, dir, "--pool", "default="+filepath.Join(dir, "data", "lock"))
	if code := p.wait(t); code != exitFailed || !strings.Contains(p.stderr.String(), "pool default") {
		t.Errorf("exit %d: %s", code, p.stderr)
	}
	p = start(t, dir)
	p.ready(t)
	if code := p.end(t); code != exitOK {
		t.Errorf("exit %d: %s", code, p.stderr)
	}
}

func TestMetricsAndHealthAreServed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	p := start(t, shortDir(t), "--metrics-address", address)
	p.ready(t)
	for path, want := range map[string]string{"/healthz": "ok", "/readyz": "ok", "/metrics": "ballast_ready 1"} {
		r, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode != http.StatusOK || !strings.Contains(string(b), want) {
			t.Errorf("%s: %d %v %q", path, r.StatusCode, err, b)
		}
	}
	if code := p.end(t); code != exitOK {
		t.Errorf("exit %d: %s", code, p.stderr)
	}
}

func TestTheGate(t *testing.T) {
	g := newGate()
	pass := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		return h(ctx, req)
	}
	call := func(method string) codes.Code {
		_, err := g.unary(pass)(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(context.Context, any) (any, error) { return nil, nil })
		return status.Code(err)
	}
	const probe, create = "/csi.v1.Identity/Probe", "/csi.v1.Controller/CreateVolume"
	if call(probe) != codes.OK || call(create) != codes.Unavailable || g.Ready(t.Context()) == nil {
		t.Error("while starting")
	}
	g.open(func(context.Context) error { return nil })
	if call(create) != codes.OK || g.Ready(t.Context()) != nil {
		t.Error("while open")
	}
	g.shut()
	if call(probe) != codes.OK || call(create) != codes.Unavailable || g.Ready(t.Context()) == nil {
		t.Error("while stopping")
	}
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"version"}, exitOK, "ballastd dev"},
		{[]string{"--help"}, exitOK, "one-node cluster"},
		{[]string{"bogus"}, exitUsage, `"bogus"`},
		{[]string{"--bogus"}, exitUsage, "--bogus"},
		{[]string{"--log-level", "loud"}, exitUsage, "loud"},
	} {
		var out bytes.Buffer
		if code := run(t.Context(), c.args, process{&out, &out, func(*slog.Logger) {}}); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%v: exit %d: %s", c.args, code, out.String())
		}
	}
}
