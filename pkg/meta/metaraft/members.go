package metaraft

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// MaxMembers bounds the controllers of a cluster.
const MaxMembers = 7

// Member is a controller of the cluster.
type Member struct {
	ID      volume.NodeID
	Address string
	// Voter tells whether it counts for a majority; one that joins does once it has caught up.
	Voter, Leader bool
	// Answers tells whether it answered just now, Last then how far its log goes.
	Answers bool
	Last    uint64
}

// Leader returns the controller that leads, to this one's knowledge, and whether it is this one.
func (s *Store) Leader() (id volume.NodeID, self bool) {
	r := s.raft.Load()
	if r == nil {
		return "", false
	}
	_, leader := r.LeaderWithID()
	return volume.NodeID(leader), r.State() == raft.Leader
}

// Stats is how this controller's share of the log is, as it knows itself.
type Stats struct {
	Leads bool
	// HasLeader tells whether this controller knows of a leader, itself or another.
	HasLeader                bool
	Term, Applied, Committed uint64
	Voters                   int
}

// Stats asks nobody.
func (s *Store) Stats() Stats {
	r := s.raft.Load()
	if r == nil {
		return Stats{}
	}
	_, leader := r.LeaderWithID()
	out := Stats{Leads: r.State() == raft.Leader, HasLeader: leader != "", Term: r.CurrentTerm(), Applied: r.AppliedIndex(), Committed: r.CommitIndex()}
	for _, x := range s.servers() {
		if x.Suffrage == raft.Voter {
			out.Voters++
		}
	}
	return out
}

// Members returns the controllers of the cluster as this one knows them, and asks each how it is.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	leader, _ := s.Leader()
	servers := s.servers()
	if _, err := s.member(); err != nil {
		// One that is not let in yet knows the others from its disk: who of them does not answer may be why.
		c, readErr := s.configuration()
		if s.Failed() != nil || readErr != nil || len(c.Servers) == 0 {
			return nil, errors.Join(err, readErr)
		}
		servers = c.Servers
	}
	list := make([]Member, len(servers))
	ctx, cancel := context.WithTimeout(ctx, s.o.timing.heartbeat)
	defer cancel()
	var wg sync.WaitGroup
	for i, x := range servers {
		list[i] = Member{ID: volume.NodeID(x.ID), Address: string(x.Address), Voter: x.Suffrage == raft.Voter, Leader: volume.NodeID(x.ID) == leader}
		wg.Go(func() {
			b, err := s.peers.call(ctx, string(x.Address), callStatus, nil)
			if err == nil && len(b) == 8 {
				list[i].Answers, list[i].Last = true, binary.BigEndian.Uint64(b)
			}
		})
	}
	wg.Wait()
	return list, nil
}

// Remove takes a controller out of the cluster: it may be gone, and it may not come back with its disk. It returns
// volume.ErrNotFound for one that is no member and volume.ErrInUse for the last that has a vote.
func (s *Store) Remove(ctx context.Context, id volume.NodeID) error {
	_, err := s.lead(ctx, func(ctx context.Context, leader raft.ServerAddress, self, again bool) error {
		var err error
		if self {
			err = s.remove(ctx, id)
		} else {
			_, err = s.peers.call(ctx, string(leader), callRemove, []byte(id))
		}
		if again && errors.Is(err, volume.ErrNotFound) {
			return nil // it was done the time before
		}
		return err
	})
	return err
}

func (s *Store) remove(ctx context.Context, id volume.NodeID) error {
	if _, err := s.readIndex(ctx); err != nil { // a leader that was replaced decides nothing
		return err
	}
	s.members.Lock()
	defer s.members.Unlock()
	r, err := s.member()
	if err != nil {
		return err
	}
	voters, at := 0, -1
	servers := s.servers()
	for i, x := range servers {
		if x.Suffrage == raft.Voter {
			voters++
		}
		if x.ID == raft.ServerID(id) {
			at = i
		}
	}
	switch {
	case at < 0:
		return fmt.Errorf("controller %.64s is not a member: %w", id, volume.ErrNotFound)
	case voters == 1 && servers[at].Suffrage == raft.Voter:
		return fmt.Errorf("controller %s is the last one: %w", id, volume.ErrInUse)
	case id == s.o.ID: // another one removes it
		if err := r.LeadershipTransfer().Error(); err != nil {
			return fmt.Errorf("controller %s leads and found nobody to take over: %v: %w", id, err, volume.ErrUnavailable) // tried again
		}
		return errNotLeader
	}
	return s.configured(r.RemoveServer(raft.ServerID(id), 0, s.o.timing.patience))
}

