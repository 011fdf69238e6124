// Package control holds the use cases of Ballast: what the CSI driver and the admin API ask of the cluster.
package control

import (
	"github.com/ballast-csi/ballast/pkg/volume"
)

// DefaultTenant is charged where a request names none.
const DefaultTenant = "default"

// CreateVolume asks for a volume. The same name again returns the volume it made, if compatible.
type CreateVolume struct {
	Name   string
	Tenant string // "" is DefaultTenant
	// TenantImplied: the tenant comes from whom the volume is for, not from what was asked of it. It then counts for a new
	// volume only, and another one under the same name is no conflict.
	TenantImplied bool
	// RequiredBytes and LimitBytes as in CSI's CapacityRange: 0 is not given.
	RequiredBytes, LimitBytes int64
	Parameters                volume.Parameters
	QoS                       volume.QoS
	Capabilities              []volume.Capability
	Source                    *volume.Source
	// Requisite nodes are the only ones allowed (empty: any); Preferred are tried first, in order.
	Requisite, Preferred []volume.NodeID
}

// Attach asks for a volume on a node.
type Attach struct {
	Volume     volume.ID
	Node       volume.NodeID
	ReadOnly   bool
	Capability volume.Capability
}

// CreateSnapshot asks for a snapshot. The same name and source again return the snapshot it made.
type CreateSnapshot struct {
	Name   string
	Volume volume.ID
	// Freeze asks that a mounted filesystem be frozen around the cut.
	Freeze bool
}

// CreateGroup asks for snapshots of several volumes at one instant. The same name and volumes again return the same ones.
type CreateGroup struct {
	Name    string
	Volumes []volume.ID
	// Freeze asks that mounted filesystems be frozen around the cut.
	Freeze bool
}

// Group is a group snapshot with its members.
type Group struct {
	volume.Group
	Members []volume.Snapshot
}

// Modify changes what is not nil.
type Modify struct {
	IOPS, Bandwidth     *int64
	Replicas, MinInSync *int
	DataLocality        *volume.DataLocality
}

// CapacityQuery asks what could be placed.
type CapacityQuery struct {
	Parameters volume.Parameters
	// Node restricts the answer to one node; "" is the whole cluster.
	Node volume.NodeID
}

// Capacity answers a CapacityQuery, in bytes.
type Capacity struct {
	// Available is the sum over pools, never negative.
	Available int64
	// MaximumVolume is the largest volume a create would accept now; MinimumVolume the smallest.
	MaximumVolume, MinimumVolume int64
}

// Page asks for part of a list, ordered by id. Max 0 is no bound. Token is "" or what the page before returned; any
// other token is volume.ErrStale.
type Page struct {
	Max   int
	Token string
	// All lists everything. Without it volumes that are being deleted and snapshots that are not cut yet are left out.
	All bool
}

// SnapshotFilter restricts a list of snapshots; empty fields match all.
type SnapshotFilter struct {
	Volume   volume.ID
	Snapshot volume.SnapshotID
}

// Extent is a run of bytes of a snapshot.
type Extent struct {
	Offset, Length int64
}

// Stray is something on a pool that no record knows. It is shown and never deleted: the records may be what is wrong.
type Stray struct {
	Node volume.NodeID
	// Replica or Snapshot is set.
	Replica  volume.ReplicaID
	Snapshot volume.SnapshotID
	// PhysicalBytes is what it occupies.
	PhysicalBytes int64
}

// Subject is a volume that a node is asked about.
type Subject struct {
	Volume volume.ID
	// Replica is the one that the node has of it; without an ID it has none.
	Replica volume.Replica
}

// Observation is how a volume is as one node sees it.
type Observation struct {
	// Replica is what is wrong with the replica there and its pool; Device with what its workload there uses: engine,
	// device, filesystem. That is of the past where another node has the volume now.
	Replica, Device []volume.Condition `json:",omitempty"`
	// Engine is nil where the node does not run the volume's.
	Engine *volume.EngineReport `json:",omitempty"`
	// LastFlush is when what the replica there had was made durable last; 0 is not known.
	LastFlush volume.Timestamp `json:",omitempty"`
}

// Health is what is wrong with a volume; no condition is healthy.
type Health struct {
	Volume     volume.ID
	Conditions []volume.Condition
	// Engine is how its engine is, nil where none can be asked.
	Engine *volume.EngineReport
	// LastFlush is when what replicas had was made durable last, of those whose nodes told it.
	LastFlush map[volume.ReplicaID]volume.Timestamp
}
