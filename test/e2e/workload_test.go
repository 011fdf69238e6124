package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errLost is what a workload returns when flushed bytes are gone or wrong. Any other error of it is the device's.
var errLost = errors.New("flushed bytes are lost")

// workload writes to a published volume and knows what must be there after a crash.
type workload interface {
	// write makes some changes at the target path and flushes now and then. An error means that the device failed:
	// what was not flushed may or may not have happened.
	write(r *rand.Rand, path string) error
	// verify reads everything back. It returns errLost for bytes that a crash must not have changed.
	verify(path string) error
	// fork is what a snapshot taken now must hold.
	fork() workload
}

func newWorkload(fsType string, size int64) workload {
	if fsType == "" {
		return &blockLoad{size: size, cells: map[int64]cell{}, next: new(uint64)}
	}
	return &fsLoad{files: map[string]cell{}, next: new(uint64)}
}

// cell is what may be found in one place: what was last flushed, or one of what was written since. 0 is nothing: zeros,
// or no file.
type cell struct {
	flushed uint64
	pending []uint64
}

func (c cell) allows(id uint64) bool { return c.flushed == id || slices.Contains(c.pending, id) }

func (c cell) wrote(id uint64) cell {
	return cell{flushed: c.flushed, pending: append(slices.Clone(c.pending), id)}
}

// settle: a flush succeeded; the newest write is what is there.
func (c cell) settle() cell {
	if n := len(c.pending); n > 0 {
		return cell{flushed: c.pending[n-1]}
	}
	return c
}

// fill makes the bytes that belong to an id; the id stands at their beginning.
func fill(p []byte, id uint64) {
	if id == 0 {
		clear(p)
		return
	}
	g := rand.NewPCG(id, 0xba11a57)
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], g.Uint64())
	}
	if len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, id)
	}
}

// identify returns which of the ids a cell allows stands in p.
func identify(c cell, p []byte) (uint64, bool) {
	want := make([]byte, len(p))
	for _, id := range append(slices.Clone(c.pending), c.flushed) {
		if fill(want, id); bytes.Equal(p, want) {
			return id, true
		}
	}
	return 0, false
}

// A blockLoad writes blocks of a raw block volume.
type blockLoad struct {
	size  int64
	cells map[int64]cell // by block number
	next  *uint64        // ids are not used twice, by forks neither
}

const blockSize = 4096

func (w *blockLoad) fork() workload {
	return &blockLoad{size: w.size, cells: maps.Clone(w.cells), next: w.next}
}

