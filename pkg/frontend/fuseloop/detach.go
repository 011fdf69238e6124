package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/frontend"
)

// busyFor is how long Detach waits for a device to be let go of: probes of new devices, and filesystems just unmounted,
// hold it for a moment.
const busyFor = time.Second

// Detach implements frontend.Frontend.
func (f *Frontend) Detach(ctx context.Context, name string) error {
	d, err := f.acquire(ctx, name, false)
	if err != nil || d == nil {
		return err
	}
	if d.loop == nil { // an Attach gave up early
		f.remove(d)
		f.release(d)
		return nil
	}
	left, err := f.sync(ctx, d)
	if err == nil {
		left, err = f.unbind(ctx, d)
	}
	if !left {
		defer f.release(d)
	}
	if err != nil {
		return fmt.Errorf("detach device %s: %w", name, err)
	}
	err = f.tearDown(d)
	f.remove(d)
	if err != nil {
		return fmt.Errorf("detach device %s: %w", name, err)
	}
	f.log.Info("detached", "device", name)
	return nil
}

// sync writes out what the kernel holds of the device. A write that waits in the device makes it wait: the caller may
// leave then, and the device's lock is released when the sync ends, with the device's request or with Abort.
func (f *Frontend) sync(ctx context.Context, d *device) (left bool, err error) {
	synced := make(chan error, 1)
	f.tasks.Go(func() { synced <- d.loop.sync() })
	select {
	case err := <-synced:
		return false, err
	case <-ctx.Done():
		f.tasks.Go(func() {
			<-synced
			f.release(d)
		})
		return true, ctx.Err()
	}
}

// unbind unbinds the loop device if nobody else uses it. The caller may leave as from sync.
func (f *Frontend) unbind(ctx context.Context, d *device) (left bool, err error) {
	deadline := time.Now().Add(busyFor)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		alone, err := d.loop.unbind()
		if err != nil || alone {
			return false, err
		}
		if time.Now().After(deadline) {
			return false, fmt.Errorf("%s is open or mounted: %w", d.loop.path, frontend.ErrBusy)
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(pause):
		}
		if left, err := f.sync(ctx, d); err != nil { // who had it open may have written
			return left, err
		}
	}
}

// Abort implements frontend.Frontend. It does not wait for another operation before I/O fails: that operation may wait
// for the very I/O.
func (f *Frontend) Abort(ctx context.Context, name string) error {
	f.mu.Lock()
	d := f.devices[name]
	if d != nil {
		f.abortLocked(d)
	}
	f.mu.Unlock()
	if d == nil {
		return nil
	}
	d, err := f.acquire(ctx, name, false)
	if err != nil || d == nil {
		return err
	}
	defer f.release(d)
	f.mu.Lock()
	f.abortLocked(d) // it may have been attached only now
	f.mu.Unlock()
	if d.server != nil {
		if err := d.server.quiesce(ctx); err != nil {
			return fmt.Errorf("abort device %s: %w", name, err)
		}
	}
	err = f.tearDown(d)
	f.remove(d)
	if err != nil {
		return fmt.Errorf("abort device %s: %w", name, err)
	}
	f.log.Warn("aborted", "device", name)
	return nil
}

// abortLocked fails the device's I/O. Frontend.mu is held.
func (f *Frontend) abortLocked(d *device) {
	if d.server == nil {
		return
	}
	d.aborted = true
	d.server.cancel()
	f.ctl.abort(d.server.conn, d.server.path)
}

func (f *Frontend) isAborted(d *device) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return d.aborted
}

// tearDown frees what of a device there is. It is unbound, or aborted, or failed to come up. What the kernel still uses
// then is left, for sweep.
func (f *Frontend) tearDown(d *device) error {
	if d.path == "" {
		return nil
	}
	left := false
	defer func() {
		f.disown(d.path)
		if left {
			f.setLeft()
		}
	}()
	alone := true
	if d.loop != nil {
		alone, _ = d.loop.unbind()
		// Its error is of page cache that could not be written: after a sync or an abort there is nothing to say.
		_ = d.loop.close()
		d.loop = nil
	}
	if d.server != nil {
		defer func() { <-d.server.stopped }()
		defer d.server.cancel()
		err := error(unix.EBUSY)
		if alone {
			err = unmount(d.path)
		}
		if err != nil && err != unix.EINVAL { // EINVAL: somebody has unmounted it
			f.ctl.abort(d.server.conn, d.path)
			left = true
			return nil
		}
	}
	if err := os.Remove(d.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// sweepEvery is how often it is looked, at the least, whether what had to be left has lost its last user.
const sweepEvery = 5 * time.Second

// setLeft has sweep remove what had to be left in the run directory.
func (f *Frontend) setLeft() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lefts++
	if !f.sweeping && !f.closed {
		f.sweeping = true
		f.tasks.Go(f.sweep)
	}
}

// sweep removes what was left once its last user is gone. Nobody tells when that is.
func (f *Frontend) sweep() {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, sweepEvery) {
		select {
		case <-f.closing:
			return
		case <-time.After(pause):
		}
		f.mu.Lock()
		seen := f.lefts
		f.mu.Unlock()
		if err := f.Clean(context.Background()); err != nil {
			if !errors.Is(err, frontend.ErrBusy) {
				f.log.Error("cannot remove what is left of devices; trying again", "error", err)
			}
			continue
		}
		f.mu.Lock()
		f.sweeping = f.lefts != seen
		again := f.sweeping
		f.mu.Unlock()
		if !again {
			return
		}
	}
}

// unmount unmounts a file that the kernel has just let go of, or is about to.
func unmount(path string) error {
	var err error
	for pause := time.Millisecond; pause < time.Second; pause *= 2 {
		if err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != unix.EBUSY {
			return err
		}
		time.Sleep(pause)
	}
	return err
}
