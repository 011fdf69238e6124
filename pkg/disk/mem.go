package disk

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
)

// ErrInjected is what an in-memory file fails with on demand, in place of EIO.
var ErrInjected = errors.New("input/output error (injected)")

// sector is what is never torn, in bytes.
const sector = 512

// Mem is a File in memory that remembers what was not synced. The zero value is an empty file.
type Mem struct {
	// Step, if set, is called before each write, punch, sync and grow, with no lock held. An error is returned to the
	// caller in place of the operation. It is set before the file is used.
	Step func(op string) error
	// TearAt is the grain, in bytes, at which a crash tears unsynced writes: BlockSize, or sector by default.
	TearAt int

	mu       sync.Mutex
	size     int64
	seen     map[int64][]byte // what reads see, by block
	durable  map[int64][]byte // what a crash leaves at least
	pending  []change         // in order, since the last sync
	backed   map[int64]bool   // blocks that take up space
	limit    int              // of backed blocks; 0 is none
	failRead error
	failNext struct{ write, sync error }
	closed   bool
}

type change struct {
	off   int64
	data  []byte // nil: a punch
	n     int64
	clean bool // a failed sync took it for written
}

// FailRead makes reads fail with err until it is called with nil.
func (m *Mem) FailRead(err error) { m.mu.Lock(); m.failRead = err; m.mu.Unlock() }

// FailWrite makes the next write fail with err.
func (m *Mem) FailWrite(err error) { m.mu.Lock(); m.failNext.write = err; m.mu.Unlock() }

// FailSync makes the next sync fail with err. As on Linux, what it did not write counts as clean from then on: reads
// still see it, later syncs return nil, and a crash loses it.
func (m *Mem) FailSync(err error) { m.mu.Lock(); m.failNext.sync = err; m.mu.Unlock() }

// Limit bounds the space that the file may take up, in bytes; 0 is no bound.
func (m *Mem) Limit(bytes int64) { m.mu.Lock(); m.limit = int(bytes / BlockSize); m.mu.Unlock() }

// Backed is the space that the file takes up, in bytes.
func (m *Mem) Backed() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(len(m.backed)) * BlockSize
}

