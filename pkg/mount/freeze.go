package mount

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/apart"
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
	thread, err := apart.Start()
	if err != nil {
		return nil, fmt.Errorf("freeze filesystem: %w", err)
	}
	var fd int // open until the thread is stopped
	ioctl := func(request uint) error {
		return thread.Do(func() error { return unix.IoctlSetInt(fd, request, 0) })
	}
	frozen := make(chan error)
	abandoned := make(chan struct{})
	m.freezing.Go(func() {
		err := thread.Do(func() (err error) {
			fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			return err
		})
		if err == nil {
			err = ioctl(fiFreeze)
		}
		select {
		case frozen <- err:
			return
		case <-abandoned:
		}
		// The kernel cannot be interrupted while it writes out; what it froze after all is thawed at once.
		if err == nil {
			err = ioctl(fiThaw)
		}
		if err != nil {
			m.log.Warn("freeze given up on", "path", path, "err", err)
		}
		thread.Stop()
	})
	select {
	case <-ctx.Done():
		close(abandoned)
		return nil, fmt.Errorf("filesystem at %s did not freeze in time: it has too much unwritten data or its device waits: %w",
			path, volume.ErrUnavailable)
	case err := <-frozen:
		if err != nil {
			thread.Stop()
			return nil, fmt.Errorf("freeze filesystem at %s: %w: %w", path, err, volume.ErrUnavailable)
		}
	}
	var once sync.Once
	var result error
	end := func(late bool) {
		once.Do(func() {
			result = ioctl(fiThaw)
			thread.Stop()
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
	err := withOpen(path, unix.O_RDONLY, func(fd int) (err error) {
		for range 16 {
			if err = unix.IoctlSetInt(fd, fiThaw, 0); err != nil {
				break
			}
		}
		if err == unix.EINVAL {
			err = nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("thaw filesystem: %w", err)
	}
	return nil
}
