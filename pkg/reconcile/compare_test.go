package reconcile

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var monday = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

// compared is what is compared next, "" is nothing.
func (s *scene) compared(c *Comparing, now time.Time) string {
	x, _ := c.Next(s.State, now)
	return string(x.Snapshot)
}

func TestWhichCopiesAreCompared(t *testing.T) {
	for name, change := range map[string]func(s *scene, x *volume.Snapshot){
		"not ready":          func(_ *scene, x *volume.Snapshot) { x.State = volume.Creating },
		"being deleted":      func(_ *scene, x *volume.Snapshot) { x.State = volume.Deleting },
		"hidden":             func(_ *scene, x *volume.Snapshot) { x.Hidden = true },
		"one copy":           func(_ *scene, x *volume.Snapshot) { x.Holders = x.Holders[:1] },
		"none":               func(_ *scene, x *volume.Snapshot) { x.Holders = nil },
		"a damaged copy":     func(_ *scene, x *volume.Snapshot) { x.Holders[1].Damaged = true },
		"a holder away":      func(s *scene, _ *volume.Snapshot) { s.away("2", time.Second) },
		"a holder not known": func(s *scene, _ *volume.Snapshot) { s.View.Nodes = s.View.Nodes[:1] },
		"newer than its turn": func(_ *scene, x *volume.Snapshot) {
			x.CreatedAt = volume.Timestamp(monday.Add(8 * 24 * time.Hour).UnixNano())
		},
		"nothing is the matter": nil,
	} {
		s := newScene()
		s.snapshot("x", "gone", "1", "2") // of a deleted volume too
		if change != nil {
			change(s, &s.Snapshots[0])
		}
		got := s.compared(NewComparing(monday), monday.Add(8*24*time.Hour))
		if (got == "x") != (change == nil) {
			t.Errorf("%s: %q is compared", name, got)
		}
	}
}

// Each of many is compared once a week, at its own time, whoever leads.
func TestTheWeekIsSpread(t *testing.T) {
	const n = 500
	s := newScene()
	for i := range n {
		s.snapshot(fmt.Sprint("snap-", i), "v", "1", "2")
	}
	c := NewComparing(monday)
	times := map[string]int{}
	days := make([]int, 15)
	for now := monday; now.Before(monday.Add(14 * 24 * time.Hour)); {
		x, ok := c.Next(s.State, now)
		if !ok {
			now = now.Add(time.Hour)
			continue
		}
		c.Now = x
		now = now.Add(time.Minute)
		x.Done = true
		c.Ended(now, x, nil)
		times[string(x.Snapshot)]++
		days[int(now.Sub(monday)/(24*time.Hour))]++
	}
	for i := range n {
		if k := times[fmt.Sprint("snap-", i)]; k < 2 || k > 3 { // three with what another leader may have begun the day before
			t.Fatalf("snapshot %d was compared %d times in two weeks", i, k)
		}
	}
	for i, d := range days[1:14] {
		if d < n/7/2 || d > n/7*3/2 {
			t.Errorf("day %d: %d comparisons of %d in a week: %v", i+1, d, n, days)
		}
	}
	// Another that takes over repeats a day's, no more.
	now := monday.Add(14 * 24 * time.Hour)
	other, repeated := NewComparing(now), 0
	for ; ; repeated++ {
		x, ok := other.Next(s.State, now)
		if !ok {
			break
		}
		x.Done = true
		other.Ended(now, x, nil)
	}
	if repeated == 0 || repeated > n/7*3/2 {
		t.Errorf("a new leader repeats %d of %d", repeated, n)
	}
}

