package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Config is what an engine is made of.
type Config struct {
	Node        volume.NodeID
	Controllers Controllers
	Peers       Peers
	Logger      *slog.Logger
	Geometry    replication.Geometry
	Timing      replication.Timing
	// Meter, where it is not nil, is told how long reads and writes take.
	Meter *Meter
}

// commitTimeout bounds one attempt to commit; its outcome is then unknown and it is made again.
const commitTimeout = 3 * time.Second

// Engine is an attached volume as a block.Device. While it cannot serve (attaching, no quorum of controllers, too few
// members) requests wait.
type Engine struct {
	cfg Config
	id  volume.ID
	log *slog.Logger

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	size   atomic.Int64
	wake   chan struct{}  // the timer is to be set anew
	silent repeat.Trouble // the controllers do not answer

	mu       sync.Mutex
	m        *replication.Engine
	epoch    volume.Epoch
	peers    map[volume.ReplicaID]*peer
	met      uint64 // revision of the record that peers are of
	requests requests
	barriers map[uint64]*barrier
	alarm    replication.Now // when the timer goes off
	closed   bool

	live, detached chan struct{} // closed when that has been reached
	over           chan struct{} // closed when the engine has failed or was closed
	reason         replication.Reason
}

// Open begins an engine for the epoch that m, the record after an Attach, gives to this node. It returns at once; Live says
// when the device serves.
func Open(cfg Config, m replication.Membership) (*Engine, error) {
	machine, err := replication.NewEngine(replication.EngineConfig{Node: cfg.Node, Geometry: cfg.Geometry, Timing: cfg.Timing}, m, now())
	if err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: cfg, id: m.Volume, log: cfg.Logger.With("volume", m.Volume, "epoch", m.Epoch), m: machine, epoch: m.Epoch,
		wake: make(chan struct{}, 1), peers: map[volume.ReplicaID]*peer{}, barriers: map[uint64]*barrier{},
		live: make(chan struct{}), detached: make(chan struct{}), over: make(chan struct{}),
	}
	e.requests.init()
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.size.Store(m.Size)
	e.mu.Lock()
	e.meet(m)
	fx := e.take()
	e.mu.Unlock()
	e.tasks.Go(e.keepTime)
	e.carryOut(fx)
	return e, nil
}

// Live returns when the device serves, or an error that wraps block.ErrClosed when it never will.
func (e *Engine) Live(ctx context.Context) error { return e.await(ctx, e.live) }

func (e *Engine) await(ctx context.Context, reached <-chan struct{}) error {
	select {
	case <-reached:
		return nil
	case <-e.over:
		return e.gone()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Over is closed when the engine has failed for good, and its device must: Reason says why. Close closes it too.
func (e *Engine) Over() <-chan struct{} { return e.over }

// Reason is why the engine has failed, once Over is closed.
func (e *Engine) Reason() replication.Reason {
	select {
	case <-e.over:
		return e.reason
	default:
		return ""
	}
}

// gone is called after the engine has ended.
func (e *Engine) gone() error {
	return fmt.Errorf("volume %s is not served by this engine any more (%s): %w", e.id, cmp.Or(e.Reason(), "Detached"), block.ErrClosed)
}

// Detach ends the attachment: requests are refused from then on. Nil is that it is clean, all that was written being durable
// and no lease held: the next attachment need not wait for one. Close is still to be called.
func (e *Engine) Detach(ctx context.Context) error {
	served := false
	select {
	case <-e.live:
		served = true
	default:
	}
	e.step(func() { e.m.Detach(now()) })
	if err := e.await(ctx, e.detached); err != nil {
		return err
	}
	if !served {
		// An engine before it may hold a lease, which was not waited out.
		return errNeverLive
	}
	return nil
}

var errNeverLive = fmt.Errorf("the engine ended before it served: %w", volume.ErrUnavailable)

// Learn tells of a newer record than the engine may have: replicas to be added, a size to grow to.
func (e *Engine) Learn(m replication.Membership) {
	e.step(func() {
		e.m.Learned(now(), m)
		e.meet(m)
	})
}

// Evict asks that a replica leave the in-sync set.
func (e *Engine) Evict(id volume.ReplicaID) { e.step(func() { e.m.Evict(now(), id) }) }

// SetResyncPace bounds what resyncs have in flight, in bytes, and what they begin in a second; rate 0 is no bound.
func (e *Engine) SetResyncPace(window, rate int64) {
	e.step(func() { e.m.SetResyncPace(now(), window, rate) })
}

// Status says what the engine does and what it waits for.
func (e *Engine) Status() replication.EngineStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.m.Status()
}

// Close ends the engine as a crash would: what was not flushed may be lost. Requests under way end with block.ErrClosed.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.fail("Closed")
	for _, q := range e.requests.all() {
		e.end(q, &replication.Effect{Result: replication.ResultGone, Busy: true})
	}
	e.mu.Unlock()
	e.cancel()
	e.tasks.Wait()
	return nil
}

// fail marks the engine as over; the mutex is held.
func (e *Engine) fail(r replication.Reason) {
	select {
	case <-e.over:
	default:
		e.reason = r
		close(e.over)
	}
}

// step gives the machine an event and carries out what follows.
func (e *Engine) step(event func()) {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return
	}
	event()
	fx := e.take()
	e.mu.Unlock()
	e.carryOut(fx)
}

// keepTime steps the machine when it wants to be.
func (e *Engine) keepTime() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-e.wake:
		case <-timer.C:
		}
		e.step(func() {
			e.alarm = 0 // nobody need wake this goroutine: it looks anew
			e.m.Tick(now())
		})
		e.mu.Lock()
		e.alarm = e.m.NextWake()
		wait := time.Duration(e.alarm - now())
		e.mu.Unlock()
		timer.Reset(max(wait, 0))
	}
}

// commit asks the controllers for a change until their answer is known or the engine ends.
func (e *Engine) commit(number uint64, c replication.Change) {
	ctx, cancel := context.WithTimeout(e.ctx, commitTimeout)
	defer cancel()
	m, err := e.cfg.Controllers.Commit(ctx, e.id, c)
	outcome := replication.CommitDone
	switch {
	case err == nil:
	case errors.Is(err, volume.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		outcome = replication.CommitUnknown
		if e.silent.Again() {
			e.log.Warn("the controllers do not answer", "error", err)
		}
	case m.Volume != e.id:
		outcome = replication.CommitUnknown // whoever refuses shows the record that it goes by
		e.log.Warn("the controllers' answer says nothing of the change", "error", err)
	default:
		outcome = replication.CommitRefused
		e.log.Info("the controllers refused a change", "error", err)
	}
	if outcome != replication.CommitUnknown && e.silent.Over() {
		e.log.Info("the controllers answer again")
	}
	e.step(func() {
		e.m.Committed(now(), number, outcome, m)
		if outcome != replication.CommitUnknown {
			e.meet(m)
		}
	})
}
