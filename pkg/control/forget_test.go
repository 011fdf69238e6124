package control_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestForgetPool(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	only, both, gone := w.mustCreate(create("only")), w.mustCreate(replicated("both", 2)), w.mustCreate(replicated("gone", 2))
	bad := only.Replicas[0].Pool
	node := only.Replicas[0].Node
	// Both others have a replica in that pool too.
	for _, v := range []volume.Volume{both, gone} {
		if !slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Pool == bad }) {
			t.Fatalf("%s is not in %s", on(v.Replicas), bad)
		}
	}
	x := w.mustSnapshot("s", only.ID)
	wantErr(t, w.SetQuota(ctx, "default", volume.Amounts{Volumes: 10}), nil)
	w.silence(node, 30*time.Second)
	_, err := w.ForgetPool(ctx, bad, true)
	if wantErr(t, err, volume.ErrInUse); err != nil && !strings.Contains(err.Error(), "try again in 1m31s") { // it is open
		t.Errorf("%v does not say until when", err)
	}
	_, err = w.ForgetPool(ctx, "p9", true)
	wantErr(t, err, volume.ErrNotFound)

	w.mustAttach(both.ID, "n4")
	w.silence(node, time.Hour)
	wantErr(t, w.DeleteVolume(ctx, gone.ID), nil) // its tombstone waits
	_, err = w.ForgetPool(ctx, bad, false)
	if wantErr(t, err, volume.ErrInUse); !strings.Contains(err.Error(), string(only.ID)) || !strings.Contains(err.Error(), string(x.ID)) {
		t.Errorf("%v names neither %s nor %s", err, only.ID, x.ID)
	}
	lost, err := w.ForgetPool(ctx, bad, true)
	if err != nil || !slices.Equal(lost.Volumes, []volume.ID{only.ID}) || !slices.Equal(lost.Snapshots, []volume.SnapshotID{x.ID}) {
		t.Fatalf("%+v %v", lost, err)
	}
	_, err = w.store.Volume(ctx, gone.ID)
	wantErr(t, err, volume.ErrNotFound)
	if got := w.get(both.ID); len(got.InSync()) != 1 {
		t.Errorf("on %s", on(got.Replicas))
	}
	w.repair()
	if got := w.get(both.ID); len(got.InSync()) != 2 {
		t.Errorf("on %s", on(got.Replicas))
	}
	// What is lost is shown, cannot be used, and can be deleted.
	h, err := w.Health(ctx, only.ID)
	if err != nil || len(h.Conditions) != 1 || h.Conditions[0].Severity != volume.DataLoss {
		t.Errorf("%+v %v", h, err)
	}
	_, err = w.Attach(ctx, control.Attach{Volume: only.ID, Node: "n3", Capability: mount()[0]})
	wantErr(t, err, volume.ErrDataLoss)
	_, err = w.ExpandVolume(ctx, only.ID, 2*gib, 0)
	wantErr(t, err, volume.ErrDataLoss)
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "t", Volume: only.ID})
	wantErr(t, err, volume.ErrDataLoss)
	for _, from := range []volume.Source{{Volume: only.ID}, {Snapshot: x.ID}} {
		r := create("copy")
		r.Source = &from
		_, err = w.CreateVolume(ctx, r)
		wantErr(t, err, volume.ErrDataLoss)
	}
	wantErr(t, w.DeleteVolume(ctx, only.ID), nil)
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	if qs, err := w.Quotas(ctx); err != nil || qs[0].Used.Volumes != 1 || qs[0].Used.Snapshots != 0 {
		t.Errorf("%+v %v", qs, err)
	}
	ns, err := w.Nodes(ctx)
	if err != nil || slices.ContainsFunc(ns, func(n volume.Node) bool {
		return slices.ContainsFunc(n.Pools, func(p volume.Pool) bool { return p.ID == bad })
	}) {
		t.Errorf("%+v %v", ns, err)
	}
}

func TestAPoolIsNotForgottenWhileAVolumeCouldBeSalvaged(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n4")
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[1].ID}})
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	w.silence(v.Replicas[0].Node, time.Hour)
	_, err := w.ForgetPool(ctx, v.Replicas[0].Pool, true)
	wantErr(t, err, volume.ErrBusy)
	r := v.Replicas[1]
	w.agents.reports[r.ID] = control.ReplicaReport{Present: true, Role: volume.Stale, Lineage: 1, ConfigVersion: 1, Size: gib}
	if _, err := w.Salvage(ctx, v.ID, r.ID, false); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ForgetPool(ctx, v.Replicas[0].Pool, false); err != nil {
		t.Error(err)
	}
	if got := w.get(v.ID); len(got.Replicas) != 1 || got.Lost {
		t.Errorf("on %s", on(got.Replicas))
	}
}

// TestForgetADiskWithSnapshotsOnly: nothing of a volume is placed on it, and what waits for it ends all the same.
func TestForgetADiskWithSnapshotsOnly(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x, y := w.orphan("v", "precious"), w.orphan("u", "other")
	gone := x.Holders[1]
	w.register(gone.Node, pool("p9", gone.Node, 100*gib)) // restarted without that disk
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	if why, err := w.WhySnapshot(ctx, y.ID); err != nil || !strings.Contains(why, "offline") {
		t.Errorf("%s %v", why, err)
	}
	if lost, err := w.ForgetPool(ctx, gone.Pool, false); err != nil || len(lost.Snapshots) != 0 {
		t.Errorf("%+v %v", lost, err)
	}
	for range 2 {
		p, err := w.Pending(ctx)
		wantErr(t, err, nil)
		for _, id := range p.Snapshots {
			wantErr(t, w.ResumeSnapshot(ctx, id), nil)
		}
	}
	if _, err := w.store.Snapshot(ctx, x.ID); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("its tombstone waits for the disk: %v", err)
	}
	if x := w.snapshotOf(y.ID); len(x.Holders) != 1 || x.Holders[0].Pool == gone.Pool {
		t.Errorf("%+v", x)
	}
	ns, err := w.store.Nodes(ctx)
	wantErr(t, err, nil)
	for _, n := range ns {
		for _, p := range n.Pools {
			if p.ID == gone.Pool {
				t.Errorf("the pool is still there: %+v", p)
			}
		}
	}
}
