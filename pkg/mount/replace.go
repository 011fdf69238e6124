package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h, since Linux 6.5.
const moveMountBeneath = 0x200

// Replace is Bind where a mount of a loop device, or of the node of one, is at target: it takes that one's place. Where
// the kernel can, nobody sees what lies beneath the two, not for a moment. scratch is a path for its use, where nothing
// is. It returns volume.ErrExists where something else is mounted at target.
func (m *Mounter) Replace(source, target, scratch string, flags Flags) error {
	e, mounted, err := At(target)
	if err != nil {
		return err
	}
	if mounted && !strings.HasPrefix(e.Source, "/dev/loop") && !isLoopNode(target) {
		return fmt.Errorf("%s is a mount of %s; unmount that first: %w", target, e.Source, volume.ErrExists)
	}
	if mounted {
		err := m.replaceBeneath(source, target, scratch, flags)
		if err = errors.Join(err, Drop(scratch), Remove(scratch)); err == nil {
			return nil
		}
		m.log.Debug("mount is replaced in two steps", "path", target, "err", err)
	}
	if err := Drop(target); err != nil {
		return err
	}
	return m.Bind(source, target, flags)
}

// replaceBeneath puts the new mount beneath the old one, and takes that away.
func (m *Mounter) replaceBeneath(source, target, scratch string, flags Flags) error {
	real, err := resolve(target)
	if err != nil {
		return err
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != real, false })
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	if len(infos) != 1 {
		return fmt.Errorf("%d mounts are at %s", len(infos), target)
	}
	if err := m.Bind(source, scratch, flags); err != nil {
		return err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, scratch, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone mount %s: %w", scratch, err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath); err != nil {
		return fmt.Errorf("mount beneath %s: %w", target, err)
	}
	if slices.Contains(Types, infos[0].FSType) {
		_ = Thaw(target) // as Drop does
	}
	return unmount(target, unix.MNT_DETACH)
}

// isLoopNode tells whether path is the node of a loop device.
func isLoopNode(path string) bool {
	const loopMajor = 7
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	return ok && s.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Major(s.Rdev) == loopMajor
}
