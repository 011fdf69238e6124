package control_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// copies are those of a snapshot on pools p1 to p4: what each region has; "" reads as zeros and is written, a region without an
// entry was never written.
type copies struct {
	*world
	of volume.Snapshot

	mu sync.Mutex
	at map[volume.PoolID]map[int]string
	// during is called with each question, with the number of those before it.
	during func(n int)
	asked  int
	log    bytes.Buffer
}

func newCopies(t *testing.T, replicas int) *copies {
	c := &copies{world: newCluster(t), at: map[volume.PoolID]map[int]string{}}
	c.Service = control.New(c.store, c.agents, control.Options{Now: func() time.Time { return c.now }, Logger: slog.New(slog.NewTextHandler(&c.log, nil))})
	v := c.mustCreate(replicated("v", replicas))
	c.of = c.mustSnapshot("s", v.ID)
	for _, h := range c.of.Holders {
		c.at[h.Pool] = map[int]string{}
		for i := range 100 {
			c.at[h.Pool][i] = fmt.Sprint(i)
		}
	}
	c.agents.digest = c.digest
	return c
}

func (c *copies) set(holder, region int, bytes string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at[c.of.Holders[holder].Pool][region] = bytes
}

func (c *copies) digest(ctx context.Context, h volume.Replica, offset int64, regions int) (control.Digest, error) {
	c.mu.Lock()
	n := c.asked
	c.asked++
	during := c.during
	c.mu.Unlock()
	if during != nil {
		during(n)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() != nil {
		return control.Digest{}, fmt.Errorf("%w: %w", ctx.Err(), volume.ErrUnavailable)
	}
	d := control.Digest{Next: c.of.Size}
	for i := range int(c.of.Size / control.DigestRegion) {
		off := int64(i) * control.DigestRegion
		bytes, written := c.at[h.Pool][i]
		if !written || off < offset {
			continue
		}
		if regions == 0 {
			d.Next = off
			break
		}
		regions--
		if bytes != "" {
			d.Regions = append(d.Regions, control.RegionDigest{Offset: off, Sum: []byte(bytes)})
		}
	}
	return d, nil
}

// compare goes through all of the snapshot, as the reconciler does.
func (c *copies) compare() error {
	c.t.Helper()
	x := control.Comparison{Snapshot: c.of.ID}
	for range 1000 {
		var err error
		if x, err = c.Compare(c.t.Context(), x); err != nil || x.Done {
			return err
		}
	}
	c.t.Fatal("a comparison does not end")
	return nil
}

func (c *copies) conditions() []volume.Condition {
	c.t.Helper()
	x, err := c.Snapshot(c.t.Context(), c.of.ID)
	if err != nil {
		c.t.Fatal(err)
	}
	return control.SnapshotConditions(x)
}

func (c *copies) alarms() int { return strings.Count(c.log.String(), "level=ERROR") }

func (c *copies) drop(holder int) {
	c.t.Helper()
	wantErr(c.t, c.DeleteVolume(c.t.Context(), c.of.Volume), nil)
	c.agents.setDown(c.of.Holders[holder].Node, true) // it is freed later
	wantErr(c.t, c.DropHolder(c.t.Context(), c.of.ID, c.of.Holders[holder].Pool), nil)
}

func TestCopiesThatDiffer(t *testing.T) {
	c := newCopies(t, 2)
	// Zeros are zeros, and reading goes on at different places.
	c.set(0, 101, "")
	delete(c.at[c.of.Holders[0].Pool], 5)
	c.set(1, 5, "")
	for i := 110; i < 127; i++ {
		c.set(1, i, "")
	}
	wantErr(t, c.compare(), nil)
	if got := c.conditions(); len(got) != 0 || c.asked < 2*100/control.MaxDigests {
		t.Fatalf("alike: %v after %d questions", got, c.asked)
	}
	before := c.get(c.of.Volume)
	for _, region := range []int{0, 15, 16, 99, 101, 127} {
		old, written := c.at[c.of.Holders[1].Pool][region]
		alarms := c.alarms()
		c.set(1, region, "other")
		for range 2 {
			wantErr(t, c.compare(), nil)
			got := c.conditions()
			if len(got) != 1 || got[0].Reason != "CopiesDiffer" || got[0].Severity != volume.Degraded ||
				!strings.Contains(got[0].Message, fmt.Sprintf("offset %d on: one on %s, another on %s", region*control.DigestRegion, c.of.Holders[0].Node, c.of.Holders[1].Node)) {
				t.Errorf("region %d: %+v", region, got)
			}
			if c.alarms() != alarms+1 {
				t.Errorf("region %d: logged %d times", region, c.alarms()-alarms)
			}
		}
		if c.set(1, region, old); !written {
			c.set(1, region, "")
		}
		wantErr(t, c.compare(), nil)
		if got := c.conditions(); len(got) != 0 {
			t.Errorf("region %d is alike again: %+v", region, got)
		}
	}
	// It changes nothing else, and has nothing repaired.
	if after := c.get(c.of.Volume); after.ConfigVersion != before.ConfigVersion || len(c.planned()) != 0 {
		t.Errorf("%+v, planned %v", after, c.planned())
	}
}

func TestTheOddCopyIsNamed(t *testing.T) {
	c := newCopies(t, 3)
	c.set(0, 7, "other")
	wantErr(t, c.compare(), nil)
	n := func(i int) volume.NodeID { return c.of.Holders[i].Node }
	text := fmt.Sprintf("one on %s, %s, another on %s", n(1), n(2), n(0))
	if got := c.conditions(); len(got) != 1 || !strings.Contains(got[0].Message, text) || !strings.Contains(got[0].Message, "stands alone") {
		t.Fatalf("%+v, want %s", got, text)
	}
	if plan := c.planned(); len(plan) != 0 {
		t.Errorf("planned %v", plan) // a majority proves nothing
	}
	c.restart() // it is recorded
	if got := c.conditions(); len(got) != 1 {
		t.Error("forgotten with the process")
	}
	// A scrub finds which one is damaged; a copy that is held no more does not count.
	c.scrubbed(n(0), nil, []volume.SnapshotID{c.of.ID})
	if got := c.conditions(); len(got) != 0 {
		t.Errorf("the damage is known: %+v", got)
	}
	c.scrubbed(n(0), nil, nil)
	if got := c.conditions(); len(got) != 1 {
		t.Error("it is sound after all, and differs")
	}
	lose := func(holder int) {
		c.propose(command.DropHolder{Snapshot: c.of.ID, Pool: c.of.Holders[holder].Pool, Lost: true})
	}
	lose(1)
	if got := c.conditions(); len(got) != 1 {
		t.Error("two are left, which differ")
	}
	lose(0)
	if got := c.conditions(); len(got) != 0 {
		t.Errorf("one is left: %+v", got)
	}
}

// What happens while copies are compared is no difference.
func TestNoFalseDifference(t *testing.T) {
	const differs = 40 // in the third step; each asks both holders
	for name, tt := range map[string]struct {
		happens func(c *copies)
		last    int // question before which it may happen
		gone    bool
	}{
		"the snapshot is deleted": {func(c *copies) { wantErr(c.t, c.DeleteSnapshot(context.Background(), c.of.ID), nil) }, 7, true},
		"a holder is dropped":     {func(c *copies) { c.drop(1) }, 7, false},
		"a holder is damaged":     {func(c *copies) { c.scrubbed(c.of.Holders[1].Node, nil, []volume.SnapshotID{c.of.ID}) }, 7, false},
		"it is read otherwise":    {func(c *copies) { c.set(1, differs, fmt.Sprint(differs)) }, 6, false},
	} {
		for at := range tt.last + 1 { // before the difference is read, after, and while it is read again
			t.Run(fmt.Sprint(name, " ", at), func(t *testing.T) {
				c := newCopies(t, 2)
				c.set(1, differs, "other")
				var once sync.Once
				c.during = func(n int) {
					if n >= at {
						once.Do(func() { tt.happens(c) })
					}
				}
				err := c.compare()
				x, gone := c.Snapshot(t.Context(), c.of.ID)
				switch {
				case tt.gone:
					wantErr(t, gone, volume.ErrNotFound)
				case x.Differs != nil || c.alarms() > 0:
					t.Errorf("reported: %+v", x.Differs)
				}
				if err != nil && !errors.Is(err, volume.ErrBusy) && !errors.Is(err, volume.ErrNotFound) {
					t.Error(err)
				}
			})
		}
	}
}

// A copy that changes its pool, or comes anew, while others are compared is not compared halfway.
func TestOtherHoldersBeginAnew(t *testing.T) {
	c := newCopies(t, 3)
	x, err := c.Compare(t.Context(), control.Comparison{Snapshot: c.of.ID})
	wantErr(t, err, nil)
	if x.Done || x.Offset != control.MaxDigests*control.DigestRegion || !slices.EqualFunc(x.Holders, c.of.Holders, func(a, b volume.Replica) bool { return a.Pool == b.Pool }) {
		t.Errorf("%+v", x)
	}
	c.drop(2)
	_, err = c.Compare(t.Context(), x)
	wantErr(t, err, volume.ErrBusy)
	wantErr(t, c.compare(), nil)
	c.drop(1)
	x, err = c.Compare(t.Context(), control.Comparison{Snapshot: c.of.ID}) // with one there is nothing to compare
	wantErr(t, err, nil)
	if !x.Done {
		t.Errorf("%+v", x)
	}
}

// A holder that hangs ends with the caller's time, and proves nothing.
func TestAHolderHangs(t *testing.T) {
	c := newCopies(t, 2)
	c.set(1, 0, "other")
	inner := c.agents.digest
	c.agents.digest = func(ctx context.Context, h volume.Replica, offset int64, regions int) (control.Digest, error) {
		if h.Pool == c.of.Holders[0].Pool {
			<-ctx.Done()
		}
		return inner(ctx, h, offset, regions)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := c.Compare(ctx, control.Comparison{Snapshot: c.of.ID})
	wantErr(t, err, volume.ErrUnavailable)
	if got := c.conditions(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// The state says when all can be read.
func TestComparisonsArePlanned(t *testing.T) {
	c := newCopies(t, 2)
	begin := c.now
	memory := reconcile.NewComparing(begin)
	next := func() (control.Comparison, bool) {
		t.Helper()
		st, err := c.State(t.Context())
		wantErr(t, err, nil)
		return memory.Next(st, begin.Add(8*24*time.Hour))
	}
	if x, ok := next(); !ok || x.Snapshot != c.of.ID {
		t.Errorf("%+v %v", x, ok)
	}
	c.silence(c.of.Holders[1].Node, 3*time.Minute)
	if x, ok := next(); ok {
		t.Errorf("a holder is away: %+v", x)
	}
}
