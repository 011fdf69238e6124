package metaraft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// run brings the controller into the cluster and keeps it there.
func (s *Store) run() {
	if err := s.enter(); err != nil {
		if s.ctx.Err() == nil {
			s.fail(err)
		}
		return
	}
	s.wg.Go(s.announce)
	s.wg.Go(s.moveHere)
	s.wg.Go(s.notice)
	s.duties()
}

// enter starts raft once this controller is a member and has been let in.
func (s *Store) enter() error {
	config, err := s.configuration()
	if err != nil {
		return err
	}
	me := slices.IndexFunc(config.Servers, func(x raft.Server) bool { return x.ID == raft.ServerID(s.o.ID) })
	switch {
	case len(config.Servers) == 0:
		if err := s.join(); err != nil {
			return err
		}
	case me < 0 && len(config.Servers) > 0:
		return fmt.Errorf("controller %s was removed from the cluster; let it join anew with empty directories", s.o.ID)
	default:
		if err := s.letIn(config); err != nil {
			return err
		}
	}
	return s.startRaft()
}

func (s *Store) startRaft() error {
	t := s.o.timing
	network := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: streams{s.mux, make(chan struct{})}, MaxPool: 3, Timeout: 10 * t.heartbeat, Logger: s.quiet,
		MaxRPCsInFlight: 1, // batches do what a pipeline would, and every answer passes through transport
	})
	s.transport = &transport{NetworkTransport: network, muted: s.muted, acks: s.acks}
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(s.o.ID)
	// A leader that hears of no majority for as long as followers are patient steps down: half of that, the usual, makes one
	// step down with each stall of a busy machine. No read depends on it.
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = t.heartbeat, t.heartbeat, t.heartbeat
	c.CommitTimeout = t.heartbeat / 4 // followers that are read from learn earlier: nudge
	c.ShutdownOnRemove = false        // announce says why, and Close ends it
	c.SnapshotThreshold, c.TrailingLogs = t.snapshots, t.snapshots
	c.SnapshotInterval = max(30*t.pause, 5*time.Millisecond)
	c.NotifyCh = s.leadership
	c.Logger = s.quiet
	c.NoSnapshotRestoreOnStart = true // prepare has done it, where it was needed
	c.NoLegacyTelemetry = true
	cache, err := raft.NewLogCache(512, s.logs)
	if err != nil {
		return err
	}
	r, err := raft.NewRaft(c, s.fsm, cache, s.logs, s.snaps, s.transport)
	if err != nil {
		return errors.Join(err, network.Close())
	}
	r.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		switch x := o.Data.(type) {
		case raft.LeaderObservation:
			s.leaders.tell()
			if x.LeaderID != "" && s.quiet.said.over() {
				s.log.Info("the controllers have a leader", "leader", x.LeaderID)
			}
		case raft.ResumedHeartbeatObservation:
			if s.quiet.said.over() {
				s.log.Info("a controller answers again", "controller", x.PeerID)
			}
		}
		return false
	}))
	s.shutdown = sync.OnceValue(r.Shutdown)
	s.raft.Store(r)
	s.leaders.tell()
	if s.Failed() != nil { // it failed while it was started: nobody has shut it down
		s.shutdown()
	}
	return nil
}

// announce has the cluster remember this start. When that refuses, two processes have this disk, or it is no member's.
func (s *Store) announce() {
	change := meta.ControllerChange{ID: s.o.ID, Incarnation: s.me.Incarnation, Starts: s.me.Starts, Session: s.me.Session}
	for {
		change.Kind = meta.Started
		err := s.change(change)
		if _, self := s.Leader(); self && errors.Is(err, volume.ErrNotFound) {
			// The first of a cluster makes itself known.
			change.Kind = meta.Admit
			if err = s.change(change); err == nil {
				continue
			}
		}
		switch {
		case err == nil:
			return
		case errors.Is(err, volume.ErrStale), errors.Is(err, volume.ErrNotFound):
			s.fail(err)
			return
		}
		if !s.sleep() {
			return
		}
	}
}

func (s *Store) change(c meta.ControllerChange) error {
	b, err := meta.EncodeControllerChange(c)
	if err != nil {
		return err
	}
	_, err = s.propose(s.ctx, meta.KindController, b)
	return err
}

