package meta

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// orphan makes a snapshot in pool p1 of a volume that is deleted, as commands.
func orphan(n int, snap volume.SnapshotID) []command.Command {
	v := newVolume(n, "p1")
	v.Parameters.Replicas = 2
	v.Replicas = append(v.Replicas, volume.Replica{ID: replica(n, 1), Pool: "p3", Role: volume.Filling})
	return []command.Command{
		command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID},
		command.BeginSnapshot{Now: 2, ID: snap, Name: string(snap), Volume: v.ID},
		command.FinishSnapshot{Cut: command.Cut{Snapshot: snap, ConfigVersion: 1, Holders: []volume.ReplicaID{replica(n, 0)}}},
		command.BeginExpand{Volume: v.ID, Target: 2 * gib},
		command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID},
	}
}

func copyOf(n int, snap volume.SnapshotID, try int, from, to volume.PoolID) command.CopySnapshot {
	return command.CopySnapshot{Now: 9, Snapshot: snap, From: volume.Replica{ID: replica(n, 10*try), Pool: from, Role: volume.InSync},
		To: volume.Replica{ID: replica(n, 10*try+1), Pool: to, Role: volume.Filling}}
}

func wantErr(t *testing.T, s *Store, c command.Command, want error) {
	t.Helper()
	if _, err := s.Propose(context.Background(), c); !errors.Is(err, want) {
		t.Errorf("%+v: %v, want %v", c, err, want)
	}
}

// keptWorld has three nodes and snapshot s of volume 1, which is deleted.
func keptWorld(t *testing.T) (*Store, volume.ID) {
	s := open(t, "")
	for i := 1; i <= 3; i++ {
		propose(t, s, node(volume.NodeID(fmt.Sprint("n", i)), volume.PoolID(fmt.Sprint("p", i))))
	}
	for _, c := range orphan(1, "s") {
		propose(t, s, c)
	}
	verify(t, s)
	return s, newVolume(1, "p1").ID
}

