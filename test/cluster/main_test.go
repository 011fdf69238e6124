// Package cluster runs a cluster of real daemons, each in a network of its own, and does to it what happens to clusters:
// processes die or hang, packets get lost or late in one direction or both, disks are full, slow, hang and fail, nodes come
// back. What clients of the block devices saw is checked (package history): no acknowledged write is lost, no read is stale,
// no I/O fails while a majority of controllers and one replica live.
//
// The default takes some minutes. BALLAST_CLUSTER_FAULTS sets the number of random faults, BALLAST_CLUSTER_SEED repeats a
// run's choices, though not the machine's timing; BALLAST_CLUSTER_KINDS restricts them to those kinds of faults whose names
// match a regular expression; BALLAST_CLUSTER_RACE=1 builds the daemons with the race detector; BALLAST_CLUSTER_KEEP=1 keeps
// the directory of a failed run.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/faultdisk"
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

// world is a cluster with a network that can be cut, and disks that can fail.
type world struct {
	*harness.Cluster
	lab *netlab.Lab
	// disks are the nodes' pools, where the world was made with them.
	disks []*faultdisk.Disk
	rnd   *rand.Rand
	t     *testing.T
	dir   string

	mu    sync.Mutex
	notes []string
}

// options of a world.
type options struct {
	nodes       int // 3 where it is 0
	controllers int // all where it is 0
	// disk is the size of each node's pool, on a disk that can fail; 0 is a directory of the machine.
	disk int64
	// founded is how many nodes are in the cluster at first; all where it is 0.
	founded int
	// args are added to every node's command line.
	args []string
}

// newWorld starts a cluster. Tests run one after another: a lab is a machine's.
func newWorld(t *testing.T, o options) *world {
	t.Helper()
	t.Logf("BALLAST_CLUSTER_SEED=%d", seed)
	if o.nodes == 0 {
		o.nodes = 3
	}
	lab, err := netlab.New(77, o.nodes)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "bc")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{lab: lab, rnd: rand.New(rand.NewPCG(seed, 0)), t: t, dir: dir}
	t.Cleanup(w.close)
	w.Cluster, err = harness.NewCluster(harness.ClusterOptions{Dir: dir, Bin: bin, Nodes: o.nodes, Controllers: o.controllers, Lab: lab, Args: o.args})
	if err != nil {
		t.Fatal(err)
	}
	if o.disk > 0 {
		for _, n := range w.Nodes() {
			d, err := faultdisk.New(filepath.Join(dir, "disks", n.NodeID()), o.disk)
			if err != nil {
				t.Fatal(err)
			}
			w.disks = append(w.disks, d)
			must(t, os.MkdirAll(filepath.Dir(n.PoolDir()), 0o700))
			must(t, os.Symlink(d.Path(), n.PoolDir()))
		}
	}
	if o.founded == 0 {
		must(t, w.Start(t.Context()))
		return w
	}
	must(t, w.Nodes()[0].Start(t.Context()))
	for i := 1; i < o.founded; i++ {
		must(t, w.Join(t.Context(), i))
	}
	return w
}

// close takes everything off the machine, and says of a failed test how to run it again.
func (w *world) close() {
	t := w.t
	if t.Failed() {
		w.mu.Lock()
		t.Logf("calls that failed, the newest last:\n%s", strings.Join(w.notes, "\n"))
		w.mu.Unlock()
	}
	var errs []error
	for _, d := range w.disks {
		errs = append(errs, d.Heal()) // what waits for it could not be ended
	}
	if w.Cluster != nil {
		for _, d := range w.Nodes() {
			if s := d.LogTrouble(); s != "" {
				t.Errorf("%s:\n%s", d.NodeID(), s)
			}
			if t.Failed() {
				t.Logf("the log of %s ends with:\n%s", d.NodeID(), d.LogTail(60))
			}
		}
		errs = append(errs, w.Close())
	}
	errs = append(errs, harness.Sweep(filepath.Join(w.dir, "pods"))) // what a failed test did not take down
	for _, d := range w.disks {
		errs = append(errs, d.Close())
	}
	errs = append(errs, w.lab.Close())
	must := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	must(errors.Join(errs...))
	if t.Failed() {
		t.Logf("to make the same choices again: BALLAST_CLUSTER_SEED=%d go test -count=1 -v -run '^%s$' ./test/cluster", seed, t.Name())
		if os.Getenv("BALLAST_CLUSTER_KEEP") != "" {
			t.Logf("everything is in %s", w.dir)
			return
		}
	}
	must(os.RemoveAll(w.dir))
}

// at is an orchestrator that works through node i.
func (w *world) at(i int) *harness.Orchestrator {
	d := w.Nodes()[i]
	return &harness.Orchestrator{
		CSI: d.CSI(), NodeID: d.NodeID(), Dir: filepath.Join(w.dir, "pods", d.NodeID()), Patience: time.Minute,
		Failed: func(what string, err error) { w.note("%s: %v", what, err) },
	}
}

// note keeps what is worth reading only where the test fails.
func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	const enough = 100
	w.notes = append(w.notes[max(0, len(w.notes)-enough):], time.Now().Format(time.TimeOnly)+" "+fmt.Sprintf(format, args...))
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
