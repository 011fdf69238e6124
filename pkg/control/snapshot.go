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

// CreateSnapshot cuts a snapshot and returns it Ready: what was acknowledged before the call is in it. The same name and
// source again return the same one. volume.ErrNotFound: the volume. ErrExists: the name has another source. ErrQuota.
// ErrNoSpace. After ErrUnavailable, ErrBusy or the end of ctx a cut may be half made; the same call makes a fresh one.
func (s *Service) CreateSnapshot(ctx context.Context, r CreateSnapshot) (volume.Snapshot, error) {
	if err := volume.CheckName("snapshot name", r.Name); err != nil {
		return volume.Snapshot{}, err
	}
	unlock, err := s.flights.lock(ctx, snapshotNameKey(r.Name))
	if err != nil {
		return volume.Snapshot{}, err
	}
	defer unlock()
	for n := 1; ; n++ {
		x, made, err := s.snapshotOnce(ctx, r)
		if startOver(err) && n < starts {
			continue
		}
		if made || err != nil {
			s.record(ctx, "snapshot.create", objectOf(x.ID, r.Name), fmt.Sprintf("name %q of volume %.128s", r.Name, r.Volume), err)
		}
		if err != nil {
			return volume.Snapshot{}, err
		}
		return x, nil
	}
}

func (s *Service) snapshotOnce(ctx context.Context, r CreateSnapshot) (x volume.Snapshot, made bool, err error) {
	random, err := newID()
	if err != nil {
		return x, false, err
	}
	id := volume.SnapshotID(snapshotPrefix + random)
	unlock, err := s.flights.lock(ctx, snapshotKey(string(id)))
	if err != nil {
		return x, false, err
	}
	defer unlock()
	if len(r.Volume) > volume.MaxNameLen || r.Volume == "" {
		return x, false, fmt.Errorf("volume %.128q does not exist: %w", r.Volume, volume.ErrNotFound)
	}
	return s.takeSnapshot(ctx, command.BeginSnapshot{Now: s.now(), ID: id, Name: r.Name, Volume: r.Volume, Freeze: r.Freeze})
}

// takeSnapshot announces a snapshot and has it cut, or returns the one that has the name. With several replicas in sync an
// engine must cut them together: where none runs, one is opened for that, and nobody attaches meanwhile. The caller has
// the snapshot's lock.
func (s *Service) takeSnapshot(ctx context.Context, begin command.BeginSnapshot) (x volume.Snapshot, made bool, err error) {
	x, made, err = s.tryCut(ctx, begin)
	if !startOver(err) {
		return x, made, err
	}
	if v, e := s.live(ctx, begin.Volume); e != nil || !needsEngine(v) {
		return x, made, err
	}
	done, e := s.withEngine(ctx, begin.Volume)
	if e != nil {
		return x, made, fmt.Errorf("snapshot of volume %s: %w", begin.Volume, unfinished(e))
	}
	defer done()
	return s.tryCut(ctx, begin)
}

func needsEngine(v volume.Volume) bool {
	return v.State == volume.Ready && v.Attachment == nil && len(v.InSync()) > 1
}

// withEngine opens the engine of a volume that nobody has attached, where it needs one; done closes it.
func (s *Service) withEngine(ctx context.Context, id volume.ID) (done func(), err error) {
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return nil, err
	}
	v, err := s.store.Volume(ctx, id)
	if err != nil || !needsEngine(v) {
		unlock()
		return func() {}, ignoreNotFound(err)
	}
	if v, err = s.openEngine(ctx, v); err != nil {
		unlock()
		return nil, err
	}
	return func() {
		defer unlock()
		ctx, cancel := s.undoing(ctx)
		defer cancel()
		if err := s.closeEngine(ctx, v); err != nil {
			s.o.Logger.Warn("engine will be closed later", "volume", id, "error", err)
		}
	}, nil
}

