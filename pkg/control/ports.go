package control

import (
	"context"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ReplicaSpec is what a node needs to make a replica.
type ReplicaSpec struct {
	ID     volume.ReplicaID
	Volume volume.ID
	Tenant string
	Pool   volume.PoolID
	// Size in bytes; at least the parent's.
	Size int64
	// Parent is the snapshot whose bytes it starts with; "" is none: it reads as zeros.
	Parent volume.SnapshotID
}

// SnapshotSpec is what a node needs to cut a snapshot.
type SnapshotSpec struct {
	ID     volume.SnapshotID
	Volume volume.ID
	// Barrier is what the volume's record announces. With Number 0 no engine runs, and Replica in Pool, on the node that is
	// asked, is the only one in sync; else the node runs the engine of Barrier's epoch, and the two name the replica that it
	// has itself, or nothing.
	Barrier volume.Barrier
	Replica volume.ReplicaID
	Pool    volume.PoolID
	// Freeze asks that the volume's filesystem, where it is mounted, be frozen around the cut.
	Freeze bool
}

// ReplicaReport is what a replica says of itself, for people who must choose one.
type ReplicaReport struct {
	// Present is false where the pool does not have it.
	Present       bool
	Role          volume.ReplicaRole
	Poisoned      bool
	Lineage       uint64
	Epoch         volume.Epoch
	ConfigVersion volume.ConfigVersion
	// LastFlush is when it was last made durable; 0 is not known.
	LastFlush volume.Timestamp
	// Size is the durable size, in bytes.
	Size int64
}

// Usage is what a node measures of its pools.
type Usage struct {
	Pools []volume.Pool // Capacity, Used, OverProvision and Failed are read
	// Replicas and Snapshots map to the physical bytes of their own layers.
	Replicas  map[volume.ReplicaID]int64
	Snapshots map[volume.SnapshotID]int64
	// DamagedReplicas and DamagedSnapshots are those in which a scrub found bytes that are not what was written.
	DamagedReplicas  map[volume.ReplicaID]bool
	DamagedSnapshots map[volume.SnapshotID]bool
}

// Agents is what control needs of nodes. Every method is idempotent: a call that was cut off is made again and ends in
// the same state, and a delete of what is not there is nil. When a method returns nil its effect is durable. A method
// returns volume.ErrUnavailable when the node does not answer; the effect is then unknown.
type Agents interface {
	// CreateReplica makes a replica. volume.ErrNoSpace if the pool cannot hold it, volume.ErrNotFound without its parent.
	CreateReplica(ctx context.Context, node volume.NodeID, r ReplicaSpec) error
	// DeleteReplica fences a replica and frees its own layers: an engine that still has it gets nothing more through.
	// volume.ErrInUse where the volume is attached to that very node.
	DeleteReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) error
	// HasReplica tells whether the pool has it.
	HasReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) (bool, error)
	// ResizeReplica grows a replica of a volume whose engine does not run, durably. volume.ErrNoSpace, ErrInvalid or
	// ErrOutOfRange: this call has not grown it. After any other error it may have.
	ResizeReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID, size int64) error
	// ExpandVolume has the engine on r's node grow every replica that is in sync, durably, and then the kernel's device where
	// there is one. An engine that does not run yet is run for that. r is the replica that the node has itself, if any. Errors
	// are those of ResizeReplica, and volume.ErrBusy: the volume is in another epoch than the one that is given, and the request late.
	ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch, size int64) error
	// Fence has a replica refuse what comes with a lower epoch, durably, and returns for how long the engine that it
	// answered before may go on serving reads.
	Fence(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch) (lease time.Duration, err error)
	// Inspect asks a replica what it knows of itself.
	Inspect(ctx context.Context, r volume.Replica, id volume.ID) (ReplicaReport, error)
	// OpenEngine runs the volume's engine, without a device, until Detach. One that runs already reads the volume's record
	// anew; a new one is begun only while epoch is still the volume's, else volume.ErrBusy: the request is late. Nil: its replicas
	// are alike, and what is behind is being brought up.
	OpenEngine(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) error
	// Evict has the engine take a replica out of the in-sync set; volume.ErrInUse for the last, volume.ErrBusy as above.
	Evict(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, r volume.ReplicaID) error
	// CutSnapshot seals the present state under the snapshot's id, on every replica that is in sync, and returns those; an
	// engine that does not run yet is run for that. Everything acknowledged before the call is in it, and where Drain was called before, all that was acknowledged when it
	// returned and nothing else. volume.ErrBusy: it was not possible without holding writes for too long, or the replicas in
	// sync changed; what was sealed is to be deleted.
	CutSnapshot(ctx context.Context, node volume.NodeID, s SnapshotSpec) ([]volume.ReplicaID, error)
	// Drain holds the volume's writes, and when it returns none is under way. They go on with Release, or by themselves after
	// a second; CutSnapshot is volume.ErrBusy from then on.
	Drain(ctx context.Context, node volume.NodeID, s SnapshotSpec) error
	// Release lets writes go on. Where they do already it is nil.
	Release(ctx context.Context, node volume.NodeID, s SnapshotSpec) error
	// DeleteSnapshot unpins a snapshot; its space is freed in the background. With upTo it is deleted for good: a cut by a
	// barrier up to that number that is under way, or comes later, leaves nothing, and what a later barrier has cut stays. With
	// of only that replica's copy is meant: nil where the pool has another's, which stays.
	DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error
	// Detach stops the volume's engine of an epoch, or of one before it, and its device where it has one. When it returns nil,
	// nothing that the node's workloads write in these epochs reaches the volume any more; clean tells that all of it was
	// written out first, and that nobody can be served by that engine any more. A device that is staged but not published is
	// unmounted first; one that is published fails all its I/O for good. volume.ErrStale: the node has begun a later epoch, which
	// goes on.
	Detach(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) (clean bool, err error)
	// SetQoS changes the limits of a volume where it is attached; elsewhere it does nothing. volume.ErrStale: the node has begun
	// a later epoch than the one that is given, with the limits of then.
	SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, q volume.QoS) error
	// Observe tells how volumes are on that node: one observation for each subject, in order.
	Observe(ctx context.Context, node volume.NodeID, of []Subject) ([]Observation, error)
	// Extents calls fn with the runs of a snapshot that may differ from base, in order and not overlapping, from offset
	// on; with base "" the runs that were ever written. It stops at fn's first error and returns it.
	Extents(ctx context.Context, holder volume.Replica, s, base volume.SnapshotID, offset int64, fn func(Extent) error) error
	// Digest reads up to a number of regions of a snapshot that hold data, from offset on, slowly, and returns their digests. One
	// that is under way does not keep the snapshot from being deleted. volume.ErrBusy: the pool is asked for another already.
	Digest(ctx context.Context, holder volume.Replica, s volume.SnapshotID, offset int64, regions int) (Digest, error)
}

