package control_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// meanwhile has something happen just before a proposal: another controller is faster.
type meanwhile struct {
	control.Store
	before func(command.Command)
}

func (m meanwhile) Propose(ctx context.Context, c command.Command) (command.Result, error) {
	m.before(c)
	return m.Store.Propose(ctx, c)
}

func (w *world) other(before func(command.Command)) *control.Service {
	return control.New(meanwhile{w.store, before}, w.agents, control.Options{Now: func() time.Time { return w.now }})
}

// What one controller takes for unfinished, and another has finished just now, and told somebody of, stays.
func TestWhatAnotherControllerHasFinishedStays(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	cut := func(id volume.SnapshotID) command.Cut {
		x, err := w.Snapshot(ctx, id)
		if err != nil || x.Cut == nil {
			t.Fatalf("%+v %v", x, err)
		}
		holders := []volume.ReplicaID{v.Replicas[0].ID}
		if _, err := w.agents.CutSnapshot(ctx, "n1", control.SnapshotSpec{ID: id, Volume: v.ID, Barrier: *x.Cut, Replica: holders[0], Pool: "p1"}); err != nil {
			t.Fatal(err)
		}
		return command.Cut{Snapshot: id, Number: x.Cut.Number, ConfigVersion: x.Cut.ConfigVersion, Holders: holders}
	}

	const snap, member, group = volume.SnapshotID("snap-00000000000000000001"), volume.SnapshotID("snap-00000000000000000002"), volume.GroupID("group-00000000000000000003")
	w.propose(command.BeginSnapshot{Now: 1, ID: snap, Name: "s", Volume: v.ID})
	b := w.other(func(c command.Command) {
		if _, is := c.(command.BeginDeleteSnapshot); is {
			w.propose(command.FinishSnapshot{Cut: cut(snap)})
		}
	})
	wantErr(t, b.ResumeSnapshot(ctx, snap), nil)
	if x, err := w.Snapshot(ctx, snap); err != nil || x.State != volume.Ready {
		t.Errorf("the snapshot: %+v %v", x, err)
	}

	w.propose(command.BeginGroup{Now: 1, ID: group, Name: "g", Volumes: []volume.ID{v.ID}, IDs: []volume.SnapshotID{member}})
	b = w.other(func(c command.Command) {
		if _, is := c.(command.BeginDeleteGroup); is {
			w.propose(command.FinishGroup{Group: group, Cuts: []command.Cut{cut(member)}})
		}
	})
	wantErr(t, b.ResumeSnapshot(ctx, member), nil)
	if g, err := w.Group(ctx, group); err != nil || g.State != volume.Ready {
		t.Errorf("the group: %+v %v", g, err)
	}

	// The pool is full, and then it is not: the other controller makes what this one is about to undo.
	w.agents.script("CreateReplica", volume.ErrNoSpace)
	begun := false
	b = w.other(func(c command.Command) {
		if d, is := c.(command.BeginDelete); is && !begun {
			begun = true
			if _, err := w.CreateVolume(ctx, create("u")); err != nil {
				t.Errorf("volume %s: %v", d.Volume, err)
			}
		}
	})
	got, err := b.CreateVolume(ctx, create("u"))
	wantErr(t, err, nil)
	if u, err := w.Volume(ctx, got.ID); err != nil || u.State != volume.Ready || !begun {
		t.Errorf("the volume: %+v %v, begun %t", u, err, begun)
	}
	w.reconcile()
	w.check()
}

// A salvage decides on what it looked at: an epoch that another controller has begun since makes it start over, and one that only
// a replica knows, since the records are an old copy, is left behind: it would refuse the next engine.
func TestASalvageIsOfOneEpoch(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	for _, r := range v.Replicas {
		w.agents.reports[r.ID] = control.ReplicaReport{Present: true, Role: volume.InSync, Lineage: 1, Epoch: 70, ConfigVersion: 3, Size: gib}
	}
	b := w.other(func(c command.Command) {
		if _, is := c.(command.Salvage); is {
			w.mustAttach(v.ID, "n1")
			wantErr(t, w.Detach(ctx, v.ID, ""), nil)
		}
	})
	_, err := b.Salvage(ctx, v.ID, v.Replicas[1].ID, true)
	wantErr(t, err, volume.ErrBusy)
	if now := w.get(v.ID); now.Lineage != 1 || len(now.InSync()) != 2 {
		t.Errorf("%+v", now)
	}
	got, err := w.Salvage(ctx, v.ID, v.Replicas[1].ID, true)
	if err != nil || got.Epoch <= 70 || got.ConfigVersion <= 3 {
		t.Errorf("%+v %v", got, err)
	}
}

// Limits that a controller which does not lead could not tell a node are told by the one that does.
func TestLimitsThatAnotherControllerCouldNotTell(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	w.mustAttach(v.ID, "n1")
	pass := func() {
		w.reconcile()
		if _, err := w.State(ctx); err != nil {
			t.Fatal(err)
		}
	}
	pass()
	b := w.other(func(command.Command) {})
	for i, later := range []time.Duration{0, time.Hour} { // in which the other one leads
		w.agents.script("SetQoS", volume.ErrUnavailable)
		if _, err := b.ModifyVolume(ctx, v.ID, control.Modify{IOPS: new(int64(100 + i))}); err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(later)
		pass()
		w.reconcile()
		if got := w.agents.qos[v.ID].IOPS; got != int64(100+i) {
			t.Errorf("the node limits to %d IOPS", got)
		}
	}
}

// What a snapshot consists of is told by any of its holders, and by the next where one stops answering.
func TestExtentsOfAnyHolder(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.mustSnapshot("s", w.mustCreate(replicated("v", 3)).ID)
	w.agents.setDown(x.Holders[0].Node, true)
	w.agents.script("Extents", volume.ErrUnavailable) // after the first extent of the second
	var got []control.Extent
	wantErr(t, w.Extents(ctx, x.ID, "", 0, func(e control.Extent) error {
		got = append(got, e)
		return nil
	}), nil)
	if want := []control.Extent{{Offset: 0, Length: 4096}, {Offset: 4096, Length: 4096}}; !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	for _, h := range x.Holders {
		w.agents.setDown(h.Node, true)
	}
	wantErr(t, w.Extents(ctx, x.ID, "", 0, func(control.Extent) error { return nil }), volume.ErrUnavailable)
}
