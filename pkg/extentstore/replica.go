package extentstore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// replica is a chain of layers whose head is written.
type replica struct {
	p      *Pool
	id     volume.ReplicaID
	volume volume.ID
	tenant string
	size   atomic.Int64
	head   atomic.Pointer[chain]

	// gate is shared by writes, and taken alone by a cut to keep them out.
	gate   sync.RWMutex
	ranges ranges
	// writes counts what changed bytes; flushed is its value that is known to be durable.
	writes, flushed atomic.Uint64
	unflushed       atomic.Int64 // bytes since somebody last asked for a flush
	open            *handle      // guarded by Pool.mu
}

func (r *replica) record() replicaRecord {
	return replicaRecord{head: r.head.Load().id, size: r.size.Load(), volume: string(r.volume), tenant: r.tenant}
}

func (r *replica) setFlushed(w uint64) {
	for {
		old := r.flushed.Load()
		if w <= old || r.flushed.CompareAndSwap(old, w) {
			return
		}
	}
}

// flush makes durable all that returned before it was called.
func (r *replica) flush() error {
	if err := r.p.failure(); err != nil {
		return err
	}
	w := r.writes.Load()
	if r.flushed.Load() >= w {
		return nil
	}
	r.unflushed.Store(0)
	if err := r.p.flush(r.head.Load()); err != nil {
		return err
	}
	r.setFlushed(w)
	return nil
}

// wrote counts a change before it is answered, and has it flushed when much has gathered.
func (r *replica) wrote(n int64) {
	r.writes.Add(1)
	if r.unflushed.Add(n) < flushBytes && r.p.dirtyPages.Load() < r.p.opts.maxDirty {
		return
	}
	r.unflushed.Store(0)
	r.p.flushSoon()
}

// handle is an open replica.
type handle struct {
	r      *replica
	life   sync.RWMutex // shared by requests; Close waits for them
	closed chan struct{}
	once   sync.Once
	err    error
}

var _ Device = (*handle)(nil)

// enter begins a request.
func (h *handle) enter(off, n int64) error {
	h.life.RLock()
	err := error(block.ErrClosed)
	if !h.isClosed() {
		if err = block.CheckRange(off, n, h.r.size.Load()); err == nil {
			return nil
		}
	}
	h.life.RUnlock()
	return err
}

func (h *handle) isClosed() bool {
	select {
	case <-h.closed:
		return true
	default:
		return false
	}
}

func (h *handle) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := h.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer h.life.RUnlock()
	if err := ctx.Err(); err != nil || len(p) == 0 {
		return err
	}
	r := h.r
	lk := r.ranges.lock(blockDown(off), blockUp(off+int64(len(p))), true)
	defer r.ranges.unlock(lk)
	return r.p.read(r.head.Load(), p, off)
}

func (h *handle) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := h.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer h.life.RUnlock()
	n := int64(len(p))
	if n == 0 {
		return nil
	}
	err := h.write(ctx, p, off)
	h.r.wrote(n)
	return err
}

func (h *handle) Zero(ctx context.Context, off, n int64) error {
	if err := h.enter(off, n); err != nil {
		return err
	}
	defer h.life.RUnlock()
	if n == 0 {
		return nil
	}
	defer h.r.wrote(0)
	return h.zero(ctx, off, n)
}

func (h *handle) Flush(ctx context.Context) error {
	if err := h.enter(0, 0); err != nil {
		return err
	}
	defer h.life.RUnlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	// Waited for here, where the wait can be ended: a round that others joined cannot.
	if err := h.r.p.waitRoom(ctx); err != nil {
		return err
	}
	return h.r.flush()
}

func (h *handle) Size() int64 { return h.r.size.Load() }

// Close ends requests that wait, waits for the others, and flushes. A second call returns what the first did.
func (h *handle) Close() error {
	h.once.Do(func() {
		close(h.closed)
		h.life.Lock()
		defer h.life.Unlock()
		r := h.r
		h.err = r.flush()
		r.p.mu.Lock()
		r.open = nil
		r.p.mu.Unlock()
	})
	return h.err
}

// OpenReplica returns a replica's device. It is open once at a time: volume.ErrInUse.
func (p *Pool) OpenReplica(ctx context.Context, id volume.ReplicaID) (Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.replicas[id]
	switch {
	case p.closed:
		return nil, errPoolClosed
	case r == nil:
		return nil, noReplica(p, id)
	case r.open != nil:
		return nil, fmt.Errorf("replica %s is open already: %w", id, volume.ErrInUse)
	}
	r.open = &handle{r: r, closed: make(chan struct{})}
	return r.open, nil
}

var errPoolClosed = fmt.Errorf("pool is closed: %w", volume.ErrUnavailable)

func noReplica(p *Pool, id volume.ReplicaID) error {
	return fmt.Errorf("replica %s is not in pool %s: %w", id, p.id, volume.ErrNotFound)
}

func noSnapshot(p *Pool, id volume.SnapshotID) error {
	return fmt.Errorf("snapshot %s is not in pool %s: %w", id, p.id, volume.ErrNotFound)
}

func blockDown(n int64) int64  { return n &^ (layer.BlockSize - 1) }
func blockUp(n int64) int64    { return blockDown(n + layer.BlockSize - 1) }
func extentDown(n int64) int64 { return n &^ (layer.ExtentSize - 1) }
func extentUp(n int64) int64   { return extentDown(n + layer.ExtentSize - 1) }

// place is where an offset is in the map.
func place(off int64) (idx uint32, entry int) {
	return uint32(off / layer.PageSpan), int(off % layer.PageSpan / layer.ExtentSize)
}

// blocksOf is the mask of the blocks of one extent that [off, off+n) touches; the range lies in that extent.
func blocksOf(off, n int64) layer.Mask {
	first := off % layer.ExtentSize / layer.BlockSize
	last := (off + n - 1) % layer.ExtentSize / layer.BlockSize
	return layer.Blocks(int(first), int(last-first+1))
}
