package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/apart"
)

// Entry is one mount of the kernel's table.
type Entry struct {
	// Source is the device of a filesystem on one; Type is the filesystem's.
	Source, Type string
	// ReadOnly is the mount's own flag; SuperReadOnly the filesystem's, as after an error.
	ReadOnly, SuperReadOnly bool
	// Shutdown is a filesystem that its driver has shut down after an error.
	Shutdown bool
}

// resolve follows the links of a path's parent, but not the path itself: that one may be a mount whose device is dead.
func resolve(path string) (string, error) {
	parent, err := filepath.EvalSymlinks(filepath.Dir(filepath.Clean(path)))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(path)), nil
}

// At returns the topmost mount at exactly path, and whether there is one.
func At(path string) (Entry, bool, error) {
	real, err := resolve(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{}, false, nil
	}
	if err != nil {
		return Entry{}, false, fmt.Errorf("look up mount %s: %w", path, pathError(err))
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != real, false })
	if err != nil {
		return Entry{}, false, fmt.Errorf("read the mount table: %w", err)
	}
	if len(infos) == 0 {
		return Entry{}, false, nil
	}
	// The table is in order of mounting; the last one covers the others.
	i := infos[len(infos)-1]
	super := strings.Split(i.VFSOptions, ",")
	return Entry{
		Source: i.Source, Type: i.FSType,
		ReadOnly:      slices.Contains(strings.Split(i.Options, ","), "ro"),
		SuperReadOnly: slices.Contains(super, "ro") || slices.Contains(super, "emergency_ro"),
		Shutdown:      slices.Contains(super, "shutdown"),
	}, true, nil
}

// Of returns the paths at which the filesystem on a device is mounted.
func Of(device string) ([]string, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Source != device, false })
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	paths := make([]string, 0, len(infos))
	for _, i := range infos {
		paths = append(paths, i.Mountpoint)
	}
	return paths, nil
}

// Corrupted tells whether touching the path fails in the way of a mount whose device or server is gone.
func Corrupted(path string) bool {
	var s unix.Statfs_t
	if err := apart.Do(func() error { return unix.Statfs(path, &s) }); err != nil {
		return kmount.IsCorruptedMnt(err)
	}
	_, err := os.Stat(path)
	return kmount.IsCorruptedMnt(err)
}

// Dead tells whether what is mounted at a path serves nobody any more: touching it fails in a way that does not pass. Of a mount
// that is not ours less is sure than Corrupted takes for granted: a live one may refuse root, or its host be away for a while.
func Dead(path string) bool {
	touch := func() error {
		var fs unix.Statfs_t
		var st unix.Stat_t
		return errors.Join(unix.Statfs(path, &fs), unix.Stat(path, &st))
	}
	err := apart.Do(touch)
	for _, dead := range []error{unix.ENOTCONN, unix.ESTALE, unix.EIO, unix.ENODEV} {
		if errors.Is(err, dead) {
			return true
		}
	}
	return false
}

// IsDevice tells whether path is a node of the same block device as device, as after a bind mount of it.
func IsDevice(path, device string) bool {
	a, aerr := os.Stat(path)
	b, berr := os.Stat(device)
	if aerr != nil || berr != nil {
		return false
	}
	x, xok := a.Sys().(*syscall.Stat_t)
	y, yok := b.Sys().(*syscall.Stat_t)
	return xok && yok && x.Mode&unix.S_IFMT == unix.S_IFBLK && y.Mode&unix.S_IFMT == unix.S_IFBLK && x.Rdev == y.Rdev
}
