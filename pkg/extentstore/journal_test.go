package extentstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func tag(peer string, since int) replication.MissedTag {
	return replication.MissedTag{Peer: volume.ReplicaID(peer), Since: volume.ConfigVersion(since)}
}

// runs are pairs of first and number.
func runs(n ...uint32) (out []region.Run) {
	for i := 0; i < len(n); i += 2 {
		out = append(out, region.Run{First: n[i], N: n[i+1]})
	}
	return out
}

// missedOf pages through what a peer missed, limit runs at a time.
func missedOf(r *Replica, peer volume.ReplicaID, limit int) (since volume.ConfigVersion, out []region.Run, err error) {
	from := uint32(0)
	for {
		since, some, next, more, err := r.MissedRuns(context.Background(), peer, from, limit)
		if err != nil {
			return 0, nil, err
		}
		if len(some) > limit || more && next <= from && from > 0 {
			return 0, nil, fmt.Errorf("%d runs, going on at %d after %d", len(some), next, from)
		}
		out = append(out, some...)
		if from = next; !more {
			return since, out, nil
		}
	}
}

func journalOf(t *testing.T, r *Replica) (all []string) {
	t.Helper()
	all = append(all, fmt.Sprintf("state %q", r.State()), fmt.Sprint("wil ", r.WIL()))
	for _, m := range r.Missed() {
		since, out, err := missedOf(r, m.Peer, 2)
		must(t, err)
		if since != m.Since {
			t.Errorf("%s is tracked since %d and %d", m.Peer, since, m.Since)
		}
		all = append(all, fmt.Sprint(m.Peer, " since ", since, " ", out))
	}
	return all
}

func TestJournal(t *testing.T) {
	m := newMachine()
	o := Options{Capacity: 64 * mib, manual: true}
	p := openMem(t, m, o)
	ctx := t.Context()
	r := newReplica(t, p, "r", 2<<30, "")
	expect := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, journalOf(t, r)); diff != "" {
			t.Error(diff)
		}
	}
	expect(`state ""`, "wil []")
	commits := len(m.kv.m)
	must(t, r.SetState(ctx, []byte("one")))
	must(t, r.SetState(ctx, []byte("two")))
	must(t, r.MarkWIL(ctx, runs(3, 2, 511, 2, 2000, 1)))
	must(t, r.MarkWIL(ctx, runs(4, 1)))
	must(t, r.ClearWIL(ctx, runs(3, 1, 900, 2000)))
	must(t, r.TrackMissed(ctx, tag("b", 7)))
	must(t, r.TrackMissed(ctx, tag("b", 9))) // stays
	r.NoteMissed("b", layer.ExtentSize-1, 2)
	r.NoteMissed("nobody", 0, 1)
	must(t, r.AddMissed(ctx, tag("c", 4), runs(1, 1, 4095, 2, 9000, 5000)))
	r.NoteMissed("c", 2*layer.ExtentSize, layer.ExtentSize)
	want := []string{`state "two"`, "wil [{4 1} {511 2}]", "b since 7 [{0 2}]", "c since 4 [{1 2} {4095 2} {9000 5000}]"}
	expect(want...)
	must(t, r.Flush(ctx))
	must(t, r.Close())
	if n := p.missedPages.Load() + p.missedDirty.Load(); n != 0 {
		t.Errorf("%d pages of a closed replica are counted", n)
	}

	// A crash keeps what was answered; closing has stored what was cleared.
	_ = p.Close()
	m = m.crash(1)
	p = openMem(t, m, o)
	var err error
	r, err = p.OpenReplica(ctx, "r")
	must(t, err)
	expect(want...)
	must(t, r.AddMissed(ctx, tag("b", 3), runs(5, 1)))
	expect(want[0], want[1], "b since 3 [{0 2} {5 1}]", want[3])
	must(t, r.DropMissed(ctx, "c"))
	must(t, r.DropMissed(ctx, "none"))
	expect(want[0], want[1], "b since 3 [{0 2} {5 1}]")
	must(t, r.TrackMissed(ctx, tag("c", 12))) // begins empty, whatever is left of before
	expect(want[0], want[1], "b since 3 [{0 2} {5 1}]", "c since 12 []")
	if _, _, err := missedOf(r, "none", 1); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("a peer that is not tracked: %v", err)
	}
	must(t, r.DropMissed(ctx, ""))
	expect(want[0], want[1])
	settle(t, p)
	if got := r.State(); string(got) != "two" {
		t.Errorf("state of the replica: %q", got)
	}
	must(t, r.AddMissed(ctx, tag("d", 1), runs(0, 2*purgeStep*missedExtents+1)))
	must(t, r.Close())
	must(t, p.DeleteReplica(ctx, "r"))
	settle(t, p)
	for k := range m.kv.m {
		for _, kind := range journalKinds {
			if k[0] == kind.kind {
				t.Errorf("key %x is left of a deleted replica", k)
			}
		}
	}
	if commits > len(m.kv.m)+3 {
		t.Errorf("a replica without protocol had keys")
	}
	must(t, p.Close())
}

