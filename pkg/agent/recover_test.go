package agent

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// childEnv makes the test binary a node that is killed: its value is the host's directory.
const childEnv = "BALLAST_TEST_NODE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		runChild(dir)
	}
	os.Exit(m.Run())
}

var killed = []struct {
	id volume.ID
	c  volume.Capability
}{
	{"vol-ext4", fsCap("ext4")}, {"vol-xfs", fsCap("xfs")}, {"vol-btrfs", fsCap("btrfs")}, {"vol-block", blockCap(volume.SingleNodeWriter)},
}

// runChild stages and publishes, says so, and waits to be killed.
func runChild(dir string) {
	t := &testing.T{}
	h := &host{t: t, dir: dir, cluster: &fakeCluster{volumes: map[volume.ID]volume.Volume{}}}
	ctx := context.Background()
	fail := func(err error) {
		if err != nil {
			os.Stdout.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
	}
	fail(h.open(ctx))
	h.node.Start(h.cluster)
	<-h.node.recovered
	for _, k := range killed {
		fail(h.createVolume(ctx, k.id, 320*mib, ""))
		staging, at := h.w("s-"+string(k.id)), h.w("t-"+string(k.id))
		fail(h.node.Stage(ctx, Stage{Volume: k.id, Path: staging, Capability: k.c}))
		fail(h.node.Publish(ctx, Publish{Volume: k.id, Staging: staging, Path: at, Capability: k.c}))
		name := at
		if k.c.Access == volume.AccessMount {
			name = filepath.Join(at, "file")
		}
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		fail(err)
		_, err = f.WriteString("synced")
		fail(errors.Join(err, f.Sync(), f.Close()))
	}
	os.Stdout.WriteString("ready\n")
	select {}
}

// After a kill every path is live again with what was synced, and everything can be undone.
func TestKilled(t *testing.T) {
	h := newHost(t)
	if err := h.node.Close(); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+h.dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	if err != nil || line != "ready\n" {
		t.Fatalf("child: %q, %v", line, err)
	}
	for _, k := range killed {
		if _, mounted, err := mount.At(h.w("t-" + string(k.id))); err != nil || !mounted {
			t.Errorf("%s: the dead target is uncovered: %v", k.id, err)
		}
		h.cluster.volumes[k.id] = h.volume(k.id, 320*mib, "")
		h.cluster.change(k.id, func(v *volume.Volume) { v.Epoch, v.ConfigVersion = 2, 2 }) // as the child left it
		if k.c.Access == volume.AccessMount {
			h.cluster.change(k.id, func(v *volume.Volume) {
				v.Filesystem = volume.Filesystem{Phase: volume.Formatted, Type: k.c.FSType}
			})
		}
	}
	h.start()
	for _, k := range killed {
		at := h.w("t-" + string(k.id))
		name := at
		if k.c.Access == volume.AccessMount {
			name = filepath.Join(at, "file")
		}
		if got := readDevice(t, name, 6); got != "synced" {
			t.Errorf("%s: read %q", k.id, got)
		}
		if cs, err := h.node.Health(t.Context(), k.id); err != nil || len(cs) > 0 {
			t.Errorf("%s: health %v, %v", k.id, cs, err)
		}
		h.publish(k.id, h.w("s-"+string(k.id)), at, k.c)
		h.unpublish(k.id, at)
		h.unstage(k.id, h.w("s-"+string(k.id)))
	}
}

// A volume that was detached, deleted, or whose workload is gone while the node was away is not brought back.
func TestRestartWithoutVolume(t *testing.T) {
	for name, change := range map[string]func(h *host){
		"detached": func(h *host) { h.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = nil }) },
		"moved": func(h *host) {
			h.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = &volume.Attachment{Node: "node-2"} })
		},
		"deleted": func(h *host) { delete(h.cluster.volumes, vol1) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 64*mib)
			h.stage(vol1, h.w("s"), fsCap("ext4"))
			h.publish(vol1, h.w("s"), h.w("t"), fsCap("ext4"))
			h.crash()
			change(h)
			h.start()
			if _, mounted, err := mount.At(h.w("t")); err != nil || !mounted {
				t.Errorf("the dead target is uncovered: %v", err)
			}
			h.unpublish(vol1, h.w("t"))
			h.unstage(vol1, h.w("s"))
		})
	}
	t.Run("workload gone", func(t *testing.T) {
		h := newHost(t)
		h.create(vol1, 64*mib)
		h.stage(vol1, h.w("s"), fsCap("ext4"))
		h.publish(vol1, h.w("s"), h.w("pod", "t"), fsCap("ext4"))
		h.crash()
		if err := mount.Drop(h.w("pod", "t")); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(h.w("pod")); err != nil {
			t.Fatal(err)
		}
		h.start()
		if _, err := os.Lstat(h.w("pod")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the path of a workload that is gone was made again: %v", err)
		}
		h.unstage(vol1, h.w("s"))
	})
}