// With more to do than can be done, all have their turn.
func TestNoCopyIsForgotten(t *testing.T) {
	s := newScene()
	for i := range 50 {
		s.snapshot(fmt.Sprint("snap-", i), "v", "1", "2")
	}
	c := NewComparing(monday)
	times := map[string]int{}
	for now := monday; now.Before(monday.Add(70 * 24 * time.Hour)); now = now.Add(12 * time.Hour) { // 140 comparisons, 500 are due
		if x, ok := c.Next(s.State, now); ok {
			x.Done = true
			c.Ended(now, x, nil)
			times[string(x.Snapshot)]++
		}
	}
	for _, x := range s.Snapshots {
		if k := times[string(x.ID)]; k < 2 || k > 4 {
			t.Errorf("%s was compared %d times: %v", x.ID, k, times)
		}
	}
}

func TestAComparisonGoesOn(t *testing.T) {
	s := newScene()
	s.snapshot("a", "v", "1", "2")
	s.snapshot("b", "v", "2", "3")
	c, now := NewComparing(monday), monday.Add(8*24*time.Hour)
	first := s.compared(c, now)
	c.Now = control.Comparison{Snapshot: volume.SnapshotID(first), Offset: 5}
	c.Last[map[string]volume.SnapshotID{"a": "b", "b": "a"}[first]] = monday.Add(-100 * 24 * time.Hour) // it waits for longer
	if x, ok := c.Next(s.State, now); !ok || string(x.Snapshot) != first || x.Offset != 5 {
		t.Errorf("it goes on with %+v", x)
	}
	other := *c
	s.away(map[string]string{"a": "1", "b": "3"}[first], time.Second)
	if got := s.compared(&other, now); got == first || got == "" {
		t.Errorf("a holder of %s is away, and %q is compared", first, got)
	}
	clear(s.Away)
	// What fails waits, and holds up nothing else.
	c.Ended(now, c.Now, volume.ErrUnavailable)
	if got := s.compared(c, now); got == first || got == "" {
		t.Errorf("%s has failed, and %q is compared", first, got)
	}
	c.Ended(now, control.Comparison{Snapshot: volume.SnapshotID(s.compared(c, now)), Done: true}, nil)
	if got := s.compared(c, now.Add(compareRetry-1)); got != "" {
		t.Errorf("%q is compared too early", got)
	}
	if x, _ := c.Next(s.State, now.Add(compareRetry)); string(x.Snapshot) != first || x.Offset != 0 {
		t.Errorf("what failed is begun anew as %+v", x)
	}
	s.Snapshots = nil
	if c.Forget(s.State); len(c.Last)+len(c.Retry) != 0 {
		t.Errorf("remembered: %+v", c)
	}
}

// comparer ends a comparison after some steps, and notes them.
type comparer struct {
	fake
	st    control.State
	steps []control.Comparison
}

func (c *comparer) State(context.Context) (control.State, error) { return c.st, nil }

func (c *comparer) Compare(_ context.Context, x control.Comparison) (control.Comparison, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps = append(c.steps, x)
	x.Offset++
	x.Done = x.Offset == 3
	return x, nil
}

func TestTheLoopCompares(t *testing.T) {
	s := newScene()
	for i := range 200 { // a day's are due at once
		s.snapshot(fmt.Sprint("s", i), "v", "1", "2")
	}
	f := &comparer{st: s.State}
	leads := true
	l := newLoop(f, Options{Interval: 2, Leads: func() bool { return leads }})
	pass := func() {
		t.Helper()
		if err := l.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.actions.Wait()
		time.Sleep(time.Microsecond)
	}
	for range 9 {
		pass()
	}
	if len(f.steps) != 9 {
		t.Fatalf("%d steps", len(f.steps))
	}
	seen := map[volume.SnapshotID]bool{}
	for i, x := range f.steps {
		if x.Offset != int64(i%3) || i%3 > 0 && x.Snapshot != f.steps[i-1].Snapshot || i%3 == 0 && seen[x.Snapshot] {
			t.Errorf("step %d: %+v", i, f.steps)
		}
		seen[x.Snapshot] = true
	}
	// While another leads nothing is compared, and what was done is forgotten.
	pass()
	leads = false
	pass()
	leads = true
	pass()
	if n := len(f.steps); n != 11 || f.steps[10].Offset != 0 {
		t.Errorf("%+v", f.steps[9:])
	}
}
