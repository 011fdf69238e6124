// Package placement decides which pools get the replicas of a volume, and whether a node can be done without. It is pure:
// a view of the cluster and a request in, a ranked choice or the reasons against every pool out.
package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// View is the cluster as placement sees it.
type View struct {
	Nodes []volume.Node
	// Down says why nothing may be placed on a node now.
	Down map[volume.NodeID]string
}

// Request is what is to be placed. No two replicas go to one node, and as few as can be to one zone.
type Request struct {
	// Size in bytes, of each replica.
	Size     int64
	Replicas int
	// Pool restricts the choice to pools of that name; "" is any.
	Pool string
	// Locality says what Requisite and Preferred mean. Required: the volume can be reached only from its replicas' nodes.
	// With more requisite nodes than replicas each replica is on one of them, with as many each has one, with fewer each has
	// one and the rest goes elsewhere (CSI's TopologyRequirement); preferred ones are taken first, in order. Otherwise the
	// volume can be reached from every known node: it is enough that so many of the requisite ones are known. They are still
	// taken first, and the first preferred node that has room gets one of the replicas, unless Locality is none.
	Locality volume.DataLocality
	// Requisite nodes; empty: any.
	Requisite []volume.NodeID
	Preferred []volume.NodeID
	// Local must hold one of the replicas; "" is no such wish.
	Local volume.NodeID
	// Sources are the pools that hold what the volume is made from: they are taken first, and one of them at least. Nil: it
	// is made from nothing.
	Sources []volume.PoolID
	// Beside are the volume's replicas that stay: their nodes get no other one.
	Beside []volume.Replica
	// Refused says why a pool that looks fine cannot be used.
	Refused map[volume.PoolID]string
}

// Choose returns one pool per replica, each on a node of its own, the best first. It returns volume.ErrNoSpace with the
// reason against every pool where that cannot be done.
func Choose(v View, r Request) ([]volume.Pool, error) {
	requisite := set(r.Requisite)
	known := map[volume.NodeID]string{} // to zones
	for _, n := range v.Nodes {
		known[n.ID] = n.Zone
	}
	left, against := candidates(v, r)
	strict := r.Locality == volume.LocalityRequired && len(requisite) > 0
	if met, need := count(requisite, func(n volume.NodeID) bool { _, ok := known[n]; return ok }), min(len(requisite), r.Replicas); met < need {
		return nil, refuse(r, fmt.Sprintf("%d of the %d nodes of the requested topology are known, %d must be", met, len(requisite), need), known, against)
	}
	if strict && len(requisite) >= r.Replicas {
		left = slices.DeleteFunc(left, func(p volume.Pool) bool {
			if !requisite[p.Node] {
				against = append(against, fmt.Sprintf("pool %s: node %s is not in the requested topology", p.ID, p.Node))
			}
			return !requisite[p.Node]
		})
	}
	if len(left) < r.Replicas {
		return nil, refuse(r, fmt.Sprintf("%d replicas need as many nodes, %d can hold one", r.Replicas, len(left)), known, against)
	}
	used := map[string]int{} // zones
	for _, b := range r.Beside {
		used[known[b.Node]]++
	}
	order := map[volume.NodeID]int{}
	for i, n := range r.Preferred {
		switch _, ok := order[n]; {
		case ok:
		case r.Locality == volume.LocalityRequired:
			order[n] = i - len(r.Preferred)
		case r.Locality != volume.LocalityNone && len(order) == 0 && slices.ContainsFunc(left, func(p volume.Pool) bool { return p.Node == n }):
			order[n] = -1
		}
	}
	var chosen []volume.Pool
	for len(chosen) < r.Replicas {
		better := func(a, b volume.Pool) int {
			wish := last(requisite[a.Node], requisite[b.Node])
			source := last(slices.Contains(r.Sources, a.ID), slices.Contains(r.Sources, b.ID))
			first := cmp.Or(source, cmp.Compare(order[a.Node], order[b.Node]), wish)
			if strict {
				first = cmp.Or(wish, first)
			}
			return cmp.Or(last(a.Node == r.Local, b.Node == r.Local), first,
				cmp.Compare(used[known[a.Node]], used[known[b.Node]]), cmp.Compare(Room(b), Room(a)), cmp.Compare(a.ID, b.ID))
		}
		p := slices.MinFunc(left, better)
		left = slices.DeleteFunc(left, func(x volume.Pool) bool { return x.ID == p.ID })
		chosen = append(chosen, p)
		used[known[p.Node]]++
	}
	on := func(n volume.NodeID) bool {
		return slices.ContainsFunc(chosen, func(p volume.Pool) bool { return p.Node == n })
	}
	if met, need := count(requisite, on), min(len(requisite), r.Replicas); strict && met < need {
		return nil, refuse(r, fmt.Sprintf("%d of the %d nodes of the requested topology can hold a replica", met, len(requisite)), known, against)
	}
	if r.Local != "" && !on(r.Local) {
		return nil, refuse(r, fmt.Sprintf("node %s cannot hold a replica", r.Local), known, against)
	}
	if r.Sources != nil && !slices.ContainsFunc(chosen, func(p volume.Pool) bool { return slices.Contains(r.Sources, p.ID) }) {
		return nil, refuse(r, "no pool that holds the source can hold a replica", known, against)
	}
	return chosen, nil
}