// The controllers do not answer at first: the node is ready, says what is missing, and goes on by itself.
func TestRestoreIsRetried(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	h.publish(vol1, h.w("s"), h.w("t"), fsCap("ext4"))
	write(t, h.w("t", "file"), "content")
	h.crash()
	h.cluster.down = volume.ErrUnavailable
	h.boot()
	wantErr(t, "ready before the start", h.node.Ready(t.Context()), volume.ErrUnavailable)
	wantErr(t, "stage before the start", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")}), volume.ErrUnavailable)
	h.node.Start(h.cluster)
	<-h.node.recovered
	wantErr(t, "ready", h.node.Ready(t.Context()), nil)
	if cs, err := h.conditions(h.replica(vol1), vol1); err != nil || reasons(cs) != "Inaccessible/DeviceNotRestored" {
		t.Errorf("conditions %v, %v", cs, err)
	}
	_, err := h.node.Stats(t.Context(), vol1, h.w("t"))
	wantErr(t, "stats", err, volume.ErrUnavailable)
	if _, mounted, err := mount.At(h.w("t")); err != nil || !mounted {
		t.Errorf("the dead target is uncovered: %v", err)
	}
	h.cluster.mu.Lock()
	h.cluster.down = nil
	h.cluster.mu.Unlock()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		cs, err := h.conditions(h.replica(vol1), vol1)
		if err == nil && len(cs) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("conditions stay: %v, %v", cs, err)
		}
	}
	wantContent(t, h.w("t", "file"), "content")
	h.unpublish(vol1, h.w("t"))
	h.unstage(vol1, h.w("s"))
}

// A call for a volume that is not restored yet does it itself.
func TestStageRestores(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	h.publish(vol1, h.w("s"), h.w("t"), fsCap("ext4"))
	write(t, h.w("t", "file"), "content")
	h.crash()
	h.boot()
	// Connected, but nothing is brought back in the background.
	var c Cluster = h.cluster
	h.node.cluster.Store(&c)
	h.publish(vol1, h.w("s"), h.w("t"), fsCap("ext4"))
	wantContent(t, h.w("t", "file"), "content")
	h.unpublish(vol1, h.w("t"))
	h.unstage(vol1, h.w("s"))
	h.node.Start(h.cluster)
}

// A clean stop writes out what the workload did not sync.
func TestCleanStop(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	if err := os.WriteFile(h.w("s", "file"), []byte("unsynced"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.node.Close(), h.node.Close()); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "stage after the stop", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")}), volume.ErrUnavailable)
	h.start()
	wantContent(t, h.w("s", "file"), "unsynced")
	h.unstage(vol1, h.w("s"))
}

func TestFreezeAroundSnapshot(t *testing.T) {
	for _, fsType := range mount.Types {
		t.Run(fsType, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			h.stage(vol1, h.w("s"), fsCap(fsType))
			if err := os.WriteFile(h.w("s", "file"), []byte("unsynced"), 0o600); err != nil {
				t.Fatal(err)
			}
			h.cut(vol1, snap1, true)
			write(t, h.w("s", "file"), "later")
			h.createFrom(vol2, 320*mib, snap1)
			h.stage(vol2, h.w("s2"), fsCap(fsType))
			wantContent(t, h.w("s2", "file"), "unsynced")
			h.unstage(vol2, h.w("s2"))
			h.unstage(vol1, h.w("s"))
			// Not mounted: there is nothing to freeze.
			h.cut(vol1, "snap-2", true)
		})
	}
}

