package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ExpandVolume grows a volume to at least required bytes and at most limit (0: none), where it is not that large already.
// volume.ErrOutOfRange: no such size. ErrQuota, ErrNoSpace: nothing was changed. After another error it may be half done:
// the same call goes on.
func (s *Service) ExpandVolume(ctx context.Context, id volume.ID, required, limit int64) (volume.Volume, error) {
	if _, err := s.live(ctx, id); err != nil {
		return volume.Volume{}, err
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	v, err := s.live(ctx, id)
	if err != nil {
		return volume.Volume{}, err
	}
	if limit > 0 && v.Size > limit {
		return volume.Volume{}, fmt.Errorf("volume %s has %d bytes, the limit is %d, and it cannot shrink: %w", id, v.Size, limit, volume.ErrOutOfRange)
	}
	target, err := chooseSize(max(required, 0), limit, volume.MinSize, 0)
	if err != nil {
		return volume.Volume{}, err
	}
	if required < 0 {
		return volume.Volume{}, fmt.Errorf("size %d is negative: %w", required, volume.ErrOutOfRange)
	}
	if required <= v.Size {
		return v, nil
	}
	if limit > 0 && v.Target > limit {
		return volume.Volume{}, fmt.Errorf("volume %s is being expanded to %d bytes, the limit is %d: %w", id, v.Target, limit, volume.ErrBusy)
	}
	x, err := s.proposeVolume(ctx, command.BeginExpand{Volume: id, Target: target})
	if err == nil {
		x.Volume, err = s.completeExpand(ctx, x.Volume)
	}
	s.record(ctx, "volume.expand", string(id), fmt.Sprintf("%d to %d bytes", v.Size, target), err)
	if err != nil {
		return volume.Volume{}, err
	}
	return x.Volume, nil
}

// completeExpand takes a volume to its Target. Nothing is exposed before all replicas have the size, and a refusal of one ends the
// expand: those that have grown are larger than what is exposed, with zeros at the end, which is nothing to anybody. The caller
// has the volume's lock.
func (s *Service) completeExpand(ctx context.Context, v volume.Volume) (volume.Volume, error) {
	if v.Target == 0 {
		return v, nil
	}
	if err := s.grow(ctx, v); err != nil {
		err = fmt.Errorf("expand volume %s: %w", v.ID, err)
		if !unresized(err) {
			return v, unfinished(err)
		}
		ctx, cancel := s.undoing(ctx)
		defer cancel()
		x, abort := s.proposeVolume(ctx, command.AbortExpand{Volume: v.ID, Target: v.Target})
		switch {
		case abort != nil:
			return v, fmt.Errorf("volume %s: an expand was refused (%v) and is not undone yet (%v): %w", v.ID, err, abort, volume.ErrUnavailable)
		case x.Volume.Size >= v.Target: // the engine was faster
			return x.Volume, unfinished(err)
		}
		if v.Owner != "" {
			if err := s.agents.OpenEngine(ctx, v.Owner, v.ID, v.Epoch); err != nil {
				s.o.Logger.Info("engine will learn later that an expand was given up", "volume", v.ID, "error", err)
			}
		}
		return x.Volume, err
	}
	x, err := s.proposeVolume(ctx, command.FinishExpand{Volume: v.ID, Size: v.Target, ConfigVersion: v.ConfigVersion})
	return x.Volume, unfinished(err)
}

// grow has every replica that is in sync grow to the Target: by the engine, where one runs. The others grow when they are
// brought up.
func (s *Service) grow(ctx context.Context, v volume.Volume) error {
	if v.Owner != "" {
		r := volume.Replica{Node: v.Owner}
		if i := slices.IndexFunc(v.Replicas, func(r volume.Replica) bool { return r.Node == v.Owner }); i >= 0 {
			r = v.Replicas[i]
		}
		return s.agents.ExpandVolume(ctx, r, v.ID, v.Epoch, v.Target)
	}
	rs := v.InSync()
	errs := make([]error, len(rs))
	var wg sync.WaitGroup
	for i, r := range rs {
		wg.Go(func() {
			if err := s.agents.ResizeReplica(ctx, r.Node, r.Pool, r.ID, v.Target); err != nil {
				errs[i] = fmt.Errorf("node %s: %w", r.Node, err)
			}
		})
	}
	wg.Wait()
	return worst(errs)
}

// unresized tells whether an error of ResizeReplica means that the replica was not grown.
func unresized(err error) bool {
	return errors.Is(err, volume.ErrNoSpace) || errors.Is(err, volume.ErrInvalid) || errors.Is(err, volume.ErrOutOfRange)
}

// ModifyVolume changes what is not nil, online: limits, and how many replicas there are to be, which is brought about in the
// background. volume.ErrInvalid: out of bounds, or they contradict each other; nothing was changed.
func (s *Service) ModifyVolume(ctx context.Context, id volume.ID, m Modify) (volume.Volume, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return volume.Volume{}, err
	}
	c := command.ModifyVolume{
		Volume: id, IOPS: m.IOPS, Bandwidth: m.Bandwidth, Replicas: m.Replicas, MinInSync: m.MinInSync, DataLocality: m.DataLocality,
	}
	if err := command.CheckQoS(m.IOPS, m.Bandwidth); err != nil {
		return volume.Volume{}, err
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	x, err := s.proposeVolume(ctx, c)
	if err != nil || x.Volume.QoS != v.QoS || x.Volume.Parameters != v.Parameters {
		s.record(ctx, "volume.modify", string(id), modification(v, m), err)
	}
	if err != nil {
		return volume.Volume{}, err
	}
	if err := s.applyQoS(ctx, x.Volume); err != nil {
		s.o.Logger.Warn("limits are set, the node will get them later", "volume", id, "error", err)
	}
	return x.Volume, nil
}

// applyQoS tells the node of an attached volume its limits, and remembers where that failed.
func (s *Service) applyQoS(ctx context.Context, v volume.Volume) error {
	var err error
	if v.Attachment != nil {
		err = s.agents.SetQoS(ctx, v.Attachment.Node, v.ID, v.Epoch, v.QoS)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.staleQoS == nil {
		return err // the first pass of the reconciler looks at all
	}
	if err != nil {
		s.staleQoS[v.ID] = true
	} else {
		delete(s.staleQoS, v.ID)
	}
	return err
}

// forget drops what is remembered of a volume that is not attached any more.
func (s *Service) forget(id volume.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.staleQoS, id)
}

// SetFilesystem is SetFilesystemBy for a node of this process.
func (s *Service) SetFilesystem(ctx context.Context, id volume.ID, fs volume.Filesystem) error {
	return s.SetFilesystemBy(ctx, "", id, fs)
}

// SetFilesystemBy moves the record that gates mkfs, only forward: volume.ErrInUse where it says Formatted already, ErrDenied
// where the volume is not attached to the node that asks.
func (s *Service) SetFilesystemBy(ctx context.Context, node volume.NodeID, id volume.ID, fs volume.Filesystem) error {
	if _, err := s.live(ctx, id); err != nil {
		return err
	}
	return s.propose(ctx, command.SetFilesystem{Volume: id, Node: node, Filesystem: fs})
}

// modification says what is asked to change, and from what.
func modification(v volume.Volume, m Modify) string {
	p, all := v.Parameters, []string(nil)
	if m.IOPS != nil {
		all = append(all, fmt.Sprintf("IOPS %d to %d", v.QoS.IOPS, *m.IOPS))
	}
	if m.Bandwidth != nil {
		all = append(all, fmt.Sprintf("bandwidth %d to %d bytes per second", v.QoS.Bandwidth, *m.Bandwidth))
	}
	if m.Replicas != nil {
		all = append(all, fmt.Sprintf("replicas %d to %d", p.Replicas, *m.Replicas))
	}
	if m.MinInSync != nil {
		all = append(all, fmt.Sprintf("minInSync %d to %d", p.MinInSync, *m.MinInSync))
	}
	if m.DataLocality != nil {
		all = append(all, fmt.Sprintf("dataLocality %s to %.64s", p.DataLocality, string(*m.DataLocality)))
	}
	return strings.Join(all, ", ")
}
