package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	vol2  = volume.ID("vol-2")
	snap1 = volume.SnapshotID("snap-1")
)

// A clone to a larger size, used beside its source, has all its space by the time it is published; and it outlives its
// source.
func TestPoint11_12_13_Clone(t *testing.T) {
	for _, fsType := range mount.Types {
		t.Run(fsType, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			s1, s2, at := h.w("s1"), h.w("s2"), h.w("at")
			h.stage(vol1, s1, fsCap(fsType))
			write(t, filepath.Join(s1, "file"), "content")
			h.cut(vol1, snap1, false)
			write(t, filepath.Join(s1, "file"), "later")

			h.createFrom(vol2, 640*mib, snap1)
			h.stage(vol2, s2, fsCap(fsType))
			h.publish(vol2, s2, at, fsCap(fsType))
			wantContent(t, filepath.Join(at, "file"), "content")
			write(t, filepath.Join(at, "file"), "mine")
			wantContent(t, filepath.Join(s1, "file"), "later")
			u, err := h.node.Stats(t.Context(), vol2, at)
			if err != nil || u.Total < 480*mib {
				t.Errorf("usage %+v, %v", u, err)
			}

			h.unstage(vol1, s1)
			if err := h.node.DeleteReplica(t.Context(), nodeID, poolID, h.replica(vol1).ID); err != nil {
				t.Fatal(err)
			}
			h.unpublish(vol2, at)
			h.unstage(vol2, s2)
			h.stage(vol2, s2, fsCap(""))
			wantContent(t, filepath.Join(s2, "file"), "mine")
			h.unstage(vol2, s2)
		})
	}
}

func TestPoint14_UnreadableDeviceIsNeverFormatted(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	staging := h.w("staging")
	id := h.replica(vol1).ID
	f, err := os.OpenFile(h.pool.path(string(id)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	bad := blocktest.NewFaulty(fileDevice{f})
	t.Cleanup(func() { f.Close() })
	h.pool.faulty[id] = bad
	bad.Set(blocktest.Read, blocktest.Fault{Err: errors.New("unreadable")})
	for range 2 {
		err := h.node.Stage(t.Context(), Stage{Volume: vol1, Path: staging, Capability: fsCap("ext4")})
		wantErr(t, "stage", err, volume.ErrUnavailable)
	}
	if n, _ := bad.Calls(blocktest.Write); n > 0 || len(h.cluster.phases) > 0 {
		t.Errorf("%d writes, phases %v", n, h.cluster.phases)
	}
	if _, err := os.Lstat(staging); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed stage left its directory: %v", err)
	}
	bad.Set(blocktest.Read, blocktest.Fault{})
	h.stage(vol1, staging, fsCap("ext4"))
	h.unstage(vol1, staging)

	// What was formatted once and is not recognised any more is damage, not a new volume.
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 * mib); err != nil {
		t.Fatal(err)
	}
	err = h.node.Stage(t.Context(), Stage{Volume: vol1, Path: staging, Capability: fsCap("ext4")})
	wantErr(t, "stage of a volume that lost its filesystem", err, volume.ErrDataLoss)
}