// A filesystem that cannot be frozen, because its device waits, gives no snapshot and goes on when the device does.
func TestFreezeGivesUp(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	hung := h.pool.open[h.replica(vol1).ID].Faulty
	if err := os.WriteFile(h.w("s", "file"), make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	hung.Set(blocktest.Write, blocktest.Fault{Hang: true})
	spec := control.SnapshotSpec{ID: snap1, Volume: vol1, Replica: h.replica(vol1).ID, Pool: poolID, Freeze: true, Barrier: h.announce(vol1, snap1)}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := h.node.CutSnapshot(ctx, nodeID, spec)
	wantErr(t, "cut", err, volume.ErrUnavailable)
	if _, err := os.Stat(h.pool.path(string(snap1))); err == nil {
		t.Error("a snapshot was cut")
	}
	hung.Set(blocktest.Write, blocktest.Fault{})
	write(t, h.w("s", "file"), "goes on")
	if _, err := h.node.CutSnapshot(t.Context(), nodeID, spec); err != nil {
		t.Fatal(err)
	}
	h.unstage(vol1, h.w("s"))
}

// A crash within a freeze: the next start thaws, and the paths are live.
func TestCrashWhileFrozen(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	write(t, h.w("s", "file"), "content")
	v, _ := h.node.known(vol1)
	rec := v.rec.clone()
	rec.Frozen = true
	if err := h.node.save(v, rec); err != nil {
		t.Fatal(err)
	}
	thaw, err := h.node.cfg.Mounter.Freeze(t.Context(), h.node.anchor(vol1), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = thaw() }) // a frozen filesystem that nobody can reach blocks its writers for ever
	writer := make(chan struct{})
	go func() {
		defer close(writer)
		_ = os.WriteFile(h.w("s", "blocked"), nil, 0o600)
	}()
	time.Sleep(50 * time.Millisecond)
	// The devices die; the process that would thaw is gone.
	h.restart()
	<-writer
	_ = thaw() // closes the directory that a dead process would not hold open
	wantContent(t, h.w("s", "file"), "content")
	h.unstage(vol1, h.w("s"))
}

func TestConditions(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	conditions := func() string {
		t.Helper()
		cs, err := h.conditions(h.replica(vol1), vol1)
		if err != nil {
			t.Fatal(err)
		}
		return reasons(cs)
	}
	h.pool.conditions = []volume.Condition{{Severity: volume.Degraded, Reason: "PoolFull"}}
	if got := conditions(); got != "Degraded/PoolFull" {
		t.Errorf("conditions %q", got)
	}
	h.pool.conditions = nil
	// An error of the device makes ext4 read-only: that is how it was made.
	bad := h.pool.open[h.replica(vol1).ID].Faulty
	bad.Set(blocktest.Write, blocktest.Fault{Err: errors.New("broken")})
	for i := 0; i < 20 && !strings.Contains(conditions(), "Inaccessible/FilesystemReadOnly"); i++ {
		_ = os.WriteFile(h.w("s", "file"), make([]byte, mib), 0o600)
		_ = mount.Sync(h.w("s"))
	}
	if got := conditions(); got != "Inaccessible/FilesystemReadOnly" {
		t.Errorf("conditions %q", got)
	}
	h.unstage(vol1, h.w("s")) // also while the device fails for good
	bad.Set(blocktest.Write, blocktest.Fault{})
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	write(t, h.w("s", "file"), "repaired")
	if got := conditions(); got != "" {
		t.Errorf("conditions %q", got)
	}
	h.unstage(vol1, h.w("s"))

	other := h.replica(vol1)
	other.Pool = "pool-9"
	if cs, err := h.conditions(other, vol1); err != nil || reasons(cs) != "Inaccessible/PoolMissing" {
		t.Errorf("conditions %v, %v", cs, err)
	}
	other = h.replica("vol-9")
	if cs, err := h.conditions(volume.Replica{}, vol1); err != nil || len(cs) > 0 {
		t.Errorf("a node that has no replica of the volume: %v, %v", cs, err)
	}
	if cs, err := h.conditions(other, "vol-9"); err != nil || reasons(cs) != "Inaccessible/ReplicaMissing" {
		t.Errorf("conditions %v, %v", cs, err)
	}
	_, err := h.node.Health(t.Context(), "vol-9")
	wantErr(t, "health of an unknown volume", err, volume.ErrNotFound)
	if cs, err := h.node.Health(t.Context(), vol1); err != nil || len(cs) > 0 {
		t.Errorf("health %v, %v", cs, err)
	}
	if cs := h.node.StorageHealth(); len(cs) > 0 {
		t.Errorf("storage health %v", cs)
	}
}

func TestReports(t *testing.T) {
	h := newHost(t)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		h.cluster.mu.Lock()
		registered, reports := h.cluster.register, h.cluster.reports
		h.cluster.mu.Unlock()
		if registered == 1 && reports == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d registrations, %d reports", registered, reports)
		}
	}
}
