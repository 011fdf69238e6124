// Package command holds the commands of the state machine: plain values that say everything a change needs, the time and
// the new ids included, so that applying them is deterministic. Encode and Decode are their durable form: what a log
// holds and every controller applies.
package command

import "github.com/ballast-csi/ballast/pkg/volume"

// Command is one of the types of this package.
type Command interface {
	command()
	// Check returns volume.ErrInvalid or volume.ErrOutOfRange where a value is outside its bounds. Whether the cluster's
	// state allows the command is for the state machine to say.
	Check() error
}

// RegisterNode makes a node and its pools known, or says that a node has started again. It answers Done.
type RegisterNode struct {
	Now  volume.Timestamp `json:"now"`
	Node volume.Node      `json:"node"`
}

// ReportUsage is what a node measured. Pools' Capacity, Used and OverProvision are taken; replicas and snapshots that
// no record knows are passed over. It answers Done.
type ReportUsage struct {
	Now       volume.Timestamp            `json:"now"`
	Node      volume.NodeID               `json:"node"`
	Pools     []volume.Pool               `json:"pools,omitempty"`
	Replicas  map[volume.ReplicaID]int64  `json:"replicas,omitempty"`
	Snapshots map[volume.SnapshotID]int64 `json:"snapshots,omitempty"`
}

// CreateVolume reserves everything a volume needs and records it Creating. Where the name is taken it changes nothing and
// answers the volume that has it. It answers Volume.
type CreateVolume struct {
	Volume volume.Volume `json:"volume"`
}

// FinishCreate makes a volume Ready: every replica is durable. It answers Volume.
type FinishCreate struct {
	Volume volume.ID `json:"volume"`
}

// BeginDelete is the tombstone: the name is free again, nothing can attach. It answers Volume.
type BeginDelete struct {
	Volume volume.ID `json:"volume"`
}

// FinishDelete forgets a volume all of whose replicas are freed. It answers Done.
type FinishDelete struct {
	Volume volume.ID `json:"volume"`
}

// Attach gives a volume to a node. It answers Volume.
type Attach struct {
	Now        volume.Timestamp  `json:"now"`
	Volume     volume.ID         `json:"volume"`
	Node       volume.NodeID     `json:"node"`
	ReadOnly   bool              `json:"readOnly,omitempty"`
	Capability volume.Capability `json:"capability"`
}

// BeginDetach marks the attachment of an epoch: its node starts nothing new. It answers Volume.
type BeginDetach struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
}

// FinishDetach ends the attachment of an epoch once its node is fenced. It answers Volume.
type FinishDetach struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
}

// BeginExpand reserves the growth to Target, in bytes. It answers Volume, Created where no growth was reserved before.
type BeginExpand struct {
	Volume volume.ID `json:"volume"`
	Target int64     `json:"target"`
}

// FinishExpand exposes a size that every replica has durably. It answers Volume.
type FinishExpand struct {
	Volume volume.ID `json:"volume"`
	Size   int64     `json:"size"`
}

// AbortExpand gives the reservation of Target back. It answers Volume.
type AbortExpand struct {
	Volume volume.ID `json:"volume"`
	Target int64     `json:"target"`
}

// ModifyQoS changes what is not nil. It answers Volume.
type ModifyQoS struct {
	Volume    volume.ID `json:"volume"`
	IOPS      *int64    `json:"iops,omitempty"`
	Bandwidth *int64    `json:"bandwidth,omitempty"`
}

// SetFilesystem moves the record that gates mkfs; only forward. It answers Volume.
type SetFilesystem struct {
	Volume     volume.ID         `json:"volume"`
	Filesystem volume.Filesystem `json:"filesystem"`
}

// BeginSnapshot reserves a snapshot and records it Creating, with the volume's replicas as the holders to be. Where the
// name is taken it changes nothing and answers the snapshot that has it. It answers Snapshot.
type BeginSnapshot struct {
	Now    volume.Timestamp  `json:"now"`
	ID     volume.SnapshotID `json:"id"`
	Name   string            `json:"name"`
	Volume volume.ID         `json:"volume"`
	Freeze bool              `json:"freeze,omitempty"`
}

// FinishSnapshot makes a snapshot Ready: it is cut on every holder. It is refused with volume.ErrBusy where the volume's
// size or filesystem changed since BeginSnapshot: what was recorded may not describe what was cut. It answers Snapshot.
type FinishSnapshot struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
}

// BeginDeleteSnapshot is the tombstone of a snapshot. It answers Snapshot.
type BeginDeleteSnapshot struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
}

// FinishDeleteSnapshot forgets a snapshot that every holder has let go of. It answers Done.
type FinishDeleteSnapshot struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
}

// SetQuota sets a tenant's limits; what is in use already stays. It answers Done.
type SetQuota struct {
	Tenant string         `json:"tenant"`
	Limit  volume.Amounts `json:"limit"`
}

// DeleteQuota lifts a tenant's limits. It answers Done.
type DeleteQuota struct {
	Tenant string `json:"tenant"`
}

func (RegisterNode) command()         {}
func (ReportUsage) command()          {}
func (CreateVolume) command()         {}
func (FinishCreate) command()         {}
func (BeginDelete) command()          {}
func (FinishDelete) command()         {}
func (Attach) command()               {}
func (BeginDetach) command()          {}
func (FinishDetach) command()         {}
func (BeginExpand) command()          {}
func (FinishExpand) command()         {}
func (AbortExpand) command()          {}
func (ModifyQoS) command()            {}
func (SetFilesystem) command()        {}
func (BeginSnapshot) command()        {}
func (FinishSnapshot) command()       {}
func (BeginDeleteSnapshot) command()  {}
func (FinishDeleteSnapshot) command() {}
func (SetQuota) command()             {}
func (DeleteQuota) command()          {}
