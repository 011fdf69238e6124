package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	sector = 512
	block  = 4096
)

// pattern is a stream of batches of writes to a device that anyone can work out again from the seed: what a verifier
// needs to know of a writer is the seed and how far it came.
type pattern struct {
	seed   uint64
	blocks int64 // of the device
	// zeros also discards and writes zeroes.
	zeros bool
}

type op struct {
	off, length int64
	zero        bool // the range reads as zeros afterwards
	discard     bool // if so: discard, not write zeroes
}

// batch is the n-th batch, from 1 on.
func (p pattern) batch(n int64) []op {
	rnd := rand.New(rand.NewPCG(p.seed, uint64(n)))
	ops := make([]op, 1+rnd.IntN(8))
	for i := range ops {
		length := int64(1)
		if rnd.IntN(4) == 0 {
			length += rnd.Int64N(32)
		}
		// Half of the writes go to a small part of the device: blocks are overwritten often.
		where := p.blocks
		if rnd.IntN(2) == 0 {
			where = max(p.blocks/64, 64)
		}
		off := rnd.Int64N(where - length + 1)
		ops[i] = op{off: off * block, length: length * block}
		if p.zeros && rnd.IntN(8) == 0 {
			ops[i].zero, ops[i].discard = true, rnd.IntN(2) == 0
		}
	}
	return ops
}

// fill makes a sector tell which write it is from.
func (p pattern) fill(buf []byte, off, batch int64) {
	for i := 0; i < len(buf); i += sector {
		s := buf[i : i+sector]
		binary.LittleEndian.PutUint64(s[0:], p.seed)
		binary.LittleEndian.PutUint64(s[8:], uint64(off+int64(i)))
		binary.LittleEndian.PutUint64(s[16:], uint64(batch))
		for j := 24; j < sector-8; j += 8 {
			binary.LittleEndian.PutUint64(s[j:], uint64(batch)*0x9e3779b97f4a7c15+uint64(j))
		}
		binary.LittleEndian.PutUint32(s[sector-8:], 0)
		binary.LittleEndian.PutUint32(s[sector-4:], crc32.ChecksumIEEE(s[:sector-4]))
	}
}

var zeroSector [sector]byte

// none is the batch of a sector that reads as zeros.
const none = -1

// origin tells which batch wrote the sector, or none.
func (p pattern) origin(s []byte, off int64) (int64, error) {
	if bytes.Equal(s, zeroSector[:]) {
		return none, nil
	}
	if crc32.ChecksumIEEE(s[:sector-4]) != binary.LittleEndian.Uint32(s[sector-4:]) {
		return 0, errors.New("torn or foreign: its checksum is wrong")
	}
	seed, at := binary.LittleEndian.Uint64(s), int64(binary.LittleEndian.Uint64(s[8:]))
	if seed != p.seed || at != off {
		return 0, fmt.Errorf("misplaced: it is from a device with seed %d, offset %d", seed, at)
	}
	return int64(binary.LittleEndian.Uint64(s[16:])), nil
}

// history is what a verifier knows of each sector.
type history struct {
	settled []int64           // the batch whose bytes a flush made durable; none is zeros
	pending map[int64][]int64 // by sector: the later batches that may or may not have come through
}

// recall works out the history of a device whose batches up to acked were flushed, while those up to issued may have
// been written.
func (p pattern) recall(acked, issued int64) history {
	h := history{settled: make([]int64, p.blocks*block/sector), pending: map[int64][]int64{}}
	for i := range h.settled {
		h.settled[i] = none
	}
	for n := int64(1); n <= issued; n++ {
		for _, o := range p.batch(n) {
			from := n
			if o.zero {
				from = none
			}
			for s := o.off / sector; s < (o.off+o.length)/sector; s++ {
				if n <= acked {
					h.settled[s] = from
				} else {
					h.pending[s] = append(h.pending[s], from)
				}
			}
		}
	}
	return h
}

