package cluster

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// volumes that are used at once.
	volumes = 3
	// section is after how many faults what was seen is checked.
	section = 10
)

// failover is the time from the call that takes a volume from a node until another has answered I/O.
const failover = "failover"

// faultRun is a cluster with volumes under use and under fault.
type faultRun struct {
	*world
	served []*served
	count  map[string]int
	rest   map[string]time.Duration // of I/O, at most, by kind
	slow   int                      // how often it was more than the design's 10 s
	fair   int                      // after how many faults the weather is fair again
}

// kind is one way to do harm to a node; i is the node.
type kind struct {
	name   string
	weight int
	run    func(i int) error
}

func (r *faultRun) kinds() []kind {
	return []kind{
		{"kill a node, its volumes go elsewhere", 6, r.killNode},
		{"kill a node, its volumes come back there", 4, func(i int) error { return r.crash(i) }},
		{"kill two nodes at once", 2, func(i int) error { return r.crash(i, (i+1)%3) }},
		{"kill all nodes at once", 2, func(i int) error { return r.crash(i, (i+1)%3, (i+2)%3) }},
		{"end a node", 2, r.endNode},
		{"stop a node", 5, r.stopNode},
		{"stop a node, its volumes go elsewhere", 3, r.stopAndTake},
		{"cut a link one way", 7, r.cutOneWay},
		{"isolate a node", 4, r.isolate},
		{"isolate a node, its volumes go elsewhere", 4, r.isolateAndTake},
		{"delay packets", 5, r.delay},
		{"move volumes", 3, r.move},
		{"fill a disk", 5, r.fillDisk},
		{"fill all disks", 1, r.fillAllDisks},
		{"slow a disk down", 4, r.slowDisk},
		{"let a disk hang", 4, r.hangDisk},
		{"let a disk fail", 4, r.failDisk},
	}
}

// TestFaults does random things to a cluster while volumes with three replicas are used, one at first on each node.
func TestFaults(t *testing.T) {
	faults := setting(t, "BALLAST_CLUSTER_FAULTS", 30)
	r := &faultRun{world: newWorld(t, options{disk: 512 * mib}), count: map[string]int{}, rest: map[string]time.Duration{}}
	kinds := r.kinds()
	if only := os.Getenv("BALLAST_CLUSTER_KINDS"); only != "" {
		match, err := regexp.Compile(only)
		must(t, err)
		kinds = slices.DeleteFunc(kinds, func(k kind) bool { return !match.MatchString(k.name) })
	}
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	if total == 0 {
		t.Fatal("BALLAST_CLUSTER_KINDS matches no kind of fault")
	}
	for i := range volumes {
		s, err := r.serve(fmt.Sprint("faulted-", i), i%len(r.Nodes()))
		must(t, err)
		r.served = append(r.served, s)
	}
	for n := range faults {
		at, i := r.rnd.IntN(total), r.rnd.IntN(len(r.Nodes()))
		k := kinds[slices.IndexFunc(kinds, func(k kind) bool { at -= k.weight; return at < 0 })]
		begin := time.Now()
		t.Logf("%s fault %d of %d: %s (n%d; owners %s)", begin.Format(time.TimeOnly), n+1, faults, k.name, i+1, r.owners())
		must(t, k.run(i))
		must(t, r.working("after: "+k.name))
		if r.fair--; r.fair == 0 {
			must(t, r.lab.HealAll())
		}
		if r.rnd.IntN(2) == 0 {
			must(t, r.settle())
		}
		if (n+1)%section == 0 {
			must(t, r.each(r.served, (*served).check))
		}
	}
	must(t, r.lab.HealAll())
	must(t, r.settle())
	must(t, r.each(r.served, (*served).end))
	operations := 0
	for _, s := range r.served {
		operations += s.operations
	}
	t.Logf("%d operations; I/O rested %d times for more than 10 s; largest rests, and of how many times a volume", operations, r.slow)
	for _, name := range slices.Sorted(maps.Keys(r.rest)) {
		t.Logf("%4d × %-45s I/O rested for at most %s", r.count[name], name, r.rest[name].Round(time.Millisecond))
	}
}

func (r *faultRun) owners() string {
	var all []string
	for _, s := range r.served {
		all = append(all, r.Nodes()[s.owner].NodeID())
	}
	return strings.Join(all, " ")
}

// each does something for volumes at once.
func (r *faultRun) each(all []*served, fn func(*served) error) error {
	var g errgroup.Group
	for _, s := range all {
		g.Go(func() error { return fn(s) })
	}
	return g.Wait()
}

func (r *faultRun) settle() error { return r.each(r.served, (*served).settle) }

