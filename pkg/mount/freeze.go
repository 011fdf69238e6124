package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// linux/fs.h
const (
	fiFreeze = 0xc0045877 // _IOWR('X', 119, int)
	fiThaw   = 0xc0045878 // _IOWR('X', 120, int)
)

// Freeze stops all writes to the filesystem at path once everything written is on its device. It gives up, leaving
// the filesystem writable, when ctx ends. The filesystem is thawed when thaw is called, and at the latest after hold;
// thaw returns volume.ErrUnavailable when it came too late, that is when writes went on before it was called.
func (m *Mounter) Freeze(ctx context.Context, path string, hold time.Duration) (thaw func() error, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("freeze filesystem: %w", err)
	}
	frozen := make(chan error)
	abandoned := make(chan struct{})
	m.freezing.Go(func() {
		err := ioctl(f, fiFreeze)
		select {
		case frozen <- err:
			return
		case <-abandoned:
		}
		// The kernel cannot be interrupted while it writes out; what it froze after all is thawed at once.
		if err == nil {
			err = ioctl(f, fiThaw)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			m.log.Warn("freeze given up on", "path", path, "err", err)
		}
	})
	select {
	case <-ctx.Done():
		close(abandoned)
		return nil, fmt.Errorf("filesystem at %s did not freeze in time: it has too much unwritten data or its device waits: %w",
			path, volume.ErrUnavailable)
	case err := <-frozen:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("freeze filesystem at %s: %w: %w", path, err, volume.ErrUnavailable), f.Close())
		}
	}
	var once sync.Once
	var result error
	end := func(late bool) {
		once.Do(func() {
			result = errors.Join(ioctl(f, fiThaw), f.Close())
			if late {
				result = errors.Join(result, fmt.Errorf("filesystem at %s was thawed after %s: %w", path, hold, volume.ErrUnavailable))
			}
		})
	}
	timer := time.AfterFunc(hold, func() { end(true) })
	return func() error {
		timer.Stop()
		end(false)
		return result
	}, nil
}

// Thaw ends every freeze of the filesystem at path, as a crash may leave one. One that is not frozen is nil.
func Thaw(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("thaw filesystem: %w", err)
	}
	for range 16 {
		if err = ioctl(f, fiThaw); err != nil {
			break
		}
	}
	if errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

func ioctl(f *os.File, request uint) error {
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}
