package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Health returns what is wrong with a volume; no condition is healthy.
func (s *Service) Health(ctx context.Context, id volume.ID) (Health, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return Health{}, err
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return Health{}, err
	}
	return Health{Volume: id, Conditions: s.conditions(ctx, v, nodes)}, nil
}

// Unhealthy lists the volumes with conditions in order of id, and the token of the next page or "".
func (s *Service) Unhealthy(ctx context.Context, p Page) ([]Health, string, error) {
	if p.Max < 0 {
		return nil, "", fmt.Errorf("page of %d entries: %w", p.Max, volume.ErrInvalid)
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return nil, "", err
	}
	out := []Health{}
	const batch = 1000
	for {
		vs, next, err := s.Volumes(ctx, Page{Max: batch, Token: p.Token, All: p.All})
		if err != nil {
			return nil, "", err
		}
		for _, v := range vs {
			if err := ctx.Err(); err != nil {
				return nil, "", err
			}
			cs := s.conditions(ctx, v, nodes)
			if len(cs) == 0 {
				continue
			}
			if p.Max > 0 && len(out) == p.Max {
				return out, string(out[len(out)-1].Volume), nil
			}
			out = append(out, Health{Volume: v.ID, Conditions: cs})
		}
		if next == "" {
			return out, "", nil
		}
		p.Token = next
	}
}

// conditions asks the nodes of a Ready volume and adds what only the controllers see.
func (s *Service) conditions(ctx context.Context, v volume.Volume, nodes []volume.Node) []volume.Condition {
	if v.State != volume.Ready {
		return nil
	}
	var out []volume.Condition
	lost := 0
	for _, r := range v.Replicas {
		why, safe := s.unreachable(r, nodes)
		var cs []volume.Condition
		if why == "" {
			var err error
			if cs, err = s.agents.Conditions(ctx, r.Node, r, v.ID); err != nil {
				why = fmt.Sprintf("node %s does not answer: %v", r.Node, err)
				safe = "see that ballastd runs there; the volume comes back with it"
			}
		}
		if why != "" {
			lost++
			cs = []volume.Condition{{Severity: volume.Degraded, Reason: "NodeNotReporting", Message: why + "; " + safe}}
		}
		for _, c := range cs {
			if !slices.Contains(out, c) {
				out = append(out, c)
			}
		}
	}
	for i := range out {
		if lost == len(v.Replicas) && out[i].Severity == volume.Degraded {
			out[i].Severity = volume.Inaccessible
		}
	}
	return out
}

// unreachable says why nothing can be known of a replica, and the safe way out; "" where it can.
func (s *Service) unreachable(r volume.Replica, nodes []volume.Node) (why, safe string) {
	i := slices.IndexFunc(nodes, func(n volume.Node) bool { return n.ID == r.Node })
	if i < 0 {
		return fmt.Sprintf("node %s, which had replica %s, is not known any more", r.Node, r.ID),
			fmt.Sprintf("connect the disk of pool %s to a node that runs ballastd; it brings the replica along", r.Pool)
	}
	if silent := s.silence(nodes[i]); silent > s.o.NodeTimeout {
		return fmt.Sprintf("node %s has not reported for %s", r.Node, silent.Round(time.Second)),
			"see that the host is up and ballastd runs there; the volume comes back with it, nothing is to be deleted"
	}
	j := slices.IndexFunc(nodes[i].Pools, func(p volume.Pool) bool { return p.ID == r.Pool })
	if j < 0 || nodes[i].Pools[j].Capacity == 0 {
		return fmt.Sprintf("pool %s of node %s is offline", r.Pool, r.Node),
			"connect its disk again and restart ballastd there; the replica is on it"
	}
	return "", ""
}

// Why says in one paragraph why a volume is not usable, if so, and what to do safely. It finds volumes that are being
// deleted too.
func (s *Service) Why(ctx context.Context, id volume.ID) (string, error) {
	v, err := s.store.Volume(ctx, id)
	if err != nil {
		return "", err
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return "", err
	}
	var say []string
	add := func(format string, a ...any) { say = append(say, fmt.Sprintf(format, a...)) }
	switch v.State {
	case volume.Creating:
		add("Volume %s (%q) has been in the making for %s: its space is reserved on %s and its bytes are not there yet.",
			v.ID, v.Name, s.age(v.CreatedAt), whereOf(v))
		s.explainNodes(v, nodes, add)
		add("Repeat the create, or wait: it is also taken up in the background. Deleting the volume gives the reservation back.")
	case volume.Deleting:
		add("Volume %s (%q) is deleted: nothing can use it and its name is free. Its space on %s is not freed yet.", v.ID, v.Name, whereOf(v))
		s.explainNodes(v, nodes, add)
		add("Nothing is to be done: it is freed when the node answers. Its snapshots stay until they are deleted themselves.")
	default:
		s.whyReady(ctx, v, nodes, add)
	}
	return strings.Join(say, " "), nil
}

func (s *Service) whyReady(ctx context.Context, v volume.Volume, nodes []volume.Node, add func(string, ...any)) {
	cs := s.conditions(ctx, v, nodes)
	for _, c := range cs {
		add("Volume %s (%q) is %s (%s): %s.", v.ID, v.Name, strings.ToLower(string(c.Severity)), c.Reason, strings.TrimSuffix(c.Message, "."))
	}
	if len(cs) == 0 {
		add("Volume %s (%q) is usable: ready, on %s.", v.ID, v.Name, whereOf(v))
	}
	switch a := v.Attachment; {
	case a == nil:
		add("It is not attached; any node that can reach %s may attach it.", whereOf(v))
	case a.Detaching:
		add("It is being detached from node %s: that node must first prove that it writes no more. If it hangs, see that ballastd runs there; "+
			"never attach the volume's data elsewhere by hand meanwhile.", a.Node)
	default:
		add("It is attached to node %s for %s, so another node cannot have it: end the workload there, or detach it there first.", a.Node, s.age(a.Since))
	}
	if v.Target != 0 {
		add("It is being expanded from %d to %d bytes; repeat the expand or wait, it is also taken up in the background.", v.Size, v.Target)
	}
	if v.Filesystem.Phase == volume.Formatting {
		add("Making its %s filesystem was begun and not ended; the next stage makes it anew, there is nothing on it yet.", v.Filesystem.Type)
	}
	if quotas, err := s.store.Quotas(ctx); err == nil {
		for _, q := range quotas {
			if q.Tenant == v.Tenant && q.Limit.PhysicalBytes > 0 && q.Used.PhysicalBytes >= q.Limit.PhysicalBytes {
				add("Tenant %s uses %d of %d physical bytes: it can write, but creates, snapshots and expands are refused until data or snapshots are deleted or the quota is raised.",
					q.Tenant, q.Used.PhysicalBytes, q.Limit.PhysicalBytes)
			}
		}
	}
}

func (s *Service) explainNodes(v volume.Volume, nodes []volume.Node, add func(string, ...any)) {
	for _, r := range v.Replicas {
		if why, safe := s.unreachable(r, nodes); why != "" {
			add("The cause: %s; %s.", why, safe)
		}
	}
}

func (s *Service) age(since volume.Timestamp) time.Duration {
	return max(0, s.o.Now().Sub(time.Unix(0, int64(since)))).Round(time.Second)
}

func whereOf(v volume.Volume) string {
	var on []string
	for _, r := range v.Replicas {
		on = append(on, fmt.Sprintf("node %s (pool %s)", r.Node, r.Pool))
	}
	return strings.Join(on, ", ")
}