// Members are the nodes as members of the cluster.
type Members interface {
	// Expel has a node refuse another, which was removed, from now on, and end its connections.
	Expel(ctx context.Context, node, removed volume.NodeID) error
}

// Store is the cluster's state: a deterministic state machine behind Propose. meta implements it, later over raft.
//
// Reads are linearizable and return volume.ErrNotFound for what is not there.
type Store interface {
	// Propose applies a command (one of the types of package command) and returns what it answered. The command
	// is durable when Propose returns nil; when ctx ends first, the outcome is unknown.
	Propose(ctx context.Context, c command.Command) (command.Result, error)
	// Failed says why nothing can be changed until the process is restarted, or is nil. It wraps no sentinel.
	Failed() error

	Volume(ctx context.Context, id volume.ID) (volume.Volume, error)
	VolumeByName(ctx context.Context, name string) (volume.Volume, error)
	// Volumes lists in order of id, in every state, those after an id; limit 0 is no bound.
	Volumes(ctx context.Context, after volume.ID, limit int) ([]volume.Volume, error)
	Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error)
	// Snapshots lists likewise; of restricts the list to the snapshots of one volume, "" does not.
	Snapshots(ctx context.Context, of volume.ID, after volume.SnapshotID, limit int) ([]volume.Snapshot, error)
	// Remains lists what is kept of deleted volumes that have snapshots, in order of id.
	Remains(ctx context.Context) ([]volume.Remains, error)
	// Unsettled lists what is in a state that must end: being created, deleted, expanded or detached, or with copies that leave.
	Unsettled(ctx context.Context) ([]volume.ID, []volume.SnapshotID, error)
	// Group returns a group snapshot with its members.
	Group(ctx context.Context, id volume.GroupID) (volume.Group, []volume.Snapshot, error)
	Groups(ctx context.Context) ([]volume.Group, error)
	Nodes(ctx context.Context) ([]volume.Node, error)
	// RemovedNodes lists the nodes that were removed and did not join again.
	RemovedNodes(ctx context.Context) ([]volume.NodeID, error)
	// Generations returns how many joined under the name of each node.
	Generations(ctx context.Context) (map[volume.NodeID]uint64, error)
	JoinTokens(ctx context.Context) ([]jointoken.Record, error)
	Quotas(ctx context.Context) ([]volume.Quota, error)
}

// Audit gets every change that was asked for, when it has ended: what was done to which object, with details for people
// (never secrets), and its outcome; nil is success. Who asked is in ctx.
type Audit interface {
	Record(ctx context.Context, action, object, detail string, outcome error)
}
