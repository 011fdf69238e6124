package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// foreign tells whether a volume's target shows another volume's device.
func foreign(t *testing.T, h *host, target string, other volume.ID) bool {
	t.Helper()
	v, ok := h.node.known(other)
	if !ok {
		t.Fatalf("volume %s is not known", other)
	}
	return mount.IsDevice(target, v.get().device)
}

// takenByOthers tells whether a device number is in use, and not for a device of this host.
func takenByOthers(t *testing.T, h *host, fi os.FileInfo) bool {
	t.Helper()
	dev := fi.Sys().(*syscall.Stat_t).Rdev
	backing, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/loop/backing_file", unix.Major(dev), unix.Minor(dev)))
	return err == nil && !strings.HasPrefix(string(backing), h.dir)
}

// TestDeviceNumbersAreNotReused: a bind mount of a device's node, like a container's node, holds a number and not the
// device. While a volume is published its number must not become another volume's.
func TestDeviceNumbersAreNotReused(t *testing.T) {
	rw := blockCap(volume.SingleNodeWriter)

	t.Run("taken away", func(t *testing.T) {
		h := newHost(t)
		h.create("vol-a", 32*mib)
		h.create("vol-b", 32*mib)
		h.stage("vol-a", h.w("sa"), rw)
		h.publish("vol-a", h.w("sa"), h.w("ta"), rw)
		if _, err := h.node.Detach(t.Context(), nodeID, "vol-a", h.cluster.epoch("vol-a")); err != nil {
			t.Fatal(err)
		}
		h.stage("vol-b", h.w("sb"), rw)
		h.publish("vol-b", h.w("sb"), h.w("tb"), rw)
		if foreign(t, h, h.w("ta"), "vol-b") {
			t.Error("the target of a volume that was taken away shows another volume")
		}
		h.unpublish("vol-a", h.w("ta"))
		h.unstage("vol-a", h.w("sa"))
		h.unpublish("vol-b", h.w("tb"))
		h.unstage("vol-b", h.w("sb"))
	})

	t.Run("after a crash", func(t *testing.T) {
		h := newHost(t)
		for _, id := range []volume.ID{"vol-a", "vol-b"} {
			h.create(id, 32*mib)
			h.stage(id, h.w("s"+string(id)), rw)
			h.publish(id, h.w("s"+string(id)), h.w("t"+string(id)), rw)
		}
		before, err := os.Stat(h.w("tvol-b"))
		if err != nil {
			t.Fatal(err)
		}
		h.crash()
		// The first volume does not come back, so its number is free for the second one.
		h.cluster.change("vol-a", func(v *volume.Volume) { v.Attachment = nil })
		h.start()
		if foreign(t, h, h.w("tvol-a"), "vol-b") {
			t.Error("the target of a volume that did not come back shows another volume")
		}
		after, err := os.Stat(h.w("tvol-b"))
		if err != nil {
			t.Fatal(err)
		}
		// Another program of this machine may have been faster in taking the number, which nobody can prevent.
		if !os.SameFile(before, after) && !takenByOthers(t, h, before) {
			t.Error("a volume came back under another number: nodes that containers made of the first one are of no use")
		}
		for _, id := range []volume.ID{"vol-a", "vol-b"} {
			h.unpublish(id, h.w("t"+string(id)))
			h.unstage(id, h.w("s"+string(id)))
		}
	})
}

// TestStageMendsDeadDevice: a device that died under the node, or that a detach failed half way, is replaced by the next
// call that needs it.
func TestStageMendsDeadDevice(t *testing.T) {
	h := newHost(t)
	h.create("vol-a", 64*mib)
	rw := fsCap("ext4")
	h.stage("vol-a", h.w("s"), rw)
	write(t, h.w("s", "file"), "kept")

	mounts, err := filepath.Glob(filepath.Join(h.dir, "run/devices/vol-a@*"))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("mounts of the device: %v %v", mounts, err)
	}
	_ = unix.Unmount(mounts[0], unix.MNT_FORCE)                                        // it is busy; its connection is aborted
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // until that is noticed
		h.stage("vol-a", h.w("s"), rw)
		if err = os.WriteFile(h.w("s", "probe"), nil, 0o600); err == nil {
			err = mount.Sync(h.w("s"))
		}
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the device is still dead: %v", err)
		}
	}
	wantContent(t, h.w("s", "file"), "kept")
	write(t, h.w("s", "more"), "new")

	// A detach whose caller left in the middle.
	if err := h.fe.Abort(cancelled(t), "vol-a"); err == nil {
		t.Log("the abort ended in time")
	}
	h.stage("vol-a", h.w("s"), rw)
	wantContent(t, h.w("s", "more"), "new")
	h.unstage("vol-a", h.w("s"))
}

