package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// TestControllers takes the cluster's state through what happens to it, under a volume in use: a controller comes back with
// an old copy of its disk and is refused; it joins anew; a new one takes the place of one that is taken out properly; one is lost
// for good, and replaced.
func TestControllers(t *testing.T) {
	w := newWorld(t, options{nodes: 4, founded: 3})
	s, err := w.serve("served", 0)
	must(t, err)
	claims := 0
	change := func() { // what a controller that is away does not learn
		for range 3 {
			claims++
			c := &harness.Claim{Name: fmt.Sprint("made-", claims), Size: 16 * mib, Parameters: map[string]string{"replicas": "1"}}
			must(t, w.at(0).Create(t.Context(), c))
			must(t, w.at(0).Delete(t.Context(), c))
		}
	}
	ctl := func(args ...string) {
		t.Helper()
		_, err := w.Nodes()[0].Ctl(t.Context(), args...)
		must(t, err)
	}
	works := func(when string, voters ...string) {
		t.Helper()
		eventually(t, backWithin, func(ctx context.Context) error { return w.voters(ctx, 0, voters...) })
		change()
		if _, err := s.working(); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		must(t, s.check())
	}
	works("at first", "n1", "n2", "n3")
	must(t, s.settle())

	// n3's disk is put back to a copy of before.
	n3 := w.Nodes()[2]
	old := filepath.Join(w.dir, "old-n3")
	must(t, n3.Stop())
	must(t, copyTree(n3.DataDir(), old))
	must(t, n3.Start(t.Context()))
	works("after a copy of its disk was made", "n1", "n2", "n3")
	must(t, s.settle())
	must(t, n3.Kill())
	change()
	must(t, os.RemoveAll(n3.DataDir()))
	must(t, os.Rename(old, n3.DataDir()))
	must(t, n3.Launch())
	refused(t, n3, "this controller's disk is older than what it acknowledged", "remove controller n3 from the cluster and let it join anew with an empty directory")
	if _, err := s.working(); err != nil {
		t.Fatal(err)
	}
	must(t, s.check())
	s3, err := w.status(t.Context(), 0)
	must(t, err)
	for _, c := range s3.Controllers {
		if c.Node == "n3" && c.Leader {
			t.Error("a controller with an old disk leads")
		}
	}

	// It does as it was told. What was on its disk is gone.
	var pools []struct{ ID, Node string }
	must(t, w.ctl(t.Context(), 0, &pools, "pool", "list"))
	must(t, n3.Kill())
	ctl("cluster", "remove-controller", "n3", "--yes")
	must(t, os.RemoveAll(n3.DataDir()))
	must(t, w.Join(t.Context(), 2))
	for _, p := range pools {
		if p.Node == "n3" {
			ctl("pool", "forget", p.ID, "--yes")
		}
	}
	works("after a controller joined anew", "n1", "n2", "n3")
	must(t, s.settle())

	// n4 takes its place, with vote and replica. It is refused from then on, and does no harm.
	ctl("cluster", "remove-controller", "n3", "--yes")
	must(t, w.Join(t.Context(), 3))
	ctl("node", "empty", "n3", "--wait")
	ctl("node", "remove", "n3", "--yes")
	refused(t, n3, "removed from the cluster")
	must(t, n3.Kill())
	must(t, n3.Launch())
	refused(t, n3, "removed from the cluster")
	works("after a node was replaced", "n1", "n2", "n4")
	must(t, s.settle())
	must(t, n3.Kill())

	// n2 is lost for good. One that was removed joins in its stead.
	must(t, w.Nodes()[1].Kill())
	must(t, os.RemoveAll(w.Nodes()[1].DataDir()))
	if _, err := s.working(); err != nil {
		t.Fatal(err)
	}
	ctl("cluster", "remove-controller", "n2", "--yes")
	must(t, os.RemoveAll(n3.DataDir()))
	must(t, w.Join(t.Context(), 2))
	works("after a lost controller was replaced", "n1", "n3", "n4")
	must(t, s.spared(0)) // its other replica is in sync
	must(t, s.end())
}

// refused waits until a node says why it does not take part.
func refused(t *testing.T, d *harness.Daemon, want ...string) {
	t.Helper()
	eventually(t, backWithin, func(context.Context) error {
		log, err := os.ReadFile(d.LogPath())
		if err != nil {
			return err
		}
		for _, s := range want {
			if !strings.Contains(string(log), s) {
				return fmt.Errorf("node %s does not say %q", d.NodeID(), s)
			}
		}
		return nil
	})
	// It does not become ready.
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := d.WaitReady(ctx); err == nil {
		t.Errorf("node %s is ready although it was refused", d.NodeID())
	}
}

func copyTree(from, to string) error {
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	return nil
}

// TestCutOffFromTheLeader: the node with the volume, itself a controller, is cut off from the controller that leads, and the
// third is seen by both. A majority works, one replica is away: I/O goes on.
func TestCutOffFromTheLeader(t *testing.T) {
	w := newWorld(t, options{})
	for _, oneWay := range []bool{false, true} {
		leader, err := w.leader(t.Context())
		must(t, err)
		owner := (leader + 1) % 3
		s, err := w.serve(fmt.Sprint("served-", oneWay), owner)
		must(t, err)
		_, err = s.working()
		must(t, err)
		must(t, w.lab.Cut(owner, leader))
		if !oneWay {
			must(t, w.lab.Cut(leader, owner))
		}
		begin := time.Now()
		time.Sleep(3 * time.Second) // what is under way has come to rest
		if _, err := s.working(); err != nil {
			t.Fatalf("cut off from the leader (one way: %v): %v", oneWay, err)
		}
		t.Logf("one way %v: I/O was back after %s", oneWay, time.Since(begin).Round(time.Millisecond))
		must(t, w.lab.HealAll())
		must(t, s.settle())
		must(t, s.end())
	}
	w.nothingLeft()
}
