package replication

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// ReplicaConfig is what a Replica is made of.
type ReplicaConfig struct {
	Volume      volume.ID
	Replica     volume.ReplicaID
	Incarnation Incarnation
	BootID      BootID
	// LeaseUntil is LeaseUntil of the machine that this replica had before in the same process, which was closed in good
	// order; 0 where there was none: a full lease is assumed then.
	LeaseUntil Now
	Geometry   Geometry
	Timing     Timing
	Rules      Rules
}

// Stored is what a replica's store has kept.
type Stored struct {
	State     []byte
	WIL       []region.Run
	Missed    []MissedTag
	Size      int64
	Snapshots []SealedSnapshot // oldest first
}

// Replica is the protocol's side of one copy of a volume. It admits operations of the newest session only, sees to the
// write-intent log, and remembers across restarts what it must not forget.
type Replica struct {
	cfg ReplicaConfig
	out []ReplicaEffect

	// st is what is durable, or being made so.
	st      replicaState
	persist persister
	size    int64
	snaps   []SealedSnapshot
	sealing SealedSnapshot // without an ID it is none
	dropped bool           // the layer of sealing was deleted meanwhile, or will not be there
	seals   []Message      // orders that wait for one that runs
	missed  []MissedTag

	// session is the newest one, of the epoch in st. It serves once open, and data once configured.
	session    Session
	open       bool
	configured bool
	unlogged   bool     // the volume has one replica: the write-intent log is not kept
	fence      *Message // being answered
	saved      bool     // the newest attempt to make st durable did
	poisoned   bool     // in this life: nothing but a restart helps
	leaseUntil Now
	seen       window
	slots      [MaxMembers]MissedTag
	marks      map[PeerSet][]MissedTag

	wil   map[uint32]*wilRegion
	calls callTable
	now   Now
}

// NewReplica returns the machine of a replica that was just opened. It fails where the durable state is damaged
// (volume.ErrDataLoss) or the configuration is not valid (volume.ErrInvalid).
func NewReplica(cfg ReplicaConfig, s Stored, now Now) (*Replica, error) {
	if !cfg.Geometry.valid() || cfg.Incarnation == 0 || cfg.BootID == 0 {
		return nil, fmt.Errorf("replica %s: %w", cfg.Replica, volume.ErrInvalid)
	}
	st, err := decodeState(s.State)
	if err != nil {
		return nil, fmt.Errorf("replica %s: %w", cfg.Replica, err)
	}
	r := &Replica{cfg: cfg, st: st, size: s.Size, snaps: slices.Clone(s.Snapshots), missed: slices.Clone(s.Missed),
		saved: true, wil: map[uint32]*wilRegion{}, marks: map[PeerSet][]MissedTag{}, now: now}
	for _, run := range s.WIL {
		for i := run.First; i < run.End(); i++ {
			r.wil[i] = &wilRegion{state: wilActive}
		}
	}
	// Who was served in the life before, or from the disk before this, is not known: it may have been just now.
	if r.leaseUntil = cfg.LeaseUntil; cfg.LeaseUntil == 0 && !cfg.Rules.WithoutRebootLease {
		r.leaseUntil = now + cfg.Timing.Lease + cfg.Timing.LeaseMargin
	}
	return r, nil
}

// Effects returns what is to be done since the last call. The slice is valid until the next event.
func (r *Replica) Effects() []ReplicaEffect {
	out := r.out
	r.out = r.out[:0]
	return out
}

// Size is the durable size in bytes.
func (r *Replica) Size() int64 { return r.size }

// Epoch is the highest seen.
func (r *Replica) Epoch() volume.Epoch { return r.st.Epoch }

// LeaseUntil is until when an engine may serve reads because of what this replica answered; never 0.
func (r *Replica) LeaseUntil() Now { return max(1, r.leaseUntil) }

// Poisoned tells whether a sync failed in this life: only a new one, with a new boot id, will serve.
func (r *Replica) Poisoned() bool { return r.poisoned }

// Role is the durable one.
func (r *Replica) Role() Role { return r.st.Role }

