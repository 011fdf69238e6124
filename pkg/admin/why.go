package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// silentAfter is how long a node may be silent before it is called away. Nodes report several times a minute.
const silentAfter = 2 * time.Minute

// Why implements adminpb.AdminServer.
func (s *Service) Why(ctx context.Context, r *adminpb.WhyRequest) (*adminpb.WhyReply, error) {
	brief, cancel := context.WithTimeout(ctx, stateWait)
	defer cancel()
	text, err := s.why(brief, r.Kind, r.Ref)
	if unread := errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded); unread && ctx.Err() == nil && s.o.Cluster != nil {
		text, err = s.whyUnreadable(ctx, err)
	}
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
		return s.o.Control.Why(ctx, v.ID)
	case adminpb.Kind_SNAPSHOT:
		sn, err := s.resolveSnapshot(ctx, ref)
		if err != nil {
			return "", err
		}
		return s.o.Control.WhySnapshot(ctx, sn.ID)
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
		return s.whyNodeInFull(ctx, n)
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

// whyUnreadable is said where the state cannot be read: of whatever was asked, that is what there is to say.
func (s *Service) whyUnreadable(ctx context.Context, cause error) (string, error) {
	v, err := s.votes(ctx)
	if err != nil || v.majority() {
		return "", cause
	}
	return fmt.Sprintf("That cannot be told: the controllers have no majority. Now %s. Volumes whose replicas are all well go on; "+
		"where a replica fails I/O waits, nothing can be created, attached or changed, and nothing is lost. Next: %s.", v, v.next()), nil
}

// votes are how many of the controllers answer just now.
type votes struct {
	voters int
	away   []string
}

func (s *Service) votes(ctx context.Context) (votes, error) {
	cs, err := s.o.Cluster.Controllers(ctx)
	if err != nil {
		return votes{}, err
	}
	var v votes
	for _, c := range cs {
		if c.Voter {
			v.voters++
			if !c.Answers {
				v.away = append(v.away, string(c.ID))
			}
		}
	}
	slices.Sort(v.away)
	return v, ctx.Err() // nobody has answered one that has gone
}

// needed is how many must answer.
func (v votes) needed() int { return v.voters/2 + 1 }

func (v votes) majority() bool { return v.voters-len(v.away) >= v.needed() }

func (v votes) String() string {
	return fmt.Sprintf("%d of %d controllers answer, %d must (not %s)", v.voters-len(v.away), v.voters, v.needed(), strings.Join(v.away, ", "))
}

// next says what to do where there is no majority.
func (v votes) next() string {
	return fmt.Sprintf("bring %d of these controllers back with the disks that they had: see that the host is up, its network too, and ballastd runs there",
		v.needed()-(v.voters-len(v.away)))
}

// whyNodeInFull adds what else concerns a node's admin.
func (s *Service) whyNodeInFull(ctx context.Context, n volume.Node) (string, error) {
	text := whyNode(n, s.o.Now())
	strays, err := s.o.Control.Strays(ctx)
	if err != nil {
		return "", err
	}
	count := 0
	for _, x := range strays {
		if x.Node == n.ID {
			count++
		}
	}
	if count > 0 {
		text += fmt.Sprintf(" %s there in no record: quarantined, kept, served to nobody and never deleted by themselves, since the records may be what is wrong. "+
			"`ballastctl pool strays` lists them and says how to look at one.", isOrAre(count, "replica or snapshot", "replicas or snapshots"))
	}
	if s.o.Cluster == nil || s.silent(n) || n.State != volume.NodeActive {
		return text, nil
	}
	blockers, err := s.o.Control.DrainBlockers(ctx, n.ID)
	if err != nil || len(blockers) == 0 {
		return text, err
	}
	return text + fmt.Sprintf(" It must stay up just now: stopping it would make %s wait, so `ballastctl node drain %s` is refused. "+
		"`ballastctl node drain %s --wait` drains it as soon as other replicas are in sync and hold the snapshots; a volume with one replica needs a second (`ballastctl volume set VOLUME --replicas 2`).",
		s.blocking(ctx, blockers), n.ID, n.ID), nil
}

