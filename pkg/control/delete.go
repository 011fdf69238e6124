package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// DeleteVolume deletes a volume; one that does not exist is nil. Its snapshots stay. Nil means that the tombstone is
// durable: the name is free and nothing can use the volume; the space follows when its nodes answer. It returns
// volume.ErrInUse, naming the node, while the volume is attached, and while it is being cloned.
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
	x, err := s.proposeVolume(ctx, command.BeginDelete{Volume: v.ID})
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

// completeDelete frees what a volume with a tombstone has, and forgets it. The caller has its lock.
func (s *Service) completeDelete(ctx context.Context, v volume.Volume) error {
	view, err := s.view(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range v.Replicas {
		if why := view.Down[r.Node]; why != "" {
			errs = append(errs, fmt.Errorf("replica %s on node %s: %s: %w", r.ID, r.Node, why, volume.ErrUnavailable))
		} else if err := s.freeReplica(ctx, v, r); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.propose(ctx, command.FinishDelete{Volume: v.ID})
}

func (s *Service) freeReplica(ctx context.Context, v volume.Volume, r volume.Replica) error {
	if err := s.agents.DeleteReplica(ctx, r.Node, r.Pool, r.ID); err != nil {
		return fmt.Errorf("free replica %s on node %s: %w", r.ID, r.Node, err)
	}
	if v.Source != nil && v.Source.Volume != "" {
		if err := s.agents.DeleteSnapshot(ctx, r.Node, r.Pool, cloneCut(v.ID)); err != nil {
			return fmt.Errorf("free the cut of clone %s on node %s: %w", v.ID, r.Node, err)
		}
	}
	return nil
}
