package extentstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Names in a pool's directory; disk.DirSpace adds its reserve.
const (
	lockName = "lock"
	dataName = "data"
	dbName   = "db"
)

// defaultReserve is what a pool keeps beside its database, in bytes.
const defaultReserve = 256 << 20

// Open opens the pool in dir, and makes it where there is none. volume.ErrInUse: another process has it open.
func Open(ctx context.Context, dir string, o Options) (_ *Pool, err error) {
	o = o.withDefaults()
	var d deps
	defer func() {
		if err != nil {
			for _, f := range d.release {
				err = errors.Join(err, f())
			}
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pool directory: %w", err)
	}
	if o.Kind == volume.PoolDisk {
		unmount, err := mountDisk(ctx, o.Device, dir, o.Wipe)
		if err != nil {
			return nil, err
		}
		d.release = append(d.release, unmount)
	}
	if err := d.open(dir, o.Kind == volume.PoolDisk, false); err != nil {
		return nil, err
	}
	total, err := d.space.Total()
	if err != nil {
		return nil, errors.Join(err, d.file.Close(), d.kv.Close())
	}
	if o.Reserve <= 0 {
		o.Reserve = min(defaultReserve, total/16)
	}
	d.space = disk.NewDirSpace(dir, o.Reserve)
	if o.Kind == volume.PoolDisk {
		if err := preallocate(d, o); err != nil {
			return nil, errors.Join(err, d.file.Close(), d.kv.Close())
		}
	}
	owned := d
	d.release = nil // start has them now
	return start(dir, owned, o)
}

// open takes the lock and opens the files. What it took is in release, in the order of giving back.
func (d *deps) open(dir string, fixed, existing bool) error {
	for _, name := range []string{dbName, dataName} {
		if _, err := os.Stat(filepath.Join(dir, name)); existing && err != nil {
			return fmt.Errorf("no pool in %s (%q is missing): %w", dir, name, volume.ErrNotFound)
		}
	}
	unlock, err := lockPool(dir)
	if err != nil {
		return err
	}
	d.release = append([]func() error{unlock}, d.release...)
	db := filepath.Join(dir, dbName)
	if err := os.MkdirAll(db, 0o700); err != nil {
		return fmt.Errorf("pool directory: %w", err)
	}
	if err := disk.SyncDir(dir); err != nil {
		return err
	}
	if err := roomToOpen(dir); err != nil {
		return err
	}
	file, err := disk.OpenFile(filepath.Join(dir, dataName), disk.Options{Fixed: fixed})
	if err != nil {
		return err
	}
	kv, err := openBadger(db)
	if err != nil {
		return errors.Join(err, file.Close())
	}
	d.file, d.kv, d.space = file, kv, disk.NewDirSpace(dir, 0)
	return nil
}

// roomToOpen gives the reserve up where the filesystem is full: the database writes when it opens, through a memory map,
// where that is fatal.
func roomToOpen(dir string) error {
	s := disk.NewDirSpace(dir, 0)
	free, err := s.Free()
	if err != nil || free >= commitFloor {
		return err
	}
	return s.Release()
}

func lockPool(dir string) (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock of the pool: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("pool in %s is open in another process; stop that first: %w", dir, volume.ErrInUse)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

// preallocate gives a new pool on its own disk all of it, but for the database and the reserve.
func preallocate(d deps, o Options) error {
	rec, err := d.kv.Get([]byte{keyPool})
	if err != nil || rec != nil {
		return err
	}
	free, err := d.space.Free()
	if err != nil {
		return err
	}
	have := d.file.Size() // of an earlier try, allocated or not
	n := o.Capacity
	if n == 0 {
		n = free - o.Reserve - growFloor - max(free/100, 64<<20)
	}
	n = extentDown(max(n, have-layer.ExtentSize))
	if n < layer.PageSpan {
		return fmt.Errorf("disk %s is too small for a pool: %d bytes free: %w", o.Device, free, volume.ErrNoSpace)
	}
	if err := d.file.Grow(n + layer.ExtentSize); err != nil {
		return err
	}
	if err := d.file.Allocate(0, n+layer.ExtentSize); err != nil {
		return err
	}
	return d.file.Sync()
}
