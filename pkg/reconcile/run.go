package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

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
	// Interval between passes: 5 s.
	Interval time.Duration
	// Timeout of one action: 1 minute.
	Timeout time.Duration
	// MinPause and MaxPause after failures: 5 s and 5 minutes.
	MinPause, MaxPause time.Duration
	// Parallel actions at most: 4.
	Parallel int
}

// Loop runs passes until it is closed.
type Loop struct {
	cluster Cluster
	o       Options
	cancel  context.CancelFunc
	done    chan struct{}

	mu    sync.Mutex
	tried map[Action]Attempt
}

// Start begins with a pass at once. It starts one goroutine, which Close ends.
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
		o.Parallel = 4
	}
	return &Loop{cluster: c, o: o, done: make(chan struct{}), tried: map[Action]Attempt{}}
}

// Close cuts off what is under way and waits for it.
func (l *Loop) Close() error {
	l.cancel()
	<-l.done
	return nil
}

func (l *Loop) run(ctx context.Context) {
	defer close(l.done)
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
		}
	}
}

// pass takes up once what is pending and due.
func (l *Loop) pass(ctx context.Context) error {
	p, err := l.cluster.Pending(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	for _, a := range Settled(p, l.tried) {
		delete(l.tried, a)
	}
	due := Plan(p, l.tried, time.Now())
	l.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(l.o.Parallel)
	for _, a := range due {
		g.Go(func() error {
			l.take(ctx, a)
			return nil
		})
	}
	return g.Wait()
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
	switch {
	case err == nil:
		delete(l.tried, a)
	case errors.Is(err, control.ErrUnderWay): // look again at the next pass
	default:
		t := l.tried[a]
		t.Failures++
		pause := Pause(t.Failures, l.o.MinPause, l.o.MaxPause, rand.Float64())
		t.Next = time.Now().Add(pause)
		l.tried[a] = t
		l.o.Logger.Warn("unfinished work is put off", "what", a.Kind, "id", a.ID, "failures", t.Failures, "pause", pause, "error", err)
	}
}
