package agent

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// useRaw has a workload write to the volume's raw device at an offset.
func useRaw(h *host, off int64, content string) {
	h.t.Helper()
	c := blockCap(volume.SingleNodeWriter)
	h.stage(vol1, h.w("raw"), c)
	h.publish(vol1, h.w("raw"), h.w("dev"), c)
	f, err := os.OpenFile(h.w("dev"), os.O_WRONLY, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	_, err = f.WriteAt([]byte(content), off)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		h.t.Fatal(err)
	}
	h.unpublish(vol1, h.w("dev"))
	h.unstage(vol1, h.w("raw"))
}

// TestRawDataIsNeverFormatted: what a workload stored through the raw device is safe from mkfs, also where it is not at
// an end of the device, or where an mkfs that failed allowed another one.
func TestRawDataIsNeverFormatted(t *testing.T) {
	t.Run("in the middle", func(t *testing.T) {
		h := newHost(t)
		h.create(vol1, 64*mib)
		useRaw(h, 32*mib, "data")
		wantErr(t, "stage", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")}), volume.ErrInUse)
		if p := h.cluster.volumes[vol1].Filesystem.Phase; p != volume.Blank {
			t.Errorf("phase %q", p)
		}
	})
	t.Run("in the middle of what was cloned", func(t *testing.T) {
		h := newHost(t)
		h.create(vol1, 64*mib)
		useRaw(h, 32*mib, "data")
		h.cut(vol1, "snap", false)
		h.createFrom("vol-2", 64*mib, "snap")
		err := h.node.Stage(t.Context(), Stage{Volume: "vol-2", Path: h.w("s"), Capability: fsCap("ext4")})
		wantErr(t, "stage", err, volume.ErrInUse)
		if !strings.Contains(err.Error(), "carries data that is not a filesystem") {
			t.Errorf("the refusal does not say why: %v", err)
		}
		// The way out that the refusal names.
		raw := blockCap(volume.SingleNodeWriter)
		h.stage("vol-2", h.w("raw2"), raw)
		h.publish("vol-2", h.w("raw2"), h.w("dev2"), raw)
		if out, err := exec.Command("blkdiscard", h.w("dev2")).CombinedOutput(); err != nil {
			t.Fatalf("blkdiscard: %v: %s", err, out)
		}
		h.unpublish("vol-2", h.w("dev2"))
		h.unstage("vol-2", h.w("raw2"))
		h.stage("vol-2", h.w("s"), fsCap("ext4"))
		h.unstage("vol-2", h.w("s"))

		h.create("vol-3", 64*mib)
		h.cut("vol-3", "empty", false)
		h.createFrom("vol-4", 64*mib, "empty")
		h.stage("vol-4", h.w("s4"), fsCap("ext4"))
		h.unstage("vol-4", h.w("s4"))
	})
	t.Run("after a failed mkfs", func(t *testing.T) {
		h := newHost(t)
		h.create(vol1, 64*mib)
		h.cluster.change(vol1, func(v *volume.Volume) {
			v.Filesystem = volume.Filesystem{Phase: volume.Formatting, Type: "ext4"}
		})
		useRaw(h, 32*mib, "data")
		wantErr(t, "stage", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")}), volume.ErrDataLoss)
	})
}

// TestCleanStopWritesOutRawDevices: what a workload wrote to a raw device through the page cache is there after a clean
// stop.
func TestCleanStopWritesOutRawDevices(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	c := blockCap(volume.SingleNodeWriter)
	h.stage(vol1, h.w("s"), c)
	h.publish(vol1, h.w("s"), h.w("dev"), c)
	f, err := os.OpenFile(h.w("dev"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("unsynced"), 8*mib); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), h.node.Close()); err != nil {
		t.Fatal(err)
	}
	h.start()
	if f, err = os.Open(h.w("dev")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8)
	if _, err := f.ReadAt(got, 8*mib); err != nil || string(got) != "unsynced" {
		t.Errorf("read %q, %v", got, err)
	}
	f.Close()
	h.unpublish(vol1, h.w("dev"))
	h.unstage(vol1, h.w("s"))
}

// TestRefusingPoolLosesNoSyncedByte: a device that refuses writes is given up when it is unstaged. What was synced
// before is there when the pool takes writes again.
func TestRefusingPoolLosesNoSyncedByte(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			h := newFaultyHost(t)
			h.create(vol1, 320*mib)
			h.stage(vol1, h.w("s"), fsCap(fsType))
			write(t, h.w("s", "synced"), "kept")
			h.pool.mu.Lock()
			dev := h.pool.open[h.replica(vol1).ID]
			h.pool.mu.Unlock()
			broken := blocktest.Fault{Err: errors.New("broken")}
			for _, op := range []blocktest.Op{blocktest.Write, blocktest.Zero, blocktest.Flush} {
				dev.Set(op, broken)
			}
			// Acknowledged is only what is synced, and nothing can be now.
			if err := os.WriteFile(h.w("s", "unsynced"), []byte("lost"), 0o600); err == nil {
				if f, err := os.Open(h.w("s", "unsynced")); err == nil {
					if f.Sync() == nil {
						t.Error("a sync was acknowledged by a device that refuses writes")
					}
					f.Close()
				}
			}
			h.unstage(vol1, h.w("s"))
			h.stage(vol1, h.w("s"), fsCap(fsType))
			wantContent(t, h.w("s", "synced"), "kept")
			h.unstage(vol1, h.w("s"))
		})
	}
}