func cancelled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// TestRestoreUncoversNothing: while paths are brought back after a crash, a workload that goes on writing gets errors or
// the volume, and never the host's disk.
func TestRestoreUncoversNothing(t *testing.T) {
	h := newHost(t)
	rw := fsCap("ext4")
	h.create("vol-a", 64*mib)
	h.stage("vol-a", h.w("s"), rw)
	h.publish("vol-a", h.w("s"), h.w("t"), rw)
	h.crash()

	stop := make(chan struct{})
	var writers sync.WaitGroup
	for _, dir := range []string{h.w("s"), h.w("t")} {
		writers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					_ = os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i%8)), nil, 0o600)
				}
			}
		})
	}
	h.start()
	time.Sleep(50 * time.Millisecond)
	close(stop)
	writers.Wait()
	wantContent(t, h.w("t", "file0"), "")
	h.unpublish("vol-a", h.w("t")) // fails where there are files beneath
	h.unstage("vol-a", h.w("s"))
	if left, err := os.ReadDir(h.w("s")); err == nil && len(left) > 0 {
		t.Errorf("written to the host's disk: %v", left)
	}
}

// TestForeignMountStays: what somebody else mounted at a recorded path, while the node was away, is not taken away.
func TestForeignMountStays(t *testing.T) {
	h := newHost(t)
	rw := fsCap("ext4")
	h.create("vol-a", 64*mib)
	h.stage("vol-a", h.w("s"), rw)
	h.crash()
	if err := mount.Drop(h.w("s")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("foreign", h.w("s"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	h.start()
	if e, mounted, err := mount.At(h.w("s")); err != nil || !mounted || e.Source != "foreign" {
		t.Errorf("the foreign mount is gone: %+v %v %v", e, mounted, err)
	}
	wantErr(t, "stage", h.node.Stage(t.Context(), Stage{Volume: "vol-a", Path: h.w("s"), Capability: rw}), volume.ErrExists)
	if err := unix.Unmount(h.w("s"), 0); err != nil {
		t.Fatal(err)
	}
	h.stage("vol-a", h.w("s"), rw)
	h.unstage("vol-a", h.w("s"))
}

// mountDead mounts a filesystem whose server has gone.
func mountDead(t *testing.T, at string) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Mount("dead", at, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd))
		err = errors.Join(err, unix.Close(fd))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDeadMountsInTheWay: what is dead at a path that is given to a volume is taken away, and nothing else.
func TestDeadMountsInTheWay(t *testing.T) {
	h := newHost(t)
	h.create("vol-a", 64*mib)
	rw := fsCap("ext4")
	for _, dir := range []string{"s", "t"} {
		if err := os.Mkdir(h.w(dir), 0o700); err != nil {
			t.Fatal(err)
		}
		mountDead(t, h.w(dir))
		mountDead(t, h.w(dir))
	}
	h.stage("vol-a", h.w("s"), rw)
	publish := func() error {
		return h.node.Publish(t.Context(), Publish{Volume: "vol-a", Staging: h.w("s"), Path: h.w("t"), Capability: rw})
	}
	wantErr(t, "publish", publish(), nil)
	h.unpublish("vol-a", h.w("t"))
	// A live one beneath a dead one is somebody's.
	if err := os.MkdirAll(h.w("t"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("foreign", h.w("t"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	mountDead(t, h.w("t"))
	wantErr(t, "publish where a live mount is", publish(), volume.ErrExists)
	if e, mounted, err := mount.At(h.w("t")); err != nil || !mounted || e.Source != "foreign" {
		t.Errorf("the foreign mount is gone: %+v %v %v", e, mounted, err)
	}
	if err := unix.Unmount(h.w("t"), 0); err != nil {
		t.Fatal(err)
	}
	h.unstage("vol-a", h.w("s"))
}

// TestAPathIsOneVolumes: undoing what one volume has at a path would undo another's there.
func TestAPathIsOneVolumes(t *testing.T) {
	h := newHost(t)
	raw, rw := blockCap(volume.SingleNodeWriter), fsCap("ext4")
	h.create("vol-a", 64*mib)
	h.create("vol-b", 64*mib)
	h.stage("vol-a", h.w("s"), raw) // nothing is mounted there
	stage := func(id volume.ID, c volume.Capability) error {
		return h.node.Stage(t.Context(), Stage{Volume: id, Path: h.w("s"), Capability: c})
	}
	wantErr(t, "stage another there", stage("vol-b", rw), volume.ErrExists)
	h.crash()
	h.start()
	wantErr(t, "stage another there after a restart", stage("vol-b", rw), volume.ErrExists)
	h.unstage("vol-a", h.w("s"))
	wantErr(t, "stage another once it is free", stage("vol-b", rw), nil)
	h.unstage("vol-b", h.w("s"))
	errs := make(chan error, 2)
	for _, id := range []volume.ID{"vol-a", "vol-b"} {
		go func() { errs <- stage(id, raw) }()
	}
	if a, b := <-errs, <-errs; (a == nil) == (b == nil) || !errors.Is(errors.Join(a, b), volume.ErrExists) {
		t.Errorf("two at once: %v, %v", a, b)
	}
	for _, id := range []volume.ID{"vol-a", "vol-b"} {
		h.unstage(id, h.w("s"))
	}
	if len(h.node.paths) > 0 {
		t.Errorf("left: %v", h.node.paths)
	}
}

// TestPathsInTheWay: a call that is refused leaves alone what it found at its path.
func TestPathsInTheWay(t *testing.T) {
	h := newHost(t)
	h.create("vol-a", 64*mib)
	h.create("vol-b", 64*mib)
	fs, raw := fsCap("ext4"), blockCap(volume.SingleNodeWriter)
	h.stage("vol-a", h.w("sa"), fs)
	h.stage("vol-b", h.w("sb"), raw)
	if err := errors.Join(
		os.WriteFile(h.w("file"), []byte("mine"), 0o600), os.WriteFile(h.w("empty"), nil, 0o600),
		os.Mkdir(h.w("dir"), 0o700), os.Symlink(h.w("dir"), h.w("link")),
	); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id      volume.ID
		staging string
		at      string
		c       volume.Capability
		want    error
	}{
		{"vol-a", "sa", h.w("file"), fs, volume.ErrExists},
		{"vol-a", "sa", h.w("empty"), fs, volume.ErrExists},
		{"vol-a", "sa", h.w("link"), fs, volume.ErrExists},
		{"vol-a", "sa", h.w("sa"), fs, volume.ErrExists},
		{"vol-a", "sa", h.w("file", "below"), fs, volume.ErrExists},
		{"vol-a", "sa", h.w(strings.Repeat("n", 256)), fs, volume.ErrInvalid},
		{"vol-b", "sb", h.w("file"), raw, volume.ErrExists},
		{"vol-b", "sb", h.w("dir"), raw, volume.ErrExists},
		{"vol-b", "sb", h.w("sb"), raw, volume.ErrExists},
		{"vol-b", "sb", h.w("link"), raw, volume.ErrExists},
		{"vol-b", "sb", h.w(strings.Repeat("n", 256)), raw, volume.ErrInvalid},
	} {
		err := h.node.Publish(t.Context(), Publish{Volume: c.id, Staging: h.w(c.staging), Path: c.at, Capability: c.c})
		wantErr(t, string(c.id)+" at "+c.at, err, c.want)
		if _, err := os.Lstat(h.w("sb")); err != nil {
			t.Errorf("%s at %s: the staging directory is gone", c.id, c.at)
		}
	}
	wantErr(t, "stage at a file", h.node.Stage(t.Context(), Stage{Volume: "vol-a", Path: h.w("file"), Capability: fs}), volume.ErrExists)
	wantErr(t, "stage at a long name", h.node.Stage(t.Context(), Stage{Volume: "vol-a", Path: h.w(strings.Repeat("n", 256)), Capability: fs}), volume.ErrInvalid)
	wantContent(t, h.w("file"), "mine")
	wantContent(t, h.w("empty"), "")
	for _, at := range []string{"dir", "link"} {
		if _, err := os.Lstat(h.w(at)); err != nil {
			t.Error(err)
		}
	}
	h.unstage("vol-a", h.w("sa"))
	h.unstage("vol-b", h.w("sb"))
}
