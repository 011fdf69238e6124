package replication

import (
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Refusals of Membership.Apply. Nothing was changed; the same change will be refused again.
var (
	// ErrStaleEpoch: the engine that asks has been fenced.
	ErrStaleEpoch = fmt.Errorf("another epoch has begun: %w", volume.ErrStale)
	// ErrStaleVersion: the in-sync set has changed since.
	ErrStaleVersion = fmt.Errorf("another configuration has been committed: %w", volume.ErrStale)
	// ErrLastMember: the in-sync set would be empty.
	ErrLastMember = fmt.Errorf("no replica would be in sync: %w", volume.ErrInUse)
	// ErrUnknownMember: the replica is not one of the volume's.
	ErrUnknownMember = fmt.Errorf("no such replica: %w", volume.ErrNotFound)
	// ErrAttached: the volume is attached, or attached elsewhere.
	ErrAttached = fmt.Errorf("volume is attached: %w", volume.ErrInUse)
	// ErrMemberInSync: the replica is in sync, and must be evicted by the engine first.
	ErrMemberInSync = fmt.Errorf("replica is in sync: %w", volume.ErrInUse)
	// ErrDeleted: the volume is being deleted.
	ErrDeleted = fmt.Errorf("volume is being deleted: %w", volume.ErrNotFound)
	// ErrNoBarrier: no such snapshot is pending, any more.
	ErrNoBarrier = fmt.Errorf("no such snapshot is pending: %w", volume.ErrStale)
	// ErrBarrierPending: another snapshot is pending.
	ErrBarrierPending = fmt.Errorf("another snapshot is being cut: %w", volume.ErrBusy)
)

// Change is what is to be done to a Membership: exactly one of its parts is set.
type Change struct {
	Attach        *Attach        `json:"attach,omitempty"`
	Detach        *Detach        `json:"detach,omitempty"`
	Reconfigure   *Reconfigure   `json:"reconfigure,omitempty"`
	AddReplica    *Member        `json:"addReplica,omitempty"`
	DropReplica   *DropReplica   `json:"dropReplica,omitempty"`
	Prepare       *Prepare       `json:"prepare,omitempty"`
	Complete      *Complete      `json:"complete,omitempty"`
	AbortBarrier  *AbortBarrier  `json:"abortBarrier,omitempty"`
	ExpandIntent  *ExpandIntent  `json:"expandIntent,omitempty"`
	ExpandCommit  *ExpandCommit  `json:"expandCommit,omitempty"`
	SetMinInSync  *SetMinInSync  `json:"setMinInSync,omitempty"`
	Tombstone     *Tombstone     `json:"tombstone,omitempty"`
	Salvage       *Salvage       `json:"salvage,omitempty"`
	SetPlacements []SetPlacement `json:"setPlacements,omitempty"`
}

// Attach makes Node the owner in a new epoch. Where Force is not set, another node's attachment is refused: ErrAttached.
// The engine of the new epoch fences the old one; a pending snapshot is aborted. With Assign the node is to have an engine, and
// none runs yet: it attaches again before it makes one, so that every engine has an epoch of its own. Gone is the epoch of an
// engine of Node that is gone, and that had seen all older ones out: its lease need not be waited for.
type Attach struct {
	Node   volume.NodeID `json:"node"`
	Force  bool          `json:"force,omitempty"`
	Assign bool          `json:"assign,omitempty"`
	Gone   volume.Epoch  `json:"gone,omitempty"`
}

// Detach ends an attachment. A clean one is asked for by the engine, or its node, after the engine stopped. The other is
// forced: the epoch rises, and the caller has replicas fenced and leases waited out (Config.FenceOnly) before it goes on.
// Epoch 0 is whichever is there. Silent is set where it is forced because the node does not answer.
type Detach struct {
	Epoch  volume.Epoch `json:"epoch,omitempty"`
	Clean  bool         `json:"clean,omitempty"`
	Silent bool         `json:"silent,omitempty"`
}

// Reconfigure changes the in-sync set. It is the engine's, a compare-and-set on epoch and version. Removed members become
// STALE; added ones ISR, with the life and disk that was copied to. Boots updates what is known of members that stay.
type Reconfigure struct {
	Epoch         volume.Epoch         `json:"epoch"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Remove        []volume.ReplicaID   `json:"remove,omitempty"`
	Add           []Proof              `json:"add,omitempty"`
	Boots         []Proof              `json:"boots,omitempty"`
}

// DropReplica takes a replica out of the record. In-sync ones may go only while detached, the last never.
type DropReplica struct {
	ID volume.ReplicaID `json:"id"`
}

// Prepare announces a snapshot: Barrier is set, with the epoch and version that it is valid in.
type Prepare struct {
	Snapshot volume.SnapshotID `json:"snapshot"`
}

// Complete makes the pending snapshot ready. Holders have sealed it at ConfigVersion, all that were in sync then.
type Complete struct {
	Number        uint64               `json:"number"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Holders       []volume.ReplicaID   `json:"holders"`
}

// AbortBarrier gives the pending snapshot up. What replicas have sealed for it is to be deleted.
type AbortBarrier struct {
	Number uint64 `json:"number"`
}

// ExpandIntent records the size to grow to, in bytes.
type ExpandIntent struct {
	Target int64 `json:"target"`
}

// ExpandCommit exposes a size that all members have. It is the engine's, a compare-and-set on epoch and version.
type ExpandCommit struct {
	Epoch         volume.Epoch         `json:"epoch"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Size          int64                `json:"size"`
}

// SetMinInSync changes MinInSync.
type SetMinInSync struct {
	MinInSync int `json:"minInSync"`
}

// Tombstone begins the deletion: the epoch rises, so that a fence stops whatever still writes.
type Tombstone struct{}

// Salvage makes one replica the only in-sync one, under a new lineage: an admin's decision to take what it has for the
// volume. Seen and SeenEpoch are the newest version and epoch that any replica reported: the record may be an old copy. The
// volume must be detached.
type Salvage struct {
	ID        volume.ReplicaID     `json:"id"`
	Seen      volume.ConfigVersion `json:"seen"`
	SeenEpoch volume.Epoch         `json:"seenEpoch,omitempty"`
}

// SetPlacement records where a replica is after its pool was moved.
type SetPlacement struct {
	ID   volume.ReplicaID `json:"id"`
	Node volume.NodeID    `json:"node"`
	Pool volume.PoolID    `json:"pool"`
}

// Apply returns the record after the change, or one of the errors above, or volume.ErrInvalid. m is not changed.
func (m *Membership) Apply(c Change) (Membership, error) { return m.apply(c, Rules{}) }

// ApplyWithout is Apply with rules switched off, for tests.
func (m *Membership) ApplyWithout(c Change, without Rules) (Membership, error) {
	return m.apply(c, without)
}

var errOneChange = fmt.Errorf("a change has exactly one part: %w", volume.ErrInvalid)

func (m *Membership) apply(c Change, without Rules) (Membership, error) {
	n := m.clone()
	var err error
	parts := 0
	do := func(is bool, f func() error) {
		if is {
			if parts++; parts == 1 {
				err = f()
			}
		}
	}
	do(c.Attach != nil, func() error { return n.attach(*c.Attach, without) })
	do(c.Detach != nil, func() error { return n.detach(*c.Detach) })
	do(c.Reconfigure != nil, func() error { return n.reconfigure(*c.Reconfigure, without) })
	do(c.AddReplica != nil, func() error { return n.addReplica(*c.AddReplica) })
	do(c.DropReplica != nil, func() error { return n.dropReplica(c.DropReplica.ID) })
	do(c.Prepare != nil, func() error { return n.prepare(*c.Prepare) })
	do(c.Complete != nil, func() error { return n.complete(*c.Complete) })
	do(c.AbortBarrier != nil, func() error { return n.abortBarrier(*c.AbortBarrier) })
	do(c.ExpandIntent != nil, func() error { return n.expandIntent(*c.ExpandIntent) })
	do(c.ExpandCommit != nil, func() error { return n.expandCommit(*c.ExpandCommit, without) })
	do(c.SetMinInSync != nil, func() error { n.MinInSync = c.SetMinInSync.MinInSync; return nil })
	do(c.Tombstone != nil, func() error { return n.tombstone(without) })
	do(c.Salvage != nil, func() error { return n.salvage(*c.Salvage, without) })
	do(len(c.SetPlacements) > 0, func() error { return n.setPlacements(c.SetPlacements) })
	if parts != 1 {
		err = errOneChange
	}
	if err == nil && !(without.WithoutLastMemberGuard && len(n.ISR()) == 0) {
		err = n.Check()
	}
	if err != nil {
		return Membership{}, fmt.Errorf("volume %s: %w", m.Volume, err)
	}
	n.Revision++
	return n, nil
}

func (m *Membership) attach(a Attach, without Rules) error {
	switch {
	case m.Deleted:
		return ErrDeleted
	case a.Node == "" || len(a.Node) > volume.MaxNodeIDLen:
		return fmt.Errorf("node of an attach: %w", volume.ErrInvalid)
	case m.Owner != "" && m.Owner != a.Node && !a.Force:
		return ErrAttached
	}
	m.Epoch++
	gone := a.Gone != 0 && a.Gone == m.Epoch-1 && m.Owner == a.Node
	m.SkipLease, m.Clean = m.Clean || gone, m.Clean && a.Assign
	m.Owner = a.Node
	if !without.WithoutBarrierAbort {
		m.Barrier = nil
	}
	return nil
}

func (m *Membership) detach(d Detach) error {
	if d.Epoch != 0 && d.Epoch != m.Epoch {
		return ErrStaleEpoch
	}
	if m.Owner == "" {
		return nil
	}
	m.Silent = ""
	if d.Silent {
		m.Silent = m.Owner
	}
	m.Owner, m.Clean, m.SkipLease, m.Barrier = "", d.Clean || m.Clean, false, nil
	if !d.Clean {
		m.Epoch++
	}
	return nil
}

// guard is the compare of a compare-and-set.
func (m *Membership) guard(epoch volume.Epoch, version volume.ConfigVersion, without Rules) error {
	switch {
	case (epoch != m.Epoch || m.Owner == "") && !without.WithoutEpochGuard:
		return ErrStaleEpoch
	case version != m.ConfigVersion && !without.WithoutVersionGuard:
		return ErrStaleVersion
	}
	return nil
}

func (m *Membership) reconfigure(r Reconfigure, without Rules) error {
	if err := m.guard(r.Epoch, r.ConfigVersion, without); err != nil {
		return err
	}
	m.ConfigVersion++
	for _, id := range r.Remove {
		i := m.index(id)
		if i < 0 {
			return ErrUnknownMember
		}
		if a := &m.Members[i]; a.Role == RoleISR {
			a.Role, a.RemovedAt, a.RemovedBarriers = RoleSTALE, m.ConfigVersion, m.Barriers
		}
	}
	for _, p := range r.Add {
		i := m.index(p.ID)
		if i < 0 {
			return ErrUnknownMember
		}
		if p.Incarnation == 0 || p.BootID == 0 {
			return fmt.Errorf("proof of %s: %w", p.ID, volume.ErrInvalid)
		}
		a := &m.Members[i]
		a.Role, a.RemovedAt, a.RemovedBarriers, a.Incarnation, a.BootID = RoleISR, 0, 0, p.Incarnation, p.BootID
		if a.Node == m.Silent {
			m.Silent = ""
		}
	}
	for _, p := range r.Boots {
		i := m.index(p.ID)
		if i < 0 {
			return ErrUnknownMember
		}
		a := &m.Members[i]
		if a.Role == RoleISR {
			a.Incarnation, a.BootID = p.Incarnation, p.BootID
		}
	}
	if len(m.ISR()) == 0 && !without.WithoutLastMemberGuard {
		return ErrLastMember
	}
	return nil
}

func (m *Membership) addReplica(a Member) error {
	switch {
	case m.Deleted:
		return ErrDeleted
	case m.index(a.ID) >= 0:
		return fmt.Errorf("replica %s: %w", a.ID, volume.ErrExists)
	case len(m.Members) >= MaxMembers:
		return fmt.Errorf("a volume has at most %d replicas: %w", MaxMembers, volume.ErrOutOfRange)
	}
	a.Role, a.RemovedAt = RoleNEW, 0
	m.Members = append(m.Members, a)
	return nil
}

func (m *Membership) dropReplica(id volume.ReplicaID) error {
	i := m.index(id)
	if i < 0 {
		return ErrUnknownMember
	}
	if m.Members[i].Role == RoleISR {
		switch {
		case len(m.ISR()) == 1:
			return ErrLastMember
		case m.Owner != "":
			return ErrMemberInSync
		}
		m.ConfigVersion++
	}
	m.Members = append(m.Members[:i], m.Members[i+1:]...)
	return nil
}

func (m *Membership) prepare(p Prepare) error {
	switch {
	case m.Deleted:
		return ErrDeleted
	case m.Owner == "":
		return fmt.Errorf("a snapshot is cut by an engine: %w", volume.ErrInUse)
	case m.Barrier != nil:
		return ErrBarrierPending
	case p.Snapshot == "" || len(p.Snapshot) > volume.MaxNameLen:
		return fmt.Errorf("snapshot's id: %w", volume.ErrInvalid)
	}
	m.Barriers++
	m.Barrier = &Barrier{Number: m.Barriers, Snapshot: p.Snapshot, Epoch: m.Epoch, ConfigVersion: m.ConfigVersion}
	return nil
}

func (m *Membership) complete(c Complete) error {
	b := m.Barrier
	if b == nil || b.Number != c.Number || b.ConfigVersion != c.ConfigVersion {
		return ErrNoBarrier
	}
	if len(c.Holders) == 0 {
		return fmt.Errorf("a snapshot without holders: %w", volume.ErrInvalid)
	}
	for _, id := range c.Holders {
		if m.index(id) < 0 {
			return ErrUnknownMember
		}
	}
	m.Barrier = nil
	return nil
}

func (m *Membership) abortBarrier(a AbortBarrier) error {
	if m.Barrier == nil || m.Barrier.Number != a.Number {
		return ErrNoBarrier
	}
	m.Barrier = nil
	return nil
}

func (m *Membership) expandIntent(e ExpandIntent) error {
	switch {
	case m.Deleted:
		return ErrDeleted
	case e.Target <= max(m.Size, m.Target):
		return nil
	case e.Target > volume.MaxSize:
		return fmt.Errorf("size %d: %w", e.Target, volume.ErrOutOfRange)
	}
	m.Target = e.Target
	return nil
}

func (m *Membership) expandCommit(e ExpandCommit, without Rules) error {
	if err := m.guard(e.Epoch, e.ConfigVersion, without); err != nil {
		return err
	}
	if e.Size > max(m.Size, m.Target) {
		return fmt.Errorf("size %d was not asked for: %w", e.Size, volume.ErrInvalid)
	}
	m.Size = max(m.Size, e.Size)
	if m.Target <= m.Size {
		m.Target = 0
	}
	return nil
}

func (m *Membership) tombstone(without Rules) error {
	if !m.Deleted && !without.WithoutTombstoneEpoch {
		m.Epoch++
	}
	m.Deleted, m.Owner, m.Clean, m.SkipLease, m.Barrier = true, "", false, false, nil
	return nil
}

func (m *Membership) salvage(s Salvage, without Rules) error {
	i := m.index(s.ID)
	switch {
	case i < 0:
		return ErrUnknownMember
	case m.Owner != "":
		return ErrAttached
	}
	m.Epoch = max(m.Epoch, s.SeenEpoch) + 1
	m.Clean, m.SkipLease, m.Barrier = false, false, nil
	if !without.WithoutSalvageReset {
		m.Lineage++
		m.ConfigVersion = max(m.ConfigVersion, s.Seen)
	}
	m.ConfigVersion++
	for j := range m.Members {
		a := &m.Members[j]
		switch {
		case j == i:
			// The disk and the life are those that it has now: the next attach records them.
			a.Role, a.RemovedAt, a.Incarnation, a.BootID = RoleISR, 0, 0, 0
		case a.Role == RoleNEW:
		case without.WithoutSalvageReset:
			if a.Role == RoleISR {
				a.Role, a.RemovedAt = RoleSTALE, m.ConfigVersion
			}
		default:
			// Tracking that began at any version is no good: all of it is compared.
			a.Role, a.RemovedAt = RoleSTALE, 0
		}
	}
	return nil
}

func (m *Membership) setPlacements(ps []SetPlacement) error {
	for _, p := range ps {
		i := m.index(p.ID)
		if i < 0 {
			return ErrUnknownMember
		}
		m.Members[i].Node, m.Members[i].Pool = p.Node, p.Pool
	}
	return nil
}

// Superseded tells whether an error of Apply means that the engine that asked is one no more.
func Superseded(err error) bool { return errors.Is(err, ErrStaleEpoch) || errors.Is(err, ErrDeleted) }
