package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

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
	if s.reportedLately(node, u) {
		return s.propose(ctx, command.ReportUsage{Now: s.now(), Node: node, Pools: u.Pools})
	}
	known, err := s.measured(ctx, node)
	if err != nil {
		return err
	}
	if err := s.countFilledIn(ctx, u, known); err != nil {
		return err
	}
	replicas := changed(u.Replicas, known.replicas)
	snapshots := changed(u.Snapshots, known.snapshots)
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
	strays := s.watchStrays(node, u, known)
	if err := s.reportDamage(ctx, node, u, known); err != nil {
		return err
	}
	s.mu.Lock()
	s.reported[node] = report{u, s.o.Now()}
	s.mu.Unlock()
	// Last, and it fails nothing: the node is there, whatever one of its disks does.
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	if err := s.freeGivenUp(limit, node, u, strays, known); err != nil {
		s.o.Logger.Warn("what was sealed for a snapshot that was given up will be freed later", "node", node, "error", err)
	}
	return nil
}

// reportDamage records what a scrub has found since, and what a later one has found sound.
func (s *Service) reportDamage(ctx context.Context, node volume.NodeID, u Usage, known usage) error {
	replicas, snapshots := differ(u.DamagedReplicas, known.damagedReplicas), differ(u.DamagedSnapshots, known.damagedSnapshots)
	for len(replicas) > 0 || len(snapshots) > 0 {
		c := command.ReportUsage{Now: s.now(), Node: node, DamagedReplicas: map[volume.ReplicaID]bool{}, DamagedSnapshots: map[volume.SnapshotID]bool{}}
		for _, id := range take(&replicas, command.MaxReported) {
			c.DamagedReplicas[id] = u.DamagedReplicas[id]
			if u.DamagedReplicas[id] {
				s.o.Logger.Warn("a scrub has found damage in a replica", "replica", id, "node", node)
			}
		}
		for _, id := range take(&snapshots, command.MaxReported) {
			c.DamagedSnapshots[id] = u.DamagedSnapshots[id]
		}
		if err := s.propose(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// differ are the ids, in order, of which the record says something else.
func differ[T ~string](now, known map[T]bool) []T {
	var ids []T
	for id, bad := range known {
		if now[id] != bad {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Equal tells whether two reports say the same of replicas and snapshots.
func (u Usage) Equal(o Usage) bool {
	return maps.Equal(u.Replicas, o.Replicas) && maps.Equal(u.Snapshots, o.Snapshots) &&
		maps.Equal(u.DamagedReplicas, o.DamagedReplicas) && maps.Equal(u.DamagedSnapshots, o.DamagedSnapshots)
}

// report is what a node reported last, and when that was compared with the records.
type report struct {
	Usage
	at time.Time
}

// lately is for how long a report that says the same as the one before is taken for a sign of life only.
const lately = time.Minute

func (s *Service) reportedLately(node volume.NodeID, u Usage) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	last, ok := s.reported[node]
	return ok && len(s.suspects[node]) == 0 && s.o.Now().Sub(last.at) < lately && last.Equal(u)
}

// countFilledIn records as holders the replicas into which snapshots were filled in: one that is in sync has them whole.
func (s *Service) countFilledIn(ctx context.Context, u Usage, known usage) error {
	for id := range u.Snapshots {
		r, ok := known.filled[id]
		if !ok || r.Role != volume.InSync {
			continue
		}
		if err := s.propose(ctx, command.AddHolder{Snapshot: id, Replica: r.ID}); err != nil && !errors.Is(err, volume.ErrNotFound) {
			return err
		}
		known.snapshots[id] = 0
	}
	return nil
}

// usage is what the records know to be on a node, with the physical bytes they say.
type usage struct {
	replicas  map[volume.ReplicaID]int64
	snapshots map[volume.SnapshotID]int64
	// filled are the replicas there of volumes whose snapshots the node does not hold by the records: they may be filled in.
	filled map[volume.SnapshotID]volume.Replica
	// givenUp are the barriers that cut no snapshot after all, by the snapshots' ids, of which there is no record.
	givenUp map[volume.SnapshotID]uint64
	// What is recorded as damaged, or not, of what is there.
	damagedReplicas  map[volume.ReplicaID]bool
	damagedSnapshots map[volume.SnapshotID]bool
}

func (s *Service) measured(ctx context.Context, node volume.NodeID) (usage, error) {
	u := usage{map[volume.ReplicaID]int64{}, map[volume.SnapshotID]int64{}, map[volume.SnapshotID]volume.Replica{}, map[volume.SnapshotID]uint64{},
		map[volume.ReplicaID]bool{}, map[volume.SnapshotID]bool{}}
	vs, err := s.store.Volumes(ctx, "", 0)
	if err != nil {
		return u, err
	}
	ss, err := s.store.Snapshots(ctx, "", "", 0)
	if err != nil {
		return u, err
	}
	here := map[volume.ID]volume.Replica{}
	for _, v := range vs {
		for _, b := range v.GivenUp {
			u.givenUp[b.Snapshot] = max(u.givenUp[b.Snapshot], b.Number)
		}
		for _, r := range slices.Concat(v.Replicas, v.Leaving) {
			if r.Node == node {
				u.replicas[r.ID] = r.PhysicalBytes
				here[v.ID] = r
			}
		}
		for _, r := range v.Replicas {
			if r.Node == node {
				u.damagedReplicas[r.ID] = r.Damaged
			}
		}
	}
	for _, x := range ss {
		delete(u.givenUp, x.ID)
		on := func(h volume.Replica) bool { return h.Node == node }
		if i := slices.IndexFunc(x.Holders, on); i >= 0 {
			u.snapshots[x.ID], u.damagedSnapshots[x.ID] = x.Holders[i].PhysicalBytes, x.Holders[i].Damaged
		} else if i := slices.IndexFunc(x.Leaving, on); i >= 0 {
			u.snapshots[x.ID] = x.Leaving[i].PhysicalBytes
		} else if r, ok := here[x.Volume]; ok && x.State == volume.Ready {
			u.filled[x.ID] = r
		}
	}
	return u, nil
}

// changed are the ids, in order, that a record knows with another number of bytes.
func changed[T ~string](now, known map[T]int64) []T {
	var ids []T
	for id, n := range now {
		if old, ok := known[id]; ok && old != n {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func take[T any](from *[]T, n int) []T {
	n = min(n, len(*from))
	head := (*from)[:n]
	*from = (*from)[n:]
	return head
}

// watchStrays remembers, and returns, what two reports in a row show and no record knows: what one shows may just have been
// deleted.
func (s *Service) watchStrays(node volume.NodeID, u Usage, known usage) map[string]Stray {
	found := map[string]Stray{}
	for id, n := range u.Replicas {
		if _, ok := known.replicas[id]; !ok && len(found) < maxStrays {
			found[string(id)] = Stray{Node: node, Replica: id, PhysicalBytes: n}
		}
	}
	for id, n := range u.Snapshots {
		_, ok := known.snapshots[id]
		if _, filled := known.filled[id]; !ok && !filled && len(found) < maxStrays {
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
	return sure
}

// freeGivenUp has a node let go of what it sealed for snapshots that were given up, whatever it was that kept it from doing so
// when it was asked first. Only what the volume's record says was given up: an old copy of the records may have been restored,
// and what it does not know is to be found by people.
func (s *Service) freeGivenUp(ctx context.Context, node volume.NodeID, u Usage, strays map[string]Stray, known usage) error {
	var failed []error
	for _, x := range strays {
		number, ok := known.givenUp[x.Snapshot]
		if !ok {
			continue
		}
		var errs []error
		for _, p := range u.Pools {
			errs = append(errs, s.agents.DeleteSnapshot(ctx, node, p.ID, x.Snapshot, "", number))
		}
		if err := errors.Join(errs...); err != nil {
			failed = append(failed, fmt.Errorf("snapshot %s: %w", x.Snapshot, err))
			continue
		}
		s.record(ctx, "snapshot.free", string(x.Snapshot), fmt.Sprintf("it was given up, and node %s had sealed it", node), nil)
	}
	return errors.Join(failed...)
}

// Strays lists what nodes hold and no record knows, in order. What was not given up by the records stays until an admin says.
func (s *Service) Strays(ctx context.Context) ([]Stray, error) {
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Stray
	for _, n := range nodes {
		all = append(all, slices.Collect(maps.Values(s.strays[n.ID]))...)
	}
	slices.SortFunc(all, func(a, b Stray) int {
		return strings.Compare(string(a.Node)+"/"+string(a.Replica)+string(a.Snapshot), string(b.Node)+"/"+string(b.Replica)+string(b.Snapshot))
	})
	return all, nil
}
