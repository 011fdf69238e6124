package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// ErrUnderWay is returned by the Resume methods while a call works on the same thing: it is volume.ErrBusy.
var ErrUnderWay = fmt.Errorf("a call works on it: %w", volume.ErrBusy)

// Pending is what the reconciler has to look at: records in a state that must end, and limits that may not have reached
// their node.
type Pending struct {
	Volumes   []volume.ID
	Snapshots []volume.SnapshotID
	QoS       []volume.ID
}

// Pending lists what is unfinished, what calls are working on right now included.
func (s *Service) Pending(ctx context.Context) (Pending, error) {
	vs, ss, err := s.store.Unsettled(ctx)
	if err != nil {
		return Pending{}, err
	}
	p := Pending{Volumes: vs, Snapshots: ss}
	p.QoS, err = s.pendingQoS(ctx)
	return p, err
}

func (s *Service) pendingQoS(ctx context.Context) ([]volume.ID, error) {
	s.mu.Lock()
	fresh := s.staleQoS == nil
	if fresh {
		s.staleQoS = map[volume.ID]bool{}
	}
	s.mu.Unlock()
	if fresh { // whoever ran before may have failed to tell a node
		all, err := s.store.Volumes(ctx, "", 0)
		s.mu.Lock()
		if err != nil {
			s.staleQoS = nil
		}
		for _, v := range all {
			if v.Attachment != nil && err == nil {
				s.staleQoS[v.ID] = true
			}
		}
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []volume.ID
	for id := range s.staleQoS {
		ids = append(ids, id)
	}
	return ids, nil
}

// noteLimits finds limits that were changed since the last look: another controller may have failed to tell the node, and knows
// of that alone. The caller has mu.
func (s *Service) noteLimits(vs []volume.Volume) {
	now := map[volume.ID]volume.QoS{}
	for _, v := range vs {
		if v.Attachment == nil {
			continue
		}
		now[v.ID] = v.QoS
		if was, known := s.limits[v.ID]; known && was != v.QoS && s.staleQoS != nil {
			s.staleQoS[v.ID] = true
		}
	}
	s.limits = now
}

// ResumeVolume goes on with whatever is unfinished on a volume: creating, deleting, expanding, detaching, freeing replicas. It returns
// ErrUnderWay, and does nothing, while a call works on it.
func (s *Service) ResumeVolume(ctx context.Context, id volume.ID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.store.Volume(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	err = s.goOn(ctx, v)
	if v.State == volume.Ready && len(v.Leaving) > 0 { // last: a node that hangs, or is away, keeps nothing else waiting
		err = errors.Join(err, s.resumed(ctx, "replica.free", string(id), s.freeReplicas(ctx, v, v.Leaving)))
	}
	return err
}

// goOn is ResumeVolume but for replicas that leave. The caller has v's lock.
func (s *Service) goOn(ctx context.Context, v volume.Volume) error {
	id := v.ID
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	switch {
	case v.State == volume.Deleting:
		return s.resumed(ctx, "volume.free", string(id), s.completeDelete(ctx, v))
	case v.State == volume.Creating:
		_, err := s.completeCreate(ctx, v.ID, map[volume.PoolID]string{})
		if startOver(err) || definite(err) { // undone: whoever asked asks again
			s.record(ctx, "volume.create", string(id), takenUp, err)
			return nil
		}
		return s.resumed(ctx, "volume.create", string(id), err)
	case v.Attachment != nil && v.Attachment.Detaching:
		return s.resumed(ctx, "volume.detach", string(id), s.completeDetach(ctx, v))
	case v.Attachment == nil && v.Owner != "" && v.Kept == "" && !c.wanting(v): // the end of a copy is the end of its engine
		return s.resumed(ctx, "volume.close", string(id), s.closeEngine(ctx, v))
	case v.Target != 0:
		x, err := s.completeExpand(ctx, v)
		if err != nil && x.Target == 0 && x.Size < v.Target { // taken back
			s.record(ctx, "volume.expand", string(id), takenUp, err)
			return nil
		}
		return s.resumed(ctx, "volume.expand", string(id), err)
	}
	return nil
}

const takenUp = "unfinished work was taken up"

// resumed records work that has ended. An attempt that failed is none: what a node that is away makes fail again and
// again would drive everything else out of the log.
func (s *Service) resumed(ctx context.Context, action, object string, err error) error {
	if err == nil {
		s.record(ctx, action, object, takenUp, nil)
	}
	return err
}

// ResumeSnapshot frees a snapshot that is deleted or that was left unfinished: nobody was told of it; and copies that leave. It
// returns ErrUnderWay, and does nothing, while a call works on it.
func (s *Service) ResumeSnapshot(ctx context.Context, id volume.SnapshotID) error {
	unlock, ok := s.flights.tryLock(snapshotKey(string(id)))
	if !ok {
		return fmt.Errorf("snapshot %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	x, err := s.store.Snapshot(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	switch {
	case x.State == volume.Deleting:
		return s.resumed(ctx, "snapshot.free", string(id), s.completeDeleteSnapshot(ctx, x))
	case len(x.Leaving) > 0:
		return s.resumed(ctx, "snapshot.move", string(id), s.freeHolders(ctx, x))
	case x.State == volume.Creating:
		if x.Group != "" {
			return s.resumeGroup(ctx, x.Group)
		}
		return s.resumed(ctx, "snapshot.drop", string(id), s.abandonSnapshot(ctx, id, errors.New("the call that began it was cut off")))
	}
	return nil
}

// resumeGroup drops a group that was left unfinished.
func (s *Service) resumeGroup(ctx context.Context, id volume.GroupID) error {
	unlock, ok := s.flights.tryLock(groupKey(string(id)))
	if !ok {
		return fmt.Errorf("group %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	return s.resumed(ctx, "group.drop", string(id), s.abandonGroup(ctx, id, errors.New("the call that began it was cut off")))
}

// ResumeQoS tells the node of an attached volume its limits again. It returns ErrUnderWay, and does nothing, while a call
// works on it.
func (s *Service) ResumeQoS(ctx context.Context, id volume.ID) error {
	unlock, ok := s.flights.tryLock(volumeKey(string(id)))
	if !ok {
		return fmt.Errorf("volume %s: %w", id, ErrUnderWay)
	}
	defer unlock()
	v, err := s.live(ctx, id)
	if err != nil {
		s.forget(id)
		return ignoreNotFound(err)
	}
	return s.applyQoS(ctx, v)
}