func (s *Service) tryCut(ctx context.Context, begin command.BeginSnapshot) (x volume.Snapshot, made bool, err error) {
	unlock, err := s.flights.lock(ctx, cutKey(string(begin.Volume))) // an engine cuts one at a time
	if err != nil {
		return x, false, err
	}
	defer unlock()
	res, err := s.proposeSnapshot(ctx, begin)
	if errors.Is(err, volume.ErrBusy) { // an expand, another snapshot or an attach was faster
		return x, false, again{err}
	}
	if err != nil {
		return x, false, err
	}
	x = res.Snapshot
	switch {
	case x.Volume != begin.Volume:
		return x, false, fmt.Errorf("snapshot %s has the name %q and is of volume %s: %w", x.ID, x.Name, x.Volume, volume.ErrExists)
	case x.State == volume.Ready:
		return x, false, nil
	case !res.Created:
		// Left by a call that was cut off and never answered: what it cut may be old.
		if x.ID != begin.ID {
			unlock, err := s.flights.lock(ctx, snapshotKey(string(x.ID)))
			if err != nil {
				return x, false, err
			}
			defer unlock()
		}
		if err := s.abandonSnapshot(ctx, x.ID, errors.New("the call that began it was cut off")); err != nil {
			return x, false, err
		}
		return x, false, again{fmt.Errorf("snapshot %s was left unfinished; try again: %w", x.ID, volume.ErrBusy)}
	}
	cut, err := s.cut(ctx, x)
	if err == nil {
		if res, err = s.proposeSnapshot(ctx, command.FinishSnapshot{Cut: cut}); errors.Is(err, volume.ErrNotFound) {
			err = fmt.Errorf("snapshot %s was taken for unfinished by another controller, and dropped: %w", x.ID, volume.ErrBusy)
		}
	} else {
		err = fmt.Errorf("cut snapshot %s of volume %s: %w", x.ID, x.Volume, err)
	}
	switch {
	case err == nil:
		return res.Snapshot, true, nil
	case errors.Is(err, volume.ErrBusy):
		if err := s.abandonSnapshot(ctx, x.ID, err); err != nil {
			return x, true, err
		}
		return x, true, again{err}
	case !definite(err):
		return x, true, unfinished(err)
	}
	if err := s.abandonSnapshot(ctx, x.ID, err); err != nil {
		return x, true, err
	}
	return x, true, err
}

// cut has a snapshot that was announced cut: by the engine, or else by the one replica that is in sync.
func (s *Service) cut(ctx context.Context, x volume.Snapshot) (command.Cut, error) {
	node, spec, err := s.cutter(ctx, x)
	if err != nil {
		return command.Cut{}, err
	}
	holders, err := s.agents.CutSnapshot(ctx, node, spec)
	return command.Cut{Snapshot: x.ID, Number: x.Cut.Number, ConfigVersion: x.Cut.ConfigVersion, Holders: holders}, err
}

// cutter is the node that cuts a snapshot, and what it needs for that.
func (s *Service) cutter(ctx context.Context, x volume.Snapshot) (volume.NodeID, SnapshotSpec, error) {
	spec := SnapshotSpec{ID: x.ID, Volume: x.Volume, Barrier: *x.Cut, Freeze: x.Freeze}
	node := x.Holders[0].Node
	if x.Cut.Number != 0 {
		v, err := s.live(ctx, x.Volume)
		if err != nil {
			return "", spec, err
		}
		if v.Epoch != x.Cut.Epoch || v.Owner == "" {
			return "", spec, fmt.Errorf("volume %s was attached or detached meanwhile: %w", v.ID, volume.ErrBusy)
		}
		node = v.Owner
	}
	for _, h := range x.Holders {
		if h.Node == node {
			spec.Replica, spec.Pool = h.ID, h.Pool
		}
	}
	return node, spec, nil
}

// abandonSnapshot undoes a snapshot that nobody was told of; one that has been finished meanwhile stays. nil: nothing unfinished
// is left of it. Otherwise the reconciler goes on, and the error is not a final one. The caller has its lock.
func (s *Service) abandonSnapshot(ctx context.Context, id volume.SnapshotID, cause error) error {
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	x, err := s.proposeSnapshot(ctx, command.BeginDeleteSnapshot{Snapshot: id, Unfinished: true})
	if errors.Is(err, volume.ErrNotFound) || err == nil && x.Snapshot.State == volume.Ready {
		return nil
	}
	if err == nil {
		err = s.completeDeleteSnapshot(ctx, x.Snapshot)
	}
	if err != nil {
		return fmt.Errorf("snapshot %s is dropped (%v) and still being undone (%v): %w", id, cause, err, volume.ErrUnavailable)
	}
	return nil
}

