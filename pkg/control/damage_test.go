package control_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// scrubbed has a node report of what a scrub found there.
func (w *world) scrubbed(node volume.NodeID, replicas []volume.ReplicaID, snapshots []volume.SnapshotID) {
	w.t.Helper()
	u := control.Usage{DamagedReplicas: map[volume.ReplicaID]bool{}, DamagedSnapshots: map[volume.SnapshotID]bool{}}
	for _, id := range replicas {
		u.DamagedReplicas[id] = true
	}
	for _, id := range snapshots {
		u.DamagedSnapshots[id] = true
	}
	w.now = w.now.Add(time.Second)
	wantErr(w.t, w.ReportUsage(context.Background(), node, u), nil)
}

func (w *world) planned() []reconcile.Action {
	w.t.Helper()
	st, err := w.State(context.Background())
	wantErr(w.t, err, nil)
	return reconcile.Repairs(st, reconcile.Limits{})
}

func TestADamagedReplicaIsReplaced(t *testing.T) {
	for _, attached := range []bool{false, true} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 2))
		x := w.mustSnapshot("s", v.ID)
		if attached {
			w.mustAttach(v.ID, "n1")
		}
		bad, good := v.Replicas[0], v.Replicas[1]
		before := w.get(v.ID)
		w.scrubbed("n1", nil, nil)
		if n := len(w.planned()); n != 0 {
			t.Fatalf("%d repairs of what is sound", n)
		}
		w.scrubbed("n2", []volume.ReplicaID{bad.ID}, nil) // it is not there
		w.scrubbed(bad.Node, []volume.ReplicaID{bad.ID, "rep-none"}, []volume.SnapshotID{x.ID, "snap-none"})
		got := w.get(v.ID)
		if !got.Replicas[0].Damaged || got.Replicas[1].Damaged || got.Epoch != before.Epoch || got.ConfigVersion != before.ConfigVersion {
			t.Fatalf("record %+v", got)
		}
		w.restart() // it is recorded, not remembered
		w.repair()
		got = w.get(v.ID)
		if len(got.InSync()) != 2 || len(got.Replicas) != 2 || len(got.Leaving) != 0 || got.Replicas[0].Node == bad.Node || got.Replicas[1].Node == bad.Node {
			t.Errorf("attached %v: on %s, leaving %d", attached, on(got.Replicas), len(got.Leaving))
		}
		if got.Replicas[0].ID != good.ID || got.Replicas[0].Damaged || got.Replicas[1].Damaged {
			t.Errorf("replicas %+v", got.Replicas)
		}
	}
}

// The damage goes with the replica, and neither the new one nor a clone is made from it.
func TestDamageIsNotCopied(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	x := w.mustSnapshot("s", v.ID)
	bad := v.Replicas[0]
	w.scrubbed(bad.Node, []volume.ReplicaID{bad.ID}, []volume.SnapshotID{x.ID})
	r := replicated("restored", 1)
	r.Source = &volume.Source{Snapshot: x.ID}
	if clone := w.mustCreate(r); clone.Replicas[0].Node == bad.Node {
		t.Errorf("restored on %s, where it is damaged", on(clone.Replicas))
	}
	// The new replica fills the snapshot in; then the damaged holder goes.
	for range 20 {
		plan := w.planned()
		if len(plan) == 0 {
			break
		}
		w.carryOut(plan[0])
		w.engine(v.ID)
		for _, r := range w.get(v.ID).InSync() {
			wantErr(t, w.AddHolder(ctx, x.ID, r.ID), nil)
			w.agents.mu.Lock()
			w.agents.snapshots[volume.SnapshotID(fmt.Sprintf("%s@%s", x.ID, r.Pool))] = fakeReplica{pool: r.Pool}
			w.agents.mu.Unlock()
		}
	}
	got, err := w.Snapshot(ctx, x.ID)
	if err != nil || len(got.Holders) != 2 {
		t.Fatalf("%+v %v", got, err)
	}
	for _, h := range got.Holders {
		if h.Node == bad.Node || h.Damaged {
			t.Errorf("it is still held by %+v", h)
		}
	}
}

func TestTheLastGoodReplicaStays(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	damage := volume.Condition{Severity: volume.DataLoss, Reason: "ExtentCorrupt",
		Message: "pool p1 has damage in a layer of snapshot s: at offset 65536: checksum; run \"ballastctl pool check\" and restore what it names"}
	w.agents.conditions = []volume.Condition{damage}
	w.agents.troubled = v.Replicas[0].Node
	w.scrubbed(v.Replicas[0].Node, []volume.ReplicaID{v.Replicas[0].ID}, nil)
	h, err := w.Health(ctx, v.ID)
	if err != nil || len(h.Conditions) != 1 || h.Conditions[0].Severity != volume.Degraded || !strings.Contains(h.Conditions[0].Message, "snapshot s: at offset 65536") {
		t.Errorf("another is sound: %+v %v", h.Conditions, err)
	}
	w.agents.troubled = ""
	w.scrubbed(v.Replicas[1].Node, []volume.ReplicaID{v.Replicas[1].ID}, nil)
	if plan := w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v", plan)
	}
	h, err = w.Health(ctx, v.ID)
	if err != nil || len(h.Conditions) != 1 || h.Conditions[0] != damage {
		t.Errorf("none is sound: %+v %v", h.Conditions, err)
	}
	// A later scrub finds one sound.
	w.scrubbed(v.Replicas[1].Node, nil, nil)
	if plan := w.planned(); len(plan) != 1 || plan[0].Kind != reconcile.Add {
		t.Errorf("planned %+v", plan)
	}
}
