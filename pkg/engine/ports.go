package engine

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Controllers are where a volume's Membership is kept.
type Controllers interface {
	// Commit applies a change and returns the record after it. An error that wraps volume.ErrUnavailable, or is ctx's,
	// means that the outcome is unknown; any other that it was refused, and the record returned is the current one.
	Commit(ctx context.Context, id volume.ID, c replication.Change) (replication.Membership, error)
	// Membership returns the record, linearizably.
	Membership(ctx context.Context, id volume.ID) (replication.Membership, error)
}

// Peers make transports to replicas.
type Peers interface {
	// Dial connects to a replica on a node. receive gets its answers, several at once perhaps; their Data is the engine's
	// from then on. down is called once, from another goroutine, when the transport breaks; not after Close.
	Dial(ctx context.Context, node volume.NodeID, volume volume.ID, replica volume.ReplicaID,
		receive func(*replication.Message), down func(error)) (Transport, error)
}

// Transport carries an engine's requests to one replica.
type Transport interface {
	// Send queues a request and does not wait for the network. The message is the caller's again when Send returns; its Data
	// must not change before the answer, and where none comes never again.
	Send(m *replication.Message)
	// Flush sends what was queued.
	Flush()
	// Close gives the transport up: what is queued may be dropped. Calls of receive and down that are under way may still
	// end after it has returned.
	Close()
}

// Store is an open replica: its bytes, and what the protocol keeps with them. All methods may be called at once. Sets are
// ordered, disjoint runs: of regions in the write-intent log, of extents in what absent peers missed.
type Store interface {
	block.Device

	// State is the opaque protocol state; nil where there was none. SetState makes another durable.
	State() []byte
	SetState(ctx context.Context, state []byte) error

	// WIL is the write-intent log; MarkWIL adds to it, durably; ClearWIL takes out, durable some time.
	WIL() []region.Run
	MarkWIL(ctx context.Context, regions []region.Run) error
	ClearWIL(ctx context.Context, regions []region.Run) error

	// Missed are the absent peers that are tracked.
	Missed() []replication.MissedTag
	// TrackMissed begins tracking a peer with nothing missed; where it is tracked already nothing changes. Durable.
	TrackMissed(ctx context.Context, tag replication.MissedTag) error
	// NoteMissed adds the extents of [off, off+n) to what a tracked peer missed, in memory; the next Flush makes it durable.
	// A peer that is not tracked is passed over.
	NoteMissed(peer volume.ReplicaID, off, n int64)
	// AddMissed adds extents, and sets the peer's tag; durable, with everything noted before.
	AddMissed(ctx context.Context, tag replication.MissedTag, extents []region.Run) error
	// DropMissed forgets a peer, or all of them where peer is "". Durable.
	DropMissed(ctx context.Context, peer volume.ReplicaID) error
	// MissedRuns returns at most limit runs of what a peer missed, from an extent on, and where to go on. A peer that is not
	// tracked is volume.ErrNotFound.
	MissedRuns(ctx context.Context, peer volume.ReplicaID, from uint32, limit int) (since volume.ConfigVersion, runs []region.Run, next uint32, more bool, err error)

	// Snapshots are the sealed layers, oldest first. Seal makes the head durable and, in the same commit, seals it under a
	// snapshot's name and a barrier's number; a layer of that name and number is success, one of another number is merged
	// upwards first.
	Snapshots() []replication.SealedSnapshot
	Seal(ctx context.Context, s volume.SnapshotID, number uint64) error
	// Snapshot opens a sealed layer for reading until its Close.
	Snapshot(ctx context.Context, s volume.SnapshotID) (SnapshotReader, error)
	// Allocated returns at most limit runs of extents in which a snapshot ("": the head) may differ from base ("": from
	// nothing), from an extent on, and where to go on.
	Allocated(ctx context.Context, s, base volume.SnapshotID, from uint32, limit int) (runs []region.Run, next uint32, more bool, err error)

	// Resize grows it, durably; smaller or equal is nothing to do.
	Resize(ctx context.Context, size int64) error
	Close() error
}

// SnapshotReader reads one sealed layer with those below it.
type SnapshotReader = interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	Close() error
}
