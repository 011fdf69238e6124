package mount

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// probeLen is how much of each end of a device is read to prove that it can be read, in bytes.
const probeLen = 1 << 20

// Found is what Probe proved to be on a device.
type Found struct {
	// Type is "" for nothing recognised, a filesystem's name, or blkid's name for something else.
	Type string
	// Blank is whether both ends of the device read as zeros: nobody wrote a filesystem or data there.
	Blank bool
	// DeviceSize and FilesystemSize in bytes; FilesystemSize is 0 where it is not known.
	DeviceSize, FilesystemSize int64
	// UUID of the filesystem.
	UUID uuid.UUID

	dirty bool
	slack int64
}

// CanGrow tells whether the filesystem leaves room on the device that it could use.
func (f Found) CanGrow() bool {
	return f.FilesystemSize > 0 && f.DeviceSize-f.FilesystemSize > f.slack
}

// Probe reads both ends of the device past the page cache and then asks blkid. An error means that nothing is known
// of the contents: blkid alone reports a device that it cannot read like one that is empty.
func (m *Mounter) Probe(device string) (Found, error) {
	size, head, tail, err := readEnds(device)
	if err != nil {
		return Found{}, fmt.Errorf("device %s cannot be read, so nothing is known of its contents: %w: %w", device, err, volume.ErrUnavailable)
	}
	f := Found{DeviceSize: size, Blank: isZero(head) && isZero(tail)}
	f.Type, err = kmount.NewSafeFormatAndMount(m.mounter, m.exec).GetDiskFormat(device)
	if err != nil {
		return Found{}, fmt.Errorf("blkid cannot tell what is on device %s: %w: %w", device, err, volume.ErrUnavailable)
	}
	s, ok := parseSuperblock(head)
	if !ok {
		return f, nil
	}
	switch f.Type {
	case s.fsType:
		f.FilesystemSize, f.UUID, f.dirty, f.slack = s.size, s.uuid, s.dirty, s.slack
	case "":
		// blkid checks more (a checksum): the superblock is damaged. It is not "nothing".
		f.Type = "damaged " + s.fsType
	}
	return f, nil
}

func isZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}

// readEnds returns a device's size and its first and last MiB, read with O_DIRECT.
func readEnds(device string) (size int64, head, tail []byte, err error) {
	// O_DIRECT wants aligned memory; a mapping is.
	buf, err := unix.Mmap(-1, 0, 2*probeLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	err = withOpen(device, unix.O_RDONLY|unix.O_DIRECT, func(fd int) (err error) {
		if size, err = unix.Seek(fd, 0, unix.SEEK_END); err != nil {
			return err
		}
		if size < probeLen {
			return fmt.Errorf("device has %d bytes, a volume has at least %d", size, volume.MinSize)
		}
		const align = 4096
		return errors.Join(readFull(fd, buf[:probeLen], 0), readFull(fd, buf[probeLen:], (size-probeLen)&^(align-1)))
	})
	if err != nil {
		return 0, nil, nil, err
	}
	return size, bytes.Clone(buf[:probeLen]), bytes.Clone(buf[probeLen:]), nil
}

func readFull(fd int, p []byte, off int64) error {
	for done := 0; done < len(p); {
		n, err := unix.Pread(fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("read %d of %d bytes at %d: %w", done, len(p), off, err)
		}
		done += n
	}
	return nil
}

// DeviceSize returns a block device's size in bytes.
func DeviceSize(device string) (size int64, err error) {
	err = withOpen(device, unix.O_RDONLY, func(fd int) (err error) {
		size, err = unix.Seek(fd, 0, unix.SEEK_END)
		return err
	})
	return size, err
}
