package cluster

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/cluster/history"
	"github.com/ballast-csi/ballast/test/harness"
)

// backWithin bounds how long I/O may rest once a fault is over. The design's figure is 10 s; the machine may be busy.
const backWithin = 45 * time.Second

// faultRun is a volume under use and under fault.
type faultRun struct {
	*world
	claim *harness.Claim
	owner int
	h     *history.History
	last  atomic.Uint64
	use   *client
	rest  time.Duration
	count map[string]int
}

// TestFaults does random things to a cluster while a volume with three replicas is used.
func TestFaults(t *testing.T) {
	faults := setting(t, "BALLAST_CLUSTER_FAULTS", 40)
	w := newWorld(t, 3)
	r := &faultRun{world: w, h: history.New(blocks), count: map[string]int{},
		claim: &harness.Claim{Name: "faulted", Size: 64 * mib, Parameters: map[string]string{"replicas": "3"}}}
	must(t, w.at(0).Up(t.Context(), r.claim))
	r.begin()
	kinds := []struct {
		name   string
		weight int
		run    func()
	}{
		{"kill a replica", 4, r.killReplica},
		{"stop a replica", 3, r.stopReplica},
		{"cut a link one way", 4, r.cutOneWay},
		{"isolate a replica", 3, r.isolateReplica},
		{"kill the owner", 2, r.killOwner},
		{"isolate the owner", 1, r.isolateOwner},
		{"move the volume", 2, r.move},
		{"stop the owner", 1, r.stopOwner},
	}
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	for range faults {
		at := w.rnd.IntN(total)
		for _, k := range kinds {
			if at -= k.weight; at < 0 {
				t.Logf("%s (owner %s)", k.name, w.Nodes()[r.owner].NodeID())
				r.count[k.name]++
				k.run()
				break
			}
		}
		r.working()
		if w.rnd.IntN(2) == 0 {
			r.settle()
		}
	}
	r.settle()
	r.use.end()
	must(t, r.use.trouble())
	t.Logf("%d operations; faults %v; I/O was back at the latest %s after a fault", r.h.Operations(), r.count, r.rest.Round(time.Millisecond))
	if err := r.h.Check(); err != nil {
		t.Fatal(err)
	}
	o := w.at(r.owner)
	must(t, o.Down(t.Context(), r.claim))
	must(t, o.Delete(t.Context(), r.claim))
}

// begin uses the volume on its owner.
func (r *faultRun) begin() {
	r.t.Helper()
	c, err := use(r.at(r.owner).TargetPath(r.claim), r.h, &r.last, r.rnd.Uint64())
	must(r.t, err)
	r.use = c
}

// working waits until the client is answered again, and counts for how long it was not.
func (r *faultRun) working() {
	r.t.Helper()
	begin := time.Now()
	for r.use.answered.Load() < begin.UnixNano() {
		must(r.t, r.use.trouble())
		if time.Since(begin) > backWithin {
			r.t.Fatalf("no I/O for %s after the fault was over; why: %s", time.Since(begin), r.why())
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.rest = max(r.rest, time.Since(begin))
	must(r.t, r.use.trouble())
}

func (r *faultRun) why() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := r.Nodes()[r.owner].Ctl(ctx, "volume", "why", r.claim.ID())
	return fmt.Sprintf("%s %v", out, err)
}

// settle waits until every replica is in sync and nothing is wrong with the volume.
func (r *faultRun) settle() {
	r.t.Helper()
	end := time.Now().Add(2 * time.Minute)
	for {
		ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
		g, err := r.Nodes()[r.owner].CSI().ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: r.claim.ID()})
		cancel()
		if err == nil && len(g.GetVolumeHealth().GetHealthStatuses()) == 0 {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("the volume does not recover: %v %v; why: %s", g, err, r.why())
		}
		must(r.t, r.use.trouble())
		time.Sleep(100 * time.Millisecond)
	}
}

