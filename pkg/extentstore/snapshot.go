package extentstore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// pin keeps a snapshot from being deleted until unpin. Pool.mu is held.
func (p *Pool) pin(id volume.SnapshotID) (*snapshot, error) {
	if p.closed {
		return nil, errPoolClosed
	}
	s := p.snapshots[id]
	if s == nil {
		return nil, noSnapshot(p, id)
	}
	s.readers.Add(1)
	return s, nil
}

func (s *snapshot) unpin() { s.readers.Add(-1) }

// use keeps the pool open until users is unlocked.
func (p *Pool) use() error {
	p.users.RLock()
	if p.ctx.Err() != nil {
		p.users.RUnlock()
		return errPoolClosed
	}
	return nil
}

// reader is an open snapshot.
type reader struct {
	p      *Pool
	s      *snapshot
	life   sync.RWMutex
	closed bool
}

// OpenSnapshot returns a snapshot as a device that cannot be written: WriteAt and Zero return volume.ErrInvalid. The
// snapshot cannot be deleted until it is closed.
func (p *Pool) OpenSnapshot(ctx context.Context, id volume.SnapshotID) (Device, error) {
	var s *snapshot
	err := p.await(ctx, func() (err error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		s, err = p.pin(id)
		return err
	}, func() { s.unpin() })
	if err != nil {
		return nil, err
	}
	return &reader{p: p, s: s}, nil
}

func (r *reader) ReadAt(ctx context.Context, b []byte, off int64) error {
	r.life.RLock()
	defer r.life.RUnlock()
	if r.closed || r.p.use() != nil {
		return block.ErrClosed
	}
	defer r.p.users.RUnlock()
	if err := block.CheckRange(off, int64(len(b)), r.s.size); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil || len(b) == 0 {
		return err
	}
	return r.p.read(r.s.layer, b, off)
}

var errReadOnly = fmt.Errorf("a snapshot cannot be written: %w", volume.ErrInvalid)

func (r *reader) WriteAt(context.Context, []byte, int64) error { return r.refuse() }
func (r *reader) Zero(context.Context, int64, int64) error     { return r.refuse() }
func (r *reader) Size() int64                                  { return r.s.size }

func (r *reader) Flush(context.Context) error {
	if err := r.refuse(); !errors.Is(err, errReadOnly) {
		return err
	}
	return nil
}

func (r *reader) refuse() error {
	r.life.RLock()
	defer r.life.RUnlock()
	if r.closed {
		return block.ErrClosed
	}
	return errReadOnly
}

func (r *reader) Close() error {
	r.life.Lock()
	defer r.life.Unlock()
	if !r.closed {
		r.closed = true
		r.s.unpin()
	}
	return nil
}

// Extents calls fn with the runs of a snapshot, in bytes, in order and not overlapping, that may differ from base: the
// blocks written or zeroed since. With base "" they are the blocks that hold data. Runs before offset are left out; one
// that contains it is cut there. Base is an ancestor of the snapshot, else volume.ErrInvalid. It stops at fn's first
// error and returns it.
func (p *Pool) Extents(ctx context.Context, snap, base volume.SnapshotID, offset int64, fn func(offset, length int64) error) error {
	if offset < 0 {
		return fmt.Errorf("offset %d: %w", offset, volume.ErrOutOfRange)
	}
	var s, b *snapshot
	unpin := func() {
		s.unpin()
		if b != nil {
			b.unpin()
		}
	}
	err := p.await(ctx, func() (err error) {
		s, b, err = p.pinBoth(snap, base)
		return err
	}, unpin)
	if err != nil {
		return err
	}
	defer unpin()
	var end *chain
	if b != nil {
		end = b.layer
	}
	for more := true; more; {
		var runs []extent
		err := p.await(ctx, func() error {
			err := p.walk(ctx, s.layer, end, s.size, offset, func(off, n int64) error {
				if len(runs) == extentsStep {
					return errEnough
				}
				runs = append(runs, extent{off, n})
				return nil
			})
			if more = errors.Is(err, errEnough); more {
				return nil
			}
			return err
		}, nil)
		if err != nil {
			return err
		}
		for _, r := range runs {
			if err := fn(r.off, r.n); err != nil {
				return err
			}
			offset = r.off + r.n
		}
	}
	return nil
}