// mkfs that was cut off is run again; its record was durable before it began.
func TestFormatCutOff(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	id := h.replica(vol1).ID
	f, err := os.OpenFile(h.pool.path(string(id)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	bad := blocktest.NewFaulty(fileDevice{f})
	h.pool.faulty[id] = bad
	bad.Set(blocktest.Write, blocktest.Fault{Err: errors.New("broken"), Skip: 3})
	err = h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")})
	if err == nil {
		t.Fatal("mkfs on a device that does not write succeeded")
	}
	if p := h.cluster.volumes[vol1].Filesystem; p.Phase != volume.Formatting {
		t.Fatalf("phase %v", p)
	}
	bad.Set(blocktest.Write, blocktest.Fault{})
	h.stage(vol1, h.w("s"), fsCap("ext4"))
	h.unstage(vol1, h.w("s"))
}

// A volume was taken away by force while it was published: everything fails from then on, and cleans up.
func TestPoint19_ReturningNodeCleansUp(t *testing.T) {
	for name, c := range map[string]volume.Capability{
		"ext4": fsCap("ext4"), "xfs": fsCap("xfs"), "btrfs": fsCap("btrfs"), "block": blockCap(volume.SingleNodeWriter),
	} {
		for _, restarted := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				h := newHost(t)
				h.create(vol1, 320*mib)
				staging, at := h.w("staging"), h.w("at")
				h.stage(vol1, staging, c)
				h.publish(vol1, staging, at, c)
				file := at
				if c.Access == volume.AccessMount {
					file = filepath.Join(at, "file")
				}
				f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				for range 2 {
					if _, err := h.node.Detach(t.Context(), nodeID, vol1, h.cluster.epoch(vol1)); err != nil {
						t.Fatal(err)
					}
				}
				_, werr := f.Write(make([]byte, 4096))
				if err := f.Sync(); err == nil && werr == nil {
					t.Error("a write after the detach was acknowledged")
				}
				h.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = nil })
				if _, mounted, err := mount.At(at); err != nil || !mounted {
					t.Errorf("the dead target is not covered any more: %v", err)
				}
				if got, err := h.node.Health(t.Context(), vol1); err != nil || !strings.Contains(reasons(got), "Inaccessible/DeviceGone") {
					t.Errorf("health %v, %v", got, err)
				}
				_, err = h.node.Stats(t.Context(), vol1, at)
				wantErr(t, "stats", err, volume.ErrUnavailable)
				if restarted {
					f.Close()
					h.restart()
				}
				wantErr(t, "stage", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: staging, Capability: c}), volume.ErrInUse)
				f.Close()
				h.unpublish(vol1, at)
				h.unstage(vol1, staging)
			})
		}
	}
}

// Attached anew on the same node, a volume works beside the dead paths of its earlier attachment.
func TestAttachAnewBesideDeadPaths(t *testing.T) {
	for _, fsType := range mount.Types {
		t.Run(fsType, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			staging, old, at := h.w("staging"), h.w("old"), h.w("at")
			c := fsCap(fsType)
			h.stage(vol1, staging, c)
			h.publish(vol1, staging, old, c)
			write(t, filepath.Join(old, "file"), "content")
			if _, err := h.node.Detach(t.Context(), nodeID, vol1, h.cluster.epoch(vol1)); err != nil {
				t.Fatal(err)
			}
			if fsType == "btrfs" { // the kernel takes a UUID once: the dead mount goes first
				h.unpublish(vol1, old)
				h.unstage(vol1, staging)
			}
			h.stage(vol1, staging, c)
			h.publish(vol1, staging, at, c)
			wantContent(t, filepath.Join(at, "file"), "content")
			h.unpublish(vol1, old)
			write(t, filepath.Join(at, "file"), "more")
			h.unpublish(vol1, at)
			h.unstage(vol1, staging)
		})
	}
}

