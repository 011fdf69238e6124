package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Cluster is what the loop works on. Resume methods go on with whatever is unfinished; they return control.ErrUnderWay, and
// do nothing, while a call works on the same thing.
type Cluster interface {
	Pending(ctx context.Context) (control.Pending, error)
	ResumeVolume(ctx context.Context, id volume.ID) error
	ResumeSnapshot(ctx context.Context, id volume.SnapshotID) error
	ResumeQoS(ctx context.Context, id volume.ID) error
}

// Options of the loop. Zero values are the defaults.
type Options struct {
	Logger *slog.Logger
	// Interval between passes: 5 s. Half of it is the least between two attempts at one thing.
	Interval time.Duration
	// Timeout of one action: 1 minute.
	Timeout time.Duration
	// MinPause and MaxPause after failures: 5 s and 5 minutes.
	MinPause, MaxPause time.Duration
	// Parallel actions at most: 16. One that hangs keeps its place, and nothing else waits for it.
	Parallel int
}

// Loop runs passes until it is closed.
type Loop struct {
	cluster Cluster
	o       Options
	cancel  context.CancelFunc
	done    chan struct{}
	// room is told when an action ends for which others had to wait.
	room    chan struct{}
	actions sync.WaitGroup

	mu      sync.Mutex
	tried   map[Action]Attempt
	running map[Action]bool
	waiting bool // some that are due found no room
}

// Start begins with a pass at once. It starts a goroutine, and that one more for each action under way; Close ends them.
func Start(c Cluster, o Options) *Loop {
	l := newLoop(c, o)
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	go l.run(ctx)
	return l
}

func newLoop(c Cluster, o Options) *Loop {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	set := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	set(&o.Interval, 5*time.Second)
	set(&o.Timeout, time.Minute)
	set(&o.MinPause, 5*time.Second)
	set(&o.MaxPause, 5*time.Minute)
	if o.Parallel == 0 {
		o.Parallel = 16
	}
	return &Loop{
		cluster: c, o: o, done: make(chan struct{}), room: make(chan struct{}, 1),
		tried: map[Action]Attempt{}, running: map[Action]bool{},
	}
}

// Close cuts off what is under way and waits for it.
func (l *Loop) Close() error {
	l.cancel()
	<-l.done
	return nil
}

func (l *Loop) run(ctx context.Context) {
	defer close(l.done)
	defer l.actions.Wait()
	tick := time.NewTicker(l.o.Interval)
	defer tick.Stop()
	for {
		if err := l.pass(ctx); err != nil && ctx.Err() == nil {
			l.o.Logger.Warn("unfinished work cannot be listed", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-l.room:
		}
	}
}

// pass begins what is pending, due and not under way yet, as much as there is room for.
func (l *Loop) pass(ctx context.Context) error {
	p, err := l.cluster.Pending(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range Settled(p, l.tried) {
		delete(l.tried, a)
	}
	l.waiting = false
	for _, a := range Plan(p, l.tried, time.Now()) {
		if l.running[a] {
			continue
		}
		if len(l.running) >= l.o.Parallel {
			l.waiting = true
			break
		}
		l.running[a] = true
		l.actions.Go(func() { l.take(ctx, a) })
	}
	return nil
}

func (l *Loop) take(ctx context.Context, a Action) {
	ctx, cancel := context.WithTimeout(ctx, l.o.Timeout)
	defer cancel()
	var err error
	switch a.Kind {
	case Volume:
		err = l.cluster.ResumeVolume(ctx, volume.ID(a.ID))
	case Snapshot:
		err = l.cluster.ResumeSnapshot(ctx, volume.SnapshotID(a.ID))
	case QoS:
		err = l.cluster.ResumeQoS(ctx, volume.ID(a.ID))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, a)
	if l.waiting {
		select {
		case l.room <- struct{}{}:
		default:
		}
	}
	t := l.tried[a]
	pause := l.o.Interval / 2
	switch {
	case err == nil:
		t.Failures = 0
	case errors.Is(err, control.ErrUnderWay):
	default:
		t.Failures++
		pause = Pause(t.Failures, l.o.MinPause, l.o.MaxPause, rand.Float64())
		l.o.Logger.Warn("unfinished work is put off", "what", a.Kind, "id", a.ID, "failures", t.Failures, "pause", pause, "error", err)
	}
	t.Next = time.Now().Add(pause)
	l.tried[a] = t
}
