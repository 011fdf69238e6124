package replication

import (
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// EffectKind says what an engine's carrier is to do.
type EffectKind uint8

// Effects of an engine. They are carried out in order, except that only sends to one replica need keep their order among
// each other, and even they may overtake.
const (
	// EffectSend: send Msg to the replica named in it, on the transport that Connected announced last. What cannot be sent
	// is dropped; the carrier then says Disconnected.
	EffectSend EffectKind = iota + 1
	// EffectAnswer: the client operation Tag ends with Result; a read has Data, or Hole where all of it is zeros.
	//
	// Without Busy, no request that the engine sends from then on refers to the operation's memory; requests of sessions that
	// were closed may still, and change nothing that counts. With Busy, the memory of a write must be left as it is until
	// EffectReleased; that of a read was given to a member that has not answered, and must not be used for anything again.
	EffectAnswer
	// EffectReleased: the Data of the answered write Tag is not referred to any more.
	EffectReleased
	// EffectCommit: ask the controllers to Apply Change; answer with Committed(Commit, …). An attempt whose outcome is not
	// known is answered with CommitUnknown and will be asked for again.
	EffectCommit
	// EffectReconnect: give the transport to Replica up, and make a new one: Disconnected is implied, Connected awaited.
	EffectReconnect
	// EffectLive: the device may serve; said once.
	EffectLive
	// EffectFenced: FenceOnly has reached its end: nothing of an older epoch is acknowledged or read any more.
	EffectFenced
	// EffectFailed: the engine is over, for Reason. Operations were answered with ResultGone; the device must fail for good,
	// so that its cached writes reach nobody.
	EffectFailed
	// EffectResized: the size in bytes to expose is now Size.
	EffectResized
	// EffectDrained, EffectSealed: the barrier Number got there; asked for by a group's coordinator.
	EffectDrained
	EffectSealed
	// EffectBarrier: the barrier Number ended, writes go on. With Result OK, Holders have sealed it and Complete may be
	// committed; otherwise AbortBarrier is due.
	EffectBarrier
	// EffectDetached: Detach has reached its end: all is durable and no operation is under way. The carrier may commit
	// Detach{Clean}; with a Result other than OK only a Detach that is not: the engine was not live yet, so that nobody has
	// waited for an older one's lease.
	EffectDetached
)

// Result is how a client operation ends.
type Result uint8

// Results.
const (
	ResultOK Result = iota
	// ResultIO: the last replica failed to read or the operation was cancelled; the bytes of a write may be there or not,
	// and from now on read as one of the two.
	ResultIO
	// ResultRange: outside the exposed size; nothing was done.
	ResultRange
	// ResultGone: the engine is over.
	ResultGone
)

// Effect is one thing to do for an engine's carrier.
type Effect struct {
	Kind   EffectKind
	Result Result
	Hole   bool
	Busy   bool
	Tag    uint64
	Data   []byte
	Msg    Message

	Commit  uint64
	Change  Change
	Replica volume.ReplicaID
	Reason  Reason
	Size    int64
	Number  uint64
	Holders []volume.ReplicaID
	// Version is the configuration in which the barrier was cut.
	Version volume.ConfigVersion
}

// Reason says why an engine ended, or why I/O waits.
type Reason string

// Reasons for EffectFailed.
const (
	// ReasonSuperseded: the volume was attached again, detached by force or deleted.
	ReasonSuperseded Reason = "Superseded"
	// ReasonRolledBack: a replica has seen a newer configuration than the controllers have: their state was restored from
	// an old copy.
	ReasonRolledBack Reason = "MetadataRolledBack"
	// ReasonLostWrites: every member that is left was restarted with writes that it had not made durable.
	ReasonLostWrites Reason = "UnflushedWritesLost"
)

// CommitOutcome is how the controllers answered.
type CommitOutcome uint8

// Outcomes.
const (
	// CommitDone: applied; the record after it comes along.
	CommitDone CommitOutcome = iota + 1
	// CommitRefused: not applied by this attempt; the current record comes along.
	CommitRefused
	// CommitUnknown: it may have been applied, or may yet be.
	CommitUnknown
)

// StoreKind says what a replica's store is to do.
type StoreKind uint8

// Operations on a replica's store. All of them may run at once and end in any order; each ends with one call of Done.
const (
	// StorePersist: make State the durable protocol state.
	StorePersist StoreKind = iota + 1
	// StoreMarkWIL: put regions Runs into the write-intent log, durably.
	StoreMarkWIL
	// StoreClearWIL: take regions Runs out; need not be durable.
	StoreClearWIL
	// StoreRead: Off, Len, Snapshot → Data, or Hole. Data, where it is not nil, has Len bytes and is where to read to.
	StoreRead
	// StoreWrite: Data at Off. Marks are added to missed in memory first: durable with the next StoreSync. With FUA the
	// data is durable when it ends.
	StoreWrite
	// StoreZero: Off, Len; else as StoreWrite.
	StoreZero
	// StoreSync: make durable all that ended before, and all marks unless NoMarks is set (a rule's switch). A failure is
	// final: it is not to be tried again.
	StoreSync
	// StoreHash: Off, Len, Snapshot → Data, the digest of what StoreRead gives.
	StoreHash
	// StoreAllocated: Set as in KindAllocated → Set.
	StoreAllocated
	// StoreMissed: Set as in KindMissed → Set.
	StoreMissed
	// StoreTrack: begin tracking Set.Peer with Set.Since, and nothing missed, unless it is tracked already; durable.
	StoreTrack
	// StoreDropMissed: forget what Set.Peer missed, or all peers where it is ""; durable.
	StoreDropMissed
	// StoreMarkMissed: add Set.Runs to what Set.Peer missed, with the tag Set.Since; durable, with marks made before.
	StoreMarkMissed
	// StoreSeal: make the head durable and, in the same step, seal it as Snapshot's layer with Number, and open a new head.
	// A layer of that name and number is success and nothing to do; one of another number is dropped (merged into what is
	// above it) first. Without Sync (a rule's switch) the data need not be durable.
	StoreSeal
	// StoreResize: grow to Len bytes, durably.
	StoreResize
)

// StoreOp is one operation on a replica's store.
type StoreOp struct {
	Kind     StoreKind
	ID       uint64
	Off, Len int64
	Data     []byte
	FUA      bool
	Copy     bool // as in Message
	Sync     bool
	NoMarks  bool
	Marks    []MissedTag // read-only
	State    []byte
	Runs     []region.Run
	Snapshot volume.SnapshotID
	Number   uint64
	Set      SetPage
}

// StoreResult is how a StoreOp ended. Status is OK, IO, NotFound or Range.
type StoreResult struct {
	Status Status
	Data   []byte
	Hole   bool
	Set    *SetPage
}

// ReplicaEffect is one thing to do for a replica's carrier: send Answer to who asked, or carry out Store.
type ReplicaEffect struct {
	Answer bool
	Msg    Message
	Store  StoreOp
}
