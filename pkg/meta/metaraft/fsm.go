package metaraft

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// fsm is raft's view of the machine.
type fsm struct {
	ctx   context.Context // the store's: a wait for room ends with it
	m     *meta.Machine
	watch *watch

	mu sync.Mutex
	// seen is the last index that raft handed over; everything before it is applied.
	seen  uint64
	moved chan struct{} // closed when seen changes; nil when nobody waits
	// work is the index of the last entry that was more than marks.
	work uint64
}

// ApplyBatch implements raft.BatchingFSM: one transaction, where it fits. An answer is a command.Result or an error.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	defer f.watch.begin()()
	answers := make([]any, len(logs))
	entries := make([]meta.Entry, 0, len(logs))
	at := make([]int, 0, len(logs))
	work := uint64(0)
	for i, l := range logs {
		if l.Type != raft.LogCommand {
			continue
		}
		e, err := meta.DecodeEntry(l.Data)
		if err != nil {
			answers[i] = command.Refuse(err) // the same on every controller
			continue
		}
		e.Index = l.Index
		entries, at = append(entries, e), append(at, i)
		if e.Kind != meta.KindMarks {
			work = l.Index
		}
	}
	var results []command.Result
	err := f.m.WaitRoom(f.ctx, logs[len(logs)-1].Index) // a leader that waits for long is another soon
	if err == nil {
		results, err = f.m.Apply(entries...)
	}
	for n, i := range at {
		if err != nil {
			answers[i] = err
		} else {
			answers[i] = results[n]
		}
	}
	if err == nil {
		f.reached(logs[len(logs)-1].Index, work)
	}
	return answers
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

func (f *fsm) reached(index, work uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.work = max(f.work, work)
	if index <= f.seen {
		return
	}
	f.seen = index
	if f.moved != nil {
		close(f.moved)
		f.moved = nil
	}
}

// wait returns once everything up to an index was handed over and applied.
func (f *fsm) wait(ctx context.Context, index uint64) error {
	for {
		f.mu.Lock()
		if f.seen >= index {
			f.mu.Unlock()
			return nil
		}
		if f.moved == nil {
			f.moved = make(chan struct{})
		}
		moved := f.moved
		f.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *fsm) lastWork() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.work
}

// Snapshot implements raft.FSM. A machine that failed has none: it lacks entries that raft believes applied.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	c, err := f.m.Checkpoint()
	if err != nil {
		return nil, err
	}
	return fsmSnapshot{c}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error { return f.m.Restore(r) }

type fsmSnapshot struct{ c *meta.Checkpoint }

// Persist implements raft.FSMSnapshot.
func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.c.Write(sink); err != nil {
		_ = sink.Cancel()
		return err
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s fsmSnapshot) Release() { s.c.Close() }

// result is what an answer of ApplyBatch says to the proposer.
func result(answer any) (command.Result, error) {
	switch a := answer.(type) {
	case command.Result:
		return a, nil
	case error:
		return nil, a
	}
	return nil, fmt.Errorf("the entry was not answered: %w", volume.ErrUnavailable)
}