// DeleteSnapshot deletes a snapshot; one that does not exist is nil. Nil means that the tombstone is durable; the space
// follows when its nodes answer. It returns volume.ErrInUse while a volume is being made from it.
func (s *Service) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	x, err := s.Snapshot(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	unlock, err := s.flights.lock(ctx, snapshotKey(string(id)))
	if err != nil {
		return err
	}
	defer unlock()
	now, err := s.proposeSnapshot(ctx, command.BeginDeleteSnapshot{Snapshot: id}) // the holders may be others since x was read
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	s.record(ctx, "snapshot.delete", string(id), fmt.Sprintf("name %q of volume %s", x.Name, x.Volume), err)
	if err != nil {
		return err
	}
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	if err := s.completeDeleteSnapshot(ctx, now.Snapshot); err != nil {
		s.o.Logger.Warn("snapshot is deleted, its space will be freed later", "snapshot", id, "error", err)
	}
	return nil
}

// completeDeleteSnapshot has the holders of a snapshot with a tombstone let go of it, those whose copies leave, and replicas of its
// volume into which it may have been filled in meanwhile, and forgets it. The caller has its lock.
func (s *Service) completeDeleteSnapshot(ctx context.Context, x volume.Snapshot) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	holders := slices.Concat(x.Holders, x.Leaving)
	v, err := s.store.Volume(ctx, x.Volume)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	rs := v.Replicas
	if v.Kept != "" { // what is left of earlier copies
		rs = slices.Concat(rs, v.Leaving)
	}
	for _, r := range rs {
		if !slices.ContainsFunc(holders, func(h volume.Replica) bool { return h.Pool == r.Pool }) {
			holders = append(holders, r)
		}
	}
	errs := make([]error, len(holders))
	var wg sync.WaitGroup
	for i, h := range holders {
		wg.Go(func() { errs[i] = s.freeHolder(ctx, c, h, x.ID, "", v.Barriers) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.propose(ctx, command.FinishDeleteSnapshot{Snapshot: x.ID})
}

// Extents calls fn with the runs of a snapshot that may differ from base, in order and not overlapping, from offset on;
// with base "" with the runs that were ever written. It stops at fn's first error and returns it. volume.ErrNotFound: a
// snapshot. ErrInvalid: they are of different volumes. ErrOutOfRange: the offset.
func (s *Service) Extents(ctx context.Context, snap, base volume.SnapshotID, offset int64, fn func(Extent) error) error {
	x, err := s.readySnapshot(ctx, snap)
	if err != nil {
		return err
	}
	if offset < 0 || offset > x.Size {
		return fmt.Errorf("offset %d is not within snapshot %s of %d bytes: %w", offset, snap, x.Size, volume.ErrOutOfRange)
	}
	holders := slices.Clone(x.Holders)
	if base != "" {
		b, err := s.readySnapshot(ctx, base)
		if err != nil {
			return err
		}
		if b.Volume != x.Volume {
			return fmt.Errorf("snapshot %s is of volume %s and %s is of %s: %w", base, b.Volume, snap, x.Volume, volume.ErrInvalid)
		}
		holders = nil
		for _, h := range x.Holders {
			for _, o := range b.Holders {
				if h.Pool == o.Pool {
					holders = append(holders, h)
				}
			}
		}
	}
	if len(holders) == 0 {
		return fmt.Errorf("no pool holds what is asked for of snapshot %s: %w", snap, volume.ErrUnavailable)
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	slices.SortStableFunc(holders, func(a, b volume.Replica) int { return rank(c.silent[a.Node]) - rank(c.silent[b.Node]) })
	var stopped error
	for _, h := range holders { // where one does not answer any more the next goes on: all have the same bytes
		err = s.agents.Extents(ctx, h, snap, base, offset, func(e Extent) error {
			if stopped = fn(e); stopped == nil {
				offset = e.Offset + e.Length
			}
			return stopped
		})
		if stopped != nil || ctx.Err() != nil || !errors.Is(err, volume.ErrUnavailable) {
			break
		}
	}
	return err
}

func (s *Service) readySnapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error) {
	x, err := s.Snapshot(ctx, id)
	if err == nil && x.State != volume.Ready {
		err = fmt.Errorf("snapshot %s is not ready yet: %w", id, volume.ErrBusy)
	}
	return x, err
}
