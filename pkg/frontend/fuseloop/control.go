package fuseloop

import (
	"strconv"

	"golang.org/x/sys/unix"
)

// control is an instance of fusectl that no mount table shows: the kernel's switches to abort connections. Its zero
// value has none; then only the mount can be used.
type control struct{ dir int }

func openControl() control {
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return control{dir: -1}
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return control{dir: -1}
	}
	dir, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return control{dir: -1}
	}
	return control{dir: dir}
}

// abort ends all requests of a connection, now and to come. It finds the connection by number, even if its mount was
// moved away, and by its mount.
func (c control) abort(conn uint32, path string) {
	if c.dir >= 0 && conn != 0 {
		fd, err := unix.Openat(c.dir, strconv.FormatUint(uint64(conn), 10)+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			_, err = unix.Write(fd, []byte("1"))
			unix.Close(fd)
			if err == nil {
				return
			}
		}
	}
	// MNT_FORCE aborts the connection, whether the mount goes (nothing holds it) or stays.
	_ = unix.Unmount(path, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
}

func (c control) close() {
	if c.dir >= 0 {
		unix.Close(c.dir)
	}
}
