// Package meta is the cluster's state: a deterministic state machine over Badger.
//
// Machine applies the entries of a log. What an entry changes and its index are one Badger transaction, so an entry that was
// applied changes nothing when it comes again. Store is the machine with the log of a cluster of one controller: it gives
// commands their index and applies those that arrive together in one transaction, each of them whole or not at all.
package meta

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Store is a machine that proposes to itself: the whole of a cluster with one controller.
type Store struct {
	*Machine
	stopping  chan struct{}
	stop      sync.Once
	proposals chan *proposal
	done      chan struct{} // propose has ended
}

type proposal struct {
	command []byte
	result  chan outcome
}

type outcome struct {
	result command.Result
	err    error
}

// Open opens the state in dir, and makes it where there is none. It refuses a state that is shared with other
// controllers. It starts two goroutines, which Close ends.
func Open(dir string, o Options) (*Store, error) {
	m, err := OpenMachine(dir, o)
	if err != nil {
		return nil, err
	}
	if m.shared {
		return nil, errors.Join(fmt.Errorf("the state in %s is one of several controllers' copies and is not changed alone: configure the controllers of this cluster", dir), m.Close())
	}
	s := &Store{Machine: m, stopping: make(chan struct{}), proposals: make(chan *proposal, maxBatch), done: make(chan struct{})}
	go s.propose()
	return s, nil
}

// Close ends the goroutines and closes the database. Proposals under way get volume.ErrUnavailable.
func (s *Store) Close() error {
	s.stop.Do(func() { close(s.stopping) })
	<-s.done
	return s.Machine.Close()
}

// Propose implements control.Store for a cluster of one.
func (s *Store) Propose(ctx context.Context, c command.Command) (command.Result, error) {
	b, err := command.Encode(c)
	if err != nil {
		return nil, err
	}
	p := &proposal{command: b, result: make(chan outcome, 1)}
	closed := fmt.Errorf("the cluster's state is closed: %w", volume.ErrUnavailable)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case s.proposals <- p:
	case <-s.stopping:
		return nil, closed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case o := <-p.result:
		if r, ok := o.result.(command.Refused); ok {
			return nil, r.Err()
		}
		return o.result, o.err
	case <-s.done:
		return nil, closed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// propose applies what is waiting, as much at once as fits.
func (s *Store) propose() {
	defer close(s.done)
	for {
		var batch []*proposal
		select {
		case <-s.stopping:
			return
		case p := <-s.proposals:
			batch = append(batch, p)
		}
	gather:
		for len(batch) < maxBatch {
			select {
			case p := <-s.proposals:
				batch = append(batch, p)
			default:
				break gather
			}
		}
		for len(batch) > 0 {
			batch = batch[s.settleBatch(batch):]
		}
	}
}

// settleBatch applies and answers the first of a batch and returns how many.
func (s *Store) settleBatch(batch []*proposal) int {
	entries := make([]Entry, len(batch))
	if err := s.Full(); err != nil {
		for _, p := range batch {
			p.result <- outcome{err: err}
		}
		return len(batch)
	}
	s.mu.Lock()
	for i, p := range batch {
		entries[i] = Entry{Index: s.applied + 1 + uint64(i), Kind: KindCommand, Body: p.command}
	}
	results, err := s.commit(entries)
	s.mu.Unlock()
	if err != nil {
		for _, p := range batch {
			p.result <- outcome{err: err}
		}
		return len(batch)
	}
	for i, r := range results {
		batch[i].result <- outcome{result: r}
	}
	return len(results)
}
