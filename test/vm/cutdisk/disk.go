// Package cutdisk is a disk whose power can be cut. It keeps, beside the present contents, a log of every write and
// flush, and makes from the log the disks that a power cut at any moment could have left. A guest reaches it over NBD.
package cutdisk

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Disk is a disk with a write cache that a power cut loses. Its methods may be called from several goroutines.
type Disk struct {
	size int64
	atom int64    // what a torn write keeps or loses as a whole, in bytes
	base string   // contents before the first logged write; "" is zeros
	now  *os.File // the present contents, as a reader sees them
	data *os.File // the bytes of the logged writes, one after the other

	mu      sync.Mutex
	entries []entry
	end     int64 // of data
	writes  int   // among entries
	cut     bool
}

type kind uint8

const (
	write kind = iota
	zero
	flush
)

type entry struct {
	kind        kind
	off, length int64
	data        int64 // where a write's bytes are in the data file
	durable     bool  // a write that was durable when it was answered (FUA)
	covers      int   // a flush: the number of writes, from the first on, that it makes durable
}

// superblock bytes at the disk's start are kept or lost as a whole, whatever its atom: filesystems write their superblock in
// place, and none that is torn mounts again.
const superblock = 4096

// New makes a disk of size bytes with its files in dir. A power cut keeps or loses each aligned atom bytes as a whole: 512
// is what any disk promises, 4096 what those with such physical sectors do. Base is a file with its contents at the start;
// "" is zeros.
func New(dir string, size, atom int64, base string) (*Disk, error) {
	now, err := os.Create(filepath.Join(dir, "now"))
	if err != nil {
		return nil, err
	}
	data, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		now.Close()
		return nil, err
	}
	d := &Disk{size: size, atom: atom, base: base, now: now, data: data}
	if err := d.start(now); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// start gives f the contents that the disk had before the first logged write.
func (d *Disk) start(f *os.File) error {
	if d.base != "" {
		if err := copySparse(f, d.base); err != nil {
			return err
		}
	}
	return f.Truncate(d.size)
}

// Close frees the disk's files; it does not remove them.
func (d *Disk) Close() error {
	err := d.now.Close()
	if e := d.data.Close(); err == nil {
		err = e
	}
	return err
}

// Atom is what New was given.
func (d *Disk) Atom() int64 { return d.atom }

// Position counts the writes and flushes so far: the moment at which Cut can cut the power later. What the guest
// reported before Position was called had been answered by the disk before that moment.
func (d *Disk) Position() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.entries)
}

// Halt makes the disk forget and never answer what comes after it: the power is off.
func (d *Disk) Halt() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = true
}

func (d *Disk) readAt(p []byte, off int64) error {
	_, err := d.now.ReadAt(p, off)
	return err
}

func (d *Disk) halted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cut
}

func (d *Disk) writeAt(p []byte, off int64, fua bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return io.ErrClosedPipe
	}
	if _, err := d.data.WriteAt(p, d.end); err != nil {
		return err
	}
	if _, err := d.now.WriteAt(p, off); err != nil {
		return err
	}
	d.entries = append(d.entries, entry{kind: write, off: off, length: int64(len(p)), data: d.end, durable: fua})
	d.end += int64(len(p))
	d.writes++
	return nil
}

func (d *Disk) zeroAt(off, length int64, fua bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return io.ErrClosedPipe
	}
	if err := punch(d.now, off, length); err != nil {
		return err
	}
	d.entries = append(d.entries, entry{kind: zero, off: off, length: length, durable: fua})
	d.writes++
	return nil
}

// flush makes the first covers writes durable: those that were answered before the guest asked for the flush. A disk
// owes nothing for a write that was still on its way.
func (d *Disk) flush(covers int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return io.ErrClosedPipe
	}
	d.entries = append(d.entries, entry{kind: flush, covers: covers})
	return nil
}

// Fate is what a power cut does to the writes that were not durable.
type Fate int

const (
	// Lose loses them all: the disk is as the last flush left it.
	Lose Fate = iota
	// Scatter loses some, keeps some and tears some, at random, whatever their order.
	Scatter
	// Keep keeps them all.
	Keep
)

func (f Fate) String() string { return [...]string{"lose", "scatter", "keep"}[f] }

// Report says what a cut did to the writes before it.
type Report struct {
	Durable, Kept, Torn, Lost int
}

func (r Report) String() string {
	return fmt.Sprintf("%d writes durable; of the others %d kept, %d torn, %d lost", r.Durable, r.Kept, r.Torn, r.Lost)
}

// Cut writes to path the disk as a power cut at position leaves it. The same rnd makes the same disk.
func (d *Disk) Cut(path string, position int, fate Fate, rnd *rand.Rand) (Report, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var rep Report
	out, err := os.Create(path)
	if err != nil {
		return rep, err
	}
	defer out.Close()
	if err := d.start(out); err != nil {
		return rep, err
	}
	covered := 0
	for _, e := range d.entries[:position] {
		if e.kind == flush {
			covered = max(covered, e.covers)
		}
	}
	nth := 0
	for _, e := range d.entries[:position] {
		if e.kind == flush {
			continue
		}
		durable := nth < covered || e.durable
		nth++
		switch luck := rnd.IntN(8); {
		case durable:
			rep.Durable++
			err = d.apply(out, e, nil)
		case fate == Keep || fate == Scatter && luck < 3:
			rep.Kept++
			err = d.apply(out, e, nil)
		case fate == Scatter && luck < 5:
			rep.Torn++
			err = d.apply(out, e, rnd)
		default:
			rep.Lost++
		}
		if err != nil {
			return rep, err
		}
	}
	return rep, out.Close()
}

// apply does what e did; with tear, to about half of the atoms.
func (d *Disk) apply(out *os.File, e entry, tear *rand.Rand) error {
	if e.kind == zero {
		length := e.length
		if tear != nil {
			length = tear.Int64N(e.length/d.atom+1) * d.atom
		}
		return punch(out, e.off, length)
	}
	p := make([]byte, e.length)
	if _, err := d.data.ReadAt(p, e.data); err != nil {
		return err
	}
	if tear == nil {
		_, err := out.WriteAt(p, e.off)
		return err
	}
	for i := int64(0); i < e.length; {
		next := (e.off+i)/d.atom*d.atom + d.atom
		if e.off+i < superblock {
			next = superblock
		}
		next = min(next-e.off, e.length)
		if tear.IntN(2) == 0 {
			if _, err := out.WriteAt(p[i:next], e.off+i); err != nil {
				return err
			}
		}
		i = next
	}
	return nil
}

func punch(f *os.File, off, length int64) error {
	if length == 0 {
		return nil
	}
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// copySparse copies the file at from into f and leaves its holes out.
func copySparse(f *os.File, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	for off := int64(0); ; {
		start, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data in %s: %w", from, err)
		}
		stop, err := unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find the end of data in %s: %w", from, err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(f, start), io.NewSectionReader(src, start, stop-start)); err != nil {
			return err
		}
		off = stop
	}
}
