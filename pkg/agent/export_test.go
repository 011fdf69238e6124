package agent

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// exporting is an export that a test has begun.
type exporting struct {
	t    *testing.T
	uri  string
	stop context.CancelFunc
	done chan error
}

// export begins one; serve is a call of ExportVolume or ExportSnapshot.
func (h *host) export(serve func(ctx context.Context, started func(string) error) error) *exporting {
	h.t.Helper()
	x := &exporting{t: h.t, done: make(chan error, 1)}
	var ctx context.Context
	ctx, x.stop = context.WithCancel(context.Background())
	h.t.Cleanup(x.stop)
	uri := make(chan string, 1)
	go func() {
		x.done <- serve(ctx, func(s string) error { uri <- s; return nil })
	}()
	select {
	case x.uri = <-uri:
	case err := <-x.done:
		h.t.Fatal(err)
	}
	return x
}

func (h *host) exportVolume(id volume.ID, writable bool) *exporting {
	h.t.Helper()
	return h.export(func(ctx context.Context, started func(string) error) error {
		return h.node.ExportVolume(ctx, id, writable, started)
	})
}

func (h *host) exportSnapshot(id volume.SnapshotID, of volume.ID) *exporting {
	h.t.Helper()
	s := volume.Snapshot{ID: id, Holders: []volume.Replica{h.replica(of)}}
	return h.export(func(ctx context.Context, started func(string) error) error {
		return h.node.ExportSnapshot(ctx, s, started)
	})
}

// end stops the export and waits until nothing of it is left.
func (x *exporting) end() {
	x.t.Helper()
	x.stop()
	if err := <-x.done; err != nil {
		x.t.Errorf("export ended with %v", err)
	}
	if name, _ := strings.CutPrefix(x.uri, "nbd+unix:///?socket="); name == x.uri {
		x.t.Errorf("URI %s", x.uri)
	} else if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		x.t.Errorf("the socket stays: %v", err)
	}
}

// image fetches what an export holds.
func (x *exporting) image() []byte {
	x.t.Helper()
	name := filepath.Join(x.t.TempDir(), "image")
	run(x.t, "nbdcopy", x.uri, name)
	b, err := os.ReadFile(name)
	if err != nil {
		x.t.Fatal(err)
	}
	return b
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestExportSnapshot(t *testing.T) {
	h := newHost(t)
	h.create("vol-1", 64*mib)
	h.cluster.change("vol-1", func(v *volume.Volume) { v.Attachment = nil })
	x := h.exportVolume("vol-1", true)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", "-c", "write -P 8 40M 64k", x.uri)
	before := x.image()
	h.cut("vol-1", "snap-1", false)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 9 1M 4M", x.uri)
	x.end()

	s := h.exportSnapshot("snap-1", "vol-1")
	if got := s.image(); !bytes.Equal(got, before) {
		t.Error("the snapshot's image is not what was there when it was cut")
	}
	if out := run(t, "nbdinfo", "--map=base:allocation", "--totals", s.uri); !strings.Contains(out, "hole,zero") {
		t.Errorf("the snapshot shows no holes:\n%s", out)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", s.uri).CombinedOutput(); err == nil {
		t.Errorf("a snapshot was written:\n%s", out)
	}
	err := h.node.DeleteSnapshot(t.Context(), nodeID, poolID, "snap-1", "", 0)
	wantErr(t, "delete while exported", err, volume.ErrInUse)
	if err == nil || !strings.Contains(err.Error(), "snap-1.sock") {
		t.Errorf("delete = %v, want it to name the export", err)
	}
	s.end()
	if err := h.node.DeleteSnapshot(t.Context(), nodeID, poolID, "snap-1", "", 0); err != nil {
		t.Error(err)
	}
	err = h.node.ExportSnapshot(t.Context(), volume.Snapshot{ID: "snap-1", Holders: []volume.Replica{h.replica("vol-1")}}, nil)
	wantErr(t, "export of a snapshot that is gone", err, volume.ErrNotFound)
	err = h.node.ExportSnapshot(t.Context(), volume.Snapshot{ID: "snap-2", Holders: []volume.Replica{{Node: "node-2"}}}, nil)
	wantErr(t, "export of another node's snapshot", err, volume.ErrInUse)
	wantErr(t, "export of nobody's snapshot", h.node.ExportSnapshot(t.Context(), volume.Snapshot{ID: "snap-2"}, nil), volume.ErrUnavailable)
}

// TestExportAttached exports a volume whose filesystem is mounted and written; the unstage ends the export.
func TestExportAttached(t *testing.T) {
	h := newHost(t)
	h.create("vol-1", 64*mib)
	h.stage("vol-1", h.w("stage"), fsCap("ext4"))
	h.publish("vol-1", h.w("stage"), h.w("pod"), fsCap("ext4"))
	x := h.exportVolume("vol-1", false)
	write(t, h.w("pod", "file"), strings.Repeat("what is written while it is exported", 1000))
	if got := x.image(); !bytes.Contains(got, []byte("what is written while it is exported")) {
		t.Error("the export does not show what was written beside it")
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", x.uri).CombinedOutput(); err == nil {
		t.Errorf("it was written, and was not to be:\n%s", out)
	}
	err := h.node.ExportVolume(t.Context(), "vol-1", true, nil)
	wantErr(t, "second export", err, volume.ErrInUse)

	client := exec.Command("nbdcopy", "--request-size=4096", x.uri, "null:")
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	h.unpublish("vol-1", h.w("pod"))
	h.unstage("vol-1", h.w("stage"))
	wantErr(t, "an export whose volume was taken away", <-x.done, volume.ErrInUse)
	_ = client.Wait()

	// Writable, and taken away by force.
	h.stage("vol-1", h.w("stage"), blockCap(volume.SingleNodeWriter))
	x = h.exportVolume("vol-1", true)
	run(t, "qemu-io", "-f", "raw", "-c", "write -f -P 3 60M 64k", x.uri)
	if _, err := h.node.Detach(t.Context(), nodeID, "vol-1", h.cluster.epoch("vol-1")); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "an export whose volume was detached", <-x.done, volume.ErrInUse)
	h.unstage("vol-1", h.w("stage"))
}

