package mount

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"github.com/google/uuid"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// command is a tool that failed.
type command struct {
	name   string
	status int // -1 where it did not run or did not exit
	output string
	err    error
}

func (c *command) Error() string {
	return fmt.Sprintf("%s: %v: %s", c.name, c.err, c.output)
}

func (c *command) Unwrap() error { return c.err }

// maxOutput bounds what is kept of a tool's output, in bytes.
const maxOutput = 2 << 10

// run runs a tool to its end: one that was cut off half way leaves more to repair than one that is late.
func (m *Mounter) run(name string, args ...string) error {
	out, err := m.exec.Command(name, args...).CombinedOutput()
	if err == nil {
		return nil
	}
	c := &command{name: name, status: -1, err: err, output: strings.TrimSpace(string(out[:min(len(out), maxOutput)]))}
	if exit, ok := err.(utilexec.ExitError); ok && exit.Exited() {
		c.status = exit.ExitStatus()
	}
	return c
}

// runBtrfs runs a tool of btrfs in a mount namespace without the FUSE mounts behind Ballast's devices: the tools look at
// the file behind every mounted loop device, and give up on one whose server is dead.
func (m *Mounter) runBtrfs(name string, args ...string) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread never ends, and its namespace is the process's. While it is held, another takes the work.
			defer runtime.UnlockOSThread()
			done <- m.runBtrfs(name, args...)
			return
		}
		// This thread ends with the goroutine, and with it its namespace.
		if err := hideFUSE(); err != nil {
			done <- err
			return
		}
		done <- m.run(name, args...)
	}()
	return <-done
}

// hideFUSE gives the calling thread a mount namespace of its own without Ballast's FUSE mounts.
func hideFUSE() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.FSType != "fuse.ballast", false })
	if err != nil {
		return err
	}
	for _, i := range infos {
		if err := unix.Unmount(i.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("hide mount %s: %w", i.Mountpoint, err)
		}
	}
	return nil
}

// Format runs mkfs and syncs the device. The caller has asked Decide.
//
// The whole device is discarded first, which Ballast's devices answer with zeros: so inode tables and journal need no
// zeroing. No blocks are reserved for root, and ext4 stops writing at the first sign of damage.
func (m *Mounter) Format(device, fsType string, id uuid.UUID) error {
	var args []string
	run := m.run
	switch fsType {
	case "ext4":
		args = []string{"-F", "-q", "-m", "0", "-e", "remount-ro", "-U", id.String(), "-E", "lazy_itable_init=1,lazy_journal_init=1", device}
	case "xfs":
		args = []string{"-f", "-q", "-m", "uuid=" + id.String(), device}
	case "btrfs":
		args = []string{"-f", "-q", "-U", id.String(), device}
		run = m.runBtrfs
	default:
		return fmt.Errorf("filesystem %q is not supported: %w", fsType, volume.ErrInvalid)
	}
	m.formats <- struct{}{}
	defer func() { <-m.formats }()
	if err := run("mkfs."+fsType, args...); err != nil {
		return fmt.Errorf("format %s: %w", device, err)
	}
	if err := withOpen(device, unix.O_RDWR, unix.Fsync); err != nil {
		return fmt.Errorf("sync %s: %w", device, err)
	}
	return nil
}

// Check repairs what can be repaired safely before a mount. XFS and btrfs do that when they are mounted.
func (m *Mounter) Check(device, fsType string) error {
	if fsType != "ext4" {
		return nil
	}
	return m.e2fsck(device, "-p")
}

func (m *Mounter) e2fsck(device string, args ...string) error {
	err := m.run("e2fsck", append(args, device)...)
	var c *command
	// e2fsck(8): 1 and 2 are errors corrected, 4 is errors left, 8 and more are errors of its own.
	switch {
	case err == nil:
		return nil
	case errors.As(err, &c) && (c.status == 1 || c.status == 2):
		m.log.Warn("filesystem repaired", "device", device, "output", c.output)
		return nil
	case errors.As(err, &c) && c.status == 4:
		return fmt.Errorf("the filesystem has damage that cannot be repaired safely by itself; attach the volume as a raw block device "+
			"and run e2fsck, or restore a snapshot: %w: %w", err, volume.ErrDataLoss)
	}
	return fmt.Errorf("check filesystem on %s: %w", device, err)
}

// Identify gives a btrfs its own UUID where it has another's: two of one UUID cannot be told apart by the kernel, which
// may mount the one for the other. scratch is a directory to mount it at for the replay of its log.
func (m *Mounter) Identify(device string, found Found, id uuid.UUID, scratch string) error {
	if found.Type != "btrfs" || found.UUID == id {
		return nil
	}
	if found.dirty {
		// Changing the UUID commits a transaction, after which the log would not be replayed any more.
		if err := m.Mount(scratch, Filesystem{Device: device, Type: "btrfs"}); err != nil {
			return fmt.Errorf("replay the clone's log (before Linux 6.7 its source must not be mounted on this node): %w", err)
		}
		if err := Unmount(scratch); err != nil {
			return err
		}
	}
	if err := m.runBtrfs("btrfstune", "-M", id.String(), device); err != nil {
		return fmt.Errorf("give the clone a UUID of its own: %w", err)
	}
	return nil
}

// ErrMounted is returned by Grow for a filesystem that the kernel does not grow while it is mounted.
var ErrMounted = errors.New("the kernel refuses to grow the mounted filesystem")

// Grow makes the filesystem mounted at path as large as its device. It is nil where it is that large already. It returns
// ErrMounted where the kernel forbids it to this process (ext4 wants CAP_SYS_RESOURCE): GrowUnmounted then does it before
// the next mount.
func (m *Mounter) Grow(device, fsType, path string) error {
	switch fsType {
	case "ext4":
		return growExt4(device, path)
	case "xfs":
		return m.run("xfs_growfs", "-d", path)
	case "btrfs":
		return m.run("btrfs", "filesystem", "resize", "max", path)
	}
	return fmt.Errorf("filesystem %q cannot grow: %w", fsType, volume.ErrInvalid)
}

// ext4ResizeFS is EXT4_IOC_RESIZE_FS of fs/ext4/ext4.h: _IOW('f', 16, __u64), the new size in blocks.
const ext4ResizeFS = 0x40086610

// growExt4 does what resize2fs does to a mounted filesystem. It uses the system call for its error, which resize2fs
// gives as text only.
func growExt4(device, path string) error {
	size, head, _, err := readEnds(device)
	if err != nil {
		return fmt.Errorf("grow filesystem: %w", err)
	}
	s, ok := parseSuperblock(head)
	if !ok || s.fsType != "ext4" {
		return fmt.Errorf("grow filesystem: no ext4 on %s: %w", device, volume.ErrDataLoss)
	}
	if size-s.size <= s.slack {
		return nil
	}
	blocks := uint64(size / (s.slack / 1024))
	err = withOpen(path, unix.O_RDONLY, func(fd int) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
			return errno
		}
		return nil
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("ext4 at %s: %w: %w", path, err, ErrMounted)
	}
	return fmt.Errorf("grow ext4 at %s to %d bytes: %w", path, size, err)
}

// GrowUnmounted makes an unmounted ext4 as large as its device.
func (m *Mounter) GrowUnmounted(device string) error {
	// resize2fs refuses a filesystem that was not checked in full since its last mount.
	if err := m.e2fsck(device, "-f", "-p"); err != nil {
		return err
	}
	return m.run("resize2fs", device)
}