// Receive takes a request from an engine.
func (r *Replica) Receive(now Now, m *Message) {
	r.now = now
	switch {
	case m.Reply || !m.Kind.Valid():
		return
	case m.Volume != r.cfg.Volume || m.Replica != r.cfg.Replica:
		r.answer(m, StatusNotFound)
	case m.Kind == KindFence:
		r.beginFence(m)
	case m.Epoch < r.st.Epoch:
		r.answer(m, StatusStaleEpoch)
	case m.Epoch > r.st.Epoch:
		r.answer(m, StatusStaleSession) // its fence was lost
	case !r.serves(m):
		r.answer(m, StatusStaleSession)
	case !r.cfg.Rules.WithoutDedupe && !r.seen.first(m.Seq):
		return // delivered before
	default:
		r.leaseUntil = max(r.leaseUntil, now+r.cfg.Timing.Lease+r.cfg.Timing.LeaseMargin)
		if r.poisoned {
			r.answer(m, StatusPoisoned)
			return
		}
		r.admit(m)
	}
}

// serves tells whether a request of the current epoch may be served.
func (r *Replica) serves(m *Message) bool {
	if r.cfg.Rules.WithoutSessionCheck && m.Session < r.session {
		return true
	}
	return r.open && m.Session == r.session
}

func (r *Replica) admit(m *Message) {
	switch m.Kind {
	case KindPing:
		r.answer(m, StatusOK)
	case KindConfigure:
		r.configure(m)
	case KindRead, KindHash:
		r.read(m)
	case KindWrite, KindZero:
		r.write(m)
	case KindFlush:
		if r.ready(m) {
			r.store(m, StoreOp{Kind: StoreSync, NoMarks: r.cfg.Rules.WithoutFlushMissed})
		}
	case KindAllocated, KindMissed:
		if m.Set == nil {
			r.answer(m, StatusRefused)
			return
		}
		kind := StoreAllocated
		if m.Kind == KindMissed {
			kind = StoreMissed
			if !r.tracks(m.Set.Peer) {
				r.answer(m, StatusNotFound)
				return
			}
		}
		r.store(m, StoreOp{Kind: kind, Set: *m.Set, Snapshot: m.Snapshot})
	case KindMarkMissed:
		r.markMissed(m)
	case KindClearWIL:
		r.clearWIL(m)
	case KindSeal:
		r.seal(m)
	case KindResize:
		if m.Len <= r.size {
			r.answer(m, StatusOK)
			return
		}
		r.store(m, StoreOp{Kind: StoreResize, Len: m.Len})
	}
}

// ready tells whether this session has been configured, and refuses the request otherwise: roles, slots and tags are those
// of a session.
func (r *Replica) ready(m *Message) bool {
	if r.configured {
		return true
	}
	r.answer(m, StatusRefused)
	return false
}

func (r *Replica) inRange(m *Message, n int64) bool {
	if m.Off >= 0 && n > 0 && m.Off <= r.size && n <= r.size-m.Off {
		return true
	}
	r.answer(m, StatusRange)
	return false
}

func (r *Replica) read(m *Message) {
	if !r.ready(m) {
		return
	}
	kind := StoreRead
	limit := int64(MaxData)
	if m.Kind == KindHash {
		kind = StoreHash
	} else if r.st.Role != RoleISR {
		r.answer(m, StatusRefused) // its bytes are nobody's
		return
	}
	if m.Len > limit {
		r.answer(m, StatusRange)
		return
	}
	if r.inRange(m, m.Len) {
		r.store(m, StoreOp{Kind: kind, Off: m.Off, Len: m.Len, Snapshot: m.Snapshot, Data: m.Data})
	}
}

func (r *Replica) tracks(peer volume.ReplicaID) bool {
	return slices.ContainsFunc(r.missed, func(t MissedTag) bool { return t.Peer == peer })
}

func (r *Replica) markMissed(m *Message) {
	if !r.ready(m) {
		return
	}
	if m.Set == nil || !validRuns(m.Set.Runs) {
		r.answer(m, StatusRefused)
		return
	}
	i := slices.IndexFunc(r.missed, func(t MissedTag) bool { return t.Peer == m.Set.Peer })
	if i < 0 {
		r.answer(m, StatusNotFound)
		return
	}
	set := *m.Set
	if m.Set.Adopt {
		r.missed[i].Since = m.Set.Since
		r.forgetMarks()
	} else {
		set.Since = r.missed[i].Since
	}
	if r.cfg.Rules.WithoutDurableMissed && !m.Set.Adopt {
		r.answer(m, StatusOK)
		return
	}
	r.store(m, StoreOp{Kind: StoreMarkMissed, Set: set})
}

