package extentstore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// SnapshotReader reads a snapshot until its Close.
type SnapshotReader = interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	Close() error
}

// Snapshots are the sealed layers of the replica's own volume in its chain, the oldest first. What a clone inherits of
// another volume is not among them.
func (h *Replica) Snapshots() []replication.SealedSnapshot {
	p := h.r.p
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []replication.SealedSnapshot
	for l := h.r.head.Load(); l != nil; l = l.parent.Load() {
		if s := l.snap; s != nil && s.volume == h.r.volume {
			out = append(out, replication.SealedSnapshot{ID: s.id, Number: s.number})
		}
	}
	slices.Reverse(out)
	return out
}

// Seal makes the head durable, with what peers missed, and seals it as a snapshot cut by the barrier of that number, and of
// the replica's present size. A snapshot of that name and number is nil; one of another number makes way: it is merged
// upwards in the background. volume.ErrBusy: that one is being read. volume.ErrExists: it is another replica's.
func (h *Replica) Seal(ctx context.Context, s volume.SnapshotID, number uint64) error {
	if err := h.enter(0, 0); err != nil {
		return err
	}
	defer h.life.RUnlock()
	return h.r.p.cut(ctx, &cutting{replica: h.r.id, snap: s, number: number, replace: true})
}

// Snapshot opens a snapshot of the pool for reading.
func (h *Replica) Snapshot(ctx context.Context, s volume.SnapshotID) (SnapshotReader, error) {
	return h.r.p.OpenSnapshot(ctx, s)
}

// Resize grows the replica as Pool.Resize does.
func (h *Replica) Resize(ctx context.Context, size int64) error {
	if err := h.enter(0, 0); err != nil {
		return err
	}
	defer h.life.RUnlock()
	return h.r.p.Resize(ctx, h.r.id, size)
}

// Allocated returns at most limit runs of extents in which a snapshot, or the head for "", may differ from base, from an
// extent on, and where to go on; more tells whether there is anything left. With base "" they are those that hold data.
// Base is an ancestor, else volume.ErrInvalid.
func (h *Replica) Allocated(ctx context.Context, s, base volume.SnapshotID, from uint32, limit int) (runs []region.Run, next uint32, more bool, err error) {
	if err := h.enter(0, 0); err != nil {
		return nil, 0, false, err
	}
	defer h.life.RUnlock()
	p := h.r.p
	head, end, size, unpin, err := p.between(h.r, s, base)
	if err != nil {
		return nil, 0, false, err
	}
	defer unpin()
	out := runList{limit: min(max(limit, 1), maxRuns)}
	err = p.walk(ctx, head, end, size, int64(from)*layer.ExtentSize, func(off, n int64) error {
		first, last := uint32(off/layer.ExtentSize), uint32((off+n-1)/layer.ExtentSize)+1
		if k := len(out.runs); k > 0 {
			first = max(first, out.runs[k-1].End()) // two runs of blocks in one extent
		}
		if first < last && !out.add(first, last) {
			next = first
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return out.runs, next, true, nil
	}
	return out.runs, 0, false, err
}

// between finds what lies from a snapshot, or the head of r, down to base, and pins it until unpin.
func (p *Pool) between(r *replica, snap, base volume.SnapshotID) (head, end *chain, size int64, unpin func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var pinned []*snapshot
	release := func() {
		for _, s := range pinned {
			s.readers.Add(-1)
		}
	}
	pin := func(id volume.SnapshotID) (s *snapshot, err error) {
		if s, err = p.pin(id); err == nil {
			pinned = append(pinned, s)
		}
		return s, err
	}
	head, size = r.head.Load(), r.size.Load()
	if snap != "" {
		s, err := pin(snap)
		if err != nil {
			return nil, nil, 0, nil, err
		}
		head, size = s.layer, s.size
	}
	if base != "" {
		b, err := pin(base)
		if err != nil {
			release()
			return nil, nil, 0, nil, err
		}
		end = b.layer
		if !head.descends(end) {
			release()
			return nil, nil, 0, nil, fmt.Errorf("snapshot %s is not an earlier state of %q: %w", base, snap, volume.ErrInvalid)
		}
	}
	return head, end, size, release, nil
}

// descends tells whether a layer is above another or is it. Pool.mu is held.
func (l *chain) descends(from *chain) bool {
	for ; l != nil; l = l.parent.Load() {
		if l == from {
			return true
		}
	}
	return false
}
