package agent

import (
	"context"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Cluster is what a node needs of the controllers. Every method returns volume.ErrUnavailable while they do not answer.
type Cluster interface {
	// Record returns volume.ErrNotFound for a volume that does not exist. What is Kept is none for those who use volumes.
	Record(ctx context.Context, id volume.ID) (volume.Volume, error)
	// SetFilesystem commits what is known of a volume's filesystem: it is durable when it returns nil.
	SetFilesystem(ctx context.Context, id volume.ID, fs volume.Filesystem) error
	RegisterNode(ctx context.Context, n volume.Node) error
	ReportUsage(ctx context.Context, node volume.NodeID, u control.Usage) error
	// AddHolder records that a replica has filled in a snapshot; volume.ErrNotFound where there is none, any more.
	AddHolder(ctx context.Context, id volume.SnapshotID, r volume.ReplicaID) error
	// Ended tells which engines, each with its epoch, are of the past: another epoch has begun, or the volume is deleted.
	Ended(ctx context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error)
	engine.Controllers
}

// Frontend makes the kernel's devices.
type Frontend interface {
	frontend.Frontend
	// Clean removes what aborted devices and those of an earlier process left, once their mounts are gone. It returns
	// frontend.ErrBusy while some are in use.
	Clean(ctx context.Context) error
	// Reserve keeps the kernel device at a path for a name until Release: no other name gets it, and the name gets it
	// again where nobody else has it.
	Reserve(name, path string)
	// Release ends every reservation for a name.
	Release(name string)
}

// Pool is what a node needs of a pool. The methods that control.Agents has too promise what is written there. On a disk that hangs
// those with a context, all but OpenReplica, end with it: volume.ErrUnavailable, and what was begun may still be done.
type Pool interface {
	// Info returns the pool; Node is not set. It does not wait for the disk.
	Info() volume.Pool
	CreateReplica(ctx context.Context, r control.ReplicaSpec) error
	DeleteReplica(ctx context.Context, id volume.ReplicaID) error
	// HasReplica does not wait for the disk.
	HasReplica(id volume.ReplicaID) bool
	// OpenReplica opens a replica, which is open once at most, and says of which volume it is.
	OpenReplica(ctx context.Context, id volume.ReplicaID) (engine.Store, volume.ID, error)
	// Resize grows a replica, open or not; an open one has the new size when it returns.
	Resize(ctx context.Context, id volume.ReplicaID, size int64) error
	// Cut seals the present state of a replica, open or not.
	Cut(ctx context.Context, id volume.ReplicaID, s volume.SnapshotID) error
	// DeleteSnapshot lets go of a snapshot; what of it is being sealed by a barrier up to that number, or comes to be later, is
	// given up. With of what another replica has sealed stays.
	DeleteSnapshot(ctx context.Context, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error
	// OpenSnapshot opens a snapshot, which refuses writes, and cannot be deleted before it is closed.
	OpenSnapshot(ctx context.Context, id volume.SnapshotID) (Snapshot, error)
	Extents(ctx context.Context, s, base volume.SnapshotID, offset int64, fn func(offset, length int64) error) error
	// Written tells whether any block of a replica has data, its own or that of a layer below.
	Written(ctx context.Context, id volume.ReplicaID) (bool, error)
	// Usage returns the physical bytes of the replicas' and the snapshots' own layers.
	Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64)
	// Damaged are those in which a scrub found bytes that are not what was written.
	Damaged() (map[volume.ReplicaID]bool, map[volume.SnapshotID]bool)
	// LastFlush is when what a replica had was made durable last; 0 is not known.
	LastFlush(id volume.ReplicaID) volume.Timestamp
	// Conditions are what is wrong with a replica, the pool's troubles that concern it included.
	Conditions(id volume.ReplicaID) []volume.Condition
	Close() error
}

// Snapshot is an open snapshot. Close waits for requests in flight; nothing is served after it.
type Snapshot = interface {
	block.Device
	Close() error
}