// replica picks a node that is not the owner.
func (r *faultRun) replica() int { return (r.owner + 1 + r.rnd.IntN(2)) % 3 }

func (r *faultRun) sleep(least, most time.Duration) {
	time.Sleep(least + time.Duration(r.rnd.Int64N(int64(most-least))))
}

func (r *faultRun) killReplica() {
	n := r.Nodes()[r.replica()]
	must(r.t, n.Kill())
	r.sleep(0, 4*time.Second)
	must(r.t, n.Launch())
	must(r.t, n.WaitReady(r.t.Context()))
}

func (r *faultRun) pause(i int, most time.Duration) {
	n := r.Nodes()[i]
	must(r.t, n.Signal(syscall.SIGSTOP))
	r.sleep(200*time.Millisecond, most)
	must(r.t, n.Signal(syscall.SIGCONT))
}

func (r *faultRun) stopReplica() { r.pause(r.replica(), 8*time.Second) }

// stopOwner is short of what others would take for its death: they would be asked to attach first.
func (r *faultRun) stopOwner() { r.pause(r.owner, 8*time.Second) }

func (r *faultRun) cutOneWay() {
	from, to := r.owner, r.replica()
	if r.rnd.IntN(2) == 0 {
		from, to = to, from
	}
	must(r.t, r.lab.Cut(from, to))
	r.sleep(100*time.Millisecond, 8*time.Second)
	must(r.t, r.lab.HealAll())
}

func (r *faultRun) isolateReplica() {
	must(r.t, r.lab.Isolate(r.replica()))
	r.sleep(100*time.Millisecond, 8*time.Second)
	must(r.t, r.lab.HealAll())
}

// take gives the volume to another node, which the old one cannot be asked about, and uses it there.
func (r *faultRun) take(to int) {
	r.t.Helper()
	from := r.owner
	o := r.at(to)
	gone := *o
	gone.NodeID = r.Nodes()[from].NodeID()
	must(r.t, gone.Detach(r.t.Context(), r.claim))
	for _, step := range []func(context.Context, *harness.Claim) error{o.Attach, o.Stage, o.Publish} {
		must(r.t, step(r.t.Context(), r.claim))
	}
	r.h.Crash()
	r.owner = to
	r.begin()
}

// clear takes off a node what its workload had of the volume.
func (r *faultRun) clear(i int) {
	r.t.Helper()
	o := r.at(i)
	must(r.t, o.Unpublish(r.t.Context(), r.claim))
	must(r.t, o.Unstage(r.t.Context(), r.claim))
}

func (r *faultRun) killOwner() {
	old, from := r.use, r.owner
	old.dying.Store(true)
	must(r.t, r.Nodes()[from].Kill())
	old.end()
	must(r.t, old.trouble())
	r.take(r.replica())
	r.sleep(0, 2*time.Second)
	must(r.t, r.Nodes()[from].Launch())
	must(r.t, r.Nodes()[from].WaitReady(r.t.Context()))
	r.clear(from)
}

// isolateOwner: the volume is taken from a node that cannot be told, and still has its device and its client.
func (r *faultRun) isolateOwner() {
	old, from := r.use, r.owner
	must(r.t, r.lab.Isolate(from))
	old.dying.Store(true)
	r.take(r.replica())
	old.superseded.Store(true)
	r.working()
	must(r.t, r.lab.HealAll())
	old.end() // its device dies as soon as it learns
	must(r.t, old.trouble())
	r.clear(from)
}

func (r *faultRun) move() {
	r.use.end()
	must(r.t, r.use.trouble())
	must(r.t, r.at(r.owner).Down(r.t.Context(), r.claim))
	r.owner = r.replica()
	o := r.at(r.owner)
	for _, step := range []func(context.Context, *harness.Claim) error{o.Attach, o.Stage, o.Publish} {
		must(r.t, step(r.t.Context(), r.claim))
	}
	r.begin()
}
