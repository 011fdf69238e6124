package mount

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/apart"
)

// withOpen calls fn with the file at path, which may be a device that this process serves or lie on one: fn waits apart,
// and makes raw system calls only.
func withOpen(path string, flags int, fn func(fd int) error) error {
	return apart.Do(func() error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		return errors.Join(fn(fd), unix.Close(fd))
	})
}

// unmount is umount2(2). Whoever takes away the last mount of a filesystem writes out what it holds.
func unmount(path string, flags int) error {
	return apart.Do(func() error { return unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW) })
}
