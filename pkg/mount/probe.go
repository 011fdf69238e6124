package mount

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

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
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if size, err = f.Seek(0, io.SeekEnd); err != nil {
		return 0, nil, nil, err
	}
	if size < probeLen {
		return 0, nil, nil, fmt.Errorf("device has %d bytes, a volume has at least %d", size, volume.MinSize)
	}
	// O_DIRECT wants aligned memory; a mapping is.
	buf, err := unix.Mmap(-1, 0, probeLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	if err := readFull(f, buf, 0); err != nil {
		return 0, nil, nil, err
	}
	head = bytes.Clone(buf)
	const align = 4096
	if err := readFull(f, buf, (size-probeLen)&^(align-1)); err != nil {
		return 0, nil, nil, err
	}
	return size, head, bytes.Clone(buf), nil
}

func readFull(f *os.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n < len(p) {
		return fmt.Errorf("read %d of %d bytes at %d: %w", n, len(p), off, err)
	}
	return nil
}

// DeviceSize returns a block device's size in bytes.
func DeviceSize(device string) (size int64, err error) {
	f, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return f.Seek(0, io.SeekEnd)
}
