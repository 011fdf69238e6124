package metaraft

import (
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// watch times what the disk is asked for. While anything takes longer than the limit the disk is stalled: a leader whose
// disk hangs would go on sending heartbeats, so nothing would be decided and nobody else would stand for election.
type watch struct {
	limit time.Duration
	tell  func(stalled bool)

	mu   sync.Mutex
	late int // how many are over the limit now
}

// begin notes that something was asked of the disk; what it returns is called when it is done.
func (w *watch) begin() (done func()) {
	var fired, ended bool
	timer := time.AfterFunc(w.limit, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if ended {
			return
		}
		fired = true
		if w.late++; w.late == 1 {
			w.tell(true)
		}
	})
	return func() {
		timer.Stop()
		w.mu.Lock()
		defer w.mu.Unlock()
		if ended = true; fired {
			if w.late--; w.late == 0 {
				w.tell(false)
			}
		}
	}
}

func (w *watch) stalled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.late > 0
}

var errMuted = errors.New("this controller's disk does not answer: it leads nobody")

// transport is raft's network, which says nothing while the disk is stalled, so that the others elect another leader. It
// learns what the others acknowledge.
type transport struct {
	*raft.NetworkTransport
	muted func() bool
	acks  *acks
}

func (t *transport) AppendEntries(id raft.ServerID, to raft.ServerAddress, q *raft.AppendEntriesRequest, r *raft.AppendEntriesResponse) error {
	if t.muted() {
		return errMuted
	}
	err := t.NetworkTransport.AppendEntries(id, to, q, r)
	if last := q.PrevLogEntry + uint64(len(q.Entries)); err == nil && r.Success && last > 0 {
		t.acks.note(q.Term, id, last, min(q.LeaderCommitIndex, last))
	}
	return err
}

func (t *transport) RequestVote(id raft.ServerID, to raft.ServerAddress, q *raft.RequestVoteRequest, r *raft.RequestVoteResponse) error {
	if t.muted() {
		return errMuted
	}
	return t.NetworkTransport.RequestVote(id, to, q, r)
}

func (t *transport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, q *raft.RequestPreVoteRequest, r *raft.RequestPreVoteResponse) error {
	if t.muted() {
		return errMuted
	}
	return t.NetworkTransport.RequestPreVote(id, to, q, r)
}

// acks is how far each follower's log is known to be the leader's: in one term, in which the leader's own does not change.
type acks struct {
	mu   sync.Mutex
	term uint64
	of   map[raft.ServerID]ack
}

type ack struct {
	upTo uint64
	told uint64 // what the follower knows to be committed
}

func (a *acks) note(term uint64, id raft.ServerID, upTo, told uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if term > a.term || a.of == nil {
		a.term, a.of = term, map[raft.ServerID]ack{}
	}
	if term == a.term {
		old := a.of[id]
		a.of[id] = ack{max(old.upTo, upTo), max(old.told, told)}
	}
}

// in returns what is known in a term.
func (a *acks) in(term uint64) map[raft.ServerID]ack {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.term != term {
		return nil
	}
	return maps.Clone(a.of)
}
