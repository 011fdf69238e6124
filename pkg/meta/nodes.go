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

type nodeRecord struct {
	ID       volume.NodeID    `json:"id"`
	LastSeen volume.Timestamp `json:"lastSeen"`
	Pools    []volume.PoolID  `json:"pools"` // in order
}

func registerNode(v *view, c command.RegisterNode) (command.Result, error) {
	n, _ := load[nodeRecord](v, nodes+string(c.Node.ID))
	n.ID = c.Node.ID
	n.LastSeen = max(n.LastSeen, c.Now)
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
			if p.Provisioned == 0 {
				v.del(pools + string(id))
				continue
			}
			p.Capacity, p.Used = 0, 0 // offline: it keeps what is placed on it and gets no more
			save(v, pools+string(id), p)
			present[id] = true
		}
	}
	n.Pools = slices.Sorted(maps.Keys(present))
	save(v, nodes+string(n.ID), n)
	return command.Done{}, nil
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
	return nil
}

func forgetPool(v *view, p volume.Pool) {
	v.del(pools + string(p.ID))
	n, ok := load[nodeRecord](v, nodes+string(p.Node))
	if !ok {
		return
	}
	n.Pools = slices.DeleteFunc(n.Pools, func(id volume.PoolID) bool { return id == p.ID })
	if len(n.Pools) == 0 && p.Capacity != 0 {
		v.del(nodes + string(n.ID)) // nothing is left of it: a host that was renamed
		return
	}
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
		now.Capacity, now.Used, now.OverProvision = p.Capacity, p.Used, p.OverProvision
		if now != old {
			save(v, pools+string(p.ID), now)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Replicas)) {
		owner := v.read(replicas + string(id))
		rec, ok := load[volume.Volume](v, volumes+string(owner))
		if bytes := c.Replicas[id]; ok && rec.PhysicalBytes != bytes {
			measure(v, rec.Tenant, rec.PhysicalBytes, bytes)
			rec.PhysicalBytes = bytes
			putVolume(v, rec)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Snapshots)) {
		rec, ok := load[volume.Snapshot](v, snapshots+string(id))
		if bytes := c.Snapshots[id]; ok && rec.PhysicalBytes != bytes {
			measure(v, rec.Tenant, rec.PhysicalBytes, bytes)
			rec.PhysicalBytes = bytes
			putSnapshot(v, rec)
		}
	}
	return command.Done{}, nil
}
