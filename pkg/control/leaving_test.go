package control_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// three makes a snapshot of a deleted volume that is held on n1, n2 and n3, one more than it should be.
func (w *world) three() volume.Snapshot {
	w.t.Helper()
	ctx := context.Background()
	x := w.orphan("v", "precious")
	wantErr(w.t, w.EmptyNode(ctx, "n2"), nil)
	w.copyAll()
	if got := w.holders(x.ID); got != "n1 n2 n3" {
		w.t.Fatalf("held by %s", got)
	}
	return x
}

// leaves has n2, where its copy is being read, give that up.
func (w *world) leaves() volume.Snapshot {
	w.t.Helper()
	x := w.three()
	w.agents.read = map[volume.SnapshotID]bool{x.ID + "@p2": true}
	plan := w.planned()
	if len(plan) != 1 || plan[0].Kind != reconcile.Move || plan[0].Pool != "p2" {
		w.t.Fatalf("planned %+v", plan)
	}
	w.carryOut(plan[0])
	wantErr(w.t, w.UndrainNode(context.Background(), "n2"), nil)
	if got := w.leaving(x.ID); got != "p2" {
		w.t.Fatalf("to be freed in %q", got)
	}
	return w.snapshotOf(x.ID)
}

func (w *world) leaving(id volume.SnapshotID) string {
	w.t.Helper()
	var in []string
	for _, h := range w.snapshotOf(id).Leaving {
		in = append(in, string(h.Pool))
	}
	return strings.Join(in, " ")
}

func (w *world) inPool(x volume.SnapshotID, p volume.PoolID) bool {
	w.agents.mu.Lock()
	defer w.agents.mu.Unlock()
	_, ok := w.agents.snapshots[x+volume.SnapshotID("@"+p)]
	return ok
}

// A pool that refuses to let go of a copy is asked until it does, by whoever leads then. Till then it is neither a copy nor a stray,
// its bytes are counted, and nothing new comes there.
func TestAPoolThatRefusesIsAskedAgain(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.leaves()
	if got := w.holders(x.ID); got != "n1 n3" {
		t.Errorf("held by %s", got)
	}
	for range 2 {
		w.restart()
		wantErr(t, w.ResumeSnapshot(ctx, x.ID), volume.ErrBusy)
	}
	if why, err := w.WhySnapshot(ctx, x.ID); err != nil || !strings.Contains(why, "pool p2 on node n2 is none any more") || !strings.Contains(why, "2 pools") {
		t.Errorf("%s %v", why, err)
	}
	w.comesBack("n2")
	for range 2 {
		w.now = w.now.Add(2 * time.Minute)
		wantErr(t, w.ReportUsage(ctx, "n2", control.Usage{Snapshots: map[volume.SnapshotID]int64{x.ID: mib}}), nil)
	}
	if strays, err := w.Strays(ctx); err != nil || len(strays) > 0 {
		t.Errorf("%+v %v", strays, err)
	}
	used := func() int64 {
		qs, err := w.Quotas(ctx)
		if err != nil || len(qs) != 1 {
			t.Fatalf("%+v %v", qs, err)
		}
		return qs[0].Used.PhysicalBytes
	}
	if got := used(); got != mib || w.snapshotOf(x.ID).PhysicalBytes != mib {
		t.Errorf("%d bytes are used", got)
	}

	w.silence("n1", replicaTimeout)
	w.comesBack("n1")
	w.silence("n3", replicaTimeout)
	plan := w.planned()
	if len(plan) != 1 || plan[0].Kind != reconcile.Copy || plan[0].From != "p1" || plan[0].Pool != "p4" {
		t.Fatalf("planned %+v", plan)
	}
	wantErr(t, w.CopySnapshot(ctx, x.ID, "p1", "p2"), volume.ErrBusy)
	w.agents.read = nil
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
	if w.leaving(x.ID) != "" || w.inPool(x.ID, "p2") || used() != 0 {
		t.Errorf("to be freed in %q, %d bytes are used", w.leaving(x.ID), used())
	}
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
	wantErr(t, w.CopySnapshot(ctx, x.ID, "p1", "p2"), nil) // as if nothing had ever been there
	w.copyAll()
	if got := w.holders(x.ID); got != "n1 n2 n3" || !w.inPool(x.ID, "p2") {
		t.Errorf("held by %s", got)
	}
	w.comesBack("n3")
	w.reconcile()
	w.check()
}

// A replica of the volume does not come either where a copy of its snapshot leaves.
func TestNoReplicaMeetsWhatLeaves(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	x := w.mustSnapshot("s", v.ID)
	wantErr(t, w.EmptyNode(ctx, "n2"), nil)
	w.repairUntilMoved(x.ID)
	wantErr(t, w.UndrainNode(ctx, "n2"), nil)
	w.silence("n3", replicaTimeout)
	for _, a := range w.planned() {
		if a.Kind == reconcile.Add && a.Pool != "p4" {
			t.Errorf("planned %+v", a)
		}
	}
	wantErr(t, w.AddReplica(ctx, v.ID, "p2"), volume.ErrBusy)
	w.agents.read = nil
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
	wantErr(t, w.AddReplica(ctx, v.ID, "p2"), nil)
}