// TestExportDetached: while it lasts the volume is not staged; a delete ends it.
func TestExportDetached(t *testing.T) {
	h := newHost(t)
	h.create("vol-1", 64*mib)
	h.cluster.change("vol-1", func(v *volume.Volume) { v.Attachment = nil })
	x := h.exportVolume("vol-1", true)
	if info, err := os.Stat(strings.TrimPrefix(x.uri, "nbd+unix:///?socket=")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", info.Mode(), err)
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 3 60M 64k", x.uri)
	h.cluster.change("vol-1", func(v *volume.Volume) { v.Attachment = &volume.Attachment{Node: nodeID} })
	err := h.node.Stage(t.Context(), Stage{Volume: "vol-1", Path: h.w("stage"), Capability: blockCap(volume.SingleNodeWriter)})
	wantErr(t, "stage while exported", err, volume.ErrInUse)
	x.end()
	wantErr(t, "export before it is staged", h.node.ExportVolume(t.Context(), "vol-1", false, nil), volume.ErrInUse)

	h.cluster.change("vol-1", func(v *volume.Volume) { v.Attachment = nil })
	x = h.exportVolume("vol-1", false)
	if got := x.image(); got[60*mib] != 3 {
		t.Error("what one export wrote, the next does not show")
	}
	h.cluster.change("vol-1", func(v *volume.Volume) { v.State = volume.Deleting })
	if err := h.node.DeleteReplica(t.Context(), nodeID, poolID, h.replica("vol-1").ID); err != nil {
		t.Errorf("delete while exported: %v", err)
	}
	wantErr(t, "an export whose volume was deleted", <-x.done, volume.ErrInUse)
	wantErr(t, "export of a deleted volume", h.node.ExportVolume(t.Context(), "vol-1", false, nil), volume.ErrNotFound)
	wantErr(t, "export of no volume", h.node.ExportVolume(t.Context(), "vol-9", false, nil), volume.ErrNotFound)

	h.create("vol-2", 64*mib)
	h.cluster.change("vol-2", func(v *volume.Volume) { v.Attachment.Node = "node-2" })
	wantErr(t, "export of what is attached elsewhere", h.node.ExportVolume(t.Context(), "vol-2", false, nil), volume.ErrInUse)
	h.cluster.change("vol-2", func(v *volume.Volume) {
		v.Attachment, v.Replicas = nil, append(v.Replicas, volume.Replica{ID: "other", Node: "node-2"})
	})
	wantErr(t, "export of one of several replicas", h.node.ExportVolume(t.Context(), "vol-2", false, nil), volume.ErrInUse)
}

// TestExportEndsWithTheNode: a stop ends what is exported, and leaves no socket; nor does a start after a crash.
func TestExportEndsWithTheNode(t *testing.T) {
	h := newHost(t)
	h.create("vol-1", 64*mib)
	h.cluster.change("vol-1", func(v *volume.Volume) { v.Attachment = nil })
	x := h.exportVolume("vol-1", false)
	if err := os.WriteFile(filepath.Join(h.node.exportDir(), "left.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.restart()
	wantErr(t, "an export whose node stopped", <-x.done, volume.ErrUnavailable)
	if left, err := os.ReadDir(h.node.exportDir()); err == nil {
		t.Errorf("left: %v", left)
	}
	wantErr(t, "export whose start fails", h.node.ExportVolume(t.Context(), "vol-1", false, func(string) error { return volume.ErrStale }), volume.ErrStale)
	h.exportVolume("vol-1", false).end()
}