func validRuns(runs []region.Run) bool {
	if len(runs) > MaxRuns {
		return false
	}
	for _, run := range runs {
		if !run.Valid() {
			return false
		}
	}
	return true
}

func (r *Replica) seal(m *Message) {
	if !r.ready(m) {
		return
	}
	s := m.Seal
	if s == nil || s.Snapshot == "" || len(s.Snapshot) > volume.MaxNameLen {
		r.answer(m, StatusRefused)
		return
	}
	role := RoleISR
	if s.Fill {
		role = RoleSYNC
	}
	if s.ConfigVersion != r.st.ConfigVersion || r.st.Role != role {
		r.answer(m, StatusRefused)
		return
	}
	if r.sealing.ID != "" && !r.cfg.Rules.WithoutSealOrder {
		// One given up by the engine may still run, and must not come after this one.
		r.seals = append(r.seals, *m)
		return
	}
	at := slices.IndexFunc(r.snaps, func(l SealedSnapshot) bool { return l.ID == s.Snapshot })
	switch {
	case at >= 0 && r.snaps[at].Number > s.Number && !r.cfg.Rules.WithoutSealOrder:
		r.answer(m, StatusRefused) // it was cut anew since
	case at >= 0 && (r.snaps[at].Number == s.Number || r.cfg.Rules.WithoutSealNumber):
		r.answer(m, StatusOK)
	case at < 0 && len(r.snaps) >= MaxSnapshots:
		r.answer(m, StatusRefused)
	default:
		r.sealing, r.dropped = SealedSnapshot{ID: s.Snapshot, Number: s.Number}, false
		r.store(m, StoreOp{Kind: StoreSeal, Snapshot: s.Snapshot, Number: s.Number, Sync: !r.cfg.Rules.WithoutSealFlush})
	}
}

// nextSeal goes on with the orders that waited for one to end.
func (r *Replica) nextSeal() {
	r.sealing = SealedSnapshot{}
	for len(r.seals) > 0 && r.sealing.ID == "" {
		m := r.seals[0]
		r.seals = r.seals[1:]
		if r.serves(&m) && m.Epoch == r.st.Epoch && !r.poisoned {
			r.seal(&m)
		} else {
			r.answer(&m, StatusStaleSession)
		}
	}
}

func (r *Replica) sealed(s *Seal) {
	r.snaps = slices.DeleteFunc(r.snaps, func(l SealedSnapshot) bool { return l.ID == s.Snapshot })
	if !r.dropped {
		r.snaps = append(r.snaps, SealedSnapshot{ID: s.Snapshot, Number: s.Number})
	}
}

// Forget tells the machine that a snapshot's layer was deleted from the store, unless a barrier of a number above upTo has
// cut it; upTo 0 is any. Orders to seal it that wait are refused.
func (r *Replica) Forget(id volume.SnapshotID, upTo uint64) {
	is := func(s volume.SnapshotID, number uint64) bool { return s == id && (upTo == 0 || number <= upTo) }
	r.snaps = slices.DeleteFunc(r.snaps, func(l SealedSnapshot) bool { return is(l.ID, l.Number) })
	r.dropped = r.dropped || is(r.sealing.ID, r.sealing.Number)
	r.seals = slices.DeleteFunc(r.seals, func(m Message) bool {
		forget := is(m.Seal.Snapshot, m.Seal.Number)
		if forget {
			r.answer(&m, StatusRefused)
		}
		return forget
	})
}

// answer ends a request.
func (r *Replica) answer(m *Message, s Status) {
	a := Message{Kind: m.Kind, Reply: true, Status: s, Volume: m.Volume, Replica: m.Replica, Epoch: m.Epoch, Session: m.Session,
		Seq: m.Seq, Op: m.Op, Conn: m.Conn}
	switch {
	case s == StatusStaleEpoch:
		a.Fence = &FenceReply{Epoch: r.st.Epoch}
	case m.Kind == KindFlush:
		a.Boot = r.cfg.BootID
	}
	r.out = append(r.out, ReplicaEffect{Answer: true, Msg: a})
}