func TestPoint20_AccessModes(t *testing.T) {
	for _, c := range []struct {
		mode   volume.Mode
		access volume.Access
		second error
	}{
		{volume.SingleNodeWriter, volume.AccessMount, volume.ErrInUse},
		{volume.SingleNodeReaderOnly, volume.AccessMount, volume.ErrInUse},
		{volume.SingleNodeSingleWriter, volume.AccessMount, volume.ErrInUse},
		{volume.SingleNodeMultiWriter, volume.AccessMount, nil},
		{volume.MultiNodeReaderOnly, volume.AccessMount, nil},
		{volume.SingleNodeSingleWriter, volume.AccessBlock, volume.ErrInUse},
		{volume.SingleNodeMultiWriter, volume.AccessBlock, nil},
		{volume.MultiNodeReaderOnly, volume.AccessBlock, nil},
		{volume.MultiNodeSingleWriter, volume.AccessBlock, nil},
		{volume.MultiNodeMultiWriter, volume.AccessBlock, nil},
	} {
		t.Run(string(c.access)+"/"+string(c.mode), func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 16*mib)
			staging, t1, t2 := h.w("staging"), h.w("t1"), h.w("t2")
			k := volume.Capability{Access: c.access, Mode: c.mode}
			p := Publish{Volume: vol1, Staging: staging, Path: t1, Capability: k}
			publish := func(p Publish) error { return h.node.Publish(t.Context(), p) }

			wantErr(t, "publish before stage", publish(p), volume.ErrInUse)
			h.stage(vol1, staging, k)
			without := p
			without.Staging = ""
			wantErr(t, "publish without a staging path", publish(without), volume.ErrInUse)
			wantErr(t, "T1 P1", publish(p), nil)
			wantErr(t, "T1 P1 again", publish(p), nil)
			ro := p
			ro.ReadOnly = true
			wantErr(t, "T1 P2", publish(ro), volume.ErrExists)
			other := p
			other.Path = t2
			wantErr(t, "T2 P1", publish(other), c.second)
			if c.second == nil {
				h.unpublish(vol1, t2)
			}
			ro.Path = t2
			wantErr(t, "T2 P2", publish(ro), c.second)
			if c.second == nil {
				h.unpublish(vol1, t2)
			}
			single := other
			single.Capability.Mode = volume.SingleNodeSingleWriter
			wantErr(t, "a second path for a single writer", publish(single), volume.ErrInUse)
			wrong := other
			wrong.Capability = volume.Capability{Access: volume.AccessBlock, Mode: c.mode}
			if c.access == volume.AccessBlock {
				wrong.Capability.Access = volume.AccessMount
			}
			wantErr(t, "another access", publish(wrong), volume.ErrInUse)

			restage := Stage{Volume: vol1, Path: staging, Capability: k}
			wantErr(t, "stage again", h.node.Stage(t.Context(), restage), nil)
			restage.Capability.Mode = volume.SingleNodeSingleWriter
			if c.mode != restage.Capability.Mode {
				wantErr(t, "stage with another capability", h.node.Stage(t.Context(), restage), volume.ErrExists)
			}
			h.unpublish(vol1, t1)
			h.unstage(vol1, staging)
		})
	}
}

func TestNotAttachedHere(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 16*mib)
	q := Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")}
	for name, a := range map[string]*volume.Attachment{
		"nowhere": nil, "elsewhere": {Node: "node-2"}, "detaching": {Node: nodeID, Detaching: true},
	} {
		h.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = a })
		wantErr(t, name, h.node.Stage(t.Context(), q), volume.ErrInUse)
	}
	q.Volume = "none-exist-id"
	wantErr(t, "unknown volume", h.node.Stage(t.Context(), q), volume.ErrNotFound)
	wantErr(t, "publish of an unknown volume", h.node.Publish(t.Context(), Publish{Volume: q.Volume, Staging: q.Path, Path: h.w("t"), Capability: q.Capability}), volume.ErrNotFound)
	for _, path := range []string{h.w("t"), "relative", "", "/"} {
		wantErr(t, "unpublish", h.node.Unpublish(t.Context(), q.Volume, path), nil)
		wantErr(t, "unstage", h.node.Unstage(t.Context(), q.Volume, path), nil)
	}
	for _, path := range []string{"", "relative", "/", "/" + strings.Repeat("x", 5000)} {
		q := Stage{Volume: vol1, Path: path, Capability: fsCap("")}
		wantErr(t, "stage at "+path[:min(10, len(path))], h.node.Stage(t.Context(), q), volume.ErrInvalid)
	}
	_, err := h.node.Detach(t.Context(), "node-2", vol1, h.cluster.epoch(vol1))
	wantErr(t, "another node's call", err, volume.ErrUnavailable)
}

func TestPoint22_UnpublishNeverDeletesFiles(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	staging, at := h.w("staging"), h.w("at")
	h.stage(vol1, staging, fsCap("ext4"))
	h.publish(vol1, staging, at, fsCap("ext4"))
	// Somebody unmounted the target, and a workload wrote beneath.
	if err := mount.Unmount(at); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(at, "stray"), "x")
	wantErr(t, "unpublish", h.node.Unpublish(t.Context(), vol1, at), volume.ErrInUse)
	wantContent(t, filepath.Join(at, "stray"), "x")
	if err := os.Remove(filepath.Join(at, "stray")); err != nil {
		t.Fatal(err)
	}
	h.unpublish(vol1, at)
	h.unstage(vol1, staging)
}