func TestJournalRefuses(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	r := newReplica(t, p, "r", mib, "")
	for i := range maxPeers {
		must(t, r.TrackMissed(ctx, tag(fmt.Sprintf("p%d", i), i)))
	}
	done, stop := context.WithCancel(ctx)
	stop()
	for name, c := range map[string]struct{ got, want error }{
		"large state":        {r.SetState(ctx, make([]byte, replication.MaxState+1)), volume.ErrInvalid},
		"largest state":      {r.SetState(ctx, make([]byte, replication.MaxState)), nil},
		"runs out of order":  {r.MarkWIL(ctx, runs(5, 1, 4, 1)), volume.ErrOutOfRange},
		"runs that overlap":  {r.MarkWIL(ctx, runs(5, 2, 6, 1)), volume.ErrOutOfRange},
		"an empty run":       {r.ClearWIL(ctx, runs(5, 0)), volume.ErrOutOfRange},
		"no such region":     {r.MarkWIL(ctx, runs(uint32(volume.MaxSize/regionSize), 1)), volume.ErrOutOfRange},
		"the last region":    {r.MarkWIL(ctx, runs(uint32(volume.MaxSize/regionSize)-1, 1)), nil},
		"too many regions":   {r.MarkWIL(ctx, runs(0, maxMarked+1)), volume.ErrOutOfRange},
		"one peer too many":  {r.TrackMissed(ctx, tag("more", 1)), volume.ErrInvalid},
		"a peer without":     {r.AddMissed(ctx, tag("", 1), nil), volume.ErrInvalid},
		"no such extent":     {r.AddMissed(ctx, tag("p1", 1), runs(region.Max-1, 2)), volume.ErrOutOfRange},
		"state, cancelled":   {r.SetState(done, nil), context.Canceled},
		"mark, cancelled":    {r.MarkWIL(done, runs(1, 1)), context.Canceled},
		"add, cancelled":     {r.AddMissed(done, tag("p1", 1), nil), context.Canceled},
		"snapshot not there": {func() error { _, err := r.Snapshot(ctx, "x"); return err }(), volume.ErrNotFound},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
	must(t, r.Close())
	_, _, _, _, missed := r.MissedRuns(ctx, "p1", 0, 1)
	_, _, _, allocated := r.Allocated(ctx, "", "", 0, 1)
	for name, err := range map[string]error{
		"state": r.SetState(ctx, nil), "mark": r.MarkWIL(ctx, nil), "clear": r.ClearWIL(ctx, nil), "track": r.TrackMissed(ctx, tag("x", 1)),
		"add": r.AddMissed(ctx, tag("x", 1), nil), "drop": r.DropMissed(ctx, "x"), "missed": missed, "allocated": allocated,
		"seal": r.Seal(ctx, "s", 1), "resize": r.Resize(ctx, 2*mib),
	} {
		if !errors.Is(err, block.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
}

// TestFailedMark: a mark that could not be made durable is not answered, nor is anything after it.
func TestFailedMark(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	ctx := t.Context()
	r := newReplica(t, p, "r", mib, "")
	must(t, r.MarkWIL(ctx, runs(0, 1)))
	m.kv.fail = errors.New("no")
	for range 2 {
		if err := r.MarkWIL(ctx, runs(1, 1)); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("a mark that failed: %v", err)
		}
	}
	for name, err := range map[string]error{
		"state": r.SetState(ctx, nil), "known mark": r.MarkWIL(ctx, runs(0, 1)), "track": r.TrackMissed(ctx, tag("x", 1)),
		"drop": r.DropMissed(ctx, "x"), "flush": r.Flush(ctx), "seal": r.Seal(ctx, "s", 1),
	} {
		if err == nil {
			t.Errorf("%s succeeds after a failure", name)
		}
	}
	_ = p.Close()
}

// TestMarksJoin: marks that come while another is being made durable share one commit, and those that are there cost none.
func TestMarksJoin(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	r := newReplica(t, p, "r", 1<<40, "")
	w := &power{left: -1, rng: rand.New(rand.NewPCG(1, 1))}
	first, goOn := make(chan bool), make(chan bool)
	w.during = func(string) { first <- true; <-goOn }
	m.plug(w)
	var all sync.WaitGroup
	mark := func(i uint32) {
		all.Add(1)
		go func() {
			defer all.Done()
			if err := r.MarkWIL(context.Background(), runs(i, 1)); err != nil {
				t.Error(err)
			}
		}()
	}
	mark(0)
	<-first
	w.mu.Lock()
	w.during = nil
	w.mu.Unlock()
	for i := range uint32(100) {
		mark(1 + i*700)
	}
	eventually(t, "marks that wait", func() bool {
		p.wil.mu.Lock()
		defer p.wil.mu.Unlock()
		return p.wil.open != nil && len(p.wil.open.groups) == 100
	})
	goOn <- true
	all.Wait()
	for i := range uint32(100) {
		mark(1 + i*700)
	}
	all.Wait()
	if w.steps != 2 {
		t.Errorf("%d commits for marks that came together", w.steps)
	}
}

func TestLayersForRebuild(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	defer func() { must(t, p.Close()) }()
	ctx := t.Context()
	d := newReplica(t, p, "origin", 32*mib, "")
	one := bytes.Repeat([]byte{1}, layer.ExtentSize)
	write := func(r *Replica, extent int64) { t.Helper(); must(t, r.WriteAt(ctx, one, extent*layer.ExtentSize)) }
	write(d, 0)
	must(t, p.Cut(ctx, "origin", "o"))
	r := newReplica(t, p, "r", 32*mib, "o")
	write(r, 1)
	must(t, r.Seal(ctx, "a", 1))
	must(t, r.Seal(ctx, "a", 1)) // again is nil
	write(r, 2)
	must(t, r.WriteAt(ctx, one[:layer.BlockSize], 4*layer.ExtentSize))
	must(t, r.WriteAt(ctx, one[:layer.BlockSize], 5*layer.ExtentSize-layer.BlockSize))
	must(t, r.Zero(ctx, layer.ExtentSize, layer.ExtentSize))
	must(t, r.Seal(ctx, "b", 2))
	write(r, 200)
	expect := func(want ...replication.SealedSnapshot) {
		t.Helper()
		if diff := cmp.Diff(want, r.Snapshots()); diff != "" {
			t.Error(diff)
		}
	}
	expect(replication.SealedSnapshot{ID: "a", Number: 1}, replication.SealedSnapshot{ID: "b", Number: 2})
	for _, c := range []struct {
		s, base volume.SnapshotID
		want    []region.Run
	}{
		{"a", "", runs(0, 2)}, {"b", "a", runs(1, 2, 4, 1)}, {"", "b", runs(200, 1)}, {"b", "", runs(0, 1, 2, 1, 4, 1)},
		{"", "", runs(0, 1, 2, 1, 4, 1, 200, 1)}, {"a", "o", runs(1, 1)}, {"a", "a", nil},
	} {
		var got []region.Run
		for from, more := uint32(0), true; more; {
			var some []region.Run
			var err error
			some, from, more, err = r.Allocated(ctx, c.s, c.base, from, 1)
			must(t, err)
			got = append(got, some...)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q since %q: %v, want %v", c.s, c.base, got, c.want)
		}
	}
	for _, c := range []struct {
		s, base volume.SnapshotID
		want    error
	}{{"x", "", volume.ErrNotFound}, {"", "x", volume.ErrNotFound}, {"a", "b", volume.ErrInvalid}} {
		if _, _, _, err := r.Allocated(ctx, c.s, c.base, 0, 9); !errors.Is(err, c.want) {
			t.Errorf("%q since %q: %v", c.s, c.base, err)
		}
	}
	// An earlier try of a barrier makes way for the next, unless somebody reads it.
	reader, err := r.Snapshot(ctx, "b")
	must(t, err)
	if err := r.Seal(ctx, "b", 3); !errors.Is(err, volume.ErrBusy) {
		t.Errorf("a seal over a snapshot that is read: %v", err)
	}
	must(t, reader.Close())
	must(t, r.Seal(ctx, "b", 3))
	expect(replication.SealedSnapshot{ID: "a", Number: 1}, replication.SealedSnapshot{ID: "b", Number: 3})
	if err := d.Seal(ctx, "b", 3); !errors.Is(err, volume.ErrExists) {
		t.Errorf("a seal of another replica's snapshot: %v", err)
	}
	settle(t, p)
	sound(t, m)
	got, next, more, err := r.Allocated(ctx, "b", "a", 0, 100)
	if want := runs(1, 2, 4, 1, 200, 1); err != nil || more || next != 0 || !slices.Equal(got, want) {
		t.Errorf("after the merge: %v %v", got, err)
	}
	must(t, r.Resize(ctx, 33*mib))
	if r.Size() != 33*mib {
		t.Errorf("size is %d", r.Size())
	}
}

// TestMissedStaysBounded marks all over a large volume: memory is bounded, and nothing is lost.
func TestMissedStaysBounded(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib})
	ctx := t.Context()
	r := newReplica(t, p, "r", 3<<40, "")
	must(t, r.AddMissed(ctx, tag("full", 1), runs(0, 3<<40/layer.ExtentSize)))
	must(t, r.TrackMissed(ctx, tag("some", 1)))
	buf := make([]byte, 1)
	for off := int64(0); off < 3<<40; off += 512 * mib {
		r.NoteMissed("some", off, 1)
		if off%(1<<40) == 0 {
			must(t, r.WriteAt(ctx, buf, off)) // which waits while too many are dirty
		}
	}
	must(t, r.Flush(ctx))
	if n := p.missedPages.Load(); n > cleanMissed+maxMissedDirty {
		t.Errorf("%d pages are in memory", n)
	}
	must(t, p.Close())
	p = openMem(t, m.crash(3), Options{Capacity: 64 * mib})
	defer p.Close()
	r, err := p.OpenReplica(ctx, "r")
	must(t, err)
	_, full, err := missedOf(r, "full", 1000)
	if want := runs(0, 3<<40/layer.ExtentSize); err != nil || !slices.Equal(full, want) {
		t.Errorf("%d runs: %v", len(full), err)
	}
	_, some, err := missedOf(r, "some", 1000)
	if err != nil || len(some) != 3<<40/(512*mib) {
		t.Errorf("%d runs: %v", len(some), err)
	}
}

