package sim

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// operator is the orchestrator and the admin: now and then it wants something else of the volume.
func (v *vol) operator(delay int64) {
	w := v.w
	w.after(delay, func() {
		if w.failure != nil || w.calm || v.deleted || v.m.Deleted {
			return
		}
		v.operate()
		v.operator(w.between(w.prof.operateEvery/4, w.prof.operateEvery*2))
	})
}

func (v *vol) operate() {
	w := v.w
	if v.lost {
		if v.salvaging == nil {
			v.salvage()
		}
		return
	}
	switch operation(w.prof.operations.draw(&w.schedule)) {
	case opMove:
		v.moveClean(w.pick(len(w.nodes)))
	case opForce:
		v.moveForced(w.pick(len(w.nodes)))
	case opFailover:
		// Whoever serves a volume on a dead node moves it.
		if n := v.nodeOf(v.m.Owner); n != nil && (!n.up || n.paused > w.now || n.cut) {
			for _, i := range shuffled(w.rng, len(w.nodes)) {
				if to := w.nodes[i]; to != n && to.up && !to.cut {
					v.moveForced(i)
					break
				}
			}
		}
	case opSnapshot:
		v.snapshot(false)
	case opGroup:
		if len(w.vols) > 1 {
			w.groupSnapshot()
		} else {
			v.snapshot(false)
		}
	case opUnsnap:
		v.deleteSnapshot()
	case opExpand:
		v.expand()
	case opAdd:
		v.addReplica()
	case opRemove:
		v.removeReplica()
	case opDrain:
		v.drain()
	case opMinInSync:
		n := 1 + w.pick(2)
		if n <= len(v.m.Members) {
			w.count.MinInSync++
			_, _ = v.apply(replication.Change{SetMinInSync: &replication.SetMinInSync{MinInSync: n}})
		}
	case opDelete:
		v.delete()
	case opRogue:
		v.rogue()
	}
}

// moveClean detaches in good order: the client ends, the engine writes everything out, and says so.
func (v *vol) moveClean(to int) {
	g := v.current()
	v.want = to
	if g == nil || g.detaching || v.fencing {
		return
	}
	v.w.count.CleanDetaches++
	v.detachClean(g)
}

func (v *vol) detachClean(g *engine) {
	w := v.w
	g.detaching = true
	if g.client != nil {
		g.client.stopping = true
	}
	w.after(w.between(0, 5*millisecond), func() {
		w.on(g.node, g.life, func() {
			if !g.over {
				g.step(func(now replication.Now) { g.machine.Detach(now) })
			}
		})
	})
	// A node that does not get there is not waited for.
	w.after(w.between(300*millisecond, 900*millisecond), func() {
		if !g.over && v.m.Epoch == g.epoch && !v.m.Deleted && !v.fencing {
			v.moveForced(v.want)
		}
	})
}

// detached carries on when an engine has written everything out, or has nothing to write because it never was live.
func (v *vol) detached(g *engine, clean bool) {
	w := v.w
	if !clean {
		if w.opt.Trace {
			w.tracef("e%d of %s is detached, not clean", g.epoch, v.id)
		}
		g.stop()
		if v.m.Epoch == g.epoch {
			v.moveForced(v.want)
		}
		return
	}
	if w.opt.Trace {
		w.tracef("e%d of %s is detached", g.epoch, v.id)
	}
	w.count.Detached++
	if c := g.client; c != nil {
		c.die()
		// The device is gone in good order: what was acknowledged is durable on all.
		for _, p := range v.isr() {
			v.checkDurable(p, "a clean detach")
		}
	}
	n, epoch := g.node, g.epoch
	g.stop()
	v.attaching = w.now + 30*millisecond
	var say func()
	say = func() {
		v.ask(n, replication.Change{Detach: &replication.Detach{Epoch: epoch, Clean: true}}, func(o replication.CommitOutcome, _ replication.Membership) {
			if o == replication.CommitUnknown && v.m.Epoch == epoch {
				say()
			}
		})
	}
	say()
}

