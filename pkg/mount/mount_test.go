package mount

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func newMounter(t *testing.T) *Mounter {
	t.Helper()
	m := New(kmount.NewWithoutSystemd(""), slog.New(slog.DiscardHandler))
	t.Cleanup(m.Close)
	return m
}

// device is a loop device on a file of zeros.
type device struct {
	path, file string
}

func loop(t *testing.T, file string) device {
	t.Helper()
	out, err := exec.Command("losetup", "--show", "-f", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	d := device{path: strings.TrimSpace(string(out)), file: file}
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", d.path).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return d
}

func newDevice(t *testing.T, size int64) device {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return loop(t, name)
}

// clone copies the device's bytes as a snapshot of a mounted volume has them.
func (d device) clone(t *testing.T, size int64) device {
	t.Helper()
	name := filepath.Join(t.TempDir(), "clone")
	if out, err := exec.Command("cp", "--sparse=always", d.file, name).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return loop(t, name)
}

func mountAt(t *testing.T, m *Mounter, path string, f Filesystem) {
	t.Helper()
	if err := m.Mount(path, f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Drop(path); err != nil {
			t.Error(err)
		}
	})
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func wantContent(t *testing.T, name, content string) {
	t.Helper()
	got, err := os.ReadFile(name)
	if err != nil || string(got) != content {
		t.Fatalf("%s: %q, %v; want %q", name, got, err, content)
	}
}

func TestFilesystems(t *testing.T) {
	for _, fsType := range Types {
		t.Run(fsType, func(t *testing.T) {
			m, dir := newMounter(t), t.TempDir()
			const size = 320 << 20
			dev := newDevice(t, size)
			f, err := m.Probe(dev.path)
			if err != nil || f.Type != "" || !f.Blank || f.DeviceSize != size {
				t.Fatalf("new device: %+v, %v", f, err)
			}
			id := uuid.New()
			if err := m.Format(dev.path, fsType, id); err != nil {
				t.Fatal(err)
			}
			f, err = m.Probe(dev.path)
			if err != nil || f.Type != fsType || f.Blank || f.UUID != id || f.CanGrow() || f.FilesystemSize == 0 {
				t.Fatalf("formatted device: %+v, %v", f, err)
			}
			if err := m.Check(dev.path, fsType); err != nil {
				t.Fatal(err)
			}
			at := filepath.Join(dir, "a", "b")
			flags, err := ParseFlags([]string{"noatime"})
			if err != nil {
				t.Fatal(err)
			}
			mountAt(t, m, at, Filesystem{Device: dev.path, Type: fsType, Flags: flags})
			if err := m.Mount(at, Filesystem{Device: dev.path, Type: fsType}); err != nil {
				t.Fatalf("repeated mount: %v", err)
			}
			e, ok, err := At(at)
			if err != nil || !ok || e.Source != dev.path || e.Type != fsType || e.ReadOnly || e.SuperReadOnly {
				t.Fatalf("mount table: %+v %v %v", e, ok, err)
			}
			write(t, filepath.Join(at, "file"), "content")
			if err := Sync(at); err != nil {
				t.Fatal(err)
			}

			// A clone, larger, of the mounted source, beside it.
			clone := dev.clone(t, 2*size)
			beside := filepath.Join(dir, "beside")
			found, err := m.Probe(clone.path)
			if err != nil || !found.CanGrow() {
				t.Fatalf("clone: %+v %v", found, err)
			}
			if err := m.Check(clone.path, fsType); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := m.Identify(clone.path, found, uuid.New(), filepath.Join(dir, "scratch")); err != nil {
					t.Fatal(err)
				}
			}
			mountAt(t, m, beside, Filesystem{Device: clone.path, Type: fsType})
			if e, _, _ := At(beside); e.Source != clone.path {
				t.Fatalf("clone is a mount of %s", e.Source)
			}
			wantContent(t, filepath.Join(beside, "file"), "content")
			write(t, filepath.Join(beside, "file"), "other")
			wantContent(t, filepath.Join(at, "file"), "content")
			grown(t, m, clone, fsType, beside, size)

			// A read-only bind beside a writable one.
			ro := filepath.Join(dir, "ro")
			if err := m.Bind(at, ro, Flags{ReadOnly: true}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(ro, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("write to a read-only bind: %v", err)
			}
			write(t, filepath.Join(at, "x"), "")
			if err := errors.Join(Unmount(ro), Unmount(ro), Remove(ro), Remove(ro)); err != nil {
				t.Fatal(err)
			}
			u, err := Stat(at)
			if err != nil || u.Total <= 0 || u.Available <= 0 || u.Used < 0 {
				t.Errorf("usage %+v, %v", u, err)
			}
			if err := Unmount(at); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// grown grows the filesystem by the way that this kernel allows.
func grown(t *testing.T, m *Mounter, dev device, fsType, at string, before int64) {
	t.Helper()
	err := m.Grow(dev.path, fsType, at)
	if errors.Is(err, ErrMounted) {
		if err := Unmount(at); err != nil {
			t.Fatal(err)
		}
		if err := m.GrowUnmounted(dev.path); err != nil {
			t.Fatal(err)
		}
		if f, err := m.Probe(dev.path); err != nil || f.CanGrow() {
			t.Fatalf("after growing: %+v, %v", f, err)
		}
		if err := m.Mount(at, Filesystem{Device: dev.path, Type: fsType}); err != nil {
			t.Fatal(err)
		}
	} else if err != nil {
		t.Fatal(err)
	}
	if err := m.Grow(dev.path, fsType, at); err != nil {
		t.Fatalf("grow what is grown: %v", err)
	}
	if u, err := Stat(at); err != nil || u.Total < before+before/2 {
		t.Fatalf("usage after growing: %+v, %v", u, err)
	}
	wantContent(t, filepath.Join(at, "file"), "other")
}

// A btrfs clone cut between an fsync and the next commit has a log, which must survive the change of its UUID.
func TestIdentifyReplaysLog(t *testing.T) {
	m, dir := newMounter(t), t.TempDir()
	const size = 160 << 20
	dev := newDevice(t, size)
	if err := m.Format(dev.path, "btrfs", uuid.New()); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(dir, "at")
	mountAt(t, m, at, Filesystem{Device: dev.path, Type: "btrfs"})
	write(t, filepath.Join(at, "file"), "old")
	if err := Sync(at); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(at, "file"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 3 {
		if _, err := f.WriteAt([]byte("new"), 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	clone := dev.clone(t, size)
	found, err := m.Probe(clone.path)
	if err != nil {
		t.Fatal(err)
	}
	if !found.dirty {
		t.Fatal("the clone has no log: the test tests nothing")
	}
	if err := m.Identify(clone.path, found, uuid.New(), filepath.Join(dir, "scratch")); err != nil {
		t.Fatal(err)
	}
	beside := filepath.Join(dir, "beside")
	mountAt(t, m, beside, Filesystem{Device: clone.path, Type: "btrfs"})
	wantContent(t, filepath.Join(beside, "file"), "new")
}

func TestUnreadableDevice(t *testing.T) {
	m := newMounter(t)
	dev := newDevice(t, 64<<20)
	if err := os.Truncate(dev.file, 0); err != nil { // the device now fails every read
		t.Fatal(err)
	}
	if _, err := m.Probe(dev.path); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("probe: %v", err)
	}
	if _, err := m.Probe(filepath.Join(t.TempDir(), "none")); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("probe of no device: %v", err)
	}
}

func TestDamagedSuperblock(t *testing.T) {
	m := newMounter(t)
	dev := newDevice(t, 64<<20)
	f, err := os.OpenFile(dev.path, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("XFSB"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	found, err := m.Probe(dev.path)
	if err != nil || found.Type != "damaged xfs" || found.Blank {
		t.Fatalf("%+v, %v", found, err)
	}
}

func TestFreeze(t *testing.T) {
	m, at := newMounter(t), filepath.Join(t.TempDir(), "at")
	dev := newDevice(t, 64<<20)
	if err := m.Format(dev.path, "ext4", uuid.New()); err != nil {
		t.Fatal(err)
	}
	mountAt(t, m, at, Filesystem{Device: dev.path, Type: "ext4"})
	writer := func() <-chan struct{} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := os.WriteFile(filepath.Join(at, "file"), []byte("x"), 0o600); err != nil {
				t.Error(err)
			}
		}()
		return done
	}
	thaw, err := m.Freeze(t.Context(), at, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	done := writer()
	select {
	case <-done:
		t.Error("a write went through the freeze")
	case <-time.After(100 * time.Millisecond):
	}
	if err := errors.Join(thaw(), thaw()); err != nil {
		t.Fatal(err)
	}
	<-done

	t.Run("forgotten", func(t *testing.T) {
		thaw, err := m.Freeze(t.Context(), at, 50*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		<-writer()
		if err := thaw(); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("late thaw: %v", err)
		}
	})
	t.Run("left by a crash", func(t *testing.T) {
		if _, err := m.Freeze(t.Context(), at, time.Hour); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(Thaw(at), Thaw(at)); err != nil {
			t.Fatal(err)
		}
		<-writer()
	})
	t.Run("twice", func(t *testing.T) {
		thaw, err := m.Freeze(t.Context(), at, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Freeze(t.Context(), at, time.Minute); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("second freeze: %v", err)
		}
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("no time", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if thaw, err := m.Freeze(ctx, at, time.Minute); err == nil { // it won the race
			if err := thaw(); err != nil {
				t.Fatal(err)
			}
		}
		<-writer()
	})
}

func TestUnmountDeadAndBusy(t *testing.T) {
	m, dir := newMounter(t), t.TempDir()
	dev := newDevice(t, 320<<20)
	if err := m.Format(dev.path, "xfs", uuid.New()); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(dir, "with space")
	mountAt(t, m, at, Filesystem{Device: dev.path, Type: "xfs"})
	f, err := os.Create(filepath.Join(at, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(at); !errors.Is(err, volume.ErrBusy) {
		t.Errorf("unmount in use: %v", err)
	}
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dev.file, 0); err != nil {
		t.Fatal(err)
	}
	if err := Sync(at); err == nil {
		t.Log("the sync of a dead device reported nothing")
	}
	if err := f.Close(); err != nil {
		t.Log(err)
	}
	if err := errors.Join(Drop(at), Drop(at), Remove(at)); err != nil {
		t.Fatal(err)
	}
	if _, mounted, err := At(at); mounted || err != nil {
		t.Error(mounted, err)
	}
}

func TestBindDevice(t *testing.T) {
	m, target := newMounter(t), filepath.Join(t.TempDir(), "p", "dev")
	dev := newDevice(t, 4<<20)
	for range 2 {
		if err := m.Bind(dev.path, target, Flags{}); err != nil {
			t.Fatal(err)
		}
	}
	if !IsDevice(target, dev.path) {
		t.Error("the target is not the device")
	}
	want := make([]byte, 4096)
	rand.Read(want)
	if err := os.WriteFile(target, want, 0); err != nil {
		t.Fatal(err)
	}
	if size, err := DeviceSize(target); err != nil || size != 4<<20 {
		t.Error(size, err)
	}
	if err := errors.Join(Unmount(target), Remove(target)); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/etc/hostname", link); err != nil {
		t.Fatal(err)
	}
	if err := m.Bind(dev.path, link, Flags{}); !errors.Is(err, volume.ErrExists) {
		t.Errorf("bind onto a link: %v", err)
	}
}
