package meta

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// heldWorld has snapshot s in pools p1 and p2 of four nodes, of 1 and 2 MiB there, of volume 1: deleted, or else with a replica on p1.
func heldWorld(t *testing.T, deleted bool) (*Store, volume.ID) {
	s := open(t, "")
	for i := 1; i <= 4; i++ {
		propose(t, s, node(volume.NodeID(fmt.Sprint("n", i)), volume.PoolID(fmt.Sprint("p", i))))
	}
	v := newVolume(1, "p1")
	v.Parameters.Replicas, v.Replicas = 2, append(v.Replicas, volume.Replica{ID: replica(1, 1), Pool: "p2", Role: volume.Filling})
	list := []command.Command{
		command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID},
		command.BeginSnapshot{Now: 2, ID: "s", Name: "s", Volume: v.ID},
		command.FinishSnapshot{Cut: command.Cut{Snapshot: "s", ConfigVersion: 1, Holders: []volume.ReplicaID{replica(1, 0)}}},
		command.AddHolder{Snapshot: "s", Replica: replica(1, 1)},
		command.ReportUsage{Now: 3, Node: "n1", Snapshots: map[volume.SnapshotID]int64{"s": mib}},
		command.ReportUsage{Now: 3, Node: "n2", Snapshots: map[volume.SnapshotID]int64{"s": 2 * mib}},
		command.DropReplica{Volume: v.ID, Replica: replica(1, 1)}, command.FreeReplica{Volume: v.ID, Replica: replica(1, 1)},
	}
	if deleted {
		list = append(list, command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID})
	}
	for _, c := range list {
		propose(t, s, c)
	}
	verify(t, s)
	return s, v.ID
}

// cutAndDelete cuts snapshot t of a volume, on p1, and deletes the volume.
func cutAndDelete(t *testing.T, s *Store, id volume.ID) {
	t.Helper()
	propose(t, s, command.BeginSnapshot{Now: 5, ID: "t", Name: "t", Volume: id})
	x, err := s.Snapshot(context.Background(), "t")
	if err != nil {
		t.Fatal(err)
	}
	propose(t, s, command.FinishSnapshot{Cut: command.Cut{Snapshot: "t", ConfigVersion: x.Cut.ConfigVersion, Holders: []volume.ReplicaID{replica(1, 0)}}})
	propose(t, s, command.BeginDelete{Volume: id})
	propose(t, s, command.FinishDelete{Volume: id})
}

func poolsOf(rs []volume.Replica) (ps []volume.PoolID) {
	for _, r := range rs {
		ps = append(ps, r.Pool)
	}
	return ps
}

// A copy that leaves is none, and is not forgotten until its pool has freed it.
func TestWhatLeavesIsNoCopyAndIsNotForgotten(t *testing.T) {
	ctx := context.Background()
	drop, free := command.DropHolder{Snapshot: "s", Pool: "p2"}, command.FreeHolder{Snapshot: "s", Pool: "p2"}
	for _, c := range []struct {
		name           string
		then           []command.Command
		holds, leaving []volume.PoolID
		bytes          int64
	}{
		{"dropped", []command.Command{drop}, []volume.PoolID{"p1"}, []volume.PoolID{"p2"}, 3 * mib},
		{"dropped twice", []command.Command{drop, drop}, []volume.PoolID{"p1"}, []volume.PoolID{"p2"}, 3 * mib},
		{"measured", []command.Command{drop, command.ReportUsage{Now: 4, Node: "n2", Snapshots: map[volume.SnapshotID]int64{"s": 5 * mib}}},
			[]volume.PoolID{"p1"}, []volume.PoolID{"p2"}, 6 * mib},
		{"freed", []command.Command{drop, free}, []volume.PoolID{"p1"}, nil, mib},
		{"freed twice", []command.Command{drop, free, free}, []volume.PoolID{"p1"}, nil, mib},
		{"freed and held", []command.Command{free}, []volume.PoolID{"p1", "p2"}, nil, 3 * mib},
		{"another is freed", []command.Command{drop, command.FreeHolder{Snapshot: "s", Pool: "p1"}}, []volume.PoolID{"p1"}, []volume.PoolID{"p2"}, 3 * mib},
		{"lost", []command.Command{command.DropHolder{Snapshot: "s", Pool: "p2", Lost: true}}, []volume.PoolID{"p1"}, nil, mib},
		{"its node is removed", []command.Command{drop, command.RemoveNode{Node: "n2"}, free}, []volume.PoolID{"p1"}, nil, mib},
		{"its pool is forgotten", []command.Command{drop, command.ForgetPool{Pool: "p2"}, free}, []volume.PoolID{"p1"}, nil, mib},
		{"its disk is not there", []command.Command{drop, node("n2")}, []volume.PoolID{"p1"}, []volume.PoolID{"p2"}, 3 * mib},
	} {
		s, _ := heldWorld(t, true)
		for _, x := range c.then {
			propose(t, s, x)
		}
		verify(t, s)
		x, err := s.Snapshot(ctx, "s")
		if err != nil || !slices.Equal(poolsOf(x.Holders), c.holds) || !slices.Equal(poolsOf(x.Leaving), c.leaving) || x.PhysicalBytes != c.bytes {
			t.Errorf("%s: %+v %v", c.name, x, err)
		}
		_, open, err := s.Unsettled(ctx)
		if err != nil || (len(open) > 0) != (len(c.leaving) > 0) {
			t.Errorf("%s: unsettled %v %v", c.name, open, err)
		}
		if c.leaving != nil {
			wantErr(t, s, command.DropHolder{Snapshot: "s", Pool: "p1"}, volume.ErrInUse) // the last copy
		}
		// It goes with the snapshot.
		propose(t, s, command.BeginDeleteSnapshot{Snapshot: "s"})
		propose(t, s, command.FinishDeleteSnapshot{Snapshot: "s"})
		propose(t, s, free)
		verify(t, s)
	}
}

