package meta

import (
	"context"
	"errors"
	"reflect"
	"testing"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestNoteDifference(t *testing.T) {
	ctx := context.Background()
	s := open(t, "")
	propose(t, s, node("n1", "p1"))
	propose(t, s, node("n2", "p2"))
	v := newVolume(1, "p1")
	second := volume.Replica{ID: replica(1, 1), Pool: "p2", Role: volume.Filling}
	v.Parameters.Replicas, v.Replicas = 2, append(v.Replicas, second)
	propose(t, s, command.CreateVolume{Volume: v})
	propose(t, s, command.FinishCreate{Volume: v.ID})
	propose(t, s, command.BeginSnapshot{Now: 2, ID: "s", Name: "s", Volume: v.ID})
	d := &volume.Difference{Offset: 1 << 23, Alike: [][]volume.PoolID{{"p1"}, {"p2"}}}
	note := command.NoteDifference{Snapshot: "s", Differs: d}
	refused := func(what string, c command.Command, want error) {
		t.Helper()
		if _, err := s.Propose(ctx, c); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("not ready", note, volume.ErrBusy)
	propose(t, s, command.FinishSnapshot{Cut: command.Cut{Snapshot: "s", ConfigVersion: 1, Holders: []volume.ReplicaID{replica(1, 0)}}})
	refused("not held by p2", note, volume.ErrBusy)
	refused("none", command.NoteDifference{Snapshot: "none"}, volume.ErrNotFound)
	propose(t, s, command.AddHolder{Snapshot: "s", Replica: second.ID})
	recorded := func() *volume.Difference {
		t.Helper()
		x, err := s.Snapshot(ctx, "s")
		if err != nil {
			t.Fatal(err)
		}
		return x.Differs
	}
	if propose(t, s, note); !reflect.DeepEqual(recorded(), d) {
		t.Errorf("%+v", recorded())
	}
	if propose(t, s, command.NoteDifference{Snapshot: "s"}); recorded() != nil {
		t.Errorf("%+v", recorded())
	}
	propose(t, s, command.BeginDeleteSnapshot{Snapshot: "s"})
	refused("being deleted", note, volume.ErrNotFound)
	verify(t, s)
}

// TestTheLastSoundCopyStays: whoever asks that one be dropped may have looked at the records before another was found damaged, or
// different.
func TestTheLastSoundCopyStays(t *testing.T) {
	s := open(t, "")
	propose(t, s, node("n1", "p1"))
	propose(t, s, node("n2", "p2"))
	v := newVolume(1, "p1")
	second := volume.Replica{ID: replica(1, 1), Pool: "p2", Role: volume.Filling}
	v.Parameters.Replicas, v.Replicas = 2, append(v.Replicas, second)
	for _, c := range []command.Command{
		command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID},
		command.BeginSnapshot{Now: 2, ID: "s", Name: "s", Volume: v.ID},
		command.FinishSnapshot{Cut: command.Cut{Snapshot: "s", ConfigVersion: 1, Holders: []volume.ReplicaID{replica(1, 0)}}},
		command.AddHolder{Snapshot: "s", Replica: second.ID},
		command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID},
	} {
		propose(t, s, c)
	}
	drop := command.DropHolder{Snapshot: "s", Pool: "p1"}
	damaged := func(is bool) {
		propose(t, s, command.ReportUsage{Now: 3, Node: "n2", DamagedSnapshots: map[volume.SnapshotID]bool{"s": is}})
	}
	damaged(true)
	wantErr(t, s, drop, volume.ErrInUse)
	damaged(false)
	propose(t, s, command.NoteDifference{Snapshot: "s", Differs: &volume.Difference{Alike: [][]volume.PoolID{{"p1"}, {"p2"}}}})
	wantErr(t, s, drop, volume.ErrInUse)
	damaged(true) // which says which is right
	propose(t, s, command.DropHolder{Snapshot: "s", Pool: "p2"})
	wantErr(t, s, drop, volume.ErrInUse)
	drop.Lost = true
	propose(t, s, drop)
	verify(t, s)
}