// configured waits for a change of the members.
func (s *Store) configured(f raft.IndexFuture) error {
	if err := f.Error(); err != nil {
		return appendError(err)
	}
	return nil
}

// admit is what a controller says that wants to be a member, or that is one and has another address.
type admit struct {
	ID          volume.NodeID `json:"id"`
	Address     string        `json:"address"`
	Incarnation string        `json:"incarnation"`
}

const maxAddress = 256 + 6

// join has this controller, which is none's member, admitted by one of those that it was told of.
func (s *Store) join() error {
	if len(s.o.Join) == 0 {
		return fmt.Errorf("controller %s is not a member of a cluster, and neither begins one nor was told whom to join", s.o.ID)
	}
	for {
		err := s.admission()
		if err == nil {
			return nil
		}
		if why := "it is not admitted: " + err.Error(); why != *s.why.Load() {
			s.wait(why)
			s.log.Warn("the controller is not admitted yet", "controller", s.o.ID, "error", err)
		}
		if !s.sleep() {
			return s.ctx.Err()
		}
	}
}

// admission asks all controllers that are known, until one of them leads.
func (s *Store) admission() error {
	b, err := json.Marshal(admit{ID: s.o.ID, Address: s.o.Advertise, Incarnation: s.me.Incarnation})
	if err != nil {
		return err
	}
	addresses := slices.Clone(s.o.Join)
	for _, x := range s.servers() {
		if x.ID != raft.ServerID(s.o.ID) {
			addresses = append(addresses, string(x.Address))
		}
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.o.timing.patience)
	defer cancel()
	if _, self := s.Leader(); self {
		return s.admit(ctx, admit{ID: s.o.ID, Address: s.o.Advertise, Incarnation: s.me.Incarnation})
	}
	var errs []error
	for _, a := range addresses {
		_, err := s.peers.call(ctx, a, callJoin, b)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", a, err))
	}
	return errors.Join(errs...)
}

// admit makes a controller a member, without a vote until it has caught up, or notes a member's new address. This
// controller leads.
func (s *Store) admit(ctx context.Context, a admit) error {
	if a.ID == "" || len(a.ID) > volume.MaxNodeIDLen || a.Address == "" || len(a.Address) > maxAddress {
		return fmt.Errorf("controller %.64q at %.64q: a name is empty or too long: %w", a.ID, a.Address, volume.ErrInvalid)
	}
	if _, err := s.readIndex(ctx); err != nil {
		return err
	}
	s.members.Lock()
	defer s.members.Unlock()
	r, err := s.member()
	if err != nil {
		return err
	}
	servers := s.servers()
	at := slices.IndexFunc(servers, func(x raft.Server) bool { return x.ID == raft.ServerID(a.ID) })
	if at < 0 {
		removed, err := s.m.RemovedNodes(ctx)
		if err != nil {
			return err
		}
		if slices.Contains(removed, a.ID) {
			return fmt.Errorf("node %s was removed from the cluster; it can join anew with a token: %w", a.ID, volume.ErrDenied)
		}
		if len(servers) >= MaxMembers {
			return fmt.Errorf("there are %d controllers, more there cannot be: %w", len(servers), volume.ErrNoSpace)
		}
		// A record of one that was removed goes first.
		list, err := s.m.Controllers(ctx)
		if err != nil {
			return err
		}
		for _, c := range list {
			if c.ID == a.ID && c.Incarnation != a.Incarnation {
				if err := s.record(ctx, meta.ControllerChange{Kind: meta.Forget, ID: c.ID, Incarnation: c.Incarnation}); err != nil {
					return err
				}
			}
		}
	}
	if err := s.record(ctx, meta.ControllerChange{Kind: meta.Admit, ID: a.ID, Incarnation: a.Incarnation}); err != nil {
		return err
	}
	switch {
	case at >= 0 && servers[at].Address == raft.ServerAddress(a.Address):
		return nil
	case at >= 0 && servers[at].Suffrage == raft.Voter:
		err = s.configured(r.AddVoter(raft.ServerID(a.ID), raft.ServerAddress(a.Address), 0, s.o.timing.patience))
	default:
		err = s.configured(r.AddNonvoter(raft.ServerID(a.ID), raft.ServerAddress(a.Address), 0, s.o.timing.patience))
	}
	s.log.Info("a controller is a member", "controller", a.ID, "address", a.Address, "error", err)
	return err
}

