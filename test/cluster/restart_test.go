package cluster

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/test/harness"
)

// TestRestartOfAll ends all nodes at once, by force and properly, under volumes that are in use on each of them, and starts
// them at once: raw volumes keep what the checker says that they must, filesystems what was synced, and the paths work again
// without a call of the orchestrator.
func TestRestartOfAll(t *testing.T) {
	r := newRun(t, options{})
	var mounted []*mountedClaim
	for i, fsType := range []string{"ext4", "xfs", "ext4"} {
		m := &mountedClaim{w: r.world, node: i, claim: &harness.Claim{
			Name: fmt.Sprint("files-", i), Size: 320 * mib, FSType: fsType, Parameters: map[string]string{"replicas": "3"}}}
		must(t, r.at(i).Up(t.Context(), m.claim))
		mounted = append(mounted, m)
	}
	for lap, end := range []func(*harness.Daemon) error{(*harness.Daemon).Kill, stopWithOthers, (*harness.Daemon).Kill} {
		t.Logf("lap %d", lap+1)
		must(t, r.working("before the restart"))
		for _, m := range mounted {
			must(t, m.write(fmt.Sprint("lap-", lap)))
		}
		for _, s := range r.served {
			s.lose()
		}
		var g errgroup.Group
		for _, n := range r.Nodes() {
			g.Go(func() error { return end(n) })
		}
		must(t, g.Wait())
		must(t, r.each(r.served, func(s *served) error { return s.lost(s.use) }))
		must(t, r.Restart(t.Context()))
		for _, m := range mounted {
			m.back()
		}
		must(t, r.each(r.served, (*served).again))
		must(t, r.working("after a restart of all nodes"))
		must(t, r.each(r.served, (*served).check))
	}
	must(t, r.settle())
	for _, m := range mounted {
		o := r.at(m.node)
		must(t, o.Again(t.Context(), m.claim))
		must(t, m.verify())
		must(t, o.Down(t.Context(), m.claim))
		must(t, o.Delete(t.Context(), m.claim))
	}
	must(t, r.each(r.served, (*served).end))
	r.nothingLeft()
}

// stopWithOthers stops a daemon while others are stopped too. The last of them may find nobody to keep what it has still to
// write out, and says so: the same is lost as in a power cut, which is what was not synced.
func stopWithOthers(d *harness.Daemon) error {
	err := d.Stop()
	if err != nil && strings.Contains(err.Error(), "what was not synced by its workload may be lost") {
		return nil
	}
	return err
}

// newRun is a cluster with one volume in use on each of three nodes.
func newRun(t *testing.T, o options) *faultRun {
	t.Helper()
	r := &faultRun{world: newWorld(t, o), count: map[string]int{}, rest: map[string]time.Duration{}}
	for i := range volumes {
		s, err := r.serve(fmt.Sprint("served-", i), i%3)
		must(t, err)
		r.served = append(r.served, s)
	}
	return r
}

// nothingLeft fails the test where a node, from which all volumes were taken, still holds devices or mounts.
func (w *world) nothingLeft() {
	w.t.Helper()
	for _, n := range w.Nodes() {
		for _, leak := range n.Leaks() {
			w.t.Errorf("left on %s: %s", n.NodeID(), leak)
		}
	}
}

// eventually tries until there is no error, and fails the test with the last one.
func eventually(t *testing.T, within time.Duration, fn func(context.Context) error) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := fn(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %s: %v", within, err)
		}
	}
}
