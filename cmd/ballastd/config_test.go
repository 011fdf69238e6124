package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

func parse(t *testing.T, args ...string) (config, error) {
	t.Helper()
	f := pflag.NewFlagSet("ballastd", pflag.ContinueOnError)
	s := addFlags(f)
	if err := f.Parse(args); err != nil {
		return config{}, err
	}
	return s.config(f)
}

func TestDefaults(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	c, err := parse(t)
	if err != nil {
		t.Fatal(err)
	}
	if c.dataDir != "/var/lib/ballast" || c.csi != "/run/ballast/csi.sock" || c.admin != "/run/ballast/admin.sock" || c.controller != "" ||
		c.nodeSocket != "" || c.metrics != "" || string(c.node) != host || c.logLevel != slog.LevelInfo || c.stopTimeout != 20*time.Second {
		t.Errorf("%+v", c)
	}
	want := []poolConfig{{name: "default", path: "/var/lib/ballast/pools/default", overProvision: 10}}
	if diff := cmp.Diff(want, c.pools, cmp.AllowUnexported(poolConfig{})); diff != "" {
		t.Error(diff)
	}
}

func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ballastd.yaml")
	if err := os.WriteFile(file, []byte(`
data-dir: /from/file
run-dir: /from/file/run
node-id: from-file
pool-capacity: 10Gi
over-provision: 3
stop-timeout: 5s
pool:
  - fast=/mnt/fast,capacity=1Gi,reserve=16Mi
  - disk=/mnt/disk,device=/dev/sdx,wipe=true,over-provision=1.5
`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BALLAST_RUN_DIR", "/from/env")
	t.Setenv("BALLAST_NODE_ID", "from-env")
	t.Setenv("CSI_ENDPOINT", "unix:///csi/csi.sock")
	c, err := parse(t, "--config", file, "--node-id", "from-flag")
	if err != nil {
		t.Fatal(err)
	}
	if c.dataDir != "/from/file" || c.runDir != "/from/env" || c.node != "from-flag" || c.csi != "/csi/csi.sock" || c.stopTimeout != 5*time.Second {
		t.Errorf("%+v", c)
	}
	want := []poolConfig{
		{name: "fast", path: "/mnt/fast", capacity: 1 << 30, overProvision: 3, reserve: 16 << 20},
		{name: "disk", path: "/mnt/disk", device: "/dev/sdx", wipe: true, capacity: 10 << 30, overProvision: 1.5},
	}
	if diff := cmp.Diff(want, c.pools, cmp.AllowUnexported(poolConfig{})); diff != "" {
		t.Error(diff)
	}
	t.Setenv("BALLAST_POOL", "a=/a b=/b")
	if c, err = parse(t, "--config", file); err != nil || len(c.pools) != 2 || c.pools[1].path != "/b" {
		t.Errorf("%+v %v", c.pools, err)
	}
}

func TestSplitEndpoints(t *testing.T) {
	c, err := parse(t, "--controller-endpoint", "unix:/x/controller.sock", "--node-endpoint", "/x/node.sock")
	if err != nil {
		t.Fatal(err)
	}
	if c.csi != "" || c.controller != "/x/controller.sock" || c.nodeSocket != "/x/node.sock" {
		t.Errorf("%+v", c)
	}
}

func TestWrongSettings(t *testing.T) {
	dir := t.TempDir()
	file := func(text string) string {
		f, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		return f.Name()
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--csi-endpoint", "tcp://127.0.0.1:1"}, "no Unix socket"},
		{[]string{"--csi-endpoint", "unix://"}, "names no path"},
		{[]string{"--csi-endpoint", "/" + strings.Repeat("x", 107)}, "at most 107"},
		{[]string{"--csi-endpoint", "/x", "--admin-endpoint", "unix:/x"}, "the same socket"},
		{[]string{"--node-id", "has space"}, "node-id"},
		{[]string{"--node-id", "-x"}, "node-id"},
		{[]string{"--node-id", strings.Repeat("n", 64)}, "limit is 63"},
		{[]string{"--pool", "x"}, "name=path"},
		{[]string{"--pool", "=x"}, "missing"},
		{[]string{"--pool", "a/b=/x"}, "slashes"},
		{[]string{"--pool", "a=/x", "--pool", "a=/y"}, "another pool"},
		{[]string{"--pool", "a=/x", "--pool", "b=/x"}, "another pool"},
		{[]string{"--pool", "a=/x,capacity=lots"}, `"lots" is no size`},
		{[]string{"--pool", "a=/x,colour=red"}, "none of capacity"},
		{[]string{"--pool", "a=/x,wipe=true"}, "with a device"},
		{[]string{"--pool", "a=/x,device=sda"}, "full path"},
		{[]string{"--over-provision", "0.5"}, "between 1 and 100"},
		{[]string{"--over-provision", "101"}, "between 1 and 100"},
		{[]string{"--pool", "a=/x,over-provision=1000"}, "between 1 and 100"},
		{[]string{"--pool", "a\nb=/x"}, "white space"},
		{[]string{"--over-provision", "NaN"}, "between 1 and 100"},
		{[]string{"--pool-capacity", "-1"}, "no size"},
		{[]string{"--metrics-address", "9000"}, "metrics-address"},
		{[]string{"--log-level", "loud"}, "log-level"},
		{[]string{"--log-format", "xml"}, "log-format"},
		{[]string{"--stop-timeout", "0s"}, "stop-timeout"},
		{[]string{"--replica-timeout", "0s"}, "replica-timeout"},
		{[]string{"--config", filepath.Join(dir, "none")}, "no such file"},
		{[]string{"--config", file("datadir: /x")}, "no such setting"},
		{[]string{"--config", file("config: /x")}, "no such setting"},
		{[]string{"--config", file("data-dir: {a: b}")}, "no plain value"},
		{[]string{"--config", file("data-dir: /x\ndata-dir: /y")}, "already set"},
		{[]string{"--config", file("stop-timeout: soon")}, "stop-timeout"},
	} {
		if _, err := parse(t, c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v", c.args, err)
		}
	}
}

// Who has joined may have the file of the token removed; who has not needs it.
func TestValidSettingsWithoutTheTokensFile(t *testing.T) {
	dir := t.TempDir()
	args := []string{"--data-dir", dir, "--listen", "10.0.0.2:9820", "--controllers", "10.0.0.1:9820", "--join", "@" + filepath.Join(dir, "gone")}
	if _, err := parse(t, args...); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a node that has not joined: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, clusterDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, clusterDir, nodeFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parse(t, args...)
	if err != nil || c.cluster.join != "" || len(c.cluster.controllers) != 1 {
		t.Errorf("a node that has: %+v %v", c.cluster, err)
	}
}
