package extentstore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

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
	flushedAt       atomic.Int64 // when what it had was made durable last, in nanoseconds of Unix time; 0 is not known
	savedAt         int64        // flushedAt as it is stored; guarded by Pool.mu
	open            *Replica     // guarded by Pool.mu
	log             *journal     // while it is open; guarded by Pool.mu
	journal         uint64       // its number
}

func (r *replica) record() replicaRecord {
	return replicaRecord{head: r.head.Load().id, journal: r.journal, size: r.size.Load(), volume: string(r.volume), tenant: r.tenant}
}

// flush makes durable all that returned before it was called.
func (h *Replica) flush() error {
	r, l := h.r, h.log
	w, n := r.writes.Load(), l.noted.Load()
	if r.flushed.Load() >= w {
		return l.flush()
	}
	r.unflushed.Store(0)
	at := time.Now().UnixNano()
	var journals []*journal
	if l.saved.Load() < n {
		journals = append(journals, l)
	}
	if err := r.p.flushAll([]*chain{r.head.Load()}, journals); err != nil {
		return err
	}
	raise(&r.flushed, w)
	raise(&l.saved, n)
	r.flushedAt.Store(at)
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

// Replica is an open replica: a Device, and what the replication protocol keeps with it. All methods may be called at once;
// after Close each returns block.ErrClosed, or what there was.
type Replica struct {
	r      *replica
	log    *journal
	life   sync.RWMutex // shared by requests; Close waits for them
	closed chan struct{}
	once   sync.Once
	err    error
}

var _ Device = (*Replica)(nil)

// enter begins a request.
func (h *Replica) enter(off, n int64) error {
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

func (h *Replica) isClosed() bool {
	select {
	case <-h.closed:
		return true
	default:
		return false
	}
}

func (h *Replica) ReadAt(ctx context.Context, p []byte, off int64) error {
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

func (h *Replica) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := h.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer h.life.RUnlock()
	n := int64(len(p))
	if n == 0 {
		return nil
	}
	if err := h.log.bound(maxMissedDirty + h.r.p.opts.maxMissed); err != nil {
		return err
	}
	err := h.write(ctx, p, off)
	h.r.wrote(n)
	return err
}

func (h *Replica) Zero(ctx context.Context, off, n int64) error {
	if err := h.enter(off, n); err != nil {
		return err
	}
	defer h.life.RUnlock()
	if n == 0 {
		return nil
	}
	if err := h.log.bound(maxMissedDirty + h.r.p.opts.maxMissed); err != nil {
		return err
	}
	defer h.r.wrote(0)
	return h.zero(ctx, off, n)
}

func (h *Replica) Flush(ctx context.Context) error {
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
	return h.flush()
}

func (h *Replica) Size() int64 { return h.r.size.Load() }

// Close ends requests that wait, waits for the others, and flushes. A second call returns what the first did.
func (h *Replica) Close() error {
	h.once.Do(func() {
		close(h.closed)
		h.life.Lock()
		defer h.life.Unlock()
		if h.log == nil {
			return // it did not come to be open
		}
		p := h.r.p
		h.err = h.flush()
		p.settleWIL()
		p.saveFlushed()
		p.mu.Lock()
		h.r.log = nil
		p.mu.Unlock()
		h.log.release()
		p.mu.Lock()
		h.r.open = nil
		p.mu.Unlock()
	})
	return h.err
}

// OpenReplica returns a replica's device. It is open once at a time: volume.ErrInUse.
func (p *Pool) OpenReplica(ctx context.Context, id volume.ReplicaID) (*Replica, error) {
	h, err := p.reserve(id)
	if err != nil {
		return nil, err
	}
	defer h.life.Unlock()
	log, err := p.loadJournal(h.r.journal)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		h.r.open = nil
		return nil, fmt.Errorf("open replica %s: %w", id, err)
	}
	h.log, h.r.log = log, log
	return h, nil
}

// reserve makes a handle whose life is locked until it has its journal.
func (p *Pool) reserve(id volume.ReplicaID) (*Replica, error) {
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
	r.open = &Replica{r: r, closed: make(chan struct{})}
	r.open.life.Lock()
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
