package blocktest

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/block"
)

// chunkSize is the grain of Mem's locks and allocation, in bytes; a multiple of block.Size.
const chunkSize = 64 << 10

type chunk struct {
	mu   sync.RWMutex
	data []byte // nil reads as zeros
}

// Mem is a thin device in memory: bytes that are zero since the start or since Zero occupy nothing.
type Mem struct {
	mu     sync.RWMutex // guards the slice, not the chunks
	chunks []*chunk
	size   atomic.Int64
	closed atomic.Bool
}

// NewMem makes a device of size bytes that reads as zeros.
func NewMem(size int64) *Mem {
	m := &Mem{}
	m.Grow(size)
	return m
}

// Grow sets the size, in bytes; a smaller one is ignored.
func (m *Mem) Grow(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size <= m.size.Load() {
		return
	}
	for int64(len(m.chunks))*chunkSize < size {
		m.chunks = append(m.chunks, &chunk{})
	}
	m.size.Store(size)
}

// Close makes every later request fail with block.ErrClosed.
func (m *Mem) Close() error {
	m.closed.Store(true)
	return nil
}

// Allocated is how many bytes the device occupies.
func (m *Mem) Allocated() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var n int64
	for _, c := range m.chunks {
		c.mu.RLock()
		n += int64(len(c.data))
		c.mu.RUnlock()
	}
	return n
}

// Size implements block.Device.
func (m *Mem) Size() int64 { return m.size.Load() }

// ReadAt implements block.Device.
func (m *Mem) ReadAt(ctx context.Context, p []byte, off int64) error {
	return m.each(ctx, off, int64(len(p)), func(c *chunk, at, n, done int64) {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if c.data == nil {
			clear(p[done : done+n])
			return
		}
		copy(p[done:done+n], c.data[at:])
	})
}

// WriteAt implements block.Device.
func (m *Mem) WriteAt(ctx context.Context, p []byte, off int64) error {
	return m.each(ctx, off, int64(len(p)), func(c *chunk, at, n, done int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.data == nil {
			c.data = make([]byte, chunkSize)
		}
		copy(c.data[at:at+n], p[done:])
	})
}

// Zero implements block.Device.
func (m *Mem) Zero(ctx context.Context, off, n int64) error {
	return m.each(ctx, off, n, func(c *chunk, at, n, _ int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		switch {
		case c.data == nil:
		case n == chunkSize:
			c.data = nil
		default:
			clear(c.data[at : at+n])
		}
	})
}

// Flush implements block.Device.
func (m *Mem) Flush(ctx context.Context) error {
	if m.closed.Load() {
		return block.ErrClosed
	}
	return ctx.Err()
}

// each calls fn for every part of a range that lies in one chunk: at is the offset in the chunk, done in the range.
func (m *Mem) each(ctx context.Context, off, n int64, fn func(c *chunk, at, n, done int64)) error {
	if err := block.CheckRange(off, n, m.size.Load()); err != nil {
		return err
	}
	m.mu.RLock()
	chunks := m.chunks
	m.mu.RUnlock()
	for done := int64(0); done < n; {
		if m.closed.Load() {
			return block.ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		at := (off + done) % chunkSize
		part := min(chunkSize-at, n-done)
		fn(chunks[(off+done)/chunkSize], at, part, done)
		done += part
	}
	return nil
}
