package control_test

import (
	"context"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// However many volumes there are, each node is asked a few times, and one that hangs is waited for once.
func TestManyVolumesAreAskedAboutAtOnce(t *testing.T) {
	w := newCluster(t)
	const volumes = 1000
	for i := range volumes {
		r := replicated(fmt.Sprint("v", i), 3)
		r.RequiredBytes = 1 << 20
		w.mustCreate(r)
	}
	look := func() (int, time.Duration) {
		w.agents.mu.Lock()
		w.agents.observed = 0
		w.agents.mu.Unlock()
		start := time.Now()
		hs, _, err := w.Unhealthy(context.Background(), control.Page{All: true})
		if err != nil {
			t.Fatal(err)
		}
		w.agents.mu.Lock()
		defer w.agents.mu.Unlock()
		if w.agents.observed > 20 {
			t.Errorf("%d calls for %d volumes on 4 nodes", w.agents.observed, volumes)
		}
		return len(hs), time.Since(start)
	}
	sick, took := look()
	if sick != 0 {
		t.Errorf("%d of them are not well", sick)
	}
	t.Logf("%d volumes: %s", volumes, took)
	w.agents.hanging("n2")
	if sick, took = look(); sick == 0 {
		t.Error("all are well, though a node with replicas hangs")
	}
	t.Logf("with a node that hangs: %s, %d not well", took, sick)
}

// Volumes that are well are listed too, with what their nodes tell of each replica; of a node that is down nothing is told.
func TestHealthsTellOfFlushes(t *testing.T) {
	w := newCluster(t)
	a, b := w.mustCreate(replicated("a", 3)), w.mustCreate(replicated("b", 2))
	at := map[volume.ReplicaID]volume.Timestamp{}
	for i, r := range append(a.Replicas, b.Replicas...) {
		at[r.ID] = volume.Timestamp(i + 1)
	}
	silent := b.Replicas[0] // was never flushed
	delete(at, silent.ID)
	w.agents.mu.Lock()
	w.agents.flushed = at
	w.agents.mu.Unlock()
	look := func(down volume.NodeID) {
		t.Helper()
		hs, next, err := w.Healths(t.Context(), control.Page{})
		if err != nil || next != "" || len(hs) != 2 {
			t.Fatalf("%+v, next %q, %v", hs, next, err)
		}
		got := map[volume.ReplicaID]volume.Timestamp{}
		for _, h := range hs {
			maps.Copy(got, h.LastFlush)
		}
		want := maps.Clone(at)
		for _, r := range append(a.Replicas, b.Replicas...) {
			if r.Node == down {
				delete(want, r.ID)
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("with %q down: %v, want %v", down, got, want)
		}
	}
	look("")
	w.agents.setDown(a.Replicas[0].Node, true)
	look(a.Replicas[0].Node)
}