// Docker Swarm may never unstage: a detach then cleans up by itself, and loses nothing.
func TestPoint23_DetachWithoutUnstage(t *testing.T) {
	for name, c := range map[string]volume.Capability{"ext4": fsCap("ext4"), "block": blockCap(volume.SingleNodeWriter)} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 64*mib)
			staging := h.w("staging")
			h.stage(vol1, staging, c)
			if c.Access == volume.AccessMount {
				if err := os.WriteFile(filepath.Join(staging, "file"), []byte("unsynced"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if _, err := h.node.Detach(t.Context(), nodeID, vol1, h.cluster.epoch(vol1)); err != nil {
					t.Fatal(err)
				}
			}
			h.unstage(vol1, staging)
			if c.Access == volume.AccessMount {
				h.stage(vol1, staging, c)
				wantContent(t, filepath.Join(staging, "file"), "unsynced")
				h.unstage(vol1, staging)
			}
		})
	}
}

// Nomad stages a volume once per way of use; a missing parent is made.
func TestPoint24_25_TwoStagingPaths(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	rw, ro := h.w("deep", "rw"), h.w("deep", "er", "ro")
	reader := fsCap("ext4")
	reader.Mode = volume.SingleNodeReaderOnly
	h.stage(vol1, ro, reader)
	h.stage(vol1, rw, fsCap("ext4"))
	write(t, filepath.Join(rw, "file"), "content")
	wantContent(t, filepath.Join(ro, "file"), "content")
	if err := os.WriteFile(filepath.Join(ro, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write through the reader's staging path: %v", err)
	}
	wantErr(t, "a third for block access", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("b"), Capability: blockCap(volume.SingleNodeWriter)}), volume.ErrInUse)
	// Accepted, it would be what the volume is brought back with after a restart.
	wantErr(t, "a third with another filesystem", h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("x"), Capability: fsCap("xfs")}), volume.ErrInUse)
	h.unstage(vol1, ro)
	wantContent(t, filepath.Join(rw, "file"), "content")
	h.unstage(vol1, rw)
	if _, err := os.Lstat(rw); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the staging directory that was made stays: %v", err)
	}
}

// Expanding while files are written: the kernel sees the new size at once, xfs and btrfs grow at once; ext4 does where
// the process may, and else at the next stage, and a condition says so until then.
func TestPoint26_OnlineExpand(t *testing.T) {
	for _, fsType := range append([]string{"block"}, mount.Types...) {
		t.Run(fsType, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			staging, at := h.w("staging"), h.w("at")
			c := fsCap(fsType)
			if fsType == "block" {
				c = blockCap(volume.SingleNodeWriter)
			}
			h.stage(vol1, staging, c)
			h.publish(vol1, staging, at, c)
			stop, stopped := make(chan struct{}), make(chan error, 1)
			go func() { stopped <- load(at, stop) }()

			q := Expand{Volume: vol1, Path: at, RequiredBytes: 640 * mib}
			_, err := h.node.Expand(t.Context(), q)
			wantErr(t, "before the volume is expanded", err, volume.ErrOutOfRange)
			for range 2 {
				intent := replication.Change{ExpandIntent: &replication.ExpandIntent{Target: 640 * mib}}
				if _, err := h.cluster.Commit(t.Context(), vol1, intent); err != nil {
					t.Fatal(err)
				}
				if err := h.node.ExpandVolume(t.Context(), h.replica(vol1), vol1, h.cluster.epoch(vol1), 640*mib); err != nil {
					t.Fatal(err)
				}
				if got, err := h.node.Expand(t.Context(), q); err != nil || got != 640*mib {
					t.Fatalf("expand: %d, %v", got, err)
				}
			}
			close(stop)
			if err := <-stopped; err != nil {
				t.Errorf("I/O during the expand: %v", err)
			}
			q.Path = h.w("elsewhere")
			_, err = h.node.Expand(t.Context(), q)
			wantErr(t, "at another path", err, volume.ErrNotFound)
			q.Path, q.LimitBytes = at, 500*mib
			_, err = h.node.Expand(t.Context(), q)
			wantErr(t, "beyond the limit", err, volume.ErrOutOfRange)

			u, err := h.node.Stats(t.Context(), vol1, at)
			if err != nil {
				t.Fatal(err)
			}
			cs, err := h.conditions(h.replica(vol1), vol1)
			deferred := reasons(cs) == "Degraded/FilesystemNotGrown" && fsType == "ext4"
			if err != nil || len(cs) > 0 && !deferred {
				t.Errorf("conditions %v, %v", cs, err)
			}
			if !deferred && u.Total < 480*mib {
				t.Errorf("usage %+v", u)
			}
			h.unpublish(vol1, at)
			h.unstage(vol1, staging)
			if fsType == "block" {
				return
			}
			h.stage(vol1, staging, c)
			if u, err := h.node.Stats(t.Context(), vol1, staging); err != nil || u.Total < 480*mib {
				t.Errorf("usage after staging again %+v, %v", u, err)
			}
			if cs, err := h.conditions(h.replica(vol1), vol1); err != nil || len(cs) > 0 {
				t.Errorf("conditions %v, %v", cs, err)
			}
			h.unstage(vol1, staging)
		})
	}
}

