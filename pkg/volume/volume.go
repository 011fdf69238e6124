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
	// Accessible lists the nodes the requester asked for (empty: any), the first 32 of them.
	Accessible []NodeID `json:"accessible,omitempty"`

	Replicas   []Replica   `json:"replicas"`
	Attachment *Attachment `json:"attachment,omitempty"`
	Filesystem Filesystem  `json:"filesystem"`

	Epoch         Epoch         `json:"epoch"`
	ConfigVersion ConfigVersion `json:"configVersion"`
	CreatedAt     Timestamp     `json:"createdAt"`
	// PhysicalBytes is what its own layers occupied when a node last reported, in bytes.
	PhysicalBytes int64 `json:"physicalBytes"`
}

// DataLocality says whether a volume must have a replica on the node it is attached to.
type DataLocality string

// Data localities.
const (
	LocalityPreferred DataLocality = "preferred"
	LocalityRequired  DataLocality = "required"
	LocalityNone      DataLocality = "none"
)

// Parameters are fixed when a volume is created.
type Parameters struct {
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

// Replica is one copy of a volume on one pool.
type Replica struct {
	ID   ReplicaID `json:"id"`
	Node NodeID    `json:"node"`
	Pool PoolID    `json:"pool"`
}

// Attachment is the one node that may run the volume's engine.
type Attachment struct {
	Node       NodeID     `json:"node"`
	ReadOnly   bool       `json:"readOnly,omitempty"`
	Capability Capability `json:"capability"`
	Since      Timestamp  `json:"since"`
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
	Size       int64      `json:"size"`
	Freeze     bool       `json:"freeze,omitempty"`
	Filesystem Filesystem `json:"filesystem"`
	BlockSize  int        `json:"blockSize"`
	// DataLocality is the volume's when it was cut.
	DataLocality DataLocality `json:"dataLocality,omitempty"`
	CreatedAt    Timestamp    `json:"createdAt"`
	// Holders are the pools that have every byte of it.
	Holders []Replica `json:"holders"`
	// PhysicalBytes is what its layer occupied when a node last reported, in bytes.
	PhysicalBytes int64 `json:"physicalBytes"`
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
	Pools       []Pool     `json:"pools"`
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
	// Provisioned is the sum of the logical sizes placed here. The state machine keeps it.
	Provisioned int64 `json:"provisioned"`
}

// Free is how many logical bytes may still be placed in the pool; never negative.
func (p Pool) Free() int64 {
	return max(0, int64(float64(p.Capacity)*p.OverProvision)-p.Provisioned)
}

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
