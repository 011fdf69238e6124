package control

import (
	"context"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Volume returns a volume that is Creating or Ready; volume.ErrNotFound where there is none.
func (s *Service) Volume(ctx context.Context, id volume.ID) (volume.Volume, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return volume.Volume{}, err
	}
	return v, nil
}

// Volumes lists volumes in order of id, and the token of the next page or "". volume.ErrStale: the token is none.
func (s *Service) Volumes(ctx context.Context, p Page) ([]volume.Volume, string, error) {
	return list(p, volumePrefix,
		func(after string, n int) ([]volume.Volume, error) { return s.store.Volumes(ctx, volume.ID(after), n) },
		func(v volume.Volume) (string, bool) {
			return string(v.ID), v.Kept == "" && (p.All || v.State != volume.Deleting)
		})
}

// Snapshot returns a snapshot that is Creating or Ready; volume.ErrNotFound where there is none.
func (s *Service) Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error) {
	x, err := s.store.Snapshot(ctx, id)
	if err == nil && (x.State == volume.Deleting || x.Hidden) {
		err = fmt.Errorf("snapshot %s does not exist: %w", id, volume.ErrNotFound)
	}
	if err != nil {
		return volume.Snapshot{}, err
	}
	return x, nil
}

// Snapshots lists snapshots in order of id, and the token of the next page or "". An unknown id in the filter is an empty
// list. volume.ErrStale: the token is none.
func (s *Service) Snapshots(ctx context.Context, f SnapshotFilter, p Page) ([]volume.Snapshot, string, error) {
	return list(p, snapshotPrefix,
		func(after string, n int) ([]volume.Snapshot, error) {
			if f.Snapshot == "" {
				return s.store.Snapshots(ctx, f.Volume, volume.SnapshotID(after), n)
			}
			x, err := s.store.Snapshot(ctx, f.Snapshot)
			if err != nil {
				return nil, ignoreNotFound(err)
			}
			if (f.Volume != "" && x.Volume != f.Volume) || string(x.ID) <= after {
				return nil, nil
			}
			return []volume.Snapshot{x}, nil
		},
		func(x volume.Snapshot) (string, bool) {
			return string(x.ID), p.All || x.State == volume.Ready && !x.Hidden
		})
}

// list reads one page; fetch returns at most n items after an id, n 0 all; what tells an item's id and whether it is shown.
func list[T any](p Page, prefix string, fetch func(after string, n int) ([]T, error), what func(T) (id string, shown bool)) ([]T, string, error) {
	if p.Max < 0 {
		return nil, "", fmt.Errorf("page of %d entries: %w", p.Max, volume.ErrInvalid)
	}
	if p.Token != "" && !wellFormed(p.Token, prefix) {
		return nil, "", fmt.Errorf("page token %.64q was not given out; list from the beginning: %w", p.Token, volume.ErrStale)
	}
	ask := 0
	if p.Max > 0 {
		ask = min(p.Max, 1000) + 1
	}
	page := []T{}
	last, after := "", p.Token
	for {
		batch, err := fetch(after, ask)
		if err != nil {
			return nil, "", err
		}
		for _, x := range batch {
			id, shown := what(x)
			after = id
			if !shown {
				continue
			}
			if p.Max > 0 && len(page) == p.Max {
				return page, last, nil
			}
			page, last = append(page, x), id
		}
		if ask == 0 || len(batch) < ask {
			return page, "", nil
		}
	}
}

// Capacity says how much may be placed, by the same rules as CreateVolume.
func (s *Service) Capacity(ctx context.Context, q CapacityQuery) (Capacity, error) {
	p, err := normaliseParameters(q.Parameters, false)
	if err != nil {
		return Capacity{}, err
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return Capacity{}, err
	}
	view := c.view()
	if err := s.settling(c); err != nil && (c.silent[q.Node] != "" || len(c.silent) == len(c.nodes)) {
		return Capacity{}, err
	}
	r := placement.Request{Replicas: p.Replicas, Pool: p.Pool, Locality: p.DataLocality}
	if q.Node != "" {
		// Where a replica is to be near, a node with pools is asked for what it holds itself, so that the orchestrator finds
		// another when they are full. One without can use what is elsewhere.
		remote := slices.ContainsFunc(view.Nodes, func(n volume.Node) bool {
			return n.ID == q.Node && (len(n.Pools) == 0 || p.DataLocality == volume.LocalityNone)
		})
		if !remote || p.DataLocality == volume.LocalityRequired {
			r.Local = q.Node
		}
	}
	available, largest := placement.Capacity(view, r)
	least := minimum(p, []volume.Capability{{Access: volume.AccessMount}})
	if largest < least {
		largest = 0 // a create of that size would be rounded up to the least, and find no room
	}
	return Capacity{Available: available, MaximumVolume: largest, MinimumVolume: least}, nil
}

// Nodes lists the nodes in order of id.
func (s *Service) Nodes(ctx context.Context) ([]volume.Node, error) { return s.store.Nodes(ctx) }

// Node returns a node; volume.ErrNotFound where there is none.
func (s *Service) Node(ctx context.Context, id volume.NodeID) (volume.Node, error) {
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return volume.Node{}, err
	}
	for _, n := range nodes {
		if n.ID == id {
			return n, nil
		}
	}
	return volume.Node{}, fmt.Errorf("node %.256q does not exist: %w", id, volume.ErrNotFound)
}

// Quotas lists the tenants that have limits or use anything, in order.
func (s *Service) Quotas(ctx context.Context) ([]volume.Quota, error) { return s.store.Quotas(ctx) }

// SetQuota sets a tenant's limits; zero is no limit. What is in use already stays, more is refused.
func (s *Service) SetQuota(ctx context.Context, tenant string, limit volume.Amounts) error {
	err := s.propose(ctx, command.SetQuota{Tenant: tenant, Limit: limit})
	s.record(ctx, "quota.set", tenant, fmt.Sprintf("logical %d bytes, physical %d bytes, volumes %d, snapshots %d (0: no limit)",
		limit.LogicalBytes, limit.PhysicalBytes, limit.Volumes, limit.Snapshots), err)
	return err
}

// DeleteQuota lifts a tenant's limits; a tenant without any is nil.
func (s *Service) DeleteQuota(ctx context.Context, tenant string) error {
	err := s.propose(ctx, command.DeleteQuota{Tenant: tenant})
	s.record(ctx, "quota.delete", tenant, "", err)
	return err
}
