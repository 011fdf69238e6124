package volume

// State is where a volume or a snapshot is in its life.
type State string

// States. A record is created Creating (its reservation counts), becomes Ready when its bytes are durable, and is
// Deleting from the tombstone until every reachable pool has freed it.
const (
	Creating State = "creating"
	Ready    State = "ready"
	Deleting State = "deleting"
)

// Timestamp is Unix time in nanoseconds. The core reads no clock: commands carry the time.
type Timestamp int64

// Volume is the controllers' record of a volume.
type Volume struct {
	ID     ID     `json:"id"`
	Name   string `json:"name"`
	Tenant string `json:"tenant"`
	State  State  `json:"state"`
	// Size in bytes, a multiple of SizeQuantum. It is what is exposed; Target is greater while an expand is under way.
	Size   int64 `json:"size"`
	Target int64 `json:"target,omitempty"`

	Parameters   Parameters   `json:"parameters"`
	QoS          QoS          `json:"qos"`
	Capabilities []Capability `json:"capabilities"`
	Source       *Source      `json:"source,omitempty"`
	// Kept is set where there is no volume any more: the record only serves to copy that snapshot of it to another pool. Its
	// first replica is made from the snapshot and nobody writes to it, its second is filled from that one.
	Kept SnapshotID `json:"kept,omitempty"`
	// Accessible lists the nodes the requester asked for (empty: any), the first 32 of them.
	Accessible []NodeID `json:"accessible,omitempty"`

	// Replicas are the copies of the volume; at least one is in sync, unless it is Lost.
	Replicas []Replica `json:"replicas"`
	// Lost: every replica was on a disk that an admin said is gone for good. It can only be deleted.
	Lost bool `json:"lost,omitempty"`
	// Leaving are replicas that are none any more, and that their nodes have yet to free.
	Leaving    []Replica   `json:"leaving,omitempty"`
	Attachment *Attachment `json:"attachment,omitempty"`
	Filesystem Filesystem  `json:"filesystem"`
	CreatedAt  Timestamp   `json:"createdAt"`
	// PhysicalBytes is what the layers of all its replicas, those that leave included, occupied when their nodes last
	// reported, in bytes.
	PhysicalBytes int64 `json:"physicalBytes"`
	// GivenUp are the last barriers whose snapshots were given up and are forgotten, at most MaxGivenUp: what a node may still
	// have of them is garbage. Number is 0 where no engine ran.
	GivenUp []Barrier `json:"givenUp,omitempty"`

	Protocol
}

// MaxGivenUp bounds Volume.GivenUp.
const MaxGivenUp = 16

// Remains are what is kept of a deleted volume while it has snapshots: how these are to be kept.
type Remains struct {
	Volume ID `json:"volume"`
	// Size is what it had placed in each of its pools, in bytes: at least the size of each of its snapshots.
	Size int64 `json:"size"`
	// Replicas, Pool and Accessible are those of the volume.
	Replicas   int      `json:"replicas"`
	Pool       string   `json:"pool,omitempty"`
	Accessible []NodeID `json:"accessible,omitempty"`
	// Protocol is where the counts of the volume have got to: under its id none begins anew.
	Protocol Protocol `json:"protocol"`
}

// Protocol is what the replication protocol keeps of a volume, beside its sizes, its replicas and MinInSync. Package
// replication says what each part means: its Membership is made of these.
type Protocol struct {
	Epoch         Epoch         `json:"epoch"`
	ConfigVersion ConfigVersion `json:"configVersion"`
	// Lineage counts salvages, from 1.
	Lineage  uint64 `json:"lineage"`
	Revision uint64 `json:"revision"`
	// Owner is the node that runs the engine: that of the attachment, or one that looks after a volume that is not attached.
	Owner     NodeID   `json:"owner,omitempty"`
	Clean     bool     `json:"clean,omitempty"`
	SkipLease bool     `json:"skipLease,omitempty"`
	Silent    NodeID   `json:"silent,omitempty"`
	Barrier   *Barrier `json:"barrier,omitempty"`
	Barriers  uint64   `json:"barriers,omitempty"`
}

// Barrier is a snapshot that is being cut.
type Barrier struct {
	// Number is unique among the barriers of the volume.
	Number   uint64     `json:"number"`
	Snapshot SnapshotID `json:"snapshot"`
	// Epoch and ConfigVersion in which it is valid.
	Epoch         Epoch         `json:"epoch"`
	ConfigVersion ConfigVersion `json:"configVersion"`
}

// DataLocality says whether a volume must have a replica on the node it is attached to.
type DataLocality string

// Data localities.
const (
	LocalityPreferred DataLocality = "preferred"
	LocalityRequired  DataLocality = "required"
	LocalityNone      DataLocality = "none"
)