func (s *Service) blocking(ctx context.Context, bs []placement.Blocker) string {
	var vs, ss []string
	for _, b := range bs {
		if b.Snapshot != "" {
			name := string(b.Snapshot)
			if len(ss) < aFew {
				if x, err := s.o.Control.Snapshot(ctx, b.Snapshot); err == nil {
					name = x.Name
				}
			}
			ss = append(ss, name)
			continue
		}
		name := string(b.Volume)
		if len(vs) < aFew {
			if v, err := s.o.Control.Volume(ctx, b.Volume); err == nil {
				name = v.Name
			}
		}
		vs = append(vs, name)
	}
	var out []string
	if len(vs) > 0 {
		out = append(out, fmt.Sprintf("%s (%s)", countOf("volume", vs), firstOf(vs)))
	}
	if len(ss) > 0 {
		out = append(out, fmt.Sprintf("what needs %s (%s)", countOf("snapshot", ss), firstOf(ss)))
	}
	return strings.Join(out, " and ")
}

func isOrAre(n int, one, several string) string {
	if n == 1 {
		return "1 " + one + " is"
	}
	return fmt.Sprintf("%d %s are", n, several)
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

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
		text := fmt.Sprintf("Node %s was last heard of at %s, %s ago, so the replicas on it count as away: volumes that have others in sync go on with them, and what is attached to it can be attached elsewhere once its orchestrator takes it away. See that the host is up and its network too, look at the service's log there (journalctl -u ballastd) and start it. Its replicas then catch up by themselves; nothing is to be deleted.", n.ID, seen.UTC().Format(time.RFC3339), ago.Round(time.Second))
		switch n.State {
		case volume.NodeDrained:
			text += fmt.Sprintf(" It was drained before, because an admin asked for it: when it is back, `ballastctl node undrain %s`.", n.ID)
		case volume.NodeEmptying:
			text += " It is being emptied, because an admin asked for it: its replicas are made anew on other nodes meanwhile."
		}
		return text
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
	var full, offline, failed []string
	for _, p := range n.Pools {
		switch {
		case p.Capacity == 0:
			offline = append(offline, p.Name)
		case p.Failed:
			failed = append(failed, p.Name)
		case p.Full():
			full = append(full, p.Name)
		}
	}
	if len(offline) > 0 {
		return fmt.Sprintf("Node %s is there, but the disk of %s is not. For the way out: `ballastctl pool why %s/%s`.", n.ID, poolsText(offline), n.ID, offline[0])
	}
	if len(failed) > 0 {
		return fmt.Sprintf("Node %s is there, but an error of its disk has stopped %s. For the way out: `ballastctl pool why %s/%s`.", n.ID, poolsText(failed), n.ID, failed[0])
	}
	if len(full) > 0 {
		return fmt.Sprintf("Node %s is there, but writes wait for room in %s. For the way out: `ballastctl pool why %s/%s`.", n.ID, poolsText(full), n.ID, full[0])
	}
	var names []string
	for _, p := range n.Pools {
		names = append(names, p.Name)
	}
	return fmt.Sprintf("Node %s is there and can be used: there is room in %s.", n.ID, poolsText(names))
}

func poolsText(names []string) string {
	if len(names) == 1 {
		return "its pool " + names[0]
	}
	return "its pools " + strings.Join(names, ", ")
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
	case p.Failed:
		return fmt.Sprintf("Pool %s has stopped writing after an error of its disk. Volumes with copies elsewhere go on, and get others in its stead if it stays so. See to the disk (`dmesg`) and restart ballastd on node %s; what was flushed is kept.", p.Name, p.Node)
	case p.Full():
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
