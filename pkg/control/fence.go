package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// completeDetach ends the attachment that v shows. Its node is asked to end the volume's engine, and waited for, but not for
// ever. Where it does not, and a replica that is in sync answers, the engine is forced out: the epoch rises, that replica
// refuses it from then on, so that none of its writes can be acknowledged any more, and its lease is waited out, so that it
// cannot serve reads either. The caller has v's lock.
func (s *Service) completeDetach(ctx context.Context, v volume.Volume) error {
	// Marked first: between the end of the engine and that of the attachment the node must not begin anew.
	a := v.Attachment
	x, err := s.proposeVolume(ctx, command.BeginDetach{Volume: v.ID, Epoch: a.Epoch})
	if err != nil {
		return ignoreNotFound(err)
	}
	if now := x.Volume.Attachment; now == nil || now.Epoch != a.Epoch {
		return nil // ended meanwhile
	}
	v = x.Volume
	clean := false
	if v.Owner != "" {
		clean, err = s.endEngine(ctx, v.Owner, v)
		if err != nil && (ctx.Err() != nil || !s.answers(ctx, v)) {
			return fmt.Errorf("volume %s cannot be fenced on node %s: %w", v.ID, a.Node, unfinished(err))
		}
		if err != nil {
			s.o.Logger.Warn("node does not end its engine; it is fenced at the replicas", "volume", v.ID, "node", a.Node, "error", err)
			if x, err = s.proposeVolume(ctx, command.ForceDetach{Volume: v.ID, Epoch: a.Epoch, Silent: errors.Is(err, volume.ErrUnavailable) && !errors.Is(err, errSlow)}); err != nil {
				return ignoreNotFound(err)
			}
			v = x.Volume
		}
	}
	if v.Owner == "" {
		if err := s.fence(ctx, v); err != nil {
			// Its node may have ended it since it was forced out.
			if _, e := s.endEngine(ctx, a.Node, v); e != nil {
				return err
			}
		}
	}
	return s.finishDetach(ctx, v.ID, a.Epoch, clean)
}

func (s *Service) finishDetach(ctx context.Context, id volume.ID, epoch volume.Epoch, clean bool) error {
	if err := s.propose(ctx, command.FinishDetach{Volume: id, Epoch: epoch, Clean: clean}); err != nil {
		return ignoreNotFound(err)
	}
	s.forget(id)
	return nil
}

// answers tells whether a replica that is in sync can be asked, so that it can be fenced too. The engine's own node may have
// it: one that cannot end an engine can still refuse what the engine writes.
func (s *Service) answers(ctx context.Context, v volume.Volume) bool {
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	var there atomic.Bool
	var wg sync.WaitGroup
	for _, r := range v.InSync() {
		wg.Go(func() {
			if x, err := s.agents.Inspect(limit, r, v.ID); err == nil && x.Present {
				there.Store(true)
				cancel() // one is enough
			}
		})
	}
	wg.Wait()
	return there.Load()
}

// abandon ends the attachment of a volume whose data, or what its newest replicas have of it, an admin gives up. Where it
// cannot be ended as completeDetach does, its node must have been silent for long: the epoch rises, which the node's engine
// finds out as soon as it reaches a controller or a replica of a later epoch, and until then it reaches only replicas that
// nobody else does (docs/adr/0008). volume.ErrUnavailable: the node still reports. The caller has v's lock.
func (s *Service) abandon(ctx context.Context, v volume.Volume) error {
	a := v.Attachment
	if a == nil {
		return nil
	}
	failed := s.completeDetach(ctx, v)
	if failed == nil {
		return nil
	}
	gone, err := s.gone(ctx, a.Node)
	if err != nil {
		return err
	}
	if !gone {
		return fmt.Errorf("node %s still reports and may run the engine of volume %s (%v); end ballastd there and wait until the node counts as down, in %s, or let it end the engine: %w",
			a.Node, v.ID, failed, s.o.NodeTimeout, volume.ErrUnavailable)
	}
	if _, err := s.proposeVolume(ctx, command.ForceDetach{Volume: v.ID, Epoch: a.Epoch}); err != nil {
		return ignoreNotFound(err)
	}
	return s.finishDetach(ctx, v.ID, a.Epoch, false)
}

// gone tells whether a node is not known, or has been silent for so long that it counts as down.
func (s *Service) gone(ctx context.Context, id volume.NodeID) (bool, error) {
	c, err := s.cluster(ctx)
	return c.gone(id), err
}

func (c cluster) gone(id volume.NodeID) bool {
	return c.silent[id] != "" || !slices.ContainsFunc(c.nodes, func(n volume.Node) bool { return n.ID == id })
}