// extentsStep is how many runs Extents finds at once.
const extentsStep = 128

// extent is a run of bytes.
type extent struct{ off, n int64 }

// errFound ends a walk.
var errFound = errors.New("found")

// Written tells whether any block of a replica has data, its own or of a layer below: false is a volume of which nothing
// was ever written, or all that was has been zeroed. A block that was written with zeros counts.
func (p *Pool) Written(ctx context.Context, id volume.ReplicaID) (bool, error) {
	var some bool
	err := p.await(ctx, func() (err error) {
		some, err = p.written(ctx, id)
		return err
	}, nil)
	if err != nil {
		return false, err
	}
	return some, nil
}

func (p *Pool) written(ctx context.Context, id volume.ReplicaID) (bool, error) {
	p.mu.Lock()
	r := p.replicas[id]
	if r == nil || p.closed {
		p.mu.Unlock()
		if r == nil {
			return false, noReplica(p, id)
		}
		return false, errPoolClosed
	}
	some := false
	for l := range p.layersOf(id) {
		some = some || l.slots.Load() > 0
	}
	head, size := r.head.Load(), r.size.Load()
	p.mu.Unlock()
	if !some {
		return false, nil
	}
	err := p.walk(ctx, head, nil, size, 0, func(int64, int64) error { return errFound })
	if errors.Is(err, errFound) {
		return true, nil
	}
	return false, err
}

// walk calls fn with the runs of data seen from head, or with those touched above end, within [offset, size).
func (p *Pool) walk(ctx context.Context, head, end *chain, size, offset int64, fn func(offset, length int64) error) error {
	if offset >= size {
		return nil
	}
	runs := layer.Runs{Emit: fn, From: offset, To: size}
	idx, _ := place(offset)
	var masks [layer.ExtentsPerPage]layer.Mask
	for {
		next, ok := p.nextInChain(head, end, idx)
		if !ok || int64(next)*layer.PageSpan >= size {
			return runs.Flush()
		}
		idx = next
		if err := p.masks(ctx, head, end, idx, &masks); err != nil {
			return err
		}
		for i, m := range masks {
			if err := runs.Add(int64(idx)*layer.PageSpan+int64(i)*layer.ExtentSize, m); err != nil {
				return err
			}
		}
		idx++
	}
}

func (p *Pool) pinBoth(snap, base volume.SnapshotID) (s, b *snapshot, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s, err = p.pin(snap); err != nil || base == "" {
		return s, nil, err
	}
	if b, err = p.pin(base); err != nil {
		s.unpin()
		return nil, nil, err
	}
	if s.layer.descends(b.layer) {
		return s, b, nil
	}
	s.unpin()
	b.unpin()
	return nil, nil, fmt.Errorf("snapshot %s is not an earlier state of %s: %w", base, snap, volume.ErrInvalid)
}

// masks are, per extent of a page, the blocks with data, or with an end those touched above it.
func (p *Pool) masks(ctx context.Context, head, end *chain, idx uint32, out *[layer.ExtentsPerPage]layer.Mask) error {
	if err := p.use(); err != nil {
		return err
	}
	defer p.users.RUnlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	st, pages, exclusive, err := p.lockChain(head, end, int64(idx)*layer.PageSpan, 0, nil)
	if err != nil {
		return err
	}
	defer st.unlock(exclusive)
	entries := make([]layer.Entry, len(pages))
	for i := range out {
		for k, pg := range pages {
			entries[k] = pg.e[i]
		}
		if end == nil {
			out[i] = layer.Visible(entries, layer.AllBlocks)
		} else {
			out[i] = layer.Touched(entries)
		}
	}
	return nil
}
