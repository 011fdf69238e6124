package control

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxStrays bounds what is remembered of one node.
const maxStrays = 1000

// RegisterNode makes a node and its pools known, and is called again whenever it starts. volume.ErrBusy: one of the pools
// is with another node that still reports.
func (s *Service) RegisterNode(ctx context.Context, n volume.Node) error {
	known, err := s.knows(ctx, n.ID)
	if err != nil {
		return err
	}
	err = s.propose(ctx, command.RegisterNode{Now: s.now(), Node: n})
	if !known || err != nil {
		s.record(ctx, "node.register", string(n.ID), fmt.Sprintf("%d pools", len(n.Pools)), err)
	}
	return err
}

// ReportUsage takes what a node measured; it also says that the node is there. volume.ErrNotFound: it has not registered.
func (s *Service) ReportUsage(ctx context.Context, node volume.NodeID, u Usage) error {
	s.watchStrays(ctx, node, u)
	replicas, snapshots := slices.Sorted(maps.Keys(u.Replicas)), slices.Sorted(maps.Keys(u.Snapshots))
	for first := true; first || len(replicas) > 0 || len(snapshots) > 0; first = false {
		c := command.ReportUsage{Now: s.now(), Node: node, Replicas: map[volume.ReplicaID]int64{}, Snapshots: map[volume.SnapshotID]int64{}}
		if first {
			c.Pools = u.Pools
		}
		for _, id := range take(&replicas, command.MaxReported) {
			c.Replicas[id] = u.Replicas[id]
		}
		for _, id := range take(&snapshots, command.MaxReported) {
			c.Snapshots[id] = u.Snapshots[id]
		}
		if err := s.propose(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

func take[T any](from *[]T, n int) []T {
	n = min(n, len(*from))
	head := (*from)[:n]
	*from = (*from)[n:]
	return head
}

// watchStrays remembers what two reports in a row show and no record knows: what one shows may just have been deleted.
func (s *Service) watchStrays(ctx context.Context, node volume.NodeID, u Usage) {
	found := map[string]Stray{}
	for id, n := range u.Replicas {
		if len(found) < maxStrays && !s.knowsReplica(ctx, id) {
			found[string(id)] = Stray{Node: node, Replica: id, PhysicalBytes: n}
		}
	}
	for id, n := range u.Snapshots {
		if len(found) < maxStrays && !s.knowsSnapshot(ctx, id) {
			found[string(id)] = Stray{Node: node, Snapshot: id, PhysicalBytes: n}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sure := map[string]Stray{}
	for id, x := range found {
		if _, ok := s.suspects[node][id]; ok {
			sure[id] = x
		}
	}
	s.suspects[node], s.strays[node] = found, sure
}

// knowsReplica is true in doubt.
func (s *Service) knowsReplica(ctx context.Context, id volume.ReplicaID) bool {
	rest, ok := strings.CutPrefix(string(id), replicaPrefix)
	if !ok {
		return false
	}
	owner, _, _ := strings.Cut(rest, "-")
	v, err := s.store.Volume(ctx, volume.ID(volumePrefix+owner))
	if err != nil {
		return ignoreNotFound(err) != nil
	}
	return slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.ID == id })
}

// knowsSnapshot is true in doubt. The cut of a clone belongs to the clone's volume.
func (s *Service) knowsSnapshot(ctx context.Context, id volume.SnapshotID) bool {
	var err error
	if owner, ok := strings.CutPrefix(string(id), clonePrefix); ok {
		_, err = s.store.Volume(ctx, volume.ID(volumePrefix+owner))
	} else {
		_, err = s.store.Snapshot(ctx, id)
	}
	return err == nil || ignoreNotFound(err) != nil
}

// Strays lists what nodes hold and no record knows, in order. Nothing deletes it by itself.
func (s *Service) Strays(context.Context) ([]Stray, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Stray
	for _, m := range s.strays {
		all = append(all, slices.Collect(maps.Values(m))...)
	}
	slices.SortFunc(all, func(a, b Stray) int {
		return strings.Compare(string(a.Node)+"/"+string(a.Replica)+string(a.Snapshot), string(b.Node)+"/"+string(b.Replica)+string(b.Snapshot))
	})
	return all, nil
}
