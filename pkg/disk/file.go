package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxBounce bounds one copy through an aligned buffer, in bytes.
const maxBounce = 1 << 20

type osFile struct {
	f      *os.File
	direct bool
	align  uintptr // of memory, for direct I/O
	size   atomic.Int64
	thin   bool
	// noPunch is set once the filesystem has said that it cannot.
	noPunch, noAllocate atomic.Bool
	bounce              sync.Pool
}

// Options of a file of the operating system.
type Options struct {
	// Buffered forbids O_DIRECT. Without it, O_DIRECT is used where the file allows it.
	Buffered bool
	// Fixed files keep their space: Punch does nothing.
	Fixed bool
}

// OpenFile opens or creates a file; a created one is empty, and its name is durable when OpenFile returns. What is read is what
// is on the disk, or will be with the next Sync: no page that an earlier sync could not write.
func OpenFile(path string, o Options) (File, error) {
	flags := os.O_RDWR | os.O_CREATE
	var f *os.File
	var err error
	direct := !o.Buffered
	if direct {
		f, err = os.OpenFile(path, flags|unix.O_DIRECT, 0o600)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
			direct = false
		}
	}
	if !direct {
		f, err = os.OpenFile(path, flags, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("open data file: %w", noSpace(err))
	}
	d := &osFile{f: f, direct: direct, align: BlockSize, thin: !o.Fixed}
	d.bounce.New = func() any { b := Aligned(maxBounce); return &b }
	if err := d.init(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if !d.direct {
		// After a sync that failed the kernel counts as clean what it could not write, and goes on showing it, also to the next
		// process: what is not dirty is read from the disk again.
		if err := dropClean(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

// dropClean takes out of the page cache what is not dirty.
func dropClean(f *os.File) error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("drop what is cached of %s: %w", f.Name(), err)
	}
	return nil
}

func (d *osFile) init() error {
	st, err := d.f.Stat()
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	d.size.Store(st.Size())
	if !d.direct {
		return nil
	}
	var x unix.Statx_t
	if unix.Statx(int(d.f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &x) != nil || x.Mask&unix.STATX_DIOALIGN == 0 {
		return nil
	}
	if x.Dio_offset_align == 0 || x.Dio_offset_align > BlockSize || x.Dio_mem_align > BlockSize {
		return d.setBuffered()
	}
	d.align = uintptr(max(x.Dio_mem_align, 1))
	return nil
}

// setBuffered turns O_DIRECT off where the file opens with it but cannot do blocks of ours.
func (d *osFile) setBuffered() error {
	flags, err := unix.FcntlInt(d.f.Fd(), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(d.f.Fd(), unix.F_SETFL, flags&^unix.O_DIRECT)
	}
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	d.direct = false
	return nil
}

// Aligned returns n bytes that begin at a multiple of BlockSize.
func Aligned(n int) []byte {
	b := make([]byte, n+BlockSize)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (BlockSize - 1)
	return b[skip : skip+uintptr(n) : skip+uintptr(n)]
}

func (d *osFile) aligned(p []byte) bool {
	return !d.direct || uintptr(unsafe.Pointer(unsafe.SliceData(p)))&(d.align-1) == 0
}

func (d *osFile) ReadAt(p []byte, off int64) error {
	if err := checkRange(off, int64(len(p)), d.size.Load()); err != nil {
		return err
	}
	if !d.direct || off%BlockSize == 0 && len(p)%BlockSize == 0 && d.aligned(p) {
		return readFull(d.f, p, off)
	}
	buf := d.bounce.Get().(*[]byte)
	defer d.bounce.Put(buf)
	for len(p) > 0 {
		skip := int(off % BlockSize)
		n := min(len(p), maxBounce-skip)
		b := (*buf)[:(skip+n+BlockSize-1)/BlockSize*BlockSize]
		if err := readFull(d.f, b, off-int64(skip)); err != nil {
			return err
		}
		copy(p[:n], b[skip:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readFull takes the end of the file for zeros: a size that is not a multiple of BlockSize is not ours.
func readFull(f *os.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return fileError(err)
}

func (d *osFile) WriteAt(p []byte, off int64) error {
	if err := checkWrite(off, len(p), d.size.Load()); err != nil {
		return err
	}
	if d.aligned(p) {
		_, err := d.f.WriteAt(p, off)
		return fileError(err)
	}
	buf := d.bounce.Get().(*[]byte)
	defer d.bounce.Put(buf)
	for len(p) > 0 {
		n := copy(*buf, p)
		if _, err := d.f.WriteAt((*buf)[:n], off); err != nil {
			return fileError(err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (d *osFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(d.f.Fd())); !errors.Is(err, unix.EINTR) {
			return fileError(err)
		}
	}
}

func (d *osFile) Punch(off, n int64) error {
	if err := checkRange(off, n, d.size.Load()); err != nil {
		return err
	}
	if !d.thin || d.noPunch.Load() {
		return nil
	}
	err := d.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		d.noPunch.Store(true)
		return nil
	}
	return fileError(err)
}

func (d *osFile) Allocate(off, n int64) error {
	if err := checkRange(off, n, d.size.Load()); err != nil {
		return err
	}
	if d.noAllocate.Load() {
		return nil
	}
	err := d.fallocate(unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		d.noAllocate.Store(true)
		return nil
	}
	return fileError(err)
}

func (d *osFile) fallocate(mode uint32, off, n int64) error {
	if n == 0 {
		return nil
	}
	for {
		if err := unix.Fallocate(int(d.f.Fd()), mode, off, n); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (d *osFile) Size() int64 { return d.size.Load() }

func (d *osFile) Grow(size int64) error {
	if size <= d.size.Load() {
		return nil
	}
	if err := d.f.Truncate(size); err != nil {
		return fileError(err)
	}
	if err := d.f.Sync(); err != nil {
		return fileError(err)
	}
	d.size.Store(size)
	return nil
}

func (d *osFile) Close() error { return fileError(d.f.Close()) }

func fileError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrClosed):
		return ErrClosed
	}
	return fmt.Errorf("data file: %w", noSpace(err))
}

// noSpace makes the operating system's ways to say "full" our sentinel.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w (%v)", ErrNoSpace, err)
	}
	return err
}

// IsNoSpace tells whether an error of any package means that the filesystem is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, ErrNoSpace) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}
