package agent

import (
	"context"
	"os"
	"path/filepath"
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
		if err := h.node.Detach(t.Context(), nodeID, "vol-a"); err != nil {
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
		if !os.SameFile(before, after) {
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
	_ = unix.Unmount(mounts[0], unix.MNT_FORCE) // it is busy; its connection is aborted
	for mount.Sync(h.w("s")) == nil {           // until that is noticed
		time.Sleep(10 * time.Millisecond)
	}
	h.stage("vol-a", h.w("s"), rw)
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
