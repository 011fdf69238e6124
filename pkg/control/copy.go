package control

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// A snapshot outlives its volume, and with it what brings snapshots to other pools: the rebuild of a replica. For the time of a
// copy there is a record under the volume's id again, whose first replica is made of the snapshot where that is held, and whose
// second is filled from it like any other (docs/adr/0009).

// CopySnapshot begins to copy a snapshot whose volume is deleted from a pool that holds it to another. It is nil where the copy is
// under way, or not needed any more. volume.ErrNoSpace: the pool has no room. ErrExists: it has something that no record knows.
// ErrBusy: another snapshot of the volume is being copied, or one of the nodes has yet to free a copy of one.
func (s *Service) CopySnapshot(ctx context.Context, id volume.SnapshotID, from, to volume.PoolID) error {
	x, err := s.Snapshot(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	unlock, ok := s.flights.tryLock(volumeKey(string(x.Volume)))
	if !ok {
		return fmt.Errorf("snapshot %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	if err := s.meetsNone(ctx, x, to); err != nil {
		return err
	}
	random, err := newID()
	if err != nil {
		return err
	}
	end := func(i int, p volume.PoolID, r volume.ReplicaRole) volume.Replica {
		return volume.Replica{ID: volume.ReplicaID(fmt.Sprintf("%s%s-%d", replicaPrefix, random, i)), Pool: p, Role: r}
	}
	v, err := s.proposeVolume(ctx, command.CopySnapshot{Now: s.now(), Snapshot: id, From: end(0, from, volume.InSync), To: end(1, to, volume.Filling)})
	s.record(ctx, "snapshot.copy", string(id), fmt.Sprintf("from pool %s to pool %s", from, to), err)
	if err != nil {
		return ignoreNotFound(err)
	}
	return s.bringUp(ctx, v.Volume)
}

// meetsNone returns volume.ErrBusy where a pool's node has yet to free a copy of a snapshot of the volume, and ErrExists where it has what a
// copy would bring there, and no record knows that it does: it is quarantined, a fill would be refused for ever. Of that State says so
// from now on, also of one that cannot tell.
func (s *Service) meetsNone(ctx context.Context, x volume.Snapshot, pool volume.PoolID) error {
	xs, err := s.store.Snapshots(ctx, x.Volume, "", 0)
	if err != nil {
		return err
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	there, _ := c.pool(pool)
	at := volume.Replica{Pool: pool, Node: there.Node}
	for _, o := range xs {
		if slices.ContainsFunc(o.Leaving, func(h volume.Replica) bool { p, _ := c.pool(h.Pool); return p.ID != "" && p.Node == at.Node }) {
			return fmt.Errorf("node %s has yet to free a copy of snapshot %s: %w", at.Node, o.ID, volume.ErrBusy)
		}
		if o.CreatedAt > x.CreatedAt || slices.ContainsFunc(o.Holders, func(h volume.Replica) bool { return h.Pool == pool }) {
			continue
		}
		has, err := s.has(ctx, at, o.ID)
		if !has && err == nil {
			continue
		}
		s.notFit(x.ID, pool) // else one that answers no such question would be asked for ever, and others wait behind it
		if err != nil {
			return err
		}
		return fmt.Errorf("pool %s on node %s has snapshot %s, though no record says so, and so gets no copy of snapshot %s: %w", pool, at.Node, o.ID, x.ID, volume.ErrExists)
	}
	return nil
}

// settleCopy records what a copy has brought to its pool, once that is in sync: whoever runs its engine may be gone before it says so.
// Where the snapshot is not there after all the copy ends, and another pool is chosen. The caller has v's lock.
func (s *Service) settleCopy(ctx context.Context, v volume.Volume, xs []volume.Snapshot) error {
	to := v.Replicas[1]
	i := slices.IndexFunc(xs, func(x volume.Snapshot) bool { return x.ID == v.Kept })
	if i < 0 {
		return nil // it is deleted: the copy will be ended
	}
	copied := xs[i]
	xs = slices.DeleteFunc(xs, func(x volume.Snapshot) bool { return x.ID == copied.ID || x.CreatedAt > copied.CreatedAt })
	for _, x := range append(xs, copied) { // that one last: with it the copy is complete
		if x.State != volume.Ready || slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == to.Pool }) {
			continue
		}
		has, err := s.has(ctx, to, x.ID)
		switch {
		case err != nil:
			return err
		case has:
			if err := s.propose(ctx, command.AddHolder{Snapshot: x.ID, Replica: to.ID}); err != nil {
				return ignoreNotFound(err)
			}
		case x.ID == copied.ID:
			s.notFit(x.ID, to.Pool)
			return s.endCopy(ctx, v)
		}
	}
	return nil
}

// has tells whether a pool has a snapshot, whatever the records say.
func (s *Service) has(ctx context.Context, at volume.Replica, x volume.SnapshotID) (bool, error) {
	err := s.agents.Extents(ctx, at, x, "", volume.MaxSize, func(Extent) error { return nil })
	if errors.Is(err, volume.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

func (s *Service) notFit(x volume.SnapshotID, pool volume.PoolID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unfit[Unfit{x, pool}] = s.o.Now()
}

// EndCopy ends the copy of a snapshot into a replica, and frees what it was made with: it is recorded by now, or stands in the way.
// Nil where there is none.
func (s *Service) EndCopy(ctx context.Context, id volume.ID, into volume.ReplicaID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.store.Volume(ctx, id)
	if err != nil || v.Kept == "" || v.State != volume.Ready || v.Replicas[1].ID != into {
		return ignoreNotFound(err)
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	to := v.Replicas[1]
	if p, known := c.pool(to.Pool); known && p.Full() && to.Role != volume.InSync { // what is freed there now would be filled again by the next
		s.notFit(v.Kept, to.Pool)
	}
	return s.endCopy(ctx, v)
}

// pool is a pool as its node reported it.
func (c cluster) pool(id volume.PoolID) (p volume.Pool, known bool) {
	for _, n := range c.nodes {
		for _, p := range n.Pools {
			if p.ID == id {
				return p, true
			}
		}
	}
	return p, false
}

// endCopy frees what a snapshot is copied with. The caller has v's lock.
func (s *Service) endCopy(ctx context.Context, v volume.Volume) error {
	if err := s.closeEngine(ctx, v); err != nil {
		return err
	}
	x, err := s.proposeVolume(ctx, command.BeginDelete{Volume: v.ID})
	s.record(ctx, "snapshot.copy-end", string(v.Kept), fmt.Sprintf("to pool %s", v.Replicas[1].Pool), err)
	if err != nil {
		return ignoreNotFound(err)
	}
	return s.completeDelete(ctx, x.Volume)
}
