package replication

// attachProgress carries an attach on: fence, wait out leases, commit who is there, hand out what non-members miss.
func (e *Engine) attachProgress() {
	switch e.phase {
	case phaseFencing:
		e.fencingProgress()
	case phaseMarking:
		if e.unsynced&e.isr != 0 {
			return
		}
		e.phase = phaseLive
		if e.isr.Len() == 1 || e.cfg.Rules.WithoutReconcile {
			e.dirty.Clear()
		}
		e.retry = true
		e.emit(EffectLive)
	}
}

func (e *Engine) fencingProgress() {
	var there, good, silent PeerSet
	for _, m := range e.members {
		if m == nil || !e.isr.Has(m.slot) {
			continue
		}
		if !m.open {
			if m.rec.Node == e.m.Silent {
				silent = silent.With(m.slot)
			}
			continue
		}
		there = there.With(m.slot)
		kept := !e.cfg.DeviceKept || m.rec.BootID == m.boot || e.cfg.Rules.WithoutKeptDeviceCheck
		if kept && e.valid(m) {
			good = good.With(m.slot)
		}
	}
	if there == 0 {
		return
	}
	if there|silent != e.isr && e.now < e.firstFence+e.cfg.Timing.AttachWait {
		return
	}
	if e.now < e.leased && !e.m.SkipLease && !e.cfg.Rules.WithoutLeaseWait {
		return
	}
	if e.cfg.FenceOnly {
		e.over(EffectFenced, "")
		return
	}
	if good == 0 {
		if there == e.isr && e.cfg.DeviceKept {
			e.over(EffectFailed, ReasonLostWrites)
		}
		return // a member may yet come that is good
	}
	e.found(good)
}

// found goes on with the members that answered and are whole.
func (e *Engine) found(good PeerSet) {
	change := Reconfigure{Epoch: e.m.Epoch, ConfigVersion: e.m.ConfigVersion}
	for _, m := range e.members {
		if m == nil || !e.isr.Has(m.slot) {
			continue
		}
		if !good.Has(m.slot) {
			change.Remove = append(change.Remove, m.id)
			continue
		}
		if p, ok := m.newBoot(); ok {
			change.Boots = append(change.Boots, p)
		}
		for _, run := range m.fence.WIL {
			e.dirty.AddRange(run.First, run.End())
		}
	}
	e.active.restore(nil, 0)
	for i, ok := e.dirty.Next(0); ok; i, ok = e.dirty.Next(i + 1) {
		e.active.touch(i, 0, e.now)
		// What was under way in the life before may be durable nowhere.
		per := uint32(e.g.Region / e.g.Extent)
		e.u.AddRange(i*per, (i+1)*per)
	}
	e.failed = e.isr &^ good
	e.phase = phaseCommitting
	switch {
	case e.cfg.Rules.WithoutAttachCommit:
		e.isr = good
		e.failed = 0
		e.startMarking()
	case len(change.Remove)+len(change.Boots) == 0:
		e.startMarking()
	default:
		e.propose1(Change{Reconfigure: &change}, 0, e.isr&^good)
	}
}

// newBoot tells whether the record has another life of the member than the one spoken to.
func (m *member) newBoot() (Proof, bool) {
	if m.rec.BootID == m.boot && m.rec.Incarnation == m.incarnation {
		return Proof{}, false
	}
	return Proof{ID: m.id, Incarnation: m.incarnation, BootID: m.boot}, true
}

// startMarking hands the configuration to all members, and what was dirty to them as missed by each non-member.
func (e *Engine) startMarking() {
	e.phase = phaseMarking
	for _, q := range e.members {
		if q != nil && e.absent.Has(q.slot) && !e.cfg.Rules.WithoutAttachMissed {
			e.missed(q, e.unflushed(nil))
		}
	}
	e.chooseSource()
	e.unlogged = len(e.m.Members) == 1
	e.unknown = true
	e.loggedFrom = e.flush.round + 1
	e.reconfigureAll()
}

// chooseSource picks who is read and reconciled from: a local member if there is one.
func (e *Engine) chooseSource() {
	best := -1
	for _, m := range e.members {
		if m == nil || !(e.isr &^ e.failed).Has(m.slot) {
			continue
		}
		score := 0
		if m.open {
			score += 2
		}
		if m.ready {
			score++
		}
		if m.local {
			score += 4
		}
		if !m.open {
			score = 0
		}
		if score > best {
			best = score
			e.src = m.slot
		}
	}
}
