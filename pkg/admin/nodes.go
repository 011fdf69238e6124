package admin

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ListNodes implements adminpb.AdminServer.
func (s *Service) ListNodes(ctx context.Context, _ *adminpb.ListNodesRequest) (*adminpb.ListNodesReply, error) {
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListNodesReply{}
	for _, n := range ns {
		out.Nodes = append(out.Nodes, nodeToProto(n))
	}
	return out, nil
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
	n, err := s.node(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	return nodeToProto(n), nil
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
