package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// DeleteVolume deletes a volume; one that does not exist is nil. Its snapshots stay. Nil means that the tombstone is
// durable: the name is free and nothing can use the volume; the space follows when its nodes answer. It returns
// volume.ErrInUse, naming the node, while the volume is attached, and while it is being cloned. An attachment that is being
// ended ends with it where its node is gone: nothing waits for that.
func (s *Service) DeleteVolume(ctx context.Context, id volume.ID) error {
	v, err := s.live(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(v.ID)))
	if err != nil {
		return err
	}
	defer unlock()
	if v, err = s.live(ctx, v.ID); err != nil {
		return ignoreNotFound(err)
	}
	begin := command.BeginDelete{Volume: v.ID}
	switch a := v.Attachment; {
	case a == nil:
		if err := s.closeEngine(ctx, v); err != nil {
			return ignoreNotFound(err)
		}
	case a.Detaching:
		gone, err := s.gone(ctx, a.Node)
		if err != nil {
			return err
		}
		if gone {
			begin.Gone = a.Epoch
		} else if err := s.completeDetach(ctx, v); err != nil {
			return err
		}
	}
	x, err := s.proposeVolume(ctx, begin)
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	s.record(ctx, "volume.delete", string(v.ID), fmt.Sprintf("name %q, tenant %s", v.Name, v.Tenant), err)
	if err != nil {
		return err
	}
	s.forget(v.ID)
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	if err := s.completeDelete(ctx, x.Volume); err != nil {
		s.o.Logger.Warn("volume is deleted, its space will be freed later", "volume", v.ID, "error", err)
	}
	return nil
}

// completeDelete frees what a volume with a tombstone has, wherever it can be reached, and forgets it when all is free. The
// caller has its lock.
func (s *Service) completeDelete(ctx context.Context, v volume.Volume) error {
	errs := []error{s.freeReplicas(ctx, v, slices.Concat(v.Replicas, v.Leaving)), s.dropCut(ctx, v)}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.propose(ctx, command.FinishDelete{Volume: v.ID, Epoch: v.Epoch})
}

// freeReplicas has nodes free replicas that leave a volume, and forgets those that are free.
func (s *Service) freeReplicas(ctx context.Context, v volume.Volume, rs []volume.Replica) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	xs, err := s.store.Snapshots(ctx, v.ID, "", 0)
	if err != nil {
		return err
	}
	errs := make([]error, len(rs))
	var wg sync.WaitGroup
	for i, r := range rs {
		wg.Go(func() {
			if why := c.silent[r.Node]; why != "" {
				errs[i] = fmt.Errorf("replica %s on node %s: %s: %w", r.ID, r.Node, why, volume.ErrUnavailable)
			} else if err := s.agents.DeleteReplica(ctx, r.Node, r.Pool, r.ID); err != nil {
				errs[i] = fmt.Errorf("free replica %s on node %s: %w", r.ID, r.Node, err)
			} else if err := s.freeFilledIn(ctx, v, xs, r); err != nil {
				errs[i] = err
			} else if v.State != volume.Deleting || len(rs) > 1 { // the last of a volume goes with it
				errs[i] = s.propose(ctx, command.FreeReplica{Volume: v.ID, Replica: r.ID})
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// freeFilledIn has a pool let go of snapshots that were filled in with a replica that leaves and that no record has there: the
// replica left before they were counted. One that was being copied may have been filled in after its deletion had asked the pool.
func (s *Service) freeFilledIn(ctx context.Context, v volume.Volume, xs []volume.Snapshot, r volume.Replica) error {
	var ids []volume.SnapshotID
	copied := v.Kept
	for _, x := range xs {
		if x.ID == copied {
			copied = ""
		}
		if x.State != volume.Creating && !slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == r.Pool }) {
			ids = append(ids, x.ID)
		}
	}
	if copied != "" { // there is no record of it any more
		ids = append(ids, copied)
	}
	for _, id := range ids {
		// Another process may have freed the replica, and what the pool has been given since is not to go: no other replica is
		// placed there while the record has this one.
		now, err := s.store.Volume(ctx, v.ID)
		if err != nil {
			return ignoreNotFound(err)
		}
		if !slices.ContainsFunc(slices.Concat(now.Replicas, now.Leaving), func(o volume.Replica) bool { return o.ID == r.ID }) {
			return nil
		}
		if err := s.agents.DeleteSnapshot(ctx, r.Node, r.Pool, id, r.ID, 0); err != nil {
			return fmt.Errorf("free snapshot %s, filled in on node %s: %w", id, r.Node, err)
		}
	}
	return nil
}