// load writes to a file or a device until it is told to stop.
func load(at string, stop <-chan struct{}) error {
	name := at
	if info, err := os.Stat(at); err == nil && info.IsDir() {
		name = filepath.Join(at, "load")
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	for i := int64(0); ; i++ {
		select {
		case <-stop:
			return f.Close()
		default:
		}
		if _, err := f.WriteAt(make([]byte, 64<<10), i%64*(64<<10)); err != nil {
			return errors.Join(err, f.Close())
		}
		if i%16 == 0 {
			if err := f.Sync(); err != nil {
				return errors.Join(err, f.Close())
			}
		}
	}
}

func TestPoint27_Stats(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	h.create(vol2, 32*mib)
	s1, s2, t1, t2 := h.w("s1"), h.w("s2"), h.w("t1"), h.w("t2")
	h.stage(vol1, s1, fsCap("ext4"))
	h.publish(vol1, s1, t1, fsCap("ext4"))
	c := blockCap(volume.SingleNodeWriter)
	h.stage(vol2, s2, c)
	h.publish(vol2, s2, t2, c)
	for _, path := range []string{s1, t1, t1 + "/"} {
		u, err := h.node.Stats(t.Context(), vol1, path)
		if err != nil || u.Access != volume.AccessMount || u.Total <= 0 || u.Total > 64*mib || u.Available <= 0 || u.TotalInodes <= 0 || u.UsedInodes <= 0 || u.AvailableInodes <= 0 {
			t.Errorf("%s: %+v, %v", path, u, err)
		}
	}
	for _, path := range []string{s2, t2} {
		if u, err := h.node.Stats(t.Context(), vol2, path); err != nil || u != (Usage{Access: volume.AccessBlock, Total: 32 * mib}) {
			t.Errorf("%s: %+v, %v", path, u, err)
		}
	}
	for _, c := range []struct {
		id   volume.ID
		path string
	}{{vol1, "some/path"}, {vol1, ""}, {vol1, t2}, {vol2, t1}, {"none-exist-id", t1}, {vol1, filepath.Join(t1, "lost+found")}} {
		_, err := h.node.Stats(t.Context(), c.id, c.path)
		wantErr(t, string(c.id)+" "+c.path, err, volume.ErrNotFound)
	}
	h.unpublish(vol1, t1)
	h.unpublish(vol2, t2)
	h.unstage(vol1, s1)
	h.unstage(vol2, s2)
}

func TestPoint28_ReadOnlyRejectsWrites(t *testing.T) {
	reader := func(c volume.Capability) volume.Capability { c.Mode = volume.SingleNodeReaderOnly; return c }
	for _, c := range []struct {
		name       string
		capability volume.Capability
		readOnly   bool
		attached   bool
	}{
		{"mount, publish", fsCap("ext4"), true, false},
		{"mount, mode", reader(fsCap("ext4")), false, false},
		{"mount, flag", fsCap("ext4", "ro"), false, false},
		{"mount, attach", fsCap("ext4"), false, true},
		{"xfs, attach", fsCap("xfs"), false, true},
		{"btrfs, attach", fsCap("btrfs"), false, true},
		{"block, publish", blockCap(volume.SingleNodeWriter), true, false},
		{"block, mode", blockCap(volume.SingleNodeReaderOnly), false, false},
		{"block, attach", blockCap(volume.SingleNodeWriter), false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.create(vol1, 320*mib)
			staging, at := h.w("staging"), h.w("at")
			plain := c.capability
			plain.Mode, plain.MountFlags = volume.SingleNodeWriter, nil
			h.stage(vol1, staging, plain)
			h.publish(vol1, staging, at, plain)
			file := at
			if plain.Access == volume.AccessMount {
				file = filepath.Join(at, "file")
				write(t, file, "content")
			} else {
				writeDevice(t, at, "content")
			}
			h.unpublish(vol1, at)
			h.unstage(vol1, staging)

			h.cluster.change(vol1, func(v *volume.Volume) { v.Attachment.ReadOnly = c.attached })
			h.stage(vol1, staging, c.capability)
			if err := h.node.Publish(t.Context(), Publish{Volume: vol1, Staging: staging, Path: at, Capability: c.capability, ReadOnly: c.readOnly}); err != nil {
				t.Fatal(err)
			}
			if got := readDevice(t, file, 7); got != "content" {
				t.Errorf("read %q", got)
			}
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("changed"), 0)
				err = errors.Join(err, f.Sync(), f.Close())
			}
			if err == nil {
				t.Error("a write was accepted")
			}
			if got := readDevice(t, file, 7); got != "content" {
				t.Errorf("read %q after the refused write", got)
			}
			h.unpublish(vol1, at)
			h.unstage(vol1, staging)
		})
	}
}

