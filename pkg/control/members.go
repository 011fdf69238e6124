package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// DrainNode grants that a node be stopped: from then on nothing is placed on it. It is refused with volume.ErrInUse, naming
// the volumes and snapshots and the reasons, where one of them would be left without a copy that is in sync on a node that
// stays, or a volume with fewer than it needs to be written. A node that is drained already is nil.
func (s *Service) DrainNode(ctx context.Context, id volume.NodeID) error {
	return s.setNode(ctx, "node.drain", id, volume.NodeDrained)
}

// EmptyNode has the replicas of a node move to others, in the background; nothing is placed on it. It can be removed when it
// has none any more.
func (s *Service) EmptyNode(ctx context.Context, id volume.NodeID) error {
	return s.setNode(ctx, "node.empty", id, volume.NodeEmptying)
}

// UndrainNode takes back DrainNode and EmptyNode.
func (s *Service) UndrainNode(ctx context.Context, id volume.NodeID) error {
	return s.setNode(ctx, "node.undrain", id, volume.NodeActive)
}

func (s *Service) setNode(ctx context.Context, action string, id volume.NodeID, to volume.NodeState) error {
	n, err := s.Node(ctx, id)
	if err != nil {
		return err
	}
	if n.State == to {
		return nil
	}
	err = s.decideNode(ctx, id, to)
	s.record(ctx, action, string(id), "", err)
	return err
}

func (s *Service) decideNode(ctx context.Context, id volume.NodeID, to volume.NodeState) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	change := command.SetNodeState{Node: id, State: to}
	for _, n := range c.nodes {
		if n.State != volume.NodeActive && n.ID != id {
			change.Idle = append(change.Idle, n.ID)
		}
	}
	if to == volume.NodeDrained {
		bs, err := s.blockers(ctx, c, id)
		if err != nil {
			return err
		}
		if len(bs) > 0 {
			return blocked(id, bs)
		}
	}
	return s.propose(ctx, change)
}

// DrainBlockers lists what forbids that a node be drained now.
func (s *Service) DrainBlockers(ctx context.Context, id volume.NodeID) ([]placement.Blocker, error) {
	if _, err := s.Node(ctx, id); err != nil {
		return nil, err
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return nil, err
	}
	return s.blockers(ctx, c, id)
}

func (s *Service) blockers(ctx context.Context, c cluster, id volume.NodeID) ([]placement.Blocker, error) {
	vs, err := s.store.Volumes(ctx, "", 0)
	if err != nil {
		return nil, err
	}
	xs, err := s.store.Snapshots(ctx, "", "", 0)
	return placement.Blockers(c.view(), vs, xs, id), err
}

func blocked(id volume.NodeID, bs []placement.Blocker) error {
	const most = 5
	var why []string
	for _, b := range bs[:min(len(bs), most)] {
		what := fmt.Sprintf("volume %s", b.Volume)
		if b.Snapshot != "" {
			what = fmt.Sprintf("snapshot %s of volume %s", b.Snapshot, b.Volume)
		}
		why = append(why, what+": "+b.Reason)
	}
	if len(bs) > most {
		why = append(why, fmt.Sprintf("and %d more", len(bs)-most))
	}
	return fmt.Errorf("node %s must stay up (%s); wait until their other replicas are in sync and hold the snapshots, or give them more, and try again: %w",
		id, strings.Join(why, "; "), volume.ErrInUse)
}

// RemoveNode takes a node that holds nothing out of the cluster for good; it can join again only with a token. Nil means that
// every node that reports refuses it; one that is silent does as soon as it reaches a controller. volume.ErrUnavailable: it is
// removed, and a node has not said that it refuses it; the same call asks again.
func (s *Service) RemoveNode(ctx context.Context, id volume.NodeID) error {
	ss, err := s.store.Snapshots(ctx, "", "", 0)
	if err != nil {
		return err
	}
	for _, x := range ss {
		if slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Node == id }) {
			err = fmt.Errorf("node %s holds snapshot %s; empty the node, or delete the snapshot, first: %w", id, x.ID, volume.ErrInUse)
			break
		}
	}
	if err == nil {
		err = s.propose(ctx, command.RemoveNode{Node: id})
	}
	if err == nil {
		s.mu.Lock()
		delete(s.strays, id)
		delete(s.suspects, id)
		delete(s.reported, id)
		s.mu.Unlock()
	}
	s.record(ctx, "node.remove", string(id), "", err)
	if err != nil || s.o.Members == nil {
		return err
	}
	return s.expel(ctx, id)
}

// expel has all nodes that report refuse one that was removed.
func (s *Service) expel(ctx context.Context, id volume.NodeID) error {
	c, err := s.cluster(ctx)
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	errs := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for i, n := range c.nodes {
		if c.silent[n.ID] != "" {
			continue
		}
		wg.Go(func() {
			if err := s.o.Members.Expel(limit, n.ID, id); err != nil {
				errs[i] = fmt.Errorf("node %s: %w", n.ID, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("node %s is removed; not all others have said yet that they refuse it, which they do as soon as they reach a controller (%v); "+
			"remove it again to ask them: %w", id, err, volume.ErrUnavailable)
	}
	return nil
}

// RemovedNodes lists the nodes that were removed and did not join again: nobody is to speak to them.
func (s *Service) RemovedNodes(ctx context.Context) ([]volume.NodeID, error) {
	return s.store.RemovedNodes(ctx)
}

// Generations returns how many machines joined under the name of each node: nobody is to speak to those before the last.
func (s *Service) Generations(ctx context.Context) (map[volume.NodeID]uint64, error) {
	return s.store.Generations(ctx)
}

// CreateJoinToken keeps the record of a token that an admin made; the secret is not in it.
func (s *Service) CreateJoinToken(ctx context.Context, r jointoken.Record) error {
	err := s.propose(ctx, command.CreateJoinToken{Record: r})
	s.record(ctx, "token.create", r.ID, fmt.Sprintf("roles %s, node %q, %d uses", strings.Join(r.Roles, " and "), r.Node, r.Uses), err)
	return err
}

// RevokeJoinToken forgets a token; one that is not there is nil.
func (s *Service) RevokeJoinToken(ctx context.Context, id string) error {
	err := s.propose(ctx, command.RevokeJoinToken{ID: id})
	s.record(ctx, "token.revoke", id, "", err)
	return err
}

// JoinTokens lists the tokens that are not spent, in order of id, and forgets the others.
func (s *Service) JoinTokens(ctx context.Context) ([]jointoken.Record, error) {
	rs, err := s.store.JoinTokens(ctx)
	if err != nil {
		return nil, err
	}
	var list []jointoken.Record
	for _, r := range rs {
		if !r.Spent(s.now()) {
			list = append(list, r)
		} else if err := s.propose(ctx, command.RevokeJoinToken{ID: r.ID}); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// RedeemJoinToken uses a token for a node and returns its record, which says what the node becomes. Errors are those of
// jointoken.Record.Redeem.
func (s *Service) RedeemJoinToken(ctx context.Context, c jointoken.Claim) (jointoken.Record, error) {
	r, err := s.store.Propose(ctx, command.RedeemJoinToken{Now: s.now(), Claim: c})
	s.record(ctx, "node.join", string(c.Node), fmt.Sprintf("token %.16s", c.Token), err)
	if err != nil {
		return jointoken.Record{}, err
	}
	x, ok := r.(command.JoinToken)
	if !ok {
		return jointoken.Record{}, fmt.Errorf("the state machine answered %T", r)
	}
	return x.Record, nil
}
