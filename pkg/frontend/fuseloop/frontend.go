package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// resizePatience bounds how long the kernel is asked for a device's new size.
const resizePatience = 10 * time.Second

// Options of a Frontend.
type Options struct {
	// RunDir holds the mounts and a lock. One process uses it at a time, and always the same one after a restart.
	RunDir string
	Logger *slog.Logger
}

// Frontend implements frontend.Frontend.
type Frontend struct {
	dir  string   // the mounts, one for each attach
	lock *os.File // held while open
	ctl  control
	bufs buffers
	log  *slog.Logger

	mu      sync.Mutex
	devices map[string]*device
	owned   map[string]bool // paths in dir that Clean must not touch
	// reserved are kernel devices that only the named one may have.
	reserved map[string]string
	serial   uint64
	closed   bool
	closing  chan struct{}  // closed with closed
	sweeping bool           // sweep runs
	lefts    uint64         // counts what was left in dir
	tasks    sync.WaitGroup // sweep, and requests whose caller has left

	cleaning sync.Mutex
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
	ctl := openControl()
	lock, err := takeLock(ctx, filepath.Join(o.RunDir, "frontend.lock"), func() error { return abortAll(ctl, dir) })
	if err != nil {
		ctl.close()
		return nil, err
	}
	f := &Frontend{
		dir: dir, lock: lock, ctl: ctl, log: o.Logger,
		devices: map[string]*device{}, owned: map[string]bool{}, reserved: map[string]string{}, closing: make(chan struct{}),
	}
	if err := f.Clean(ctx); err != nil && !errors.Is(err, frontend.ErrBusy) {
		ctl.close()
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

	server  *server // written under busy and Frontend.mu, read under either
	path    string  // of the mount, guarded by busy
	aborted bool    // guarded by Frontend.mu
	loop    *loop   // these are guarded by busy
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
	if strings.ContainsAny(name, "/\t\n\r") || strings.HasPrefix(name, ".") {
		return fmt.Errorf("device name %q has a slash or white space, or begins with a dot: %w", name, volume.ErrInvalid)
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
	if d.loop != nil && !f.isAborted(d) && d.server.dead() {
		f.log.Warn("connection was aborted from outside; attaching anew", "device", name)
		if err := f.tearDown(d); err != nil {
			return "", fmt.Errorf("attach device %s: %w", name, err)
		}
	}
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
	path, err := f.mountPath(d)
	if err != nil {
		return err
	}
	s, err := newServer(path, dev, o.ReadOnly, &f.bufs, f.log.With("device", d.name))
	f.mu.Lock()
	d.server = s
	f.mu.Unlock()
	if err != nil {
		return err
	}
	wanted, taken := f.reservations(d.name)
	if d.loop, err = newLoop(ctx, path, o.BlockSize, o.ReadOnly, wanted, taken); err != nil {
		return err
	}
	size, err := d.loop.size()
	if err == nil && size != dev.Size() {
		err = fmt.Errorf("the kernel sees %d bytes, not %d", size, dev.Size())
	}
	return err
}

// mountPath makes the file that the device is mounted on. Its path is new: the device that had the name before may still
// be in use, dead, and is found by its own path.
func (f *Frontend) mountPath(d *device) (string, error) {
	for {
		f.mu.Lock()
		f.serial++
		path := filepath.Join(f.dir, fmt.Sprintf("%s@%d", d.name, f.serial))
		f.owned[path] = true
		f.mu.Unlock()
		file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err == nil {
			d.path = path
			return path, file.Close()
		}
		f.disown(path)
		if !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
}

func (f *Frontend) disown(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.owned, path)
}

// Reserve keeps the kernel device at a path for a name until Release: no other name gets it, and the name gets it again
// where nobody else has it. Whoever knows a device by its number, as by a node of a container, never meets another's.
func (f *Frontend) Reserve(name, path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reserved[path] = name
}

// Release ends every reservation for a name.
func (f *Frontend) Release(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.reserved, func(_, n string) bool { return n == name })
}

// reservations returns the paths that are reserved for a name, and what tells those of others.
func (f *Frontend) reservations(name string) (own []string, taken func(path string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for path, n := range f.reserved {
		if n == name {
			own = append(own, path)
		}
	}
	slices.Sort(own)
	return own, func(path string) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		n, ok := f.reserved[path]
		return ok && n != name
	}
}

// Resize implements frontend.Frontend.
func (f *Frontend) Resize(ctx context.Context, name string) error {
	d, err := f.acquire(ctx, name, false)
	if err != nil {
		return err
	}
	if d != nil {
		defer f.release(d)
	}
	if d == nil || d.loop == nil {
		return fmt.Errorf("device %s is not attached: %w", name, volume.ErrNotFound)
	}
	want := d.dev.Size()
	// Older loop drivers take the size that the inode has, and a write that ends while FUSE asks for the size makes the
	// kernel distrust the answer. So it is asked for again.
	for deadline := time.Now().Add(resizePatience); ; {
		if err := d.loop.refresh(d.server.path); err != nil {
			return fmt.Errorf("resize device %s: %w", name, err)
		}
		got, err := d.loop.size()
		if err != nil {
			return err
		}
		if got >= want { // the device may have grown once more
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("resize device %s: the kernel sees %d bytes, not %d; try again", name, got, want)
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("resize device %s: %w", name, ctx.Err())
		}
	}
}

// Close implements frontend.Frontend.
func (f *Frontend) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	close(f.closing)
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
	if err := f.Clean(context.Background()); err != nil && !errors.Is(err, frontend.ErrBusy) {
		errs = append(errs, err)
	}
	f.bufs.close()
	f.ctl.close()
	return errors.Join(append(errs, f.lock.Close())...)
}
