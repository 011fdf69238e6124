package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Why says in one paragraph how a volume is: the cause where it is not usable, what that means for its data, and the safe
// next step. It finds volumes that are being deleted too.
func (s *Service) Why(ctx context.Context, id volume.ID) (string, error) {
	v, err := s.store.Volume(ctx, id)
	if err == nil && v.Kept != "" {
		err = noVolume(id)
	}
	if err != nil {
		return "", err
	}
	o, err := s.observer(ctx)
	if err != nil {
		return "", err
	}
	x := o.look(ctx, []volume.Volume{v})[0]
	p := &paragraph{}
	switch v.State {
	case volume.Creating:
		p.says("Volume %s (%s) has been in the making for %s: its space is reserved on %s and its bytes are not there yet", v.Name, v.ID, s.age(v.CreatedAt), whereOf(v))
		s.nodesAway(p, v, o.nodes)
		p.does("repeat the create, or wait: it is also taken up in the background; deleting the volume gives the reservation back")
	case volume.Deleting:
		p.says("Volume %s (%s) is deleted: nothing can use it and its name is free. Its space on %s is not freed yet", v.Name, v.ID, whereOf(v))
		s.nodesAway(p, v, o.nodes)
		p.means("Its snapshots stay until they are deleted themselves")
		p.means("A node that is away frees its part when it returns, and nothing waits for that")
	default:
		s.whyReady(p, x)
		s.whyTenant(ctx, p, v)
		if len(p.next) == 0 && !p.open {
			p.means("Nothing needs to be done")
		}
	}
	return p.String(), ctx.Err()
}

// paragraph is built of causes, what they mean for the data, and steps that are safe. What was said once is not said again.
type paragraph struct {
	causes, meanings, next []string
	open                   bool // something may need to be done that nobody here can name
}

func (p *paragraph) says(format string, a ...any)  { once(&p.causes, fmt.Sprintf(format, a...)) }
func (p *paragraph) means(format string, a ...any) { once(&p.meanings, fmt.Sprintf(format, a...)) }
func (p *paragraph) does(format string, a ...any)  { once(&p.next, fmt.Sprintf(format, a...)) }

func once(list *[]string, text string) {
	if text = strings.TrimSuffix(text, "."); !slices.Contains(*list, text) {
		*list = append(*list, text)
	}
}

// String joins the parts to sentences.
func (p *paragraph) String() string {
	say := slices.Concat(p.causes, p.meanings)
	if len(p.next) > 0 {
		say = append(say, "Next: "+strings.Join(p.next, "; "))
	}
	for i, x := range say {
		say[i] = strings.ToUpper(x[:1]) + x[1:]
	}
	return strings.Join(say, ". ") + "."
}

func (s *Service) whyReady(p *paragraph, x sight) {
	cs := x.conditions()
	worst := "usable"
	for _, c := range cs {
		switch c.Severity {
		case volume.DataLoss:
			worst = "damaged: data is lost"
		case volume.Inaccessible:
			if worst != "damaged: data is lost" {
				worst = "not usable"
			}
		case volume.Degraded:
			if worst == "usable" {
				worst = "degraded"
			}
		}
	}
	if e := x.engine(); e != nil && worst == "usable" && starting(e.Phase) {
		worst = "being made ready"
	}
	p.says("Volume %s (%s) is %s: %d of %d replicas are in sync%s", x.Name, x.ID, worst, len(x.InSync()), x.Parameters.Replicas, inSyncOn(x.Volume))
	if x.left == 0 && !x.Lost {
		x.whyNobody(p)
	}
	for _, c := range cs {
		x.whyCondition(p, c)
	}
	for _, a := range x.away {
		x.whyAway(p, a)
	}
	for _, r := range x.Replicas {
		if !x.isAway(r.ID) && r.Role != volume.InSync {
			x.whyBehind(p, r)
		}
	}
	x.whyEngine(p)
	s.whyAttached(p, x)
	s.whyUnderWay(p, x)
}