// A writer and a read-only reader of one block device.
func TestReadOnlyBesideWriter(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 16*mib)
	c := blockCap(volume.SingleNodeMultiWriter)
	staging, rw, ro := h.w("staging"), h.w("rw"), h.w("ro")
	h.stage(vol1, staging, c)
	h.publish(vol1, staging, rw, c)
	if err := h.node.Publish(t.Context(), Publish{Volume: vol1, Staging: staging, Path: ro, Capability: c, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	writeDevice(t, rw, "hello")
	if got := readDevice(t, ro, 5); got != "hello" {
		t.Errorf("read %q", got)
	}
	writeDevice(t, rw, "world")
	out, err := exec.Command("dd", "if="+ro, "iflag=direct", "bs=4096", "count=1", "status=none").Output()
	if err != nil || string(out[:5]) != "world" {
		t.Errorf("direct read: %q, %v", out[:5], err)
	}
	if f, err := os.OpenFile(ro, os.O_WRONLY, 0); err == nil {
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Error("the reader's device was written to")
		}
		f.Close()
	}
	h.unpublish(vol1, ro)
	h.unpublish(vol1, rw)
	h.unstage(vol1, staging)
}

func TestPoint29_MountFlags(t *testing.T) {
	h := newHost(t)
	h.mounter.drop = "context=" // this kernel may lack SELinux: the argument is what counts
	h.create(vol1, 64*mib)
	staging, at := h.w("staging"), h.w("at")
	const selinux = `context="system_u:object_r:container_file_t:s0:c1,c2"`
	c := fsCap("ext4", "noatime,nodev", selinux, "commit=17")
	h.stage(vol1, staging, c)
	h.publish(vol1, staging, at, c)
	if !slices.ContainsFunc(h.mounter.args, func(a string) bool {
		return strings.Contains(a, "-o noatime,nodev,"+selinux+",commit=17 ")
	}) {
		t.Errorf("mounts: %v", h.mounter.args)
	}
	for _, path := range []string{staging, at} {
		mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
		if err != nil || len(mounts) != 1 {
			t.Fatalf("mounts at %s: %v, %v", path, mounts, err)
		}
		m := mounts[0]
		if !strings.Contains(m.Options, "noatime") || !strings.Contains(m.Options, "nodev") || !strings.Contains(m.VFSOptions, "commit=17") {
			t.Errorf("options of %s: %s and %s", path, m.Options, m.VFSOptions)
		}
	}
	bad := Stage{Volume: vol1, Path: h.w("s2"), Capability: fsCap("ext4", "bind")}
	wantErr(t, "a flag that is ours", h.node.Stage(t.Context(), bad), volume.ErrInvalid)
	h.unpublish(vol1, at)
	h.unstage(vol1, staging)
}

