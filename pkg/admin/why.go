package admin

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// silentAfter is how long a node may be silent before it is called away. Nodes report several times a minute.
const silentAfter = 2 * time.Minute

// Why implements adminpb.AdminServer.
func (s *Service) Why(ctx context.Context, r *adminpb.WhyRequest) (*adminpb.WhyReply, error) {
	text, err := s.why(ctx, r.Kind, r.Ref)
	if err != nil {
		return nil, err
	}
	return &adminpb.WhyReply{Text: text}, nil
}

func (s *Service) why(ctx context.Context, kind adminpb.Kind, ref string) (string, error) {
	switch kind {
	case adminpb.Kind_VOLUME:
		v, err := s.resolveVolume(ctx, ref)
		if err != nil {
			return "", err
		}
		text, err := s.o.Control.Why(ctx, v.ID)
		if err != nil {
			return "", err
		}
		return strings.TrimSpace(text + " " + whyEngine(v, s.engine(ctx, v, true))), nil
	case adminpb.Kind_SNAPSHOT:
		sn, err := s.resolveSnapshot(ctx, ref)
		if err != nil {
			return "", err
		}
		name, err := s.volumeName(ctx, sn.Volume)
		if err != nil {
			return "", err
		}
		return whySnapshot(sn, name), nil
	case adminpb.Kind_POOL:
		p, n, err := s.pool(ctx, ref)
		if err != nil {
			return "", err
		}
		return whyPool(p, n, s.o.Now()), nil
	case adminpb.Kind_NODE:
		n, err := s.node(ctx, ref)
		if err != nil {
			return "", err
		}
		return whyNode(n, s.o.Now()), nil
	case adminpb.Kind_GROUP:
		g, err := s.group(ctx, ref)
		if err != nil {
			return "", err
		}
		return whyGroup(g), nil
	case adminpb.Kind_QUOTA:
		q, found, err := s.quota(ctx, ref)
		if err != nil {
			return "", err
		}
		if !found {
			return fmt.Sprintf("Tenant %s has neither a quota nor a volume: nothing limits it but the pools.", ref), nil
		}
		return whyQuota(q), nil
	}
	return "", fmt.Errorf("kind %v is unknown: %w", kind, volume.ErrInvalid)
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// whyEngine says what the engine of a volume is doing, where that is more than serving it.
func whyEngine(v volume.Volume, e *volume.EngineReport) string {
	if e == nil {
		return ""
	}
	var say []string
	switch e.Phase {
	case "fencing":
		say = append(say, fmt.Sprintf("Its engine on node %s is making sure that no earlier one can serve it any more: seconds, once a replica that is in sync answers.", v.Owner))
	case "committing", "marking":
		say = append(say, fmt.Sprintf("Its engine on node %s is starting: it agrees with the controllers and the replicas on who is in sync.", v.Owner))
	}
	if e.Waiting > 0 {
		say = append(say, fmt.Sprintf("%d requests of the workload are not answered yet.", e.Waiting))
	}
	if e.Dirty > 0 {
		say = append(say, fmt.Sprintf("%s that were being written when the engine before it ended are compared among the replicas; they can be used meanwhile.", bytesText(e.Dirty)))
	}
	for _, r := range e.Resyncs {
		text := fmt.Sprintf("Replica %s is being brought up: %s are done, %s are left", r.Replica, bytesText(r.Done), bytesText(r.Left))
		if r.Rate > 0 {
			text += fmt.Sprintf(", at %s/s", bytesText(r.Rate))
			if seconds := r.Left / r.Rate; seconds < 1e6 { // more is no forecast
				text += fmt.Sprintf(" about %s more", time.Duration(seconds)*time.Second)
			}
		}
		if r.Snapshots > 0 {
			text += fmt.Sprintf(", and %d snapshots", r.Snapshots)
		}
		say = append(say, text+".")
	}
	return strings.Join(say, " ")
}

func whySnapshot(s volume.Snapshot, volumeName string) string {
	source := "its volume is deleted, which does not affect it"
	if volumeName != "" {
		source = "its volume " + volumeName + " still exists"
	}
	switch s.State {
	case volume.Creating:
		return fmt.Sprintf("Snapshot %s is being cut. It becomes ready when a holder has made it durable; where the daemon restarted meanwhile, the same request made again finishes it.", s.Name)
	case volume.Deleting:
		return fmt.Sprintf("Snapshot %s is being deleted. Its space is freed in the background; nothing needs to be done.", s.Name)
	}
	return fmt.Sprintf("Snapshot %s is ready: %s, held by %d pool(s); %s. Volumes can be made from it.", s.Name, bytesText(s.Size), len(s.Holders), source)
}

func whyGroup(g control.Group) string {
	switch g.State {
	case volume.Creating:
		return fmt.Sprintf("Group %s is being cut: the writes of its %d volumes are held until all of them are. What is not finished is undone by itself; the same request made again begins anew.", g.Name, len(g.Volumes))
	case volume.Deleting:
		return fmt.Sprintf("Group %s is being deleted with its %d snapshots. Their space is freed in the background, on nodes that are away when they return; nothing needs to be done.", g.Name, len(g.Members))
	}
	return fmt.Sprintf("Group %s is ready: %d snapshots of one instant. Volumes can be made from each of them; they are deleted together only.", g.Name, len(g.Members))
}

func whyNode(n volume.Node, now time.Time) string {
	seen := time.Unix(0, int64(n.LastSeen))
	if ago := now.Sub(seen); ago > silentAfter {
		return fmt.Sprintf("Node %s was last heard of at %s, %s ago, so the replicas on it count as away: volumes that have others in sync go on with them, and what is attached to it can be attached elsewhere once its orchestrator takes it away. See that the host is up and its network too, look at the service's log there (journalctl -u ballastd) and start it. Its replicas then catch up by themselves; nothing is to be deleted.", n.ID, seen.UTC().Format(time.RFC3339), ago.Round(time.Second))
	}
	switch n.State {
	case volume.NodeDrained:
		return fmt.Sprintf("Node %s is drained, because an admin asked for it: nothing is placed on it, and it may be stopped, since every volume has enough copies in sync elsewhere. `ballastctl node undrain %s` takes that back.", n.ID, n.ID)
	case volume.NodeEmptying:
		return fmt.Sprintf("Node %s is being emptied, because an admin asked for it: nothing is placed on it and its replicas move to other nodes in the background. `ballastctl node watch %s` shows what is left, `ballastctl node remove %s` ends its membership then, and `ballastctl node undrain %s` takes it back.", n.ID, n.ID, n.ID, n.ID)
	}
	if len(n.Pools) == 0 {
		return fmt.Sprintf("Node %s is there but has no pool, so no volume can be placed on it. Give it one with ballastd's --pool.", n.ID)
	}
	var full, offline []string
	for _, p := range n.Pools {
		switch {
		case p.Capacity == 0:
			offline = append(offline, p.Name)
		case p.Used >= p.Capacity:
			full = append(full, p.Name)
		}
	}
	if len(offline) > 0 {
		return fmt.Sprintf("Node %s is there, but the disk of its pool(s) %s is not. See `ballastctl pool why` for the way out.", n.ID, strings.Join(offline, ", "))
	}
	if len(full) > 0 {
		return fmt.Sprintf("Node %s is there, but writes wait in its full pool(s) %s. See `ballastctl pool why` for the way out.", n.ID, strings.Join(full, ", "))
	}
	return fmt.Sprintf("Node %s is there and can be used: %d pool(s), none of them full.", n.ID, len(n.Pools))
}

func whyPool(p volume.Pool, n volume.Node, now time.Time) string {
	if ago := now.Sub(time.Unix(0, int64(n.LastSeen))); ago > silentAfter {
		return fmt.Sprintf("Pool %s cannot be used because its node does not answer. %s", p.Name, whyNode(n, now))
	}
	room := fmt.Sprintf("%s of %s are used, %s of at most %s are provisioned", bytesText(p.Used), bytesText(p.Capacity),
		bytesText(p.Provisioned), bytesText(int64(float64(p.Capacity)*p.OverProvision)))
	switch {
	case p.Capacity == 0:
		return fmt.Sprintf("Pool %s is offline: its disk was not there when ballastd started on node %s, and what is on it cannot be used. Connect the disk again and restart ballastd there; what was flushed is kept. Only where the disk is gone for good: `ballastctl pool forget %s`.", p.Name, p.Node, p.ID)
	case p.Used >= p.Capacity:
		return fmt.Sprintf("Pool %s is full (%s): writes to its volumes wait, none is lost. Free space by deleting snapshots or volumes (both still work), or discard within filesystems (fstrim), or give the pool more capacity and restart ballastd; the writes then go on by themselves.", p.Name, room)
	case p.Free() < volume.MinSize:
		return fmt.Sprintf("Pool %s takes no new volumes (%s): what is provisioned reached capacity times over-provisioning. Delete volumes, or raise the pool's capacity or over-provisioning and restart ballastd. Existing volumes are not affected.", p.Name, room)
	case float64(p.Used) >= 0.9*float64(p.Capacity):
		return fmt.Sprintf("Pool %s can be used but is nearly full (%s). When it is full, writes wait. Delete snapshots or volumes, or give it more capacity in time.", p.Name, room)
	}
	return fmt.Sprintf("Pool %s can be used: %s; a volume of up to %s fits.", p.Name, room, bytesText(p.Free()))
}

func whyQuota(q volume.Quota) string {
	var reached, limited []string
	for _, f := range []struct {
		what        string
		limit, used int64
		text        func(int64) string
	}{
		{"logical bytes", q.Limit.LogicalBytes, q.Used.LogicalBytes, bytesText},
		{"physical bytes", q.Limit.PhysicalBytes, q.Used.PhysicalBytes, bytesText},
		{"volumes", q.Limit.Volumes, q.Used.Volumes, func(n int64) string { return fmt.Sprint(n) }},
		{"snapshots", q.Limit.Snapshots, q.Used.Snapshots, func(n int64) string { return fmt.Sprint(n) }},
	} {
		if f.limit == 0 {
			continue
		}
		t := fmt.Sprintf("%s of %s %s", f.text(f.used), f.text(f.limit), f.what)
		limited = append(limited, t)
		if f.used >= f.limit {
			reached = append(reached, t)
		}
	}
	switch {
	case len(limited) == 0:
		return fmt.Sprintf("Tenant %s has no limits: nothing but the pools restricts it.", q.Tenant)
	case len(reached) > 0:
		return fmt.Sprintf("Tenant %s has reached its quota: %s. What would need more is refused. Delete some of its volumes or snapshots, or raise the limit with `ballastctl quota set %s`.", q.Tenant, strings.Join(reached, ", "), q.Tenant)
	}
	return fmt.Sprintf("Tenant %s is within its quota: %s.", q.Tenant, strings.Join(limited, ", "))
}
