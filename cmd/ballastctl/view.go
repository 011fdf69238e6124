package main

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// The views are what -o json and yaml show. Their field names are an interface: they are added to and never renamed.

type conditionView struct {
	Severity string `json:"severity"`
	Reason   string `json:"reason"`
	Message  string `json:"message"`
}

type capabilityView struct {
	Access string `json:"access"`
	Mode   string `json:"mode"`
	FSType string `json:"fsType,omitempty"`
}

type replicaView struct {
	ID            string      `json:"id"`
	Volume        string      `json:"volume,omitempty"`
	VolumeName    string      `json:"volumeName,omitempty"`
	Node          string      `json:"node"`
	NodeSilent    bool        `json:"nodeSilent,omitempty"`
	Pool          string      `json:"pool"`
	PoolName      string      `json:"poolName,omitempty"`
	Role          string      `json:"role,omitempty"`
	PhysicalBytes int64       `json:"physicalBytes"`
	RemovedAt     uint64      `json:"removedAt,omitempty"`
	LastFlush     *time.Time  `json:"lastFlush,omitempty"`
	Resync        *resyncView `json:"resync,omitempty"`
}

type resyncView struct {
	Stage         string     `json:"stage"`
	Full          bool       `json:"full"`
	DoneBytes     int64      `json:"doneBytes"`
	LeftBytes     int64      `json:"leftBytes"`
	BytesPerSec   int64      `json:"bytesPerSecond"`
	SnapshotsLeft int64      `json:"snapshotsLeft"`
	Since         *time.Time `json:"since,omitempty"`
}

type engineView struct {
	Phase      string `json:"phase"`
	Epoch      uint64 `json:"epoch"`
	Waiting    int64  `json:"waiting"`
	DirtyBytes int64  `json:"dirtyBytes"`
}

type attachmentView struct {
	Node       string         `json:"node"`
	ReadOnly   bool           `json:"readOnly"`
	Detaching  bool           `json:"detaching,omitempty"`
	Since      *time.Time     `json:"since,omitempty"`
	Capability capabilityView `json:"capability"`
}

type volumeView struct {
	ID              string           `json:"id"`
	Name            string           `json:"name"`
	Tenant          string           `json:"tenant"`
	State           string           `json:"state"`
	SizeBytes       int64            `json:"sizeBytes"`
	TargetBytes     int64            `json:"targetBytes,omitempty"`
	PhysicalBytes   int64            `json:"physicalBytes"`
	CreatedAt       *time.Time       `json:"createdAt,omitempty"`
	ReplicasWanted  int32            `json:"replicasWanted"`
	MinInSync       int32            `json:"minInSync"`
	DataLocality    string           `json:"dataLocality,omitempty"`
	Pool            string           `json:"pool,omitempty"`
	FSType          string           `json:"fsType,omitempty"`
	Filesystem      string           `json:"filesystem,omitempty"`
	FilesystemPhase string           `json:"filesystemPhase,omitempty"`
	BlockSize       int32            `json:"blockSize"`
	IOPSLimit       int64            `json:"iopsLimit"`
	BandwidthLimit  int64            `json:"bandwidthLimit"`
	SourceVolume    string           `json:"sourceVolume,omitempty"`
	SourceSnapshot  string           `json:"sourceSnapshot,omitempty"`
	AccessibleNodes []string         `json:"accessibleNodes,omitempty"`
	Capabilities    []capabilityView `json:"capabilities"`
	Replicas        []replicaView    `json:"replicas"`
	Attachment      *attachmentView  `json:"attachment,omitempty"`
	Owner           string           `json:"owner,omitempty"`
	Engine          *engineView      `json:"engine,omitempty"`
	Epoch           uint64           `json:"epoch"`
	ConfigVersion   uint64           `json:"configVersion"`
	Lineage         uint64           `json:"lineage"`
	// Lost: every copy was on pools that were forgotten.
	Lost       bool            `json:"lost,omitempty"`
	Conditions []conditionView `json:"conditions"`
}

