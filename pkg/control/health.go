package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Reasons of the conditions that the controllers find themselves.
const (
	condForgotten = "EveryCopyForgotten"
	condAway      = "NodeNotReporting"
	condOwner     = "OwnerNotReporting"
	condBehind    = "ReplicaBehind"
	condFilling   = "ReplicaFilling"
	condTooFew    = "TooFewInSync"
	condFewer     = "TooFewReplicas"
)

// Health returns what is wrong with a volume; no condition is healthy.
func (s *Service) Health(ctx context.Context, id volume.ID) (Health, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return Health{}, err
	}
	o, err := s.observer(ctx)
	if err != nil {
		return Health{}, err
	}
	x := o.look(ctx, []volume.Volume{v})[0]
	return x.health(), ctx.Err()
}

// Unhealthy lists the volumes with conditions in order of id, and the token of the next page or "".
func (s *Service) Unhealthy(ctx context.Context, p Page) ([]Health, string, error) {
	return s.healths(ctx, p, func(h Health) bool { return len(h.Conditions) > 0 })
}

// Healths lists how every volume is, likewise.
func (s *Service) Healths(ctx context.Context, p Page) ([]Health, string, error) {
	return s.healths(ctx, p, func(Health) bool { return true })
}

func (s *Service) healths(ctx context.Context, p Page, wanted func(Health) bool) ([]Health, string, error) {
	if p.Max < 0 {
		return nil, "", fmt.Errorf("page of %d entries: %w", p.Max, volume.ErrInvalid)
	}
	o, err := s.observer(ctx)
	if err != nil {
		return nil, "", err
	}
	out := []Health{}
	const batch = 1024
	for {
		vs, next, err := s.Volumes(ctx, Page{Max: batch, Token: p.Token, All: p.All})
		if err != nil {
			return nil, "", err
		}
		seen := o.look(ctx, vs)
		if err := ctx.Err(); err != nil {
			return nil, "", err
		}
		for _, x := range seen {
			h := x.health()
			if !wanted(h) {
				continue
			}
			if p.Max > 0 && len(out) == p.Max {
				return out, string(out[len(out)-1].Volume), nil
			}
			out = append(out, h)
		}
		if next == "" {
			return out, "", nil
		}
		p.Token = next
	}
}

// conditions are what the nodes say of a Ready volume, and what only the controllers see; each once.
func (x sight) conditions() []volume.Condition {
	if x.State != volume.Ready {
		return nil
	}
	if x.Lost {
		return []volume.Condition{{Severity: volume.DataLoss, Reason: condForgotten,
			Message: "every copy was on pools that were forgotten; delete the volume, and restore a snapshot of it as another if one is held elsewhere"}}
	}
	var out []volume.Condition
	add := func(c volume.Condition) {
		if !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	bad := func(c volume.Condition) bool { return c.Severity == volume.Inaccessible }
	lossy := func(c volume.Condition) bool { return c.Severity == volume.DataLoss }
	fit, sound := 0, 0 // in sync, and nothing is wrong there; and no byte is bad
	for _, r := range x.InSync() {
		if !x.isAway(r.ID) && !slices.ContainsFunc(x.seen[r.Node].Replica, bad) {
			fit++
			if !slices.ContainsFunc(x.seen[r.Node].Replica, lossy) {
				sound++
			}
		}
	}
	for _, c := range x.seen[x.Owner].Device {
		if !x.saysTheRecord(c) {
			add(c)
		}
	}
	for _, r := range x.Replicas {
		for _, c := range x.seen[r.Node].Replica {
			if bad(c) && fit > 0 { // what is wrong there concerns that replica only
				c.Severity = volume.Degraded
			}
			if lossy(c) && sound > 0 && r.Role == volume.InSync {
				c.Severity = volume.Degraded
				c.Message = fmt.Sprintf("replica %s on node %s: %s. Nothing is lost: %d in sync are sound, they are read instead, and the replica is replaced by another",
					r.ID, r.Node, before(c.Message, ";"), sound)
			}
			add(c)
		}
	}
	if x.quietOwner != "" {
		add(volume.Condition{Severity: volume.Inaccessible, Reason: condOwner, Message: x.quietOwner + "; " + ownerSafe})
	}
	for _, c := range x.replicaConditions() {
		add(c)
	}
	for i := range out {
		if x.left == 0 && out[i].Severity == volume.Degraded {
			out[i].Severity = volume.Inaccessible
		}
	}
	return out
}

const ownerSafe = "when its workload runs nowhere else it may go on by itself; to use the volume on another node detach it: that fences it first"

// saysTheRecord tells whether the record says what an engine does, and says more.
func (x sight) saysTheRecord(c volume.Condition) bool {
	switch c.Reason {
	case replication.CondDegraded:
		return c.Severity == volume.Degraded
	case replication.CondMinInSync:
		return x.left < x.Parameters.MinInSync
	case replication.CondReplicaWaits:
		return slices.ContainsFunc(x.away, func(a awayReplica) bool { return strings.Contains(c.Message, string(a.ID)) })
	}
	return false
}

// replicaConditions is what the record says of a volume's copies.
func (x sight) replicaConditions() (out []volume.Condition) {
	v, left := x.Volume, x.left
	add := func(reason, format string, a ...any) {
		out = append(out, volume.Condition{Severity: volume.Degraded, Reason: reason, Message: fmt.Sprintf(format, a...)})
	}
	for _, r := range x.away {
		switch {
		case left == 0 && r.Role == volume.InSync:
			add(condAway, "%s; %s; the volume comes back with it, nothing is to be deleted", r.why, r.safe)
		case left == 0:
			add(condAway, "%s; %s; its replica %s is %s and cannot serve the volume by itself", r.why, r.safe, r.ID, r.Role)
		default:
			add(condAway, "%s, so replica %s is not written; I/O goes on with the %d in sync elsewhere; %s: it is brought up when it returns, and replaced on another node if it stays away",
				r.why, r.ID, left, r.safe)
		}
	}
	for _, r := range v.Replicas {
		switch {
		case x.isAway(r.ID):
		case r.Role == volume.Stale:
			add(condBehind, "replica %s on node %s was away and is being brought up; I/O goes on with the %d in sync; nothing is to be done", r.ID, r.Node, left)
		case r.Role == volume.Filling:
			add(condFilling, "replica %s on node %s is being filled; I/O goes on with the %d in sync; nothing is to be done", r.ID, r.Node, left)
		}
	}
	if n := v.Parameters.MinInSync; left > 0 && left < n {
		out = append(out, volume.Condition{Severity: volume.Inaccessible, Reason: condTooFew, Message: fmt.Sprintf(
			"%d replicas are in sync and minInSync is %d: writes wait, none is lost; bring the others back, or lower minInSync if fewer copies will do", left, n)})
	}
	if n := v.Parameters.Replicas; len(v.Replicas) < n {
		add(condFewer, "%d of %d replicas are there; another is placed as soon as a node has room for %d bytes: see that nodes are up and pools have room", len(v.Replicas), n, v.Size)
	}
	return out
}

// silentOwner says why the node to which a volume is attached cannot be asked; "" where it can.
func (s *Service) silentOwner(v volume.Volume, nodes []volume.Node) string {
	i := slices.IndexFunc(nodes, func(n volume.Node) bool { return n.ID == v.Owner })
	if i < 0 {
		return fmt.Sprintf("node %s, to which it is attached, is not known any more", v.Owner)
	}
	if silent := s.silence(nodes[i]); silent > s.o.NodeTimeout {
		return fmt.Sprintf("node %s, to which it is attached, has not reported for %s", v.Owner, silent.Round(time.Second))
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