func TestASnapshotOfADeletedVolumeIsCopied(t *testing.T) {
	ctx := context.Background()
	s, id := keptWorld(t)
	ks, err := s.Remains(ctx)
	if err != nil || len(ks) != 1 || ks[0].Volume != id || ks[0].Replicas != 2 || ks[0].Size != 2*gib {
		t.Fatalf("%+v %v", ks, err)
	}
	epoch := ks[0].Protocol.Epoch
	before, _ := s.Quotas(ctx)

	bad := copyOf(1, "s", 1, "p2", "p3")
	wantErr(t, s, bad, volume.ErrInvalid) // p2 has no copy
	wantErr(t, s, copyOf(1, "none", 1, "p1", "p2"), volume.ErrNotFound)
	wantErr(t, s, copyOf(1, "s", 1, "p1", "p9"), volume.ErrNoSpace)
	wantErr(t, s, command.CreateVolume{Volume: newVolume(1, "p1")}, volume.ErrBusy)
	propose(t, s, command.ReportUsage{Now: 3, Node: "n1", DamagedSnapshots: map[volume.SnapshotID]bool{"s": true}})
	wantErr(t, s, copyOf(1, "s", 1, "p1", "p2"), volume.ErrInvalid)
	propose(t, s, command.ReportUsage{Now: 3, Node: "n1", DamagedSnapshots: map[volume.SnapshotID]bool{"s": false}})

	c := copyOf(1, "s", 1, "p1", "p2")
	v := propose(t, s, c).(command.Volume).Volume
	if v.Kept != "s" || v.State != volume.Ready || v.Size != 2*gib || v.Epoch <= epoch || len(v.InSync()) != 1 || v.Replicas[1].Node != "n2" {
		t.Errorf("%+v", v)
	}
	if again := propose(t, s, c).(command.Volume); again.Created {
		t.Error("the same command twice began two copies")
	}
	verify(t, s)
	wantErr(t, s, copyOf(1, "s", 2, "p1", "p3"), volume.ErrBusy)
	for _, c := range []command.Command{
		command.Attach{Volume: id, Node: "n1", Capability: newVolume(1, "p1").Capabilities[0]}, command.BeginExpand{Volume: id, Target: 4 * gib},
		command.BeginSnapshot{ID: "t", Name: "t", Volume: id}, command.ModifyVolume{Volume: id}, command.BeginDetach{Volume: id, Epoch: v.Epoch},
		command.AddReplica{Volume: id, Replica: volume.Replica{ID: "r", Pool: "p3", Role: volume.Filling}}, command.DropReplica{Volume: id, Replica: c.To.ID},
		command.SetFilesystem{Volume: id, Filesystem: volume.Filesystem{Phase: volume.Formatting, Type: "xfs"}},
		command.Salvage{Volume: id, Replica: c.From.ID, Epoch: v.Epoch}, command.FinishCreate{Volume: id},
		command.BeginGroup{ID: "g", Name: "g", Volumes: []volume.ID{id}, IDs: []volume.SnapshotID{"u"}},
	} {
		wantErr(t, s, c, volume.ErrNotFound)
	}
	wantErr(t, s, command.LoseReplica{Volume: id, Replica: c.To.ID}, volume.ErrBusy)
	clone := newVolume(2, "p1")
	clone.Source = &volume.Source{Volume: id}
	wantErr(t, s, command.CreateVolume{Volume: clone}, volume.ErrNotFound)

	v = propose(t, s, command.OpenEngine{Volume: id, Node: "n1"}).(command.Volume).Volume
	propose(t, s, command.Commit{Volume: id, Node: "n1", Change: replication.Change{Reconfigure: &replication.Reconfigure{
		Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Add: []replication.Proof{{ID: c.To.ID, Incarnation: 1, BootID: 1}}}}})
	propose(t, s, command.ReportUsage{Now: 4, Node: "n2", Replicas: map[volume.ReplicaID]int64{c.To.ID: mib}})
	wantErr(t, s, command.AddHolder{Snapshot: "s", Node: "n2", Replica: c.To.ID}, volume.ErrDenied)
	propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p1", Lost: true})
	if x := propose(t, s, command.AddHolder{Snapshot: "s", Replica: c.From.ID}).(command.Snapshot).Snapshot; len(x.Holders) != 0 {
		t.Errorf("what was let go of is held again: %+v", x.Holders)
	}
	propose(t, s, command.AddHolder{Snapshot: "s", Node: "n1", Replica: c.To.ID})
	after, _ := s.Quotas(ctx)
	if len(before) != 1 || len(after) != 1 || before[0] != after[0] || after[0].Used.Volumes != 0 {
		t.Errorf("use was %+v, is %+v", before, after)
	}
	propose(t, s, command.BeginDelete{Volume: id})
	verify(t, s)
	propose(t, s, command.FinishDelete{Volume: id})
	x, _ := s.Snapshot(ctx, "s")
	ks, _ = s.Remains(ctx)
	if len(x.Holders) != 1 || x.Holders[0].Node != "n2" || len(ks) != 1 || ks[0].Protocol.Epoch <= v.Epoch {
		t.Errorf("%+v %+v", x, ks)
	}
	verify(t, s)
	wantErr(t, s, copyOf(1, "s", 3, "p2", "p2x"), volume.ErrNoSpace) // an unknown pool
	propose(t, s, command.BeginDeleteSnapshot{Snapshot: "s"})
	wantErr(t, s, copyOf(1, "s", 3, "p1", "p3"), volume.ErrNotFound)
	propose(t, s, command.FinishDeleteSnapshot{Snapshot: "s"})
	if ks, _ = s.Remains(ctx); len(ks) != 0 {
		t.Errorf("%+v is kept for nothing", ks)
	}
	verify(t, s)
}

// What is filled in late is not counted: it is freed by whoever deletes the snapshot, or ends the copy.
func TestNoHolderIsAddedOfWhatIsDeleted(t *testing.T) {
	for _, what := range []command.Command{command.BeginDeleteSnapshot{Snapshot: "s"}, command.BeginDelete{Volume: newVolume(1, "p1").ID}} {
		s, _ := keptWorld(t)
		c := copyOf(1, "s", 1, "p1", "p2")
		propose(t, s, c)
		propose(t, s, what)
		wantErr(t, s, command.AddHolder{Snapshot: "s", Replica: c.To.ID}, volume.ErrNotFound)
		verify(t, s)
	}
}