// moveForced takes the volume from its node without that node's help: either the next attach fences, or a fence comes
// first.
func (v *vol) moveForced(to int) {
	w := v.w
	v.want = to
	if v.fencing || v.m.Owner == "" {
		return
	}
	n := w.nodes[to]
	if w.chance(0.5) && n.up {
		w.count.ForcedAttaches++
		v.attach(n, true)
		return
	}
	m, err := v.apply(replication.Change{Detach: &replication.Detach{Silent: w.chance(0.5)}})
	if err != nil {
		return
	}
	w.count.ForcedDetaches++
	v.fence(m)
}

// fence runs an engine that only fences, on a node that is up, until one has got to the end.
func (v *vol) fence(m replication.Membership) {
	w := v.w
	v.fencing = true
	try := shuffled(w.rng, len(w.nodes))
	i := 0
	var next func()
	next = func() {
		if v.m.Epoch != m.Epoch {
			v.fencing = false // another attach came between, and fences itself
		}
		if !v.fencing || w.failure != nil {
			return
		}
		for _, g := range slices.Clone(v.engines) {
			if g.fenceOnly {
				g.stop()
			}
		}
		for range try {
			n := w.nodes[try[i%len(try)]]
			i++
			if n.up && n.paused <= w.now {
				v.startEngine(n, m, true, false)
				break
			}
		}
		w.after(w.between(700*millisecond, 1500*millisecond), next)
	}
	next()
}

func (v *vol) expand() {
	size := max(v.m.Size, v.m.Target) + regionSize*int64(1+v.w.pick(2))
	if size > maxRegions*regionSize {
		return
	}
	v.w.count.Expands++
	_, _ = v.apply(replication.Change{ExpandIntent: &replication.ExpandIntent{Target: size}})
}

// addReplica puts another replica on a node that has none.
func (v *vol) addReplica() bool {
	w := v.w
	if len(v.m.Members) >= min(w.prof.maxReplicas, replication.MaxMembers-2) || v.newPlaces >= maxPlaces {
		return false
	}
	for _, i := range shuffled(w.rng, len(w.nodes)) {
		n := w.nodes[i]
		if !n.up || v.hasPlace(n) {
			continue
		}
		p := v.newPlace(n, int(v.m.Size/blockSize))
		_, err := v.apply(replication.Change{AddReplica: &replication.Member{ID: p.id, Node: n.id, Pool: volume.PoolID("p" + string(n.id))}})
		if err == nil {
			w.count.Added++
		}
		return err == nil
	}
	return false
}

// hasPlace tells whether a node has a replica of the volume, or one that awaits being deleted.
func (v *vol) hasPlace(n *node) bool {
	return slices.ContainsFunc(n.places, func(p *place) bool { return p.v == v })
}

// removeReplica takes one replica away, if others are left.
func (v *vol) removeReplica() {
	if len(v.m.Members) > max(1, v.m.MinInSync) {
		v.remove(v.m.Members[v.w.pick(len(v.m.Members))].ID)
	}
}

// remove evicts a replica and drops it from the record as soon as that is allowed; it gives up after a while.
func (v *vol) remove(id volume.ReplicaID) {
	w := v.w
	left := 30
	var try func()
	try = func() {
		m, ok := v.m.Member(id)
		if !ok || left == 0 || w.calm || w.failure != nil || v.m.Deleted {
			return
		}
		left--
		if m.Role == replication.RoleISR && v.m.Owner != "" {
			if len(v.m.ISR()) == 1 {
				return
			}
			if g := v.current(); g != nil {
				w.on(g.node, g.life, func() {
					if !g.over {
						w.count.Evicted++
						g.step(func(now replication.Now) { g.machine.Evict(now, id) })
					}
				})
			}
		} else if !v.needed(id) {
			if _, err := v.apply(replication.Change{DropReplica: &replication.DropReplica{ID: id}}); err == nil {
				w.count.Removed++
				w.after(w.between(0, 200*millisecond), func() { v.discard(id) })
				return
			}
		}
		w.after(w.between(10*millisecond, 60*millisecond), try)
	}
	try()
}

// needed tells whether a detached in-sync replica must stay: others may not be there to take over.
func (v *vol) needed(id volume.ReplicaID) bool {
	m, _ := v.m.Member(id)
	if m.Role != replication.RoleISR {
		return false
	}
	for _, p := range v.isr() {
		if p.id != id && p.node.up && !p.disk.syncFailed {
			return false
		}
	}
	return true
}

