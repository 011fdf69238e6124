package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxName bounds a device's name, in bytes: with the run directory's tag before it, it fits a loop device's.
const maxName = 40

// Options of a Frontend.
type Options struct {
	// RunDir holds the mounts and a lock. One process uses it at a time, and always the same one after a restart.
	RunDir string
	Logger *slog.Logger
}

// Frontend implements frontend.Frontend.
type Frontend struct {
	dir  string   // the mounts: dir/name
	tag  string   // what loop devices' tags begin with
	lock *os.File // held while open
	ctl  control
	bufs buffers
	log  *slog.Logger

	mu      sync.Mutex
	devices map[string]*device
	closed  bool
	tasks   sync.WaitGroup // of requests whose caller has left
}

var _ frontend.Frontend = (*Frontend)(nil)

// New takes the run directory, and removes what an earlier process left in it. What the kernel still uses of that stays,
// dead: see Stale. It returns volume.ErrInUse while another process has the directory.
func New(ctx context.Context, o Options) (*Frontend, error) {
	if err := os.MkdirAll(filepath.Join(o.RunDir, "devices"), 0o700); err != nil {
		return nil, err
	}
	// The kernel lists mounts by their real path.
	dir, err := filepath.EvalSymlinks(filepath.Join(o.RunDir, "devices"))
	if err == nil {
		dir, err = filepath.Abs(dir)
	}
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(o.RunDir, "frontend.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another process uses %s; stop it first: %w", o.RunDir, volume.ErrInUse)
	}
	tag, err := dirTag(dir)
	if err != nil {
		lock.Close()
		return nil, err
	}
	f := &Frontend{dir: dir, tag: tag, lock: lock, ctl: openControl(), log: o.Logger, devices: map[string]*device{}}
	if err := f.Clean(ctx); err != nil && !errors.Is(err, frontend.ErrBusy) {
		f.ctl.close()
		lock.Close()
		return nil, fmt.Errorf("clean up after an earlier process: %w", err)
	}
	return f, nil
}

// device is what is attached, or being attached, under a name.
type device struct {
	name string
	busy chan struct{} // held by the one operation under way
	gone bool          // guarded by busy: no longer in the map

	server *server // written under busy and Frontend.mu, read under either
	// aborted and path, that of the loop device, are guarded by Frontend.mu.
	aborted bool
	path    string
	loop    *loop // these are guarded by busy
	dev     block.Device
	options frontend.Options
}

// acquire returns the device of a name with its lock held; nil if there is none and add is not set.
func (f *Frontend) acquire(ctx context.Context, name string, add bool) (*device, error) {
	for {
		f.mu.Lock()
		d := f.devices[name]
		if f.closed && add {
			f.mu.Unlock()
			return nil, fmt.Errorf("frontend is closed: %w", volume.ErrUnavailable)
		}
		if d == nil && add {
			d = &device{name: name, busy: make(chan struct{}, 1)}
			f.devices[name] = d
		}
		f.mu.Unlock()
		if d == nil {
			return nil, nil
		}
		select {
		case d.busy <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("another operation on device %s is under way: %w", name, ctx.Err())
		}
		if !d.gone {
			return d, nil
		}
		<-d.busy
	}
}

func (f *Frontend) release(d *device) { <-d.busy }

// remove forgets a device whose lock is held.
func (f *Frontend) remove(d *device) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d.gone = true
	delete(f.devices, d.name)
}

func checkName(name string) error {
	if err := volume.CheckName("device name", name); err != nil {
		return err
	}
	if len(name) > maxName || strings.Contains(name, "/") || strings.HasPrefix(name, ".") {
		return fmt.Errorf("device name %q has more than %d bytes, a slash, or begins with a dot: %w", name, maxName, volume.ErrInvalid)
	}
	return nil
}

// Attach implements frontend.Frontend.
func (f *Frontend) Attach(ctx context.Context, name string, dev block.Device, o frontend.Options) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	if o.BlockSize != 512 && o.BlockSize != 4096 {
		return "", fmt.Errorf("block size %d is neither 512 nor 4096: %w", o.BlockSize, volume.ErrInvalid)
	}
	if size := dev.Size(); size <= 0 || size%int64(o.BlockSize) != 0 {
		return "", fmt.Errorf("size %d is not a multiple of the block size %d: %w", size, o.BlockSize, volume.ErrInvalid)
	}
	d, err := f.acquire(ctx, name, true)
	if err != nil {
		return "", err
	}
	defer f.release(d)
	if d.loop != nil {
		switch {
		case f.isAborted(d):
			return "", fmt.Errorf("device %s is being aborted: %w", name, frontend.ErrBusy)
		case d.options != o:
			return "", fmt.Errorf("device %s is attached with other options; detach it first: %w", name, volume.ErrExists)
		}
		return d.loop.path, nil
	}
	if err := f.attach(ctx, d, dev, o); err != nil {
		f.tearDown(d)
		f.remove(d)
		return "", fmt.Errorf("attach device %s: %w", name, err)
	}
	f.log.Info("attached", "device", name, "path", d.loop.path, "size", dev.Size(), "blockSize", o.BlockSize, "readOnly", o.ReadOnly)
	return d.loop.path, nil
}

func (f *Frontend) attach(ctx context.Context, d *device, dev block.Device, o frontend.Options) error {
	d.dev, d.options = dev, o
	path := filepath.Join(f.dir, d.name)
	if err := f.removeMount(path); err != nil { // of an earlier process, still used then
		return err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	file.Close()
	s, err := newServer(path, dev, o.ReadOnly, &f.bufs, f.log.With("device", d.name))
	f.mu.Lock()
	d.server = s
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if d.loop, err = newLoop(ctx, path, f.tag+d.name, o.BlockSize, o.ReadOnly); err != nil {
		return err
	}
	f.mu.Lock()
	d.path = d.loop.path
	f.mu.Unlock()
	size, err := d.loop.size()
	if err == nil && size != dev.Size() {
		err = fmt.Errorf("the kernel sees %d bytes, not %d", size, dev.Size())
	}
	return err
}

// Resize implements frontend.Frontend.
func (f *Frontend) Resize(ctx context.Context, name string) error {
	d, err := f.acquire(ctx, name, false)
	if err != nil {
		return err
	}
	if d == nil {
		return fmt.Errorf("device %s is not attached: %w", name, volume.ErrNotFound)
	}
	defer f.release(d)
	want := d.dev.Size()
	// The stat makes the kernel ask for the size; older loop drivers only look at what it knew.
	var st unix.Stat_t
	if err := unix.Stat(d.server.path, &st); err != nil {
		return fmt.Errorf("resize device %s: %w", name, err)
	}
	if err := d.loop.refresh(); err != nil {
		return err
	}
	got, err := d.loop.size()
	if err != nil {
		return err
	}
	if got < want { // the device may have grown once more
		return fmt.Errorf("resize device %s: the kernel sees %d bytes, not %d", name, got, want)
	}
	return nil
}

// Close implements frontend.Frontend.
func (f *Frontend) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	names := make([]string, 0, len(f.devices))
	for name := range f.devices {
		names = append(names, name)
	}
	f.mu.Unlock()
	var errs []error
	for _, name := range names {
		errs = append(errs, f.Abort(context.Background(), name))
	}
	f.tasks.Wait()
	f.bufs.close()
	f.ctl.close()
	return errors.Join(append(errs, f.lock.Close())...)
}
