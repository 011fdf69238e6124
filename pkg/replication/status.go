package replication

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// EngineStatus is what an engine tells people.
type EngineStatus struct {
	// Phase is "fencing", "committing", "marking", "live" or "over".
	Phase         string
	Epoch         volume.Epoch
	ConfigVersion volume.ConfigVersion
	// Size is what is exposed, in bytes.
	Size    int64
	Members []MemberStatus
	// Dirty is the number of regions that are not reconciled since the attach.
	Dirty int
	// Waiting is the number of client operations that are not answered.
	Waiting int
	// Mismatches is the number of comparisons that found a copy to differ from its source; it was copied again.
	Mismatches int
	// Conditions are what is wrong, the worst first.
	Conditions []volume.Condition
}

// MemberStatus is one replica as the engine sees it.
type MemberStatus struct {
	ID        volume.ReplicaID
	Node      volume.NodeID
	InSync    bool
	Connected bool
	// Failed: it is to be removed from the in-sync set.
	Failed bool
	// NoRoom is the size in bytes that it is to grow to and has no room for; 0 is none.
	NoRoom int64
	// Resync is its return, nil where none is under way.
	Resync *ResyncStatus
	// Snapshots are those that it has sealed, as far as it was asked.
	Snapshots []volume.SnapshotID
}

// ResyncStatus is how far the return of a replica has got. Bytes.
type ResyncStatus struct {
	Stage string
	// Full: all of it is copied, because nobody knows what it missed.
	Full       bool
	Done, Left int64
	// Compared is done by the disks as well: of what was copied, and of what may be equal.
	Compared int64
	// Snapshots is the number of snapshots that are still to be filled in.
	Snapshots int
}

// Conditions of an engine; Reason of volume.Condition.
const (
	CondControllers  = "ControllersUnreachable"
	CondNoReplica    = "NoReplicaReachable"
	CondNotWhole     = "ReplicaNotWhole"
	CondMinInSync    = "BelowMinInSync"
	CondDegraded     = "ReplicaMissing"
	CondReplicaWaits = "ReplicaDoesNotAnswer"
	CondLease        = "WaitingForLease"
)

// Status describes the engine.
func (e *Engine) Status() EngineStatus {
	s := EngineStatus{
		Phase: [...]string{"fencing", "committing", "marking", "live", "over"}[e.phase],
		Epoch: e.m.Epoch, ConfigVersion: e.m.ConfigVersion, Size: e.size, Dirty: e.dirty.Len(), Mismatches: e.mismatches,
		Waiting: len(e.parked) + len(e.short) + len(e.flush.waiting) + len(e.flush.current),
	}
	for o := e.ops.first; o != nil; o = o.next {
		if o.client() && !o.answered {
			s.Waiting++
		}
	}
	for _, m := range e.members {
		if m == nil {
			continue
		}
		ms := MemberStatus{ID: m.id, Node: m.rec.Node, InSync: e.isr.Has(m.slot), Connected: m.open, Failed: e.failed.Has(m.slot)}
		if e.expand.refused.Has(m.slot) && e.m.Target > e.size {
			ms.NoRoom = e.expand.target
		}
		if m.fence != nil {
			for _, x := range m.fence.Snapshots {
				ms.Snapshots = append(ms.Snapshots, x.ID)
			}
		}
		if rs := m.rs; rs != nil {
			ms.Resync = &ResyncStatus{Stage: rs.stage.String(), Full: rs.full, Done: rs.done, Compared: rs.seen, Snapshots: len(rs.fills),
				Left: int64(rs.todo.Len()+rs.since.Len()) * e.g.Extent}
		}
		s.Members = append(s.Members, ms)
	}
	s.Conditions = e.conditions()
	return s
}

func (e *Engine) conditions() []volume.Condition {
	var list []volume.Condition
	add := func(sev volume.Severity, reason, format string, args ...any) {
		list = append(list, volume.Condition{Severity: sev, Reason: reason, Message: fmt.Sprintf(format, args...)})
	}
	if e.commit != nil && !e.commit.asked {
		add(volume.Inaccessible, CondControllers, "a change of who is in sync is not committed: I/O that depends on it waits until a majority of the controllers answers")
	}
	there, notWhole := 0, volume.Inaccessible
	for _, m := range e.members {
		if m != nil && e.isr.Has(m.slot) && m.open && m.fence != nil && e.valid(m) && !e.failed.Has(m.slot) {
			notWhole = volume.Degraded // that one serves
		}
	}
	for _, m := range e.members {
		if m == nil || !e.isr.Has(m.slot) {
			continue
		}
		if m.open {
			there++
		}
		switch {
		case m.open && m.fence != nil && !e.valid(m):
			add(notWhole, CondNotWhole, "replica %s was poisoned by a failed sync, or is on another disk than it was: reopen it; if no other replica comes back, salvage the volume", m.id)
		case e.phase != phaseFencing && !m.open && e.lastMember(m):
			add(volume.Inaccessible, CondReplicaWaits, "replica %s on node %s is the last in sync and does not answer: bring it back", m.id, m.rec.Node)
		case e.phase != phaseFencing && !m.open:
			add(volume.Degraded, CondReplicaWaits, "replica %s on node %s does not answer", m.id, m.rec.Node)
		}
	}
	if e.phase == phaseFencing {
		switch {
		case there == 0:
			add(volume.Inaccessible, CondNoReplica, "no replica that was in sync can be reached: bring one of their nodes back")
		case e.now < e.leased && !e.m.SkipLease:
			add(volume.Inaccessible, CondLease, "an engine on another node may still serve reads for %d ms", (e.leased-e.now)/Millisecond)
		}
	}
	if !e.enough() {
		add(volume.Inaccessible, CondMinInSync, "%d replicas are in sync, minInSync is %d: writes wait until another is, or minInSync is lowered", e.isr.Len(), e.m.MinInSync)
	}
	if missing := len(e.m.Members) - e.isr.Len(); missing > 0 {
		add(volume.Degraded, CondDegraded, "%d of %d replicas are not in sync", missing, len(e.m.Members))
	}
	return list
}