type snapshotView struct {
	ID            string          `json:"id"`
	Name          string          `json:"name"`
	Volume        string          `json:"volume"`
	VolumeName    string          `json:"volumeName,omitempty"`
	Tenant        string          `json:"tenant"`
	State         string          `json:"state"`
	SizeBytes     int64           `json:"sizeBytes"`
	PhysicalBytes int64           `json:"physicalBytes"`
	CreatedAt     *time.Time      `json:"createdAt,omitempty"`
	Filesystem    string          `json:"filesystem,omitempty"`
	Holders       []replicaView   `json:"holders"`
	Leaving       []replicaView   `json:"leaving,omitempty"`
	Conditions    []conditionView `json:"conditions,omitempty"`
}

type poolView struct {
	ID               string  `json:"id"`
	Name             string  `json:"name"`
	Node             string  `json:"node"`
	Kind             string  `json:"kind"`
	Path             string  `json:"path"`
	CapacityBytes    int64   `json:"capacityBytes"`
	UsedBytes        int64   `json:"usedBytes"`
	ProvisionedBytes int64   `json:"provisionedBytes"`
	FreeBytes        int64   `json:"freeBytes"`
	OverProvision    float64 `json:"overProvision"`
	Failed           bool    `json:"failed,omitempty"`
}

type nodeView struct {
	ID          string     `json:"id"`
	State       string     `json:"state"`
	LastSeen    *time.Time `json:"lastSeen,omitempty"`
	Zone        string     `json:"zone,omitempty"`
	Roles       []string   `json:"roles,omitempty"`
	Address     string     `json:"address,omitempty"`
	DataAddress string     `json:"dataAddress,omitempty"`
	Replicas    int64      `json:"replicas"`
	Snapshots   int64      `json:"snapshots"`
	Attached    int64      `json:"attached"`
	Pools       []poolView `json:"pools"`
}

type groupView struct {
	ID        string         `json:"id"`
	Name      string         `json:"name"`
	State     string         `json:"state"`
	CreatedAt *time.Time     `json:"createdAt,omitempty"`
	Snapshots []snapshotView `json:"snapshots"`
}

type amountsView struct {
	LogicalBytes  int64 `json:"logicalBytes"`
	PhysicalBytes int64 `json:"physicalBytes"`
	Volumes       int64 `json:"volumes"`
	Snapshots     int64 `json:"snapshots"`
}

type quotaView struct {
	Tenant string `json:"tenant"`
	// Limit: zero is unlimited.
	Limit amountsView `json:"limit"`
	Used  amountsView `json:"used"`
}

type auditView struct {
	Time    *time.Time `json:"time,omitempty"`
	Who     string     `json:"who"`
	What    string     `json:"what"`
	Object  string     `json:"object"`
	Detail  string     `json:"detail,omitempty"`
	Outcome string     `json:"outcome"`
}

type eventView struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

func timeView(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	v := t.AsTime()
	return &v
}

// views converts a list; an empty one is [] in JSON, never null.
func views[P, V any](in []P, fn func(P) V) []V {
	out := make([]V, 0, len(in))
	for _, p := range in {
		out = append(out, fn(p))
	}
	return out
}

func viewCondition(c *adminpb.Condition) conditionView {
	return conditionView{Severity: c.Severity, Reason: c.Reason, Message: c.Message}
}

func viewCapability(c *adminpb.Capability) capabilityView {
	return capabilityView{Access: c.GetAccess(), Mode: c.GetMode(), FSType: c.GetFsType()}
}

func viewReplica(r *adminpb.Replica) replicaView {
	v := replicaView{
		ID: r.Id, Volume: r.Volume, VolumeName: r.VolumeName, Node: r.Node, NodeSilent: r.NodeSilent, Pool: r.Pool, PoolName: r.PoolName, Role: r.Role,
		PhysicalBytes: r.PhysicalBytes, RemovedAt: r.RemovedAt, LastFlush: timeView(r.LastFlush),
	}
	if x := r.Resync; x != nil {
		v.Resync = &resyncView{
			Stage: x.Stage, Full: x.Full, DoneBytes: x.DoneBytes, LeftBytes: x.LeftBytes, BytesPerSec: x.Rate, SnapshotsLeft: x.SnapshotsLeft, Since: timeView(x.Since),
		}
	}
	return v
}

