package cluster

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// rebuiltWithin bounds the time from the loss of a node until what was on it is elsewhere again: a node counts as away after
// two minutes.
const rebuiltWithin = 6 * time.Minute

// holders of a volume or a snapshot, as ballastctl has them.
type holders []struct{ Node, Role string }

// on are the nodes of those with a role, in order.
func (h holders) on(role string) (nodes []string) {
	for _, r := range h {
		if r.Role == role {
			nodes = append(nodes, r.Node)
		}
	}
	slices.Sort(nodes)
	return nodes
}

// TestNodeIsLost: a node dies with its disk, and nobody does anything about it. What it had of volumes and snapshots is made
// anew on others, under I/O; then its pool and it are forgotten.
func TestNodeIsLost(t *testing.T) {
	w := newWorld(t, options{nodes: 4, controllers: 3, args: []string{"--replica-timeout", "1m", "--pool-capacity", "8Gi"}})
	const lost = 3
	name := w.Nodes()[lost].NodeID()
	var s *served
	var others []*served
	for s == nil { // placement spreads volumes over equal pools: one has a replica there soon
		x, err := w.serve(fmt.Sprint("served-", len(others)), len(others)%lost)
		must(t, err)
		switch {
		case slices.Contains(w.replicas(x).on("in-sync"), name):
			s = x
		case len(others) == 4:
			t.Fatalf("no volume has a replica on %s", name)
		default:
			others = append(others, x)
		}
	}
	must(t, s.settle())
	fresh := slices.IndexFunc(w.Nodes(), func(d *harness.Daemon) bool { return !slices.Contains(w.replicas(s).on("in-sync"), d.NodeID()) })
	o := w.at(s.owner)
	id, err := o.Snapshot(t.Context(), s.claim, "cut")
	must(t, err)
	image := func(when string) []byte {
		t.Helper()
		c := &harness.Claim{Name: "of-cut-" + when, Size: s.claim.Size, Source: harness.FromSnapshot(id), Parameters: map[string]string{"replicas": "1"}}
		must(t, o.Up(t.Context(), c))
		b, err := os.ReadFile(o.TargetPath(c))
		must(t, err)
		must(t, o.Down(t.Context(), c))
		must(t, o.Delete(t.Context(), c))
		return b
	}
	before := image("before")

	begin := time.Now()
	must(t, w.Nodes()[lost].Kill())
	must(t, os.RemoveAll(w.Nodes()[lost].DataDir()))
	eventually(t, rebuiltWithin, func(ctx context.Context) error {
		time.Sleep(time.Second)
		if err := s.use.trouble(); err != nil {
			t.Fatal(err)
		}
		if err := s.healthy(); err != nil {
			return err
		}
		if v, h := w.replicas(s), w.snapshot(id); len(v.on("in-sync")) != lost || !slices.Contains(h, w.Nodes()[fresh].NodeID()) {
			return fmt.Errorf("volume on %+v, snapshot on %v", v, h)
		}
		return nil
	})
	t.Logf("all of it was elsewhere after %s", time.Since(begin).Round(time.Second))
	must(t, s.check())

	if after := image("after"); string(after) != string(before) {
		t.Error("the snapshot is not what it was")
	}
	var pools []struct{ ID, Node string }
	must(t, w.ctl(t.Context(), 0, &pools, "pool", "list"))
	for _, p := range pools {
		if p.Node == name {
			_, err := w.Nodes()[0].Ctl(t.Context(), "pool", "forget", p.ID, "--yes")
			must(t, err)
		}
	}
	_, err = w.Nodes()[0].Ctl(t.Context(), "node", "remove", name, "--yes")
	must(t, err)
	if v, h := w.replicas(s), w.snapshot(id); len(v) != lost || len(h) != lost {
		t.Errorf("after %s was forgotten: volume on %+v, snapshot on %v", name, v, h)
	}
	must(t, o.DeleteSnapshot(t.Context(), id))
	for _, x := range append(others, s) {
		must(t, x.end())
	}
	w.nothingLeft()
}

func (w *world) replicas(s *served) holders {
	var v struct{ Replicas holders }
	must(w.t, w.ctl(w.t.Context(), s.owner, &v, "volume", "get", s.claim.ID()))
	return v.Replicas
}

// snapshot is who holds one.
func (w *world) snapshot(id string) (nodes []string) {
	var v struct{ Holders []struct{ Node string } }
	must(w.t, w.ctl(w.t.Context(), 0, &v, "snapshot", "get", id))
	for _, h := range v.Holders {
		nodes = append(nodes, h.Node)
	}
	return nodes
}
