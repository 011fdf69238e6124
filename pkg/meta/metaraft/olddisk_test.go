package metaraft

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func (c *cluster) refused(x *node, why string) {
	c.t.Helper()
	c.until(string(x.id)+" is refused", func() bool { return x.store.Failed() != nil })
	if err := x.store.Failed(); !strings.Contains(err.Error(), why) {
		c.t.Errorf("it was refused because of %v, not of %s", err, why)
	}
	if err := x.set(within(c.t), "t", 99); !errors.Is(err, volume.ErrUnavailable) {
		c.t.Errorf("refused, it answered %v", err)
	}
	if _, err := x.quota(within(c.t), "t"); !errors.Is(err, volume.ErrUnavailable) {
		c.t.Errorf("refused, it read: %v", err)
	}
}

// A controller whose disk was put back to a copy of an earlier run does not take part.
func TestADiskOfAnEarlierRun(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	x := c.follower(c.settled(3))
	x.stop()
	old := filepath.Join(t.TempDir(), "old")
	x.copyTo(old)
	x.start()
	x.mustSet("t", 1)
	c.until("its start is known", func() bool { return c.knowsStart(x, 2) })
	x.stop()
	x.putBack(old)
	x.start()
	c.refused(x, "older")
	c.settled(3).mustSet("t", 2)
	// The way out that the message names.
	x.stop()
	if err := c.settled(3).store.Remove(within(t), x.id); err != nil {
		t.Fatal(err)
	}
	x.putBack("")
	o := x.options()
	o.Bootstrap, o.Join = false, nil
	for _, y := range c.nodes {
		if y != x {
			o.Join = append(o.Join, y.address)
		}
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	x.store = s
	c.settled(3)
	x.mustSee("t", 2)
}

func (c *cluster) knowsStart(x *node, starts uint64) bool {
	for _, y := range c.nodes {
		if y.store == nil {
			continue
		}
		list, err := y.store.m.Controllers(context.Background())
		if err != nil {
			return false
		}
		for _, r := range list {
			if r.ID == x.id && r.Starts < starts {
				return false
			}
		}
	}
	return true
}

// Nor does one whose disk is a copy made while it ran, without a start in between.
func TestADiskOfTheSameRun(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	x := c.follower(leader)
	c.until("its start is known", func() bool { return c.knowsStart(x, 1) })
	old := filepath.Join(t.TempDir(), "old")
	x.copyTo(old)
	for i := range 5 {
		leader.mustSet("t", int64(i))
	}
	x.mustSee("t", 4)
	x.stop()
	// The leader remembers by itself; the others, should it end, from the log.
	c.until("it is recorded how far its log went", func() bool {
		for _, y := range c.nodes {
			if y.store == nil {
				continue
			}
			list, err := y.store.m.Controllers(context.Background())
			if err != nil {
				return false
			}
			for _, r := range list {
				if r.ID == x.id && r.Acknowledged < y.store.fsm.lastWork() {
					return false
				}
			}
		}
		return true
	})
	for _, y := range c.nodes {
		y.stop()
	}
	x.putBack(old)
	for _, y := range c.nodes {
		y.start()
	}
	c.refused(x, "older")
	for _, y := range c.nodes {
		if y != x {
			y.mustSee("t", 4)
		}
	}
}

// An empty disk under the name of a member does not vote: it would vote twice.
func TestAnEmptyDisk(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	x := c.nodes[2]
	c.until("its start is known", func() bool { return c.knowsStart(x, 1) })
	x.stop()
	x.putBack("")
	x.start()
	c.until("it is refused", func() bool { return strings.Contains(*x.store.why.Load(), "another disk") })
	if x.store.raft.Load() != nil {
		t.Error("it takes part")
	}
	ctx, cancel := context.WithTimeout(within(t), time.Second)
	defer cancel()
	if err := x.set(ctx, "t", 1); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "not admitted") {
		t.Errorf("it answered %v", err)
	}
	if err := c.nodes[0].store.Remove(within(t), x.id); err != nil {
		t.Fatal(err)
	}
	c.settled(3) // it is admitted by itself
	x.mustSet("t", 2)
}

