package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
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
	return Health{Volume: id, Conditions: s.asking().conditions(ctx, v, nodes)}, nil
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
	const batch = 256
	asker := s.asking()
	for {
		vs, next, err := s.Volumes(ctx, Page{Max: batch, Token: p.Token, All: p.All})
		if err != nil {
			return nil, "", err
		}
		for i, cs := range asker.all(ctx, vs, nodes) {
			if len(cs) == 0 {
				continue
			}
			if p.Max > 0 && len(out) == p.Max {
				return out, string(out[len(out)-1].Volume), nil
			}
			out = append(out, Health{Volume: vs[i].ID, Conditions: cs})
		}
		if err := ctx.Err(); err != nil {
			return nil, "", err
		}
		if next == "" {
			return out, "", nil
		}
		p.Token = next
	}
}

// asker asks nodes how volumes are. One that does not answer is not asked again.
type asker struct {
	*Service
	mu   sync.Mutex
	down map[volume.NodeID]error
}

func (s *Service) asking() *asker { return &asker{Service: s, down: map[volume.NodeID]error{}} }

func (s *asker) ask(ctx context.Context, r volume.Replica, id volume.ID) ([]volume.Condition, error) {
	s.mu.Lock()
	err := s.down[r.Node]
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	cs, err := s.agents.Conditions(limit, r.Node, r, id)
	if err != nil && (limit.Err() != nil || errors.Is(err, volume.ErrUnavailable)) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.down[r.Node] = err
	}
	return cs, err
}

// all asks of many volumes, of some at once.
func (s *asker) all(ctx context.Context, vs []volume.Volume, nodes []volume.Node) [][]volume.Condition {
	out := make([][]volume.Condition, len(vs))
	room := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for i, v := range vs {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			if ctx.Err() == nil {
				out[i] = s.conditions(ctx, v, nodes)
			}
		})
	}
	wg.Wait()
	return out
}

