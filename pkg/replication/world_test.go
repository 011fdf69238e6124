package replication

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// testGeometry is small: 4 blocks of 8 bytes to an extent, 2 extents to a region.
func testGeometry() Geometry {
	return Geometry{Block: 8, Extent: 32, Region: 64, MaxActive: 8, MaxCopy: 64}
}

func testTiming() Timing {
	t := DefaultTiming()
	t.MirrorBelow = 64
	return t
}

// memStore is a replica's store in memory. What is not durable is lost in a power cut.
type memStore struct {
	size             int64
	data, disk       []byte
	state            []byte
	wil              region.Set
	tags             []MissedTag
	missed, durable  map[volume.ReplicaID]*region.Set
	snaps            []SealedSnapshot
	layers           map[volume.SnapshotID][]byte
	failSync, failIO bool
	full             bool // no room to grow
	failRead         bool
	rot              region.Set // bytes whose reads fail
}

func newMemStore(size int64) *memStore {
	return &memStore{size: size, data: make([]byte, size), disk: make([]byte, size), missed: map[volume.ReplicaID]*region.Set{},
		durable: map[volume.ReplicaID]*region.Set{}, layers: map[volume.SnapshotID][]byte{}}
}

func (s *memStore) sync() {
	copy(s.disk, s.data)
	for p, set := range s.missed {
		s.durable[p] = set.Clone()
	}
}

func (s *memStore) power() {
	copy(s.data, s.disk)
	s.missed = map[volume.ReplicaID]*region.Set{}
	for p, set := range s.durable {
		s.missed[p] = set.Clone()
	}
}

func (s *memStore) do(op StoreOp, g Geometry) StoreResult {
	if s.failIO {
		return StoreResult{Status: StatusIO}
	}
	switch op.Kind {
	case StorePersist:
		s.state = op.State
	case StoreMarkWIL:
		s.wil.AddRuns(op.Runs)
	case StoreClearWIL:
		s.wil.RemoveRuns(op.Runs)
	case StoreRead, StoreHash:
		if s.failRead {
			return StoreResult{Status: StatusIO}
		}
		src := s.data
		if op.Snapshot != "" {
			if src = s.layers[op.Snapshot]; src == nil {
				return StoreResult{Status: StatusNotFound}
			}
		}
		b := make([]byte, op.Len)
		if s.rot.HasRange(uint32(op.Off), uint32(op.Off+op.Len)) {
			return StoreResult{Status: StatusIO}
		}
		if op.Off < int64(len(src)) {
			copy(b, src[op.Off:])
		}
		if op.Kind == StoreHash {
			h := sha256.Sum256(b)
			return StoreResult{Data: h[:]}
		}
		return StoreResult{Data: b}
	case StoreWrite, StoreZero:
		if op.Kind == StoreZero {
			clear(s.data[op.Off : op.Off+op.Len])
		} else {
			copy(s.data[op.Off:], op.Data)
		}
		for _, t := range op.Marks {
			s.missed[t.Peer].AddRange(g.extents(op.Off, op.Len))
		}
		if op.FUA {
			copy(s.disk[op.Off:op.Off+op.Len], s.data[op.Off:op.Off+op.Len])
		}
	case StoreSync:
		if s.failSync {
			return StoreResult{Status: StatusIO}
		}
		s.sync()
	case StoreAllocated:
		src, base := s.data, make([]byte, s.size)
		if op.Snapshot != "" {
			src = s.layers[op.Snapshot]
		}
		copy(base, s.layers[op.Set.Base])
		var set region.Set
		for e := int64(0); e*g.Extent < int64(len(src)); e++ {
			to := min((e+1)*g.Extent, int64(len(src)))
			if !bytes.Equal(src[e*g.Extent:to], base[e*g.Extent:to]) {
				set.Add(uint32(e))
			}
		}
		runs, next, more := set.Runs(op.Set.From, 2)
		return StoreResult{Set: &SetPage{Runs: runs, From: next, More: more}}
	case StoreMissed:
		runs, next, more := s.missed[op.Set.Peer].Runs(op.Set.From, 2)
		return StoreResult{Set: &SetPage{Peer: op.Set.Peer, Since: s.tag(op.Set.Peer).Since, Runs: runs, From: next, More: more}}
	case StoreTrack:
		s.tags = append(s.tags, MissedTag{op.Set.Peer, op.Set.Since})
		s.missed[op.Set.Peer], s.durable[op.Set.Peer] = new(region.Set), new(region.Set)
	case StoreDropMissed:
		s.tags = slices.DeleteFunc(s.tags, func(t MissedTag) bool { return op.Set.Peer == "" || t.Peer == op.Set.Peer })
		for p := range s.missed {
			if op.Set.Peer == "" || p == op.Set.Peer {
				delete(s.missed, p)
				delete(s.durable, p)
			}
		}
	case StoreMarkMissed:
		s.tag(op.Set.Peer).Since = op.Set.Since
		s.missed[op.Set.Peer].AddRuns(op.Set.Runs)
		s.durable[op.Set.Peer] = s.missed[op.Set.Peer].Clone()
	case StoreSeal:
		if s.failSync {
			return StoreResult{Status: StatusIO}
		}
		s.sync()
		s.snaps = slices.DeleteFunc(s.snaps, func(x SealedSnapshot) bool { return x.ID == op.Snapshot })
		s.snaps = append(s.snaps, SealedSnapshot{op.Snapshot, op.Number})
		s.layers[op.Snapshot] = bytes.Clone(s.data)
	case StoreResize:
		if s.full {
			return StoreResult{Status: StatusRefused}
		}
		s.data = append(s.data, make([]byte, op.Len-s.size)...)
		s.disk = append(s.disk, make([]byte, op.Len-s.size)...)
		s.size = op.Len
	}
	return StoreResult{}
}

