package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Forgotten is what lost its last copy with a pool.
type Forgotten struct {
	Volumes   []volume.ID
	Snapshots []volume.SnapshotID
}

// ForgetPool forgets a pool whose disk is gone for good, as an admin says, and what was on it: the tombstones that wait for
// it end, volumes with other replicas get new ones in its stead. A volume whose only replica was there is Lost: it is shown,
// and can only be deleted; a snapshot that nobody else holds stays, and cannot be restored. Cut off anywhere, the same
// call goes on.
//
// volume.ErrNotFound: the pool. ErrInUse: it is open, and where acceptDataLoss is not set, it has the only copy of
// something, which is named; nothing was changed then. ErrBusy: something is under way, or a volume could be salvaged from
// a replica elsewhere and is not yet.
func (s *Service) ForgetPool(ctx context.Context, id volume.PoolID, acceptDataLoss bool) (Forgotten, error) {
	lost, err := s.forgetPool(ctx, id, acceptDataLoss)
	s.record(ctx, "pool.forget", string(id), fmt.Sprintf("data loss accepted: %t; volumes lost %v, snapshots lost %v", acceptDataLoss, lost.Volumes, lost.Snapshots), err)
	return lost, err
}

func (s *Service) forgetPool(ctx context.Context, id volume.PoolID, accept bool) (lost Forgotten, err error) {
	c, err := s.cluster(ctx)
	if err != nil {
		return lost, err
	}
	known := false
	for _, n := range c.nodes {
		for _, p := range n.Pools {
			if p.ID != id {
				continue
			}
			if known = true; p.Capacity > 0 && c.silent[n.ID] == "" {
				if p.Failed {
					return lost, fmt.Errorf("pool %s on node %s has stopped, and its daemon still has it open; restart the daemon of that node: with the disk the pool may go on, without it it can be forgotten: %w", id, n.ID, volume.ErrInUse)
				}
				silent := s.silence(n)
				return lost, fmt.Errorf("pool %s is open on node %s, which reported %s ago; empty that node instead, or restart it without the disk. "+
					"Where the node itself is gone: it counts as gone after %s without a report, try again in %s: %w",
					id, n.ID, silent.Round(time.Second), s.o.NodeTimeout, max(0, s.o.NodeTimeout-silent).Round(time.Second)+time.Second, volume.ErrInUse)
			}
		}
	}
	if !known {
		return lost, fmt.Errorf("pool %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	vs, err := s.store.Volumes(ctx, "", 0)
	if err != nil {
		return lost, err
	}
	xs, err := s.store.Snapshots(ctx, "", "", 0)
	if err != nil {
		return lost, err
	}
	here := func(r volume.Replica) bool { return r.Pool == id }
	vs = slices.DeleteFunc(vs, func(v volume.Volume) bool { return !slices.ContainsFunc(slices.Concat(v.Replicas, v.Leaving), here) })
	xs = slices.DeleteFunc(xs, func(x volume.Snapshot) bool { return !slices.ContainsFunc(x.Holders, here) })
	var only []string
	for _, v := range vs {
		others := slices.DeleteFunc(slices.Clone(v.Replicas), here)
		if v.State != volume.Ready || v.Kept != "" || len(others) == len(v.Replicas) || slices.ContainsFunc(others, func(r volume.Replica) bool { return r.Role == volume.InSync }) {
			continue
		}
		if len(others) > 0 {
			return lost, fmt.Errorf("pool %s has the only replica of volume %s that is in sync; salvage the volume from another, or delete it, first: %w", id, v.ID, volume.ErrBusy)
		}
		only, lost.Volumes = append(only, "volume "+string(v.ID)), append(lost.Volumes, v.ID)
	}
	for _, x := range xs {
		if x.State == volume.Ready && !x.Hidden && !slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return !here(h) }) {
			only, lost.Snapshots = append(only, "snapshot "+string(x.ID)), append(lost.Snapshots, x.ID)
		}
	}
	if len(only) > 0 && !accept {
		const most = 5
		more := ""
		if len(only) > most {
			more = fmt.Sprintf(" and %d more", len(only)-most)
		}
		return Forgotten{}, fmt.Errorf("pool %s has the only copy of %s%s; forget it only if the data may be lost: %w",
			id, strings.Join(only[:min(most, len(only))], ", "), more, volume.ErrInUse)
	}
	for _, x := range xs {
		if err := s.forgetHolder(ctx, x.ID, id); err != nil {
			return lost, err
		}
	}
	for _, v := range vs {
		if err := s.forgetReplica(ctx, v.ID, id); err != nil {
			return lost, err
		}
	}
	return lost, s.propose(ctx, command.ForgetPool{Pool: id})
}

