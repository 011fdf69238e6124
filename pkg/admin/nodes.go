package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// silent tells whether a node has not reported for so long that it counts as away.
func (s *Service) silent(n volume.Node) bool {
	return s.o.Now().Sub(time.Unix(0, int64(n.LastSeen))) > silentAfter
}

// nodes returns all of them with what they hold.
func (s *Service) nodes(ctx context.Context) ([]*adminpb.Node, error) {
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	held := map[volume.NodeID]*holdings{}
	for _, n := range ns {
		held[n.ID] = &holdings{}
	}
	count := func(id volume.NodeID, add func(*holdings)) {
		if h := held[id]; h != nil {
			add(h)
		}
	}
	err = s.everyVolume(ctx, func(v volume.Volume) bool {
		for _, r := range slices.Concat(v.Replicas, v.Leaving) {
			count(r.Node, func(h *holdings) { h.replicas++ })
		}
		if v.Attachment != nil {
			count(v.Attachment.Node, func(h *holdings) { h.attached++ })
		}
		return true
	})
	if err == nil {
		err = s.everySnapshot(ctx, control.SnapshotFilter{}, func(x volume.Snapshot) bool {
			for _, r := range slices.Concat(x.Holders, x.Leaving) {
				count(r.Node, func(h *holdings) { h.snapshots++ })
			}
			return true
		})
	}
	var out []*adminpb.Node
	for _, n := range ns {
		out = append(out, s.nodeToProto(n, *held[n.ID]))
	}
	return out, err
}

// ListNodes implements adminpb.AdminServer.
func (s *Service) ListNodes(ctx context.Context, _ *adminpb.ListNodesRequest) (*adminpb.ListNodesReply, error) {
	ns, err := s.nodes(ctx)
	if err != nil {
		return nil, err
	}
	return &adminpb.ListNodesReply{Nodes: ns}, nil
}

func (s *Service) node(ctx context.Context, ref string) (volume.Node, error) {
	if len(ref) > volume.MaxNodeIDLen {
		return volume.Node{}, fmt.Errorf("node has %d bytes, the limit is %d: %w", len(ref), volume.MaxNodeIDLen, volume.ErrInvalid)
	}
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		return volume.Node{}, err
	}
	for _, n := range ns {
		if string(n.ID) == ref {
			return n, nil
		}
	}
	return volume.Node{}, fmt.Errorf("no node has the name %q: %w", ref, volume.ErrNotFound)
}

