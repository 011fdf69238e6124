package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestPlan(t *testing.T) {
	now := time.Unix(100, 0)
	v1, v2, s1, q1 := Action{Kind: Volume, ID: "v1"}, Action{Kind: Volume, ID: "v2"}, Action{Kind: Snapshot, ID: "s1"}, Action{Kind: QoS, ID: "v1"}
	planned := Plan(control.Pending{Volumes: []volume.ID{"v1", "v2"}, Snapshots: []volume.SnapshotID{"s1"}, QoS: []volume.ID{"v1"}})
	for _, c := range []struct {
		name  string
		tried map[Action]Attempt
		want  []Action
	}{
		{"all", nil, []Action{v1, v2, s1, q1}},
		{"one pauses", map[Action]Attempt{v1: {Next: now.Add(1)}}, []Action{v2, s1, q1}},
		{"its pause is over", map[Action]Attempt{v1: {Next: now}}, []Action{v2, s1, q1, v1}},
		{"in turn", map[Action]Attempt{v1: {Next: now}, v2: {Next: now.Add(-2)}, s1: {Next: now.Add(-1)}}, []Action{q1, v2, s1, v1}},
	} {
		if got := Due(planned, c.tried, now); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	gone := Action{Kind: Volume, ID: "gone"}
	if got := Settled(planned, map[Action]Attempt{v1: {}, gone: {}}); !slices.Equal(got, []Action{gone}) {
		t.Errorf("settled: %v", got)
	}
}

func TestPause(t *testing.T) {
	for _, c := range []struct {
		failures int
		least    time.Duration
		most     time.Duration
	}{{1, 500 * time.Millisecond, time.Second}, {2, time.Second, 2 * time.Second}, {5, 8 * time.Second, 16 * time.Second}, {7, 30 * time.Second, time.Minute}, {1 << 30, 30 * time.Second, time.Minute}} {
		for _, j := range []float64{0, 0.5, 0.999} {
			if got := Pause(c.failures, time.Second, time.Minute, j); got < c.least || got > c.most {
				t.Errorf("pause after %d failures: %v", c.failures, got)
			}
		}
	}
}

type fake struct {
	mu    sync.Mutex
	left  map[Action]error // what resuming answers; nil is done
	calls []Action
	block chan struct{}
	deaf  map[Action]chan struct{} // what hangs, and until when
}

func (f *fake) Pending(context.Context) (p control.Pending, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for a := range f.left {
		switch a.Kind {
		case Volume:
			p.Volumes = append(p.Volumes, volume.ID(a.ID))
		case Snapshot:
			p.Snapshots = append(p.Snapshots, volume.SnapshotID(a.ID))
		case QoS:
			p.QoS = append(p.QoS, volume.ID(a.ID))
		}
	}
	return p, nil
}

func (f *fake) State(context.Context) (control.State, error) { return control.State{}, nil }

func (f *fake) AddReplica(ctx context.Context, id volume.ID, pool volume.PoolID) error {
	return f.resume(ctx, Action{Kind: Add, ID: string(id), Pool: pool})
}

func (f *fake) DropReplica(ctx context.Context, id volume.ID, r volume.ReplicaID) error {
	return f.resume(ctx, Action{Kind: Drop, ID: string(id), Replica: r})
}

func (f *fake) Sync(ctx context.Context, id volume.ID) error {
	return f.resume(ctx, Action{Kind: Sync, ID: string(id)})
}

func (f *fake) DropHolder(ctx context.Context, id volume.SnapshotID, pool volume.PoolID) error {
	return f.resume(ctx, Action{Kind: Move, ID: string(id), Pool: pool})
}

func (f *fake) CopySnapshot(ctx context.Context, id volume.SnapshotID, from, to volume.PoolID) error {
	return f.resume(ctx, Action{Kind: Copy, ID: string(id), From: from, Pool: to})
}

func (f *fake) EndCopy(ctx context.Context, id volume.ID, into volume.ReplicaID) error {
	return f.resume(ctx, Action{Kind: End, ID: string(id), Replica: into})
}

func (f *fake) Compare(_ context.Context, c control.Comparison) (control.Comparison, error) {
	return c, nil
}

func (f *fake) resume(ctx context.Context, a Action) error {
	if hung := f.deaf[a]; hung != nil {
		<-hung
	}
	if f.block != nil {
		<-ctx.Done()
		return ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, a)
	err := f.left[a]
	if err == nil {
		delete(f.left, a)
	}
	return err
}

func (f *fake) ResumeVolume(ctx context.Context, id volume.ID) error {
	return f.resume(ctx, Action{Kind: Volume, ID: string(id)})
}

func (f *fake) ResumeSnapshot(ctx context.Context, id volume.SnapshotID) error {
	return f.resume(ctx, Action{Kind: Snapshot, ID: string(id)})
}

func (f *fake) ResumeQoS(ctx context.Context, id volume.ID) error {
	return f.resume(ctx, Action{Kind: QoS, ID: string(id)})
}

// Each kind is carried out with all that the plan says.
func TestTake(t *testing.T) {
	f := &fake{left: map[Action]error{}}
	l := newLoop(f, Options{})
	want := []Action{
		{Kind: Volume, ID: "v"}, {Kind: Snapshot, ID: "s"}, {Kind: QoS, ID: "v"}, {Kind: Add, ID: "v", Pool: "p"}, {Kind: Drop, ID: "v", Replica: "r"},
		{Kind: Sync, ID: "v"}, {Kind: Move, ID: "s", Pool: "p"}, {Kind: Copy, ID: "s", From: "p", Pool: "q"}, {Kind: End, ID: "v", Replica: "r"},
	}
	for _, a := range want {
		l.take(t.Context(), a)
	}
	if !slices.Equal(f.calls, want) {
		t.Errorf("calls %+v", f.calls)
	}
}

func TestPassesTakeUpWhatIsDue(t *testing.T) {
	down, busy, ok := Action{Kind: Volume, ID: "down"}, Action{Kind: Volume, ID: "busy"}, Action{Kind: Snapshot, ID: "ok"}
	f := &fake{left: map[Action]error{down: volume.ErrUnavailable, busy: control.ErrUnderWay, ok: nil, {Kind: QoS, ID: "q"}: nil}}
	l := newLoop(f, Options{MinPause: time.Hour, Interval: 2})
	for range 3 {
		if err := l.pass(context.Background()); err != nil {
			t.Fatal(err)
		}
		l.actions.Wait()
		time.Sleep(time.Microsecond) // longer than the interval
	}
	n := map[Action]int{}
	for _, a := range f.calls {
		n[a]++
	}
	if n[down] != 1 || n[busy] != 3 || n[ok] != 1 || n[Action{Kind: QoS, ID: "q"}] != 1 {
		t.Errorf("calls: %v", n)
	}
	if len(l.tried) != 2 || l.tried[down].Failures != 1 || l.tried[busy].Failures != 0 {
		t.Errorf("remembered: %v", l.tried)
	}
	clear(f.left)
	if err := l.pass(context.Background()); err != nil || len(l.tried) != 0 {
		t.Errorf("remembered when nothing is left: %v %v", l.tried, err)
	}
}

// What hangs, deaf to its context as a call into a dead kernel device is, holds up nothing else.
// Another controller may be cutting a snapshot that is seen unfinished: it is given time.
func TestASnapshotIsNotTakenFromAnotherController(t *testing.T) {
	x, v := Action{Kind: Snapshot, ID: "x"}, Action{Kind: Volume, ID: "v"}
	for _, tc := range []struct {
		name        string
		leads       func() bool
		undisturbed time.Duration
		taken       bool
	}{
		{"alone", nil, time.Hour, true},
		{"seen just now", func() bool { return true }, time.Hour, false},
		{"seen for long", func() bool { return true }, 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &fake{left: map[Action]error{x: nil, v: nil}}
			l := newLoop(f, Options{Leads: tc.leads, Undisturbed: tc.undisturbed})
			for range 2 {
				if err := l.pass(t.Context()); err != nil {
					t.Fatal(err)
				}
				l.actions.Wait()
				time.Sleep(time.Microsecond)
			}
			if got := slices.Contains(f.calls, x); got != tc.taken || !slices.Contains(f.calls, v) {
				t.Errorf("calls: %v", f.calls)
			}
		})
	}
}

