package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/ballast-csi/ballast/pkg/apart"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Mounter works on the host's mounts. Its methods may be called at once, but not for the same path or device.
type Mounter struct {
	mounter kmount.Interface
	exec    utilexec.Interface
	log     *slog.Logger
	// formats bounds how many mkfs run at once: each one writes as fast as it can.
	formats chan struct{}

	freezing sync.WaitGroup
}

// New returns a Mounter that mounts through m, kmount.NewWithoutSystemd("") outside of tests.
func New(m kmount.Interface, log *slog.Logger) *Mounter {
	return &Mounter{mounter: m, exec: utilexec.New(), log: log, formats: make(chan struct{}, 4)}
}

// Filesystem is how a device is to be mounted.
type Filesystem struct {
	Device, Type string
	Flags        Flags
	// ReadOnly makes the superblock read-only; the journal is replayed all the same.
	ReadOnly bool
}

// Mount mounts a filesystem at path, which is created. It is nil where the device is mounted there already.
func (m *Mounter) Mount(path string, f Filesystem) error {
	e, mounted, err := At(path)
	if err != nil {
		return err
	}
	if mounted && e.Source == f.Device {
		return nil
	}
	if mounted {
		return fmt.Errorf("%s is a mount of %s: %w", path, e.Source, volume.ErrExists)
	}
	if err := MakeDir(path); err != nil {
		return err
	}
	var own []string
	if f.ReadOnly {
		own = append(own, "ro")
	}
	if f.Type == "xfs" {
		// A clone has its source's UUID, and XFS mounts a UUID once.
		own = append(own, "nouuid")
	}
	if err := m.mounter.MountSensitive(f.Device, path, f.Type, own, f.Flags.Options); err != nil {
		return fmt.Errorf("mount %s filesystem of %s: %w", f.Type, f.Device, err)
	}
	return nil
}

// Bind makes what is at source appear at target too, which is created: a directory, or a file where source is a device
// node. The mount's own options among flags apply to the new mount alone. It is nil where something is mounted already:
// the caller has checked that it is the right thing.
func (m *Mounter) Bind(source, target string, flags Flags) error {
	_, mounted, err := At(target)
	if err != nil || mounted {
		return err
	}
	info, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("bind %s to %s: %w", source, target, err)
	}
	if info.IsDir() {
		err = MakeDir(target)
	} else {
		err = makeFile(target)
	}
	if err != nil {
		return err
	}
	if err := m.mounter.MountSensitive(source, target, "", append([]string{"bind"}, flags.bindOptions()...), nil); err != nil {
		// The second step, which sets the options, may have failed after the first: leave nothing that is writable.
		return errors.Join(fmt.Errorf("bind %s to %s: %w", source, target, err), Unmount(target))
	}
	return nil
}

// Fits returns nil where a directory, or else a file, may be made at path and removed again: nothing is there, or an
// empty file or a directory. Anything else in the way is volume.ErrExists, a name that is too long volume.ErrInvalid.
func Fits(path string, dir bool) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("check path: %w", pathError(err))
	case dir && info.IsDir(), !dir && info.Mode().IsRegular() && info.Size() == 0:
		return nil
	}
	return fmt.Errorf("%s is in the way: it is there, with mode %s and %d bytes: %w", path, info.Mode(), info.Size(), volume.ErrExists)
}

// pathError gives the error of a path from outside its sentinel.
func pathError(err error) error {
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w: %w", err, volume.ErrExists)
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w: %w", err, volume.ErrInvalid)
	}
	return err
}

// MakeDir creates a directory and its missing parents. A link or a file in its place is volume.ErrExists.
func MakeDir(path string) error {
	if err := os.MkdirAll(path, 0o750); err != nil && !kmount.IsCorruptedMnt(err) {
		return fmt.Errorf("create directory: %w", pathError(err))
	}
	return check(path, fs.ModeDir)
}

func makeFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("create directory: %w", pathError(err))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if errors.Is(err, fs.ErrExist) {
		return check(path, 0)
	}
	if err != nil {
		return fmt.Errorf("create file: %w", pathError(err))
	}
	return f.Close()
}

func check(path string, want fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("check path: %w", err)
	}
	if info.Mode().Type() != want {
		return fmt.Errorf("%s is in the way: it is a %s: %w", path, info.Mode().Type(), volume.ErrExists)
	}
	return nil
}

// busyTries and busyPause bound the wait for a process that is just leaving a mount.
const (
	busyTries = 10
	busyPause = 50 * time.Millisecond
)

// Unmount removes every mount at path. It returns volume.ErrBusy while a process uses one.
func Unmount(path string) error {
	for try := 0; ; {
		_, mounted, err := At(path)
		if err != nil || !mounted {
			return err
		}
		err = unmount(path, 0)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.EBUSY):
			if try++; try == busyTries {
				return fmt.Errorf("unmount %s: a process uses it; end it and try again: %w", path, volume.ErrBusy)
			}
			time.Sleep(busyPause)
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// Drop takes every mount at path out of the tree at once, also one whose device is dead or in use. The kernel lets go
// of the device when the last process does. It is for mounts whose data is lost already, or synced.
func Drop(path string) error {
	for range 64 {
		e, mounted, err := At(path)
		if err != nil || !mounted {
			return err
		}
		if slices.Contains(Types, e.Type) {
			// Frozen and without a path, it would block its writers until a reboot.
			_ = Thaw(path)
		}
		if err := unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return fmt.Errorf("unmount %s: mounts keep appearing: %w", path, volume.ErrBusy)
}

// DropTop takes the topmost mount at path out of the tree, as Drop does with all.
func DropTop(path string) error {
	if err := unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// Remove removes an unmounted target, empty file or empty directory. What was written beneath a mount is never deleted.
func Remove(path string) error {
	info, err := os.Lstat(path)
	if err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		return fmt.Errorf("%s has %d bytes that are not the volume's; move it away: %w", path, info.Size(), volume.ErrInUse)
	}
	err = os.Remove(path)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%s holds files that are not the volume's; move them away: %w", path, volume.ErrInUse)
	}
	return fmt.Errorf("remove target: %w", err)
}

// Sync writes out what the filesystem at path holds in memory.
func Sync(path string) error {
	if err := withOpen(path, unix.O_RDONLY, unix.Syncfs); err != nil {
		return fmt.Errorf("sync filesystem at %s: %w", path, err)
	}
	return nil
}

// SyncDevice writes out what the page cache holds of a raw device.
func SyncDevice(device string) error {
	if err := withOpen(device, unix.O_RDONLY, unix.Fsync); err != nil {
		return fmt.Errorf("sync %s: %w", device, err)
	}
	return nil
}

// Usage of a filesystem. Inodes are 0 where the filesystem has no fixed number of them.
type Usage struct {
	Total, Used, Available                   int64
	TotalInodes, UsedInodes, AvailableInodes int64
}

// Stat returns the usage of the filesystem at path.
func Stat(path string) (Usage, error) {
	var s unix.Statfs_t
	if err := apart.Do(func() error { return unix.Statfs(path, &s) }); err != nil {
		return Usage{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	unit := s.Frsize
	return Usage{
		Total: int64(s.Blocks) * unit, Available: int64(s.Bavail) * unit, Used: int64(s.Blocks-s.Bfree) * unit,
		TotalInodes: int64(s.Files), AvailableInodes: int64(s.Ffree), UsedInodes: int64(s.Files - s.Ffree),
	}, nil
}

// Close waits for freezes that were given up on. The devices beneath must have been aborted, or it may wait long.
func (m *Mounter) Close() {
	m.freezing.Wait()
}