// Two processes with copies of one disk: one of them ends.
func TestTwoCopiesOfADisk(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	x := c.nodes[2]
	c.until("its start is known", func() bool { return c.knowsStart(x, 1) })
	x.stop()
	twin := &node{c: c, n: 3, id: x.id, dir: t.TempDir(), hang: make(chan struct{}, 1)}
	x.copyTo(filepath.Join(twin.dir, "copy"))
	twin.dir = filepath.Join(twin.dir, "copy")
	twin.address = newAddress()
	x.start()
	c.until("its start is known", func() bool { return c.knowsStart(x, 2) })
	c.nodes = append(c.nodes, twin)
	t.Cleanup(twin.stop)
	twin.start()
	c.refused(twin, "older")
	twin.stop()
	c.nodes = c.nodes[:3]
	x.mustSet("t", 1)
}

// Of a term that the others had reached before it started, a controller gives no vote away.
func TestNoVoteInATermOfBefore(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.nodes[0]
	x.stop()
	o := x.options()
	defer o.Listener.Close()
	logs, err := openLogStore(filepath.Join(x.dir, logFile), &watch{limit: time.Hour, tell: func(bool) {}}, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	s := &Store{logs: logs}
	mine, err := logs.GetUint64(keyTerm)
	if err != nil || mine == 0 {
		t.Fatal(mine, err)
	}
	for _, step := range []struct{ others, term, voted uint64 }{{mine + 5, mine + 5, mine + 5}, {mine + 5, mine + 5, mine + 5}, {mine + 1, mine + 5, mine + 5}} {
		if err := s.giveUpVotes(step.others); err != nil {
			t.Fatal(err)
		}
		term, err1 := logs.GetUint64(keyTerm)
		voted, err2 := logs.GetUint64(keyVoteTerm)
		who, err3 := logs.Get(keyVotedFor)
		if err := errors.Join(err1, err2, err3); err != nil || term != step.term || voted != step.voted || string(who) != string(nobody) {
			t.Errorf("%+v: term %d, voted in %d for %q, %v", step, term, voted, who, err)
		}
	}
}

// A log that is older than the state beside it is noticed without anybody's help.
func TestALogThatWasPutBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.nodes[0]
	x.stop()
	old := filepath.Join(t.TempDir(), "old")
	x.copyTo(old)
	x.start()
	for i := range 5 {
		x.mustSet("t", int64(i))
	}
	x.stop()
	state := filepath.Join(t.TempDir(), "state")
	x.copyTo(state)
	x.putBack(old)
	o := x.options()
	o.State = filepath.Join(state, "state")
	if s, err := Open(o); !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("opened: %v", err)
		_ = s.Close()
	}
}

// A controller that lost its log does not begin another cluster with the state that it has left.
func TestALostLogIsNotBegunAnew(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.nodes[0]
	x.mustSet("t", 1)
	x.stop()
	kept := t.TempDir()
	x.copyTo(kept)
	for _, part := range []string{identityFile, logFile, "snapshots"} {
		if err := os.RemoveAll(filepath.Join(x.dir, part)); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := Open(x.options()); !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("opened: %v", err)
		_ = s.Close()
	}
	x.putBack(kept)
	x.start()
	x.mustSee("t", 1)
}

// A bootstrap that was cut off is made again.
func TestABootstrapIsMadeAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.nodes[0]
	x.stop()
	if err := errors.Join(os.RemoveAll(filepath.Join(x.dir, "snapshots")), os.Remove(filepath.Join(x.dir, logFile))); err != nil {
		t.Fatal(err)
	}
	x.start()
	x.mustSet("t", 1)
}

// The state of a cluster of one becomes the first controller's, and is not changed alone again.
func TestAStateGrowsIntoACluster(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	alone, err := meta.Open(filepath.Join(dir, "meta"), meta.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := alone.Propose(within(t), command.SetQuota{Tenant: "t", Limit: volume.Amounts{Volumes: int64(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: newAuthority(t), links: map[[2]int]*proxy{}}
	t.Cleanup(c.close)
	x := &node{c: c, id: "n1", dir: filepath.Join(dir, "controller"), hang: make(chan struct{}, 1), address: newAddress()}
	o := x.options()
	o.State = filepath.Join(dir, "meta")
	c.nodes = append(c.nodes, x)
	t.Cleanup(x.stop)
	if x.store, err = Open(o); err != nil {
		t.Fatal(err)
	}
	x.mustSee("t", 9)
	x.mustSet("t", 10)
	for n := 2; n <= 3; n++ {
		y := c.add()
		c.settled(n)
		y.mustSee("t", 10)
	}
	x.stop()
	if s, err := meta.Open(filepath.Join(dir, "meta"), meta.Options{}); err == nil {
		t.Error("a shared state was opened alone", s.Close())
	}
}
