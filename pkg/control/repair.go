package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// State is what repairs are planned from.
type State struct {
	// View is the cluster for placement: what is away, drained or being emptied gets nothing new.
	View      placement.View
	Volumes   []volume.Volume
	Snapshots []volume.Snapshot
	// Remains are those of deleted volumes that have snapshots.
	Remains map[volume.ID]volume.Remains
	// Unfit are pools that a snapshot can be copied neither to nor from, as this process has found out lately.
	Unfit map[Unfit]bool
	// Away is for how long a pool cannot be used: its node is silent, its disk is not there, or it has stopped. It is no longer
	// than this process has been looking: after a time without controllers all nodes seem to have been silent. Pools that can be
	// used are not in it.
	Away map[volume.PoolID]time.Duration
}

// Unfit is a pool that a snapshot can be copied neither to nor from.
type Unfit struct {
	Snapshot volume.SnapshotID
	Pool     volume.PoolID
}

// unfitFor is for how long a pool is not tried again: an admin may have seen to it, or a disk answers again.
const unfitFor = 10 * time.Minute

// State reads it.
func (s *Service) State(ctx context.Context) (st State, err error) {
	c, err := s.cluster(ctx)
	if err != nil {
		return st, err
	}
	st.View = c.view()
	if st.Volumes, err = s.store.Volumes(ctx, "", 0); err != nil {
		return st, err
	}
	if st.Snapshots, err = s.store.Snapshots(ctx, "", "", 0); err != nil {
		return st, err
	}
	remains, err := s.store.Remains(ctx)
	if err != nil {
		return st, err
	}
	st.Remains = map[volume.ID]volume.Remains{}
	for _, k := range remains {
		st.Remains[k.Volume] = k
	}
	st.Away = map[volume.PoolID]time.Duration{}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.o.Now()
	if now.Sub(s.looked) > s.o.NodeTimeout {
		if s.lookingSince = now; !s.looked.IsZero() {
			s.staleQoS, s.limits = nil, nil // others looked after them meanwhile
		}
	}
	s.noteLimits(st.Volumes)
	there := map[volume.SnapshotID]bool{}
	for _, x := range st.Snapshots {
		there[x.ID] = true
	}
	maps.DeleteFunc(s.unfit, func(u Unfit, since time.Time) bool { return !there[u.Snapshot] || now.Sub(since) > unfitFor })
	st.Unfit = map[Unfit]bool{}
	for u := range s.unfit {
		st.Unfit[u] = true
	}
	s.looked = now
	looking := now.Sub(s.lookingSince)
	offline := map[volume.PoolID]time.Time{}
	for _, n := range c.nodes {
		for _, p := range n.Pools {
			if !p.Works() { // nobody records since when
				offline[p.ID] = now
				if since, ok := s.offline[p.ID]; ok {
					offline[p.ID] = since
				}
				st.Away[p.ID] = min(looking, now.Sub(offline[p.ID]))
			}
			if c.silent[n.ID] != "" {
				st.Away[p.ID] = min(looking, s.silence(n))
			}
		}
	}
	s.offline = offline
	return st, nil
}

// wanting tells whether a volume has replicas that an engine can bring up now.
func (c cluster) wanting(v volume.Volume) bool {
	return slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool {
		p, _ := c.pool(r.Pool)
		return r.Role != volume.InSync && c.silent[r.Node] == "" && p.Works()
	})
}

// AddReplica gives a volume one more replica, in a pool, and has it filled. volume.ErrNoSpace: the pool has no room. It is
// nil where the volume has one there.
func (s *Service) AddReplica(ctx context.Context, id volume.ID, pool volume.PoolID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.live(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Pool == pool }) {
		return nil
	}
	random, err := newID()
	if err != nil {
		return err
	}
	r := volume.Replica{ID: volume.ReplicaID(replicaPrefix + random), Pool: pool, Role: volume.Filling}
	x, err := s.proposeVolume(ctx, command.AddReplica{Volume: id, Replica: r})
	s.record(ctx, "replica.add", string(r.ID), fmt.Sprintf("volume %s, pool %s", id, pool), err)
	if err != nil {
		return err
	}
	return s.bringUp(ctx, x.Volume)
}

// Sync has the engine of a volume bring up its replicas that are behind; it opens one where none runs, until they are.
func (s *Service) Sync(ctx context.Context, id volume.ID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.Record(ctx, id)
	if err != nil || v.State != volume.Ready {
		return ignoreNotFound(err)
	}
	if v.Kept != "" && v.Replicas[1].Role == volume.InSync {
		xs, err := s.store.Snapshots(ctx, v.ID, "", 0)
		if err != nil {
			return err
		}
		return s.settleCopy(ctx, v, xs)
	}
	return s.bringUp(ctx, v)
}