// TestTagVouches cuts an addition off at each of its steps: a tag is there only with all that it vouches for.
func TestTagVouches(t *testing.T) {
	for _, broken := range []bool{false, true} {
		extents, found := set{}, false
		for i := range uint32(10) {
			extents[i*missedExtents+7] = true
		}
		for steps := 0; ; steps++ {
			o := Options{Capacity: 64 * mib, manual: true, maxMissed: 2, broken: rules{tagBeforeMissed: broken}}
			m := newMachine()
			p := openMem(t, m, o)
			r := newReplica(t, p, "r", 16<<30, "")
			must(t, r.TrackMissed(t.Context(), tag("old", 9)))
			w := &power{left: steps, rng: rand.New(rand.NewPCG(uint64(steps), 1))}
			m.plug(w)
			var err error
			for _, peer := range []string{"old", "new"} {
				err = errors.Join(err, r.AddMissed(t.Context(), tag(peer, 5), extents.runs()))
			}
			m = m.crash(uint64(steps))
			_ = p.Close()
			p = openMem(t, m, o)
			r, openErr := p.OpenReplica(t.Context(), "r")
			must(t, openErr)
			for _, tag := range r.Missed() {
				_, runs, err := missedOf(r, tag.Peer, 3)
				must(t, err)
				if lost := extents.without(setOf(runs)); tag.Since == 5 && len(lost) > 0 {
					found = true
					if !broken {
						t.Errorf("after %d steps the tag of %s vouches for %v, which is lost", steps, tag.Peer, lost)
					}
				}
			}
			settle(t, p)
			sound(t, m)
			must(t, p.Close())
			if err == nil {
				break
			}
		}
		if found != broken {
			t.Errorf("with the rule broken %v, a tag without its extents was found: %v", broken, found)
		}
	}
}