// check reads the whole device and compares it with the history. It names the first sectors that lost an acknowledged
// write, and counts all.
func (p pattern) check(r io.ReaderAt, h history) error {
	buf := aligned(1 << 20)
	var wrong []error
	bad := 0
	for off := int64(0); off < p.blocks*block; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), p.blocks*block-off)]
		if n, err := r.ReadAt(part, off); err != nil && (err != io.EOF || n != len(part)) {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		for i := int64(0); i < int64(len(part)); i += sector {
			at := off + i
			s := at / sector
			got, err := p.origin(part[i:i+sector], at)
			if err == nil && got != h.settled[s] && !slices.Contains(h.pending[s], got) {
				err = fmt.Errorf("holds batch %d; flushed was %d, written later %d", got, h.settled[s], h.pending[s])
			}
			if err != nil {
				if bad++; len(wrong) < 5 {
					wrong = append(wrong, fmt.Errorf("sector at %d: %w", at, err))
				}
			}
		}
	}
	if bad > 0 {
		return fmt.Errorf("%w: %d sectors, the first: %w", errLost, bad, errors.Join(wrong...))
	}
	return nil
}

// checkMoment checks that the device is as it was at one moment between the acknowledgement of batch must and the start
// of batch may: all batches up to one are there, at most a part of the next, and nothing later.
func (p pattern) checkMoment(r io.ReaderAt, must, may int64) error {
	newest, err := p.newest(r)
	if err != nil {
		return err
	}
	first := max(must, newest-1)
	// Batches that only zero leave no trace: the moment may be a little later than the newest trace.
	var nearest error
	for n := first; n <= min(may, max(must, newest)+3); n++ {
		err := p.check(r, p.recall(n, min(n+1, may)))
		if err == nil || !errors.Is(err, errLost) {
			return err
		}
		if n <= newest || n == first {
			nearest = err
		}
	}
	if nearest == nil {
		nearest = errLost
	}
	return fmt.Errorf("as of no moment from batch %d to %d; the newest seen is %d: %w", must, may, newest, nearest)
}

// newest is the last batch of which a sector is seen, 0 if there is none.
func (p pattern) newest(r io.ReaderAt) (int64, error) {
	var last int64
	buf := aligned(1 << 20)
	for off := int64(0); off < p.blocks*block; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), p.blocks*block-off)]
		if n, err := r.ReadAt(part, off); err != nil && (err != io.EOF || n != len(part)) {
			return 0, fmt.Errorf("read at %d: %w", off, err)
		}
		for i := 0; i < len(part); i += sector {
			n, err := p.origin(part[i:i+sector], off+int64(i))
			if err != nil {
				return 0, fmt.Errorf("%w: sector at %d: %w", errLost, off+int64(i), err)
			}
			last = max(last, n)
		}
	}
	return last, nil
}

// errLost is what a verifier reports when an acknowledged write is gone. The host knows it by its text: the harness's
// own test expects it.
var errLost = errors.New("acknowledged data lost")

// write does batch n on an O_DIRECT file, at once what does not overlap; it does not flush.
func (p pattern) write(f *os.File, n int64) error {
	var g errgroup.Group
	var running []op
	for _, o := range p.batch(n) {
		if slices.ContainsFunc(running, func(r op) bool { return o.off < r.off+r.length && r.off < o.off+o.length }) {
			if err := g.Wait(); err != nil {
				return err
			}
			g, running = errgroup.Group{}, nil
		}
		running = append(running, o)
		g.Go(func() error {
			if err := p.do(f, n, o); err != nil {
				return fmt.Errorf("batch %d at %d: %w", n, o.off, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (p pattern) do(f *os.File, n int64, o op) error {
	if !o.zero {
		buf := aligned(int(o.length))
		p.fill(buf, o.off, n)
		_, err := f.WriteAt(buf, o.off)
		return err
	}
	request := uintptr(unix.BLKZEROOUT)
	if o.discard {
		request = unix.BLKDISCARD
	}
	span := [2]uint64{uint64(o.off), uint64(o.length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}

// aligned is memory that O_DIRECT takes.
func aligned(n int) []byte {
	raw := make([]byte, n+block)
	skip := (block - int(uintptr(unsafe.Pointer(&raw[0]))%block)) % block
	return raw[skip : skip+n : skip+n]
}