// whyNobody is the case that no replica in sync answers.
func (x sight) whyNobody(p *paragraph) {
	p.says("no replica that is in sync can be reached (%s)", names(x.InSync()))
	p.means("Only replicas in sync have every acknowledged write, so I/O waits; nothing is lost while one of them can still come back, and nothing is to be deleted")
	safe := "see that the host is up and ballastd runs there"
	for _, a := range x.away {
		if a.Role == volume.InSync {
			safe = a.safe
			break
		}
	}
	if x.stranded {
		p.does("bring back one of the nodes that have them (%s): %s", nodesOf(x.InSync()), safe)
		return
	}
	p.does("bring back one of the nodes that have them (%s): %s; only if all of their disks are lost for good, `ballastctl salvage %s` shows what other replicas could give, "+
		"and what a salvage would lose", nodesOf(x.InSync()), safe, x.Name)
}

// ioGoesOn says what a replica less means for the data.
func (x sight) ioGoesOn(p *paragraph) {
	switch {
	case x.left == 0:
	case x.left < x.Parameters.MinInSync:
		p.means("Writes wait because %d in sync are fewer than minInSync, which is %d; reads go on, and no write is lost", x.left, x.Parameters.MinInSync)
	default:
		p.means("I/O goes on with the %d in sync; no write is lost", x.left)
	}
}

func (x sight) whyAway(p *paragraph, a awayReplica) {
	if a.Node != x.Owner || x.quietOwner == "" { // else it was said
		p.says("%s", a.why)
	}
	switch {
	case a.Role == volume.InSync && x.left > 0:
		p.does("%s; its replica %s is brought up when it returns, and replaced on another node if it stays away", a.safe, a.ID)
	case a.Role != volume.InSync:
		p.says("its replica %s is %s: it lacks writes", a.ID, a.Role)
		if x.left > 0 {
			p.does("%s", a.safe)
		}
	}
	x.ioGoesOn(p)
}

// whyBehind tells of a replica that is there and not in sync.
func (x sight) whyBehind(p *paragraph, r volume.Replica) {
	if x.left == 0 {
		p.says("replica %s on node %s is there but %s: it lacks writes and cannot serve the volume by itself", r.ID, r.Node, r.Role)
		return
	}
	text := fmt.Sprintf("replica %s on node %s was away and is being brought up", r.ID, r.Node)
	if r.Role == volume.Filling {
		text = fmt.Sprintf("replica %s on node %s is new and is being filled", r.ID, r.Node)
	}
	if e := x.engine(); e != nil {
		if i := slices.IndexFunc(e.Resyncs, func(y volume.Resync) bool { return y.Replica == r.ID }); i >= 0 {
			text += progressOf(e.Resyncs[i])
		}
	}
	p.says("%s", text)
	x.ioGoesOn(p)
}

func progressOf(r volume.Resync) string {
	text := fmt.Sprintf(": %s are copied, %s are left", bytesText(r.Done), bytesText(r.Left))
	if r.Rate > 0 {
		text += fmt.Sprintf(", at %s/s", bytesText(r.Rate))
		if seconds := r.Left / r.Rate; seconds < 1e6 { // more is no forecast
			text += fmt.Sprintf(" about %s more", time.Duration(seconds)*time.Second)
		}
	}
	if r.Snapshots > 0 {
		text += fmt.Sprintf(", and %s to fill in", plural(r.Snapshots, "snapshot"))
	}
	return text
}

