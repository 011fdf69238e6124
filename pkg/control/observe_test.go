package control_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
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
