package extentstore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Cut seals a replica's present state as a snapshot: all writes that returned before the call are in it. Writes wait for
// a short moment that does not depend on the replica's size. A snapshot of that id of the same replica is nil.
func (p *Pool) Cut(ctx context.Context, id volume.ReplicaID, snap volume.SnapshotID) error {
	return p.await(ctx, func() error { return p.cut(ctx, &cutting{replica: id, snap: snap}) }, nil)
}

// cutting says what is to be sealed as what.
type cutting struct {
	replica volume.ReplicaID
	snap    volume.SnapshotID
	number  uint64 // of the barrier
	// replace: a snapshot of that name with another number is of an earlier try, and makes way.
	replace bool
	// over: it was given up while it was under way. Guarded by Pool.mu.
	over bool
}

// done tells whether the snapshot is there already. Pool.mu is held.
func (c *cutting) done(p *Pool) (bool, error) {
	s := p.snapshots[c.snap]
	switch {
	case c.over || c.number != 0 && c.number <= p.cuts.over[c.snap]:
		return false, fmt.Errorf("snapshot %s was given up: %w", c.snap, volume.ErrBusy)
	case s == nil:
		return false, nil
	case s.replica != c.replica:
		return false, fmt.Errorf("snapshot %s is of replica %s: %w", c.snap, s.replica, volume.ErrExists)
	case !c.replace || s.number == c.number:
		return true, nil
	case s.readers.Load() > 0:
		return false, fmt.Errorf("snapshot %s of barrier %d is being read: %w", c.snap, s.number, volume.ErrBusy)
	}
	return false, nil
}

func (p *Pool) cut(ctx context.Context, c *cutting) error {
	if err := volume.CheckName("snapshot id", string(c.snap)); err != nil {
		return err
	}
	if err := p.use(); err != nil {
		return err
	}
	defer p.users.RUnlock()
	r, done, err := p.beginCut(ctx, c)
	if done || err != nil {
		return err
	}
	defer p.endCut(c)
	// Most of what is dirty goes out before the barrier.
	if err := p.flushBeforeCut(ctx, r); err != nil {
		return err
	}
	if !p.opts.broken.cutWithoutBarrier {
		r.gate.Lock()
		defer r.gate.Unlock()
	}
	if !p.opts.broken.cutWithoutFlush {
		if err := p.flushHead(r); err != nil {
			return err
		}
	}
	return p.seal(ctx, r, c)
}

// cuts are the seals of a pool that are under way, and those that must not come any more. Guarded by Pool.mu.
type cuts struct {
	running []*cutting
	// over is up to which barrier the seals of a snapshot were given up, the one first that is forgotten first in order. An
	// order that comes late does so by seconds: it ends with its session.
	over  map[volume.SnapshotID]uint64
	order []volume.SnapshotID
}

// maxOver bounds what is remembered of seals that were given up.
const maxOver = 4096

// giveUp sees to it that what was not sealed yet is not; of a replica that is named only what is under way.
func (c *cuts) giveUp(id volume.SnapshotID, of volume.ReplicaID, upTo uint64) {
	for _, r := range c.running {
		if r.snap == id && (of == "" || r.replica == of) && (upTo == 0 || r.number <= upTo) {
			r.over = true
		}
	}
	if upTo == 0 || of != "" {
		return
	}
	if _, known := c.over[id]; !known {
		if len(c.order) == maxOver {
			delete(c.over, c.order[0])
			c.order = c.order[1:]
		}
		c.order = append(c.order, id)
	}
	c.over[id] = max(c.over[id], upTo)
}

// flushHead makes durable what a replica and its journal have.
func (p *Pool) flushHead(r *replica) error {
	var journals []*journal
	p.mu.Lock()
	if r.log != nil {
		journals = append(journals, r.log)
	}
	p.mu.Unlock()
	return p.flushAll([]*chain{r.head.Load()}, journals)
}

// flushBeforeCut flushes until little is left to be flushed while writes are kept out, or writes come as fast as that.
func (p *Pool) flushBeforeCut(ctx context.Context, r *replica) error {
	for range 5 {
		if err := errors.Join(ctx.Err(), p.waitRoom(ctx)); err != nil {
			return err
		}
		l := r.head.Load()
		if err := p.flushHead(r); err != nil {
			return err
		}
		l.dirtyMu.Lock()
		left := len(l.dirty)
		l.dirtyMu.Unlock()
		if left < 100 {
			break
		}
	}
	return nil
}

// beginCut notes that a cut is under way, unless the snapshot is there already.
func (p *Pool) beginCut(ctx context.Context, c *cutting) (_ *replica, done bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return nil, false, err
	}
	if done, err := c.done(p); done || err != nil {
		return nil, done, err
	}
	r := p.replicas[c.replica]
	if r == nil {
		return nil, false, noReplica(p, c.replica)
	}
	p.cuts.running = append(p.cuts.running, c)
	return r, false, nil
}

func (p *Pool) endCut(c *cutting) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cuts.running = slices.DeleteFunc(p.cuts.running, func(o *cutting) bool { return o == c })
}

// seal makes the head the snapshot's layer and opens a new one, in one transaction. Writes are kept out.
func (p *Pool) seal(ctx context.Context, r *replica, c *cutting) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(ctx); err != nil {
		return err
	}
	if p.replicas[r.id] != r {
		return noReplica(p, r.id)
	}
	if done, err := c.done(p); done || err != nil {
		return err
	}
	old := r.head.Load()
	s := &snapshot{id: c.snap, layer: old, number: c.number, size: r.size.Load(), volume: r.volume, tenant: r.tenant, replica: r.id}
	head := p.newLayer(old)
	rec := r.record()
	rec.head = head.id
	err := p.commitOps([]op{
		{snapshotKey(c.snap), s.record().encode()},
		{layerKey(head.id), head.record().encode()},
		{replicaKey(r.id), rec.encode()},
	})
	if err != nil {
		return err
	}
	p.adopt(head, old)
	if earlier := p.snapshots[c.snap]; earlier != nil {
		earlier.layer.snap = nil
		p.urgent = true
	}
	old.snap, old.head = s, nil
	head.head = r
	p.snapshots[c.snap] = s
	r.head.Store(head)
	p.kick()
	return nil
}