func openBlock(path string, direct bool) (*os.File, error) {
	flags := os.O_RDWR
	if direct {
		flags |= syscall.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode()&os.ModeDevice == 0 {
		err = fmt.Errorf("%s is no device: %v", path, st.Mode())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// visible is the size of a published volume as its workload sees it: of the device, or of the filesystem.
func visible(fsType, path string) (n int64, err error) {
	if fsType == "" {
		f, err := openBlock(path, false)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		return f.Seek(0, io.SeekEnd)
	}
	d, err := openRoot(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	var st unix.Statfs_t
	err = unix.Fstatfs(int(d.Fd()), &st)
	return int64(st.Blocks) * st.Bsize, err
}

// aligned returns n bytes fit for O_DIRECT.
func aligned(n int) []byte {
	b := make([]byte, n+blockSize)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & (blockSize - 1))
	return b[skip : skip+n : skip+n]
}

func (w *blockLoad) write(r *rand.Rand, path string) (err error) {
	f, err := openBlock(path, r.IntN(4) > 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for range 4 + r.IntN(12) {
		run := int64(1 + r.IntN(16))
		// A few places are written often, so that extents are partly and repeatedly overwritten.
		from := r.Int64N(w.size/blockSize - run)
		if r.IntN(3) > 0 {
			from = from % 64 * 5
		}
		buf := aligned(int(run) * blockSize)
		zero := r.IntN(8) == 0
		for i := range run {
			id := uint64(0)
			if !zero {
				*w.next++
				id = *w.next
			}
			fill(buf[i*blockSize:(i+1)*blockSize], id)
			w.cells[from+i] = w.cells[from+i].wrote(id)
		}
		if zero {
			args := [2]uint64{uint64(from * blockSize), uint64(run * blockSize)}
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&args))); e != 0 {
				return fmt.Errorf("BLKZEROOUT: %w", e)
			}
		} else if _, err := f.WriteAt(buf, from*blockSize); err != nil {
			return err
		}
		if r.IntN(3) == 0 {
			if err := w.flush(f); err != nil {
				return err
			}
		}
	}
	return w.flush(f)
}

func (w *blockLoad) flush(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	for n, c := range w.cells {
		w.cells[n] = c.settle()
	}
	return nil
}

func (w *blockLoad) verify(path string) (err error) {
	f, err := openBlock(path, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := aligned(blockSize)
	found := map[int64]uint64{}
	for n, c := range w.cells {
		if _, err := f.ReadAt(buf, n*blockSize); err != nil {
			return err
		}
		id, ok := identify(c, buf)
		if !ok {
			return fmt.Errorf("block %d starts with id %d, allowed are %d and %d: %w", n,
				binary.LittleEndian.Uint64(buf), c.flushed, c.pending, errLost)
		}
		found[n] = id
	}
	if err := f.Sync(); err != nil {
		return err
	}
	for n, id := range found {
		w.cells[n] = cell{flushed: id}
	}
	return nil
}

// A fsLoad writes, replaces and deletes small files in one directory of a filesystem.
type fsLoad struct {
	files map[string]cell
	next  *uint64
}

func (w *fsLoad) fork() workload { return &fsLoad{files: maps.Clone(w.files), next: w.next} }

// openRoot opens the root of the volume's filesystem. While nothing is mounted at the path it fails: a workload in a
// container never sees the directory below.
func openRoot(path string) (*os.File, error) {
	d, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	var in, above unix.Stat_t
	err = unix.Fstat(int(d.Fd()), &in)
	if err == nil {
		err = unix.Stat(filepath.Dir(path), &above)
	}
	if err == nil && in.Dev == above.Dev {
		err = fmt.Errorf("nothing is mounted at %s", path)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func openAt(d *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(d.Fd()), name, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// length of the file that belongs to an id.
func length(id uint64) int { return int(8 + id*7919%40000) }

func (w *fsLoad) write(r *rand.Rand, path string) (err error) {
	d, err := openRoot(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	for range 2 + r.IntN(6) {
		name := fmt.Sprintf("f%02d", r.IntN(40))
		if w.files[name].flushed != 0 && r.IntN(5) == 0 {
			w.files[name] = w.files[name].wrote(0)
			if err := unix.Unlinkat(int(d.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		} else if err := w.put(d, name); err != nil {
			return err
		}
		// The directory's fsync makes the name durable; without it either state is right.
		if r.IntN(2) == 0 {
			if err := w.flush(d); err != nil {
				return err
			}
		}
	}
	return w.flush(d)
}

// put replaces a file the safe way: write beside it, fsync, rename.
func (w *fsLoad) put(d *os.File, name string) error {
	*w.next++
	id := *w.next
	data := make([]byte, length(id))
	fill(data, id)
	f, err := openAt(d, "new", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	w.files[name] = w.files[name].wrote(id)
	return unix.Renameat(int(d.Fd()), "new", int(d.Fd()), name)
}

func (w *fsLoad) flush(d *os.File) error {
	if err := d.Sync(); err != nil {
		return err
	}
	for name, c := range w.files {
		w.files[name] = c.settle()
	}
	return nil
}

func (w *fsLoad) verify(path string) (err error) {
	d, err := openRoot(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	found := map[string]uint64{}
	for name, c := range w.files {
		id, err := w.check(d, name, c)
		if err != nil {
			return err
		}
		found[name] = id
	}
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return err
	}
	for name, id := range found {
		w.files[name] = cell{flushed: id}
	}
	return nil
}

func (w *fsLoad) check(d *os.File, name string, c cell) (id uint64, err error) {
	f, err := openAt(d, name, unix.O_RDONLY)
	if errors.Is(err, unix.ENOENT) {
		if c.allows(0) {
			return 0, nil
		}
		return 0, fmt.Errorf("file %s is missing, allowed are %d and %d: %w", name, c.flushed, c.pending, errLost)
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var data bytes.Buffer
	if _, err := data.ReadFrom(f); err != nil {
		return 0, err
	}
	p := data.Bytes()
	if len(p) >= 8 {
		id = binary.LittleEndian.Uint64(p)
	}
	want := make([]byte, len(p))
	fill(want, id)
	if id == 0 || !c.allows(id) || len(p) != length(id) || !bytes.Equal(p, want) {
		return 0, fmt.Errorf("file %s has %d bytes and starts with id %d, allowed are %d and %d: %w", name, len(p), id,
			c.flushed, c.pending, errLost)
	}
	return id, nil
}
