package replication

// Rules switches single rules of the protocol off. It is for tests, which must find a violation with any of them off; the
// zero value is the protocol.
type Rules struct {
	// Controllers.
	WithoutEpochGuard      bool // a change of the in-sync set is taken from an engine of another epoch
	WithoutVersionGuard    bool // a change of the in-sync set is taken although another came between
	WithoutLastMemberGuard bool // the in-sync set may become empty
	WithoutBarrierAbort    bool // an attach leaves a pending snapshot pending
	WithoutTombstoneEpoch  bool // a tombstone does not raise the epoch
	WithoutSalvageReset    bool // a salvage keeps lineage, versions and what others are thought to have missed

	// Replicas.
	WithoutFenceAtExecution bool // epoch and session are checked on arrival only
	WithoutSessionCheck     bool // operations of older sessions of the same epoch are served
	WithoutDrain            bool // a fence is answered while admitted operations run
	WithoutDurableEpoch     bool // a fence is answered before the epoch is durable
	WithoutDedupe           bool // an operation delivered twice is executed twice
	WithoutWIL              bool // data is written without the write-intent log
	WithoutWILBeforeData    bool // data is written before the write-intent log is durable
	WithoutOrderedClear     bool // a clear of the write-intent log wins over a later write
	WithoutPoison           bool // a replica goes on after a failed sync
	WithoutRebootLease      bool // a rebooted replica reports no lease
	WithoutDurableSYNC      bool // role SYNC is not made durable before it is answered
	WithoutSealFlush        bool // a seal does not make what it seals durable
	WithoutSealOrder        bool // an order to seal that was given up may come after a newer one
	WithoutSealNumber       bool // a layer left by an earlier attempt is taken for this one
	WithoutDurableMissed    bool // what a removed member missed is not made durable before it is answered
	WithoutFlushMissed      bool // a flush does not make missed durable

	// Engine: attach.
	WithoutHigherVersionRefusal bool // an attach goes on although a replica has seen a newer configuration
	WithoutIncarnationCheck     bool // a replica on another disk is taken for the one that was there
	WithoutLeaseWait            bool // a new engine does not wait for the old one's lease
	WithoutAttachCommit         bool // an attach goes on without committing who is missing
	WithoutAttachMissed         bool // an attach does not mark dirty regions as missed by non-members
	WithoutReconcile            bool // an attach takes dirty regions for identical
	WithoutReconcileLock        bool // dirty regions are served before they are reconciled
	WithoutKeptDeviceCheck      bool // an attach under a kept kernel device takes rebooted members

	// Engine: service.
	WithoutLease           bool // reads are served without the lease
	WithoutShrinkBeforeAck bool // a failed member is left out of acknowledgements before its removal is committed
	WithoutMaxISR          bool // pending adds and removes do not count for acknowledgements
	WithoutUnknownKeeps    bool // an unknown outcome of a commit is taken for a refusal
	WithoutBootCheck       bool // a rebooted member with unflushed writes is taken back
	WithoutLastBootCheck   bool // the last replica, rebooted with unflushed writes, is taken back
	WithoutFlushAll        bool // a flush is acknowledged by one member
	WithoutDurableFUA      bool // FUA is acknowledged before it is durable on all
	WithoutRangeLock       bool // overlapping writes run at once
	WithoutMinInSync       bool // writes are acknowledged below minInSync
	WithoutMissed          bool // a failed member's missed writes are not handed to the others
	WithoutYoungGeneration bool // a flush covers also what was under way when it began
	WithoutClearAfterFlush bool // the write-intent log is cleared without a flush
	WithoutErrorReconcile  bool // what was answered with an error is served at once
	WithoutSupersededStop  bool // a fenced engine goes on

	// Engine: return of a replica.
	WithoutOwnWIL           bool // what the returning replica itself had under way is not copied
	WithoutCopyLock         bool // copies run beside mirrored writes
	WithoutCopyReadLock     bool // copies read what not all members have
	WithoutCopyDrain        bool // mirroring begins while unlocked copies run
	WithoutMirror           bool // the last pass does not mirror writes
	WithoutMarkedPass       bool // writes during a pass are not copied again
	WithoutMirrorMissed     bool // mirrored writes are not marked as missed
	WithoutFlushBeforeAdd   bool // a target is added without a flush
	WithoutVerify           bool // a target is added without comparing hashes
	WithoutTargetDrain      bool // a target is added while acknowledged writes are under way to it
	WithoutAdoptMissed      bool // a target is added without what others missed
	WithoutTargetUnflushed  bool // a target that rebooted is taken to have all that was sent
	WithoutEqualUnflushed   bool // what a target was found to have is taken for durable there
	WithoutProbeLock        bool // what decides whether to copy is compared beside writes
	WithoutPoisonedExcluded bool // a poisoned replica stays a member and a source

	// Engine: snapshots and size.
	WithoutBarrierDrain  bool // a snapshot is cut while writes run
	WithoutGroupDrain    bool // a group's volume is cut before all of the group have drained
	WithoutExpandAll     bool // a size is exposed before all members have it
	WithoutExpandOnFence bool // a returning member is not extended
	WithoutLogFirst      bool // a second replica is added while the first has unlogged writes
	WithoutSealAll       bool // a snapshot is ready when one member has sealed it
}
