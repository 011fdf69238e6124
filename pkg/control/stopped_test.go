package control_test

import (
	"context"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// stops has a pool report that it has stopped, or not, for so long.
func (w *world) stops(node volume.NodeID, id volume.PoolID, failed bool, d time.Duration) {
	w.t.Helper()
	p := pool(id, node, 100*gib)
	p.Failed = failed
	for ; d >= 0; d -= time.Minute {
		for _, n := range []volume.NodeID{"n1", "n2", "n3", "n4"} {
			u := control.Usage{}
			if n == node {
				u.Pools = []volume.Pool{p}
			}
			wantErr(w.t, w.ReportUsage(context.Background(), n, u), nil)
		}
		if _, err := w.State(context.Background()); err != nil {
			w.t.Fatal(err)
		}
		w.now = w.now.Add(time.Minute)
	}
}

// A pool that has stopped is neither source nor target, and what it has is replaced when it stays so.
func TestAPoolThatHasStopped(t *testing.T) {
	w := newCluster(t)
	x := w.orphan("v", "precious")
	w.stops("n2", "p2", true, 2*time.Minute)
	if plan := w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v after a short time", plan)
	}
	w.stops("n2", "p2", false, 0)
	w.stops("n2", "p2", true, 5*time.Minute) // since then
	if plan := w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v after a short time", plan)
	}
	w.stops("n2", "p2", true, replicaTimeout)
	plan := w.planned()
	if len(plan) != 1 || plan[0].Kind != reconcile.Copy || plan[0].From != "p1" || plan[0].Pool != "p3" {
		t.Fatalf("planned %+v", plan)
	}
	w.stops("n3", "p3", true, 0)
	if plan = w.planned(); len(plan) != 1 || plan[0].Pool != "p4" {
		t.Errorf("planned %+v", plan)
	}
	w.stops("n1", "p1", true, 0)
	if plan = w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v", plan)
	}
	for _, n := range []volume.NodeID{"n1", "n2", "n3"} { // its daemon is restarted
		w.comesBack(n)
	}
	if plan = w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v", plan)
	}
	r := replicated("restored", 1)
	r.Source = &volume.Source{Snapshot: x.ID}
	w.stops("n1", "p1", true, 0)
	if v := w.mustCreate(r); v.Replicas[0].Pool != "p2" {
		t.Errorf("restored on %s", on(v.Replicas))
	}
}

// An engine that nobody needs ends while what it brings up is in a pool that has stopped: others are brought up from its node.
func TestAnEngineEndsWhenAPoolHasStopped(t *testing.T) {
	ctx := context.Background()
	for _, stopped := range []bool{false, true} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 1))
		to := volume.PoolID("p2")
		if v.Replicas[0].Pool == to {
			to = "p1"
		}
		wantErr(t, w.AddReplica(ctx, v.ID, to), nil)
		if err := w.Sync(ctx, v.ID); w.get(v.ID).Owner == "" {
			t.Fatalf("no engine: %v", err)
		}
		r := w.get(v.ID).Replicas[1]
		w.stops(r.Node, r.Pool, stopped, 0)
		wantErr(t, w.ResumeVolume(ctx, v.ID), nil)
		if open := w.get(v.ID).Owner != ""; open == stopped {
			t.Errorf("stopped %t: its engine is open: %t", stopped, open)
		}
	}
}