// bringUp makes replicas that are recorded and not there yet, and has the engine see to them. The caller has v's lock.
func (s *Service) bringUp(ctx context.Context, v volume.Volume) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	xs, err := s.store.Snapshots(ctx, v.ID, "", 0)
	if err != nil {
		return err
	}
	var errs []error
	for i, r := range v.Replicas {
		source := v.Kept != "" && i == 0 // made of the snapshot that is copied
		if r.Role != volume.Filling && !source || c.silent[r.Node] != "" {
			continue
		}
		spec := ReplicaSpec{ID: r.ID, Volume: v.ID, Tenant: v.Tenant, Pool: r.Pool, Size: v.Size, Parent: newest(xs, r.Pool)}
		if source {
			spec.Parent = v.Kept
		}
		err := s.agents.CreateReplica(ctx, r.Node, spec)
		if err != nil && definite(err) && v.Kept != "" { // it cannot be copied so: other pools are chosen next time
			s.notFit(v.Kept, r.Pool)
			return errors.Join(fmt.Errorf("replica %s on node %s: %w", r.ID, r.Node, err), s.endCopy(ctx, v))
		}
		if errors.Is(err, volume.ErrNoSpace) {
			// It cannot be filled there: another pool is chosen next time.
			err = errors.Join(err, s.propose(ctx, command.DropReplica{Volume: v.ID, Replica: r.ID}))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("replica %s on node %s: %w", r.ID, r.Node, err))
		}
	}
	if v.Attachment != nil && v.Attachment.Detaching {
		return errors.Join(errs...)
	}
	if _, err := s.openEngine(ctx, v); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// newest is the last sound snapshot of a volume that a pool holds from a replica that was there before: a new one goes on from it.
func newest(xs []volume.Snapshot, pool volume.PoolID) (id volume.SnapshotID) {
	var at volume.Timestamp
	for _, x := range xs {
		if x.State == volume.Ready && x.CreatedAt >= at && slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == pool && !h.Damaged }) {
			id, at = x.ID, x.CreatedAt
		}
	}
	return id
}

