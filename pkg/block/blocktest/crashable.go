package blocktest

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/ballast-csi/ballast/pkg/block"
)

// CrashMode says what becomes of the writes and zeros that no flush made durable.
type CrashMode int

// Crash modes.
const (
	// Lose forgets all of them.
	Lose CrashMode = iota
	// Keep keeps all of them.
	Keep
	// Tear picks for each block any of the contents it had since the last flush.
	Tear
)

// Crashable is a device in memory that keeps, per block, what it held since the last flush, so that a crash can bring
// back any state that a real disk might.
type Crashable struct {
	mu     sync.Mutex
	mem    *Mem
	dirty  map[int64][][]byte // block number → contents since the last flush, the durable one first
	closed bool
}

// NewCrashable makes a device of size bytes that reads as zeros.
func NewCrashable(size int64) *Crashable {
	return &Crashable{mem: NewMem(size), dirty: map[int64][][]byte{}}
}

// Crash closes the device and returns another with the bytes that survived.
func (c *Crashable) Crash(mode CrashMode, rng *rand.Rand) *Crashable {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if mode != Keep {
		blocks := make([]int64, 0, len(c.dirty))
		for b := range c.dirty {
			blocks = append(blocks, b)
		}
		slices.Sort(blocks) // so that a seed decides
		for _, b := range blocks {
			old := c.dirty[b][0]
			if mode == Tear {
				if i := rng.IntN(len(c.dirty[b]) + 1); i < len(c.dirty[b]) {
					old = c.dirty[b][i]
				} else {
					continue // the newest
				}
			}
			must(c.mem.WriteAt(context.Background(), old, b*block.Size))
		}
	}
	return &Crashable{mem: c.mem, dirty: map[int64][][]byte{}}
}

// Grow sets the size, in bytes; a smaller one is ignored. It is durable at once.
func (c *Crashable) Grow(size int64) { c.mem.Grow(size) }

// Size implements block.Device.
func (c *Crashable) Size() int64 { return c.mem.Size() }

// ReadAt implements block.Device.
func (c *Crashable) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return block.ErrClosed
	}
	return c.mem.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device.
func (c *Crashable) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.change(off, int64(len(p)), func() error { return c.mem.WriteAt(ctx, p, off) })
}

// Zero implements block.Device.
func (c *Crashable) Zero(ctx context.Context, off, n int64) error {
	return c.change(off, n, func() error { return c.mem.Zero(ctx, off, n) })
}

// Flush implements block.Device.
func (c *Crashable) Flush(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return block.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	clear(c.dirty)
	return nil
}

// change records what the blocks of a range hold, and then lets fn change them.
func (c *Crashable) change(off, n int64, fn func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return block.ErrClosed
	}
	size := c.mem.Size()
	if err := block.CheckRange(off, n, size); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	for b := off / block.Size; b*block.Size < off+n; b++ {
		old := make([]byte, min(block.Size, size-b*block.Size))
		must(c.mem.ReadAt(context.Background(), old, b*block.Size))
		seen := c.dirty[b]
		if len(seen) == 0 || !bytes.Equal(seen[len(seen)-1], old) {
			c.dirty[b] = append(seen, old)
		}
	}
	return fn()
}

// must panics where the memory device, used within its range and without a deadline, fails: a bug of this package.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