// working waits until all volumes are, and counts that.
func (r *faultRun) working(kind string) error {
	var mu sync.Mutex
	return r.each(r.served, func(s *served) error {
		rest, err := s.working()
		mu.Lock()
		defer mu.Unlock()
		r.count[kind]++
		r.rest[kind] = max(r.rest[kind], rest)
		if rest > 10*time.Second {
			r.slow++
		}
		return err
	})
}

// owned are the volumes of some nodes.
func (r *faultRun) owned(nodes ...int) (own []*served) {
	for _, s := range r.served {
		if slices.Contains(nodes, s.owner) {
			own = append(own, s)
		}
	}
	return own
}

// spare waits until nodes may be lost: volumes of other nodes have a replica in sync elsewhere. Else their devices fail, and
// should: what was not flushed is lost.
func (r *faultRun) spare(nodes ...int) error {
	return r.each(r.served, func(s *served) error {
		if slices.Contains(nodes, s.owner) {
			return nil
		}
		return s.spared(nodes...)
	})
}

// elsewhere waits until every volume has a replica in sync that is not on node i: without that one I/O goes on.
func (r *faultRun) elsewhere(i int) error {
	return r.each(r.served, func(s *served) error { return s.spared(i) })
}

// other picks a node that is not i.
func (r *faultRun) other(i int) int { return (i + 1 + r.rnd.IntN(2)) % 3 }

// sleep is mostly short: what goes on under a fault soon repeats itself.
func (r *faultRun) sleep(least, most time.Duration) {
	f := r.rnd.Float64()
	time.Sleep(least + time.Duration(f*f*float64(most-least)))
}

// once is true once in n times.
func (r *faultRun) once(n int) bool { return r.rnd.IntN(n) == 0 }

// takeAll gives volumes of a node to others. Meanwhile nothing is known of the node; their clients there are returned.
func (r *faultRun) takeAll(own []*served, from int) (old []*client, err error) {
	to := map[*served]int{}
	for _, s := range own {
		old = append(old, s.use)
		to[s] = r.other(from)
	}
	begin := time.Now()
	err = r.each(own, func(s *served) error {
		if err := s.take(to[s]); err != nil {
			return err
		}
		_, err := s.working()
		return err
	})
	if len(own) > 0 {
		r.rest[failover] = max(r.rest[failover], time.Since(begin))
		r.count[failover]++
	}
	return old, err
}

// back starts nodes that were ended and waits until they are ready.
func (r *faultRun) back(nodes ...int) error {
	var g errgroup.Group
	for _, i := range nodes {
		if err := r.Nodes()[i].Launch(); err != nil {
			return err
		}
		g.Go(func() error { return r.Nodes()[i].WaitReady(r.t.Context()) })
	}
	return g.Wait()
}

// killNode: the node comes back while its volumes are taken from it, or after.
func (r *faultRun) killNode(i int) error {
	if err := r.spare(i); err != nil {
		return err
	}
	own := r.owned(i)
	for _, s := range own {
		s.lose()
	}
	if err := r.Nodes()[i].Kill(); err != nil {
		return err
	}
	for _, s := range own {
		if err := s.lost(s.use); err != nil {
			return err
		}
	}
	away := time.Duration(r.rnd.Int64N(int64(6 * time.Second)))
	var g errgroup.Group
	g.Go(func() error {
		time.Sleep(away)
		return r.back(i)
	})
	_, err := r.takeAll(own, i)
	if err := errors.Join(err, g.Wait()); err != nil {
		return err
	}
	return r.each(own, func(s *served) error { return s.clear(i) })
}

// crash: what was on the nodes comes back there.
func (r *faultRun) crash(nodes ...int) error {
	if err := r.spare(nodes...); err != nil {
		return err
	}
	own := r.owned(nodes...)
	for _, s := range own {
		s.lose()
	}
	var g errgroup.Group
	for _, i := range nodes {
		g.Go(r.Nodes()[i].Kill)
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, s := range own {
		if err := s.lost(s.use); err != nil {
			return err
		}
	}
	r.sleep(0, 6*time.Second)
	if err := r.back(nodes...); err != nil {
		return err
	}
	return r.each(own, (*served).again)
}

// endNode: the node is stopped properly, over its volumes, and comes back.
func (r *faultRun) endNode(i int) error {
	if err := r.spare(i); err != nil {
		return err
	}
	own := r.owned(i)
	for _, s := range own {
		s.lose()
	}
	if err := r.Nodes()[i].Stop(); err != nil {
		return err
	}
	for _, s := range own {
		if err := s.lost(s.use); err != nil {
			return err
		}
	}
	r.sleep(0, 3*time.Second)
	if err := r.back(i); err != nil {
		return err
	}
	return r.each(own, (*served).again)
}

func (r *faultRun) move(i int) error {
	return r.each(r.owned(i), func(s *served) error { return s.move((i + 1) % 3) })
}