// Capacity returns the free bytes of all pools that the request (whose Size is not read) may use, those of Local only where
// that is given, and the largest Size that Choose would place.
func Capacity(v View, r Request) (available, maximum int64) {
	r.Size = 0
	requisite := set(r.Requisite)
	restricted := r.Locality == volume.LocalityRequired && len(requisite) > 0 && len(requisite) >= r.Replicas
	var sizes []int64
	for _, n := range v.Nodes {
		for _, p := range n.Pools {
			if restricted && !requisite[p.Node] || objection(v, r, p) != "" {
				continue
			}
			if r.Local == "" || r.Local == p.Node {
				available += Room(p)
			}
			if size := min(Room(p), volume.MaxSize); size >= volume.MinSize {
				sizes = append(sizes, size-size%volume.SizeQuantum)
			}
		}
	}
	// The largest possible is what some pool has room for, and what is possible for one size is for every smaller one.
	slices.Sort(sizes)
	sizes = slices.Compact(sizes)
	n, _ := slices.BinarySearchFunc(sizes, true, func(size int64, _ bool) int {
		r.Size = size
		if _, err := Choose(v, r); err != nil {
			return 1
		}
		return -1
	})
	if n == 0 {
		return available, 0
	}
	return available, sizes[n-1]
}

// Room is how many logical bytes a new replica may have in a pool; none where the pool is full of data.
func Room(p volume.Pool) int64 {
	if p.Full() {
		return 0
	}
	return p.Free()
}

// candidates returns the best usable pool of every node, and what is against the others.
func candidates(v View, r Request) (best []volume.Pool, against []string) {
	for _, n := range v.Nodes {
		var usable []volume.Pool
		for _, p := range n.Pools {
			if why := objection(v, r, p); why != "" {
				against = append(against, fmt.Sprintf("pool %s on node %s: %s", p.ID, p.Node, why))
				continue
			}
			usable = append(usable, p)
		}
		if len(usable) > 0 {
			best = append(best, slices.MinFunc(usable, func(a, b volume.Pool) int {
				return cmp.Or(last(slices.Contains(r.Sources, a.ID), slices.Contains(r.Sources, b.ID)), cmp.Compare(Room(b), Room(a)), cmp.Compare(a.ID, b.ID))
			}))
		}
	}
	return best, against
}

func objection(v View, r Request, p volume.Pool) string {
	switch {
	case v.Down[p.Node] != "":
		return v.Down[p.Node]
	case slices.ContainsFunc(r.Beside, func(b volume.Replica) bool { return b.Node == p.Node }):
		return "its node has a replica already"
	case r.Pool != "" && p.Name != r.Pool:
		return fmt.Sprintf("its name is %q, %q is asked for", p.Name, r.Pool)
	case r.Refused[p.ID] != "":
		return r.Refused[p.ID]
	case p.Capacity == 0:
		return "it is offline"
	case p.Failed:
		return "it has stopped after an error of its disk; restart its node's daemon once that is sound"
	case p.Full():
		return fmt.Sprintf("it is full, %d of %d bytes are used", p.Used, p.Capacity)
	case p.Free() < r.Size:
		return fmt.Sprintf("%d bytes may still be placed, %d are asked for", p.Free(), r.Size)
	}
	return ""
}

func refuse(r Request, what string, known map[volume.NodeID]string, against []string) error {
	for _, n := range r.Requisite {
		if _, ok := known[n]; !ok {
			against = append(against, fmt.Sprintf("node %s: unknown", n))
		}
	}
	const most = 8 // a message stays readable in a large cluster
	more := ""
	if len(against) > most {
		more = fmt.Sprintf("; and %d more", len(against)-most)
		against = against[:most]
	}
	if len(against) == 0 {
		return fmt.Errorf("%s; the cluster has no more nodes with a pool: %w", what, volume.ErrNoSpace)
	}
	return fmt.Errorf("%s (%s%s): %w", what, strings.Join(against, "; "), more, volume.ErrNoSpace)
}

func set(ids []volume.NodeID) map[volume.NodeID]bool {
	m := map[volume.NodeID]bool{}
	for _, id := range ids {
		m[id] = true
	}
	return m
}

func count(m map[volume.NodeID]bool, is func(volume.NodeID) bool) (n int) {
	for id := range m {
		if is(id) {
			n++
		}
	}
	return n
}

// last orders what is false after what is true.
func last(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