// discard deletes a replica that the record has not got any more.
func (v *vol) discard(id volume.ReplicaID) {
	p := v.place(id)
	if p == nil {
		return
	}
	p.machine = nil
	p.node.places = slices.DeleteFunc(p.node.places, func(x *place) bool { return x == p })
}

// drain empties a node: each replica on it is replaced by one elsewhere.
func (v *vol) drain() {
	w := v.w
	n := w.nodes[w.pick(len(w.nodes))]
	for i := range v.m.Members {
		m := v.m.Members[i]
		if m.Node != n.id {
			continue
		}
		if !v.addReplica() && len(v.m.Members) < 2 {
			return
		}
		w.count.Drains++
		var wait func()
		left := 40
		wait = func() {
			if left--; left == 0 || w.calm || w.failure != nil {
				return
			}
			if len(v.m.ISR()) >= 2 {
				v.remove(m.ID)
				return
			}
			w.after(50*millisecond, wait)
		}
		wait()
		return
	}
}

// rogue asks the controllers for what they must refuse, as a broken engine might.
func (v *vol) rogue() {
	w := v.w
	w.count.Rogues++
	r := &replication.Reconfigure{Epoch: v.m.Epoch, ConfigVersion: v.m.ConfigVersion}
	switch w.pick(3) {
	case 0:
		r.Remove = v.m.ISR()
	case 1:
		r.Epoch--
		r.Remove = v.m.ISR()[:1]
	case 2:
		r.ConfigVersion--
		r.Remove = v.m.ISR()[:1]
	}
	if _, err := v.apply(replication.Change{Reconfigure: r}); err == nil {
		w.fail("S4", "%s was taken", describeChange(&replication.Change{Reconfigure: r}))
	}
}

// delete ends the volume: its epoch rises, whoever serves it is fenced, then its replicas may go.
func (v *vol) delete() {
	w := v.w
	if v.fencing {
		return
	}
	m, err := v.apply(replication.Change{Tombstone: &replication.Tombstone{}})
	if err != nil {
		return
	}
	w.count.Deletes++
	w.tracef("%s is deleted", v.id)
	v.want = -1
	v.fence(m)
}

// salvage is an admin's last resort: no disk in the in-sync set is left, another one is taken as it is.
func (v *vol) salvage() {
	w := v.w
	if v.fencing || v.m.Deleted {
		return
	}
	var best *place
	var seen volume.ConfigVersion
	better := func(p, than *place) bool {
		return than == nil || than.disk.syncFailed && !p.disk.syncFailed || than.disk.syncFailed == p.disk.syncFailed && p.seen.version > than.seen.version
	}
	for i := range v.m.Members {
		p := v.place(v.m.Members[i].ID)
		if p == nil || !p.node.up || p.machine == nil || p.disk.cacheLies {
			continue
		}
		seen = max(seen, p.seen.version)
		if r := p.machine.Role(); (r == replication.RoleISR || r == replication.RoleSTALE) && better(p, best) {
			best = p
		}
	}
	if best == nil {
		return
	}
	if v.m.Owner != "" {
		m, err := v.apply(replication.Change{Detach: &replication.Detach{}})
		if err == nil {
			v.fence(m)
		}
		return
	}
	for _, g := range slices.Clone(v.engines) {
		g.stop()
	}
	if _, err := v.apply(replication.Change{Salvage: &replication.Salvage{ID: best.id, Seen: seen}}); err != nil {
		w.fail("salvage", "%v", err)
		return
	}
	w.count.Salvages++
	v.salvaging = best
	best.disk.syncFailed, best.poisoned = false, false
	v.snaps = nil
	w.tracef("%s is salvaged from %s", v.id, best.id)
}

// snapName draws the name of a new snapshot, or that of one that was aborted: the orchestrator tries again.
func (v *vol) snapName() volume.SnapshotID {
	if v.retryName != "" && v.w.chance(0.8) {
		return v.retryName
	}
	v.snapNames++
	return volume.SnapshotID(fmt.Sprintf("s%d.%d", v.index, v.snapNames))
}
