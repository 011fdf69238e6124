package meta

import (
	"fmt"
	"maps"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// A pool whose node reported within takeover (nodes report every minute) is not given to another one: two hosts must not
// both serve a copied disk.
const takeover = volume.Timestamp(150e9)

// nodeRecord is a node less its pools.
type nodeRecord struct {
	volume.Node
	Pools []volume.PoolID `json:"pools"` // in order
}

func registerNode(v *view, c command.RegisterNode) (command.Result, error) {
	if v.read(removedNodes+string(c.Node.ID)) != nil {
		return nil, fmt.Errorf("node %s was removed from the cluster; it can join anew with a token: %w", c.Node.ID, volume.ErrInUse)
	}
	n, _ := load[nodeRecord](v, nodes+string(c.Node.ID))
	seen, state := max(n.LastSeen, c.Now), n.State
	n.Node = c.Node
	n.LastSeen, n.State, n.Node.Pools = seen, state, nil
	present := map[volume.PoolID]bool{}
	for _, p := range c.Node.Pools {
		present[p.ID] = true
		p.Node, p.Provisioned = n.ID, 0
		if old, ok := load[volume.Pool](v, pools+string(p.ID)); ok {
			p.Provisioned = old.Provisioned
			if old.Node != n.ID {
				if err := leave(v, old, c.Now); err != nil {
					return nil, err
				}
			}
		}
		save(v, pools+string(p.ID), p)
	}
	for _, id := range n.Pools {
		if p, ok := load[volume.Pool](v, pools+string(id)); ok && p.Node == n.ID && !present[id] {
			if p.Provisioned == 0 && !hasSnapshots(v, id) {
				v.del(pools + string(id))
				continue
			}
			p.Capacity, p.Used, p.Failed = 0, 0, false // offline: it keeps what is placed on it and gets no more
			save(v, pools+string(id), p)
			present[id] = true
		}
	}
	n.Pools = slices.Sorted(maps.Keys(present))
	save(v, nodes+string(n.ID), n)
	return command.Done{}, nil
}

// hasSnapshots tells whether a pool has copies of snapshots by the records, those that leave included: it may have nothing else.
func hasSnapshots(v *view, id volume.PoolID) bool {
	in := inPool(id)
	return someSnapshot(v, snapshots, func(x volume.Snapshot) bool { return slices.ContainsFunc(slices.Concat(x.Holders, x.Leaving), in) })
}

// leave takes a pool from the node it was on: its disk was moved, or the host has a new name.
func leave(v *view, p volume.Pool, now volume.Timestamp) error {
	old, ok := load[nodeRecord](v, nodes+string(p.Node))
	if !ok {
		return nil
	}
	if p.Capacity > 0 && now-old.LastSeen < takeover {
		return fmt.Errorf("pool %s is on node %s, which reported %d s ago; a pool moves once its node is silent for %d s: %w",
			p.ID, old.ID, max(0, now-old.LastSeen)/1e9, takeover/1e9, volume.ErrBusy)
	}
	forgetPool(v, p)
	if len(old.Pools) == 1 && p.Capacity != 0 {
		forgetNode(v, old.ID) // nothing is left of it: a host that was renamed
	}
	return nil
}

// forgetPool takes a pool from its node, which stays: it is a member until it is removed.
func forgetPool(v *view, p volume.Pool) {
	v.del(pools + string(p.ID))
	n, ok := load[nodeRecord](v, nodes+string(p.Node))
	if !ok {
		return
	}
	n.Pools = slices.DeleteFunc(n.Pools, func(id volume.PoolID) bool { return id == p.ID })
	save(v, nodes+string(n.ID), n)
}

func reportUsage(v *view, c command.ReportUsage) (command.Result, error) {
	n, ok := load[nodeRecord](v, nodes+string(c.Node))
	if !ok {
		return nil, fmt.Errorf("node %s is not registered: %w", c.Node, volume.ErrNotFound)
	}
	n.LastSeen = max(n.LastSeen, c.Now)
	save(v, nodes+string(n.ID), n)
	for _, p := range c.Pools {
		old, ok := load[volume.Pool](v, pools+string(p.ID))
		if !ok || old.Node != c.Node {
			continue
		}
		now := old
		now.Capacity, now.Used, now.OverProvision, now.Failed = p.Capacity, p.Used, p.OverProvision, p.Failed
		if now != old {
			save(v, pools+string(p.ID), now)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Replicas)) {
		owner := v.read(replicas + string(id))
		rec, ok := load[volume.Volume](v, volumes+string(owner))
		if !ok || rec.Kept != "" { // what is there for a while, to copy a snapshot, is nobody's use
			continue
		}
		rec.Replicas, rec.Leaving = slices.Clone(rec.Replicas), slices.Clone(rec.Leaving)
		r := first(func(r volume.Replica) bool { return r.ID == id }, rec.Replicas, rec.Leaving)
		if bytes := c.Replicas[id]; r != nil && r.PhysicalBytes != bytes {
			measure(v, rec.Tenant, r.PhysicalBytes, bytes)
			rec.PhysicalBytes += bytes - r.PhysicalBytes
			r.PhysicalBytes = bytes
			putVolume(v, rec)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Snapshots)) {
		rec, ok := load[volume.Snapshot](v, snapshots+string(id))
		if !ok {
			continue
		}
		rec.Holders, rec.Leaving = slices.Clone(rec.Holders), slices.Clone(rec.Leaving)
		h := first(func(h volume.Replica) bool { return place(v, h).Node == c.Node }, rec.Holders, rec.Leaving)
		if bytes := c.Snapshots[id]; h != nil && h.PhysicalBytes != bytes {
			measure(v, rec.Tenant, h.PhysicalBytes, bytes)
			rec.PhysicalBytes += bytes - h.PhysicalBytes
			h.PhysicalBytes = bytes
			putSnapshot(v, rec)
		}
	}
	reportDamage(v, c)
	return command.Done{}, nil
}

// first returns the first replica of some lists for which is holds, in its place; nil where there is none.
func first(is func(volume.Replica) bool, lists ...[]volume.Replica) *volume.Replica {
	for _, rs := range lists {
		if i := slices.IndexFunc(rs, is); i >= 0 {
			return &rs[i]
		}
	}
	return nil
}

// reportDamage notes which of a node's replicas and snapshots are damaged.
func reportDamage(v *view, c command.ReportUsage) {
	here := func(r volume.Replica) bool { return place(v, r).Node == c.Node }
	for _, id := range slices.Sorted(maps.Keys(c.DamagedReplicas)) {
		rec, _ := load[volume.Volume](v, volumes+string(v.read(replicas+string(id))))
		i := slices.IndexFunc(rec.Replicas, func(r volume.Replica) bool { return r.ID == id && here(r) })
		if bad := c.DamagedReplicas[id]; i >= 0 && rec.Replicas[i].Damaged != bad {
			rec.Replicas = slices.Clone(rec.Replicas)
			rec.Replicas[i].Damaged = bad
			putVolume(v, rec)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.DamagedSnapshots)) {
		rec, _ := load[volume.Snapshot](v, snapshots+string(id))
		i := slices.IndexFunc(rec.Holders, here)
		if bad := c.DamagedSnapshots[id]; i >= 0 && rec.Holders[i].Damaged != bad {
			rec.Holders = slices.Clone(rec.Holders)
			rec.Holders[i].Damaged = bad
			putSnapshot(v, rec)
		}
	}
}
