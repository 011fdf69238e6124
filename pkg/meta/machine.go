package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/quota"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// apply decides on one encoded command and leaves what it changes in v; after a refusal v is to be dropped. It reads
// nothing but v and the command: no clock, no randomness, no map in its order.
func apply(v *view, encoded []byte) command.Result {
	c, err := command.Decode(encoded)
	if err != nil {
		return command.Refuse(err)
	}
	var r command.Result
	switch c := c.(type) {
	case command.RegisterNode:
		r, err = registerNode(v, c)
	case command.ReportUsage:
		r, err = reportUsage(v, c)
	case command.CreateVolume:
		r, err = createVolume(v, c)
	case command.FinishCreate:
		r, err = finishCreate(v, c)
	case command.BeginDelete:
		r, err = beginDelete(v, c)
	case command.FinishDelete:
		r, err = finishDelete(v, c)
	case command.Attach:
		r, err = attach(v, c)
	case command.BeginDetach:
		r, err = beginDetach(v, c)
	case command.FinishDetach:
		r, err = finishDetach(v, c)
	case command.BeginExpand:
		r, err = beginExpand(v, c)
	case command.FinishExpand:
		r, err = finishExpand(v, c)
	case command.AbortExpand:
		r, err = abortExpand(v, c)
	case command.ModifyVolume:
		r, err = modifyVolume(v, c)
	case command.FreeReplica:
		r, err = freeReplica(v, c)
	case command.Commit:
		r, err = commit(v, c)
	case command.ForceDetach:
		r, err = forceDetach(v, c)
	case command.OpenEngine:
		r, err = openEngine(v, c)
	case command.CloseEngine:
		r, err = closeEngine(v, c)
	case command.AddReplica:
		r, err = addReplica(v, c)
	case command.DropReplica:
		r, err = dropReplica(v, c)
	case command.LoseReplica:
		r, err = loseReplica(v, c)
	case command.ForgetPool:
		r, err = forgetLostPool(v, c)
	case command.Salvage:
		r, err = salvage(v, c)
	case command.SetFilesystem:
		r, err = setFilesystem(v, c)
	case command.BeginSnapshot:
		r, err = beginSnapshot(v, c)
	case command.FinishSnapshot:
		r, err = finishSnapshot(v, c)
	case command.BeginDeleteSnapshot:
		r, err = beginDeleteSnapshot(v, c)
	case command.FinishDeleteSnapshot:
		r, err = finishDeleteSnapshot(v, c)
	case command.AddHolder:
		r, err = addHolder(v, c)
	case command.CopySnapshot:
		r, err = copySnapshot(v, c)
	case command.NoteDifference:
		r, err = noteDifference(v, c)
	case command.DropHolder:
		r, err = dropHolder(v, c)
	case command.FreeHolder:
		r, err = freeHolder(v, c)
	case command.BeginGroup:
		r, err = beginGroup(v, c)
	case command.FinishGroup:
		r, err = finishGroup(v, c)
	case command.BeginDeleteGroup:
		r, err = beginDeleteGroup(v, c)
	case command.SetNodeState:
		r, err = setNodeState(v, c)
	case command.RemoveNode:
		r, err = removeNode(v, c)
	case command.CreateJoinToken:
		r, err = createJoinToken(v, c)
	case command.RevokeJoinToken:
		v.del(joinTokens + c.ID)
		r = command.Done{}
	case command.RedeemJoinToken:
		r, err = redeemJoinToken(v, c)
	case command.SetQuota:
		save(v, limits+c.Tenant, c.Limit)
		r = command.Done{}
	case command.DeleteQuota:
		v.del(limits + c.Tenant)
		r = command.Done{}
	default:
		err = fmt.Errorf("command %T is not known to the state machine: %w", c, volume.ErrInvalid)
	}
	if err != nil {
		return command.Refuse(err)
	}
	return located(v, r)
}

// located is an answer whose replicas are on the nodes that their pools are on now: a record keeps where they were when it
// was written.
func located(v *view, r command.Result) command.Result {
	move := func(rs []volume.Replica) []volume.Replica {
		rs = slices.Clone(rs)
		for i := range rs {
			rs[i] = place(v, rs[i])
		}
		return rs
	}
	switch x := r.(type) {
	case command.Volume:
		x.Volume.Replicas, x.Volume.Leaving = move(x.Volume.Replicas), move(x.Volume.Leaving)
		return x
	case command.Snapshot:
		x.Snapshot.Holders, x.Snapshot.Leaving = move(x.Snapshot.Holders), move(x.Snapshot.Leaving)
		return x
	case command.Group:
		for i := range x.Snapshots {
			x.Snapshots[i].Holders, x.Snapshots[i].Leaving = move(x.Snapshots[i].Holders), move(x.Snapshots[i].Leaving)
		}
		return x
	}
	return r
}

// reserve charges a tenant, where its quota allows.
func reserve(v *view, tenant string, ask volume.Amounts) error {
	limit, _ := load[volume.Amounts](v, limits+tenant)
	used, _ := load[volume.Amounts](v, uses+tenant)
	used, err := quota.Reserve(tenant, limit, used, ask)
	if err != nil {
		return err
	}
	saveUse(v, tenant, used)
	return nil
}

func release(v *view, tenant string, less volume.Amounts) {
	used, _ := load[volume.Amounts](v, uses+tenant)
	saveUse(v, tenant, quota.Release(used, less))
}

// measure moves a tenant's physical use from old to now, whatever the limit is.
func measure(v *view, tenant string, old, now int64) {
	used, _ := load[volume.Amounts](v, uses+tenant)
	used = quota.Release(used, volume.Amounts{PhysicalBytes: old})
	saveUse(v, tenant, quota.Add(used, volume.Amounts{PhysicalBytes: now}))
}

func saveUse(v *view, tenant string, used volume.Amounts) {
	if used == (volume.Amounts{}) {
		v.del(uses + tenant)
		return
	}
	save(v, uses+tenant, used)
}

// provision places more logical bytes in the pools of a volume's replicas. It returns volume.ErrNoSpace where one has no
// room for them.
func provision(v *view, rs []volume.Replica, more int64) error {
	for _, r := range rs {
		p, ok := load[volume.Pool](v, pools+string(r.Pool))
		if !ok {
			return fmt.Errorf("pool %s is not registered: %w", r.Pool, volume.ErrNoSpace)
		}
		if p.Free() < more {
			return fmt.Errorf("pool %s on node %s: %d bytes may still be placed, %d are asked for: %w", p.ID, p.Node, p.Free(), more, volume.ErrNoSpace)
		}
		occupy(v, p.ID, more)
	}
	return nil
}

// occupy counts logical bytes in a pool, whether it has room for them or not.
func occupy(v *view, id volume.PoolID, more int64) {
	if p, ok := load[volume.Pool](v, pools+string(id)); ok {
		p.Provisioned += more
		save(v, pools+string(id), p)
	}
}

func unprovision(v *view, rs []volume.Replica, less int64) {
	for _, r := range rs {
		p, ok := load[volume.Pool](v, pools+string(r.Pool))
		if !ok {
			continue
		}
		p.Provisioned = max(0, p.Provisioned-less)
		if p.Provisioned == 0 && p.Capacity == 0 && !hasSnapshots(v, p.ID) { // its node registered without it, and nothing is on it any more
			forgetPool(v, p)
			continue
		}
		save(v, pools+string(p.ID), p)
	}
}

// reserved is what a volume has placed in each of its pools, in bytes.
func reserved(rec volume.Volume) int64 { return max(rec.Size, rec.Target) }
