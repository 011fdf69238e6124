package meta

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Group returns a group snapshot in any state, with its members.
func (m *Machine) Group(ctx context.Context, id volume.GroupID) (g volume.Group, list []volume.Snapshot, err error) {
	if len(id) > volume.MaxNameLen {
		return g, nil, fmt.Errorf("group snapshot %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	err = m.read(ctx, func(r *reader) error {
		var ok bool
		if g, ok = load[volume.Group](r.view, groups+string(id)); !ok {
			return fmt.Errorf("group snapshot %.128q does not exist: %w", id, volume.ErrNotFound)
		}
		list = members(r.view, g)
		for i := range list {
			list[i] = r.located(list[i])
		}
		return nil
	})
	return g, list, err
}

// Groups returns the group snapshots in every state, in order of id.
func (m *Machine) Groups(ctx context.Context) (list []volume.Group, err error) {
	return all[volume.Group](ctx, m, groups)
}

// JoinTokens returns the join tokens in order of id.
func (m *Machine) JoinTokens(ctx context.Context) ([]jointoken.Record, error) {
	return all[jointoken.Record](ctx, m, joinTokens)
}

func all[T any](ctx context.Context, m *Machine, prefix string) (list []T, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(prefix, "", func(_ string, b []byte) (bool, error) {
			rec, err := decode[T](b)
			list = append(list, rec)
			return true, err
		})
	})
	return list, err
}

// RemovedNodes returns the ids of nodes that were removed and may not come back as they are, in order.
func (m *Machine) RemovedNodes(ctx context.Context) (list []volume.NodeID, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(removedNodes, "", func(id string, _ []byte) (bool, error) {
			list = append(list, volume.NodeID(id))
			return true, nil
		})
	})
	return list, err
}

// Generations returns how many joined under the name of each node: those before the last of them are refused.
func (m *Machine) Generations(ctx context.Context) (map[volume.NodeID]uint64, error) {
	list := map[volume.NodeID]uint64{}
	err := m.read(ctx, func(r *reader) error {
		return r.scan(generations, "", func(id string, b []byte) (more bool, err error) {
			list[volume.NodeID(id)], err = decode[uint64](b)
			return true, err
		})
	})
	return list, err
}
