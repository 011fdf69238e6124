// Package command holds the commands of the state machine: plain values that say everything a change needs, the time and
// the new ids included, so that applying them is deterministic. Encode and Decode are their durable form: what a log
// holds and every controller applies.
package command

import (
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Command is one of the types of this package.
type Command interface {
	command()
	// Check returns volume.ErrInvalid or volume.ErrOutOfRange where a value is outside its bounds. Whether the cluster's
	// state allows the command is for the state machine to say.
	Check() error
}

// RegisterNode makes a node and its pools known, or says that a node has started again; its State stays as it was. It answers
// Done. It is refused with volume.ErrInUse where the node was removed.
type RegisterNode struct {
	Now  volume.Timestamp `json:"now"`
	Node volume.Node      `json:"node"`
}

// ReportUsage is what a node measured. Pools' Capacity, Used and OverProvision are taken; replicas and snapshots that
// no record knows are passed over. DamagedReplicas and DamagedSnapshots say of those on the node whether they are damaged. It
// answers Done.
type ReportUsage struct {
	Now       volume.Timestamp            `json:"now"`
	Node      volume.NodeID               `json:"node"`
	Pools     []volume.Pool               `json:"pools,omitempty"`
	Replicas  map[volume.ReplicaID]int64  `json:"replicas,omitempty"`
	Snapshots map[volume.SnapshotID]int64 `json:"snapshots,omitempty"`

	DamagedReplicas  map[volume.ReplicaID]bool  `json:"damagedReplicas,omitempty"`
	DamagedSnapshots map[volume.SnapshotID]bool `json:"damagedSnapshots,omitempty"`
}

// SetNodeState says what an admin wants of a node. It is refused with volume.ErrBusy where nodes other than Idle have been
// drained meanwhile: the decision did not know of them. It answers Done.
type SetNodeState struct {
	Node  volume.NodeID    `json:"node"`
	State volume.NodeState `json:"state"`
	// Idle are the nodes that were drained or emptying when it was decided.
	Idle []volume.NodeID `json:"idle,omitempty"`
}

// RemoveNode forgets a node that has neither replicas, snapshots nor attached volumes, and keeps its id out of the cluster until
// a join token names it. Copies of snapshots that leave go with it: FreeHolder forgets them then. It answers Done.
type RemoveNode struct {
	Node volume.NodeID `json:"node"`
}

// CreateJoinToken keeps the record of a token. It answers JoinToken.
type CreateJoinToken struct {
	Record jointoken.Record `json:"record"`
}

// RevokeJoinToken forgets a token; one that is not there is Done too.
type RevokeJoinToken struct {
	ID string `json:"id"`
}

// RedeemJoinToken uses a token for a node. It answers JoinToken.
type RedeemJoinToken struct {
	Now   volume.Timestamp `json:"now"`
	Claim jointoken.Claim  `json:"claim"`
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

// BeginDelete is the tombstone: the name is free again, nothing can attach. Gone is the epoch of an attachment that is being
// ended and whose node is gone: it ends too. With Unfinished a volume that is Ready stays: another controller may have made it
// since it was looked at. It answers Volume.
type BeginDelete struct {
	Volume     volume.ID    `json:"volume"`
	Gone       volume.Epoch `json:"gone,omitempty"`
	Unfinished bool         `json:"unfinished,omitempty"`
}

// FinishDelete forgets a volume all of whose replicas are freed. Epoch is that of the tombstone whose they are, 0 any: under the id a
// snapshot may have been copied since, the end of which is another's. It answers Done.
type FinishDelete struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch,omitempty"`
}

// FreeReplica forgets a replica that is Leaving, or one of a volume with a tombstone: its node has freed it. One that is not
// there is fine. It answers Done.
type FreeReplica struct {
	Volume  volume.ID        `json:"volume"`
	Replica volume.ReplicaID `json:"replica"`
}

// Commit is a change that a volume's engine asks for: of the in-sync set, or of the exposed size, a compare-and-set on epoch
// and version; or a new epoch for an engine that the owner starts anew. It is refused as package replication says, and with
// volume.ErrDenied where the node that asks does not run the engine; "" is the controllers' own process. It answers Volume.
type Commit struct {
	Volume volume.ID          `json:"volume"`
	Node   volume.NodeID      `json:"node,omitempty"`
	Change replication.Change `json:"change"`
}

// Attach gives a volume to a node, in a new epoch. It answers Volume.
type Attach struct {
	Now        volume.Timestamp  `json:"now"`
	Volume     volume.ID         `json:"volume"`
	Node       volume.NodeID     `json:"node"`
	ReadOnly   bool              `json:"readOnly,omitempty"`
	Capability volume.Capability `json:"capability"`
}

// BeginDetach marks the attachment that began with an epoch: its node starts nothing new. It answers Volume.
type BeginDetach struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
}

