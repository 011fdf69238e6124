// Package faultdisk is a small disk with a filesystem whose faults are at command: it is full, slow, hangs, or fails.
//
// An ext4 on a loop device lies beneath, so that a full disk is a real one; over it a FUSE filesystem of this process
// passes everything on, and delays, holds or refuses it as it was told. It needs root, e2fsprogs and util-linux.
package faultdisk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// filler is the file that takes the space of a full disk.
	filler = "filler"
	// fillRate in bytes a second, in pieces of fillChunk. Who keeps an eye on the space that is left can see it go.
	fillRate, fillChunk = 400 << 20, 4 << 20
)

// Disk is one disk. Its methods may be called at once, except Close.
type Disk struct {
	dir    string
	server *fuse.Server

	mu     sync.Mutex
	slow   time.Duration
	failed bool          // changes are refused
	dead   bool          // reads too
	held   chan struct{} // closed when the disk answers again; nil while it does
}

// New makes and mounts a disk of size bytes with its files in dir, which is made.
func New(dir string, size int64) (_ *Disk, err error) {
	d := &Disk{dir: dir}
	for _, p := range []string{d.below(), d.Path()} {
		if err := os.MkdirAll(p, 0o755); err != nil {
			return nil, err
		}
	}
	image := filepath.Join(dir, "image")
	f, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return nil, err
	}
	if err := run("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", image); err != nil {
		return nil, err
	}
	if err := run("mount", "-o", "loop,noatime", image, d.below()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	// The directory of the disk is one below its root: the filler and lost+found stay out of sight.
	top := filepath.Join(d.below(), "top")
	if err := os.Mkdir(top, 0o755); err != nil {
		return nil, err
	}
	root, err := fs.NewLoopbackRoot(top)
	if err != nil {
		return nil, err
	}
	second := time.Second
	d.server, err = fs.Mount(d.Path(), &node{LoopbackNode: root.(*fs.LoopbackNode), disk: d}, &fs.Options{
		AttrTimeout: &second, EntryTimeout: &second,
		MountOptions: fuse.MountOptions{FsName: "faultdisk", Name: "faultdisk", DirectMountStrict: true, MaxWrite: 1 << 20, MaxBackground: 64,
			DisableXAttrs: true, Options: []string{"default_permissions"}},
	})
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", d.Path(), err)
	}
	return d, closeOnExec()
}

// closeOnExec keeps the server's descriptors from the programs that this process starts: one that outlives it would keep
// a filesystem that nobody answers.
func closeOnExec() error {
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		return err
	}
	for _, name := range names {
		if to, err := os.Readlink(name); err == nil && to == "/dev/fuse" {
			var fd int
			if _, err := fmt.Sscan(filepath.Base(name), &fd); err != nil {
				return err
			}
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// Path is where the disk is mounted.
func (d *Disk) Path() string { return filepath.Join(d.dir, "disk") }

func (d *Disk) below() string { return filepath.Join(d.dir, "below") }

// Fill takes all the space that is free now, as fast as a program might write it; what is freed later is not taken.
func (d *Disk) Fill() error {
	f, err := os.OpenFile(filepath.Join(d.below(), filler), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Statfs(d.below(), &fs); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	at := st.Size()
	left := int64(fs.Bavail) * fs.Frsize
	for chunk := int64(fillChunk); left >= 4096 && chunk >= 4096; {
		n := min(chunk, left/4096*4096)
		switch err := unix.Fallocate(int(f.Fd()), 0, at, n); {
		case err == nil:
			at, left = at+n, left-n
			time.Sleep(time.Duration(n) * time.Second / fillRate)
		case errors.Is(err, unix.ENOSPC):
			chunk /= 2
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("fill the disk: %w", err)
		}
	}
	return nil
}

// Slow makes every read, write and sync take so much longer.
func (d *Disk) Slow(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = by
}

// Hang lets nothing be answered until Heal. Who waits cannot be killed, as with a real disk.
func (d *Disk) Hang() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held == nil {
		d.held = make(chan struct{})
	}
}

// Fail answers every change and sync with an I/O error, and reads too if they are to fail.
func (d *Disk) Fail(reads bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failed, d.dead = true, reads
}

// Heal ends every fault. What was refused stays refused.
func (d *Disk) Heal() error {
	d.mu.Lock()
	d.slow, d.failed, d.dead = 0, false, false
	if d.held != nil {
		close(d.held)
		d.held = nil
	}
	d.mu.Unlock()
	if err := os.Remove(filepath.Join(d.below(), filler)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// pass is called before each operation; one that it refuses is not carried out.
func (d *Disk) pass(change bool) syscall.Errno {
	d.mu.Lock()
	held, slow := d.held, d.slow
	d.mu.Unlock()
	if held != nil {
		<-held
	}
	time.Sleep(slow)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead || d.failed && change {
		return syscall.EIO
	}
	return 0
}

// Close heals and unmounts the disk; it does not remove its files.
func (d *Disk) Close() error {
	errs := []error{d.Heal()}
	if d.server != nil {
		// Lazily: what a killed process had open may take the kernel a moment to close.
		if err := unix.Unmount(d.Path(), unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", d.Path(), err))
		}
		d.server.Wait()
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Unmount(d.below(), 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", d.below(), err))
			break
		}
	}
	return errors.Join(errs...)
}

func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