// TestMarkDuringClear marks a region again while the commit that takes it out is under way: that commit does not count.
func TestMarkDuringClear(t *testing.T) {
	for _, broken := range []bool{false, true} {
		o := Options{Capacity: 64 * mib, manual: true, broken: rules{clearStaysStored: broken}}
		m := newMachine()
		p := openMem(t, m, o)
		r := newReplica(t, p, "r", 16<<30, "")
		must(t, r.MarkWIL(t.Context(), runs(5, 1)))
		must(t, r.ClearWIL(t.Context(), runs(5, 1)))
		w := &power{left: -1, rng: rand.New(rand.NewPCG(1, 1))}
		marked := make(chan error, 1)
		w.during = func(string) {
			w.mu.Lock()
			w.during = nil
			w.mu.Unlock()
			go func() { marked <- r.MarkWIL(context.Background(), runs(5, 1)) }()
			eventually(t, "a mark that waits or is answered", func() bool {
				p.wil.mu.Lock()
				defer p.wil.mu.Unlock()
				return p.wil.open != nil || len(marked) > 0
			})
		}
		m.plug(w)
		p.settleWIL()
		must(t, <-marked)
		m = m.crash(1)
		_ = p.Close()
		p = openMem(t, m, o)
		r, err := p.OpenReplica(t.Context(), "r")
		must(t, err)
		if lost := len(r.WIL()) == 0; lost != broken {
			t.Errorf("with the rule broken %v, the mark was lost: %v", broken, lost)
		}
		must(t, p.Close())
	}
}
