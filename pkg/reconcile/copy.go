package reconcile

import (
	"cmp"
	"slices"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// copies keeps as many copies of the snapshots of deleted volumes as the volumes should have had, those with the fewest first: one
// snapshot of a volume at a time. What is being copied already is in kept.
func (p *planner) copies(kept []volume.Volume) {
	for _, v := range kept {
		switch from, to := v.Replicas[0], v.Replicas[1]; {
		case p.pointless(v):
			p.out = append(p.out, Action{Kind: End, ID: string(v.ID), Replica: to.ID})
		case to.Role == volume.InSync, p.reachable(from) && p.engine(v):
			p.out = append(p.out, Action{Kind: Sync, ID: string(v.ID)})
		}
	}
	left := map[volume.ID][]volume.Replica{} // what tombstones wait for
	taken := map[volume.ID]bool{}
	for _, v := range p.st.Volumes {
		if v.State == volume.Deleting {
			left[v.ID] = slices.Concat(v.Replicas, v.Leaving)
		}
		taken[v.ID] = v.State != volume.Deleting
	}
	held := map[volume.ID]map[volume.PoolID]chain{}
	leaving := map[volume.ID][]volume.Replica{} // copies that are none any more, and yet to be freed
	var xs []volume.Snapshot
	for _, x := range p.st.Snapshots {
		if _, deleted := p.st.Remains[x.Volume]; !deleted {
			continue
		}
		if held[x.Volume] == nil {
			held[x.Volume] = map[volume.PoolID]chain{}
		}
		for _, h := range x.Holders {
			c := held[x.Volume][h.Pool]
			if c.damaged = c.damaged || h.Damaged; later(x, c.newest) {
				c.newest = x
			}
			held[x.Volume][h.Pool] = c
		}
		leaving[x.Volume] = append(leaving[x.Volume], x.Leaving...)
		if p.short(x) {
			xs = append(xs, x)
		}
	}
	slices.SortStableFunc(xs, func(a, b volume.Snapshot) int {
		return cmp.Or(cmp.Compare(p.sound(a), p.sound(b)), cmp.Compare(a.CreatedAt, b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	for _, x := range xs {
		if !taken[x.Volume] && len(left[x.Volume]) <= replication.MaxMembers {
			taken[x.Volume] = p.copy(x, held[x.Volume], slices.Concat(left[x.Volume], leaving[x.Volume]))
		}
	}
}

// chain is what a pool has of a volume's snapshots.
type chain struct {
	newest  volume.Snapshot
	damaged bool // one of them is
}

// short tells whether a snapshot of a deleted volume has too few copies.
func (p *planner) short(x volume.Snapshot) bool {
	return x.State == volume.Ready && !x.Hidden && len(p.copied(x)) < p.st.Remains[x.Volume].Replicas
}

// copied are the copies of a snapshot that count: those that stay, and are not damaged while a sound one can be reached.
func (p *planner) copied(x volume.Snapshot) (out []volume.Replica) {
	some := slices.ContainsFunc(x.Holders, p.readable)
	for _, h := range x.Holders {
		if p.stays(h) && !(h.Damaged && some) {
			out = append(out, h)
		}
	}
	return out
}

// readable tells whether all of a copy can be read now.
func (p *planner) readable(h volume.Replica) bool { return p.reachable(h) && !h.Damaged }

// pointless tells whether a copy has come to its end, or to nothing: it is there, or others are that can be read, or it cannot go on
// while another could. That a holder may still return in time is no reason to give up what was begun.
func (p *planner) pointless(v volume.Volume) bool {
	from, to := v.Replicas[0], v.Replicas[1]
	i := slices.IndexFunc(p.st.Snapshots, func(x volume.Snapshot) bool { return x.ID == v.Kept })
	if i < 0 {
		return true
	}
	x := p.st.Snapshots[i]
	at := func(pool volume.PoolID) int {
		return slices.IndexFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == pool })
	}
	source := at(from.Pool)
	switch {
	case x.State != volume.Ready, p.sound(x) >= p.st.Remains[x.Volume].Replicas:
		return true
	case at(to.Pool) >= 0, !p.reachable(to), p.pools[to.Pool].State != volume.NodeActive:
		return true
	case source < 0, x.Holders[source].Damaged, from.Damaged, to.Damaged:
		return true
	case to.Role != volume.InSync && p.full(to.Pool): // others wait for it
		return true
	}
	return !p.reachable(from) && slices.ContainsFunc(x.Holders, p.readable)
}

// copy plans a copy of a snapshot, of whose volume pools have what is in held, from a node that looks after few others to one that has none, and
// tells whether it did. Left is what has still to be freed of the volume and its snapshots: its nodes are left alone.
func (p *planner) copy(x volume.Snapshot, held map[volume.PoolID]chain, left []volume.Replica) bool {
	var from *volume.Replica
	for _, h := range x.Holders {
		busy := p.engines[h.Node] >= p.l.Rebuilds || slices.ContainsFunc(left, func(r volume.Replica) bool { return r.Node == h.Node })
		if p.readable(h) && !busy && (from == nil || cmp.Or(flag(p.unfit(x, h))-flag(p.unfit(x, *from)), p.engines[h.Node]-p.engines[from.Node]) < 0) {
			from = &h
		}
	}
	if from == nil {
		return false
	}
	k := p.st.Remains[x.Volume]
	r := placement.Request{
		Size: k.Size, Replicas: 1, Pool: k.Pool, Requisite: p.known(k.Accessible), Beside: slices.Concat(x.Holders, left), Refused: map[volume.PoolID]string{},
	}
	for pool, c := range held {
		// The snapshots of a volume in a pool are layers upon each other, oldest first: one that comes late goes on from those that
		// are older, and must not meet one that has gone on without it.
		if c.damaged || later(c.newest, x) {
			r.Refused[pool] = "it holds a later snapshot of the volume, or a damaged one"
		}
	}
	for u := range p.st.Unfit {
		if u.Snapshot == x.ID {
			r.Refused[u.Pool] = "it was tried lately, in vain"
		}
	}
	p.refuseBusy(r)
	pools, err := placement.Choose(p.st.View, r)
	if err != nil {
		return false // there may be room later
	}
	p.engines[from.Node]++
	p.filling[pools[0].Node]++
	p.copying[x.Volume] = true
	p.out = append(p.out, Action{Kind: Copy, ID: string(x.ID), From: from.Pool, Pool: pools[0].ID})
	return true
}

func (p *planner) full(id volume.PoolID) bool {
	return slices.ContainsFunc(p.pools[id].Pools, func(x volume.Pool) bool { return x.ID == id && x.Full() })
}

func (p *planner) unfit(x volume.Snapshot, h volume.Replica) bool {
	return p.st.Unfit[control.Unfit{Snapshot: x.ID, Pool: h.Pool}]
}

func later(a, b volume.Snapshot) bool {
	return cmp.Or(cmp.Compare(a.CreatedAt, b.CreatedAt), cmp.Compare(a.ID, b.ID)) > 0
}

// known are the nodes of a list that are nodes still.
func (p *planner) known(asked []volume.NodeID) (out []volume.NodeID) {
	for _, n := range p.st.View.Nodes {
		if slices.Contains(asked, n.ID) {
			out = append(out, n.ID)
		}
	}
	return out
}

// refuseBusy keeps a request from nodes that fill as many replicas as they may.
func (p *planner) refuseBusy(r placement.Request) {
	for id, node := range p.pools {
		if p.filling[node.ID] >= p.l.Rebuilds {
			r.Refused[id] = "its node fills as many replicas as it may"
		}
	}
}
