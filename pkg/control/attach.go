package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Attach gives a volume to a node; the same request again returns the same. volume.ErrNotFound: volume or node.
// ErrInUse: attached to another node, which is named. ErrExists: attached to this node with another capability or
// readonly flag. ErrInvalid: no volume has the capability. ErrBusy: not made yet. ErrNoSpace: the node has
// volume.MaxAttached volumes.
func (s *Service) Attach(ctx context.Context, r Attach) (volume.Volume, error) {
	if err := CheckCapability(r.Capability); err != nil {
		return volume.Volume{}, err
	}
	if _, err := s.live(ctx, r.Volume); err != nil {
		return volume.Volume{}, err
	}
	if r.Node == "" || len(r.Node) > volume.MaxNodeIDLen {
		return volume.Volume{}, fmt.Errorf("node %.64q does not exist: %w", r.Node, volume.ErrNotFound)
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(r.Volume)))
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	v, err := s.live(ctx, r.Volume)
	if err == nil && v.Attachment == nil {
		err = s.closeEngine(ctx, v) // so that the next one need not wait for its lease
	}
	if err != nil {
		return volume.Volume{}, err
	}
	if v.Attachment != nil && v.Attachment.Detaching {
		if err := s.completeDetach(ctx, v); err != nil {
			return volume.Volume{}, fmt.Errorf("volume %s is still being detached from node %s (%v); try again when it is: %w", v.ID, v.Attachment.Node, err, volume.ErrInUse)
		}
	}
	x, err := s.proposeVolume(ctx, command.Attach{Now: s.now(), Volume: r.Volume, Node: r.Node, ReadOnly: r.ReadOnly, Capability: r.Capability})
	if x.Created || err != nil {
		s.record(ctx, "volume.attach", string(r.Volume), fmt.Sprintf("node %s, readonly %t", r.Node, r.ReadOnly), err)
	}
	if err != nil {
		return volume.Volume{}, err
	}
	return x.Volume, nil
}

// Detach takes a volume from a node ("": from whichever has it). Nil means that nothing which that node's workloads
// write reaches the volume any more. It is nil too where the volume or the node does not exist or they are not attached.
func (s *Service) Detach(ctx context.Context, id volume.ID, node volume.NodeID) error {
	if _, err := s.live(ctx, id); err != nil {
		return ignoreNotFound(err)
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return err
	}
	defer unlock()
	v, err := s.live(ctx, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if v.Attachment == nil || (node != "" && v.Attachment.Node != node) {
		return nil
	}
	err = s.completeDetach(ctx, v)
	s.record(ctx, "volume.detach", string(id), fmt.Sprintf("node %s", v.Attachment.Node), err)
	return err
}

func (s *Service) knows(ctx context.Context, id volume.NodeID) (bool, error) {
	nodes, err := s.store.Nodes(ctx)
	for _, n := range nodes {
		if n.ID == id {
			return true, nil
		}
	}
	return false, err
}

func ignoreNotFound(err error) error {
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	return err
}
