package control_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What is said of each state of a snapshot: of a volume with replicas on n1 and n2, deleted unless the case says that it is not.
func TestWhySnapshot(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name  string
		lives bool
		set   func(w *world, x volume.Snapshot)
	}{
		{"its volume exists", true, func(*world, volume.Snapshot) {}},
		{"its volume exists, a holder is away", true, func(w *world, _ volume.Snapshot) { w.silence("n2", time.Hour) }},
		{"its volume is deleted", false, func(*world, volume.Snapshot) {}},
		{"a holder is away", false, func(w *world, _ volume.Snapshot) { w.silence("n2", 3*time.Minute) }},
		{"it is being copied", false, func(w *world, x volume.Snapshot) {
			w.silence("n2", time.Hour)
			v := w.begin(x)
			w.agents.runner = "n1"
			w.agents.running = &volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: v.Replicas[1].ID, Done: 1 << 20, Left: 3 << 20, Rate: 1 << 20, Snapshots: 1}}}
		}},
		{"it was copied", false, func(w *world, _ volume.Snapshot) { w.silence("n2", time.Hour); w.copyAll() }},
		{"a copy is damaged", false, func(w *world, x volume.Snapshot) { w.scrubbed("n2", nil, []volume.SnapshotID{x.ID}) }},
		{"all copies are damaged", false, func(w *world, x volume.Snapshot) {
			w.scrubbed("n1", nil, []volume.SnapshotID{x.ID})
			w.scrubbed("n2", nil, []volume.SnapshotID{x.ID})
		}},
		{"all holders are away", false, func(w *world, _ volume.Snapshot) {
			w.silence("n1", time.Hour)
			w.agents.setDown("n2", true)
			w.silence("n2", 3*time.Minute)
			w.silence("n1", 3*time.Minute)
			w.now = w.now.Add(time.Hour)
		}},
		{"every copy was forgotten", false, func(w *world, x volume.Snapshot) {
			for _, p := range []volume.PoolID{"p1", "p2"} {
				w.propose(command.DropHolder{Snapshot: x.ID, Pool: p, Lost: true})
			}
		}},
		{"its copies differ", true, func(w *world, x volume.Snapshot) {
			w.propose(command.NoteDifference{Snapshot: x.ID, Differs: &volume.Difference{Offset: 8 << 20, Alike: [][]volume.PoolID{{"p1"}, {"p2"}}}})
		}},
		{"its volume is lost", true, func(w *world, x volume.Snapshot) {
			v := w.get(x.Volume)
			w.propose(command.CloseEngine{Volume: v.ID, Epoch: v.Epoch})
			for _, r := range v.Replicas {
				w.propose(command.LoseReplica{Volume: v.ID, Replica: r.ID})
			}
		}},
		{"it is being deleted", false, func(w *world, x volume.Snapshot) {
			w.silence("n2", time.Hour)
			wantErr(w.t, w.DeleteSnapshot(ctx, x.ID), nil)
		}},
	} {
		w := newCluster(t)
		v := w.mustCreate(replicated("data", 2))
		x := w.mustSnapshot("monday", v.ID)
		if !c.lives {
			wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
		}
		c.set(w, x)
		text, err := w.WhySnapshot(ctx, x.ID)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		golden(t, "snapshot_"+strings.ReplaceAll(c.name, " ", "_"), text)
	}
	w := newCluster(t)
	if _, err := w.WhySnapshot(ctx, "snap-none"); !errors.Is(err, volume.ErrNotFound) {
		t.Error(err)
	}
	// One that is being cut.
	v := w.mustCreate(create("v"))
	w.agents.script("CutSnapshot", volume.ErrUnavailable)
	_, _ = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "tuesday", Volume: v.ID})
	xs, err := w.store.Snapshots(ctx, v.ID, "", 0)
	if err != nil || len(xs) != 1 {
		t.Fatal(xs, err)
	}
	if text, err := w.WhySnapshot(ctx, xs[0].ID); err != nil || !strings.HasPrefix(text, "Snapshot tuesday is being cut") {
		t.Errorf("%s %v", text, err)
	}
}
