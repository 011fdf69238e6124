package replication

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Membership is the controllers' record of who holds a volume. Only Apply makes a new one from an old; each is immutable
// and may be shared.
type Membership struct {
	Volume volume.ID `json:"volume"`
	// Epoch counts attaches, tombstones and forced detaches: what an engine of a lower one asks for is refused.
	Epoch volume.Epoch `json:"epoch"`
	// ConfigVersion counts changes of the in-sync set and of what is known of its members.
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Lineage       Lineage              `json:"lineage"`
	// Revision counts all changes, so that of two records the newer is known.
	Revision uint64 `json:"revision"`
	// Size is what is exposed, in bytes; Target is greater while an expand is under way, else 0.
	Size   int64 `json:"size"`
	Target int64 `json:"target,omitempty"`
	// Owner is the node of the engine, "" while detached.
	Owner volume.NodeID `json:"owner,omitempty"`
	// Clean tells that the last engine said that it is gone: nobody holds a lease. SkipLease is Clean as the attach of this
	// epoch found it.
	Clean     bool `json:"clean,omitempty"`
	SkipLease bool `json:"skipLease,omitempty"`
	// Silent is the node that the last engine was taken from because it did not answer; "" where it did, or has come back. An
	// attach does not wait for its replicas.
	Silent volume.NodeID `json:"silent,omitempty"`
	// MinInSync is how many members must be in sync for writes to be acknowledged; at least 1.
	MinInSync int `json:"minInSync"`
	// Members in the order in which they were added; at most MaxMembers.
	// Invariant: at least one of them is ISR.
	Members []Member `json:"members"`
	// Barrier is the snapshot that is being cut. Barriers counts them.
	Barrier  *Barrier `json:"barrier,omitempty"`
	Barriers uint64   `json:"barriers,omitempty"`
	Deleted  bool     `json:"deleted,omitempty"`
}

// Member is one replica as the controllers know it.
type Member struct {
	ID   volume.ReplicaID `json:"id"`
	Node volume.NodeID    `json:"node"`
	Pool volume.PoolID    `json:"pool"`
	// Incarnation and BootID are those that the engine last committed; 0 is not known yet.
	Incarnation Incarnation `json:"incarnation,omitempty"`
	BootID      BootID      `json:"bootID,omitempty"`
	// Role is ISR, STALE or NEW.
	Role Role `json:"role"`
	// RemovedAt is the version whose change took it out of the in-sync set; 0 where there is none since it was added.
	RemovedAt volume.ConfigVersion `json:"removedAt,omitempty"`
	// RemovedBarriers is what Barriers was then: snapshots of greater numbers were cut without it.
	RemovedBarriers uint64 `json:"removedBarriers,omitempty"`
}

// Barrier is a pending snapshot. It is valid in its epoch only.
type Barrier struct {
	// Number is unique among the volume's barriers.
	Number        uint64               `json:"number"`
	Snapshot      volume.SnapshotID    `json:"snapshot"`
	Epoch         volume.Epoch         `json:"epoch"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
}

// NewMembership returns the record of a volume just created, all of whose replicas are empty and so in sync.
func NewMembership(id volume.ID, size int64, minInSync int, replicas []Member) (Membership, error) {
	m := Membership{Volume: id, ConfigVersion: 1, Lineage: 1, Revision: 1, Size: size, Clean: true, MinInSync: minInSync}
	for _, r := range replicas {
		r.Role, r.RemovedAt = RoleISR, 0
		m.Members = append(m.Members, r)
	}
	return m, m.Check()
}

// Check returns volume.ErrInvalid where a record from outside breaks an invariant.
func (m *Membership) Check() error {
	bad := func(what string) error {
		return fmt.Errorf("membership of %s: %s: %w", m.Volume, what, volume.ErrInvalid)
	}
	switch {
	case len(m.Members) > MaxMembers:
		return bad("too many members")
	case m.MinInSync < 1 || m.MinInSync > MaxMembers:
		return bad("minInSync out of range")
	case m.Lineage < 1 || m.ConfigVersion < 1:
		return bad("no version")
	case m.Size < 1 || m.Size > volume.MaxSize || m.Target != 0 && m.Target <= m.Size || m.Target > volume.MaxSize:
		return bad("size out of range")
	}
	isr := 0
	for i, a := range m.Members {
		if a.ID == "" || len(a.ID) > volume.MaxNameLen {
			return bad("a replica's id is empty or too long")
		}
		if a.Role != RoleISR && a.Role != RoleSTALE && a.Role != RoleNEW {
			return bad("a replica has no role")
		}
		if a.Role == RoleISR {
			isr++
		}
		for _, b := range m.Members[:i] {
			if a.ID == b.ID {
				return bad("a replica is there twice")
			}
		}
	}
	if isr == 0 {
		return bad("no replica is in sync")
	}
	return nil
}

// Member returns the replica with this id.
func (m *Membership) Member(id volume.ReplicaID) (Member, bool) {
	if i := m.index(id); i >= 0 {
		return m.Members[i], true
	}
	return Member{}, false
}

func (m *Membership) index(id volume.ReplicaID) int {
	return slices.IndexFunc(m.Members, func(a Member) bool { return a.ID == id })
}

// ISR returns the in-sync set, in the order of Members.
func (m *Membership) ISR() []volume.ReplicaID {
	var ids []volume.ReplicaID
	for _, a := range m.Members {
		if a.Role == RoleISR {
			ids = append(ids, a.ID)
		}
	}
	return ids
}

// clone returns a copy that shares nothing with m.
func (m *Membership) clone() Membership {
	c := *m
	c.Members = slices.Clone(m.Members)
	if m.Barrier != nil {
		b := *m.Barrier
		c.Barrier = &b
	}
	return c
}
