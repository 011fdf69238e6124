package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// leaving is the role of a replica that its node has yet to free.
const leaving = "leaving"

// leavingToProto is replicasToProto of those that leave.
func leavingToProto(rs []volume.Replica, at places) []*adminpb.Replica {
	out := replicasToProto(rs, at)
	for _, r := range out {
		r.Role = leaving
	}
	return out
}

// replicasOf lists the replicas of a volume, those that leave included.
func replicasOf(v volume.Volume, e *volume.EngineReport, at places) []*adminpb.Replica {
	out := append(replicasToProto(v.Replicas, at), leavingToProto(v.Leaving, at)...)
	for _, r := range out {
		if e == nil {
			continue
		}
		if i := slices.IndexFunc(e.Resyncs, func(x volume.Resync) bool { return string(x.Replica) == r.Id }); i >= 0 {
			r.Resync = resyncToProto(e.Resyncs[i])
		}
	}
	return out
}

// places are what is said of a replica's node and pool.
type places struct {
	silent map[volume.NodeID]bool
	pools  map[volume.PoolID]string
}

func (s *Service) places(ctx context.Context) (places, error) {
	ns, err := s.o.Control.Nodes(ctx)
	at := places{map[volume.NodeID]bool{}, map[volume.PoolID]string{}}
	for _, n := range ns {
		at.silent[n.ID] = s.silent(n)
		for _, p := range n.Pools {
			at.pools[p.ID] = p.Name
		}
	}
	return at, err
}

// ListReplicas implements adminpb.AdminServer.
func (s *Service) ListReplicas(ctx context.Context, r *adminpb.ListReplicasRequest) (*adminpb.ListReplicasReply, error) {
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	if r.Node != "" {
		if _, err := s.node(ctx, r.Node); err != nil {
			return nil, err
		}
	}
	healths := map[volume.ID]control.Health{}
	out := &adminpb.ListReplicasReply{}
	add := func(v volume.Volume) bool {
		on := func(x volume.Replica) bool { return r.Node == "" || string(x.Node) == r.Node }
		if !slices.ContainsFunc(v.Replicas, on) && !slices.ContainsFunc(v.Leaving, on) {
			return true
		}
		h := healths[v.ID]
		replicas := replicasOf(v, h.Engine, at)
		slices.SortStableFunc(replicas, func(a, b *adminpb.Replica) int { return strings.Compare(a.Node, b.Node) })
		for _, p := range replicas {
			if r.Node == "" || p.Node == r.Node {
				p.Volume, p.VolumeName, p.LastFlush = string(v.ID), v.Name, timeToProto(h.LastFlush[volume.ReplicaID(p.Id)])
				out.Replicas = append(out.Replicas, p)
			}
		}
		return ctx.Err() == nil
	}
	if r.Volume != "" {
		v, err := s.resolveVolume(ctx, r.Volume)
		if err != nil {
			return nil, err
		}
		h, err := s.o.Control.Health(ctx, v.ID)
		if err != nil && !errors.Is(err, volume.ErrNotFound) {
			return nil, err
		}
		healths[v.ID] = h
		add(v)
		return out, ctx.Err()
	}
	if healths, err = every(ctx, s.o.Control.Healths); err != nil {
		return nil, err
	}
	return out, errors.Join(s.everyVolume(ctx, add), ctx.Err())
}

// SetVolume implements adminpb.AdminServer.
func (s *Service) SetVolume(ctx context.Context, r *adminpb.SetVolumeRequest) (*adminpb.Volume, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	m := control.Modify{IOPS: r.IopsLimit, Bandwidth: r.BandwidthLimit}
	number := func(p *int32) *int {
		if p == nil {
			return nil
		}
		n := int(*p)
		return &n
	}
	m.Replicas, m.MinInSync = number(r.Replicas), number(r.MinInSync)
	if r.DataLocality != nil {
		l := volume.DataLocality(*r.DataLocality)
		m.DataLocality = &l
	}
	if v, err = s.o.Control.ModifyVolume(ctx, v.ID, m); err != nil {
		return nil, err
	}
	return volumeToProto(v, nil), nil
}

// ListCandidates implements adminpb.AdminServer.
func (s *Service) ListCandidates(ctx context.Context, r *adminpb.GetRequest) (*adminpb.ListCandidatesReply, error) {
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	cs, err := s.o.Control.Candidates(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	h, err := s.o.Control.Health(ctx, v.ID)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListCandidatesReply{Volume: volumeToProto(v, h.Conditions)}
	for _, c := range cs {
		p := &adminpb.Candidate{Replica: replicasToProto([]volume.Replica{c.Replica}, at)[0], Against: c.Against}
		if x := c.Report; x != nil {
			p.Answers, p.Role, p.Poisoned = true, string(x.Role), x.Poisoned
			p.ConfigVersion, p.Epoch, p.Lineage = uint64(x.ConfigVersion), uint64(x.Epoch), x.Lineage
			p.LastFlush, p.SizeBytes = timeToProto(x.LastFlush), x.Size
		}
		out.Candidates = append(out.Candidates, p)
	}
	return out, nil
}

// SalvageVolume implements adminpb.AdminServer.
func (s *Service) SalvageVolume(ctx context.Context, r *adminpb.SalvageVolumeRequest) (*adminpb.Volume, error) {
	if err := volume.CheckName("replica", r.Replica); err != nil {
		return nil, err
	}
	if !r.AcceptDataLoss {
		return nil, fmt.Errorf("what other replicas have and %s has not would be lost; that must be accepted: %w", r.Replica, volume.ErrInvalid)
	}
	v, err := s.resolveVolume(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if v, err = s.o.Control.Salvage(ctx, v.ID, volume.ReplicaID(r.Replica), r.Force); err != nil {
		return nil, err
	}
	return volumeToProto(v, nil), nil
}