func TestWhatHangsHoldsUpNothingElse(t *testing.T) {
	hangs := Action{Kind: Volume, ID: "0"}
	f := &fake{left: map[Action]error{hangs: nil}, deaf: map[Action]chan struct{}{hangs: make(chan struct{})}}
	for i := range 50 {
		f.left[Action{Kind: Volume, ID: fmt.Sprint(i)}] = nil
	}
	l := Start(f, Options{Interval: time.Hour, Parallel: 2}) // one pass, and those for which there was no room
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		p, err := f.Pending(context.Background())
		if err == nil && len(p.Volumes) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Error("work waits for what hangs:", p)
			break
		}
	}
	close(f.deaf[hangs])
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestCloseCutsOffWhatHangs(t *testing.T) {
	f := &fake{left: map[Action]error{{Kind: Volume, ID: "v"}: nil}, block: make(chan struct{})}
	l := Start(f, Options{Interval: time.Millisecond})
	time.Sleep(5 * time.Millisecond)
	done := make(chan error)
	go func() { done <- l.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close waits for what hangs")
	}
}

func TestTheLoopEndsWhatIsPending(t *testing.T) {
	f := &fake{left: map[Action]error{}}
	for i := range 20 {
		f.left[Action{Kind: Volume, ID: fmt.Sprint(i)}] = nil
	}
	l := Start(f, Options{Interval: time.Millisecond})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		p, err := f.Pending(context.Background())
		if err == nil && len(p.Volumes) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the loop leaves work behind", errors.Join(err, l.Close()))
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