// whyCondition words a condition. Those of replicas are worded by whyAway and whyBehind, for these know more.
func (x sight) whyCondition(p *paragraph, c volume.Condition) {
	switch c.Reason {
	case condAway, condBehind, condFilling:
	case condForgotten:
		p.says("every copy of it was on pools that were forgotten")
		p.means("Its bytes are lost")
		p.does("delete it, and restore a snapshot of it as another volume if one is held elsewhere (`ballastctl snapshot list --volume %s`)", x.Name)
	case condOwner:
		if x.stranded {
			return
		}
		p.says("%s", x.quietOwner)
		p.means("Whether its workload goes on there is not known; what was acknowledged is on the replicas in sync")
		p.does("see that node %s is up and ballastd runs there; to use the volume elsewhere take it away (your orchestrator does, or `ballastctl volume detach %s`): "+
			"that fences the node first, so nothing it still writes gets through", x.Owner, x.Name)
	case condTooFew, replication.CondMinInSync:
		x.ioGoesOn(p)
		p.does("bring the other replicas back, or if fewer copies will do, `ballastctl volume set %s --min-in-sync %d`", x.Name, max(1, x.left))
	case condFewer:
		p.says("%d of %d replicas are placed", len(x.Replicas), x.Parameters.Replicas)
		p.does("see that nodes are up and pools have room (`ballastctl pool list`): another replica is placed by itself as soon as a node has room for %s", bytesText(x.Size))
		x.ioGoesOn(p)
	case replication.CondControllers:
		p.says("a change of who is in sync cannot be committed, because no majority of the controllers answers node %s", x.Owner)
		p.means("I/O that depends on it waits; nothing is acknowledged early, and nothing is lost")
		p.does("bring the controllers back: `ballastctl cluster status` names those that do not answer")
	case replication.CondNoReplica:
		if x.left > 0 {
			p.says("its engine on node %s reaches no replica that is in sync, though the controllers do", x.Owner)
			p.means("I/O waits, and no write is lost")
			p.does("see to the network between node %s and %s", x.Owner, nodesOf(x.InSync()))
		}
	case replication.CondLease:
		p.says("%s, because that node did not give it up cleanly", c.Message)
		p.means("I/O begins when that is over, by itself; no write is lost")
	case replication.CondNotWhole:
		p.says("%s", before(c.Message, ":"))
		p.means("That replica is not written or read until it is opened anew, and then gets what it lacks; I/O goes on with others that are in sync, and waits if there are none. No acknowledged write is lost")
		p.does("see the kernel's log of that node for errors of the disk; where there are none restart ballastd there, else replace the disk; if no other replica comes back, see `ballastctl salvage %s`", x.Name)
	case "PoolFull":
		p.says("%s", before(c.Message, ","))
		p.means("Writes to new places wait if no replica has room, and go on by themselves when it has; none is lost, and reads go on")
		p.does("delete snapshots or volumes (both still work), discard within filesystems (fstrim), or give the pool more capacity; `ballastctl pool list` shows what is used")
	default: // the message says what to do
		p.says("%s", c.Message)
		p.open = true
	}
}

func starting(phase string) bool {
	return phase == "fencing" || phase == "committing" || phase == "marking"
}

// before cuts a text off at a separator.
func before(text, separator string) string {
	head, _, _ := strings.Cut(text, separator)
	return head
}

// whyEngine says what the engine is doing, where that is more than serving the volume.
func (x sight) whyEngine(p *paragraph) {
	e := x.engine()
	if e == nil {
		return
	}
	switch e.Phase {
	case "fencing":
		p.says("its engine on node %s is making sure that no earlier one can serve it any more", x.Owner)
		if len(x.conditions()) == 0 {
			p.means("That takes seconds, and it goes on by itself")
		}
	case "committing", "marking":
		p.says("its engine on node %s is starting: it agrees with the controllers and the replicas on who is in sync", x.Owner)
		p.means("That takes moments, and it goes on by itself")
	}
	if e.Waiting > 0 && len(x.conditions()) > 0 {
		p.says("requests of the workload that wait: %d", e.Waiting)
	}
	if e.Dirty > 0 {
		p.says("%s that were being written when the engine before it ended are compared among the replicas; they can be used meanwhile", bytesText(e.Dirty))
	}
}

