package reconcile

import (
	"cmp"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Limits of repairs. Zero values are the defaults.
type Limits struct {
	// ReplicaTimeout is for how long a replica may be away before another takes its place: 10 minutes.
	ReplicaTimeout time.Duration
	// Rebuilds is how many replicas a node fills at once, and of how many volumes that nobody has attached it looks after
	// the replicas at once: 2.
	Rebuilds int
}

func (l Limits) normal() Limits {
	if l.ReplicaTimeout == 0 {
		l.ReplicaTimeout = 10 * time.Minute
	}
	if l.Rebuilds == 0 {
		l.Rebuilds = 2
	}
	return l
}

// Repairs returns what is to be done so that volumes have as many replicas in sync as they should, volumes with the fewest
// copies first. A replica that was away for too long, one on a node that is being emptied, and one that is damaged while another
// is sound, is replaced: the new one is filled before the old one goes. One that comes back in time is brought up.
func Repairs(st control.State, l Limits) []Action {
	p := planner{st: st, l: l.normal(), pools: map[volume.PoolID]volume.Node{}, filling: map[volume.NodeID]int{}, leaving: map[volume.NodeID]int{}, engines: map[volume.NodeID]int{}, copying: map[volume.ID]bool{}}
	for _, n := range st.View.Nodes {
		for _, pool := range n.Pools {
			p.pools[pool.ID] = n
		}
	}
	var vs, kept []volume.Volume
	for _, v := range st.Volumes {
		if v.State != volume.Ready {
			continue
		}
		if v.Kept == "" {
			vs = append(vs, v)
		} else {
			kept = append(kept, v)
			p.copying[v.ID] = true
		}
		for _, r := range v.Replicas {
			if r.Role == volume.Filling {
				p.filling[r.Node]++
			}
		}
		for _, r := range v.Leaving {
			p.leaving[r.Node]++
		}
		if v.Attachment == nil && v.Owner != "" {
			p.engines[v.Owner]++
		}
	}
	slices.SortStableFunc(vs, func(a, b volume.Volume) int {
		return cmp.Or(cmp.Compare(len(p.good(a)), len(p.good(b))), cmp.Compare(len(a.Replicas), len(b.Replicas)), cmp.Compare(a.ID, b.ID))
	})
	for _, v := range vs {
		p.repair(v)
	}
	p.copies(kept)
	p.moveSnapshots()
	return p.out
}

type planner struct {
	st    control.State
	l     Limits
	pools map[volume.PoolID]volume.Node
	// filling is how many replicas each node fills, leaving how many it has still to free, engines how many volumes it looks after.
	filling, leaving, engines map[volume.NodeID]int
	// copying are the deleted volumes of which a snapshot is being copied.
	copying map[volume.ID]bool
	out     []Action
}

// reachable tells whether a replica can be asked now.
func (p *planner) reachable(r volume.Replica) bool {
	_, away := p.st.Away[r.Pool]
	_, known := p.pools[r.Pool]
	return known && !away
}

// stays tells whether a replica counts: it is not lost and not to leave its node.
func (p *planner) stays(r volume.Replica) bool {
	n, known := p.pools[r.Pool]
	return known && p.st.Away[r.Pool] < p.l.ReplicaTimeout && n.State != volume.NodeEmptying
}

// keeps tells whether a replica counts for its volume: it stays, and it is not damaged where another is sound. While none is,
// each of the damaged may have what the others lack.
func (p *planner) keeps(v volume.Volume, r volume.Replica) bool {
	return p.stays(r) && !(r.Damaged && slices.ContainsFunc(v.InSync(), func(o volume.Replica) bool { return !o.Damaged && p.stays(o) && p.reachable(o) }))
}

// good are the replicas that count, are in sync and can be reached.
func (p *planner) good(v volume.Volume) []volume.Replica {
	return slices.DeleteFunc(v.InSync(), func(r volume.Replica) bool { return !p.keeps(v, r) || !p.reachable(r) })
}

func (p *planner) repair(v volume.Volume) {
	if a := v.Attachment; a != nil && a.Detaching {
		return
	}
	want := v.Parameters.Replicas
	var keep, leave []volume.Replica
	for _, r := range v.Replicas {
		if p.keeps(v, r) {
			keep = append(keep, r)
		} else {
			leave = append(leave, r)
		}
	}
	source := slices.ContainsFunc(v.InSync(), p.reachable)
	if !source {
		return // nothing can be copied, and nothing may be given up
	}
	good := p.good(v)
	switch {
	case len(keep) < want && len(v.Replicas) < replication.MaxMembers:
		if !p.add(v, want-len(keep)) {
			p.makeRoom(v, keep, leave)
		}
	case len(good) >= want && len(leave) > 0:
		p.out = append(p.out, Action{Kind: Drop, ID: string(v.ID), Replica: leave[0].ID})
	case len(good) >= want && len(keep) > want:
		p.drop(v, keep, len(good) > want)
	}
	behind := slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Role != volume.InSync && p.reachable(r) })
	unmade := slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Role == volume.Filling && p.reachable(r) })
	if v.Attachment != nil && unmade || v.Attachment == nil && behind && p.engine(v) {
		p.out = append(p.out, Action{Kind: Sync, ID: string(v.ID)})
	}
}

// engine tells whether a node may look after a volume that nobody has attached.
func (p *planner) engine(v volume.Volume) bool {
	if v.Owner != "" {
		return true
	}
	for _, r := range v.InSync() {
		if p.reachable(r) { // the node that openEngine asks first
			if p.engines[r.Node] >= p.l.Rebuilds {
				return false
			}
			p.engines[r.Node]++
			return true
		}
	}
	return false
}

