package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const vol1 = volume.ID("vol-1")

func TestLifecycle(t *testing.T) {
	for _, fsType := range mount.Types {
		t.Run(fsType, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			staging, at := h.w("staging"), h.w("pod", "mount")
			c := fsCap(fsType, "noatime")
			for range 2 {
				h.stage(vol1, staging, c)
				h.publish(vol1, staging, at, c)
			}
			if want := []volume.Filesystem{{Phase: volume.Formatting, Type: fsType}, {Phase: volume.Formatted, Type: fsType}}; fmt.Sprint(h.cluster.phases) != fmt.Sprint(want) {
				t.Errorf("phases %v, want %v", h.cluster.phases, want)
			}
			write(t, filepath.Join(at, "file"), "content")
			wantContent(t, filepath.Join(staging, "file"), "content")
			if got, err := h.conditions(h.replica(vol1), vol1); err != nil || len(got) > 0 {
				t.Errorf("conditions %v, %v", got, err)
			}
			wantErr(t, "unstage while published", h.node.Unstage(t.Context(), vol1, staging), volume.ErrInUse)
			wantErr(t, "delete the replica in use", h.node.DeleteReplica(t.Context(), nodeID, poolID, h.replica(vol1).ID), volume.ErrInUse)
			h.unpublish(vol1, at)
			h.unstage(vol1, staging)
			// The bytes are in the replica now, and nothing is formatted again.
			h.stage(vol1, staging, c)
			wantContent(t, filepath.Join(staging, "file"), "content")
			if n := len(h.cluster.phases); n != 2 {
				t.Errorf("%d changes of the phase", n)
			}
			h.unstage(vol1, staging)
		})
	}
}

func TestBlockLifecycle(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 16*mib)
	staging, at := h.w("staging"), h.w("pods", "dev", "vol-1")
	c := blockCap(volume.SingleNodeWriter)
	for range 2 {
		h.stage(vol1, staging, c)
		h.publish(vol1, staging, at, c)
	}
	if _, mounted, err := mount.At(staging); mounted || err != nil {
		t.Errorf("something is mounted at the staging path: %v", err)
	}
	info, err := os.Stat(at)
	if err != nil || info.Mode().Type() != os.ModeDevice {
		t.Fatalf("target: %v %v", info, err)
	}
	writeDevice(t, at, "hello")
	if len(h.cluster.phases) > 0 {
		t.Errorf("a block volume was formatted: %v", h.cluster.phases)
	}
	h.unpublish(vol1, at)
	h.unstage(vol1, staging)

	// Data without a filesystem is not formatted over.
	wantErr(t, "stage for mount", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: staging, Capability: fsCap("")}), volume.ErrInUse)
	h.stage(vol1, staging, c)
	h.publish(vol1, staging, at, c)
	if got := readDevice(t, at, 5); got != "hello" {
		t.Errorf("read %q", got)
	}
	h.unpublish(vol1, at)
	h.unstage(vol1, staging)
}

func writeDevice(t *testing.T, path, content string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func readDevice(t *testing.T, path string, n int) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return string(p)
}
