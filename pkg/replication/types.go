package replication

import (
	"math/bits"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Now is a monotonic time, or a span of it, in nanoseconds from an arbitrary start. Times of two hosts are not compared.
type Now int64

// Spans of time.
const (
	Millisecond Now = 1e6
	Second      Now = 1e9
	// Never is later than any time.
	Never Now = 1<<63 - 1
)

type (
	// Incarnation names the disk or directory that a replica lives on: random, not zero, new with a new one. It is only
	// compared for equality.
	Incarnation uint64
	// BootID names one life of a replica's process and host: random, not zero. Equal ids mean that nothing that was
	// written in between can have been lost. It is only compared for equality.
	BootID uint64
	// Lineage counts the salvages of a volume; it starts at 1. A replica of another lineage has other bytes.
	Lineage uint64
	// Session numbers an engine's connections to replicas, rising within an epoch. A replica serves the highest only.
	Session uint64
)

// Slot numbers the members of a volume within one engine: it is meaningful only between an engine and the replicas that
// it has configured. It is less than MaxMembers.
type Slot uint8

// PeerSet is a set of slots.
type PeerSet uint8

// Has tells whether s is in the set.
func (p PeerSet) Has(s Slot) bool { return p>>s&1 == 1 }

// With returns the set with s added.
func (p PeerSet) With(s Slot) PeerSet { return p | 1<<s }

// Without returns the set with s removed.
func (p PeerSet) Without(s Slot) PeerSet { return p &^ (1 << s) }

// Len is the number of slots in the set.
func (p PeerSet) Len() int { return bits.OnesCount8(uint8(p)) }

// first is the lowest slot; the set is not empty.
func (p PeerSet) first() Slot { return Slot(bits.TrailingZeros8(uint8(p))) }

// Role is what a replica is to its volume.
type Role uint8

// Roles. RoleSYNC is kept by replicas only: the controllers' record says STALE or NEW until the copy is complete.
const (
	// RoleNEW has never held the volume: it is filled by a full copy.
	RoleNEW Role = iota + 1
	// RoleSYNC is being copied to: its bytes are a mixture. Never a source.
	RoleSYNC
	// RoleISR is in sync: it holds every acknowledged write.
	RoleISR
	// RoleSTALE was in sync once.
	RoleSTALE
)

func (r Role) String() string {
	switch r {
	case RoleNEW:
		return "NEW"
	case RoleSYNC:
		return "SYNC"
	case RoleISR:
		return "ISR"
	case RoleSTALE:
		return "STALE"
	}
	return "none"
}

// Geometry is the sizes that the machines reckon in, in bytes. Each divides the next.
type Geometry struct {
	// Block is the unit of the range lock.
	Block int64
	// Extent is the unit of what an absent peer missed, and of copying.
	Extent int64
	// Region is the unit of the write-intent log.
	Region int64
	// MaxActive bounds the regions that the engine keeps marked in the write-intent logs.
	MaxActive int
	// MaxCopy bounds one copy, in bytes; a multiple of Extent, at most MaxData.
	MaxCopy int64
}

// DefaultGeometry is that of the product.
func DefaultGeometry() Geometry {
	return Geometry{Block: 4 << 10, Extent: 64 << 10, Region: 1 << 20, MaxActive: 4096, MaxCopy: 256 << 10}
}

func (g Geometry) valid() bool {
	return g.Block > 0 && g.Extent > 0 && g.Region > 0 && g.Extent%g.Block == 0 && g.Region%g.Extent == 0 &&
		g.MaxActive > 0 && g.MaxCopy >= g.Extent && g.MaxCopy%g.Extent == 0 && g.MaxCopy <= MaxData
}

// extents returns the extents that [off, off+n) touches, the end exclusive.
func (g Geometry) extents(off, n int64) (from, to uint32) {
	return uint32(off / g.Extent), uint32((off + n + g.Extent - 1) / g.Extent)
}

// regions returns the regions that [off, off+n) touches, the end exclusive.
func (g Geometry) regions(off, n int64) (from, to uint32) {
	return uint32(off / g.Region), uint32((off + n + g.Region - 1) / g.Region)
}

// Timing is the protocol's times. The same values must be configured on all nodes.
type Timing struct {
	// Lease is how long an engine may serve reads after it sent the oldest of the requests last answered by each member.
	Lease Now
	// LeaseMargin is added by replicas to the lease that they report: it covers clocks that run at different rates.
	LeaseMargin Now
	// OpTimeout is how long a replica may take to answer before it counts as failed; flushes and seals get twice as much.
	OpTimeout Now
	// Blip is how long a replica may be disconnected before it counts as failed.
	Blip Now
	// AttachWait is how long an attach waits for members that do not answer, once one has.
	AttachWait Now
	// CommitRetry is the pause before a commit of unknown outcome is asked again.
	CommitRetry Now
	// FlushEvery and FlushBytes say when the engine flushes by itself.
	FlushEvery Now
	FlushBytes int64
	// ClearAfter is how long a region stays in the write-intent log after its last write, so that what is written again
	// and again costs no commit each time.
	ClearAfter Now
	// BarrierWait is how long writes may be held for a snapshot.
	BarrierWait Now
	// ResyncRetry is the pause before the resync of a replica is begun again after it failed.
	ResyncRetry Now
	// MirrorBelow is the number of bytes left to copy below which a resync mirrors writes to its target.
	MirrorBelow int64
}

// DefaultTiming is that of the product.
func DefaultTiming() Timing {
	return Timing{
		Lease: 6 * Second, LeaseMargin: Second / 2, OpTimeout: 4 * Second, Blip: 3 * Second / 2, AttachWait: 2 * Second,
		CommitRetry: Second / 4, FlushEvery: 5 * Second, FlushBytes: 256 << 20, ClearAfter: 10 * Second,
		BarrierWait: Second, ResyncRetry: 2 * Second, MirrorBelow: 64 << 20,
	}
}

// Bounds of what goes between engine and replica; a decoder refuses more before it allocates.
const (
	// MaxMembers bounds the members of a volume: replicas, and those that are to take the place of others.
	MaxMembers = 8
	// MaxData bounds the bytes of one read or write.
	MaxData = 1 << 20
	// MaxRuns bounds the runs in one message: longer sets are sent in pages.
	MaxRuns = 16384
	// MaxWIL bounds the regions in a replica's write-intent log, in units of Geometry.MaxActive: reconciling may mark what
	// all members had.
	MaxWIL = MaxMembers
	// MaxSnapshots bounds the snapshots that a replica reports.
	MaxSnapshots = 1024
	// MaxState bounds a replica's durable protocol state, in bytes.
	MaxState = 64 << 10
	// MaxDigest bounds a digest, in bytes.
	MaxDigest = 64
)

// Proof says which life of which disk was spoken to.
type Proof struct {
	ID          volume.ReplicaID `json:"id"`
	Incarnation Incarnation      `json:"incarnation"`
	BootID      BootID           `json:"bootID"`
}
