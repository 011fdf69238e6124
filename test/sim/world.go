// Package sim runs whole clusters of the replication protocol in one goroutine, from a seed: nodes, disks, a network,
// controllers and clients, all of which fail. An oracle that knows only what clients were promised, and checks of the
// protocol's invariants, say whether anything went wrong. The same seed gives the same run.
package sim

import (
	"fmt"
	"math/rand/v2"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// The tiny geometry: a block holds the id of the write that wrote it.
const (
	blockSize       = 8
	blocksPerExtent = 2
	blocksPerRegion = 4
	extentSize      = blockSize * blocksPerExtent
	regionSize      = blockSize * blocksPerRegion
	maxRegions      = 12
	maxBlocks       = maxRegions * blocksPerRegion
)

// Options say what to run.
type Options struct {
	Seed  int64
	Rules replication.Rules
	// Focus narrows the faults and operations to what a rule is about; "" is everything.
	Focus Focus
	// Trace keeps what happens as text.
	Trace bool
}

// Outcome is what a run came to.
type Outcome struct {
	// Failure is nil where nothing was violated.
	Failure *Failure
	Count   Counters
	Trace   []string
	Events  int
}

// Failure is a violated invariant.
type Failure struct {
	Invariant string
	Detail    string
	At        int64
}

func (f *Failure) String() string {
	return fmt.Sprintf("%s at %s: %s", f.Invariant, clock(f.At), f.Detail)
}

func clock(t int64) string { return fmt.Sprintf("%d.%06ds", t/second, t%second/microsecond) }

// node is a host: its clock runs at its own rate, its process can be killed, stopped for a while, or lose its power.
type node struct {
	index   int
	id      volume.NodeID
	up      bool
	life    uint64 // counts starts of the process
	rate    float64
	offset  int64
	paused  int64 // until then the process does nothing
	engines []*engine
	places  []*place
	cut     bool // from the controllers
}

// clockOf is the time of a node's own clock.
func (w *world) clockOf(n *node) replication.Now {
	return replication.Now(n.offset + int64(float64(w.now)*n.rate))
}

// until turns a time of the node's clock into a delay from now.
func (w *world) until(n *node, t replication.Now) int64 {
	return int64(float64(int64(t-w.clockOf(n)))/n.rate) + 1
}

type world struct {
	schedule
	opt     Options
	prof    profile
	geo     replication.Geometry
	timing  replication.Timing
	nodes   []*node
	vols    []*vol
	blocked [maxNodes][maxNodes]bool // from, to
	// controllers are unreachable for all until then.
	ctlDown int64
	calm    bool // faults have stopped
	quiet   bool // clients begin nothing new
	dirty   bool // something changed that the checks look at

	failure *Failure
	count   Counters
	trace   []string
	events  int
	ids     uint64
}

const maxNodes = 6

// Run runs one seed to its end.
func Run(opt Options) (out Outcome) {
	w := newWorld(opt)
	w.run()
	return Outcome{Failure: w.failure, Count: w.count, Trace: w.trace, Events: w.events}
}

func newWorld(opt Options) *world {
	w := &world{schedule: newSchedule(opt.Seed), opt: opt}
	w.now = second
	w.prof = drawProfile(&w.schedule, opt.Focus)
	p := &w.prof
	w.geo = replication.Geometry{Block: blockSize, Extent: extentSize, Region: regionSize, MaxActive: p.maxActive, MaxCopy: extentSize * p.copyExtents}
	ms := replication.Millisecond
	w.timing = replication.Timing{
		Lease: 600 * ms, LeaseMargin: 50 * ms, OpTimeout: 400 * ms, Blip: 150 * ms, AttachWait: 200 * ms, CommitRetry: 25 * ms,
		FlushEvery: replication.Now(p.flushEvery), FlushBytes: p.flushBytes, ClearAfter: replication.Now(p.clearAfter),
		BarrierWait: 100 * ms, ResyncRetry: 100 * ms, MirrorBelow: p.mirrorBelow,
	}
	for i := range p.nodes {
		n := &node{index: i, id: volume.NodeID(fmt.Sprintf("n%d", i)), rate: 1 + (w.rng.Float64()*2-1)*p.skew, offset: w.between(0, 100*second)}
		w.nodes = append(w.nodes, n)
		w.boot(n)
	}
	for i := range p.volumes {
		w.vols = append(w.vols, w.newVol(i))
	}
	return w
}

// id draws a number that names an incarnation or a boot.
func (w *world) id() uint64 {
	w.ids++
	return w.ids<<8 | uint64(w.pick(256)) | 1
}

// boot starts a node's process.
func (w *world) boot(n *node) {
	n.up, n.paused = true, 0
	n.life++
	for _, p := range n.places {
		p.open()
	}
}

func (w *world) run() {
	defer func() {
		if r := recover(); r != nil {
			if w.failure == nil {
				w.fail("panic", "%v\n%s", r, stack())
			}
		}
	}()
	for _, v := range w.vols {
		v.start()
	}
	w.startFaults()
	end := w.now + w.prof.duration
	w.loop(func() bool { return w.now >= end })
	if w.failure == nil {
		w.heal()
	}
	if w.failure == nil {
		w.finish()
	}
}

// loop runs events until done says so, nothing is left to do, or a check fails.
func (w *world) loop(done func() bool) {
	for w.failure == nil && !done() {
		e, ok := w.next()
		if !ok {
			return
		}
		w.events++
		e.do()
		if w.dirty && w.failure == nil {
			w.dirty = false
			for _, v := range w.vols {
				v.check()
			}
		}
		if w.events > maxEvents {
			w.fail("livelock", "more than %d events", maxEvents)
		}
	}
}

// maxEvents bounds a run: a machine that keeps waking up for nothing is an error too.
const maxEvents = 400_000

func (w *world) fail(invariant, format string, args ...any) {
	if w.failure == nil {
		w.failure = &Failure{Invariant: invariant, Detail: fmt.Sprintf(format, args...), At: w.now}
		w.tracef("VIOLATION %s: %s", invariant, w.failure.Detail)
	}
}

// tracef notes what happens; callers on the hot path ask for w.opt.Trace first.
func (w *world) tracef(format string, args ...any) {
	if w.opt.Trace {
		w.trace = append(w.trace, clock(w.now)+" "+fmt.Sprintf(format, args...))
	}
}

// on has a node's process do something, if it still lives the life it had then: at once or, while it is stopped, when it goes
// on.
func (w *world) on(n *node, life uint64, do func()) {
	if !n.up || n.life != life {
		return
	}
	if n.paused > w.now {
		w.after(n.paused-w.now+w.between(0, 100*microsecond), func() { w.on(n, life, do) })
		return
	}
	do()
}

// passes tells whether a message can pass a link.
func (w *world) passes(from, to int) bool { return from == to || !w.blocked[from][to] }

// shuffled returns 0..n-1 in an order drawn from the seed.
func shuffled(r *rand.Rand, n int) []int { return r.Perm(n) }