// An unmount that is refused because a process is there leaves everything in place for the next call.
func TestBusy(t *testing.T) {
	h := newHost(t)
	h.create(vol1, 64*mib)
	staging, at := h.w("staging"), h.w("at")
	h.stage(vol1, staging, fsCap("ext4"))
	h.publish(vol1, staging, at, fsCap("ext4"))
	f, err := os.Create(filepath.Join(at, "file"))
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, "unpublish", h.node.Unpublish(t.Context(), vol1, at), volume.ErrBusy)
	if _, err := f.WriteString("still here"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h.unpublish(vol1, at)
	if f, err = os.Open(filepath.Join(staging, "file")); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "unstage", h.node.Unstage(t.Context(), vol1, staging), volume.ErrBusy)
	f.Close()
	h.unstage(vol1, staging)

	// A raw device that a process still has open keeps the volume.
	c := blockCap(volume.SingleNodeWriter)
	h.create(vol2, 16*mib)
	h.stage(vol2, staging, c)
	h.publish(vol2, staging, at, c)
	if f, err = os.OpenFile(at, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	h.unpublish(vol2, at)
	wantErr(t, "unstage", h.node.Unstage(t.Context(), vol2, staging), volume.ErrBusy)
	f.Close()
	h.unstage(vol2, staging)
}

// A detach waits for nobody for ever: not for a stage whose device hangs.
func TestDetachBreaksHungStage(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	id := h.replica(vol1).ID
	f, err := os.OpenFile(h.pool.path(string(id)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	hung := blocktest.NewFaulty(fileDevice{f})
	h.pool.faulty[id] = hung
	hung.Set(blocktest.Write, blocktest.Fault{Hang: true})
	done := make(chan error, 1)
	go func() {
		done <- h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: fsCap("ext4")})
	}()
	for deadline := time.Now().Add(20 * time.Second); hung.Hanging(blocktest.Write) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the stage does not write")
		}
	}
	h.node.detachPatience = 200 * time.Millisecond
	if _, err := h.node.Detach(t.Context(), nodeID, vol1, h.cluster.epoch(vol1)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("the stage succeeded")
	}
}

// What a failed stage undoes is not waited for without bound where its device hangs, and the next stage goes through.
func TestRollbackOfHungStage(t *testing.T) {
	h := newFaultyHost(t)
	h.create(vol1, 64*mib)
	id := h.replica(vol1).ID
	f, err := os.OpenFile(h.pool.path(string(id)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	hung := blocktest.NewFaulty(fileDevice{f})
	h.pool.faulty[id] = hung
	h.node.rollbackLimit = 200 * time.Millisecond
	h.cluster.change(vol1, func(v *volume.Volume) { v.Filesystem = volume.Filesystem{Phase: volume.Formatting, Type: "ext4"} })
	h.cluster.refuse = func() error {
		hung.Set(blocktest.Flush, blocktest.Fault{Hang: true})
		return volume.ErrUnavailable
	}
	raw := blockCap(volume.SingleNodeWriter)
	done := make(chan error, 1)
	go func() {
		done <- h.node.Stage(t.Context(), Stage{Volume: vol1, Path: h.w("s"), Capability: raw})
	}()
	select {
	case err := <-done:
		wantErr(t, "stage", err, volume.ErrUnavailable)
	case <-time.After(30 * time.Second):
		hung.Set(blocktest.Flush, blocktest.Fault{})
		t.Error("the rollback does not end")
		<-done
	}
	hung.Set(blocktest.Flush, blocktest.Fault{})
	h.cluster.refuse = nil
	h.stage(vol1, h.w("s"), raw)
	h.publish(vol1, h.w("s"), h.w("at"), raw)
	if f, err := os.OpenFile(h.w("at"), os.O_RDWR|unix.O_SYNC, 0); err != nil {
		t.Error(err)
	} else {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	h.unpublish(vol1, h.w("at"))
	h.unstage(vol1, h.w("s"))
}
