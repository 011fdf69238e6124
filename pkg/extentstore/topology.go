package extentstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ReplicaSpec says what replica to make.
type ReplicaSpec struct {
	ID     volume.ReplicaID
	Volume volume.ID
	Tenant string
	// Size in bytes, a multiple of volume.SizeQuantum. The parent must not hold data beyond it.
	Size int64
	// Parent is the snapshot whose bytes it starts with; "" is none: it reads as zeros.
	Parent volume.SnapshotID
}

// CreateReplica makes a replica; one of that id and volume that exists is nil. It costs the same whatever the size.
func (p *Pool) CreateReplica(ctx context.Context, s ReplicaSpec) error {
	return p.await(ctx, func() error { return p.createReplica(ctx, s) }, nil)
}

func (p *Pool) createReplica(ctx context.Context, s ReplicaSpec) error {
	if err := s.check(); err != nil {
		return err
	}
	unpin, err := p.fits(ctx, s)
	if err != nil {
		return err
	}
	defer unpin()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return err
	}
	if r := p.replicas[s.ID]; r != nil {
		if r.volume != s.Volume {
			return fmt.Errorf("replica %s is of volume %s: %w", s.ID, r.volume, volume.ErrExists)
		}
		return nil
	}
	var parent *chain
	if s.Parent != "" {
		from := p.snapshots[s.Parent]
		if from == nil {
			return noSnapshot(p, s.Parent)
		}
		parent = from.layer
	}
	head := p.newLayer(parent)
	r := &replica{p: p, id: s.ID, volume: s.Volume, tenant: s.Tenant, journal: head.id}
	r.size.Store(s.Size)
	r.head.Store(head)
	if err := p.commitOps([]op{{layerKey(head.id), head.record().encode()}, {replicaKey(s.ID), r.record().encode()}}); err != nil {
		return err
	}
	head.head = r
	p.adopt(head, parent)
	p.replicas[s.ID] = r
	p.present.Store(s.ID, true)
	return nil
}

// fits refuses a replica that is smaller than its parent, where it would cut off data. A snapshot that was filled in later
// may have a greater size than it was cut with, and zeros at its end. What was looked at stays until unpin.
func (p *Pool) fits(ctx context.Context, s ReplicaSpec) (unpin func(), err error) {
	p.mu.Lock()
	from := p.snapshots[s.Parent]
	if from == nil || s.Size >= from.size || p.replicas[s.ID] != nil {
		p.mu.Unlock()
		return func() {}, nil
	}
	from.readers.Add(1)
	p.mu.Unlock()
	err = p.walk(ctx, from.layer, nil, from.size, s.Size, func(int64, int64) error { return errFound })
	if errors.Is(err, errFound) {
		err = fmt.Errorf("replica %s of %d bytes is smaller than snapshot %s of %d: %w", s.ID, s.Size, s.Parent, from.size, volume.ErrOutOfRange)
	}
	if err != nil {
		from.unpin()
		return nil, err
	}
	return from.unpin, nil
}

func (s ReplicaSpec) check() error {
	if err := volume.CheckName("replica id", string(s.ID)); err != nil {
		return err
	}
	if err := volume.CheckName("volume id", string(s.Volume)); err != nil {
		return err
	}
	if len(s.Tenant) > volume.MaxNameLen {
		return fmt.Errorf("tenant has %d bytes: %w", len(s.Tenant), volume.ErrInvalid)
	}
	if badSize(s.Size) {
		return fmt.Errorf("size of %d bytes is not a multiple of %d up to %d: %w", s.Size, volume.SizeQuantum, volume.MaxSize, volume.ErrOutOfRange)
	}
	return nil
}

// ready tells whether the database may be changed, for somebody who still waits for it. Pool.mu is held.
func (p *Pool) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.closed {
		return errPoolClosed
	}
	if err := p.failure(); err != nil {
		return err
	}
	if !p.keepRoom() {
		return fmt.Errorf("the filesystem of pool %s is full, its reserve included; delete something else on it: %w", p.id, volume.ErrNoSpace)
	}
	return nil
}

// newLayer is not known to the pool until adopt. An id that is not used because a commit failed is lost, which is nothing.
func (p *Pool) newLayer(parent *chain) *chain {
	p.nextLayer++
	l := &chain{id: p.nextLayer}
	l.parent.Store(parent)
	return l
}

func (p *Pool) adopt(l, parent *chain) {
	p.layers[l.id] = l
	if parent != nil {
		parent.children++
	}
}

// DeleteReplica forgets a replica; its space is freed in the background, also after a restart. One that is not there is
// nil; one that is open is volume.ErrInUse.
func (p *Pool) DeleteReplica(ctx context.Context, id volume.ReplicaID) error {
	return p.await(ctx, func() error { return p.deleteReplica(ctx, id) }, nil)
}

func (p *Pool) deleteReplica(ctx context.Context, id volume.ReplicaID) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return err
	}
	r := p.replicas[id]
	if r == nil {
		return nil
	}
	if r.open != nil {
		return fmt.Errorf("replica %s is open: %w", id, volume.ErrInUse)
	}
	if err := p.commitOps([]op{{key: replicaKey(id)}, {key: journalKey(keyState, r.journal)}}); err != nil {
		return err
	}
	p.purges = append(p.purges, purge{id: r.journal, all: true})
	r.head.Load().head = nil
	delete(p.replicas, id)
	p.present.Delete(id)
	p.urgent = true
	p.kick()
	return nil
}