// ForceDetach takes a marked attachment from a node that does not answer: the volume's epoch rises, and replicas are to be
// fenced with it before FinishDetach. Silent says that the node cannot be reached at all: whoever attaches next does not wait for
// its replicas. It answers Volume.
type ForceDetach struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
	Silent bool         `json:"silent,omitempty"`
}

// FinishDetach ends a marked attachment: its node's engine has ended, cleanly or not, or was forced out and is fenced. It
// answers Volume.
type FinishDetach struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
	Clean  bool         `json:"clean,omitempty"`
}

// OpenEngine has a node look after a volume that is not attached, in a new epoch. It answers Volume. An Attach ends it.
type OpenEngine struct {
	Volume volume.ID     `json:"volume"`
	Node   volume.NodeID `json:"node"`
}

// CloseEngine ends what OpenEngine began, in its epoch: cleanly, where the engine has ended, or else in a new epoch. It
// answers Volume.
type CloseEngine struct {
	Volume volume.ID    `json:"volume"`
	Epoch  volume.Epoch `json:"epoch"`
	Clean  bool         `json:"clean,omitempty"`
}

// AddReplica gives a volume one more replica, to be filled. It is refused with volume.ErrBusy where the volume has one on that node,
// or has yet to free a copy of one of its snapshots there. It answers Volume.
type AddReplica struct {
	Volume  volume.ID      `json:"volume"`
	Replica volume.Replica `json:"replica"`
}

// DropReplica takes a replica from a volume: it is Leaving until its node has freed it. One that is in sync can go only
// while no engine runs, and never the last. It answers Volume.
type DropReplica struct {
	Volume  volume.ID        `json:"volume"`
	Replica volume.ReplicaID `json:"replica"`
}

// LoseReplica forgets a replica whose disk is gone for good. The only one of a volume that is ready leaves the volume Lost; one
// that is in sync while others, that are not, could be salvaged is refused with volume.ErrInUse. It answers Volume.
type LoseReplica struct {
	Volume  volume.ID        `json:"volume"`
	Replica volume.ReplicaID `json:"replica"`
}

// ForgetPool forgets a pool whose disk is gone for good. It is refused with volume.ErrBusy while something is placed on it.
// It answers Done.
type ForgetPool struct {
	Pool volume.PoolID `json:"pool"`
}

// Salvage makes one replica's bytes the volume's, whatever the others have; Seen and SeenEpoch are the newest configuration and
// epoch that any replica reported. Epoch is the volume's when they did: volume.ErrBusy where another has begun since. It answers
// Volume.
type Salvage struct {
	Volume    volume.ID            `json:"volume"`
	Replica   volume.ReplicaID     `json:"replica"`
	Epoch     volume.Epoch         `json:"epoch"`
	Seen      volume.ConfigVersion `json:"seen"`
	SeenEpoch volume.Epoch         `json:"seenEpoch"`
}

// BeginExpand reserves the growth to Target, in bytes. It answers Volume, Created where no growth was reserved before.
type BeginExpand struct {
	Volume volume.ID `json:"volume"`
	Target int64     `json:"target"`
}

