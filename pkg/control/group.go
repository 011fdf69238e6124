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

// CreateGroup cuts snapshots of several volumes at one instant and returns them Ready: all volumes hold their writes, then
// all are cut, then all go on. The same name and volumes again return the same ones. volume.ErrNotFound: a volume.
// ErrExists: the name has other volumes. ErrInvalid, ErrQuota, ErrNoSpace. Of what was not finished nothing is left, or
// will be, and nobody is told of it.
func (s *Service) CreateGroup(ctx context.Context, r CreateGroup) (Group, error) {
	if err := volume.CheckName("group name", r.Name); err != nil {
		return Group{}, err
	}
	r.Volumes = slices.Clone(r.Volumes)
	slices.Sort(r.Volumes)
	r.Volumes = slices.Compact(r.Volumes)
	if len(r.Volumes) == 0 || len(r.Volumes) > volume.MaxGroup {
		return Group{}, fmt.Errorf("group of %d volumes, 1 to %d are possible: %w", len(r.Volumes), volume.MaxGroup, volume.ErrInvalid)
	}
	unlock, err := s.flights.lock(ctx, groupNameKey(r.Name))
	if err != nil {
		return Group{}, err
	}
	defer unlock()
	for n := 1; ; n++ {
		g, made, err := s.groupOnce(ctx, r)
		if startOver(err) && n < starts {
			continue
		}
		if made || err != nil {
			s.record(ctx, "group.create", objectOf(g.ID, r.Name), fmt.Sprintf("name %q of %d volumes", r.Name, len(r.Volumes)), err)
		}
		if err != nil {
			return Group{}, err
		}
		return g, nil
	}
}

func (s *Service) groupOnce(ctx context.Context, r CreateGroup) (g Group, made bool, err error) {
	begin := command.BeginGroup{Now: s.now(), Name: r.Name, Volumes: r.Volumes, Freeze: r.Freeze}
	for i := range len(r.Volumes) + 1 {
		random, err := newID()
		if err != nil {
			return g, false, err
		}
		if i == 0 {
			begin.ID = volume.GroupID(groupPrefix + random)
		} else {
			begin.IDs = append(begin.IDs, volume.SnapshotID(snapshotPrefix+random))
		}
	}
	var unlocks []func()
	defer func() {
		for _, f := range slices.Backward(unlocks) {
			f()
		}
	}()
	lock := func(key string) error {
		unlock, err := s.flights.lock(ctx, key)
		if err == nil {
			unlocks = append(unlocks, unlock)
		}
		return err
	}
	// All of them are locked in order of the volumes, so that two groups do not wait for each other.
	if err := lock(groupKey(string(begin.ID))); err != nil {
		return g, false, err
	}
	for _, id := range begin.IDs {
		if err := lock(snapshotKey(string(id))); err != nil {
			return g, false, err
		}
	}
	res, err := s.proposeGroup(ctx, begin)
	if errors.Is(err, volume.ErrBusy) { // perhaps for want of engines
		for _, id := range r.Volumes {
			done, err := s.withEngine(ctx, id)
			if err != nil {
				return g, false, fmt.Errorf("group snapshot of volume %s: %w", id, unfinished(err))
			}
			unlocks = append(unlocks, done)
		}
		for _, id := range r.Volumes {
			if err := lock(cutKey(string(id))); err != nil {
				return g, false, err
			}
		}
		if res, err = s.proposeGroup(ctx, begin); errors.Is(err, volume.ErrBusy) {
			return g, false, again{err}
		}
	}
	if err != nil {
		return g, false, err
	}
	g = Group{res.Group, res.Snapshots}
	switch {
	case !slices.Equal(g.Volumes, r.Volumes) || g.Freeze != r.Freeze:
		return g, false, fmt.Errorf("group snapshot %s has the name %q and is of other volumes, or cut in another way: %w", g.ID, g.Name, volume.ErrExists)
	case g.State == volume.Ready:
		return g, false, nil
	case !res.Created:
		if err := lock(groupKey(string(g.ID))); err != nil {
			return g, false, err
		}
		if err := s.abandonGroup(ctx, g.ID, errors.New("the call that began it was cut off")); err != nil {
			return g, false, err
		}
		return g, false, again{fmt.Errorf("group snapshot %s was left unfinished; try again: %w", g.ID, volume.ErrBusy)}
	}
	cuts, err := s.cutTogether(ctx, g.Members)
	if err == nil {
		if res, err = s.proposeGroup(ctx, command.FinishGroup{Group: g.ID, Cuts: cuts}); errors.Is(err, volume.ErrNotFound) {
			err = fmt.Errorf("group snapshot %s was taken for unfinished by another controller, and dropped: %w", g.ID, volume.ErrBusy)
		}
	}
	switch {
	case err == nil:
		return Group{res.Group, res.Snapshots}, true, nil
	case !errors.Is(err, volume.ErrBusy) && !definite(err):
		return g, true, unfinished(err)
	}
	if undo := s.abandonGroup(ctx, g.ID, err); undo != nil {
		return g, true, undo
	}
	if errors.Is(err, volume.ErrBusy) {
		err = again{err}
	}
	return g, true, err
}

