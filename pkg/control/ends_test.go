package control_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What is still being undone is not told as a final refusal, whatever the node says about it.
func TestARefusalIsFinalOnceItIsUndone(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	src := w.mustCreate(create("src"))
	for _, odd := range []error{volume.ErrNotFound, volume.ErrInUse, errors.New("odd")} {
		w.agents.script("CreateReplica", volume.ErrNoSpace)
		w.agents.script("DeleteReplica", odd)
		_, err := w.CreateVolume(ctx, create("v"))
		if final(err) {
			t.Errorf("a volume that exists: %v", err)
		}
		w.agents.script("CutSnapshot", volume.ErrNoSpace)
		w.agents.script("DeleteSnapshot", odd)
		_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: src.ID})
		if final(err) {
			t.Errorf("a snapshot that exists: %v", err)
		}
		w.reconcile()
		w.check()
	}
}

// An expand whose end is not known goes on; one that a node refuses is taken back, whatever has grown: nobody sees more than the
// record says.
func TestAnExpandGoesOnOrIsTakenBack(t *testing.T) {
	ctx := context.Background()
	for _, odd := range []error{volume.ErrNotFound, volume.ErrDataLoss, volume.ErrInUse, errors.New("odd")} {
		w := newWorld(t)
		v := w.mustCreate(create("v"))
		w.agents.script("device", odd) // after the replica has grown
		_, err := w.ExpandVolume(ctx, v.ID, 2*gib, 0)
		wantErr(t, err, volume.ErrUnavailable)
		r := create("clone")
		r.Source = &volume.Source{Volume: v.ID}
		_, err = w.CreateVolume(ctx, r)
		wantErr(t, err, volume.ErrBusy)
		w.reconcile()
		w.check()
		if v, err = w.Volume(ctx, v.ID); err != nil || v.Size != 2*gib {
			t.Errorf("after %v: %+v %v", odd, v, err)
		}

		w.agents.script("device", odd)
		_, err = w.ExpandVolume(ctx, v.ID, 3*gib, 0)
		wantErr(t, err, volume.ErrUnavailable)
		w.agents.script("ResizeReplica", volume.ErrNoSpace)
		_, err = w.ExpandVolume(ctx, v.ID, 3*gib, 0)
		wantErr(t, err, volume.ErrNoSpace)
		if v, err = w.Volume(ctx, v.ID); err != nil || v.Size != 2*gib || v.Target != 0 {
			t.Errorf("after a refusal: %+v %v", v, err)
		}
		w.check()
		r.RequiredBytes = v.Size
		w.mustCreate(r)
		w.check()
	}
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	w.agents.script("ResizeReplica", volume.ErrNoSpace) // nothing has grown
	_, err := w.ExpandVolume(ctx, v.ID, 2*gib, 0)
	wantErr(t, err, volume.ErrNoSpace)
	w.check()
}

// A node that did not report while the controller was down is not a node without room.
func TestNodesReportFirst(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.now = w.now.Add(time.Hour)
	w.restart()
	_, err := w.CreateVolume(ctx, create("v"))
	wantErr(t, err, volume.ErrUnavailable)
	_, err = w.Capacity(ctx, control.CapacityQuery{})
	wantErr(t, err, volume.ErrUnavailable)
	w.now = w.now.Add(3 * time.Minute)
	_, err = w.CreateVolume(ctx, create("v"))
	wantErr(t, err, volume.ErrNoSpace)
	w.register("n1", pool("p1", "n1", 100*gib))
	w.mustCreate(create("v"))
}

// What a list shows: a volume from its record on, a snapshot from its cut on, and neither once it is deleted.
func TestListsOfTheUnfinished(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	made := w.mustCreate(create("made"))
	w.mustCreate(create("gone"))
	w.agents.script("CreateReplica", volume.ErrUnavailable)
	_, err := w.CreateVolume(ctx, create("making"))
	wantErr(t, err, volume.ErrUnavailable)
	w.agents.script("CutSnapshot", volume.ErrUnavailable)
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: made.ID})
	wantErr(t, err, volume.ErrUnavailable)
	gone, err := w.store.VolumeByName(ctx, "gone")
	if err != nil {
		t.Fatal(err)
	}
	w.agents.script("DeleteReplica", volume.ErrUnavailable)
	wantErr(t, w.DeleteVolume(ctx, gone.ID), nil)

	for _, all := range []bool{false, true} {
		names := map[string]bool{}
		vs, _, err := w.Volumes(ctx, control.Page{All: all})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range vs {
			names[v.Name] = true
		}
		xs, _, err := w.Snapshots(ctx, control.SnapshotFilter{}, control.Page{All: all})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(names, len(xs)), map[bool]string{
			false: "map[made:true making:true] 0",
			true:  "map[gone:true made:true making:true] 1",
		}[all]; got != want {
			t.Errorf("all %t: %s, want %s", all, got, want)
		}
	}
}

// growing is a store whose source grows between the choice of a clone's size and its record.
type growing struct {
	control.Store
	once sync.Once
	grow func()
}

func (g *growing) Propose(ctx context.Context, c command.Command) (command.Result, error) {
	if _, ok := c.(command.CreateVolume); ok {
		g.once.Do(g.grow)
	}
	return g.Store.Propose(ctx, c)
}

func TestGrownBeforeTheRecord(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	src := w.mustCreate(create("src"))
	s := control.New(&growing{Store: w.store, grow: func() {
		if _, err := w.ExpandVolume(ctx, src.ID, 2*gib, 0); err != nil {
			t.Error(err)
		}
	}}, w.agents, control.Options{Now: func() time.Time { return w.now }})
	r := create("v")
	r.Source, r.RequiredBytes = &volume.Source{Volume: src.ID}, 0
	v, err := s.CreateVolume(ctx, r)
	if err != nil || v.Size != 2*gib {
		t.Errorf("size %d, %v", v.Size, err)
	}
	w.check()
}
