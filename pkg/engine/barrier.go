package engine

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// barrier is a snapshot that is being cut.
type barrier struct {
	drained, sealed, ended chan struct{}
	ok                     bool
	holders                []volume.ReplicaID
	version                volume.ConfigVersion
}

// Cut is a snapshot that was sealed: by whom, and in which configuration.
type Cut struct {
	Holders []volume.ReplicaID
	Version volume.ConfigVersion
}

// errBarrier: the barrier was given up; the snapshot must be aborted.
var errBarrier = fmt.Errorf("writes could not be held long enough to cut the snapshot; try again: %w", volume.ErrBusy)

// Snapshot seals the present state on every member. volume.ErrBusy: it was given up, and writes go on. After any other
// error, ctx's included, it may have been sealed: abort it.
func (e *Engine) Snapshot(ctx context.Context, b replication.Barrier) (Cut, error) {
	s := e.begin(b, false)
	if err := e.await(ctx, s.ended); err != nil {
		return Cut{}, err
	}
	return e.cut(s)
}

// Drain holds writes for a snapshot of several volumes and returns when none is under way. CutGroup goes on; Release lets
// writes go on, at whatever point; they go on by themselves when it takes too long.
func (e *Engine) Drain(ctx context.Context, b replication.Barrier) error {
	s := e.begin(b, true)
	select {
	case <-s.drained:
		return nil
	case <-s.ended:
		return errBarrier
	case <-e.over:
		return e.gone()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CutGroup seals what Drain holds, and returns who has it; writes are still held. The snapshot is good even if the barrier
// ends by itself from then on: nothing was written between Drain and the cut.
func (e *Engine) CutGroup(ctx context.Context, number uint64) ([]volume.ReplicaID, error) {
	e.mu.Lock()
	s := e.barriers[number]
	e.mu.Unlock()
	if s == nil {
		return nil, errBarrier
	}
	e.step(func() { e.m.Cut(now(), number) })
	select {
	case <-s.sealed:
		e.mu.Lock()
		defer e.mu.Unlock()
		return s.holders, nil
	case <-s.ended:
		return nil, errBarrier
	case <-e.over:
		return nil, e.gone()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Release ends a barrier that Drain began: writes go on. It returns what was sealed.
func (e *Engine) Release(ctx context.Context, number uint64) (Cut, error) {
	e.mu.Lock()
	s := e.barriers[number]
	e.mu.Unlock()
	if s == nil {
		return Cut{}, errBarrier
	}
	e.step(func() { e.m.Release(now(), number) })
	if err := e.await(ctx, s.ended); err != nil {
		return Cut{}, err
	}
	return e.cut(s)
}

func (e *Engine) begin(b replication.Barrier, group bool) *barrier {
	s := &barrier{drained: make(chan struct{}), sealed: make(chan struct{}), ended: make(chan struct{})}
	e.step(func() {
		e.barriers[b.Number] = s
		e.m.Barrier(now(), b, group)
	})
	return s
}

// cut is what an ended barrier has come to.
func (e *Engine) cut(s *barrier) (Cut, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !s.ok {
		return Cut{}, errBarrier
	}
	return Cut{Holders: s.holders, Version: s.version}, nil
}

// barrierReached takes note of how far a barrier got; the mutex is held.
func (e *Engine) barrierReached(f *replication.Effect) {
	s := e.barriers[f.Number]
	if s == nil {
		return
	}
	switch f.Kind {
	case replication.EffectDrained:
		closeOnce(s.drained)
	case replication.EffectSealed:
		for _, m := range e.m.Status().Members {
			if m.InSync {
				s.holders = append(s.holders, m.ID)
			}
		}
		closeOnce(s.sealed)
	case replication.EffectBarrier:
		// Where it has come to its end by itself since it was sealed, who sealed it is still asked for.
		if s.ok = f.Result == replication.ResultOK; s.ok {
			s.holders, s.version = f.Holders, f.Version
		}
		closeOnce(s.ended)
		delete(e.barriers, f.Number)
	}
}
