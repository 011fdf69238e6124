package fuseloop

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/frontend"
)

// StaleDevice is what the kernel still uses of a device whose process is gone, or that was aborted. All its I/O fails.
// It goes away with its last user.
type StaleDevice struct {
	Name     string
	LoopPath string
	// Mounts are the mount points in this process's namespace that hold it.
	Mounts []string
}

// dirTag names a run directory in the tags of loop devices, which is how its devices are told from those of others,
// also of others that use the same path in another mount namespace.
func dirTag(dir string) (string, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	st := info.Sys().(*syscall.Stat_t)
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d", dir, st.Dev, st.Ino))
	return "ballast-" + hex.EncodeToString(sum[:6]) + "/", nil
}

// Stale lists the stale devices. Who mounted them unmounts them; the kernel frees them then by itself.
func (f *Frontend) Stale(ctx context.Context) ([]StaleDevice, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	loops, err := boundLoops()
	if err != nil {
		return nil, err
	}
	mounts, err := mountPoints()
	if err != nil {
		return nil, err
	}
	attached := f.loopPaths()
	var stale []StaleDevice
	for _, l := range loops {
		// Of a mount that was detached the kernel knows no path but "/".
		if attached[l.path] || (l.backing != "/" && !strings.HasPrefix(l.backing, f.dir+"/")) {
			continue
		}
		name, ours := f.owns(l.path)
		if !ours {
			continue
		}
		s := StaleDevice{Name: name, LoopPath: l.path}
		for _, m := range mounts {
			// btrfs shows a number of its own; its source is the device.
			if m.number == l.number || m.source == l.path {
				s.Mounts = append(s.Mounts, m.path)
			}
		}
		stale = append(stale, s)
	}
	slices.SortFunc(stale, func(a, b StaleDevice) int { return strings.Compare(a.Name+a.LoopPath, b.Name+b.LoopPath) })
	return stale, nil
}

// loopPaths are the loop devices attached now.
func (f *Frontend) loopPaths() map[string]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	paths := map[string]bool{}
	for _, d := range f.devices {
		if d.path != "" {
			paths[d.path] = true
		}
	}
	return paths
}

// Clean removes the mounts that an earlier process left in the run directory, and frees its loop devices. It returns
// frontend.ErrBusy, naming them, while some are still in use: unmount those and call it again.
func (f *Frontend) Clean(ctx context.Context) error {
	files, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := f.cleanMount(ctx, file.Name()); err != nil {
			return err
		}
	}
	stale, err := f.Stale(ctx)
	if err != nil {
		return err
	}
	var busy []string
	for _, s := range stale {
		if !f.freeLoop(s.LoopPath) {
			busy = append(busy, fmt.Sprintf("%s on %s (mounted at %s)", s.Name, s.LoopPath, strings.Join(s.Mounts, ", ")))
		}
	}
	if len(busy) > 0 {
		return fmt.Errorf("devices of an earlier process are still in use, unmount them: %s: %w", strings.Join(busy, "; "), frontend.ErrBusy)
	}
	return nil
}

// cleanMount removes the mount and the file of a name, unless it is attached.
func (f *Frontend) cleanMount(ctx context.Context, name string) error {
	d, err := f.acquire(ctx, name, true)
	if err != nil {
		return err
	}
	defer f.release(d)
	if d.loop != nil {
		return nil
	}
	defer f.remove(d)
	path := filepath.Join(f.dir, name)
	if err := f.removeMount(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// removeMount removes the mounts of an earlier process from a path in the run directory. Their server is gone; the abort
// is for descriptors that it may have handed on.
func (f *Frontend) removeMount(path string) error {
	mounts, err := mountPoints()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.path != path || m.fsType != fsType {
			continue
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(m.number, "%d:%d", &major, &minor); err == nil {
			f.ctl.abort(minor, path)
		}
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return nil
}

// owns tells whether a loop device is of this run directory, and its name there.
func (f *Frontend) owns(path string) (string, bool) {
	l, tag, err := openLoop(path)
	if err != nil { // unbound meanwhile
		return "", false
	}
	defer l.close()
	return strings.CutPrefix(tag, f.tag)
}

// freeLoop frees a loop device of this run directory that nobody uses.
func (f *Frontend) freeLoop(path string) bool {
	l, tag, err := openLoop(path)
	if err != nil {
		return true // unbound meanwhile
	}
	defer l.close()
	if !strings.HasPrefix(tag, f.tag) {
		return true // and bound by another
	}
	alone, err := l.unbind()
	return err == nil && alone
}