// cutTogether holds the writes of all volumes, has all snapshots cut, and lets the writes go on, whatever happens.
func (s *Service) cutTogether(ctx context.Context, xs []volume.Snapshot) ([]command.Cut, error) {
	cuts := make([]command.Cut, len(xs))
	each := func(what string, f func(i int, node volume.NodeID, spec SnapshotSpec) error) error {
		errs := make([]error, len(xs))
		var wg sync.WaitGroup
		for i, x := range xs {
			wg.Go(func() {
				node, spec, err := s.cutter(ctx, x)
				if err == nil {
					err = f(i, node, spec)
				}
				if err != nil {
					errs[i] = fmt.Errorf("%s volume %s for snapshot %s: %w", what, x.Volume, x.ID, err)
				}
			})
		}
		wg.Wait()
		return worst(errs)
	}
	defer func() {
		ctx, cancel := s.undoing(ctx)
		defer cancel()
		_ = each("let go on", func(_ int, node volume.NodeID, spec SnapshotSpec) error {
			if spec.Barrier.Number == 0 {
				return nil
			}
			return s.agents.Release(ctx, node, spec) // else the engine does it by itself after a second
		})
	}()
	err := each("hold the writes of", func(_ int, node volume.NodeID, spec SnapshotSpec) error {
		if spec.Barrier.Number == 0 {
			return nil // nobody writes: an attach would begin another epoch, in which the group is not finished
		}
		return s.agents.Drain(ctx, node, spec)
	})
	if err == nil {
		err = each("cut", func(i int, node volume.NodeID, spec SnapshotSpec) error {
			holders, err := s.agents.CutSnapshot(ctx, node, spec)
			cuts[i] = command.Cut{Snapshot: spec.ID, Number: spec.Barrier.Number, ConfigVersion: spec.Barrier.ConfigVersion, Holders: holders}
			return err
		})
	}
	return cuts, err
}

// worst is the error that says most: a final one, one for which starting over may help, any other, nil.
func worst(errs []error) error {
	for _, is := range []func(error) bool{definite, func(err error) bool { return errors.Is(err, volume.ErrBusy) }, func(err error) bool { return err != nil }} {
		if i := slices.IndexFunc(errs, is); i >= 0 {
			return errs[i]
		}
	}
	return nil
}

// abandonGroup undoes a group that nobody was told of; one that has been finished meanwhile stays. nil: nothing unfinished is left
// of it. Otherwise the reconciler goes on, and the error is not a final one. The caller has its lock.
func (s *Service) abandonGroup(ctx context.Context, id volume.GroupID, cause error) error {
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	res, err := s.proposeGroup(ctx, command.BeginDeleteGroup{Group: id, Unfinished: true})
	if errors.Is(err, volume.ErrNotFound) || err == nil && res.Group.State == volume.Ready {
		return nil
	}
	if err == nil {
		err = s.freeGroup(ctx, res.Snapshots)
	}
	if err != nil {
		return fmt.Errorf("group snapshot %s is dropped (%v) and still being undone (%v): %w", id, cause, err, volume.ErrUnavailable)
	}
	return nil
}

// freeGroup frees the members of a group with a tombstone; with the last of them the group is forgotten.
func (s *Service) freeGroup(ctx context.Context, xs []volume.Snapshot) error {
	errs := make([]error, len(xs))
	for i, x := range xs {
		errs[i] = s.completeDeleteSnapshot(ctx, x)
	}
	return errors.Join(errs...)
}

// Group returns a group snapshot that is Creating or Ready; volume.ErrNotFound where there is none.
func (s *Service) Group(ctx context.Context, id volume.GroupID) (Group, error) {
	g, xs, err := s.store.Group(ctx, id)
	if err == nil && g.State == volume.Deleting {
		err = fmt.Errorf("group snapshot %s does not exist: %w", id, volume.ErrNotFound)
	}
	if err != nil {
		return Group{}, err
	}
	return Group{g, xs}, nil
}

// Groups lists the group snapshots in order of id, in every state.
func (s *Service) Groups(ctx context.Context) ([]Group, error) {
	gs, err := s.store.Groups(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]Group, 0, len(gs))
	for _, g := range gs {
		g, xs, err := s.store.Group(ctx, g.ID)
		if errors.Is(err, volume.ErrNotFound) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, Group{g, xs})
	}
	return list, nil
}

// DeleteGroup deletes a group and all its snapshots; one that does not exist is nil. Nil means that the tombstones are
// durable; the space follows when its nodes answer. It returns volume.ErrInUse while a volume is made from one of them.
func (s *Service) DeleteGroup(ctx context.Context, id volume.GroupID) error {
	g, err := s.Group(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	unlock, err := s.flights.lock(ctx, groupKey(string(id)))
	if err != nil {
		return err
	}
	defer unlock()
	res, err := s.proposeGroup(ctx, command.BeginDeleteGroup{Group: id})
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	s.record(ctx, "group.delete", string(id), fmt.Sprintf("name %q of %d volumes", g.Name, len(g.Volumes)), err)
	if err != nil {
		return err
	}
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	if err := s.freeGroup(ctx, res.Snapshots); err != nil {
		s.o.Logger.Warn("group snapshot is deleted, its space will be freed later", "group", id, "error", err)
	}
	return nil
}

func (s *Service) proposeGroup(ctx context.Context, c command.Command) (command.Group, error) {
	r, err := s.store.Propose(ctx, c)
	if err != nil {
		return command.Group{}, err
	}
	g, ok := r.(command.Group)
	if !ok {
		return command.Group{}, fmt.Errorf("the state machine answered %T to %T", r, c)
	}
	return g, nil
}