// FinishExpand exposes a size that every replica has that was in sync at ConfigVersion: it is refused with volume.ErrBusy
// where another configuration has been committed since. It answers Volume.
type FinishExpand struct {
	Volume        volume.ID            `json:"volume"`
	Size          int64                `json:"size"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
}

// AbortExpand gives the reservation of Target back. It answers Volume.
type AbortExpand struct {
	Volume volume.ID `json:"volume"`
	Target int64     `json:"target"`
}

// ModifyVolume changes what is not nil, all of it or nothing. It answers Volume.
type ModifyVolume struct {
	Volume       volume.ID            `json:"volume"`
	IOPS         *int64               `json:"iops,omitempty"`
	Bandwidth    *int64               `json:"bandwidth,omitempty"`
	Replicas     *int                 `json:"replicas,omitempty"`
	MinInSync    *int                 `json:"minInSync,omitempty"`
	DataLocality *volume.DataLocality `json:"dataLocality,omitempty"`
}

// SetFilesystem moves the record that gates mkfs; only forward. It is refused with volume.ErrDenied where the volume is not
// attached to the node that asks, if one does. It answers Volume.
type SetFilesystem struct {
	Volume     volume.ID         `json:"volume"`
	Node       volume.NodeID     `json:"node,omitempty"`
	Filesystem volume.Filesystem `json:"filesystem"`
}

// BeginSnapshot reserves a snapshot and records it Creating, with the in-sync replicas as the holders to be. Where an engine
// runs, the volume's Barrier announces it; else only one replica may be in sync. Where the name is taken it changes nothing
// and answers the snapshot that has it. It answers Snapshot.
type BeginSnapshot struct {
	Now    volume.Timestamp  `json:"now"`
	ID     volume.SnapshotID `json:"id"`
	Name   string            `json:"name"`
	Volume volume.ID         `json:"volume"`
	Freeze bool              `json:"freeze,omitempty"`
	Hidden bool              `json:"hidden,omitempty"`
}

// Cut says that a snapshot has been cut, under a barrier's Number (0: while no engine ran) and at a configuration, by the
// Holders.
type Cut struct {
	Snapshot      volume.SnapshotID    `json:"snapshot"`
	Number        uint64               `json:"number,omitempty"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Holders       []volume.ReplicaID   `json:"holders"`
}

// FinishSnapshot makes a snapshot Ready: it is cut on its holders. It is refused with volume.ErrBusy where the volume's
// size, filesystem or configuration changed since BeginSnapshot, or another epoch began: what was recorded may not describe
// what was cut. It answers Snapshot.
type FinishSnapshot struct {
	Cut
}

// AddHolder says that a replica of its volume has filled in a snapshot. It is refused with volume.ErrNotFound where the snapshot or
// the volume is being deleted: what was filled in is freed, whatever comes late. It is refused with volume.ErrDenied where the node
// that says so, if one does, does not run the volume's engine. It answers Snapshot.
type AddHolder struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
	Node     volume.NodeID     `json:"node,omitempty"`
	Replica  volume.ReplicaID  `json:"replica"`
}

// CopySnapshot begins to copy a snapshot of a volume that is deleted to another pool, under the volume's id: From, which is to be
// made from the snapshot on a pool that holds it whole, is in sync, and To is to be filled from it. What AddHolder records then is
// the copy, and a BeginDelete ends it. No quota counts it. It is refused with volume.ErrNotFound where the snapshot is being
// deleted, ErrInvalid where From's pool has no sound copy of it or To's node has one, ErrNoSpace where To's has no room, and ErrBusy
// where the volume exists, another of its snapshots is being copied, or something of it, or a copy of one of its
// snapshots, is still to be freed on one of the two nodes. It answers Volume.
type CopySnapshot struct {
	Now      volume.Timestamp  `json:"now"`
	Snapshot volume.SnapshotID `json:"snapshot"`
	From     volume.Replica    `json:"from"`
	To       volume.Replica    `json:"to"`
}