func (s *Service) whyAttached(p *paragraph, x sight) {
	switch a := x.Attachment; {
	case x.Lost:
	case a == nil && x.Owner != "":
		p.says("it is not attached; node %s looks after its replicas, and gives it up to whichever node attaches it", x.Owner)
	case a == nil:
		p.says("it is not attached; %s", reachableFrom(x.Volume))
	case x.stranded:
		p.says("it is attached to node %s, which is silent, and nobody can make it stop writing: every replica that is in sync is silent too", a.Node)
		p.means("When that node or one of these replicas is back it can be detached, and nothing is lost")
		p.does("if none of them comes back: %s", wayOut(x.Volume))
	case a.Detaching && x.Owner == "":
		p.says("it is being taken from node %s, which does not answer", a.Node)
		p.means("Its replicas refuse that node already; it can be attached elsewhere when the lease of that node's reads is over, in seconds")
	case a.Detaching:
		p.says("it is being detached from node %s, which must first prove that it writes no more, or else a replica that is in sync must refuse what it writes", a.Node)
		p.does("if neither comes about, see that ballastd runs on node %s; never attach the volume's data elsewhere by hand meanwhile", a.Node)
	case x.quietOwner != "":
	case len(x.conditions()) > 0:
		p.says("it has been attached to node %s for %s", a.Node, s.age(a.Since))
	default:
		p.says("it has been attached to node %s for %s, and another node can have it when the workload there ends or it is detached", a.Node, s.age(a.Since))
	}
}

// wayOut says how an attachment ends that nobody can fence, where nothing comes back.
func wayOut(v volume.Volume) string {
	give := "delete the volume (detach it first, which begins and cannot end, and then does not hold the delete up), or forget its pool if the disk is gone"
	if len(v.Replicas) > 1 {
		give = "make sure that the node is off and salvage the volume from another replica, which ends the attachment; or " + give
	}
	return give
}

// whyUnderWay tells of changes that were begun.
func (s *Service) whyUnderWay(p *paragraph, x sight) {
	if b := x.Barrier; b != nil {
		p.says("snapshot %s of it is being cut: its writes are held for a second at most, and the snapshot is given up if that does not do", b.Snapshot)
	}
	for _, r := range x.Leaving {
		p.says("replica %s on node %s is none any more, and is freed when the node answers", r.ID, r.Node)
	}
	if x.Target != 0 {
		p.says("it is being expanded from %s to %s; repeat the expand or wait, it is also taken up in the background", bytesText(x.Size), bytesText(x.Target))
	}
	if x.Filesystem.Phase == volume.Formatting {
		p.says("making its %s filesystem was begun and not ended; the next stage makes it anew, there is nothing on it yet", x.Filesystem.Type)
	}
}

func (s *Service) whyTenant(ctx context.Context, p *paragraph, v volume.Volume) {
	quotas, err := s.store.Quotas(ctx)
	if err != nil {
		return
	}
	for _, q := range quotas {
		if q.Tenant == v.Tenant && q.Limit.PhysicalBytes > 0 && q.Used.PhysicalBytes >= q.Limit.PhysicalBytes {
			p.says("tenant %s uses %s of its %s on disk: it can write, but creates, snapshots and expands are refused", q.Tenant,
				bytesText(q.Used.PhysicalBytes), bytesText(q.Limit.PhysicalBytes))
			p.does("delete data or snapshots of the tenant, or raise its quota (`ballastctl quota set %s`)", q.Tenant)
		}
	}
}

// nodesAway says which nodes of a volume that is made or deleted are waited for.
func (s *Service) nodesAway(p *paragraph, v volume.Volume, nodes []volume.Node) {
	for _, r := range v.Replicas {
		if why, safe := s.unreachable(r, nodes); why != "" {
			p.says("the cause: %s", why)
			p.does("%s", safe)
		}
	}
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
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

func nodesOf(rs []volume.Replica) string {
	var on []string
	for _, r := range rs {
		on = append(on, string(r.Node))
	}
	return strings.Join(on, ", ")
}

func inSyncOn(v volume.Volume) string {
	if rs := v.InSync(); len(rs) > 0 {
		return " (" + nodesOf(rs) + ")"
	}
	return ""
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
