// Package cluster runs a cluster of real daemons, each in a network of its own, and does to it what happens to clusters:
// processes die or hang, packets get lost in one direction or both, nodes come back. What clients of the block devices
// saw is checked afterwards (package history): no acknowledged write is lost, no read is stale, no I/O fails while a
// majority of controllers and one replica live.
//
// The default takes some minutes. BALLAST_CLUSTER_FAULTS sets the number of random faults, BALLAST_CLUSTER_SEED repeats a
// run's choices, though not the machine's timing; BALLAST_CLUSTER_RACE=1 builds the daemons with the race detector.
package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
	"github.com/ballast-csi/ballast/test/netlab"
)

const mib = 1 << 20

var (
	bin  harness.Binaries
	seed uint64
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	seed = uint64(time.Now().UnixNano())
	if s := os.Getenv("BALLAST_CLUSTER_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			fmt.Fprintln(os.Stderr, "BALLAST_CLUSTER_SEED:", err)
			return 2
		}
		seed = n
	}
	dir, err := os.MkdirTemp("", "ballast-cluster-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer os.RemoveAll(dir)
	if bin, err = harness.Build(context.Background(), dir, os.Getenv("BALLAST_CLUSTER_RACE") != ""); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return m.Run()
}

// world is a cluster with a network that can be cut.
type world struct {
	*harness.Cluster
	lab *netlab.Lab
	rnd *rand.Rand
	t   *testing.T
	dir string
}

// newWorld starts a cluster of n nodes, all of them controllers. Tests run one after another: a lab is a machine's.
func newWorld(t *testing.T, n int) *world {
	t.Helper()
	t.Logf("BALLAST_CLUSTER_SEED=%d", seed)
	lab, err := netlab.New(77, n)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "bc")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{lab: lab, rnd: rand.New(rand.NewPCG(seed, 0)), t: t, dir: dir}
	t.Cleanup(func() {
		var err error
		if w.Cluster != nil {
			for _, d := range w.Nodes() {
				if s := d.LogTrouble(); s != "" {
					t.Errorf("%s:\n%s", d.NodeID(), s)
				}
				if t.Failed() {
					t.Logf("the log of %s ends with:\n%s", d.NodeID(), d.LogTail(60))
				}
			}
			err = w.Close()
		}
		if e := lab.Close(); err == nil {
			err = e
		}
		if err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if w.Cluster, err = harness.NewCluster(harness.ClusterOptions{Dir: dir, Bin: bin, Nodes: n, Lab: lab}); err != nil {
		t.Fatal(err)
	}
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// at is an orchestrator that works through node i.
func (w *world) at(i int) *harness.Orchestrator {
	d := w.Nodes()[i]
	return &harness.Orchestrator{
		CSI: d.CSI(), NodeID: d.NodeID(), Dir: filepath.Join(w.dir, "pods", d.NodeID()), Patience: time.Minute,
		Failed: func(what string, err error) { w.t.Logf("%s: %v", what, err) },
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func setting(t *testing.T, name string, usual int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s is not a number: %q", name, s)
	}
	return n
}