func (s *memStore) tag(p volume.ReplicaID) *MissedTag {
	i := slices.IndexFunc(s.tags, func(t MissedTag) bool { return t.Peer == p })
	return &s.tags[i]
}

// host is a replica with its store.
type host struct {
	id          volume.ReplicaID
	node        volume.NodeID
	incarnation Incarnation
	boot        BootID
	store       *memStore
	r           *Replica
	up, cut     bool // running; cut off from the engine
	hang        bool // its store does not finish what it is given
	pending     []StoreOp
	conn        uint64
}

// world wires one engine at a time, replicas and controllers together. Everything that can happen happens at once, in
// order, unless it is held.
type world struct {
	g      Geometry
	t      Timing
	rules  Rules
	now    Now
	m      Membership
	hosts  []*host
	e      *Engine
	queue  []func()
	down   bool // controllers
	late   bool // controllers apply, and the answer is lost
	log    []string
	tag    uint64
	answer map[uint64]Effect
	trace  bool
}

func newWorld(replicas int, size int64) *world {
	w := &world{g: testGeometry(), t: testTiming(), now: Second, answer: map[uint64]Effect{}}
	var members []Member
	for i := range replicas {
		h := w.addHost(fmt.Sprintf("r%d", i+1), size)
		members = append(members, Member{ID: h.id, Node: h.node, Pool: volume.PoolID("p" + string(h.id)), Incarnation: h.incarnation})
	}
	var err error
	if w.m, err = NewMembership("vol", size, 1, members); err != nil {
		panic(err)
	}
	return w
}

func (w *world) addHost(id string, size int64) *host {
	h := &host{id: volume.ReplicaID(id), node: volume.NodeID("n" + id[1:]), incarnation: Incarnation(100 + len(w.hosts)),
		boot: 0, store: newMemStore(size)}
	w.hosts = append(w.hosts, h)
	w.boot(h)
	return h
}

func (w *world) boot(h *host) {
	h.boot++
	h.up, h.hang, h.pending = true, false, nil
	r, err := NewReplica(ReplicaConfig{Volume: "vol", Replica: h.id, Incarnation: h.incarnation, BootID: h.boot, Geometry: w.g,
		Timing: w.t, Rules: w.rules}, Stored{State: h.store.state, WIL: runsOf(&h.store.wil), Missed: h.store.tags, Size: h.store.size,
		Snapshots: h.store.snaps}, w.now)
	if err != nil {
		panic(err)
	}
	h.r = r
}

