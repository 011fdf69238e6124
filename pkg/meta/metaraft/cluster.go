package metaraft

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Group implements control.Store.
func (s *Store) Group(ctx context.Context, id volume.GroupID) (volume.Group, []volume.Snapshot, error) {
	type group struct {
		volume.Group
		members []volume.Snapshot
	}
	g, err := read(ctx, s, func() (group, error) {
		g, members, err := s.m.Group(ctx, id)
		return group{g, members}, err
	})
	return g.Group, g.members, err
}

// Groups implements control.Store.
func (s *Store) Groups(ctx context.Context) ([]volume.Group, error) {
	return read(ctx, s, func() ([]volume.Group, error) { return s.m.Groups(ctx) })
}

// JoinTokens implements control.Store.
func (s *Store) JoinTokens(ctx context.Context) ([]jointoken.Record, error) {
	return read(ctx, s, func() ([]jointoken.Record, error) { return s.m.JoinTokens(ctx) })
}

// RemovedNodes implements control.Store.
func (s *Store) RemovedNodes(ctx context.Context) ([]volume.NodeID, error) {
	return read(ctx, s, func() ([]volume.NodeID, error) { return s.m.RemovedNodes(ctx) })
}

// Generations implements control.Store.
func (s *Store) Generations(ctx context.Context) (map[volume.NodeID]uint64, error) {
	return read(ctx, s, func() (map[volume.NodeID]uint64, error) { return s.m.Generations(ctx) })
}