// endEngine has a node end the engine of a volume that it runs. A node that is not known answers nothing, and none is waited for
// longer than it takes one that is well; one that is silent, or answers nothing else meanwhile, hardly.
func (s *Service) endEngine(ctx context.Context, node volume.NodeID, v volume.Volume) (clean bool, err error) {
	c, err := s.cluster(ctx)
	if err != nil {
		return false, err
	}
	if !slices.ContainsFunc(c.nodes, func(n volume.Node) bool { return n.ID == node }) {
		return false, fmt.Errorf("node %s is not known any more: %w", node, volume.ErrUnavailable)
	}
	patience, why := s.o.EndTimeout, fmt.Errorf("node %s has not ended its engine in %s: %w", node, s.o.EndTimeout, errSlow)
	if silent := c.silent[node]; silent != "" {
		patience, why = s.o.FenceTimeout, fmt.Errorf("%s, nor does it answer: %w", silent, volume.ErrUnavailable)
	}
	limit, cancel := context.WithTimeoutCause(ctx, patience, why)
	defer cancel()
	limit, giveUp := context.WithCancelCause(limit)
	var asked sync.WaitGroup
	defer asked.Wait()
	defer giveUp(nil)
	asked.Go(func() {
		soon, cancel := context.WithTimeout(limit, s.o.FenceTimeout)
		defer cancel()
		if _, err := s.agents.Observe(soon, node, nil); err != nil && soon.Err() != nil {
			giveUp(fmt.Errorf("node %s does not answer: %w", node, volume.ErrUnavailable))
		}
	})
	clean, err = s.agents.Detach(limit, node, v.ID, v.Epoch)
	if err != nil && limit.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w (%v)", context.Cause(limit), err)
	}
	return clean, err
}

// errSlow: a node that may well be reached does not end its engine.
var errSlow = fmt.Errorf("it takes too long: %w", volume.ErrUnavailable)

// fence has the replicas of a volume refuse every engine of a lower epoch, and waits until none of those can serve reads.
// One replica that is in sync is enough: without it no write is acknowledged, and no read is served once its lease is
// over. The others are fenced too if they answer; who attaches next fences them again.
func (s *Service) fence(ctx context.Context, v volume.Volume) error {
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	var asked sync.WaitGroup
	defer asked.Wait()
	defer cancel()
	rs := v.InSync()
	type answer struct {
		node  volume.NodeID
		until time.Time // the lease is over
		err   error
	}
	answers := make(chan answer, len(rs))
	expected := 0 // answers that are waited for: those of a node that is known to be silent are not, if there is another
	for _, r := range rs {
		if r.Node != v.Silent {
			expected++
		}
		asked.Go(func() {
			lease, err := s.agents.Fence(limit, r, v.ID, v.Epoch)
			answers <- answer{r.Node, time.Now().Add(min(lease, maxLease)), err}
		})
	}
	var errs []error
	var until time.Time
	for fenced := false; expected > 0 || !fenced; {
		a := <-answers
		if a.node != v.Silent {
			expected--
		}
		if a.err == nil {
			fenced = true
			if a.until.After(until) {
				until = a.until
			}
		} else if errs = append(errs, a.err); len(errs) == len(rs) {
			return fmt.Errorf("volume %s: no replica that is in sync can be fenced (%v): %w", v.ID, errors.Join(errs...), volume.ErrUnavailable)
		}
	}
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxLease bounds what is waited for at a replica's word.
const maxLease = time.Minute

// openEngine has a node with a replica that is in sync run the engine of a volume that is not attached, and returns the
// record of its epoch. The caller has the volume's lock.
func (s *Service) openEngine(ctx context.Context, v volume.Volume) (volume.Volume, error) {
	c, err := s.cluster(ctx)
	if err != nil {
		return v, err
	}
	if v.Owner != "" && (v.Attachment != nil || !c.gone(v.Owner)) {
		return v, s.agents.OpenEngine(ctx, v.Owner, v.ID, v.Epoch)
	}
	if err := s.closeEngine(ctx, v); err != nil {
		return v, err
	}
	why := error(nil)
	for _, r := range v.InSync() {
		if silent := c.silent[r.Node]; silent != "" {
			why = errors.Join(why, fmt.Errorf("replica %s: %s", r.ID, silent))
			continue
		}
		x, err := s.proposeVolume(ctx, command.OpenEngine{Volume: v.ID, Node: r.Node})
		if err != nil {
			return v, err
		}
		v = x.Volume
		if err = s.agents.OpenEngine(ctx, r.Node, v.ID, v.Epoch); err == nil {
			return s.store.Volume(ctx, v.ID) // the in-sync set may be another one
		}
		why = errors.Join(why, fmt.Errorf("replica %s: %w", r.ID, err))
		if err := s.closeEngine(ctx, v); err != nil {
			return v, err
		}
	}
	return v, fmt.Errorf("volume %s: no node can look after it now (%v): %w", v.ID, why, volume.ErrUnavailable)
}

// closeEngine ends what openEngine began, cleanly if its node answers. The caller has the volume's lock.
func (s *Service) closeEngine(ctx context.Context, v volume.Volume) error {
	if v.Owner == "" || v.Attachment != nil {
		return nil
	}
	// Its node may have begun an epoch of its own.
	v, err := s.store.Volume(ctx, v.ID)
	if err != nil || v.Owner == "" || v.Attachment != nil {
		return ignoreNotFound(err)
	}
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	clean, err := s.endEngine(limit, v.Owner, v)
	now, readErr := s.store.Volume(ctx, v.ID)
	if readErr != nil {
		return ignoreNotFound(readErr)
	}
	// An engine that its node has begun meanwhile has not ended.
	clean = clean && err == nil && now.Epoch == v.Epoch
	return s.propose(ctx, command.CloseEngine{Volume: v.ID, Epoch: now.Epoch, Clean: clean})
}
