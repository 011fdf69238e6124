package extentstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// diskLabel marks a filesystem that Ballast made for a pool.
const diskLabel = "ballast-pool"

// mountDisk mounts the filesystem of a raw disk on dir, making it on a blank one. volume.ErrExists: the disk carries
// something else and wipe is false. It leaves a mount that is there already.
func mountDisk(ctx context.Context, device, dir string, wipe bool) (unmount func() error, err error) {
	same, err := mounted(device, dir)
	if err != nil {
		return nil, err
	}
	if !same {
		if err := prepareDisk(ctx, device, wipe); err != nil {
			return nil, err
		}
		flags := uintptr(unix.MS_NOATIME | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC)
		if err := unix.Mount(device, dir, "ext4", flags, ""); err != nil {
			return nil, fmt.Errorf("mount %s on %s: %w", device, dir, err)
		}
	}
	return func() error {
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	}, nil
}

// mounted tells whether device is what is mounted on dir. Something else there is an error.
func mounted(device, dir string) (bool, error) {
	var dev, here, above unix.Stat_t
	if err := unix.Stat(device, &dev); err != nil {
		return false, fmt.Errorf("disk %q of the pool: %w (%w)", device, volume.ErrNotFound, err)
	}
	if dev.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false, fmt.Errorf("%s is not a block device: %w", device, volume.ErrInvalid)
	}
	if err := errors.Join(unix.Stat(dir, &here), unix.Stat(dir+"/..", &above)); err != nil {
		return false, fmt.Errorf("pool directory: %w", err)
	}
	if here.Dev == dev.Rdev {
		return true, nil
	}
	if here.Dev != above.Dev {
		return false, fmt.Errorf("another filesystem is mounted on %s: %w", dir, volume.ErrInUse)
	}
	return false, nil
}

// prepareDisk makes a filesystem on a disk that carries nothing. One that carries a pool is left as it is.
func prepareDisk(ctx context.Context, device string, wipe bool) error {
	// Exclusive: fails where the disk, or a part of it, is mounted or used by another driver.
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("disk %s is in use: %w (%w)", device, volume.ErrInUse, err)
	}
	f := os.NewFile(uintptr(fd), device)
	found, ours, err := probe(ctx, f)
	if err = errors.Join(err, f.Close()); err != nil || ours {
		return err
	}
	if found != "" && !wipe {
		return fmt.Errorf("disk %s carries %s and is left as it is; look at what is on it, and give the option that wipes it if it is to be lost: %w",
			device, found, volume.ErrExists)
	}
	if found != "" {
		if err := run(ctx, "wipefs", "--all", "--force", device); err != nil {
			return err
		}
	}
	// Few files, all large or a database's.
	return run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-T", "largefile", "-L", diskLabel, device)
}

// probe says what a disk carries, "" for nothing. Ours is a filesystem that was made for a pool.
func probe(ctx context.Context, f *os.File) (found string, ours bool, err error) {
	out, err := exec.CommandContext(ctx, "blkid", "-p", "-o", "export", f.Name()).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		var what []string
		for line := range strings.Lines(string(out)) {
			line = strings.TrimSpace(line)
			ours = ours || line == "LABEL="+diskLabel
			if k, v, _ := strings.Cut(line, "="); k == "TYPE" || k == "PTTYPE" || k == "LABEL" {
				what = append(what, strings.ToLower(k)+" "+v)
			}
		}
		if len(what) > 0 {
			return strings.Join(what, ", "), ours, nil
		}
	case errors.As(err, &exit) && exit.ExitCode() == 2: // nothing recognised
	case errors.As(err, &exit) && exit.ExitCode() == 8:
		return "several signatures at once", false, nil
	default:
		return "", false, fmt.Errorf("blkid %s: %w: %s", f.Name(), err, out)
	}
	head := make([]byte, 1<<20)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", false, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if bytes.Count(head[:n], []byte{0}) != n {
		return "data in its first MiB that no tool recognises", false, nil
	}
	return "", false, nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
