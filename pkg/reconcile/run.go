package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Cluster is what the loop works on. Resume methods go on with whatever is unfinished; they return control.ErrUnderWay, and
// do nothing, while a call works on the same thing.
type Cluster interface {
	Pending(ctx context.Context) (control.Pending, error)
	ResumeVolume(ctx context.Context, id volume.ID) error
	ResumeSnapshot(ctx context.Context, id volume.SnapshotID) error
	ResumeQoS(ctx context.Context, id volume.ID) error
	// State is what repairs are planned from. The methods that carry them out return control.ErrUnderWay too.
	State(ctx context.Context) (control.State, error)
	AddReplica(ctx context.Context, id volume.ID, pool volume.PoolID) error
	DropReplica(ctx context.Context, id volume.ID, r volume.ReplicaID) error
	Sync(ctx context.Context, id volume.ID) error
	DropHolder(ctx context.Context, id volume.SnapshotID, pool volume.PoolID) error
	CopySnapshot(ctx context.Context, id volume.SnapshotID, from, to volume.PoolID) error
	EndCopy(ctx context.Context, id volume.ID, into volume.ReplicaID) error
	// Compare does a bounded part of a comparison of a snapshot's copies.
	Compare(ctx context.Context, c control.Comparison) (control.Comparison, error)
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
	// SyncPause is the least between two looks at replicas that are being brought up: 30 s.
	SyncPause time.Duration
	// Undisturbed is for how long a snapshot is seen unfinished before it is taken up, where another process may be cutting
	// it, that is, with Leads: 10 s. What that process does is not known here, and to drop its snapshot would fail its call.
	Undisturbed time.Duration
	Limits      Limits
	// Leads tells whether this process is the one that acts; nil: always. While it is not, nothing is begun.
	Leads func() bool
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
	away    map[volume.PoolID]time.Duration
	// comparing is forgotten while another leads.
	comparing *Comparing
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
	set(&o.SyncPause, 30*time.Second)
	set(&o.Undisturbed, 10*time.Second)
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
	var unlisted repeat.Trouble
	for {
		switch err := l.pass(ctx); {
		case err == nil:
			if unlisted.Over() {
				l.o.Logger.Info("unfinished work is listed again")
			}
		case ctx.Err() == nil && unlisted.Again():
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
	if l.o.Leads != nil && !l.o.Leads() {
		l.mu.Lock()
		l.comparing = nil
		l.mu.Unlock()
		return nil
	}
	p, err := l.cluster.Pending(ctx)
	if err != nil {
		return err
	}
	st, err := l.cluster.State(ctx)
	if err != nil {
		return err
	}
	planned := append(Plan(p), Repairs(st, l.o.Limits)...)
	l.mu.Lock()
	defer l.mu.Unlock()
	if a, ok := l.compare(st); ok {
		planned = append(planned, a)
	}
	for _, a := range Settled(planned, l.tried) {
		delete(l.tried, a)
	}
	for pool := range l.away {
		if _, still := st.Away[pool]; !still { // what failed for its sake may go now
			l.tried = map[Action]Attempt{}
		}
	}
	l.away = st.Away
	l.waiting = false
	if l.o.Leads != nil {
		for _, a := range planned {
			if _, seen := l.tried[a]; !seen && a.Kind == Snapshot {
				l.tried[a] = Attempt{Next: time.Now().Add(l.o.Undisturbed)}
			}
		}
	}
	for _, a := range Due(planned, l.tried, time.Now()) {
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

// compare plans the one comparison that goes on. The lock is held.
func (l *Loop) compare(st control.State) (Action, bool) {
	for a := range l.running {
		if a.Kind == Compare {
			return a, true
		}
	}
	now := time.Now()
	if l.comparing == nil {
		l.comparing = NewComparing(now)
	}
	l.comparing.Forget(st)
	next, ok := l.comparing.Next(st, now)
	l.comparing.Now = next
	return Action{Kind: Compare, ID: string(next.Snapshot)}, ok
}

// step goes on with the comparison of a snapshot's copies.
func (l *Loop) step(ctx context.Context, id volume.SnapshotID) {
	l.mu.Lock()
	of := l.comparing
	if of == nil || of.Now.Snapshot != id {
		l.mu.Unlock()
		return
	}
	c := of.Now
	l.mu.Unlock()
	c, err := l.cluster.Compare(ctx, c)
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, again := of.Retry[id]; err != nil && !again {
		l.o.Logger.Warn("the copies of a snapshot are compared later", "snapshot", id, "pause", compareRetry, "error", err)
	}
	of.Ended(time.Now(), c, err)
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
	case Add:
		err = l.cluster.AddReplica(ctx, volume.ID(a.ID), a.Pool)
	case Drop:
		err = l.cluster.DropReplica(ctx, volume.ID(a.ID), a.Replica)
	case Sync:
		err = l.cluster.Sync(ctx, volume.ID(a.ID))
	case Compare:
		l.step(ctx, volume.SnapshotID(a.ID))
	case Move:
		err = l.cluster.DropHolder(ctx, volume.SnapshotID(a.ID), a.Pool)
	case Copy:
		err = l.cluster.CopySnapshot(ctx, volume.SnapshotID(a.ID), a.From, a.Pool)
	case End:
		err = l.cluster.EndCopy(ctx, volume.ID(a.ID), a.Replica)
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
		switch a.Kind {
		case Sync: // it is planned until they are up
			pause = l.o.SyncPause
		case Compare: // the nodes pause while they read
			pause = 0
		}
	case errors.Is(err, control.ErrUnderWay):
	default:
		t.Failures++
		pause = Pause(t.Failures, l.o.MinPause, l.o.MaxPause, rand.Float64())
		l.o.Logger.Warn("unfinished work is put off", "what", a.Kind, "id", a.ID, "failures", t.Failures, "pause", pause, "error", err)
	}
	t.Next = time.Now().Add(pause)
	l.tried[a] = t
}
