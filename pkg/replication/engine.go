package replication

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// EngineConfig is what an Engine is made of.
type EngineConfig struct {
	// Node is where the engine runs: a replica there is preferred for reads.
	Node     volume.NodeID
	Geometry Geometry
	Timing   Timing
	Rules    Rules
	// FenceOnly makes an engine that fences an older one, waits out its lease, says EffectFenced and is over.
	FenceOnly bool
	// DeviceKept says that the kernel device of an engine before this one lives on, so that its client still counts on
	// writes that were not flushed.
	DeviceKept bool
}

type phase uint8

const (
	phaseFencing    phase = iota // speaking to members; waiting out leases
	phaseCommitting              // recording who is there
	phaseMarking                 // handing out the configuration and what non-members miss
	phaseLive
	phaseOver
)

// Engine is the one writer of an attached volume. It keeps all in-sync members identical, and acknowledges what all of
// them have.
type Engine struct {
	cfg   EngineConfig
	g     Geometry
	now   Now
	out   []Effect
	phase phase
	m     Membership
	size  int64 // exposed

	members [MaxMembers]*member
	// isr is the committed in-sync set. A commit under way adds or removes; until its outcome is known both count.
	isr, adding, removing PeerSet
	// failed members are to be removed: nothing is sent to them. Those in lost can never come back as they are.
	failed, lost PeerSet
	// mirrors are targets of a resync that get all writes; acknowledgements wait for those in final.
	mirrors, final PeerSet
	// absent are the non-members that are tracked; removedHere those of them that this engine removed.
	absent, removedHere PeerSet
	// unsynced are members that have not got the newest configuration, or what others missed.
	unsynced PeerSet
	confGen  uint64
	session  Session
	src      Slot // preferred for reads

	calls  pendingTable
	ops    opList   // holding or awaiting a range lock, in order of arrival
	parked []*op    // not yet admitted
	held   []*op    // reads that are complete and await the lease
	short  []uint64 // writes that all members have, who are not enough
	free   *op
	leased Now // how long an older engine's lease may run

	// u is what was sent to any member since the last flush of all: a superset of what one may lose.
	u      region.Generations
	uBytes int64
	// unlogged: the volume has one replica, which keeps no write-intent log; so it is unknown, until the first flush, what
	// an engine before this one did not flush. A second replica is added after the round loggedFrom.
	unlogged, unknown bool
	loggedFrom        uint64

	active     activeRegions
	dirty      region.Set // regions not yet reconciled since the attach
	recon      map[uint32]*reconcile
	flush      flushRound
	commit     *commit
	commits    uint64
	barrier    *barrierState
	expand     expandState
	window     int64 // bytes of copies in flight
	rate       int64 // bytes of copies that begin in a second; 0 is no bound
	copyAt     Now   // when the next may begin
	copying    int64
	firstFence Now
	detaching  bool
	mismatches int // comparisons that found a difference
	retryAt    Now // a last member's failed writes are tried again

	recheck, retry bool
	// pumped and ticked are when pump and Tick last looked at what is due.
	pumped, ticked Now
}

// NewEngine returns the engine of a volume that was just attached: m is the record after Attach. Only a live one serves:
// operations that come before wait.
func NewEngine(cfg EngineConfig, m Membership, now Now) (*Engine, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.Clean && !cfg.FenceOnly {
		return nil, fmt.Errorf("engine of volume %s: the record says that none runs; attach first: %w", m.Volume, volume.ErrInvalid)
	}
	if !cfg.Geometry.valid() || m.Size%cfg.Geometry.Block != 0 {
		return nil, fmt.Errorf("engine of volume %s: geometry: %w", m.Volume, volume.ErrInvalid)
	}
	e := &Engine{cfg: cfg, g: cfg.Geometry, now: now, m: m, size: m.Size, recon: map[uint32]*reconcile{}, confGen: 1,
		window: MinWindow, rate: StartRate, firstFence: Never, retryAt: Never}
	e.active.init()
	e.flush.last = now
	e.placeMembers()
	e.isr = e.committed()
	e.trackAbsent()
	return e, nil
}

// placeMembers gives each replica of the record a slot, and takes back those of replicas that are gone.
func (e *Engine) placeMembers() {
	for s, m := range e.members {
		if m == nil {
			continue
		}
		rec, ok := e.m.Member(m.id)
		if !ok {
			e.dropTarget(m)
			e.disconnect(m)
			e.members[s] = nil
			continue
		}
		m.rec = rec
	}
	for _, rec := range e.m.Members {
		if e.member(rec.ID) != nil {
			continue
		}
		for s := range e.members {
			if e.members[s] == nil {
				e.members[s] = &member{slot: Slot(s), id: rec.ID, rec: rec, local: rec.Node == e.cfg.Node, lastAck: longAgo, nudged: longAgo,
					downSince: e.now, bootsAt: rec.BootID}
				break
			}
		}
	}
}

func (e *Engine) member(id volume.ReplicaID) *member {
	for _, m := range e.members {
		if m != nil && m.id == id {
			return m
		}
	}
	return nil
}

// committed is the in-sync set of the record, in slots.
func (e *Engine) committed() PeerSet {
	var set PeerSet
	for _, m := range e.members {
		if m != nil && m.rec.Role == RoleISR {
			set = set.With(m.slot)
		}
	}
	return set
}