// GetNode implements adminpb.AdminServer.
func (s *Service) GetNode(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Node, error) {
	if _, err := s.node(ctx, r.Ref); err != nil {
		return nil, err
	}
	ns, err := s.nodes(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(ns, func(n *adminpb.Node) bool { return n.Id == r.Ref })
	if i < 0 {
		return nil, fmt.Errorf("node %s was removed just now: %w", r.Ref, volume.ErrNotFound)
	}
	return ns[i], nil
}

// changeNode changes the state of a node and returns it.
func (s *Service) changeNode(ctx context.Context, ref string, change func(context.Context, volume.NodeID) error) (*adminpb.Node, error) {
	n, err := s.node(ctx, ref)
	if err != nil {
		return nil, err
	}
	if err := change(ctx, n.ID); err != nil {
		return nil, err
	}
	return s.GetNode(ctx, &adminpb.GetRequest{Ref: ref})
}

// DrainNode implements adminpb.AdminServer.
func (s *Service) DrainNode(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Node, error) {
	return s.changeNode(ctx, r.Ref, s.o.Control.DrainNode)
}

// EmptyNode implements adminpb.AdminServer.
func (s *Service) EmptyNode(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Node, error) {
	return s.changeNode(ctx, r.Ref, s.o.Control.EmptyNode)
}

// UndrainNode implements adminpb.AdminServer.
func (s *Service) UndrainNode(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Node, error) {
	return s.changeNode(ctx, r.Ref, s.o.Control.UndrainNode)
}

// ListDrainBlockers implements adminpb.AdminServer.
func (s *Service) ListDrainBlockers(ctx context.Context, r *adminpb.GetRequest) (*adminpb.ListDrainBlockersReply, error) {
	n, err := s.node(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	bs, err := s.o.Control.DrainBlockers(ctx, n.ID)
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	unwell, err := s.unwell(ctx)
	if err != nil {
		return nil, err
	}
	vs, xs, err := s.living(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListDrainBlockersReply{}
	for _, b := range bs {
		v, there := vs[b.Volume]
		p := &adminpb.DrainBlocker{Volume: string(b.Volume), VolumeName: v.Name, Reason: b.Reason, Snapshot: string(b.Snapshot)}
		if b.Snapshot != "" {
			p.SnapshotName, there = xs[b.Snapshot]
		}
		if !there {
			continue // deleted meanwhile: it blocks no more
		}
		if b.Snapshot == "" {
			for _, x := range replicasOf(v, unwell[b.Volume].Engine, at) {
				if x.Resync != nil {
					p.Resyncs = append(p.Resyncs, x)
				}
			}
		}
		out.Blockers = append(out.Blockers, p)
	}
	return out, nil
}

// living are the volumes, and the names of the snapshots, that are not being deleted.
func (s *Service) living(ctx context.Context) (map[volume.ID]volume.Volume, map[volume.SnapshotID]string, error) {
	vs, xs := map[volume.ID]volume.Volume{}, map[volume.SnapshotID]string{}
	err := s.everyVolume(ctx, func(v volume.Volume) bool {
		if v.State != volume.Deleting {
			vs[v.ID] = v
		}
		return true
	})
	return vs, xs, errors.Join(err, s.everySnapshot(ctx, control.SnapshotFilter{}, func(x volume.Snapshot) bool {
		if x.State != volume.Deleting {
			xs[x.ID] = x.Name
		}
		return true
	}))
}

// RemoveNode implements adminpb.AdminServer. A controller's vote is taken first: what is no member must not count. One that was
// removed before is removed again, for the others may not all refuse it yet.
func (s *Service) RemoveNode(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	n, err := s.node(ctx, r.Ref)
	if errors.Is(err, volume.ErrNotFound) {
		removed, listErr := s.o.Control.RemovedNodes(ctx)
		if listErr != nil {
			return nil, listErr
		}
		if n.ID = volume.NodeID(r.Ref); slices.Contains(removed, n.ID) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	if s.o.Cluster != nil {
		cs, err := s.o.Cluster.Controllers(ctx)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(cs, func(c Controller) bool { return c.ID == n.ID }) {
			return nil, fmt.Errorf("node %s is a controller; ballastctl cluster remove-controller %s first: %w", n.ID, n.ID, volume.ErrInUse)
		}
	}
	if err := s.o.Control.RemoveNode(ctx, n.ID); err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: string(n.ID)}, nil
}

// ListPools implements adminpb.AdminServer.
func (s *Service) ListPools(ctx context.Context, r *adminpb.ListPoolsRequest) (*adminpb.ListPoolsReply, error) {
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListPoolsReply{}
	for _, n := range ns {
		if r.Node != "" && string(n.ID) != r.Node {
			continue
		}
		for _, p := range n.Pools {
			out.Pools = append(out.Pools, poolToProto(p))
		}
	}
	return out, nil
}

// pool finds a pool by id, by name where it is the only one of that name, or by node/name.
func (s *Service) pool(ctx context.Context, ref string) (volume.Pool, volume.Node, error) {
	if len(ref) > volume.MaxNodeIDLen+1+volume.MaxNameLen {
		return volume.Pool{}, volume.Node{}, fmt.Errorf("pool has %d bytes: %w", len(ref), volume.ErrInvalid)
	}
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		return volume.Pool{}, volume.Node{}, err
	}
	var pools []volume.Pool
	var nodes []volume.Node
	for _, n := range ns {
		for _, p := range n.Pools {
			if string(p.ID) == ref {
				return p, n, nil
			}
			if p.Name == ref || string(n.ID)+"/"+p.Name == ref {
				pools, nodes = append(pools, p), append(nodes, n)
			}
		}
	}
	switch len(pools) {
	case 0:
		return volume.Pool{}, volume.Node{}, fmt.Errorf("no pool has the id or the name %q: %w", ref, volume.ErrNotFound)
	case 1:
		return pools[0], nodes[0], nil
	}
	return volume.Pool{}, volume.Node{}, fmt.Errorf("%d pools have the name %q; say NODE/%s: %w", len(pools), ref, ref, volume.ErrInvalid)
}

// GetPool implements adminpb.AdminServer.
func (s *Service) GetPool(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Pool, error) {
	p, _, err := s.pool(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	return poolToProto(p), nil
}

// ForgetPool implements adminpb.AdminServer.
func (s *Service) ForgetPool(ctx context.Context, r *adminpb.ForgetPoolRequest) (*adminpb.ForgetPoolReply, error) {
	p, _, err := s.pool(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	lost, err := s.o.Control.ForgetPool(ctx, p.ID, r.AcceptDataLoss)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ForgetPoolReply{Id: string(p.ID)}
	for _, id := range lost.Volumes {
		out.LostVolumes = append(out.LostVolumes, string(id))
	}
	for _, id := range lost.Snapshots {
		out.LostSnapshots = append(out.LostSnapshots, string(id))
	}
	return out, nil
}

// ListStrays implements adminpb.AdminServer.
func (s *Service) ListStrays(ctx context.Context, _ *adminpb.ListStraysRequest) (*adminpb.ListStraysReply, error) {
	xs, err := s.o.Control.Strays(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListStraysReply{}
	for _, x := range xs {
		out.Strays = append(out.Strays, &adminpb.Stray{
			Node: string(x.Node), Replica: string(x.Replica), Snapshot: string(x.Snapshot), PhysicalBytes: x.PhysicalBytes,
		})
	}
	return out, nil
}

// ListQuotas implements adminpb.AdminServer.
func (s *Service) ListQuotas(ctx context.Context, _ *adminpb.ListQuotasRequest) (*adminpb.ListQuotasReply, error) {
	qs, err := s.o.Control.Quotas(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListQuotasReply{}
	for _, q := range qs {
		out.Quotas = append(out.Quotas, quotaToProto(q))
	}
	return out, nil
}

// quota returns that of a tenant, and whether there is one.
func (s *Service) quota(ctx context.Context, tenant string) (volume.Quota, bool, error) {
	if err := volume.CheckName("tenant", tenant); err != nil {
		return volume.Quota{}, false, err
	}
	qs, err := s.o.Control.Quotas(ctx)
	if err != nil {
		return volume.Quota{}, false, err
	}
	for _, q := range qs {
		if q.Tenant == tenant {
			return q, true, nil
		}
	}
	return volume.Quota{Tenant: tenant}, false, nil
}

// GetQuota implements adminpb.AdminServer.
func (s *Service) GetQuota(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Quota, error) {
	q, found, err := s.quota(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("tenant %q has neither a quota nor a volume: %w", r.Ref, volume.ErrNotFound)
	}
	return quotaToProto(q), nil
}

// SetQuota implements adminpb.AdminServer.
func (s *Service) SetQuota(ctx context.Context, r *adminpb.SetQuotaRequest) (*adminpb.Quota, error) {
	q, _, err := s.quota(ctx, r.Tenant)
	if err != nil {
		return nil, err
	}
	limit := q.Limit
	for _, f := range []struct {
		name string
		in   *int64
		out  *int64
	}{
		{"logical bytes", r.LogicalBytes, &limit.LogicalBytes},
		{"physical bytes", r.PhysicalBytes, &limit.PhysicalBytes},
		{"volumes", r.Volumes, &limit.Volumes},
		{"snapshots", r.Snapshots, &limit.Snapshots},
	} {
		if f.in == nil {
			continue
		}
		if *f.in < 0 {
			return nil, fmt.Errorf("the limit of %s is negative; 0 is unlimited: %w", f.name, volume.ErrInvalid)
		}
		*f.out = *f.in
	}
	if err := s.o.Control.SetQuota(ctx, r.Tenant, limit); err != nil {
		return nil, err
	}
	if q, _, err = s.quota(ctx, r.Tenant); err != nil {
		return nil, err
	}
	return quotaToProto(q), nil
}

// DeleteQuota implements adminpb.AdminServer.
func (s *Service) DeleteQuota(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	if err := volume.CheckName("tenant", r.Ref); err != nil {
		return nil, err
	}
	if err := s.o.Control.DeleteQuota(ctx, r.Ref); err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: r.Ref}, nil
}