// DeleteSnapshot forgets a snapshot; what only it held is freed or merged in the background. One that is not there is
// nil; one that is being read is volume.ErrBusy. A cut of it that is under way comes to nothing, and so does one of a barrier
// up to that number which is asked for later: an order that was given up may still be on its way. With a number, what
// a later barrier has cut under the name stays. With a replica, so does what another has sealed: the copy that is meant is gone.
func (p *Pool) DeleteSnapshot(ctx context.Context, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	return p.await(ctx, func() error { return p.deleteSnapshot(ctx, id, of, upTo) }, nil)
}

func (p *Pool) deleteSnapshot(ctx context.Context, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return err
	}
	p.cuts.giveUp(id, of, upTo)
	s := p.snapshots[id]
	if s == nil || of != "" && s.replica != of || upTo > 0 && s.number > upTo {
		return nil
	}
	if s.readers.Load() > 0 {
		return fmt.Errorf("snapshot %s is being read: %w", id, volume.ErrBusy)
	}
	if err := p.commitOps([]op{{key: snapshotKey(id)}}); err != nil {
		return err
	}
	s.layer.snap = nil
	delete(p.snapshots, id)
	p.urgent = true
	p.kick()
	return nil
}

func (s *snapshot) record() snapshotRecord {
	return snapshotRecord{layer: s.layer.id, number: s.number, size: s.size, volume: string(s.volume), tenant: s.tenant, replica: string(s.replica)}
}

// Resize grows a replica; the new bytes read as zeros. It is durable before it is seen. A size that the replica has
// already is nil.
func (p *Pool) Resize(ctx context.Context, id volume.ReplicaID, size int64) error {
	return p.await(ctx, func() error { return p.resize(ctx, id, size) }, nil)
}

func (p *Pool) resize(ctx context.Context, id volume.ReplicaID, size int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return err
	}
	r := p.replicas[id]
	if r == nil {
		return noReplica(p, id)
	}
	if size <= r.size.Load() {
		return nil
	}
	if badSize(size) {
		return fmt.Errorf("size of %d bytes is not a multiple of %d up to %d: %w", size, volume.SizeQuantum, volume.MaxSize, volume.ErrOutOfRange)
	}
	if !p.opts.broken.resizeInMemory {
		rec := r.record()
		rec.size = size
		if err := p.commitOps([]op{{replicaKey(id), rec.encode()}}); err != nil {
			return err
		}
	}
	r.size.Store(size)
	return nil
}

// ReplicaInfo describes a replica.
type ReplicaInfo struct {
	ID     volume.ReplicaID
	Volume volume.ID
	Tenant string
	// Size in bytes.
	Size int64
	Open bool
}

// HasReplica tells whether the pool has a replica.
func (p *Pool) HasReplica(id volume.ReplicaID) bool {
	_, ok := p.present.Load(id)
	return ok
}

// Replicas lists the replicas, in no order.
func (p *Pool) Replicas() []ReplicaInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]ReplicaInfo, 0, len(p.replicas))
	for _, r := range p.replicas {
		out = append(out, ReplicaInfo{ID: r.id, Volume: r.volume, Tenant: r.tenant, Size: r.size.Load(), Open: r.open != nil})
	}
	return out
}

// Usage is what a pool's contents occupy, in physical bytes: whole slots. Every slot is counted once.
type Usage struct {
	// Replicas have what was written since their last snapshot, and what they inherit of nameless layers.
	Replicas map[volume.ReplicaID]int64
	// Snapshots have what their own layers hold, and what they inherit.
	Snapshots map[volume.SnapshotID]int64
	// Deleted is what is being freed in the background.
	Deleted int64
}

// Usage reports what is occupied now; writes that are not flushed count.
//
// A layer without a name (its snapshot was deleted, or it was the cut of a clone) is inherited by the oldest replica or
// snapshot that reaches it through nameless layers only: somebody has to answer for it, or cloning would evade quotas.
func (p *Pool) Usage() Usage {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := Usage{Replicas: map[volume.ReplicaID]int64{}, Snapshots: map[volume.SnapshotID]int64{}}
	inherited := map[*chain]bool{}
	for _, id := range slices.Sorted(maps.Keys(p.layers)) {
		l := p.layers[id]
		n := l.slots.Load()
		if l.dead() {
			u.Deleted += n * layer.ExtentSize
			continue
		}
		if l.nameless() {
			continue
		}
		for up := l.parent.Load(); up != nil && up.nameless(); up = up.parent.Load() {
			if !inherited[up] {
				inherited[up] = true
				n += up.slots.Load()
			}
		}
		if l.head != nil {
			u.Replicas[l.head.id] += n * layer.ExtentSize
		} else {
			u.Snapshots[l.snap.id] += n * layer.ExtentSize
		}
	}
	return u
}

// nameless layers are neither a replica's head nor a snapshot. Pool.mu is held.
func (l *chain) nameless() bool { return l.head == nil && l.snap == nil }

// dead layers are referred to by nothing and are freed. Pool.mu is held.
func (l *chain) dead() bool { return l.nameless() && l.children == 0 }

// mergeable layers are needed only by their one child and are merged into it. Pool.mu is held.
func (l *chain) mergeable() bool { return l.nameless() && l.children == 1 }
