package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/apart"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// StaleDevice is what the kernel still uses of a device whose process is gone, or that was aborted. All its I/O fails.
// The kernel frees it when its last user is gone.
type StaleDevice struct {
	Name     string
	LoopPath string
	// Mounts are the mount points in this process's namespace that hold it.
	Mounts []string
}

// remnant is a file of the run directory that belongs to no attached device.
type remnant struct {
	path    string
	mounted bool
	conn    uint32     // of its mount
	loop    *boundLoop // nil: none is bound to it
}

// remnants lists them. A loop device is taken for ours only where its file is a mount of ours in this namespace: another
// Ballast, with a namespace of its own, may well use the same paths.
func (f *Frontend) remnants(mounts []*mountinfo.Info) ([]remnant, error) {
	files, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, err
	}
	loops, err := boundLoops()
	if err != nil {
		return nil, err
	}
	var all []remnant
	for _, file := range files {
		r := remnant{path: filepath.Join(f.dir, file.Name())}
		f.mu.Lock()
		owned := f.owned[r.path]
		f.mu.Unlock()
		if owned {
			continue
		}
		for _, m := range mounts {
			if m.Mountpoint == r.path && m.FSType == fsType {
				r.mounted, r.conn = true, connection(m)
			}
		}
		for i := range loops {
			if r.mounted && loops[i].backing == r.path {
				r.loop = &loops[i]
			}
		}
		all = append(all, r)
	}
	return all, nil
}

// name is that of the device; mountPath made the path.
func (r remnant) name() string {
	base := filepath.Base(r.path)
	if i := strings.LastIndexByte(base, '@'); i >= 0 {
		return base[:i]
	}
	return base
}

// Stale lists the stale devices. Who mounted them unmounts them.
func (f *Frontend) Stale(ctx context.Context) ([]StaleDevice, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	mounts, err := mountPoints()
	if err != nil {
		return nil, err
	}
	all, err := f.remnants(mounts)
	if err != nil {
		return nil, err
	}
	var stale []StaleDevice
	for _, r := range all {
		if r.loop == nil {
			continue
		}
		s := StaleDevice{Name: r.name(), LoopPath: r.loop.path}
		for _, m := range mounts {
			// btrfs shows a number of its own; its source is the device.
			if number(m) == r.loop.number || m.Source == r.loop.path {
				s.Mounts = append(s.Mounts, m.Mountpoint)
			}
		}
		stale = append(stale, s)
	}
	slices.SortFunc(stale, func(a, b StaleDevice) int { return strings.Compare(a.Name+"@"+a.LoopPath, b.Name+"@"+b.LoopPath) })
	return stale, nil
}

// Clean removes what an earlier process, or Abort, left in the run directory. It returns frontend.ErrBusy, naming the
// devices, while some are still in use: it is tried again by itself, and need only be called to have it done at once.
func (f *Frontend) Clean(ctx context.Context) error {
	f.cleaning.Lock()
	defer f.cleaning.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	for {
		left, err := f.cleanAll()
		if !left {
			return err
		}
		stale, staleErr := f.Stale(ctx)
		if err = errors.Join(err, staleErr); err == nil && len(stale) == 0 { // let go of since: its mount is still there
			continue
		}
		f.setLeft()
		if len(stale) == 0 {
			return err
		}
		var busy []string
		for _, s := range stale {
			busy = append(busy, fmt.Sprintf("%s on %s (mounted at %q)", s.Name, s.LoopPath, s.Mounts))
		}
		return errors.Join(err, fmt.Errorf("dead devices are still in use, unmount them: %s: %w", strings.Join(busy, "; "), frontend.ErrBusy))
	}
}

// cleanAll removes the remnants, and tells whether some were left because their loop devices are in use.
func (f *Frontend) cleanAll() (left bool, err error) {
	mounts, err := mountPoints()
	if err != nil {
		return false, err
	}
	all, err := f.remnants(mounts)
	if err != nil {
		return false, err
	}
	var errs []error
	for _, r := range all {
		busy, err := f.clean(r)
		left = left || busy
		errs = append(errs, err)
	}
	return left, errors.Join(errs...)
}

// clean removes a remnant, unless its loop device is in use: the mount is left then, as by its path the device is found.
func (f *Frontend) clean(r remnant) (busy bool, err error) {
	if r.mounted {
		// Its server is gone. The abort is for descriptors that it may have handed on.
		f.ctl.abort(r.conn, r.path)
		if r.loop != nil && !freeLoop(r.loop.path, r.path) {
			return true, nil
		}
		if err := unmount(r.path); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return false, fmt.Errorf("unmount %s: %w", r.path, err)
		}
	}
	info, err := os.Lstat(r.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case !info.Mode().IsRegular() || info.Size() != 0:
		return false, fmt.Errorf("%s is not Ballast's; move it away: %w", r.path, volume.ErrInUse)
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return false, nil
}

// freeLoop frees a loop device if it is bound to the file, and nobody uses it.
func freeLoop(path, file string) bool {
	thread, err := apart.Start()
	if err != nil {
		return false
	}
	l := &loop{thread: thread, path: path}
	if err := l.open(unix.O_RDONLY); err != nil {
		thread.Stop()
		return false
	}
	defer l.close()
	if backing, err := l.backing(); err != nil || backing != file { // from here on it cannot change
		return true
	}
	alone, err := l.unbind()
	return err == nil && alone
}

// abortAll aborts the connections of all mounts in a directory.
func abortAll(ctl control, dir string) error {
	mounts, err := mountPoints()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.FSType == fsType && filepath.Dir(m.Mountpoint) == dir {
			ctl.abort(connection(m), m.Mountpoint)
		}
	}
	return nil
}
