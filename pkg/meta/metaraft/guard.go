package metaraft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Raft's own names in its stable store.
var (
	keyTerm     = []byte("CurrentTerm")
	keyVoteTerm = []byte("LastVoteTerm")
	keyVotedFor = []byte("LastVoteCand")
	nobody      = []byte("nobody")
)

// prepare brings the machine, the log and the newest snapshot together, before anything is said to anybody.
func (s *Store) prepare() error {
	list, err := s.snaps.List()
	if err != nil {
		return err
	}
	last, err := s.logs.LastIndex()
	if err != nil {
		return err
	}
	if len(list) == 0 && last == 0 {
		// One that was shared before this directory was made had a log, and others may still go by that.
		if lost := s.m.Shared() && s.me.Starts == 1; lost {
			return fmt.Errorf("%s has a state that several controllers share, and %s has no log: it is lost; remove controller %s from the cluster and let it join anew with empty directories: %w", s.o.State, s.o.Dir, s.o.ID, volume.ErrDataLoss)
		}
		if s.o.Bootstrap {
			return s.bootstrap()
		}
		if s.m.Applied() > 0 {
			return fmt.Errorf("%s has a state and no log: it is that of a cluster of one, which bootstraps, or the log is lost: %w", s.o.State, volume.ErrDataLoss)
		}
	}
	if err := s.m.Share(); err != nil {
		return err
	}
	if len(list) > 0 {
		last = max(last, list[0].Index)
		// A snapshot from the leader is kept before it is restored. One that the machine has applied already changes nothing.
		_, r, err := s.snaps.Open(list[0].ID)
		if err != nil {
			return err
		}
		if err := errors.Join(s.m.Restore(r), r.Close()); err != nil {
			return err
		}
	}
	if s.m.Applied() > last {
		return fmt.Errorf("the log in %s ends at %d and the state in %s at %d: the log's disk is older than it was; remove controller %s from the cluster and let it join anew with empty directories: %w",
			s.o.Dir, last, s.o.State, s.m.Applied(), s.o.ID, volume.ErrDataLoss)
	}
	return nil
}

