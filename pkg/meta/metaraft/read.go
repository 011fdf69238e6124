package metaraft

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// current returns once this controller's machine has applied all that was acknowledged before the call.
func (s *Store) current(ctx context.Context) error {
	var index uint64
	_, err := s.lead(ctx, func(ctx context.Context, leader raft.ServerAddress, self, _ bool) (err error) {
		if self {
			index, err = s.readIndex(ctx)
			return err
		}
		b, err := s.peers.call(ctx, string(leader), callRead, []byte(s.o.ID))
		if err == nil && len(b) != 8 {
			err = fmt.Errorf("answer of the leader has %d bytes: %w", len(b), errLost)
		}
		if err == nil {
			index = binary.BigEndian.Uint64(b)
		}
		return err
	})
	if err != nil {
		return err
	}
	return s.m.WaitApplied(ctx, index)
}

// reads joins reads that wait for the leader's confirmation.
type reads struct {
	mu      sync.Mutex
	running bool
	next    *round // has not begun; nil when nobody waits
	ready   uint64 // the term in which this leader knows what was committed before it
}

// round is one confirmation, for all who asked before it began.
type round struct {
	done  chan struct{}
	index uint64
	err   error
}

// readIndex returns an index that covers all that was acknowledged before the call. This controller leads.
func (s *Store) readIndex(ctx context.Context) (uint64, error) {
	s.reads.mu.Lock()
	if s.reads.next == nil {
		s.reads.next = &round{done: make(chan struct{})}
	}
	mine := s.reads.next
	if !s.reads.running {
		if !s.begin() {
			s.reads.mu.Unlock()
			return 0, errNotLeader
		}
		s.reads.running = true
		go s.confirmRounds() // Close waits for it
	}
	s.reads.mu.Unlock()
	select {
	case <-mine.done:
		return mine.index, mine.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// confirmRounds confirms while anybody waits, one round after the other.
func (s *Store) confirmRounds() {
	defer s.inflight.Done()
	for {
		s.reads.mu.Lock()
		r := s.reads.next
		s.reads.next = nil
		if r == nil {
			s.reads.running = false
			s.reads.mu.Unlock()
			return
		}
		s.reads.mu.Unlock()
		r.index, r.err = s.confirm()
		close(r.done)
	}
}

// confirm finds out how far the log was committed, and that this controller still led after it looked: a majority of the
// voters, asked after that, has reached no later term. A later leader would have brought a majority into its term before
// it committed anything, and two majorities have a member in common.
//
// Raft's own VerifyLeader is not used: it also counts answers to heartbeats that were sent before it was called, which after
// a pause of the process may be of another time.
func (s *Store) confirm() (uint64, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.o.timing.heartbeat)
	defer cancel()
	r, err := s.member()
	if err != nil {
		return 0, err
	}
	term := r.CurrentTerm()
	if r.State() != raft.Leader {
		return 0, errNotLeader
	}
	if s.reads.ready != term { // a new leader learns what its predecessors committed by committing something of its own
		f := r.Barrier(s.o.timing.heartbeat)
		if err := f.Error(); err != nil {
			return 0, errNotLeader
		}
		if r.CurrentTerm() != term || r.State() != raft.Leader {
			return 0, errNotLeader
		}
		if i, ok := f.(raft.IndexFuture); ok {
			s.fsm.reached(i.Index(), 0) // the barrier is answered by the goroutine that applies
		}
		s.reads.ready = term
	}
	commit := r.CommitIndex()
	if !s.majority(ctx, r, term) {
		return 0, errNotLeader
	}
	if r.CurrentTerm() != term || r.State() != raft.Leader {
		return 0, errNotLeader
	}
	if err := s.fsm.wait(ctx, commit); err != nil {
		return 0, errNotLeader
	}
	return s.m.Applied(), nil
}

// majority asks the other voters for their terms.
func (s *Store) majority(ctx context.Context, r *raft.Raft, term uint64) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := r.GetConfiguration()
	if f.Error() != nil {
		return false
	}
	voters, agree := 0, 0
	var others []raft.ServerAddress
	for _, x := range f.Configuration().Servers {
		if x.Suffrage != raft.Voter {
			continue
		}
		voters++
		if x.ID == raft.ServerID(s.o.ID) {
			agree++
		} else {
			others = append(others, x.Address)
		}
	}
	answers := make(chan bool, len(others))
	var wg sync.WaitGroup
	defer wg.Wait() // they end soon: ctx is cancelled before
	defer cancel()
	for _, address := range others {
		wg.Go(func() {
			b, err := s.peers.call(ctx, string(address), callTerm, nil)
			answers <- err == nil && len(b) == 8 && binary.BigEndian.Uint64(b) <= term
		})
	}
	for range others {
		if agree > voters/2 {
			break
		}
		if <-answers {
			agree++
		}
	}
	return agree > voters/2
}

// read answers from this controller's machine once it is current.
func read[T any](ctx context.Context, s *Store, f func() (T, error)) (T, error) {
	if err := s.current(ctx); err != nil {
		var none T
		return none, err
	}
	return f()
}

// Volume implements control.Store.
func (s *Store) Volume(ctx context.Context, id volume.ID) (volume.Volume, error) {
	return read(ctx, s, func() (volume.Volume, error) { return s.m.Volume(ctx, id) })
}

// VolumeByName implements control.Store.
func (s *Store) VolumeByName(ctx context.Context, name string) (volume.Volume, error) {
	return read(ctx, s, func() (volume.Volume, error) { return s.m.VolumeByName(ctx, name) })
}

// Volumes implements control.Store.
func (s *Store) Volumes(ctx context.Context, after volume.ID, limit int) ([]volume.Volume, error) {
	return read(ctx, s, func() ([]volume.Volume, error) { return s.m.Volumes(ctx, after, limit) })
}

// Snapshot implements control.Store.
func (s *Store) Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error) {
	return read(ctx, s, func() (volume.Snapshot, error) { return s.m.Snapshot(ctx, id) })
}

// Snapshots implements control.Store.
func (s *Store) Snapshots(ctx context.Context, of volume.ID, after volume.SnapshotID, limit int) ([]volume.Snapshot, error) {
	return read(ctx, s, func() ([]volume.Snapshot, error) { return s.m.Snapshots(ctx, of, after, limit) })
}

// Remains implements control.Store.
func (s *Store) Remains(ctx context.Context) ([]volume.Remains, error) {
	return read(ctx, s, func() ([]volume.Remains, error) { return s.m.Remains(ctx) })
}

// Unsettled implements control.Store.
func (s *Store) Unsettled(ctx context.Context) (vs []volume.ID, ss []volume.SnapshotID, err error) {
	if err = s.current(ctx); err == nil {
		vs, ss, err = s.m.Unsettled(ctx)
	}
	return vs, ss, err
}

// Nodes implements control.Store.
func (s *Store) Nodes(ctx context.Context) ([]volume.Node, error) {
	return read(ctx, s, func() ([]volume.Node, error) { return s.m.Nodes(ctx) })
}

// Quotas implements control.Store.
func (s *Store) Quotas(ctx context.Context) ([]volume.Quota, error) {
	return read(ctx, s, func() ([]volume.Quota, error) { return s.m.Quotas(ctx) })
}