func runsOf(s *region.Set) []region.Run {
	runs, _, _ := s.Runs(0, s.Len())
	return runs
}

func (w *world) host(id string) *host {
	for _, h := range w.hosts {
		if string(h.id) == id {
			return h
		}
	}
	panic("no replica " + id)
}

func (w *world) printf(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

// run lets everything happen that can.
func (w *world) run() {
	for i := 0; len(w.queue) > 0; i++ {
		if i > 200000 {
			panic("does not come to rest")
		}
		f := w.queue[0]
		w.queue = w.queue[1:]
		f()
	}
}

// effects carries out what the engine wants.
func (w *world) effects() {
	e := w.e
	for _, f := range slices.Clone(e.Effects()) {
		switch f.Kind {
		case EffectSend:
			w.send(e, f.Msg)
		case EffectCommit:
			w.commit(e, f)
		case EffectReconnect:
			w.host(string(f.Replica)).conn++
			h := w.host(string(f.Replica))
			w.queue = append(w.queue, func() { w.connect(e, h) })
		case EffectAnswer:
			w.answer[f.Tag] = f
			w.printf("answer %d %s%s", f.Tag, resultName(f), f.Data)
		case EffectLive:
			w.printf("live")
		case EffectFailed:
			w.printf("device failed: %s", f.Reason)
		case EffectFenced:
			w.printf("fenced")
		case EffectDetached:
			w.printf("detached")
		case EffectResized:
			w.printf("size %d", f.Size)
		case EffectDrained:
			w.printf("barrier %d drained", f.Number)
		case EffectSealed:
			w.printf("barrier %d sealed", f.Number)
		case EffectBarrier:
			w.printf("barrier %d %s %v", f.Number, strings.TrimSpace(resultName(Effect{Result: f.Result})), f.Holders)
		}
	}
}

func resultName(f Effect) string {
	switch f.Result {
	case ResultOK:
		return "ok "
	case ResultIO:
		return "i/o error "
	case ResultRange:
		return "out of range "
	}
	return "gone "
}

func (w *world) connect(e *Engine, h *host) {
	if e == nil || e != w.e || !h.up || h.cut || e.phase == phaseOver {
		return
	}
	h.conn++
	e.Connected(w.now, h.id)
	w.effects()
}

func (w *world) disconnect(h *host) {
	h.conn++
	if w.e != nil {
		w.e.Disconnected(w.now, h.id)
		w.effects()
	}
}

func (w *world) send(e *Engine, m Message) {
	h := w.host(string(m.Replica))
	conn := h.conn
	if w.trace {
		w.printf("  %s <- %s", h.id, describe(m))
	}
	w.queue = append(w.queue, func() {
		if h.conn != conn || !h.up || h.cut {
			return
		}
		m.Conn = conn
		h.r.Receive(w.now, &m)
		w.replica(e, h)
	})
}

func (w *world) replica(e *Engine, h *host) {
	for _, f := range slices.Clone(h.r.Effects()) {
		if f.Answer {
			m := f.Msg
			w.queue = append(w.queue, func() {
				if m.Conn != h.conn || h.cut || e != w.e {
					return
				}
				if w.trace {
					w.printf("  %s -> %s", h.id, describe(m))
				}
				e.Receive(w.now, &m)
				w.effects()
			})
			continue
		}
		if h.hang {
			h.pending = append(h.pending, f.Store)
			continue
		}
		w.queue = append(w.queue, func() { w.store(e, h, f.Store) })
	}
}

func (w *world) store(e *Engine, h *host, op StoreOp) {
	r := h.r
	if !h.up {
		return
	}
	if h.hang {
		h.pending = append(h.pending, op)
		return
	}
	r.Done(w.now, op.ID, h.store.do(op, w.g))
	w.replica(e, h)
}

func describe(m Message) string {
	s := m.Kind.String()
	if m.Reply && m.Status != StatusOK {
		s += " " + m.Status.String()
	}
	switch m.Kind {
	case KindRead, KindWrite, KindZero, KindHash:
		if m.Reply {
			break
		}
		s += fmt.Sprintf(" %d+%d", m.Off, m.Len)
	case KindConfigure:
		if m.Config != nil {
			s += fmt.Sprintf(" v%d %s isr=%v", m.Config.ConfigVersion, m.Config.Role, m.Config.ISR)
			for _, a := range m.Config.Absent {
				s += fmt.Sprintf(" absent=%s@%d", a.ID, a.Since)
			}
		}
	case KindFence:
		if f := m.Fence; f != nil {
			s += fmt.Sprintf(" v%d %s wil=%v missed=%v", f.ConfigVersion, f.Role, f.WIL, f.Missed)
		}
	case KindMarkMissed, KindMissed:
		if m.Set != nil {
			s += fmt.Sprintf(" %s %v", m.Set.Peer, m.Set.Runs)
		}
	}
	return s
}

func (w *world) commit(e *Engine, f Effect) {
	w.queue = append(w.queue, func() {
		if w.down {
			e.Committed(w.now, f.Commit, CommitUnknown, Membership{})
			w.effects()
			return
		}
		n, err := w.m.ApplyWithout(f.Change, w.rules)
		outcome := CommitDone
		if err != nil {
			outcome, n = CommitRefused, w.m
		} else {
			w.m = n
			w.printf("commit v%d isr=%v", n.ConfigVersion, n.ISR())
		}
		if w.late {
			outcome, n = CommitUnknown, Membership{}
		}
		e.Committed(w.now, f.Commit, outcome, n)
		w.effects()
	})
}

// change is a change by someone else than the engine.
func (w *world) change(c Change) error {
	n, err := w.m.ApplyWithout(c, w.rules)
	if err != nil {
		return err
	}
	w.m = n
	if w.e != nil {
		w.e.Learned(w.now, n)
		w.effects()
	}
	return nil
}

func (w *world) attach(node volume.NodeID, cfg EngineConfig) error {
	if err := w.change(Change{Attach: &Attach{Node: node, Force: true}}); err != nil {
		return err
	}
	cfg.Node, cfg.Geometry, cfg.Timing, cfg.Rules = node, w.g, w.t, w.rules
	e, err := NewEngine(cfg, w.m, w.now)
	if err != nil {
		return err
	}
	e.window, e.rate = MaxWindow, 0 // tests of the pace set one
	w.e = e
	for _, h := range w.hosts {
		w.queue = append(w.queue, func() { w.connect(e, h) })
	}
	return nil
}

// advance lets time pass, waking the engine when it wants to be woken.
func (w *world) advance(d Now) {
	end := w.now + d
	w.run()
	for w.e != nil {
		at := w.e.NextWake()
		if at > end {
			break
		}
		w.now = max(w.now, at)
		w.e.Tick(w.now)
		w.effects()
		w.run()
		if at == w.e.NextWake() && at <= w.now {
			w.now += Millisecond
		}
	}
	w.now = max(w.now, end)
	if w.e != nil {
		w.e.Tick(w.now)
		w.effects()
	}
	w.run()
}

// differ lists the blocks in which members of the in-sync set differ, outside of their write-intent logs.
func (w *world) differ() []int64 {
	var first *host
	bad := map[int64]bool{}
	for _, id := range w.m.ISR() {
		h := w.host(string(id))
		if first == nil {
			first = h
			continue
		}
		for off := int64(0); off < w.m.Size; off += w.g.Block {
			if !bytes.Equal(first.store.data[off:off+w.g.Block], h.store.data[off:off+w.g.Block]) {
				bad[off] = true
			}
		}
	}
	list := slices.Collect(maps.Keys(bad))
	sort.Slice(list, func(i, j int) bool { return list[i] < list[j] })
	return list
}
