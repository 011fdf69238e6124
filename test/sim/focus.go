package sim

// Focus names a kind of world in which some rules matter that chance alone seldom needs. It shifts what a seed draws; what is
// violated there is found by the same checks as anywhere.
type Focus string

// focusNames are those that any seed may draw.
var focusNames = []Focus{"outage", "kept", "lease", "commit", "resync", "target", "laggard", "corrupt", "snapshot", "alone"}

// focuses are the kinds of worlds.
var focuses = map[Focus]func(*schedule, *profile){
	// Everything loses power while writes are under way, and is read at once afterwards.
	"outage": func(s *schedule, p *profile) {
		p.atLeast(2, 2)
		p.onlyFaults(faultSite, 3, faultPower, 1, faultKill, 1)
		p.onlyOperations(opFailover, 1)
		p.faultEvery = 300 * millisecond
		p.think, p.depth, p.reads, p.flushes, p.fua = 4*millisecond, 8, 0.5, 0.01, 0
		p.outage = 100 * millisecond
		p.regions, p.maxActive, p.hotBlocks, p.opBlocks = 10, 16, 0, 6
		p.flushEvery, p.flushBytes, p.clearAfter = 500*millisecond, 10000*blockSize, second
		p.storeMax = oneOf(s, 5*millisecond, 30*millisecond)
	},
	// Processes are killed under devices that live on, while replicas elsewhere lose power.
	"kept": func(_ *schedule, p *profile) {
		p.atLeast(2, 1)
		p.onlyFaults(faultKill, 3, faultPower, 3)
		p.onlyOperations()
		p.keepDevice = 1
		p.faultEvery = 150 * millisecond
		p.think, p.flushes, p.fua, p.flushEvery = 4*millisecond, 0.01, 0, 500*millisecond
	},
	// The node of an engine is cut off from everything but its own replica, and its volume moved while it may still read.
	"lease": func(s *schedule, p *profile) {
		p.atLeast(3, 2)
		p.onlyFaults(faultIsolate, 4, faultKill, oneOf(s, 0, 4), faultPause, oneOf(s, 0, 1))
		p.onlyOperations(opFailover, 1)
		p.faultEvery, p.operateEvery = 200*millisecond, 40*millisecond
		p.think, p.reads, p.depth, p.hotBlocks, p.keepDevice = 4*millisecond, oneOf(s, 0.8, 0.97), 8, 2, 0
	},
	// Members come and go, then the controllers are restored from an old copy.
	"rollback": func(_ *schedule, p *profile) {
		p.atLeast(2, 2)
		p.onlyFaults(faultPower, 2, faultKill, 2, faultPartition, 1)
		p.onlyOperations(opFailover, 1)
		p.rollback = 1
	},
	// Members fail, while the controllers answer late, or not.
	"commit": func(s *schedule, p *profile) {
		p.atLeast(2, 2)
		p.onlyFaults(faultBreak, 2, faultHang, 1, faultPartition, 1, faultCtlDown, 1, faultOneWay, 2, faultWrite, 1)
		p.onlyOperations(opFailover, 1)
		p.eio = 1
		p.faultEvery, p.think = 100*millisecond, 4*millisecond
		p.ctlMax, p.ctlLost = oneOf(s, 60*millisecond, 300*millisecond), 0.3
		p.depth, p.reads = 8, 0.15
	},
	// Replicas come and go all the time, over slow networks and disks, under sustained writes.
	"resync": func(s *schedule, p *profile) {
		p.atLeast(2, 2)
		p.onlyFaults(faultBreak, 1, faultKill, 2, faultPower, 3, faultHang, 1, faultOneWay, 1)
		p.onlyOperations(opFailover, 1, opAdd, 1, opRemove, 1)
		p.faultEvery = 150 * millisecond
		p.think, p.depth, p.reads, p.opBlocks = 4*millisecond, 8, 0.1, 3
		p.netMax, p.tail = oneOf(s, 5*millisecond, 40*millisecond), 0.02
		p.window = 8 * extentSize
	},
	// Targets are restarted while they are copied to, and written to all the time.
	"target": func(s *schedule, p *profile) {
		p.atLeast(3, 2)
		p.maxReplicas, p.regions = 3, max(p.regions, 5)
		p.onlyFaults(faultPowerTarget, 4, faultPower, 1)
		p.onlyOperations(opAdd, 2, opRemove, 1)
		p.faultEvery, p.operateEvery = 80*millisecond, 200*millisecond
		p.think, p.depth, p.reads, p.opBlocks, p.hotBlocks = 4*millisecond, 8, 0.1, 3, 0
		p.netMax, p.tail, p.window = oneOf(s, 5*millisecond, 20*millisecond), oneOf(s, 0, 0.01), 2*extentSize
		p.outage = 50 * millisecond
		p.mirrorBelow, p.flushes, p.fua = 64*extentSize, 0.01, 0
		p.flushEvery, p.flushBytes = 500*millisecond, 10000*blockSize
	},
	// Messages take long, some of them very long, while replicas are added to a volume that is written to.
	"laggard": func(s *schedule, p *profile) {
		p.atLeast(3, 1)
		p.maxReplicas, p.laneOrder = 3, false
		p.onlyFaults(faultBreak, 1)
		p.onlyOperations(opAdd, 3, opRemove, 2)
		p.faultEvery, p.operateEvery = 300*millisecond, 80*millisecond
		p.think, p.depth, p.reads, p.opBlocks, p.hotBlocks = 4*millisecond, 8, 0.1, 1, 0
		p.netMax, p.tail, p.drop = 5*millisecond, oneOf(s, 0.02, 0.05), 0
		p.mirrorBelow, p.window, p.copyExtents = oneOf[int64](s, 2, 6, 64)*extentSize, 8*extentSize, 1
		p.replicas = oneOf(s, 1, 2)
	},
	// Copies go wrong on their way to the disk, silently: nothing else does, for what is copied but not compared yet when its
	// resync is cut short is only as good as the disk.
	"corrupt": func(_ *schedule, p *profile) {
		p.atLeast(3, 1)
		p.onlyFaults(faultCorrupt, 1)
		p.onlyOperations(opAdd, 3, opRemove, 2)
		p.faultEvery, p.operateEvery = 50*millisecond, 100*millisecond
		p.drop, p.tail, p.maxReplicas = 0, 0, 3
	},
	// A volume that several nodes have is cut while its members change.
	"snapshot": func(_ *schedule, p *profile) {
		p.atLeast(2, 2)
		p.onlyFaults(faultBreak, 2, faultOneWay, 2, faultHang, 1, faultKill, 1)
		p.onlyOperations(opSnapshot, 4, opFailover, 1, opMove, 1)
		p.faultEvery, p.operateEvery = 100*millisecond, 60*millisecond
		p.think, p.tail, p.drop = 4*millisecond, 0.02, 0.005
	},
	// The first replica of a volume works alone, before others join it.
	"alone": func(_ *schedule, p *profile) {
		p.replicas, p.maxReplicas = 1, 3
		p.nodes = max(p.nodes, 3)
		p.onlyFaults(faultKill, 2, faultPower, 2)
		p.onlyOperations(opAdd, 4, opRemove, 3, opFailover, 1, opMove, 1)
		p.faultEvery, p.operateEvery, p.think = 200*millisecond, 100*millisecond, 4*millisecond
	},
}

// atLeast makes sure of so many nodes and replicas.
func (p *profile) atLeast(nodes, replicas int) {
	p.nodes = max(p.nodes, nodes)
	p.replicas = max(p.replicas, replicas)
	p.volumes = 1
}

// onlyFaults sets the weights of faults: pairs of a fault and its weight.
func (p *profile) onlyFaults(pairs ...any) {
	clear(p.faults)
	for i := 0; i < len(pairs); i += 2 {
		p.faults[pairs[i].(fault)] = float64(pairs[i+1].(int))
	}
}

// onlyOperations does the same for operations.
func (p *profile) onlyOperations(pairs ...any) {
	clear(p.operations)
	for i := 0; i < len(pairs); i += 2 {
		p.operations[pairs[i].(operation)] = float64(pairs[i+1].(int))
	}
}
