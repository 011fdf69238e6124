package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// What a killed process leaves is no obstacle: sockets, locks, devices and mounts are taken over, and a volume that was
// in use is again. It needs root.
func TestKilledAndStartedAgain(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir := shortDir(t)
	bin, err := harness.Build(ctx, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(harness.Options{Dir: dir, Bin: bin, Split: true, Args: []string{"--pool-capacity", "1Gi"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	o := &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: filepath.Join(dir, "pods"), Patience: 30 * time.Second}
	c := &harness.Claim{Name: "data", Size: 64 << 20, FSType: "ext4"}
	if err := o.Up(ctx, c); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(o.TargetPath(c), "file")
	if err := writeSynced(file, "precious"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := d.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := d.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
			t.Fatalf("%q, %v\n%s", b, err, d.LogTail(30))
		}
	}
	if err := o.Down(ctx, c); err != nil {
		t.Fatal(err)
	}
	if err := o.Delete(ctx, c); err != nil {
		t.Fatal(err)
	}
	// While it starts a signal stops it as well.
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	starts := strings.Count(readLog(t, d), startingLine)
	if err := d.Launch(); err != nil {
		t.Fatal(err)
	}
	// Once it says so it has taken over its signals, and is opening its databases.
	for end := time.Now().Add(30 * time.Second); strings.Count(readLog(t, d), startingLine) == starts; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not start:\n%s", d.LogTail(30))
		}
	}
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	if left := d.Leaks(c.ID()); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if trouble := d.LogTrouble(); trouble != "" {
		t.Error(trouble)
	}
}

const startingLine = "ballastd is starting"

func readLog(t *testing.T, d *harness.Daemon) string {
	t.Helper()
	b, err := os.ReadFile(d.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func writeSynced(path, text string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