// Parameters say how a volume is kept. Replicas, MinInSync and DataLocality can be changed while it is used; the others are
// fixed when it is created.
type Parameters struct {
	// Replicas is how many there should be; there are fewer, or more, while that is brought about.
	Replicas     int          `json:"replicas"`
	MinInSync    int          `json:"minInSync"`
	DataLocality DataLocality `json:"dataLocality"`
	// Pool restricts placement to the pool of that name; "" is any.
	Pool   string `json:"pool,omitempty"`
	FSType string `json:"fsType,omitempty"`
	// BlockSize is the logical block size of the device, 512 or 4096 bytes.
	BlockSize int `json:"blockSize"`
}

// QoS limits an attached volume at its frontend. Zero is no limit.
type QoS struct {
	// IOPS bounds reads and writes per second.
	IOPS int64 `json:"iops,omitempty"`
	// Bandwidth bounds bytes read and written per second.
	Bandwidth int64 `json:"bandwidth,omitempty"`
}

// Source is what a volume was made from: exactly one of the two is set.
type Source struct {
	Volume   ID         `json:"volume,omitempty"`
	Snapshot SnapshotID `json:"snapshot,omitempty"`
}

// Replica is one copy of a volume, or of a snapshot, on one pool.
type Replica struct {
	ID   ReplicaID `json:"id"`
	Node NodeID    `json:"node"`
	Pool PoolID    `json:"pool"`

	// Role, and what the engine last committed of the disk and the process behind the replica: package replication. They
	// are not set for the holders of a snapshot.
	Role        ReplicaRole   `json:"role,omitempty"`
	Incarnation uint64        `json:"incarnation,omitempty"`
	BootID      uint64        `json:"bootID,omitempty"`
	RemovedAt   ConfigVersion `json:"removedAt,omitempty"`
	// RemovedBarriers is the volume's Barriers at that time.
	RemovedBarriers uint64 `json:"removedBarriers,omitempty"`
	// PhysicalBytes is what it occupied when its node last reported, in bytes.
	PhysicalBytes int64 `json:"physicalBytes,omitempty"`
	// Damaged: a scrub has found bytes in it that are not what was written, as its node last reported.
	Damaged bool `json:"damaged,omitempty"`
}

// ReplicaRole is what a replica is to its volume.
type ReplicaRole string

// Replica roles.
const (
	// InSync holds every acknowledged write.
	InSync ReplicaRole = "in-sync"
	// Stale was in sync once, and is brought back when it can be reached.
	Stale ReplicaRole = "stale"
	// Filling has never been in sync: it is being filled.
	Filling ReplicaRole = "filling"
)

// InSync lists the replicas that hold every acknowledged write.
func (v Volume) InSync() []Replica {
	var out []Replica
	for _, r := range v.Replicas {
		if r.Role == InSync {
			out = append(out, r)
		}
	}
	return out
}

// Attachment is the one node that may run the volume's engine.
type Attachment struct {
	Node       NodeID     `json:"node"`
	ReadOnly   bool       `json:"readOnly,omitempty"`
	Capability Capability `json:"capability"`
	Since      Timestamp  `json:"since"`
	// Epoch is the one that it began; the volume's rises with every engine that its node starts.
	Epoch Epoch `json:"epoch"`
	// Detaching is set before the node is fenced: it stages and publishes nothing new, and detaching goes on to its end.
	Detaching bool `json:"detaching,omitempty"`
}

// FilesystemPhase is what is known of a volume's filesystem. mkfs is allowed in Blank and Formatting only: after
// Formatted a device on which no filesystem is recognised is damaged, not new.
type FilesystemPhase string

// Filesystem phases. Formatting is committed before mkfs starts, Formatted before the first mount is answered.
const (
	Blank      FilesystemPhase = ""
	Formatting FilesystemPhase = "formatting"
	Formatted  FilesystemPhase = "formatted"
)

// Filesystem is the durable record that gates mkfs. Clones and restores inherit it.
type Filesystem struct {
	Phase FilesystemPhase `json:"phase,omitempty"`
	Type  string          `json:"type,omitempty"`
}