func (s *Service) forgetHolder(ctx context.Context, id volume.SnapshotID, pool volume.PoolID) error {
	unlock, err := s.flights.lock(ctx, snapshotKey(string(id)))
	if err != nil {
		return err
	}
	defer unlock()
	x, err := s.store.Snapshot(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if x.State == volume.Creating {
		err := s.abandonSnapshot(ctx, id, errors.New("its pool is gone"))
		if x.Group != "" {
			err = s.abandonGroup(ctx, x.Group, errors.New("a pool of it is gone"))
		}
		if err != nil { // as it must, while the pool is asked to let go of it
			s.o.Logger.Info("unfinished snapshot is dropped", "snapshot", id, "error", err)
		}
	}
	if _, err := s.proposeSnapshot(ctx, command.DropHolder{Snapshot: id, Pool: pool, Lost: true}); err != nil {
		return ignoreNotFound(err)
	}
	return nil
}

func (s *Service) forgetReplica(ctx context.Context, id volume.ID, pool volume.PoolID) error {
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return err
	}
	defer unlock()
	v, err := s.store.Volume(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	here := func(r volume.Replica) bool { return r.Pool == pool }
	if v.Kept != "" && v.State == volume.Ready && slices.ContainsFunc(v.Replicas, here) {
		if err := s.endCopy(ctx, v); err != nil { // as it must, while the pool is asked to free its part
			s.o.Logger.Info("a snapshot is copied no more", "snapshot", v.Kept, "error", err)
		}
		if v, err = s.store.Volume(ctx, id); err != nil {
			return ignoreNotFound(err)
		}
	}
	if v.State == volume.Creating {
		x, err := s.proposeVolume(ctx, command.BeginDelete{Volume: id, Unfinished: true})
		if err != nil {
			return ignoreNotFound(err)
		}
		if x.Volume.State == volume.Ready {
			return fmt.Errorf("volume %s was made meanwhile; try again: %w", id, volume.ErrBusy)
		}
	} else if v.State == volume.Ready && v.Kept == "" {
		if lost := !slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return !here(r) }); lost {
			if err := s.abandon(ctx, v); err != nil {
				return err
			}
			if v, err = s.store.Volume(ctx, id); err != nil {
				return ignoreNotFound(err)
			}
		}
		if err := s.closeEngine(ctx, v); err != nil {
			return err
		}
		if v, err = s.store.Volume(ctx, id); err != nil {
			return ignoreNotFound(err)
		}
	}
	for _, r := range slices.Concat(v.Replicas, v.Leaving) {
		if !here(r) {
			continue
		}
		if v.State == volume.Ready && v.Kept == "" && r.Role == volume.InSync && v.Owner != "" && len(v.InSync()) > 1 {
			if err := s.agents.Evict(ctx, v.Owner, id, v.Epoch, r.ID); err != nil {
				return fmt.Errorf("engine of volume %s on node %s: %w", id, v.Owner, unfinished(err))
			}
		}
		if _, err := s.proposeVolume(ctx, command.LoseReplica{Volume: id, Replica: r.ID}); err != nil {
			return ignoreNotFound(err)
		}
	}
	if v, err = s.store.Volume(ctx, id); err == nil && v.State == volume.Deleting {
		if err := s.completeDelete(ctx, v); err != nil {
			s.o.Logger.Info("volume is deleted, the rest of its space will be freed later", "volume", id, "error", err)
		}
	}
	return ignoreNotFound(err)
}