// record changes what is known of a controller. This controller leads.
func (s *Store) record(ctx context.Context, c meta.ControllerChange) error {
	b, err := meta.EncodeControllerChange(c)
	if err != nil {
		return err
	}
	res, err := s.append(ctx, meta.Entry{Kind: meta.KindController, Body: b})
	if r, ok := res.(command.Refused); ok {
		return r.Err()
	}
	return err
}

// handle carries out the call of another controller.
func (s *Store) handle(ctx context.Context, peer volume.NodeID, kind callKind, b []byte) (uint8, []byte) {
	payload, err := s.carryOut(ctx, peer, kind, b)
	if err == nil && len(payload) > maxPayload {
		err = fmt.Errorf("the answer has %d bytes, the limit is %d", len(payload), maxPayload)
	}
	if err != nil {
		return refusal(err)
	}
	return answerOK, payload
}

func (s *Store) carryOut(ctx context.Context, peer volume.NodeID, kind callKind, b []byte) ([]byte, error) {
	switch kind {
	case callKnown:
		if len(b) > volume.MaxNodeIDLen {
			return nil, fmt.Errorf("the id is too long: %w", volume.ErrInvalid)
		}
		k, err := s.whatIsKnown(ctx, volume.NodeID(b))
		if err != nil {
			return nil, err
		}
		return json.Marshal(k)
	case callStatus:
		last, err := s.lastIndex()
		return indexKey(last), err
	}
	r, err := s.member()
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errNotLeader, err)
	}
	switch kind {
	case callTerm:
		return indexKey(r.CurrentTerm()), nil
	case callRead:
		index, err := s.readIndex(ctx)
		if err != nil {
			return nil, err
		}
		s.nudge(r, raft.ServerID(b))
		return indexKey(index), nil
	case callPropose:
		return s.proposeFor(ctx, r, b)
	case callJoin:
		var a admit
		if err := json.Unmarshal(b, &a); err != nil {
			return nil, fmt.Errorf("%v: %w", err, volume.ErrInvalid)
		}
		if peer != "" && peer != a.ID {
			return nil, fmt.Errorf("node %s cannot join as controller %.64q: %w", peer, a.ID, volume.ErrInvalid)
		}
		return nil, s.admit(ctx, a)
	case callRemove:
		return nil, s.remove(ctx, volume.NodeID(b))
	}
	return nil, fmt.Errorf("call %d is unknown: %w", kind, volume.ErrInvalid)
}

// proposeFor puts another controller's entry into the log.
func (s *Store) proposeFor(ctx context.Context, r *raft.Raft, b []byte) ([]byte, error) {
	if len(b) < 1 {
		return nil, fmt.Errorf("the proposal is empty: %w", volume.ErrInvalid)
	}
	e, err := meta.DecodeEntry(b[1:])
	if err != nil {
		return nil, err
	}
	if e.ID == (meta.ProposalID{}) || e.Kind != meta.KindCommand && e.Kind != meta.KindController {
		return nil, fmt.Errorf("the proposal has no id or is of kind %d: %w", e.Kind, volume.ErrInvalid)
	}
	if b[0] != 0 { // it comes for the first time: the caller may be behind, this controller is not
		e.Since = max(e.Since, r.CommitIndex())
	}
	res, err := s.append(ctx, e)
	if err != nil {
		return nil, err
	}
	return command.EncodeResult(res)
}

// nudge tells a follower how far the log is committed, where it does not know: raft does so with the next entry, or some
// time later. What is said of the entries is what the follower has acknowledged in this term.
func (s *Store) nudge(r *raft.Raft, id raft.ServerID) {
	term, commit := r.CurrentTerm(), r.CommitIndex()
	a, ok := s.acks.in(term)[id]
	to := min(a.upTo, commit)
	if !ok || a.told >= to || r.State() != raft.Leader {
		return
	}
	servers := s.servers()
	at := slices.IndexFunc(servers, func(x raft.Server) bool { return x.ID == id })
	var last raft.Log
	if found, err := s.logs.read(to, &last); at < 0 || !found || err != nil {
		return
	}
	q := raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(s.o.ID), Addr: []byte(s.o.Advertise)},
		Term:      term, PrevLogEntry: to, PrevLogTerm: last.Term, LeaderCommitIndex: to,
	}
	_ = s.transport.AppendEntries(id, servers[at].Address, &q, new(raft.AppendEntriesResponse)) // it learns it later
}