// A node that is away with what is left of a copy keeps nothing from being copied elsewhere, and frees it when it is back.
func TestACopyTakesOverWhatIsStillToBeFreed(t *testing.T) {
	ctx := context.Background()
	s, id := keptWorld(t)
	first := copyOf(1, "s", 1, "p1", "p2")
	propose(t, s, first)
	propose(t, s, command.BeginDelete{Volume: id})
	wantErr(t, s, copyOf(1, "s", 2, "p1", "p3"), volume.ErrBusy) // its replica on n1 is not freed yet
	propose(t, s, command.FreeReplica{Volume: id, Replica: first.From.ID})
	wantErr(t, s, copyOf(1, "s", 2, "p1", "p2"), volume.ErrBusy)
	second := copyOf(1, "s", 2, "p1", "p3")
	v := propose(t, s, second).(command.Volume).Volume
	if len(v.Leaving) != 1 || v.Leaving[0].ID != first.To.ID || len(v.Replicas) != 2 || v.State != volume.Ready {
		t.Errorf("%+v", v)
	}
	verify(t, s)
	propose(t, s, command.FreeReplica{Volume: id, Replica: first.To.ID})
	verify(t, s)
	propose(t, s, command.BeginDelete{Volume: id})
	propose(t, s, command.BeginDeleteSnapshot{Snapshot: "s"})
	propose(t, s, command.FinishDeleteSnapshot{Snapshot: "s"})
	propose(t, s, command.FinishDelete{Volume: id})
	verify(t, s)
	if ks, err := s.Remains(ctx); err != nil || len(ks) != 0 {
		t.Errorf("%+v %v", ks, err)
	}
	ns, err := s.Nodes(ctx)
	for _, n := range ns {
		if n.Pools[0].Provisioned != 0 || err != nil {
			t.Errorf("%+v %v", n, err)
		}
	}
}

// TestALateEndOfAnother: who finishes a delete means what was deleted then, and not what the same id stands for since.
func TestALateEndOfAnother(t *testing.T) {
	s, id := keptWorld(t)
	first := propose(t, s, copyOf(1, "s", 1, "p1", "p2")).(command.Volume).Volume
	late := command.FinishDelete{Volume: id, Epoch: propose(t, s, command.BeginDelete{Volume: first.ID}).(command.Volume).Volume.Epoch}
	propose(t, s, late)
	propose(t, s, copyOf(1, "s", 2, "p1", "p2"))
	propose(t, s, late)
	now := propose(t, s, command.BeginDelete{Volume: id}).(command.Volume).Volume
	propose(t, s, late)
	if v, err := s.Volume(context.Background(), id); err != nil || len(v.Replicas) != 2 {
		t.Errorf("%+v %v: what has to be freed is forgotten", v, err)
	}
	propose(t, s, command.FinishDelete{Volume: id, Epoch: now.Epoch})
	if _, err := s.Volume(context.Background(), id); !errors.Is(err, volume.ErrNotFound) {
		t.Error(err)
	}
	verify(t, s)
}

// TestANodeWithACopyIsNotRemoved: a copy may have been made there since its records were looked at.
func TestANodeWithACopyIsNotRemoved(t *testing.T) {
	s, id := keptWorld(t)
	propose(t, s, copyOf(1, "s", 1, "p1", "p2"))
	wantErr(t, s, command.RemoveNode{Node: "n2"}, volume.ErrInUse)
	propose(t, s, command.AddHolder{Snapshot: "s", Replica: replica(1, 11)})
	propose(t, s, command.BeginDelete{Volume: id})
	propose(t, s, command.FinishDelete{Volume: id})
	wantErr(t, s, command.RemoveNode{Node: "n2"}, volume.ErrInUse)
	propose(t, s, command.RemoveNode{Node: "n3"})
	propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
	propose(t, s, command.RemoveNode{Node: "n2"})
	verify(t, s)
}