// trackAbsent finds which non-members are worth tracking: those that were members once.
func (e *Engine) trackAbsent() {
	e.absent = 0
	for _, m := range e.members {
		if m != nil && m.rec.Role == RoleSTALE && m.rec.RemovedAt > 0 {
			e.absent = e.absent.With(m.slot)
		}
	}
}

// maxISR is everyone who may be in the committed in-sync set.
func (e *Engine) maxISR() PeerSet {
	if e.cfg.Rules.WithoutMaxISR {
		return e.isr &^ e.removing
	}
	return e.isr | e.adding
}

// acking is everyone for whom acknowledgements wait.
func (e *Engine) acking() PeerSet {
	set := e.maxISR() | e.final
	if e.cfg.Rules.WithoutShrinkBeforeAck {
		set &^= e.failed
	}
	return set
}

// Effects returns what is to be done since the last call. The slice is valid until the next event.
func (e *Engine) Effects() []Effect {
	out := e.out
	e.out = e.out[:0]
	return out
}

// emit appends an effect to be filled in.
func (e *Engine) emit(k EffectKind) *Effect {
	if n := len(e.out); n < cap(e.out) {
		e.out = e.out[:n+1]
		e.out[n] = Effect{Kind: k}
		return &e.out[n]
	}
	e.out = append(e.out, Effect{Kind: k})
	return &e.out[len(e.out)-1]
}

// begin is called first in every event; it tells whether there is anything to be done.
func (e *Engine) begin(now Now) bool {
	e.now = max(e.now, now)
	return e.phase != phaseOver
}

// pump carries on what an event made possible.
func (e *Engine) pump() {
	for e.phase != phaseOver {
		e.attachProgress()
		switch {
		case e.phase == phaseOver:
		case e.recheck:
			e.recheck = false
			e.settleAll()
		case e.retry:
			e.retry = false
			e.admitParked()
		default:
			if e.background(); !e.recheck && !e.retry {
				e.pumped = e.now
				return
			}
		}
	}
}

// background carries on all that is not an operation of the client.
func (e *Engine) background() {
	e.reconcileProgress()
	e.flushProgress()
	e.barrierProgress()
	e.expandProgress()
	e.resyncProgress()
	e.propose()
	e.detachProgress()
}

// over ends the engine.
func (e *Engine) over(kind EffectKind, why Reason) {
	clean := e.phase == phaseLive
	e.phase = phaseOver
	for o := e.ops.first; o != nil; {
		next := o.next
		if o.client() && !o.answered {
			e.answer(o, ResultGone)
		}
		o = next
	}
	for _, o := range e.parked {
		e.answer(o, ResultGone)
	}
	for _, tag := range slices.Concat(e.short, e.flush.waiting, e.flush.current) {
		f := e.emit(EffectAnswer)
		f.Tag, f.Result = tag, ResultGone
	}
	if b := e.barrier; b != nil {
		f := e.emit(EffectBarrier)
		f.Number, f.Result, f.Version = b.b.Number, ResultGone, b.b.ConfigVersion
	}
	e.ops, e.parked, e.held, e.short, e.flush = opList{}, nil, nil, nil, flushRound{}
	f := e.emit(kind)
	f.Reason = why
	if kind == EffectDetached && !clean {
		f.Result = ResultIO
	}
}

// Learned gives the engine a newer record of its volume: members come and go, a size is asked for.
func (e *Engine) Learned(now Now, m Membership) {
	if !e.begin(now) || m.Revision <= e.m.Revision {
		return
	}
	e.learn(m)
	e.pump()
}

// superseded tells whether the record is that of another epoch, and ends the engine then.
func (e *Engine) superseded(m *Membership) bool {
	if m.Epoch == e.m.Epoch && !m.Deleted || e.cfg.Rules.WithoutSupersededStop {
		return false
	}
	if m.Epoch < e.m.Epoch {
		return false
	}
	e.over(EffectFailed, ReasonSuperseded)
	return true
}

func (e *Engine) learn(m Membership) {
	if e.superseded(&m) || m.Epoch != e.m.Epoch {
		return
	}
	if e.commit != nil && m.ConfigVersion > e.m.ConfigVersion {
		e.committedDone(m) // only this engine changes the version in its epoch
		return
	}
	e.adopt(m)
}

// Tick tells the time. It is due at NextWake, and harmless at any other.
func (e *Engine) Tick(now Now) {
	if !e.begin(now) {
		return
	}
	for _, m := range e.members {
		if m != nil {
			e.watch(m)
		}
		if e.phase == phaseOver {
			return
		}
	}
	if e.now >= e.retryAt {
		e.retryAt = Never
		for _, m := range e.members {
			if m != nil && m.ready {
				e.catchUp(m)
			}
		}
	}
	e.ticked = e.now
	e.commitTick()
	e.barrierTick()
	e.pump()
}

// NextWake is when Tick is due next; Never for an idle volume.
func (e *Engine) NextWake() Now {
	if e.phase == phaseOver {
		return Never
	}
	at := e.retryAt
	for _, m := range e.members {
		if m != nil {
			at = min(at, e.watchAt(m))
		}
	}
	if e.phase == phaseFencing && e.firstFence != Never {
		for _, due := range []Now{e.leased, e.firstFence + e.cfg.Timing.AttachWait} {
			if due > e.pumped {
				at = min(at, due)
			}
		}
	}
	if e.commit != nil {
		at = min(at, e.commit.retryAt)
	}
	if e.barrier != nil {
		at = min(at, e.barrier.until)
	}
	at = min(at, e.flushWake(), e.resyncWake())
	return max(at, e.now)
}