// bootstrap makes a cluster of this controller, with the state that is there. The snapshot is the last step: without it,
// it is done again.
func (s *Store) bootstrap() error {
	if err := s.m.Share(); err != nil {
		return err
	}
	if err := s.logs.SetUint64(keyTerm, 1); err != nil {
		return err
	}
	c, err := s.m.Checkpoint()
	if err != nil {
		return err
	}
	defer c.Close()
	index := max(c.Applied(), 1)
	config := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(s.o.ID), Address: raft.ServerAddress(s.o.Advertise)}}}
	sink, err := s.snaps.Create(raft.SnapshotVersionMax, index, 1, config, index, new(raft.NetworkTransport))
	if err != nil {
		return err
	}
	if err := c.Write(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// configuration is the newest one on disk, which is what raft starts with.
func (s *Store) configuration() (raft.Configuration, error) {
	var config raft.Configuration
	list, err := s.snaps.List()
	if err != nil {
		return config, err
	}
	from := uint64(1)
	if len(list) > 0 {
		config, from = list[0].Configuration, list[0].Index+1
	}
	first, err := s.logs.FirstIndex()
	if err != nil {
		return config, err
	}
	last, err := s.logs.LastIndex()
	if err != nil {
		return config, err
	}
	for i := max(first, from); i <= last && first > 0; i++ {
		var l raft.Log
		if found, err := s.logs.read(i, &l); err != nil || !found {
			return config, errors.Join(err, fmt.Errorf("entry %d is not in the log", i))
		}
		if l.Type == raft.LogConfiguration {
			config = raft.DecodeConfiguration(l.Data)
		}
	}
	return config, nil
}

// lastIndex is how far this controller's log goes.
func (s *Store) lastIndex() (uint64, error) {
	if r := s.raft.Load(); r != nil {
		return r.LastIndex(), nil
	}
	list, err := s.snaps.List()
	if err != nil {
		return 0, err
	}
	last, err := s.logs.LastIndex()
	if len(list) > 0 {
		last = max(last, list[0].Index)
	}
	return last, err
}

// known is what one controller, ID, knows of another.
type known struct {
	ID volume.NodeID `json:"id"`
	// Found tells whether the controller's state has a record; Record is what it says.
	Found  bool            `json:"found"`
	Record meta.Controller `json:"record"`
	// Acknowledged is how far the other's log goes, to the knowledge of a leader.
	Acknowledged uint64 `json:"acknowledged"`
	// Term is the highest that the controller has seen.
	Term uint64 `json:"term"`
	// Leads tells whether the controller believes to lead, Member whether the other is a member then.
	Leads  bool `json:"leads"`
	Member bool `json:"member"`
}

// whatIsKnown answers a controller that is about to start.
func (s *Store) whatIsKnown(ctx context.Context, id volume.NodeID) (known, error) {
	k := known{ID: s.o.ID}
	list, err := s.m.Controllers(ctx)
	if err != nil {
		return k, err
	}
	for _, c := range list {
		if c.ID == id {
			k.Found, k.Record = true, c
		}
	}
	if k.Term, err = s.logs.GetUint64(keyTerm); err != nil {
		return k, err
	}
	r := s.raft.Load()
	if r == nil {
		return k, nil
	}
	k.Term = max(k.Term, r.CurrentTerm())
	k.Leads = r.State() == raft.Leader
	k.Acknowledged = min(s.acks.in(r.CurrentTerm())[raft.ServerID(id)].upTo, r.CommitIndex())
	f := r.GetConfiguration()
	if err := f.Error(); err != nil {
		return k, err
	}
	k.Member = slices.ContainsFunc(f.Configuration().Servers, func(x raft.Server) bool { return x.ID == raft.ServerID(id) })
	return k, nil
}

// judge says why this controller must not start, or nil.
func (s *Store) judge(k known, last uint64) error {
	remedy := fmt.Sprintf("remove controller %s from the cluster and let it join anew with an empty directory", s.o.ID)
	switch {
	case k.Found && k.Record.Incarnation != s.me.Incarnation:
		return fmt.Errorf("the cluster knows controller %s with another disk; %s", s.o.ID, remedy)
	case k.Found && k.Record.Starts >= s.me.Starts && k.Record.Session != s.me.Session:
		return fmt.Errorf("this controller's disk is older than what it acknowledged: the cluster has seen its start %d, the disk says that this is start %d; %s", k.Record.Starts, s.me.Starts, remedy)
	case max(k.Acknowledged, k.Record.Acknowledged) > last:
		return fmt.Errorf("this controller's disk is older than what it acknowledged: its log went to %d, it ends at %d; %s", max(k.Acknowledged, k.Record.Acknowledged), last, remedy)
	}
	return nil
}

// ask asks controllers, and those to join, what they know of this one. It returns once all have answered, or the pause is
// over.
func (s *Store) ask(addresses []raft.ServerAddress) map[raft.ServerID]known {
	ctx, cancel := context.WithTimeout(s.ctx, s.o.timing.pause)
	defer cancel()
	for _, a := range s.o.Join {
		if a := raft.ServerAddress(a); !slices.Contains(addresses, a) && string(a) != s.o.Advertise {
			addresses = append(addresses, a)
		}
	}
	var mu sync.Mutex
	answers := map[raft.ServerID]known{}
	var wg sync.WaitGroup
	for _, a := range addresses {
		wg.Go(func() {
			b, err := s.peers.call(ctx, string(a), callKnown, []byte(s.o.ID))
			var k known
			if err != nil || json.Unmarshal(b, &k) != nil || k.ID == s.o.ID {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			answers[raft.ServerID(k.ID)] = k
		})
	}
	wg.Wait()
	return answers
}

// letIn returns nil when this controller may take part: it is alone, or as many others as make a majority with it know
// of nothing that its disk has lost. errRefused is final.
func (s *Store) letIn(config raft.Configuration) error {
	var voters []raft.ServerID
	var others []raft.ServerAddress
	for _, x := range config.Servers {
		if x.Suffrage == raft.Voter {
			voters = append(voters, x.ID)
		}
		if x.ID != raft.ServerID(s.o.ID) {
			others = append(others, x.Address)
		}
	}
	last, err := s.lastIndex()
	if err != nil {
		return fmt.Errorf("%w: %v", errRefused, err)
	}
	need := len(voters)/2 + 1
	if slices.Contains(voters, raft.ServerID(s.o.ID)) {
		need--
	}
	for need > 0 {
		s.wait(fmt.Sprintf("it asks the others whether its disk is as new as it was; %d of them have to answer", need))
		term, answered := uint64(0), 0
		for id, k := range s.ask(others) {
			if err := s.judge(k, last); err != nil {
				return fmt.Errorf("%w: %v", errRefused, err)
			}
			term = max(term, k.Term)
			if slices.Contains(voters, id) {
				answered++
			}
		}
		if answered >= need {
			return s.giveUpVotes(term)
		}
		if !s.sleep() {
			return s.ctx.Err()
		}
	}
	return nil
}

var errRefused = errors.New("refused")

// giveUpVotes keeps this controller from voting in terms that the others had reached before it started: it may have voted
// in them, and its disk may have forgotten.
func (s *Store) giveUpVotes(term uint64) error {
	mine, err := s.logs.GetUint64(keyTerm)
	if err != nil {
		return fmt.Errorf("%w: %v", errRefused, err)
	}
	if term < mine {
		return nil
	}
	voted, err := s.logs.GetUint64(keyVoteTerm)
	if err != nil {
		return fmt.Errorf("%w: %v", errRefused, err)
	}
	if term == mine && voted == term {
		return nil // it remembers
	}
	// In this order: a vote of the new term before the term is raised does no harm.
	if err := errors.Join(s.logs.Set(keyVotedFor, nobody), s.logs.SetUint64(keyVoteTerm, term), s.logs.SetUint64(keyTerm, term)); err != nil {
		return fmt.Errorf("%w: %v", errRefused, err)
	}
	return nil
}

// sleep waits before something is tried again; false is a store that is being closed or has failed.
func (s *Store) sleep() bool {
	select {
	case <-time.After(s.o.timing.pause):
		return true
	case <-s.ctx.Done():
		return false
	case <-s.dead:
		return false
	}
}
