package sim

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// check looks at one volume after an event: what must hold at every moment.
func (v *vol) check() {
	if v.deleted || v.lost || v.rolled || v.w.failure != nil {
		return
	}
	isr := v.isr()
	v.checkLost(isr)
	if v.lost {
		return
	}
	for _, p := range isr {
		v.checkDurable(p, "any moment")
	}
	v.checkLive(isr)
	v.checkDiffering(isr)
	v.checkAbsent(isr)
	v.checkLog(isr)
	v.checkSnapshots()
}

// checkLost notes that the faults went too far: every disk of the in-sync set was replaced, or a sync failed on each of
// several. Then nothing was promised, as long as nothing is served. (A single one whose sync failed holds what was flushed.)
func (v *vol) checkLost(isr []*place) {
	for _, p := range isr {
		if !p.disk.syncFailed || len(v.m.ISR()) == 1 {
			return
		}
	}
	v.lost = true
	v.w.count.Lost++
	v.w.tracef("%s has lost its last disk", v.id)
	if c := v.client; c != nil {
		c.die()
	}
}

// checkDurable is S2: whatever a committed member may come back with is at least as new as what was flushed.
func (v *vol) checkDurable(p *place, when string) {
	for b := range v.oracle.blocks {
		if b >= len(p.disk.cells) {
			if !v.oracle.allowedAfterCrash(b, 0) {
				v.w.fail("S2", "%s (%s): block %d is beyond its end, must be %s", p.id, when, b, v.oracle.names(v.oracle.blocks[b].base))
			}
			continue
		}
		c := &p.disk.cells[b]
		bad := func(x uint64) bool { return !v.oracle.allowedAfterCrash(b, x) }
		switch {
		case bad(c.durable):
			v.w.fail("S2", "%s (%s): block %d is %s on the platter, flushed was %s", p.id, when, b, v.oracle.name(c.durable), v.oracle.names(v.oracle.blocks[b].base))
			return
		case bad(c.cache):
			v.w.fail("S2", "%s (%s): block %d is %s in the cache, flushed was %s", p.id, when, b, v.oracle.name(c.cache), v.oracle.names(v.oracle.blocks[b].base))
			return
		}
		for _, u := range c.unsynced {
			if bad(u.value) {
				v.w.fail("S2", "%s (%s): block %d may become %s, flushed was %s", p.id, when, b, v.oracle.name(u.value), v.oracle.names(v.oracle.blocks[b].base))
				return
			}
		}
	}
}

// checkLive is S3 and S10: as long as a client is served, each committed member that was not restarted under it holds, block
// by block, what the client may read now.
func (v *vol) checkLive(isr []*place) {
	c := v.client
	if c == nil || c.dead || c.superseded {
		return
	}
	for _, p := range isr {
		if p.machine == nil || p.opened > c.began && p.opened > p.addedAt || p.poisoned {
			continue
		}
		for b := range v.oracle.blocks {
			x := uint64(0)
			if b < len(p.disk.cells) {
				x = p.disk.cells[b].cache
			}
			if !v.oracle.allowedNow(b, x) {
				v.w.fail("S3", "%s is in sync, but its block %d is %s, acknowledged was %s", p.id, b, v.oracle.name(x), v.oracle.names(v.oracle.blocks[b].cur))
				return
			}
		}
	}
}

// checkDiffering is S10 across crashes: where two members may differ after a loss of power, the write-intent log of one of
// them says so.
func (v *vol) checkDiffering(isr []*place) {
	for i, p := range isr {
		for _, q := range isr[:i] {
			logged := p.disk.wil | q.disk.wil
			for b := range min(len(p.disk.cells), len(q.disk.cells)) {
				if logged>>(b/blocksPerRegion)&1 == 1 {
					continue
				}
				if x, y := &p.disk.cells[b], &q.disk.cells[b]; !x.holds(y.cache) || !y.holds(x.cache) {
					v.w.fail("S9", "block %d of %s and %s may differ (%+v, %+v), and no write-intent log has it", b, p.id, q.id, *x, *y)
					return
				}
			}
		}
	}
}

// checkAbsent is S8: where a former member may differ from a member, its region is in what it missed or in a write-intent
// log, unless all of it would be compared on its return.
func (v *vol) checkAbsent(isr []*place) {
	for i := range v.m.Members {
		m := &v.m.Members[i]
		if m.Role != replication.RoleSTALE || m.RemovedAt == 0 {
			continue
		}
		p := v.place(m.ID)
		if p == nil || !v.sameDisk(m, p) || p.disk.syncFailed {
			continue
		}
		for _, q := range isr {
			a, tracked := q.disk.missedOnIt[string(m.ID)]
			// Untracked, it would be tracked from the next version on: too late, unless the member is alone and has not to
			// commit anything to go on.
			if tracked && a.since > uint64(m.RemovedAt) || !tracked && (len(isr) > 1 || v.m.ConfigVersion > m.RemovedAt) {
				continue
			}
			logged := p.disk.wil | q.disk.wil
			for b := range min(len(p.disk.cells), len(q.disk.cells)) {
				if logged>>(b/blocksPerRegion)&1 == 1 || a.bits>>(b/blocksPerExtent)&1 == 1 {
					continue
				}
				if x, y := &p.disk.cells[b], &q.disk.cells[b]; (x.cache != y.cache || x.durable != y.durable) && x.cache != corruptValue {
					v.w.fail("S8", "block %d of %s (%+v) differs from that of member %s (%+v), which has not got it as missed (since %d %024b, tracked %v, removed at %d)",
						b, p.id, *x, q.id, *y, a.since, a.bits, tracked, m.RemovedAt)
					return
				}
			}
		}
	}
}

