// Package placement decides which pools get the replicas of a volume. It is pure: a view of the cluster and a request in,
// a ranked choice or the reasons against every pool out.
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

// Request is what is to be placed.
type Request struct {
	// Size in bytes, of each replica.
	Size     int64
	Replicas int
	// Pool restricts the choice to pools of that name; "" is any.
	Pool string
	// Requisite nodes: with more of them than replicas each replica is on one of them, with as many each has one, with
	// fewer each has one and the rest goes elsewhere (CSI's TopologyRequirement). Empty: any node.
	Requisite []volume.NodeID
	// Preferred nodes are taken first, in order.
	Preferred []volume.NodeID
	// Holders restricts the choice to pools that hold the source; nil is no restriction.
	Holders []volume.PoolID
	// Refused says why a pool that looks fine cannot be used.
	Refused map[volume.PoolID]string
}

// Choose returns one pool per replica, each on a node of its own, the best first. It returns volume.ErrNoSpace with the
// reason against every pool where that cannot be done.
func Choose(v View, r Request) ([]volume.Pool, error) {
	best, against := candidates(v, r)
	need := r.Replicas
	if x := len(r.Requisite); x > 0 {
		required := map[volume.NodeID]bool{}
		for _, n := range r.Requisite {
			required[n] = true
		}
		if len(required) >= need {
			best = slices.DeleteFunc(best, func(p volume.Pool) bool {
				if !required[p.Node] {
					against = append(against, fmt.Sprintf("pool %s: node %s is not in the requested topology", p.ID, p.Node))
				}
				return !required[p.Node]
			})
		} else {
			slices.SortStableFunc(best, func(a, b volume.Pool) int { return cmp.Compare(rank(!required[a.Node]), rank(!required[b.Node])) })
			met := 0
			for _, p := range best {
				met += rank(required[p.Node])
			}
			if met < len(required) {
				return nil, refuse(r, fmt.Sprintf("%d of the %d nodes of the requested topology can hold a replica", met, len(required)), v, against)
			}
		}
	}
	if len(best) < need {
		return nil, refuse(r, fmt.Sprintf("%d replicas need as many nodes, %d can hold one", need, len(best)), v, against)
	}
	return best[:need], nil
}

// Capacity returns the free bytes of all pools that the request (whose Size is not read) may use, and the largest Size
// that Choose would place. Node, where not "", must hold one of the replicas.
func Capacity(v View, r Request, node volume.NodeID) (available, maximum int64) {
	r.Size = 0
	if node != "" && r.Replicas <= 1 {
		r.Requisite = []volume.NodeID{node}
	}
	best, _ := candidates(v, r)
	allowed := map[volume.NodeID]bool{}
	for _, n := range r.Requisite {
		allowed[n] = true
	}
	restricted := len(allowed) >= r.Replicas && len(allowed) > 0
	var rooms []int64
	local := int64(-1)
	for _, p := range best {
		if restricted && !allowed[p.Node] {
			continue
		}
		if p.Node == node {
			local = Room(p)
		} else {
			rooms = append(rooms, Room(p))
		}
	}
	for _, n := range v.Nodes {
		for _, p := range n.Pools {
			if (node == "" || p.Node == node) && (!restricted || allowed[p.Node]) && objection(v, r, p) == "" {
				available += Room(p)
			}
		}
	}
	slices.SortFunc(rooms, func(a, b int64) int { return cmp.Compare(b, a) })
	need := r.Replicas
	maximum = volume.MaxSize
	if node != "" {
		if local < 0 {
			return 0, 0
		}
		maximum, need = min(maximum, local), need-1
	}
	if len(rooms) < need {
		return available, 0
	}
	if need > 0 {
		maximum = min(maximum, rooms[need-1])
	}
	maximum -= maximum % volume.SizeQuantum
	if maximum < volume.MinSize {
		maximum = 0
	}
	return available, maximum
}

// Room is how many logical bytes a new replica may have in a pool; none where the pool is full of data.
func Room(p volume.Pool) int64 {
	if p.Used >= p.Capacity {
		return 0
	}
	return p.Free()
}

// candidates returns the best usable pool of every node, best first, and what is against the others.
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
			slices.SortFunc(usable, func(a, b volume.Pool) int {
				return cmp.Or(cmp.Compare(Room(b), Room(a)), cmp.Compare(a.ID, b.ID))
			})
			best = append(best, usable[0])
		}
	}
	order := map[volume.NodeID]int{}
	for i, n := range r.Preferred {
		if _, ok := order[n]; !ok {
			order[n] = i - len(r.Preferred)
		}
	}
	slices.SortFunc(best, func(a, b volume.Pool) int {
		return cmp.Or(cmp.Compare(order[a.Node], order[b.Node]), cmp.Compare(Room(b), Room(a)), cmp.Compare(a.ID, b.ID))
	})
	return best, against
}

func objection(v View, r Request, p volume.Pool) string {
	switch {
	case v.Down[p.Node] != "":
		return v.Down[p.Node]
	case r.Pool != "" && p.Name != r.Pool:
		return fmt.Sprintf("its name is %q, %q is asked for", p.Name, r.Pool)
	case r.Holders != nil && !slices.Contains(r.Holders, p.ID):
		return "it does not hold the source"
	case r.Refused[p.ID] != "":
		return r.Refused[p.ID]
	case p.Capacity == 0:
		return "it is offline"
	case p.Used >= p.Capacity:
		return fmt.Sprintf("it is full, %d of %d bytes are used", p.Used, p.Capacity)
	case p.Free() < r.Size:
		return fmt.Sprintf("%d bytes may still be placed, %d are asked for", p.Free(), r.Size)
	}
	return ""
}

func refuse(r Request, what string, v View, against []string) error {
	known := map[volume.NodeID]bool{}
	for _, n := range v.Nodes {
		known[n.ID] = true
	}
	for _, n := range r.Requisite {
		if !known[n] {
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

func rank(b bool) int {
	if b {
		return 1
	}
	return 0
}