// DropHolder has a pool hold a snapshot no more: its copy is Leaving until FreeHolder, or gone at once where the holder is Lost: its
// disk is gone for good. One that is not Lost is refused with volume.ErrInUse where no other pool has a sound copy of a snapshot that
// is not being deleted, or where the copies differ, and with ErrBusy where a replica of the volume is in that pool, unless the snapshot
// is being deleted: nobody fills it in again. It answers Snapshot.
type DropHolder struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
	Pool     volume.PoolID     `json:"pool"`
	Lost     bool              `json:"lost,omitempty"`
}

// FreeHolder forgets a copy of a snapshot that is Leaving: its pool has freed it, or is not known any more. One that is not there is
// fine. It answers Done.
type FreeHolder struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
	Pool     volume.PoolID     `json:"pool"`
}

// NoteDifference says how the copies of a snapshot differ, nil that they are alike. It is refused with volume.ErrBusy where the
// snapshot is not ready, or is not held by the pools that are named: what was compared is not what there is. It answers Snapshot.
type NoteDifference struct {
	Snapshot volume.SnapshotID  `json:"snapshot"`
	Differs  *volume.Difference `json:"differs,omitempty"`
}

// BeginGroup does for several volumes at once what BeginSnapshot does for one. Member i is the snapshot IDs[i] of
// Volumes[i]. It answers Group.
type BeginGroup struct {
	Now     volume.Timestamp    `json:"now"`
	ID      volume.GroupID      `json:"id"`
	Name    string              `json:"name"`
	Volumes []volume.ID         `json:"volumes"`
	IDs     []volume.SnapshotID `json:"ids"`
	Freeze  bool                `json:"freeze,omitempty"`
}

// FinishGroup makes a group and all its snapshots Ready, or is refused like FinishSnapshot. It answers Group.
type FinishGroup struct {
	Group volume.GroupID `json:"group"`
	Cuts  []Cut          `json:"cuts"`
}

// BeginDeleteGroup is the tombstone of a group and of all its snapshots. Unfinished is as in BeginDelete. It answers Group.
type BeginDeleteGroup struct {
	Group      volume.GroupID `json:"group"`
	Unfinished bool           `json:"unfinished,omitempty"`
}

// BeginDeleteSnapshot is the tombstone of a snapshot. Unfinished is as in BeginDelete. It is refused with volume.ErrInvalid for a
// member of a group. It answers Snapshot.
type BeginDeleteSnapshot struct {
	Snapshot   volume.SnapshotID `json:"snapshot"`
	Unfinished bool              `json:"unfinished,omitempty"`
}

// FinishDeleteSnapshot forgets a snapshot that every holder has let go of, and with the last of a group the group. It answers
// Done.
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
func (ModifyVolume) command()         {}
func (SetFilesystem) command()        {}
func (BeginSnapshot) command()        {}
func (FinishSnapshot) command()       {}
func (BeginDeleteSnapshot) command()  {}
func (FinishDeleteSnapshot) command() {}
func (SetNodeState) command()         {}
func (RemoveNode) command()           {}
func (CreateJoinToken) command()      {}
func (RevokeJoinToken) command()      {}
func (RedeemJoinToken) command()      {}
func (FreeReplica) command()          {}
func (Commit) command()               {}
func (ForceDetach) command()          {}
func (OpenEngine) command()           {}
func (CloseEngine) command()          {}
func (AddReplica) command()           {}
func (DropReplica) command()          {}
func (LoseReplica) command()          {}
func (ForgetPool) command()           {}
func (Salvage) command()              {}
func (AddHolder) command()            {}
func (DropHolder) command()           {}
func (FreeHolder) command()           {}
func (CopySnapshot) command()         {}
func (NoteDifference) command()       {}
func (BeginGroup) command()           {}
func (FinishGroup) command()          {}
func (BeginDeleteGroup) command()     {}
func (SetQuota) command()             {}
func (DeleteQuota) command()          {}