func viewVolume(v *adminpb.Volume) volumeView {
	out := volumeView{
		ID:              v.Id,
		Name:            v.Name,
		Tenant:          v.Tenant,
		State:           v.State,
		SizeBytes:       v.SizeBytes,
		TargetBytes:     v.TargetBytes,
		PhysicalBytes:   v.PhysicalBytes,
		CreatedAt:       timeView(v.CreatedAt),
		DataLocality:    v.DataLocality,
		Pool:            v.Pool,
		FSType:          v.FsType,
		Filesystem:      v.FilesystemType,
		FilesystemPhase: v.FilesystemPhase,
		BlockSize:       v.BlockSize,
		IOPSLimit:       v.IopsLimit,
		BandwidthLimit:  v.BandwidthLimit,
		SourceVolume:    v.SourceVolume,
		SourceSnapshot:  v.SourceSnapshot,
		AccessibleNodes: v.AccessibleNodes,
		Capabilities:    views(v.Capabilities, viewCapability),
		Replicas:        views(v.Replicas, viewReplica),
		Owner:           v.Owner,
		ReplicasWanted:  v.ReplicasWanted,
		MinInSync:       v.MinInSync,
		Epoch:           v.Epoch,
		ConfigVersion:   v.ConfigVersion,
		Lineage:         v.Lineage,
		Lost:            v.Lost,
		Conditions:      views(v.Conditions, viewCondition),
	}
	if e := v.Engine; e != nil {
		out.Engine = &engineView{Phase: e.Phase, Epoch: e.Epoch, Waiting: e.Waiting, DirtyBytes: e.DirtyBytes}
	}
	if a := v.Attachment; a != nil {
		out.Attachment = &attachmentView{Node: a.Node, ReadOnly: a.ReadOnly, Detaching: a.Detaching, Since: timeView(a.Since), Capability: viewCapability(a.Capability)}
	}
	return out
}

func viewSnapshot(s *adminpb.Snapshot) snapshotView {
	return snapshotView{
		ID:            s.Id,
		Name:          s.Name,
		Volume:        s.Volume,
		VolumeName:    s.VolumeName,
		Tenant:        s.Tenant,
		State:         s.State,
		SizeBytes:     s.SizeBytes,
		PhysicalBytes: s.PhysicalBytes,
		CreatedAt:     timeView(s.CreatedAt),
		Filesystem:    s.FilesystemType,
		Holders:       views(s.Holders, viewReplica),
		Leaving:       views(s.Leaving, viewReplica),
		Conditions:    views(s.Conditions, viewCondition),
	}
}

func viewPool(p *adminpb.Pool) poolView {
	return poolView{
		ID:               p.Id,
		Name:             p.Name,
		Node:             p.Node,
		Kind:             p.Kind,
		Path:             p.Path,
		CapacityBytes:    p.CapacityBytes,
		UsedBytes:        p.UsedBytes,
		ProvisionedBytes: p.ProvisionedBytes,
		FreeBytes:        p.FreeBytes,
		OverProvision:    p.OverProvision,
		Failed:           p.Failed,
	}
}

func viewNode(n *adminpb.Node) nodeView {
	return nodeView{
		ID: n.Id, State: n.State, LastSeen: timeView(n.LastSeen), Zone: n.Zone, Roles: n.Roles, Address: n.Address, DataAddress: n.DataAddress,
		Replicas: n.Replicas, Snapshots: n.Snapshots, Attached: n.Attached, Pools: views(n.Pools, viewPool),
	}
}

func viewGroup(g *adminpb.Group) groupView {
	return groupView{ID: g.Id, Name: g.Name, State: g.State, CreatedAt: timeView(g.CreatedAt), Snapshots: views(g.Snapshots, viewSnapshot)}
}

func viewAmounts(a *adminpb.Amounts) amountsView {
	return amountsView{LogicalBytes: a.GetLogicalBytes(), PhysicalBytes: a.GetPhysicalBytes(), Volumes: a.GetVolumes(), Snapshots: a.GetSnapshots()}
}

func viewQuota(q *adminpb.Quota) quotaView {
	return quotaView{Tenant: q.Tenant, Limit: viewAmounts(q.Limit), Used: viewAmounts(q.Used)}
}

func viewAudit(e *adminpb.AuditEntry) auditView {
	return auditView{Time: timeView(e.Time), Who: e.Who, What: e.What, Object: e.Object, Detail: e.Detail, Outcome: e.Outcome}
}