// conditions asks the nodes of a Ready volume and adds what only the controllers see.
func (s *asker) conditions(ctx context.Context, v volume.Volume, nodes []volume.Node) []volume.Condition {
	if v.State != volume.Ready {
		return nil
	}
	if v.Lost {
		return []volume.Condition{{Severity: volume.DataLoss, Reason: "EveryCopyForgotten",
			Message: "every copy was on pools that were forgotten; delete the volume, and restore a snapshot of it as another if one is held elsewhere"}}
	}
	var out []volume.Condition
	add := func(c volume.Condition) {
		if !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	left, away := 0, []awayReplica{}
	asked := false // the owner's engine
	elsewhere := map[volume.ReplicaID][]volume.Condition{}
	for _, r := range v.Replicas {
		why, safe := s.unreachable(r, nodes)
		if why == "" {
			cs, err := s.ask(ctx, r, v.ID)
			if asked = asked || err == nil && r.Node == v.Owner; r.Node == v.Owner {
				for _, c := range cs {
					add(c)
				}
			} else {
				elsewhere[r.ID] = cs
			}
			if err != nil {
				why = fmt.Sprintf("node %s does not answer: %v", r.Node, err)
				safe = "see that ballastd runs there"
			}
		}
		if why != "" {
			away = append(away, awayReplica{r, why, safe})
		} else if r.Role == volume.InSync {
			left++
		}
	}
	bad := func(c volume.Condition) bool { return c.Severity == volume.Inaccessible }
	fit := left - len(slices.DeleteFunc(v.InSync(), func(r volume.Replica) bool { return !slices.ContainsFunc(elsewhere[r.ID], bad) }))
	for _, r := range v.Replicas {
		for _, c := range elsewhere[r.ID] {
			if bad(c) && fit > 0 { // what is wrong there concerns that replica only
				c.Severity = volume.Degraded
			}
			add(c)
		}
	}
	if v.Owner != "" && !asked {
		if why := s.silentOwner(v, nodes); why != "" {
			add(volume.Condition{Severity: volume.Inaccessible, Reason: "OwnerNotReporting", Message: why})
		} else if cs, err := s.ask(ctx, volume.Replica{Node: v.Owner}, v.ID); err == nil {
			for _, c := range cs {
				add(c)
			}
		}
	}
	for _, c := range s.replicaConditions(v, left, away) {
		add(c)
	}
	for i := range out {
		if left == 0 && out[i].Severity == volume.Degraded {
			out[i].Severity = volume.Inaccessible
		}
	}
	return out
}

type awayReplica struct {
	volume.Replica
	why, safe string
}

// replicaConditions is what the record says of a volume's copies, left of which are in sync and answer.
func (s *Service) replicaConditions(v volume.Volume, left int, away []awayReplica) (out []volume.Condition) {
	add := func(reason, format string, a ...any) {
		out = append(out, volume.Condition{Severity: volume.Degraded, Reason: reason, Message: fmt.Sprintf(format, a...)})
	}
	for _, r := range away {
		switch {
		case left == 0 && r.Role == volume.InSync:
			add("NodeNotReporting", "%s; %s; the volume comes back with it, nothing is to be deleted", r.why, r.safe)
		case left == 0:
			add("NodeNotReporting", "%s; %s; its replica %s is %s and cannot serve the volume by itself", r.why, r.safe, r.ID, r.Role)
		default:
			add("NodeNotReporting", "%s, so replica %s is not written; I/O goes on with the %d in sync elsewhere; %s: it is brought up when it returns, and replaced on another node if it stays away",
				r.why, r.ID, left, r.safe)
		}
	}
	for _, r := range v.Replicas {
		switch here := !slices.ContainsFunc(away, func(a awayReplica) bool { return a.ID == r.ID }); {
		case !here:
		case r.Role == volume.Stale:
			add("ReplicaBehind", "replica %s on node %s was away and is being brought up; I/O goes on with the %d in sync; nothing is to be done", r.ID, r.Node, left)
		case r.Role == volume.Filling:
			add("ReplicaFilling", "replica %s on node %s is being filled; I/O goes on with the %d in sync; nothing is to be done", r.ID, r.Node, left)
		}
	}
	if n := v.Parameters.MinInSync; left > 0 && left < n {
		out = append(out, volume.Condition{Severity: volume.Inaccessible, Reason: "TooFewInSync", Message: fmt.Sprintf(
			"%d replicas are in sync and minInSync is %d: writes wait, none is lost; bring the others back, or lower minInSync if fewer copies will do", left, n)})
	}
	if n := v.Parameters.Replicas; len(v.Replicas) < n {
		add("ReplicaMissing", "%d of %d replicas are there; another is placed as soon as a node has room for %d bytes: see that nodes are up and pools have room", len(v.Replicas), n, v.Size)
	}
	return out
}

// silentOwner says that the node to which a volume is attached cannot be asked; "" where it can.
func (s *Service) silentOwner(v volume.Volume, nodes []volume.Node) string {
	safe := "when its workload runs nowhere else it may go on by itself; to use the volume on another node detach it: that fences it first"
	i := slices.IndexFunc(nodes, func(n volume.Node) bool { return n.ID == v.Owner })
	if i < 0 {
		return fmt.Sprintf("node %s, to which it is attached, is not known any more; %s", v.Owner, safe)
	}
	if silent := s.silence(nodes[i]); silent > s.o.NodeTimeout {
		return fmt.Sprintf("node %s, to which it is attached, has not reported for %s; %s", v.Owner, silent.Round(time.Second), safe)
	}
	return ""
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
			"see that the host is up and ballastd runs there"
	}
	j := slices.IndexFunc(nodes[i].Pools, func(p volume.Pool) bool { return p.ID == r.Pool })
	if j < 0 || nodes[i].Pools[j].Capacity == 0 {
		return fmt.Sprintf("pool %s of node %s is offline", r.Pool, r.Node),
			"connect its disk again and restart ballastd there (the replica is on it)"
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
	cs := s.asking().conditions(ctx, v, nodes)
	for _, c := range cs {
		add("Volume %s (%q) is %s (%s): %s.", v.ID, v.Name, strings.ToLower(string(c.Severity)), c.Reason, strings.TrimSuffix(c.Message, "."))
	}
	if len(cs) == 0 {
		add("Volume %s (%q) is usable: ready, on %s.", v.ID, v.Name, whereOf(v))
	}
	stranded := !slices.ContainsFunc(v.InSync(), func(r volume.Replica) bool { why, _ := s.unreachable(r, nodes); return why == "" })
	if stranded && len(v.Replicas) > 1 {
		add("No replica that is in sync can be reached: only those have every write that was acknowledged. Bring back one of %s. "+
			"If all of them are lost for good, a salvage makes what another replica has the volume, and loses what that one lacks.", names(v.InSync()))
	}
	if b := v.Barrier; b != nil {
		add("Snapshot %s of it is being cut: its writes are held for a second at most.", b.Snapshot)
	}
	for _, r := range v.Leaving {
		add("Replica %s on node %s is none any more; it is freed when the node answers.", r.ID, r.Node)
	}
	switch a := v.Attachment; {
	case a == nil && v.Owner != "":
		add("It is not attached; node %s looks after its replicas, and gives it up to whichever node attaches it.", v.Owner)
	case a == nil:
		add("It is not attached; %s.", reachableFrom(v))
	case stranded && s.judge(nodes).gone(a.Node):
		add("%s", wayOut(v))
	case a.Detaching && v.Owner == "":
		add("It is being taken from node %s, which does not answer: its replicas refuse that node already, and it can be attached elsewhere when the lease of its reads is over, in seconds.", a.Node)
	case a.Detaching:
		add("It is being detached from node %s: that node must first prove that it writes no more, or else a replica that is in sync must refuse what it writes. "+
			"If neither comes about, see that ballastd runs there; never attach the volume's data elsewhere by hand meanwhile.", a.Node)
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

// wayOut says how an attachment ends whose node is silent, and with it every replica that is in sync.
func wayOut(v volume.Volume) string {
	give := "delete the volume (detach it first, which begins and cannot end, and then does not hold the delete up), or forget its pool if the disk is gone"
	if len(v.Replicas) > 1 {
		give = "make sure that the node is off and salvage the volume from another replica: that ends the attachment; or " + give
	}
	return fmt.Sprintf("It is attached to node %s, which is silent, and nobody can make it stop writing: every replica that is in sync is silent too. "+
		"When that node or one of these replicas is back, it can be detached, and nothing is lost. If none of them comes back: %s.", v.Attachment.Node, give)
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

func names(rs []volume.Replica) string {
	var on []string
	for _, r := range rs {
		on = append(on, fmt.Sprintf("%s on node %s", r.ID, r.Node))
	}
	return strings.Join(on, ", ")
}

func reachableFrom(v volume.Volume) string {
	if v.Parameters.DataLocality == volume.LocalityRequired {
		return "its data locality is required, so it can be attached to " + whereOf(v)
	}
	return "any node may attach it"
}

func whereOf(v volume.Volume) string {
	var on []string
	for _, r := range v.Replicas {
		on = append(on, fmt.Sprintf("node %s (pool %s)", r.Node, r.Pool))
	}
	return strings.Join(on, ", ")
}
