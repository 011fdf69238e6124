package control

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/command"
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

// SnapshotSpec is what a node needs to cut a snapshot of a replica that it holds.
type SnapshotSpec struct {
	ID      volume.SnapshotID
	Volume  volume.ID
	Replica volume.ReplicaID
	Pool    volume.PoolID
	// Freeze asks that the volume's filesystem, where it is mounted, be frozen around the cut.
	Freeze bool
}

// Usage is what a node measures of its pools.
type Usage struct {
	Pools []volume.Pool // Capacity, Used and OverProvision are read
	// Replicas and Snapshots map to the physical bytes of their own layers.
	Replicas  map[volume.ReplicaID]int64
	Snapshots map[volume.SnapshotID]int64
}

// Agents is what control needs of nodes. Every method is idempotent: a call that was cut off is made again and ends in
// the same state, and a delete of what is not there is nil. When a method returns nil its effect is durable. A method
// returns volume.ErrUnavailable when the node does not answer; the effect is then unknown.
type Agents interface {
	// CreateReplica makes a replica. volume.ErrNoSpace if the pool cannot hold it, volume.ErrNotFound without its parent.
	CreateReplica(ctx context.Context, node volume.NodeID, r ReplicaSpec) error
	// DeleteReplica frees a replica's own layers. It is not attached any more.
	DeleteReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) error
	// HasReplica tells whether the pool has it.
	HasReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) (bool, error)
	// ResizeReplica grows a replica durably, and then the kernel's device where the volume is attached. volume.ErrNoSpace,
	// ErrInvalid or ErrOutOfRange: this call has not grown it. After any other error it may have.
	ResizeReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID, size int64) error
	// CutSnapshot seals the present state under the snapshot's id: everything acknowledged before the call is in it.
	CutSnapshot(ctx context.Context, node volume.NodeID, s SnapshotSpec) error
	// DeleteSnapshot unpins a snapshot; its space is freed in the background.
	DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID) error
	// Detach stops the volume's engine and its device. When it returns nil, nothing that the node's workloads write
	// reaches the replica any more. A device that is staged but not published is unmounted first; one that is published
	// fails all its I/O for good.
	Detach(ctx context.Context, node volume.NodeID, id volume.ID) error
	// SetQoS changes the limits of a volume where it is attached; elsewhere it does nothing.
	SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, q volume.QoS) error
	// Conditions reports what is wrong with a volume on that node.
	Conditions(ctx context.Context, node volume.NodeID, r volume.Replica, id volume.ID) ([]volume.Condition, error)
	// Extents calls fn with the runs of a snapshot that may differ from base, in order and not overlapping, from offset
	// on; with base "" the runs that were ever written. It stops at fn's first error and returns it.
	Extents(ctx context.Context, holder volume.Replica, s, base volume.SnapshotID, offset int64, fn func(Extent) error) error
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
	// Unsettled lists what is in a state that must end: being created, deleted, expanded or detached.
	Unsettled(ctx context.Context) ([]volume.ID, []volume.SnapshotID, error)
	Nodes(ctx context.Context) ([]volume.Node, error)
	Quotas(ctx context.Context) ([]volume.Quota, error)
}

// Audit gets every change that was asked for, when it has ended: what was done to which object, with details for people
// (never secrets), and its outcome; nil is success. Who asked is in ctx.
type Audit interface {
	Record(ctx context.Context, action, object, detail string, outcome error)
}
