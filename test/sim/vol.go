package sim

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxPlaces bounds the replicas that a volume has had in a run.
const maxPlaces = 24

// vol is one volume: the controllers' record, the replicas, whoever serves it, and what its bytes may be.
type vol struct {
	w      *world
	index  int
	id     volume.ID
	m      replication.Membership
	log    []replication.Change
	past   []replication.Membership // the records before m, oldest first
	rolled bool                     // m is an old one, until an engine goes live with it
	// misled are the epochs that began while it was.
	misled map[volume.Epoch]bool
	first  replication.Membership
	oracle *oracle
	places []*place
	conns  map[uint64]*conn

	engines   []*engine
	client    *client // of the engine that went live last
	liveEpoch volume.Epoch
	// foreign counts attaches by another node and detaches: a kept kernel device is good only without any.
	foreign   uint64
	foreignAt map[volume.Epoch]uint64

	want      int // the node that the volume is to be attached to, -1 for none
	attaching int64
	fencing   bool // a forced detach waits for its fence
	// between: a fence ended the last client, and no engine is live yet. Nothing of the old one is acknowledged any more, but
	// its writes may still land on members that the fence did not reach.
	between   bool
	tags      uint64
	newPlaces int
	pend      *pending
	barriers  map[uint64]replication.Barrier // all there ever were
	snaps     []*snapshot
	snapNames int
	retryName volume.SnapshotID
	lost      bool   // no disk is left that has what was promised
	deleted   bool   // and fenced
	salvaging *place // was chosen; what it holds when the next engine is live is the volume
	asks      int    // changes of the in-sync set that are under way
	// gone are the last engines that were live on a node and ended.
	gone map[volume.NodeID]volume.Epoch
}

// snapshot is a ready one.
type snapshot struct {
	id      volume.SnapshotID
	number  uint64
	content []uint64
	holders []volume.ReplicaID
}

func (w *world) newVol(index int) *vol {
	p := &w.prof
	v := &vol{w: w, index: index, id: volume.ID(fmt.Sprintf("v%d", index)), conns: map[uint64]*conn{}, foreignAt: map[volume.Epoch]uint64{}, barriers: map[uint64]replication.Barrier{},
		misled: map[volume.Epoch]bool{}, gone: map[volume.NodeID]volume.Epoch{}, want: -1}
	v.oracle = newOracle(p.regions * blocksPerRegion)
	var members []replication.Member
	for _, n := range shuffled(w.rng, len(w.nodes))[:p.replicas] {
		pl := v.newPlace(w.nodes[n], p.regions*blocksPerRegion)
		members = append(members, replication.Member{ID: pl.id, Node: pl.node.id, Pool: volume.PoolID("p" + string(pl.node.id))})
	}
	m, err := replication.NewMembership(v.id, int64(p.regions)*regionSize, min(p.minInSync, p.replicas), members)
	if err != nil {
		panic(err)
	}
	v.m, v.first = m, m
	return v
}

// newPlace makes an empty replica on a node.
func (v *vol) newPlace(n *node, blocks int) *place {
	p := &place{w: v.w, v: v, index: v.newPlaces, id: volume.ReplicaID(fmt.Sprintf("r%d.%d", v.index, v.newPlaces)), node: n, disk: newDisk(v.w.id(), blocks)}
	v.newPlaces++
	v.places = append(v.places, p)
	n.places = append(n.places, p)
	if n.up {
		p.open()
	}
	return p
}

func (v *vol) place(id volume.ReplicaID) *place {
	for _, p := range v.places {
		if p.id == id {
			return p
		}
	}
	return nil
}

