package control_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// holdUp keeps the next call that deletes a snapshot in p2 on its way until it is released.
func (w *world) holdUp() (entered, release chan struct{}) {
	entered, release = make(chan struct{}), make(chan struct{})
	var held atomic.Bool
	w.agents.mu.Lock()
	defer w.agents.mu.Unlock()
	w.agents.read = nil
	w.agents.onDeleteSnapshot = func(p volume.PoolID) {
		if p == "p2" && held.CompareAndSwap(false, true) {
			close(entered)
			<-release
		}
	}
	return entered, release
}

// copyTo has a snapshot that n1, n2 and n3 had copied to a pool, as the node of one copy is away.
func (w *world) copyTo(x volume.Snapshot, p volume.PoolID) {
	w.t.Helper()
	w.silence("n1", replicaTimeout)
	w.comesBack("n1")
	w.silence("n3", replicaTimeout)
	wantErr(w.t, w.CopySnapshot(context.Background(), x.ID, "p1", p), nil)
	w.copyAll()
	w.comesBack("n3")
	if !w.inPool(x.ID, p) {
		w.t.Fatalf("held by %s", w.holders(x.ID))
	}
}

// A call that frees a copy arrives when the pool has been given another one: that stays.
func TestALateCallLeavesANewCopy(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.leaves()
	entered, release := w.holdUp()
	done := make(chan error, 1)
	old := w.Service
	go func() { done <- old.ResumeSnapshot(ctx, x.ID) }()
	<-entered
	w.restart()
	wantErr(t, w.ResumeSnapshot(ctx, x.ID), nil)
	w.copyTo(x, "p2")
	close(release)
	wantErr(t, <-done, nil)
	if got := w.holders(x.ID); got != "n1 n2 n3" || !w.inPool(x.ID, "p2") {
		t.Errorf("held by %s, in p2: %v", got, w.inPool(x.ID, "p2"))
	}
}

// A delete that waits for its turn asks the pools that hold the snapshot then.
func TestADeleteAsksHoldersThatCameWhileItWaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		w := newCluster(t)
		x := w.leaves()
		entered, release := w.holdUp()
		done := make(chan error, 2)
		go func() { done <- w.ResumeSnapshot(ctx, x.ID) }()
		<-entered
		go func() { done <- w.DeleteSnapshot(ctx, x.ID) }()
		synctest.Wait() // for the lock
		w.copyTo(x, "p4")
		close(release)
		wantErr(t, <-done, nil)
		wantErr(t, <-done, nil)
		if w.inPool(x.ID, "p4") {
			t.Error("p4 keeps what no record tells of")
		}
	})
}
