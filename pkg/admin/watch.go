package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Watch implements adminpb.AdminServer. The state is read again and again and compared: what changes twice between two
// looks is seen once.
func (s *Service) Watch(r *adminpb.WatchRequest, stream grpc.ServerStreamingServer[adminpb.Event]) error {
	ctx := stream.Context()
	var last []*adminpb.Event
	tick := time.NewTicker(s.o.Poll)
	defer tick.Stop()
	for {
		now, err := s.look(ctx, r.Kind, r.Ref)
		if errors.Is(err, volume.ErrNotFound) && last != nil {
			now, err = nil, nil // it was there: it is deleted
		}
		if err != nil {
			return err
		}
		for _, e := range changes(last, now) {
			if err := stream.Send(e); err != nil {
				return err
			}
		}
		if r.Ref != "" && len(now) == 0 {
			return nil
		}
		last = now
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stopping:
			return fmt.Errorf("the daemon is stopping: %w", volume.ErrUnavailable)
		case <-tick.C:
		}
	}
}

// look returns what is there as events without a type, in the order of keys.
func (s *Service) look(ctx context.Context, kind adminpb.Kind, ref string) ([]*adminpb.Event, error) {
	out := []*adminpb.Event{}
	switch kind {
	case adminpb.Kind_VOLUME:
		if ref != "" {
			v, err := s.GetVolume(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Volume{Volume: v}}), err
		}
		unwell, err := s.unwell(ctx)
		if err != nil {
			return nil, err
		}
		at, err := s.places(ctx)
		if err != nil {
			return nil, err
		}
		err = s.everyVolume(ctx, func(v volume.Volume) bool {
			p := volumeInFull(v, unwell[v.ID], at)
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Volume{Volume: p}})
			return true
		})
		return out, err
	case adminpb.Kind_SNAPSHOT:
		if ref != "" {
			sn, err := s.GetSnapshot(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Snapshot{Snapshot: sn}}), err
		}
		names, err := s.volumeNames(ctx)
		if err != nil {
			return nil, err
		}
		at, err := s.places(ctx)
		if err != nil {
			return nil, err
		}
		err = s.everySnapshot(ctx, control.SnapshotFilter{}, func(sn volume.Snapshot) bool {
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Snapshot{Snapshot: snapshotToProto(sn, names[sn.Volume], at)}})
			return true
		})
		return out, err
	case adminpb.Kind_POOL:
		if ref != "" {
			p, err := s.GetPool(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Pool{Pool: p}}), err
		}
		ps, err := s.ListPools(ctx, &adminpb.ListPoolsRequest{})
		for _, p := range ps.GetPools() {
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Pool{Pool: p}})
		}
		return out, err
	case adminpb.Kind_NODE:
		if ref != "" {
			n, err := s.GetNode(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Node{Node: n}}), err
		}
		ns, err := s.ListNodes(ctx, &adminpb.ListNodesRequest{})
		for _, n := range ns.GetNodes() {
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Node{Node: n}})
		}
		return out, err
	case adminpb.Kind_GROUP:
		if ref != "" {
			g, err := s.GetGroup(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Group{Group: g}}), err
		}
		gs, err := s.ListGroups(ctx, &adminpb.ListGroupsRequest{})
		for _, g := range gs.GetGroups() {
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Group{Group: g}})
		}
		return out, err
	case adminpb.Kind_QUOTA:
		if ref != "" {
			q, err := s.GetQuota(ctx, &adminpb.GetRequest{Ref: ref})
			return append(out, &adminpb.Event{Object: &adminpb.Event_Quota{Quota: q}}), err
		}
		qs, err := s.ListQuotas(ctx, &adminpb.ListQuotasRequest{})
		for _, q := range qs.GetQuotas() {
			out = append(out, &adminpb.Event{Object: &adminpb.Event_Quota{Quota: q}})
		}
		return out, err
	}
	return nil, fmt.Errorf("kind %v is unknown: %w", kind, volume.ErrInvalid)
}

func eventKey(e *adminpb.Event) string {
	switch o := e.Object.(type) {
	case *adminpb.Event_Volume:
		return o.Volume.Id
	case *adminpb.Event_Snapshot:
		return o.Snapshot.Id
	case *adminpb.Event_Pool:
		return o.Pool.Id
	case *adminpb.Event_Node:
		return o.Node.Id
	case *adminpb.Event_Group:
		return o.Group.Id
	case *adminpb.Event_Quota:
		return o.Quota.Tenant
	}
	return ""
}

// changes returns the events that lead from before to after: deletions first, then what is new or different. That a
// node reported again is no change.
func changes(before, after []*adminpb.Event) []*adminpb.Event {
	old := map[string]*adminpb.Event{}
	for _, e := range before {
		old[eventKey(e)] = e
	}
	var out []*adminpb.Event
	for _, e := range after {
		k := eventKey(e)
		o, known := old[k]
		delete(old, k)
		switch {
		case !known:
			out = append(out, &adminpb.Event{Type: adminpb.Event_ADDED, Object: e.Object})
		case !proto.Equal(withoutHeartbeat(o), withoutHeartbeat(e)):
			out = append(out, &adminpb.Event{Type: adminpb.Event_CHANGED, Object: e.Object})
		}
	}
	var gone []*adminpb.Event
	for _, e := range before {
		if _, left := old[eventKey(e)]; left {
			gone = append(gone, &adminpb.Event{Type: adminpb.Event_DELETED, Object: e.Object})
		}
	}
	return slices.Concat(gone, out)
}

func withoutHeartbeat(e *adminpb.Event) *adminpb.Event {
	n, ok := e.Object.(*adminpb.Event_Node)
	if !ok {
		return e
	}
	c := proto.CloneOf(n.Node)
	c.LastSeen = nil
	return &adminpb.Event{Object: &adminpb.Event_Node{Node: c}}
}