// Snapshot is the controllers' record of a snapshot.
type Snapshot struct {
	ID     SnapshotID `json:"id"`
	Name   string     `json:"name"`
	Volume ID         `json:"volume"`
	Tenant string     `json:"tenant"`
	State  State      `json:"state"`
	// Size is the volume's size when it was cut, in bytes.
	Size   int64 `json:"size"`
	Freeze bool  `json:"freeze,omitempty"`
	// Hidden: it is there for a clone of the volume while that is made. No quota counts it and no list shows it.
	Hidden     bool       `json:"hidden,omitempty"`
	Filesystem Filesystem `json:"filesystem"`
	BlockSize  int        `json:"blockSize"`
	// DataLocality is the volume's when it was cut.
	DataLocality DataLocality `json:"dataLocality,omitempty"`
	CreatedAt    Timestamp    `json:"createdAt"`
	// Holders are the pools that have every byte of it.
	Holders []Replica `json:"holders"`
	// Leaving are copies that are none any more, and that their pools have yet to free.
	Leaving []Replica `json:"leaving,omitempty"`
	// Differs is what the last comparison of their copies found; nil: they were alike, or not compared.
	Differs *Difference `json:"differs,omitempty"`
	// Cut is the barrier under which it is being cut, its Number 0 where no engine runs; nil once it is.
	Cut *Barrier `json:"cut,omitempty"`
	// Group is the group snapshot that it is a member of, or "".
	Group GroupID `json:"group,omitempty"`
	// PhysicalBytes is what its layers on all holders, and where copies leave, occupied when their nodes last reported, in bytes.
	PhysicalBytes int64 `json:"physicalBytes"`
}

// Group is the controllers' record of snapshots of several volumes that were cut at one instant.
type Group struct {
	ID     GroupID `json:"id"`
	Name   string  `json:"name"`
	State  State   `json:"state"`
	Freeze bool    `json:"freeze,omitempty"`
	// Snapshots are its members, in the order of their volumes' ids.
	Snapshots []SnapshotID `json:"snapshots"`
	Volumes   []ID         `json:"volumes"`
	CreatedAt Timestamp    `json:"createdAt"`
}

// Node is a host that runs ballastd.
type Node struct {
	ID NodeID `json:"id"`
	// LastSeen is when it last reported.
	LastSeen Timestamp `json:"lastSeen"`
	// Zone is what fails together: replicas are spread over zones. "" is one of them.
	Zone string `json:"zone,omitempty"`
	// Address of the node's API and DataAddress of its replicas, host:port; "" in a cluster of one.
	Address     string     `json:"address,omitempty"`
	DataAddress string     `json:"dataAddress,omitempty"`
	Roles       []NodeRole `json:"roles,omitempty"`
	State       NodeState  `json:"state,omitempty"`
	// BootID names the life of its process, as in Replica.
	BootID uint64 `json:"bootID,omitempty"`
	Pools  []Pool `json:"pools"`
}

// NodeRole is what a node does for the cluster.
type NodeRole string

// Node roles.
const (
	RoleController NodeRole = "controller"
	RoleStorage    NodeRole = "storage"
)

// NodeState is what an admin wants of a node. Whether it is up is seen from LastSeen.
type NodeState string

// Node states. A drained node gets nothing new and may be stopped; an emptying one gets nothing new and its replicas move
// to others.
const (
	NodeActive   NodeState = ""
	NodeDrained  NodeState = "drained"
	NodeEmptying NodeState = "emptying"
)

// PoolKind is how a pool keeps its data file.
type PoolKind string

// Pool kinds.
const (
	PoolDir  PoolKind = "dir"
	PoolDisk PoolKind = "disk"
)

// Pool is space on one disk of a node. Sizes in bytes.
type Pool struct {
	ID   PoolID   `json:"id"`
	Name string   `json:"name"`
	Node NodeID   `json:"node"`
	Kind PoolKind `json:"kind"`
	Path string   `json:"path"`
	// Capacity is what replicas may occupy, the reserve excluded.
	Capacity int64 `json:"capacity"`
	// Used is what they occupied when the node last reported.
	Used int64 `json:"used"`
	// OverProvision bounds the sum of logical sizes to Capacity times it; at least 1.
	OverProvision float64 `json:"overProvision"`
	// Failed: it has stopped writing after an error of its disk, until its node's daemon is restarted, as that last reported.
	Failed bool `json:"failed,omitempty"`
	// Provisioned is the sum of the logical sizes placed here. The state machine keeps it.
	Provisioned int64 `json:"provisioned"`
}

// Free is how many logical bytes may still be placed in the pool; never negative.
func (p Pool) Free() int64 {
	return max(0, int64(float64(p.Capacity)*p.OverProvision)-p.Provisioned)
}

// Full tells whether the pool has no room for data.
func (p Pool) Full() bool { return p.Used >= p.Capacity }

// Works tells whether the pool can be used: its disk is there, and has not stopped it.
func (p Pool) Works() bool { return p.Capacity > 0 && !p.Failed }

// Condition is one thing that is wrong with a volume or a pool, with the safe way out.
type Condition struct {
	Severity Severity `json:"severity"`
	// Reason is CamelCase and stable: for programs.
	Reason string `json:"reason"`
	// Message says what is wrong and what to do, for people.
	Message string `json:"message"`
}

// Severity of a condition; the names are those of CSI's VolumeHealthErrorType.
type Severity string

// Severities.
const (
	Degraded     Severity = "Degraded"
	Inaccessible Severity = "Inaccessible"
	DataLoss     Severity = "DataLoss"
)