// isr are the committed members' places.
func (v *vol) isr() []*place {
	out := make([]*place, 0, replication.MaxMembers)
	for i := range v.m.Members {
		if m := &v.m.Members[i]; m.Role == replication.RoleISR {
			if p := v.place(m.ID); p != nil && v.sameDisk(m, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// sameDisk tells whether the replica is still on the disk that the record names.
func (v *vol) sameDisk(m *replication.Member, p *place) bool {
	return m.Incarnation == 0 || uint64(m.Incarnation) == p.disk.incarnation
}

func (v *vol) nextTag() uint64 {
	v.tags++
	return v.tags
}

func (v *vol) nodeOf(id volume.NodeID) *node {
	for _, n := range v.w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// current is the engine that the controllers' record means, where it runs.
func (v *vol) current() *engine {
	for _, g := range v.engines {
		if g.epoch == v.m.Epoch && !g.over && !g.fenceOnly && g.node.up {
			return g
		}
	}
	return nil
}

func (v *vol) dropEngine(g *engine) {
	v.engines = slices.DeleteFunc(v.engines, func(x *engine) bool { return x == g })
	g.node.engines = slices.DeleteFunc(g.node.engines, func(x *engine) bool { return x == g })
}

// supersede records that nothing of a lower epoch counts any more: a newer engine is live, or has fenced.
func (v *vol) supersede(epoch volume.Epoch) {
	if epoch <= v.liveEpoch {
		return
	}
	v.liveEpoch = epoch
	if c := v.client; c != nil {
		c.superseded = true
		if c.kept {
			c.die()
		}
	}
	v.oracle.crash()
}

// resized exposes a size to the client.
func (v *vol) resized(g *engine, size int64) {
	w := v.w
	w.count.Resized++
	blocks := int(size / blockSize)
	for _, p := range v.isr() {
		if len(p.disk.cells) < blocks && g.epoch == v.m.Epoch && !v.rolled {
			w.fail("S14", "e%d exposes %d blocks, %s has %d", g.epoch, blocks, p.id, len(p.disk.cells))
		}
	}
	if w.opt.Trace {
		w.tracef("e%d of %s exposes %d blocks", g.epoch, v.id, blocks)
	}
	if g.client != nil && !g.client.superseded {
		v.oracle.grow(blocks)
		g.client.blocks = max(g.client.blocks, blocks)
	}
}

// ask sends a change to the controllers from a node, and calls done with what its carrier learns: at most once.
func (v *vol) ask(n *node, c replication.Change, done func(replication.CommitOutcome, replication.Membership)) {
	w := v.w
	life := n.life
	answered := false
	finish := func(o replication.CommitOutcome, m replication.Membership) {
		w.on(n, life, func() {
			if !answered {
				answered = true
				done(o, m)
			}
		})
	}
	unreachable := func() bool { return n.cut || w.ctlDown > w.now }
	w.after(w.between(60*millisecond, 200*millisecond), func() { finish(replication.CommitUnknown, replication.Membership{}) })
	changesISR := c.Reconfigure != nil
	if changesISR {
		v.asks++
	}
	attempt := func(last bool) {
		if last && changesISR {
			v.asks--
		}
		if unreachable() {
			w.count.CtlLost++
			return
		}
		m, err := v.apply(c)
		if w.chance(w.prof.ctlLost) {
			w.count.CtlReplyLost++
			return
		}
		w.after(w.prof.controlDelay(&w.schedule), func() {
			if unreachable() {
				w.count.CtlReplyLost++
				return
			}
			if err != nil {
				finish(replication.CommitRefused, m)
			} else {
				finish(replication.CommitDone, m)
			}
		})
	}
	delay := w.prof.controlDelay(&w.schedule)
	if w.chance(w.prof.ctlLost) {
		if w.chance(0.5) {
			w.count.CtlLost++
			if changesISR {
				v.asks--
			}
			return
		}
		w.count.CtlLate++
		delay += w.between(100*millisecond, 600*millisecond)
	}
	again := w.chance(w.prof.ctlAgain)
	w.after(delay, func() { attempt(!again) })
	if again {
		w.count.CtlTwice++
		w.after(delay+w.wide(millisecond, 300*millisecond), func() { attempt(true) })
	}
}

// apply is the controllers: a linearizable store. A refusal comes with the current record.
func (v *vol) apply(c replication.Change) (replication.Membership, error) {
	w := v.w
	old := v.m
	m, err := old.ApplyWithout(c, w.opt.Rules)
	if err != nil {
		if w.opt.Trace {
			w.tracef("controllers refuse %s: %v", describeChange(&c), err)
		}
		return old, err
	}
	v.log = append(v.log, c)
	v.past = append(v.past, old)
	v.m = m
	w.dirty = true
	switch {
	case c.Attach != nil:
		if c.Attach.Node != old.Owner {
			v.foreign++
		}
		v.foreignAt[m.Epoch] = v.foreign
		v.misled[m.Epoch] = v.rolled
	case c.Detach != nil || c.Tombstone != nil || c.Salvage != nil:
		v.foreign++
	}
	if w.opt.Trace {
		w.tracef("controllers apply %s -> e%d cfgver %d isr %v", describeChange(&c), m.Epoch, m.ConfigVersion, m.ISR())
	}
	v.checkChange(&old, &m, &c)
	if old.Barrier != nil && m.Barrier == nil && c.Complete == nil {
		v.aborted()
	}
	for _, g := range v.engines {
		if !w.chance(w.prof.ctlLost) {
			g.tell(m)
		}
	}
	return m, nil
}

// start is the volume's first attach.
func (v *vol) start() {
	v.want = v.w.pick(len(v.w.nodes))
	v.agent()
	v.operator(v.w.between(0, v.w.prof.operateEvery))
}

// agent is what nodes and controllers do by themselves, over and over: attach where the volume is wanted, tell engines
// the newest record, delete what aborted snapshots left.
func (v *vol) agent() {
	w := v.w
	w.after(w.between(15*millisecond, 45*millisecond), v.agent)
	if w.failure != nil || v.deleted {
		return
	}
	for _, g := range v.engines {
		if g.epoch != v.m.Epoch || w.chance(0.2) {
			g.tell(v.m)
		}
	}
	v.cleanLayers()
	for _, p := range v.places {
		if p.node.up && p.node.paused <= w.now && w.chance(0.02) {
			p.rest()
		}
	}
	if v.pend != nil {
		v.pend.watch()
	}
	if v.lost && v.salvaging == nil {
		if w.calm {
			v.salvage()
		}
		return
	}
	if v.want < 0 || v.m.Deleted || v.fencing || v.current() != nil || w.now < v.attaching {
		return
	}
	n := w.nodes[v.want]
	if !n.up || n.paused > w.now || n.cut {
		return
	}
	v.attach(n, v.m.Owner != "" && v.m.Owner != n.id)
}

// attach has a node ask for the volume, and start its engine.
func (v *vol) attach(n *node, force bool) {
	w := v.w
	v.attaching = w.now + 250*millisecond
	life := n.life
	if w.chance(0.3) {
		if _, err := v.apply(replication.Change{Attach: &replication.Attach{Node: n.id, Force: force, Assign: true}}); err == nil {
			w.count.Assigned++
		}
	}
	var gone volume.Epoch
	if !slices.ContainsFunc(v.engines, func(g *engine) bool { return g.node == n && !g.fenceOnly }) {
		gone = v.gone[n.id]
	}
	v.ask(n, replication.Change{Attach: &replication.Attach{Node: n.id, Force: force, Gone: gone}}, func(o replication.CommitOutcome, m replication.Membership) {
		v.attaching = 0
		if o != replication.CommitDone || n.life != life {
			return
		}
		if m.SkipLease && gone == m.Epoch-1 {
			w.count.Gone++
		}
		for _, g := range slices.Clone(v.engines) {
			if g.node != n || g.fenceOnly {
				continue
			}
			if g.epoch >= m.Epoch {
				return
			}
			// The node replaces its own engine; the device of the old one ends with it.
			if g.client != nil {
				g.client.die()
			}
			g.stop()
		}
		c := v.client
		kept := c != nil && c.kept && c.node == n && c.foreign == v.foreignAt[m.Epoch]
		if c != nil && c.kept && c.node == n && !kept {
			c.die()
		}
		v.startEngine(n, m, false, kept)
	})
}

// engineFailed is a node's reaction to an engine that is over: the device fails, the controllers attach again.
func (v *vol) engineFailed(g *engine, why replication.Reason) {
	v.attaching = v.w.now + v.w.between(millisecond, 50*millisecond)
	if why == replication.ReasonRolledBack && !v.misled[g.epoch] {
		v.w.fail("S12", "e%d found the controllers rolled back", g.epoch)
	}
}

// fencedBy ends a forced detach.
func (v *vol) fencedBy(*engine) {
	v.fencing = false
	if v.m.Deleted {
		v.deleted = true
	}
}
