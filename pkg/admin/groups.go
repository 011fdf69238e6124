package admin

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func groupToProto(g control.Group, names map[volume.ID]string, at places) *adminpb.Group {
	out := &adminpb.Group{Id: string(g.ID), Name: g.Name, State: string(g.State), CreatedAt: timeToProto(g.CreatedAt)}
	for _, x := range g.Members {
		out.Snapshots = append(out.Snapshots, snapshotToProto(x, names[x.Volume], at))
	}
	return out
}

// ListGroups implements adminpb.AdminServer.
func (s *Service) ListGroups(ctx context.Context, _ *adminpb.ListGroupsRequest) (*adminpb.ListGroupsReply, error) {
	gs, err := s.o.Control.Groups(ctx)
	if err != nil {
		return nil, err
	}
	names, err := s.volumeNames(ctx)
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListGroupsReply{}
	for _, g := range gs {
		out.Groups = append(out.Groups, groupToProto(g, names, at))
	}
	return out, nil
}

// group finds a group by id or name. An id wins over a name that looks like it.
func (s *Service) group(ctx context.Context, ref string) (control.Group, error) {
	if err := volume.CheckName("group", ref); err != nil {
		return control.Group{}, err
	}
	gs, err := s.o.Control.Groups(ctx)
	if err != nil {
		return control.Group{}, err
	}
	var named *control.Group
	for i, g := range gs {
		if string(g.ID) == ref {
			return g, nil
		}
		if g.Name == ref && (named == nil || named.State == volume.Deleting) {
			named = &gs[i]
		}
	}
	if named == nil {
		return control.Group{}, fmt.Errorf("no group of snapshots has the id or the name %q: %w", ref, volume.ErrNotFound)
	}
	return *named, nil
}

// GetGroup implements adminpb.AdminServer.
func (s *Service) GetGroup(ctx context.Context, r *adminpb.GetRequest) (*adminpb.Group, error) {
	g, err := s.group(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	names, err := s.volumeNames(ctx)
	if err != nil {
		return nil, err
	}
	at, err := s.places(ctx)
	if err != nil {
		return nil, err
	}
	return groupToProto(g, names, at), nil
}

// CreateGroup implements adminpb.AdminServer.
func (s *Service) CreateGroup(ctx context.Context, r *adminpb.CreateGroupRequest) (*adminpb.Group, error) {
	if len(r.Volumes) == 0 || len(r.Volumes) > volume.MaxGroup {
		return nil, fmt.Errorf("a group has 1 to %d volumes, not %d: %w", volume.MaxGroup, len(r.Volumes), volume.ErrInvalid)
	}
	c := control.CreateGroup{Name: r.Name, Freeze: r.Freeze}
	names := map[volume.ID]string{}
	for _, ref := range r.Volumes {
		v, err := s.resolveVolume(ctx, ref)
		if err != nil {
			return nil, err
		}
		c.Volumes = append(c.Volumes, v.ID)
		names[v.ID] = v.Name
	}
	g, err := s.o.Control.CreateGroup(ctx, c)
	if err != nil {
		return nil, err
	}
	return groupToProto(g, names, places{}), nil
}

// DeleteGroup implements adminpb.AdminServer.
func (s *Service) DeleteGroup(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	g, err := s.group(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.o.Control.DeleteGroup(ctx, g.ID); err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: string(g.ID)}, nil
}
