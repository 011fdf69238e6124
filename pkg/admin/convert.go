package admin

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func timeToProto(t volume.Timestamp) *timestamppb.Timestamp {
	if t == 0 {
		return nil
	}
	return timestamppb.New(time.Unix(0, int64(t)))
}

func conditionsToProto(cs []volume.Condition) []*adminpb.Condition {
	var out []*adminpb.Condition
	for _, c := range cs {
		out = append(out, &adminpb.Condition{Severity: string(c.Severity), Reason: c.Reason, Message: c.Message})
	}
	return out
}

// capabilityToProto leaves mount flags out: they may be sensitive.
func capabilityToProto(c volume.Capability) *adminpb.Capability {
	return &adminpb.Capability{Access: string(c.Access), Mode: string(c.Mode), FsType: c.FSType}
}

func replicasToProto(rs []volume.Replica, at places) []*adminpb.Replica {
	var out []*adminpb.Replica
	for _, r := range rs {
		out = append(out, &adminpb.Replica{
			Id: string(r.ID), Node: string(r.Node), Pool: string(r.Pool), Role: string(r.Role), PhysicalBytes: r.PhysicalBytes, RemovedAt: uint64(r.RemovedAt),
			NodeSilent: at.silent[r.Node], PoolName: at.pools[r.Pool],
		})
	}
	return out
}

func volumeToProto(v volume.Volume, conditions []volume.Condition) *adminpb.Volume {
	p := &adminpb.Volume{
		Id:              string(v.ID),
		Name:            v.Name,
		Tenant:          v.Tenant,
		State:           string(v.State),
		SizeBytes:       v.Size,
		TargetBytes:     v.Target,
		PhysicalBytes:   v.PhysicalBytes,
		CreatedAt:       timeToProto(v.CreatedAt),
		ReplicasWanted:  int32(v.Parameters.Replicas),
		MinInSync:       int32(v.Parameters.MinInSync),
		DataLocality:    string(v.Parameters.DataLocality),
		Pool:            v.Parameters.Pool,
		FsType:          v.Parameters.FSType,
		BlockSize:       int32(v.Parameters.BlockSize),
		IopsLimit:       v.QoS.IOPS,
		BandwidthLimit:  v.QoS.Bandwidth,
		Replicas:        replicasToProto(v.Replicas, places{}),
		FilesystemPhase: string(v.Filesystem.Phase),
		FilesystemType:  v.Filesystem.Type,
		Epoch:           uint64(v.Epoch),
		ConfigVersion:   uint64(v.ConfigVersion),
		Lineage:         v.Lineage,
		Owner:           string(v.Owner),
		Lost:            v.Lost,
		Conditions:      conditionsToProto(conditions),
	}
	for _, c := range v.Capabilities {
		p.Capabilities = append(p.Capabilities, capabilityToProto(c))
	}
	if v.Source != nil {
		p.SourceVolume, p.SourceSnapshot = string(v.Source.Volume), string(v.Source.Snapshot)
	}
	for _, n := range v.Accessible {
		p.AccessibleNodes = append(p.AccessibleNodes, string(n))
	}
	if a := v.Attachment; a != nil {
		p.Attachment = &adminpb.Attachment{
			Node:       string(a.Node),
			ReadOnly:   a.ReadOnly,
			Detaching:  a.Detaching,
			Capability: capabilityToProto(a.Capability),
			Since:      timeToProto(a.Since),
		}
	}
	return p
}

// volumeInFull adds what its engine tells.
func volumeInFull(v volume.Volume, h control.Health, at places) *adminpb.Volume {
	p := volumeToProto(v, h.Conditions)
	p.Replicas = replicasOf(v, h.Engine, at)
	if e := h.Engine; e != nil {
		p.Engine = &adminpb.Engine{Phase: e.Phase, Epoch: uint64(e.Epoch), Waiting: int64(e.Waiting), DirtyBytes: e.Dirty}
	}
	return p
}

func resyncToProto(r volume.Resync) *adminpb.Resync {
	return &adminpb.Resync{
		Stage: r.Stage, Full: r.Full, DoneBytes: r.Done, LeftBytes: r.Left, Rate: r.Rate, SnapshotsLeft: int64(r.Snapshots), Since: timeToProto(r.Since),
	}
}

func snapshotToProto(s volume.Snapshot, volumeName string, at places) *adminpb.Snapshot {
	return &adminpb.Snapshot{
		Id:             string(s.ID),
		Name:           s.Name,
		Volume:         string(s.Volume),
		VolumeName:     volumeName,
		Tenant:         s.Tenant,
		State:          string(s.State),
		SizeBytes:      s.Size,
		PhysicalBytes:  s.PhysicalBytes,
		CreatedAt:      timeToProto(s.CreatedAt),
		Holders:        replicasToProto(s.Holders, at),
		Leaving:        leavingToProto(s.Leaving, at),
		FilesystemType: s.Filesystem.Type,
		Conditions:     conditionsToProto(control.SnapshotConditions(s)),
	}
}

func poolToProto(p volume.Pool) *adminpb.Pool {
	return &adminpb.Pool{
		Id:               string(p.ID),
		Name:             p.Name,
		Node:             string(p.Node),
		Kind:             string(p.Kind),
		Path:             p.Path,
		CapacityBytes:    p.Capacity,
		UsedBytes:        p.Used,
		ProvisionedBytes: p.Provisioned,
		OverProvision:    p.OverProvision,
		FreeBytes:        p.Free(),
		Failed:           p.Failed,
	}
}

// States of a node beside volume.NodeState's, for people.
const (
	nodeUp     = "up"
	nodeSilent = "silent"
)

// holdings are how many things a node has.
type holdings struct{ replicas, snapshots, attached int64 }

func (s *Service) nodeToProto(n volume.Node, h holdings) *adminpb.Node {
	out := &adminpb.Node{
		Id: string(n.ID), LastSeen: timeToProto(n.LastSeen), State: string(n.State), Zone: n.Zone, Address: n.Address, DataAddress: n.DataAddress,
		Replicas: h.replicas, Snapshots: h.snapshots, Attached: h.attached,
	}
	switch {
	case s.silent(n):
		out.State = nodeSilent
	case n.State == volume.NodeActive:
		out.State = nodeUp
	}
	for _, r := range n.Roles {
		out.Roles = append(out.Roles, string(r))
	}
	for _, p := range n.Pools {
		out.Pools = append(out.Pools, poolToProto(p))
	}
	return out
}

func amountsToProto(a volume.Amounts) *adminpb.Amounts {
	return &adminpb.Amounts{LogicalBytes: a.LogicalBytes, PhysicalBytes: a.PhysicalBytes, Volumes: a.Volumes, Snapshots: a.Snapshots}
}

func quotaToProto(q volume.Quota) *adminpb.Quota {
	return &adminpb.Quota{Tenant: q.Tenant, Limit: amountsToProto(q.Limit), Used: amountsToProto(q.Used)}
}