// A disk that is away keeps its pool while a copy is to be freed there: whoever forgets the pool ends that.
func TestAPoolStaysWhileACopyLeaves(t *testing.T) {
	s, _ := heldWorld(t, true)
	propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
	propose(t, s, node("n2"))
	there := func() bool {
		ns, err := s.Nodes(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(ns, func(n volume.Node) bool {
			return slices.ContainsFunc(n.Pools, func(p volume.Pool) bool { return p.ID == "p2" })
		})
	}
	if !there() {
		t.Error("nobody can be asked to forget it")
	}
	propose(t, s, command.FreeHolder{Snapshot: "s", Pool: "p2"})
	if propose(t, s, node("n2")); there() {
		t.Error("it is kept for nothing")
	}
}

// Nothing new of the volume goes to a node that has yet to free a copy of one of its snapshots, and no copy leaves where a replica is.
func TestNothingMeetsWhatLeaves(t *testing.T) {
	add := func(id volume.ID, pool volume.PoolID) command.AddReplica {
		return command.AddReplica{Volume: id, Replica: volume.Replica{ID: replica(1, 2), Pool: pool, Role: volume.Filling}}
	}
	t.Run("a replica", func(t *testing.T) {
		s, id := heldWorld(t, false)
		wantErr(t, s, command.DropHolder{Snapshot: "s", Pool: "p1"}, volume.ErrBusy) // the replica is there
		propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
		wantErr(t, s, add(id, "p2"), volume.ErrBusy)
		propose(t, s, command.FreeHolder{Snapshot: "s", Pool: "p2"})
		propose(t, s, add(id, "p2"))
		propose(t, s, command.AddHolder{Snapshot: "s", Replica: replica(1, 2)})
		wantErr(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"}, volume.ErrBusy)
		verify(t, s)
	})
	t.Run("a copy", func(t *testing.T) {
		s, id := heldWorld(t, true)
		propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
		wantErr(t, s, copyOf(1, "s", 1, "p1", "p2"), volume.ErrBusy)
		wantErr(t, s, copyOf(1, "s", 1, "p2", "p3"), volume.ErrInvalid) // it is no source
		propose(t, s, command.FreeHolder{Snapshot: "s", Pool: "p2"})
		propose(t, s, copyOf(1, "s", 1, "p1", "p2"))
		propose(t, s, command.AddHolder{Snapshot: "s", Replica: replica(1, 11)})
		wantErr(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"}, volume.ErrBusy)
		verify(t, s)
		propose(t, s, command.BeginDelete{Volume: id})
		propose(t, s, command.FinishDelete{Volume: id})
		propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
		verify(t, s)
	})
	t.Run("a copy of another snapshot", func(t *testing.T) {
		s, id := heldWorld(t, false)
		cutAndDelete(t, s, id)
		propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
		wantErr(t, s, copyOf(1, "t", 1, "p1", "p2"), volume.ErrBusy)
		propose(t, s, copyOf(1, "t", 1, "p1", "p3"))
		verify(t, s)
	})
	t.Run("a copy from where one leaves", func(t *testing.T) {
		s, id := heldWorld(t, false)
		cutAndDelete(t, s, id)
		propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p1"})
		wantErr(t, s, copyOf(1, "t", 1, "p1", "p3"), volume.ErrBusy)
		propose(t, s, command.FreeHolder{Snapshot: "s", Pool: "p1"})
		propose(t, s, copyOf(1, "t", 1, "p1", "p3"))
		verify(t, s)
	})
	// A node says once what it has of a snapshot, for all its pools.
	t.Run("another pool of the node", func(t *testing.T) {
		for _, deleted := range []bool{false, true} {
			s, id := heldWorld(t, deleted)
			two := node("n2", "p2")
			two.Node.Pools = append(two.Node.Pools, node("n2", "p2b").Node.Pools...)
			propose(t, s, two)
			propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
			var c command.Command = add(id, "p2b")
			if deleted {
				c = copyOf(1, "s", 1, "p1", "p2b")
			}
			wantErr(t, s, c, volume.ErrBusy)
			propose(t, s, command.FreeHolder{Snapshot: "s", Pool: "p2"})
			propose(t, s, c)
			verify(t, s)
		}
	})
}

// A pool that is not there has not stopped: it is offline.
func TestAPoolThatGoesOfflineHasNotStopped(t *testing.T) {
	s, _ := heldWorld(t, true)
	failed := node("n2", "p2")
	failed.Node.Pools[0].Failed = true
	propose(t, s, failed)
	propose(t, s, node("n2"))
	ns, err := s.Nodes(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range ns {
		for _, p := range n.Pools {
			if p.ID == "p2" && (p.Failed || p.Capacity != 0) {
				t.Errorf("%+v", p)
			}
		}
	}
}
