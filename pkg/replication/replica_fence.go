package replication

import (
	"slices"

	"github.com/ballast-csi/ballast/pkg/region"
)

// beginFence closes older sessions at once, and answers when what they had admitted has ended and the epoch is durable.
func (r *Replica) beginFence(m *Message) {
	switch {
	case m.Epoch < r.st.Epoch:
		r.answer(m, StatusStaleEpoch)
		return
	case m.Epoch == r.st.Epoch && m.Session == r.session:
		return // delivered before
	case m.Epoch == r.st.Epoch && m.Session < r.session:
		r.answer(m, StatusStaleSession)
		return
	}
	if r.fence != nil {
		r.answer(r.fence, StatusStaleSession)
	}
	req := *m
	r.fence = &req
	r.session, r.open, r.configured = m.Session, false, false
	r.seen = window{}
	for _, w := range r.wil {
		w.seq = 0 // sequence numbers are a session's
	}
	if m.Epoch > r.st.Epoch || !r.saved {
		r.st.Epoch = m.Epoch
		r.save(func(ok bool) {
			if !ok && r.fence != nil {
				r.answer(r.fence, StatusIO)
				r.fence = nil
			}
			r.fenceProgress()
		})
	}
	r.fenceProgress()
}

// fenceProgress answers a fence once nothing that was emitted before is under way, and all that it tells is durable. What
// older sessions had admitted and still waits for the write-intent log is refused when it comes to be emitted.
func (r *Replica) fenceProgress() {
	if r.fence == nil || r.calls.running > 0 && !r.cfg.Rules.WithoutDrain {
		return
	}
	if p := &r.persist; (p.done != p.wanted || !r.saved) && !r.cfg.Rules.WithoutDurableEpoch {
		return
	}
	r.fenceAnswer()
}

func (r *Replica) fenceAnswer() {
	m := r.fence
	r.fence = nil
	r.open = true
	r.answer(m, StatusOK)
	f := &FenceReply{
		Incarnation: r.cfg.Incarnation, BootID: r.cfg.BootID, Epoch: r.st.Epoch, Lineage: r.st.Lineage,
		ConfigVersion: r.st.ConfigVersion, Role: r.st.Role, Poisoned: r.poisoned, PoisonedBefore: r.st.Poisoned && !r.poisoned, LeaseLeft: max(0, r.leaseUntil-r.now),
		Size: r.size, ISR: slices.Clone(r.st.ISR), Missed: slices.Clone(r.missed), Snapshots: slices.Clone(r.snaps),
	}
	var wil region.Set
	for i := range r.wil {
		wil.Add(i)
	}
	f.WIL, _, _ = wil.Runs(0, MaxWIL*r.cfg.Geometry.MaxActive)
	r.out[len(r.out)-1].Msg.Fence = f
}

// configure makes a configuration durable, step by step: first the role, then who is tracked.
func (r *Replica) configure(m *Message) {
	c := m.Config
	switch {
	case c == nil || len(c.ISR) > MaxMembers || len(c.Absent) > MaxMembers || c.Role < RoleNEW || c.Role > RoleSTALE:
		r.answer(m, StatusRefused)
		return
	case c.Lineage < r.st.Lineage || c.Lineage == r.st.Lineage && c.ConfigVersion < r.st.ConfigVersion:
		r.answer(m, StatusRefused)
		return
	}
	for _, a := range c.Absent {
		if a.Slot >= MaxMembers || a.ID == "" {
			r.answer(m, StatusRefused)
			return
		}
	}
	req := *m
	finish := func(st Status) {
		switch {
		case st != StatusOK:
		case req.Session != r.session || req.Epoch != r.st.Epoch:
			st = StatusStaleSession
		default:
			r.configured, r.unlogged = true, c.Unlogged
			r.slots = [MaxMembers]MissedTag{}
			for _, a := range c.Absent {
				r.slots[a.Slot] = MissedTag{Peer: a.ID, Since: a.Since}
			}
			r.forgetMarks()
		}
		r.answer(&req, st)
	}
	tracking := func() { r.track(&req, finish) }
	changed := r.st.Lineage != c.Lineage || r.st.ConfigVersion != c.ConfigVersion || r.st.Role != c.Role || r.st.Poisoned ||
		!slices.Equal(r.st.ISR, c.ISR) || !r.saved
	if !changed && !c.Reset {
		tracking()
		return
	}
	r.st.Lineage, r.st.ConfigVersion, r.st.Role, r.st.Poisoned = c.Lineage, c.ConfigVersion, c.Role, false
	r.st.ISR = slices.Clone(c.ISR)
	if c.Role == RoleSYNC && r.cfg.Rules.WithoutDurableSYNC {
		tracking()
		return
	}
	r.save(func(ok bool) {
		if !ok {
			finish(StatusIO)
			return
		}
		tracking()
	})
}

// track brings the set of tracked peers to what the configuration says, one store operation after another.
func (r *Replica) track(m *Message, finish func(Status)) {
	c := m.Config
	next := func(op StoreOp, apply func()) {
		r.storeThen(m, op, func(res StoreResult) {
			if res.Status != StatusOK {
				finish(res.Status)
				return
			}
			apply()
			r.track(m, finish)
		})
	}
	if c.Reset && len(r.missed) > 0 {
		again := *m
		conf := *c
		conf.Reset = false // once
		again.Config = &conf
		r.storeThen(m, StoreOp{Kind: StoreDropMissed}, func(res StoreResult) {
			if res.Status != StatusOK {
				finish(res.Status)
				return
			}
			r.missed = nil
			r.track(&again, finish)
		})
		return
	}
	for _, t := range r.missed {
		if !slices.ContainsFunc(c.Absent, func(a AbsentPeer) bool { return a.ID == t.Peer }) {
			next(StoreOp{Kind: StoreDropMissed, Set: SetPage{Peer: t.Peer}}, func() {
				r.missed = slices.DeleteFunc(r.missed, func(o MissedTag) bool { return o.Peer == t.Peer })
			})
			return
		}
	}
	for _, a := range c.Absent {
		if !r.tracks(a.ID) {
			next(StoreOp{Kind: StoreTrack, Set: SetPage{Peer: a.ID, Since: a.Since}}, func() {
				r.missed = append(r.missed, MissedTag{Peer: a.ID, Since: a.Since})
			})
			return
		}
	}
	finish(StatusOK)
}
