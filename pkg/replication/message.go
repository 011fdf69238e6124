package replication

import (
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Kind says what a message asks of a replica, or answers.
type Kind uint8

// Kinds. For each: the fields that its request uses beyond the header → those of its answer beyond Status.
const (
	// KindFence opens a session: older ones are closed, what they admitted finishes, the epoch becomes durable. → Fence
	KindFence Kind = iota + 1
	// KindConfigure makes a configuration durable: Config.
	KindConfigure
	// KindPing renews the lease.
	KindPing
	// KindRead: Off, Len, Snapshot ("": the head) → Data, or Hole where all of it reads as zeros. Data of the request, where
	// it is not nil, is where to read to; it is of use only within a process, and not sent.
	KindRead
	// KindWrite: Off, Data (Len is its length), FUA, Missed, Copy.
	KindWrite
	// KindZero: Off, Len, FUA, Missed, Copy.
	KindZero
	// KindFlush makes durable all writes and marks answered before it was sent. → Boot
	KindFlush
	// KindHash: Off, Len, Snapshot → Data, a digest of the bytes as they would be read.
	KindHash
	// KindAllocated asks for a page of the extents in which Snapshot ("": the head) may differ from Set.Base ("": from
	// nothing), from extent Set.From on → Set.Runs, Set.From, Set.More.
	KindAllocated
	// KindMissed asks for a page of what Set.Peer missed, from extent Set.From on → Set.Since, Set.Runs, Set.From, Set.More.
	KindMissed
	// KindMarkMissed adds Set.Runs (extents) to what Set.Peer missed, durably. Where Set.Adopt is true the tracking is that
	// of another member: Set.Since replaces the tag.
	KindMarkMissed
	// KindClearWIL takes Set.Runs (regions) out of the write-intent log, unless they were written by an operation with a
	// Seq greater than Upto.
	KindClearWIL
	// KindSeal makes the head durable and seals it as a snapshot's layer: Seal.
	KindSeal
	// KindResize grows the replica to Len bytes, durably; smaller or equal is nothing to do.
	KindResize
	kinds
)

var kindNames = [kinds]string{"none", "fence", "configure", "ping", "read", "write", "zero", "flush", "hash", "allocated",
	"missed", "mark-missed", "clear-wil", "seal", "resize"}

func (k Kind) String() string {
	if k < kinds {
		return kindNames[k]
	}
	return "none"
}

// Valid tells whether k is one of the kinds.
func (k Kind) Valid() bool { return k > 0 && k < kinds }

// Status is how a replica answers.
type Status uint8

// Statuses.
const (
	StatusOK Status = iota
	// StatusStaleEpoch: a higher epoch was seen; Fence.Epoch has it. Nothing was done and nothing of this engine ever will be.
	StatusStaleEpoch
	// StatusStaleSession: a newer session was opened, or this one never was. Nothing was done.
	StatusStaleSession
	// StatusRefused: the request contradicts what the replica knows (an older configuration, a barrier of another one, a
	// malformed request). Nothing was done.
	StatusRefused
	// StatusPoisoned: a sync failed; the replica serves nothing until it is started again and copied to.
	StatusPoisoned
	// StatusIO: the store failed; the range holds, per block, the old or the new bytes.
	StatusIO
	// StatusNotFound: the replica or the snapshot is not there.
	StatusNotFound
	// StatusRange: outside the replica's durable size.
	StatusRange
	statuses
)

var statusNames = [statuses]string{"ok", "stale-epoch", "stale-session", "refused", "poisoned", "io-error", "not-found", "out-of-range"}

func (s Status) String() string {
	if s < statuses {
		return statusNames[s]
	}
	return "unknown"
}

// Valid tells whether s is one of the statuses.
func (s Status) Valid() bool { return s < statuses }

// Message is a request of an engine to a replica, or its answer. An answer repeats Kind and the header of its request.
//
// The carrier may lose messages (with their session), delay, reorder and repeat them; it never alters them. Data is passed
// on, never looked into: a request's Data must not change until it is answered or its session is closed.
type Message struct {
	// Header.
	Kind    Kind
	Reply   bool
	Status  Status // of an answer
	Volume  volume.ID
	Replica volume.ReplicaID
	Epoch   volume.Epoch
	Session Session
	// Seq numbers the requests of a session from 1, without gaps: what comes twice is dropped.
	Seq uint64
	// Op is the engine's name for the request.
	Op uint64
	// Conn is the carrier's own and not sent: an answer has that of its request.
	Conn uint64

	Off, Len int64
	Upto     uint64
	Boot     BootID
	Snapshot volume.SnapshotID
	Data     []byte
	FUA      bool
	Hole     bool
	// Copy marks writes and zeros that the client is not waiting for: copies of what another replica has.
	Copy bool
	// Missed are the absent peers, by their slots in the last Config, that miss this write.
	Missed PeerSet

	Fence  *FenceReply
	Config *Config
	Set    *SetPage
	Seal   *Seal
}

// FenceReply is what a replica says of itself when a session is opened.
type FenceReply struct {
	Incarnation   Incarnation
	BootID        BootID
	Epoch         volume.Epoch
	Lineage       Lineage
	ConfigVersion volume.ConfigVersion
	Role          Role
	// Poisoned: a sync failed in this life. PoisonedBefore: in one before, and it was not taken back since.
	Poisoned       bool
	PoisonedBefore bool
	// LeaseLeft is how long an engine before this one may go on serving reads.
	LeaseLeft Now
	// Size is the durable size in bytes.
	Size int64
	// ISR is the newest in-sync set seen; at most MaxMembers.
	ISR []volume.ReplicaID
	// WIL is the write-intent log, in regions; at most MaxWIL × Geometry.MaxActive regions and MaxWIL × 4096 runs.
	WIL []region.Run
	// Missed are the absent peers that are tracked; at most MaxMembers.
	Missed []MissedTag
	// Snapshots are the sealed layers, oldest first; at most MaxSnapshots.
	Snapshots []SealedSnapshot
}

// MissedTag says that what Peer missed is tracked completely from configuration Since on.
type MissedTag struct {
	Peer  volume.ReplicaID
	Since volume.ConfigVersion
}

// SealedSnapshot is a sealed layer and the number of the barrier that cut it.
type SealedSnapshot struct {
	ID     volume.SnapshotID
	Number uint64
}

// Config is what a member needs to know of the volume's configuration. One that was poisoned in an earlier life is no longer.
type Config struct {
	Lineage       Lineage
	ConfigVersion volume.ConfigVersion
	// Role of the receiver.
	Role Role
	// ISR is the committed in-sync set; at most MaxMembers.
	ISR []volume.ReplicaID
	// Absent are the peers whose missed writes are tracked: tracking of any other peer is dropped, of new ones begins. At
	// most MaxMembers.
	Absent []AbsentPeer
	// Reset begins a resync of the receiver: it drops all that it knew of absent peers.
	Reset bool
	// Unlogged is set while the volume has one replica: there is nothing to reconcile, and no write-intent log is kept.
	Unlogged bool
}

// AbsentPeer is a non-member: its slot in Message.Missed, and the version at which tracking begins where it is not tracked.
type AbsentPeer struct {
	Slot  Slot
	ID    volume.ReplicaID
	Since volume.ConfigVersion
}

// SetPage is a page of a set of extents or regions; at most MaxRuns runs, ordered and disjoint.
type SetPage struct {
	Peer  volume.ReplicaID
	Since volume.ConfigVersion
	Adopt bool
	Base  volume.SnapshotID
	// From is where to begin, or to go on; More tells whether there is anything left from there.
	From uint32
	More bool
	Runs []region.Run
}

// Seal is the order to cut a snapshot.
type Seal struct {
	Snapshot volume.SnapshotID
	// Number is that of the barrier: a layer that has the snapshot's name and another number is dropped first.
	Number        uint64
	ConfigVersion volume.ConfigVersion
	// Fill is set where the receiver is a target whose head was made equal to the snapshot: it is no member.
	Fill bool
}
