package command

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var roles = []struct {
	record volume.ReplicaRole
	member replication.Role
}{
	{volume.InSync, replication.RoleISR},
	{volume.Stale, replication.RoleSTALE},
	{volume.Filling, replication.RoleNEW},
}

// Membership is a volume's record as the replication protocol sees it.
func Membership(v volume.Volume) replication.Membership {
	m := replication.Membership{
		Volume: v.ID, Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Lineage: replication.Lineage(v.Lineage), Revision: v.Revision,
		Size: v.Size, Target: v.Target, Owner: v.Owner, Clean: v.Clean, SkipLease: v.SkipLease, Silent: v.Silent, MinInSync: v.Parameters.MinInSync,
		Barriers: v.Barriers, Deleted: v.State == volume.Deleting,
	}
	if b := v.Barrier; b != nil {
		m.Barrier = &replication.Barrier{Number: b.Number, Snapshot: b.Snapshot, Epoch: b.Epoch, ConfigVersion: b.ConfigVersion}
	}
	for _, r := range v.Replicas {
		m.Members = append(m.Members, Member(r))
	}
	return m
}

// Member is a replica as the replication protocol sees it.
func Member(r volume.Replica) replication.Member {
	m := replication.Member{
		ID: r.ID, Node: r.Node, Pool: r.Pool, RemovedAt: r.RemovedAt, RemovedBarriers: r.RemovedBarriers,
		Incarnation: replication.Incarnation(r.Incarnation), BootID: replication.BootID(r.BootID),
	}
	for _, x := range roles {
		if x.record == r.Role {
			m.Role = x.member
		}
	}
	return m
}

// Change applies a change to a volume's record by the rules of replication.Membership, and returns the record after it.
// Replicas that are dropped are Leaving. What the change means for pools and quotas is left to the caller.
func Change(v volume.Volume, c replication.Change) (volume.Volume, error) {
	before := Membership(v)
	m, err := before.Apply(c)
	if err != nil {
		return v, err
	}
	v.Size, v.Target, v.Parameters.MinInSync = m.Size, m.Target, m.MinInSync
	v.Protocol = volume.Protocol{
		Epoch: m.Epoch, ConfigVersion: m.ConfigVersion, Lineage: uint64(m.Lineage), Revision: m.Revision,
		Owner: m.Owner, Clean: m.Clean, SkipLease: m.SkipLease, Silent: m.Silent, Barriers: m.Barriers,
	}
	if b := m.Barrier; b != nil {
		v.Barrier = &volume.Barrier{Number: b.Number, Snapshot: b.Snapshot, Epoch: b.Epoch, ConfigVersion: b.ConfigVersion}
	}
	if m.Deleted {
		v.State = volume.Deleting
	}
	was := v.Replicas
	v.Replicas, v.Leaving = nil, slices.Clone(v.Leaving)
	for _, a := range m.Members {
		r := volume.Replica{
			ID: a.ID, Node: a.Node, Pool: a.Pool, RemovedAt: a.RemovedAt, RemovedBarriers: a.RemovedBarriers,
			Incarnation: uint64(a.Incarnation), BootID: uint64(a.BootID),
		}
		for _, x := range roles {
			if x.member == a.Role {
				r.Role = x.record
			}
		}
		if i := slices.IndexFunc(was, func(o volume.Replica) bool { return o.ID == r.ID }); i >= 0 {
			r.PhysicalBytes, r.Damaged = was[i].PhysicalBytes, was[i].Damaged
		}
		v.Replicas = append(v.Replicas, r)
	}
	for _, r := range was {
		if _, stays := m.Member(r.ID); !stays {
			v.Leaving = append(v.Leaving, r)
		}
	}
	return v, nil
}

// checkChange bounds a change that an engine asks for: it may change the in-sync set, expose a size, or begin an epoch.
func checkChange(c replication.Change) error {
	parts := 0
	for _, is := range []bool{
		c.Reconfigure != nil, c.ExpandCommit != nil, c.Attach != nil, c.Detach != nil, c.AddReplica != nil, c.DropReplica != nil, c.Prepare != nil,
		c.Complete != nil, c.AbortBarrier != nil, c.ExpandIntent != nil, c.SetMinInSync != nil, c.Tombstone != nil, c.Salvage != nil,
		len(c.SetPlacements) > 0,
	} {
		if is {
			parts++
		}
	}
	if parts != 1 || c.Reconfigure == nil && c.ExpandCommit == nil && (c.Attach == nil || c.Attach.Force || c.Attach.Assign) {
		return fmt.Errorf("an engine changes the in-sync set or the exposed size, or begins an epoch, one at a time: %w", volume.ErrInvalid)
	}
	r := c.Reconfigure
	if r == nil {
		return nil
	}
	if len(r.Remove)+len(r.Add)+len(r.Boots) > 3*replication.MaxMembers {
		return fmt.Errorf("a change of %d replicas: %w", len(r.Remove)+len(r.Add)+len(r.Boots), volume.ErrInvalid)
	}
	ids := slices.Clone(r.Remove)
	for _, p := range slices.Concat(r.Add, r.Boots) {
		ids = append(ids, p.ID)
	}
	for _, id := range ids {
		if err := volume.CheckName("replica id", string(id)); err != nil {
			return err
		}
	}
	return nil
}