// servers are the members; nil while they are not known.
func (s *Store) servers() []raft.Server {
	r := s.raft.Load()
	if r == nil {
		return nil
	}
	f := r.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

// moveHere has the members know this controller's address, where it has changed.
func (s *Store) moveHere() {
	for {
		x := s.servers()
		me := slices.IndexFunc(x, func(x raft.Server) bool { return x.ID == raft.ServerID(s.o.ID) })
		if me < 0 || x[me].Address == raft.ServerAddress(s.o.Advertise) {
			return
		}
		if err := s.admission(); err != nil {
			s.log.Warn("the other controllers do not know this one's new address yet", "address", s.o.Advertise, "error", err)
		} else {
			return
		}
		if !s.sleep() {
			return
		}
	}
}

// notice finds out that this controller was removed: nobody tells it.
func (s *Store) notice() {
	for silent := 0; s.sleep(); {
		r := s.raft.Load()
		if _, id := r.LeaderWithID(); id != "" {
			silent = 0
			continue
		}
		if silent++; silent < 5 {
			continue
		}
		var others []raft.ServerAddress
		for _, x := range s.servers() {
			if x.ID != raft.ServerID(s.o.ID) {
				others = append(others, x.Address)
			}
		}
		for _, k := range s.ask(others) {
			if k.Leads && !k.Member {
				s.fail(fmt.Errorf("controller %s was removed from the cluster; let it join anew with empty directories", s.o.ID))
				return
			}
		}
	}
}

// duties are the leader's: while this controller leads, members that have caught up get a vote, controllers that were
// removed are forgotten, and what the members have acknowledged is recorded.
func (s *Store) duties() {
	work := uint64(0)
	var tick <-chan time.Time
	for {
		select {
		case leads := <-s.leadership:
			s.log.Info("leadership of the controllers", "controller", s.o.ID, "leads", leads)
			if tick = nil; leads {
				tick = time.After(s.o.timing.pause)
			}
			continue
		case <-tick:
			tick = time.After(s.o.timing.pause)
		case <-s.ctx.Done():
			return
		case <-s.dead:
			// Raft writes to the channel until it has ended.
			s.drainLeadership()
			return
		}
		if r := s.raft.Load(); r.State() == raft.Leader {
			ctx, cancel := context.WithTimeout(s.ctx, 2*s.o.timing.heartbeat)
			s.promote(r)
			s.forget(ctx, r)
			if now := s.fsm.lastWork(); now == work {
				s.markIdle(ctx, r, work)
			} else {
				work = now
			}
			cancel()
		}
	}
}

func (s *Store) drainLeadership() {
	for {
		select {
		case <-s.leadership:
		case <-s.ctx.Done():
			return
		}
	}
}

// promote gives a vote to members that have caught up.
func (s *Store) promote(r *raft.Raft) {
	s.members.Lock()
	defer s.members.Unlock()
	f := r.GetConfiguration()
	if f.Error() != nil {
		return
	}
	for _, x := range f.Configuration().Servers {
		if x.Suffrage == raft.Voter || s.acks.in(r.CurrentTerm())[x.ID].upTo < r.CommitIndex() {
			continue
		}
		// The index keeps one that was removed meanwhile from coming back.
		err := r.AddVoter(x.ID, x.Address, f.Index(), s.o.timing.heartbeat).Error()
		s.log.Info("a controller has caught up and gets a vote", "controller", x.ID, "error", err)
		return // one at a time
	}
}

// forget removes the records of controllers that are no members.
func (s *Store) forget(ctx context.Context, r *raft.Raft) {
	s.members.Lock() // none is being admitted
	defer s.members.Unlock()
	f := r.GetConfiguration()
	list, err := s.m.Controllers(ctx)
	if f.Error() != nil || err != nil {
		return
	}
	for _, c := range list {
		if !slices.ContainsFunc(f.Configuration().Servers, func(x raft.Server) bool { return x.ID == raft.ServerID(c.ID) }) {
			b, err := meta.EncodeControllerChange(meta.ControllerChange{Kind: meta.Forget, ID: c.ID, Incarnation: c.Incarnation})
			if err == nil {
				_, err = s.append(ctx, meta.Entry{Kind: meta.KindController, Body: b})
			}
			if err != nil {
				return
			}
		}
	}
}

// marks is how far the members' logs are known to go, for the next entry of this leader.
func (s *Store) marks(r *raft.Raft) []meta.Mark {
	commit := r.CommitIndex()
	list := []meta.Mark{{Controller: s.o.ID, Index: commit}}
	for id, a := range s.acks.in(r.CurrentTerm()) {
		if len(list) < meta.MaxMarks {
			list = append(list, meta.Mark{Controller: volume.NodeID(id), Index: min(a.upTo, commit)})
		}
	}
	slices.SortFunc(list, func(a, b meta.Mark) int {
		if a.Controller < b.Controller {
			return -1
		}
		return 1
	})
	return list
}

// markIdle records what the members have acknowledged when no other entry does: the last entries before a pause.
func (s *Store) markIdle(ctx context.Context, r *raft.Raft, work uint64) {
	list, err := s.m.Controllers(ctx)
	if err != nil {
		return
	}
	marks := s.marks(r)
	for _, c := range list {
		for _, m := range marks {
			if m.Controller == c.ID && c.Acknowledged < work && m.Index > c.Acknowledged {
				_, _ = s.append(ctx, meta.Entry{Kind: meta.KindMarks}) // the next tick tries again
				return
			}
		}
	}
}
