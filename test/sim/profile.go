package sim

import "github.com/ballast-csi/ballast/pkg/replication"

// weights say how likely each of several things is.
type weights []float64

func (w weights) draw(s *schedule) int {
	sum := 0.0
	for _, x := range w {
		sum += x
	}
	if sum == 0 {
		return -1
	}
	at := s.rng.Float64() * sum
	for i, x := range w {
		if at -= x; at < 0 {
			return i
		}
	}
	return len(w) - 1
}

// operation is what an orchestrator or an admin does.
type operation int

const (
	opMove operation = iota
	opForce
	opFailover
	opSnapshot
	opGroup
	opUnsnap
	opExpand
	opAdd
	opRemove
	opDrain
	opMinInSync
	opDelete
	opRogue
	operations
)

// fault is what breaks.
type fault int

const (
	faultKill fault = iota
	faultPower
	faultSite
	faultPause
	faultPartition
	faultOneWay
	faultBreak
	faultSwap
	faultHang
	faultFull
	faultSlow
	faultSync
	faultWrite
	faultRead
	faultMeta
	faultCtlCut
	faultCtlDown
	faultCorrupt
	faultIsolate
	faultPowerTarget
	faults
)

// profile is what a seed's world is like: most weights are drawn per seed, so that some worlds are calm and some violent,
// and each has its own combination of faults.
type profile struct {
	duration int64
	nodes    int
	volumes  int
	replicas int
	regions  int
	skew     float64

	maxReplicas int
	minInSync   int
	maxActive   int
	copyExtents int64
	window      int64
	rate        int64
	flushEvery  int64
	flushBytes  int64
	clearAfter  int64
	mirrorBelow int64

	// Clients.
	depth                      int
	think                      int64
	opBlocks, hotBlocks        int
	reads, flushes, zeros, fua float64
	cancel                     float64

	// Network and controllers.
	netMax                       int64
	tail                         float64
	drop, duplicate, lateAnswers float64
	laneOrder                    bool
	ctlMax                       int64
	ctlLost, ctlAgain            float64
	storeMax                     int64

	eio          float64 // whether disks ever fail reads and writes
	faultEvery   int64
	faults       weights
	operateEvery int64
	operations   weights
	keepDevice   float64
	rollback     float64
	outage       int64 // the longest that a node is without power
}

// oneOf draws one of the values.
func oneOf[T any](s *schedule, values ...T) T { return values[s.pick(len(values))] }

func drawProfile(s *schedule, f Focus) profile {
	p := profile{
		duration: s.between(2*second, 6*second),
		nodes:    2 + s.pick(4),
		volumes:  1,
		regions:  2 + s.pick(6),
		skew:     oneOf(s, 0.0, 0.01, 0.03),

		maxReplicas: 2 + s.pick(3),
		minInSync:   oneOf(s, 1, 1, 1, 2),
		maxActive:   oneOf(s, 4, 5, 8, 16),
		copyExtents: oneOf[int64](s, 1, 2, 3),
		window:      oneOf[int64](s, extentSize, 2*extentSize, 8*extentSize),
		rate:        oneOf[int64](s, 0, 0, 100*extentSize),
		flushEvery:  oneOf(s, 50*millisecond, 200*millisecond, 500*millisecond),
		flushBytes:  oneOf[int64](s, 20*blockSize, 100*blockSize, 10000*blockSize),
		clearAfter:  oneOf(s, 10*millisecond, 100*millisecond, second),
		mirrorBelow: oneOf[int64](s, extentSize, 4*extentSize, 64*extentSize),

		depth:    oneOf(s, 1, 3, 8),
		think:    oneOf(s, 4*millisecond, 12*millisecond, 30*millisecond),
		opBlocks: oneOf(s, 1, 3, 6), hotBlocks: oneOf(s, 0, 0, 2, 6),
		reads: oneOf(s, 0.15, 0.3, 0.5), flushes: oneOf(s, 0.01, 0.05, 0.15), zeros: oneOf(s, 0, 0.05, 0.1), fua: oneOf(s, 0, 0.05, 0.2),
		cancel: oneOf(s, 0, 0, 0.02),

		netMax: oneOf(s, millisecond, 5*millisecond, 40*millisecond), tail: oneOf(s, 0, 0.002, 0.02),
		drop: oneOf(s, 0, 0, 0.0005, 0.005), duplicate: oneOf(s, 0, 0, 0.01, 0.05), lateAnswers: oneOf(s, 0, 0.5), laneOrder: s.chance(0.5),
		ctlMax: oneOf(s, 2*millisecond, 10*millisecond, 60*millisecond), ctlLost: oneOf(s, 0, 0, 0.05, 0.3), ctlAgain: oneOf(s, 0, 0.1),
		storeMax: oneOf(s, millisecond, 5*millisecond, 30*millisecond),

		faultEvery:   oneOf(s, 60*millisecond, 200*millisecond, 500*millisecond, 2*second),
		faults:       make(weights, faults),
		operateEvery: oneOf(s, 100*millisecond, 400*millisecond, second),
		operations:   make(weights, operations),
		keepDevice:   oneOf(s, 0, 0.5, 1),
		rollback:     0.15,
		outage:       3 * second,
	}
	p.replicas = 1 + s.pick(min(3, p.nodes))
	if s.chance(0.15) {
		p.volumes = 2
	}
	for i := range p.faults {
		p.faults[i] = oneOf(s, 0.0, 0, 1, 4)
	}
	for _, rare := range []fault{faultSite, faultSwap, faultSync, faultCtlDown} {
		p.faults[rare] /= 3
	}
	for i := range p.operations {
		p.operations[i] = oneOf(s, 0.0, 0, 1, 4)
	}
	p.operations[opFailover] = 4
	p.faults[faultCorrupt] = 0
	if s.chance(0.9) {
		p.operations[opDelete] = 0
	} else {
		p.operations[opDelete] = 0.3
	}
	if p.faults[faultWrite] > 0 || p.faults[faultRead] > 0 || p.faults[faultMeta] > 0 {
		p.eio = 1
	}
	if f == "" && s.chance(0.25) {
		f = oneOf(s, focusNames...)
	}
	if shift := focuses[f]; shift != nil {
		shift(s, &p)
	}
	return p
}

// netDelay is how long a message is on its way.
func (p *profile) netDelay(s *schedule, local bool) int64 {
	if local {
		return s.between(microsecond, 20*microsecond)
	}
	if s.chance(p.tail) {
		return s.between(10*millisecond, 700*millisecond)
	}
	return s.wide(50*microsecond, p.netMax)
}

func (p *profile) controlDelay(s *schedule) int64 { return s.wide(200*microsecond, p.ctlMax) }

// storeDelay is how long an operation takes until it executes, and from then until it is answered.
func (p *profile) storeDelay(s *schedule, k replication.StoreKind) (int64, int64) {
	most := p.storeMax
	if k == replication.StoreRead || k == replication.StoreClearWIL {
		most /= 4
	}
	return s.wide(20*microsecond, most), s.wide(10*microsecond, most)
}