// checkLog is S9 on each member's disk: what is not durable yet is in its write-intent log.
func (v *vol) checkLog(isr []*place) {
	if len(isr) == 1 {
		return
	}
	for _, p := range isr {
		for b := range p.disk.cells {
			if len(p.disk.cells[b].unsynced) > 0 && p.disk.wil>>(b/blocksPerRegion)&1 == 0 {
				v.w.fail("S9", "block %d of %s is not durable, and not in its write-intent log", b, p.id)
				return
			}
		}
	}
}

// checkChange is S4, S5 and S12 at the controllers.
func (v *vol) checkChange(old, m *replication.Membership, c *replication.Change) {
	w := v.w
	if len(m.ISR()) == 0 {
		w.fail("S4", "the in-sync set is empty after %s", describeChange(c))
		return
	}
	if !slices.Equal(old.ISR(), m.ISR()) {
		w.count.ISRChanges++
		switch {
		case c.Reconfigure != nil && (c.Reconfigure.Epoch != old.Epoch || c.Reconfigure.ConfigVersion != old.ConfigVersion || old.Owner == ""):
			w.fail("S4", "%s was taken in e%d cfgver %d", describeChange(c), old.Epoch, old.ConfigVersion)
		case c.Reconfigure == nil && c.Salvage == nil && c.DropReplica == nil:
			w.fail("S4", "%s changed the in-sync set", describeChange(c))
		}
	}
	if m.Epoch < old.Epoch || m.ConfigVersion < old.ConfigVersion || m.Lineage < old.Lineage {
		w.fail("S12", "%s turned e%d cfgver %d lineage %d into e%d cfgver %d lineage %d", describeChange(c),
			old.Epoch, old.ConfigVersion, old.Lineage, m.Epoch, m.ConfigVersion, m.Lineage)
	}
	if (c.Attach != nil || c.Tombstone != nil && !old.Deleted || c.Detach != nil && !c.Detach.Clean && old.Owner != "") && m.Epoch == old.Epoch {
		w.fail("S6", "%s did not begin a new epoch", describeChange(c))
	}
	if c.Salvage != nil && (m.Lineage == old.Lineage || m.ConfigVersion <= c.Salvage.Seen) {
		w.fail("S12", "a salvage kept lineage %d, cfgver %d where %d was seen", m.Lineage, m.ConfigVersion, c.Salvage.Seen)
	}
	if c.Complete != nil {
		if old.Barrier != nil && old.Barrier.Epoch != old.Epoch {
			w.fail("S13", "barrier %d of e%d was completed in e%d", c.Complete.Number, old.Barrier.Epoch, old.Epoch)
		}
		v.completed(c.Complete)
	}
	if c.Reconfigure != nil {
		w.count.ISRRemoved += len(c.Reconfigure.Remove)
		for _, proof := range c.Reconfigure.Add {
			w.count.ISRAdded++
			p := v.place(proof.ID)
			if p == nil || uint64(proof.Incarnation) != p.disk.incarnation {
				continue // its disk was replaced since: the record says which one was meant
			}
			if proof.BootID == p.boot {
				p.addedAt = w.now
			}
			v.checkDurable(p, "its add")
			p.disk.syncFailed = false
		}
	}
}

// checkAck judges an acknowledgement: what was promised must be true when it is given.
func (v *vol) checkAck(c *client, o *op, e *replication.Effect) {
	w := v.w
	g := c.engine
	if o.ghost {
		w.fail("S7", "e%d acknowledges %s, which began when e%d had taken over", g.epoch, o, v.liveEpoch)
		return
	}
	if o.kind != opRead && c.superseded {
		return // it began before, and may have happened before
	}
	switch o.kind {
	case opRead:
		got := make([]uint64, o.count)
		if !e.Hole {
			got = decode(e.Data)
		}
		if len(got) != o.count {
			w.fail("S1", "%s returned %d blocks", o, len(got))
			return
		}
		judge := v.oracle.readDone
		if c.superseded {
			judge = v.oracle.readLate
		}
		if err := judge(o.view, got); err != nil {
			w.fail("S1", "%s of e%d: %v", o, g.epoch, err)
		}
	case opWrite, opZero:
		v.oracle.acked(o.id, o.fua)
		if n := len(g.known.ISR()); n < g.known.MinInSync {
			w.fail("S3", "%s is acknowledged with %d in sync, at least %d are wanted", o, n, g.known.MinInSync)
		}
	case opFlush:
		v.oracle.flushDone(o.view)
	}
}
