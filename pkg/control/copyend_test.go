package control_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// One end that is of no use does not keep others from being one, and is tried again later.
func TestAnEndThatRefusesIsPassedBy(t *testing.T) {
	ctx := context.Background()
	for _, refuses := range []string{"the source", "the target"} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 2))
		x := w.mustSnapshot("s", v.ID)
		for _, p := range []volume.PoolID{"p1", "p2"} {
			w.agents.snapshots[x.ID+volume.SnapshotID("@"+p)] = fakeReplica{node: "n" + volume.NodeID(p[1:]), pool: p, bytes: "precious"}
		}
		wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
		wantErr(t, w.EmptyNode(ctx, "n2"), nil)
		first := w.planned()[0]
		want := volume.ErrNotFound
		if refuses == "the source" {
			w.agents.script("CreateReplica", want)
		} else {
			want = volume.ErrUnavailable
			w.agents.setDown("n"+volume.NodeID(first.Pool[1:]), true)
		}
		wantErr(t, w.CopySnapshot(ctx, x.ID, first.From, first.Pool), want)
		next := w.planned()[0]
		if refuses == "the source" && (next.From == first.From || next.Pool != first.Pool) || refuses == "the target" && next.Pool == first.Pool {
			t.Errorf("%s: planned %+v, then %+v", refuses, first, next)
		}
		w.now = w.now.Add(11 * time.Minute)
		for i := 1; i <= 4; i++ {
			w.comesBack(volume.NodeID(fmt.Sprint("n", i)))
		}
		if later := w.planned()[0]; later != first {
			t.Errorf("%s: planned %+v, later %+v", refuses, first, later)
		}
	}
}

// A copy whose pool has run full ends, and is made elsewhere.
func TestAFullPoolIsNotFilledAgain(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.orphan("v", "precious")
	w.silence("n2", replicaTimeout)
	v := w.begin(x)
	to := v.Replicas[1]
	report := func(used int64) {
		w.t.Helper()
		wantErr(t, w.ReportUsage(ctx, to.Node, control.Usage{Pools: []volume.Pool{{ID: to.Pool, Capacity: 100 * gib, OverProvision: 10, Used: used}}}), nil)
	}
	report(100 * gib)
	plan := w.planned()
	if len(plan) == 0 || plan[0].Kind != reconcile.End {
		t.Fatalf("planned %+v", plan)
	}
	wantErr(t, w.EndCopy(ctx, v.ID, to.ID), nil)
	report(0) // what was filled in is freed
	w.copyAll()
	if got := w.holders(x.ID); got != "n1 n2 n4" {
		t.Errorf("held by %s", got)
	}
}

// A process that led, and frees what a copy was made with, goes on late: another has freed it, and copied again to the same pool.
func TestALateEndSparesWhatIsThereSince(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.orphan("v", "precious")
	w.silence("n2", replicaTimeout)
	v := w.begin(x)
	to := v.Replicas[1]
	late := w.Service
	w.restart()
	w.agents.onFreed = func(id volume.ReplicaID) {
		if id != to.ID {
			return
		}
		w.agents.mu.Lock()
		w.agents.onFreed = nil
		w.agents.mu.Unlock()
		if err := w.ResumeVolume(ctx, v.ID); err != nil {
			t.Error(err)
		}
		if err := w.CopySnapshot(ctx, x.ID, v.Replicas[0].Pool, to.Pool); err != nil {
			t.Error(err)
		}
		w.fill()
	}
	if err := late.EndCopy(ctx, v.ID, to.ID); err != nil {
		t.Log(err)
	}
	if got := w.holders(x.ID); got != "n1 n2 n3" {
		t.Fatalf("held by %s", got)
	}
	w.agents.mu.Lock()
	got := w.agents.snapshots[x.ID+volume.SnapshotID("@"+to.Pool)].bytes
	w.agents.mu.Unlock()
	if got != "precious" {
		t.Errorf("a copy that is recorded is %q", got)
	}
	w.comesBack("n2")
	w.reconcile()
	w.check()
}

// A volume that is lost brings no snapshot anywhere; once it is deleted its snapshots are copied.
func TestASnapshotOfALostVolume(t *testing.T) {
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	x := w.mustSnapshot("s", v.ID)
	for _, p := range []volume.PoolID{"p1", "p2"} {
		w.agents.snapshots[x.ID+volume.SnapshotID("@"+p)] = fakeReplica{node: "n" + volume.NodeID(p[1:]), pool: p, bytes: "precious"}
	}
	v = w.get(v.ID)
	w.propose(command.CloseEngine{Volume: v.ID, Epoch: v.Epoch})
	for _, r := range v.Replicas {
		w.propose(command.LoseReplica{Volume: v.ID, Replica: r.ID})
	}
	wantErr(t, w.DeleteVolume(context.Background(), v.ID), nil)
	w.silence("n2", replicaTimeout)
	w.copyAll()
	if got := w.holders(x.ID); got != "n1 n2 n3" {
		t.Errorf("held by %s", got)
	}
}