// add places new replicas of a volume, as many as may be filled now, and tells whether there is a place for one.
func (p *planner) add(v volume.Volume, n int) bool {
	n = min(n, replication.MaxMembers-len(v.Replicas))
	r := placement.Request{
		Size: max(v.Size, v.Target), Replicas: 1, Pool: v.Parameters.Pool, Beside: slices.Concat(v.Replicas, v.Leaving), Refused: map[volume.PoolID]string{},
		Requisite: p.known(v.Accessible), // where it was asked for, if that is still known
	}
	if a := v.Attachment; a != nil && v.Parameters.DataLocality != volume.LocalityNone {
		r.Preferred = []volume.NodeID{a.Node}
	}
	for _, x := range p.st.Snapshots {
		if x.Volume != v.ID {
			continue
		}
		for _, h := range x.Holders {
			if h.Damaged {
				r.Refused[h.Pool] = "a snapshot of the volume that it holds is damaged"
			}
		}
		r.Beside = append(r.Beside, x.Leaving...) // it has yet to be freed: what its node reports would be taken for the new one's
	}
	if _, err := placement.Choose(p.st.View, r); err != nil {
		return false // health says why; there may be room later
	}
	p.refuseBusy(r)
	for range n {
		pools, err := placement.Choose(p.st.View, r)
		if err != nil {
			return true
		}
		p.filling[pools[0].Node]++
		p.out = append(p.out, Action{Kind: Add, ID: string(v.ID), Pool: pools[0].ID})
		r.Beside = append(r.Beside, volume.Replica{Node: pools[0].Node, Pool: pools[0].ID})
	}
	return true
}

// fewestSound is how many sound copies there must be for a damaged one to go before another has taken its place.
const fewestSound = 2

// makeRoom drops a damaged replica of a volume that finds no place for another beside it: the other is made where it was. Two
// sound ones stay, and enough for writes to go on; and the pool must be able to let go of the snapshots that are damaged with it.
func (p *planner) makeRoom(v volume.Volume, keep, leave []volume.Replica) {
	i := slices.IndexFunc(leave, func(r volume.Replica) bool { return r.Damaged && p.stays(r) && p.reachable(r) })
	good := len(p.good(v))
	if i < 0 || good < len(keep) || good < max(fewestSound, v.Parameters.MinInSync) || len(v.Leaving) > 0 {
		return
	}
	r := leave[i]
	for _, x := range p.st.Snapshots {
		if x.Volume == v.ID && damagedIn(x, r.Pool) && p.sound(x) < fewestSound {
			return
		}
	}
	if p.filling[r.Node]+p.leaving[r.Node] >= p.l.Rebuilds {
		return
	}
	p.filling[r.Node]++
	p.out = append(p.out, Action{Kind: Drop, ID: string(v.ID), Replica: r.ID})
}

func damagedIn(x volume.Snapshot, pool volume.PoolID) bool {
	return slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == pool && h.Damaged })
}

// sound counts the holders of a snapshot that stay, can be reached and are not damaged.
func (p *planner) sound(x volume.Snapshot) (n int) {
	for _, h := range x.Holders {
		if p.stays(h) && p.reachable(h) && !h.Damaged {
			n++
		}
	}
	return n
}

// drop chooses a replica that is one too many: one that is not in sync, or else, where that may be, the one that is missed
// least.
func (p *planner) drop(v volume.Volume, keep []volume.Replica, inSync bool) {
	zones := map[string]int{}
	for _, r := range keep {
		zones[p.pools[r.Pool].Zone]++
	}
	rank := func(r volume.Replica) []int {
		n := p.pools[r.Pool]
		local := v.Attachment != nil && v.Attachment.Node == r.Node
		return []int{flag(r.Role == volume.InSync), flag(p.reachable(r)), flag(n.State == volume.NodeActive), flag(local), -zones[n.Zone]}
	}
	worst := slices.MinFunc(keep, func(a, b volume.Replica) int {
		return cmp.Or(slices.Compare(rank(a), rank(b)), cmp.Compare(b.ID, a.ID))
	})
	if worst.Role != volume.InSync || inSync || !p.reachable(worst) {
		p.out = append(p.out, Action{Kind: Drop, ID: string(v.ID), Replica: worst.ID})
	}
}

// moveSnapshots lets pools go of snapshots that enough others hold, those of nodes that are being emptied and damaged ones, once
// the replica is gone that was there with them: what a pool reports of a volume's replica that is in sync counts as held. Copies that
// differ all stay: the one that goes may be the right one.
func (p *planner) moveSnapshots() {
	byID := map[volume.ID]volume.Volume{}
	for _, v := range p.st.Volumes {
		byID[v.ID] = v
	}
	for _, x := range p.st.Snapshots {
		v, there := byID[x.Volume]
		want := v.Parameters.Replicas
		k, deleted := p.st.Remains[x.Volume]
		if deleted {
			want = k.Replicas
		}
		if x.State != volume.Ready || !deleted && (!there || v.State != volume.Ready) {
			continue // nobody can fill another holder in
		}
		if x.CopiesDiffer() != nil || p.copying[x.Volume] { // a copy may go on from what is there
			continue
		}
		sound := p.sound(x)
		for _, h := range x.Holders {
			used := slices.ContainsFunc(slices.Concat(v.Replicas, v.Leaving), func(r volume.Replica) bool { return r.Pool == h.Pool })
			emptied := p.pools[h.Pool].State == volume.NodeEmptying && sound >= want
			damaged := h.Damaged && sound >= min(want, fewestSound)
			if !used && (emptied || damaged && p.reachable(h)) { // one that cannot be asked frees it later, or is forgotten
				p.out = append(p.out, Action{Kind: Move, ID: string(x.ID), Pool: h.Pool})
			}
		}
	}
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}