// ReadAt implements File.
func (m *Mem) ReadAt(p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, int64(len(p))); err != nil {
		return err
	}
	if m.failRead != nil {
		return m.failRead
	}
	for len(p) > 0 {
		skip := off % BlockSize
		n := min(int64(len(p)), BlockSize-skip)
		if b := m.seen[off/BlockSize]; b != nil {
			copy(p[:n], b[skip:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
	return nil
}

// WriteAt implements File.
func (m *Mem) WriteAt(p []byte, off int64) error {
	if err := m.step("writeat"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	if err := checkWrite(off, len(p), m.size); err != nil {
		return err
	}
	if err := m.failNext.write; err != nil {
		m.failNext.write = nil
		return err
	}
	if err := m.back(off, int64(len(p))); err != nil {
		return err
	}
	c := change{off: off, data: slices.Clone(p), n: int64(len(p))}
	m.pending = append(m.pending, c)
	m.seen = apply(m.seen, c)
	return nil
}

// Sync implements File.
func (m *Mem) Sync() error {
	if err := m.step("sync"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	if err := m.failNext.sync; err != nil {
		m.failNext.sync = nil
		for i := range m.pending {
			m.pending[i].clean = true
		}
		return err
	}
	rest := m.pending[:0]
	for _, c := range m.pending {
		if c.clean {
			rest = append(rest, c)
			continue
		}
		m.durable = apply(m.durable, c)
	}
	m.pending = rest
	return nil
}

// Punch implements File.
func (m *Mem) Punch(off, n int64) error {
	if err := m.step("punch"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	if err := m.check(off, n); err != nil {
		return err
	}
	c := change{off: off, n: n}
	m.pending = append(m.pending, c)
	m.seen = apply(m.seen, c)
	for b := off / BlockSize; b < (off+n)/BlockSize; b++ {
		delete(m.backed, b)
	}
	return nil
}

// Allocate implements File.
func (m *Mem) Allocate(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return err
	}
	return m.back(off, n)
}

// Size implements File.
func (m *Mem) Size() int64 { m.mu.Lock(); defer m.mu.Unlock(); return m.size }

// Grow implements File.
func (m *Mem) Grow(size int64) error {
	if err := m.step("grow"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	m.size = max(m.size, size)
	return nil
}

// Close implements File. A closed file can be opened again with Crash.
func (m *Mem) Close() error { m.mu.Lock(); m.closed = true; m.mu.Unlock(); return nil }

// Crash returns the file as a crash now may leave it: each change that was not synced is kept, dropped, or kept in
// part, by the seed. The receiver is not changed.
func (m *Mem) Crash(seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	rng := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))
	grain := int64(m.TearAt)
	if grain == 0 {
		grain = sector
	}
	left := cloneMap(m.durable)
	for _, c := range m.pending {
		if c.clean {
			continue
		}
		switch rng.IntN(3) {
		case 0: // lost
		case 1:
			left = apply(left, c)
		default:
			for i := int64(0); i < c.n; i += grain {
				if rng.IntN(2) == 0 {
					continue
				}
				part := change{off: c.off + i, n: min(grain, c.n-i)}
				if c.data != nil {
					part.data = c.data[i : i+part.n]
				}
				left = apply(left, part)
			}
		}
	}
	return m.image(left)
}

// Reopen returns the file as it is after a clean stop of the process: nothing is lost.
func (m *Mem) Reopen() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.image(cloneMap(m.seen))
}

func (m *Mem) image(blocks map[int64][]byte) *Mem {
	n := &Mem{TearAt: m.TearAt, size: m.size, limit: m.limit, seen: blocks, durable: maps.Clone(blocks), backed: map[int64]bool{}}
	for b := range blocks {
		n.backed[b] = true
	}
	return n
}

func (m *Mem) step(op string) error {
	if m.Step != nil {
		return m.Step(op)
	}
	return nil
}

func (m *Mem) check(off, n int64) error {
	if m.closed {
		return ErrClosed
	}
	return checkRange(off, n, m.size)
}

func (m *Mem) back(off, n int64) error {
	if m.backed == nil {
		m.backed = map[int64]bool{}
	}
	var more []int64
	for b := off / BlockSize; b*BlockSize < off+n; b++ {
		if !m.backed[b] {
			more = append(more, b)
		}
	}
	if m.limit > 0 && len(m.backed)+len(more) > m.limit {
		return ErrNoSpace
	}
	for _, b := range more {
		m.backed[b] = true
	}
	return nil
}

func apply(blocks map[int64][]byte, c change) map[int64][]byte {
	if blocks == nil {
		blocks = map[int64][]byte{}
	}
	for i := int64(0); i < c.n; {
		off := c.off + i
		skip := off % BlockSize
		n := min(c.n-i, BlockSize-skip)
		old := blocks[off/BlockSize]
		switch {
		case c.data == nil && n == BlockSize:
			delete(blocks, off/BlockSize)
		case c.data != nil && n == BlockSize:
			blocks[off/BlockSize] = c.data[i : i+n]
		case c.data != nil || old != nil:
			// Blocks are never changed in place: images share them.
			b := make([]byte, BlockSize)
			copy(b, old)
			if c.data == nil {
				clear(b[skip : skip+n])
			} else {
				copy(b[skip:], c.data[i:i+n])
			}
			blocks[off/BlockSize] = b
		}
		i += n
	}
	return blocks
}

func cloneMap(blocks map[int64][]byte) map[int64][]byte {
	if blocks == nil {
		return map[int64][]byte{}
	}
	return maps.Clone(blocks)
}