// repairUntilMoved empties n2, where the copy of a snapshot is being read in the end.
func (w *world) repairUntilMoved(id volume.SnapshotID) {
	w.t.Helper()
	ctx := context.Background()
	w.agents.read = map[volume.SnapshotID]bool{id + "@p2": true}
	for range 20 {
		for _, a := range w.planned() {
			w.carryOut(a)
		}
		v := w.get(w.snapshotOf(id).Volume)
		w.engine(v.ID)
		for _, r := range w.get(v.ID).InSync() { // which its fill has brought along
			w.agents.mu.Lock()
			w.agents.snapshots[id+volume.SnapshotID("@"+r.Pool)] = fakeReplica{node: r.Node, pool: r.Pool}
			w.agents.mu.Unlock()
			if err := w.AddHolder(ctx, id, r.ID); err != nil && !errors.Is(err, volume.ErrNotFound) {
				w.t.Fatal(err)
			}
		}
		_ = w.ResumeVolume(ctx, v.ID)
		if w.leaving(id) == "p2" {
			return
		}
	}
	w.t.Fatalf("%+v", w.snapshotOf(id))
}

// Deleting a snapshot deletes what leaves too, when its pool can.
func TestWhatLeavesIsDeletedWithItsSnapshot(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.leaves()
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), volume.ErrBusy)
	if !w.inPool(x.ID, "p2") || w.inPool(x.ID, "p1") {
		t.Error("the pool that refuses keeps nobody waiting")
	}
	w.restart()
	w.agents.read = nil
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
	_, err := w.store.Snapshot(ctx, x.ID)
	wantErr(t, err, volume.ErrNotFound)
	w.check()
}

// A pool that is forgotten, and a node that is removed, take along what they have yet to free; nothing waits for them.
func TestWhatLeavesGoesWithItsPool(t *testing.T) {
	ctx := context.Background()
	for _, end := range []string{"forget", "remove"} {
		for _, deleted := range []bool{false, true} {
			t.Run(fmt.Sprint(end, " deleted ", deleted), func(t *testing.T) {
				w := newCluster(t)
				x := w.leaves()
				w.silence("n2", replicaTimeout)
				wantErr(t, w.ResumeSnapshot(ctx, x.ID), volume.ErrUnavailable)
				if deleted {
					wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
					wantErr(t, w.ResumeSnapshot(ctx, x.ID), volume.ErrUnavailable)
				}
				if end == "forget" {
					lost, err := w.ForgetPool(ctx, "p2", false)
					if err != nil || len(lost.Snapshots) > 0 {
						t.Fatalf("%+v %v", lost, err)
					}
				} else {
					wantErr(t, w.RemoveNode(ctx, "n2"), nil)
				}
				wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
				got, err := w.store.Snapshot(ctx, x.ID)
				if deleted {
					wantErr(t, err, volume.ErrNotFound)
				} else if err != nil || len(got.Leaving) > 0 || w.holders(x.ID) != "n1 n3" {
					t.Errorf("%+v %v", got, err)
				}
				delete(w.agents.snapshots, x.ID+"@p2") // with its disk
				w.check()
			})
		}
	}
}

// leaveCase gives up one copy of a snapshot.
func leaveCase(grow func(w *world)) useCase {
	return useCase{
		name: "a copy leaves",
		setup: func(w *world) string {
			grow(w)
			wantErr(w.t, w.UndrainNode(context.Background(), "n2"), nil)
			x := w.three()
			return string(x.ID)
		},
		run: func(w *world, ctx context.Context, arg string) error {
			return w.DropHolder(ctx, volume.SnapshotID(arg), "p2")
		},
		done: func(w *world, arg string) {
			if got := w.holders(volume.SnapshotID(arg)); got != "n1 n3" {
				w.t.Errorf("held by %s", got)
			}
		},
	}
}

// A replica that its node cannot free keeps an expand from nothing, and is freed while a detach cannot end.
func TestAReplicaThatLeavesKeepsNothingWaiting(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	gone := v.Replicas[1]
	w.propose(command.DropReplica{Volume: v.ID, Replica: gone.ID})
	w.silence(gone.Node, 3*time.Minute)
	w.register(gone.Node) // its disk is not there
	w.propose(command.BeginExpand{Volume: v.ID, Target: 2 * gib})
	wantErr(t, w.ResumeVolume(ctx, v.ID), volume.ErrUnavailable)
	if got := w.get(v.ID); got.Size != 2*gib || got.Target != 0 || len(got.Leaving) != 1 {
		t.Errorf("%+v", got)
	}
	v = w.mustAttach(v.ID, "n4")
	w.propose(command.BeginDetach{Volume: v.ID, Epoch: v.Epoch})
	w.comesBack(gone.Node)
	w.agents.setDown("n1", true)
	w.agents.setDown("n4", true)
	wantErr(t, w.ResumeVolume(ctx, v.ID), volume.ErrUnavailable)
	if got := w.get(v.ID); got.Attachment == nil || len(got.Leaving) != 0 {
		t.Errorf("%+v", got)
	}
	w.comesBack("n1")
	w.comesBack("n4")
	w.reconcile()
	w.check()
}