// DropReplica takes a replica from a volume and has its node free it, as soon as that answers. The last one that is in sync
// stays: volume.ErrInUse.
func (s *Service) DropReplica(ctx context.Context, id volume.ID, replica volume.ReplicaID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.live(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	i := slices.IndexFunc(v.Replicas, func(r volume.Replica) bool { return r.ID == replica })
	if i < 0 {
		return nil
	}
	if v.Replicas[i].Role == volume.InSync && v.Owner != "" {
		if len(v.InSync()) == 1 {
			return fmt.Errorf("replica %s is the only one of volume %s that is in sync: %w", replica, id, volume.ErrInUse)
		}
		if err := s.agents.Evict(ctx, v.Owner, id, v.Epoch, replica); err != nil {
			return fmt.Errorf("engine of volume %s on node %s: %w", id, v.Owner, err)
		}
	}
	x, err := s.proposeVolume(ctx, command.DropReplica{Volume: id, Replica: replica})
	s.record(ctx, "replica.drop", string(replica), fmt.Sprintf("volume %s, pool %s", id, v.Replicas[i].Pool), err)
	if err != nil {
		return err
	}
	if err := s.freeReplicas(ctx, x.Volume, x.Volume.Leaving); err != nil {
		s.o.Logger.Warn("replica has left its volume, its space will be freed later", "volume", id, "replica", replica, "error", err)
	}
	return nil
}

// DropHolder has a pool let go of a snapshot of which another has a sound copy, as soon as it can; else it is volume.ErrInUse.
func (s *Service) DropHolder(ctx context.Context, id volume.SnapshotID, pool volume.PoolID) error {
	unlock, ok := s.flights.tryLock(snapshotKey(string(id)))
	if !ok {
		return fmt.Errorf("snapshot %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	x, err := s.Snapshot(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if !slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == pool }) {
		return nil
	}
	now, err := s.proposeSnapshot(ctx, command.DropHolder{Snapshot: id, Pool: pool}) // first: nobody reads what is freed
	if err != nil {
		return err
	}
	s.record(ctx, "snapshot.move", string(id), fmt.Sprintf("pool %s holds it no more", pool), nil)
	if err := s.freeHolders(ctx, now.Snapshot); err != nil {
		s.o.Logger.Warn("a pool holds a snapshot no more, its space will be freed later", "snapshot", id, "pool", pool, "error", err)
	}
	return nil
}

// freeHolders has pools free copies of a snapshot that leave, and forgets those that are free, and those in pools that are not known
// any more: forgotten, or removed with their nodes. A call may come late, when the pool has a copy again: it names the replica that
// sealed what is to go. The caller has its lock.
func (s *Service) freeHolders(ctx context.Context, x volume.Snapshot) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	errs := make([]error, len(x.Leaving))
	var wg sync.WaitGroup
	for i, h := range x.Leaving {
		wg.Go(func() {
			if errs[i] = s.freeHolder(ctx, c, h, x.ID, h.ID, 0); errs[i] == nil {
				errs[i] = s.propose(ctx, command.FreeHolder{Snapshot: x.ID, Pool: h.Pool})
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// freeHolder has a pool let go of a snapshot, if the pool is known.
func (s *Service) freeHolder(ctx context.Context, c cluster, h volume.Replica, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	if _, known := c.pool(h.Pool); !known {
		return nil
	}
	if why := c.silent[h.Node]; why != "" {
		return fmt.Errorf("snapshot %s on node %s: %s: %w", id, h.Node, why, volume.ErrUnavailable)
	}
	if err := s.agents.DeleteSnapshot(ctx, h.Node, h.Pool, id, of, upTo); err != nil {
		return fmt.Errorf("free snapshot %s on node %s: %w", id, h.Node, err)
	}
	return nil
}

// Commit is CommitBy for an engine of this process.
func (s *Service) Commit(ctx context.Context, id volume.ID, c replication.Change) (replication.Membership, error) {
	return s.CommitBy(ctx, "", id, c)
}

// CommitBy applies a change that a volume's engine on a node asks for, and returns the record after it. An error that wraps
// volume.ErrUnavailable, or is ctx's, means that the outcome is unknown; any other that it was refused, as package
// replication says or with volume.ErrDenied where that node does not run the engine, and the record is the current one.
func (s *Service) CommitBy(ctx context.Context, node volume.NodeID, id volume.ID, c replication.Change) (replication.Membership, error) {
	x, err := s.proposeVolume(ctx, command.Commit{Volume: id, Node: node, Change: c})
	if err == nil {
		return command.Membership(x.Volume), nil
	}
	if ctx.Err() != nil || errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return replication.Membership{}, err
	}
	now, readErr := s.Membership(ctx, id)
	if readErr != nil && !errors.Is(readErr, volume.ErrNotFound) {
		return now, fmt.Errorf("%v: %w", err, volume.ErrUnavailable)
	}
	return now, err
}

// Membership returns a volume's record as its engine needs it; volume.ErrNotFound where there is none.
func (s *Service) Membership(ctx context.Context, id volume.ID) (replication.Membership, error) {
	v, err := s.store.Volume(ctx, id)
	if err != nil {
		return replication.Membership{}, err
	}
	return command.Membership(v), nil
}

// AddHolder is AddHolderBy for an engine of this process.
func (s *Service) AddHolder(ctx context.Context, id volume.SnapshotID, replica volume.ReplicaID) error {
	return s.AddHolderBy(ctx, "", id, replica)
}

// AddHolderBy records that a replica has filled in a snapshot, as the node says that runs the volume's engine, or else it is
// volume.ErrDenied.
func (s *Service) AddHolderBy(ctx context.Context, node volume.NodeID, id volume.SnapshotID, replica volume.ReplicaID) error {
	return s.propose(ctx, command.AddHolder{Snapshot: id, Node: node, Replica: replica})
}

// maxEngines bounds the engines that are asked for in one call.
const maxEngines = 16 << 10

// Ended tells which engines, each with its epoch, are of the past: another epoch has begun, or the volume is deleted.
func (s *Service) Ended(ctx context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error) {
	if len(engines) > maxEngines {
		return nil, fmt.Errorf("%d engines are asked for at once: %w", len(engines), volume.ErrInvalid)
	}
	var mu sync.Mutex
	var ended []volume.ID
	var group errgroup.Group
	group.SetLimit(16) // reads that wait at once share what they wait for
	for id, epoch := range engines {
		group.Go(func() error {
			v, err := s.store.Volume(ctx, id)
			if err != nil && !errors.Is(err, volume.ErrNotFound) {
				return err
			}
			if err != nil || v.State == volume.Deleting || v.Epoch > epoch {
				mu.Lock()
				defer mu.Unlock()
				ended = append(ended, id)
			}
			return nil
		})
	}
	err := group.Wait()
	slices.Sort(ended)
	return ended, err
}
