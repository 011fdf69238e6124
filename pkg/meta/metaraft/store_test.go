package metaraft

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var _ control.Store = (*Store)(nil)

// What any controller is asked to do is done, and every other one sees it at once.
func TestEveryControllerServes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	for i, x := range c.nodes {
		x.mustSet("t", int64(i+1))
		for _, y := range c.nodes {
			y.mustSee("t", int64(i+1))
		}
	}
	for _, x := range c.nodes {
		if _, err := x.store.Propose(within(t), command.FinishCreate{Volume: "none"}); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%s: a refusal became %v", x.id, err)
		}
		if _, err := x.store.Propose(within(t), command.SetQuota{}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: an invalid command: %v", x.id, err)
		}
		if _, err := x.store.Volume(within(t), "none"); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%s: %v", x.id, err)
		}
		members, err := x.store.Members(within(t))
		if err != nil || len(members) != 3 {
			t.Errorf("%s: %+v, %v", x.id, members, err)
		}
		for _, m := range members {
			if !m.Voter || !m.Answers {
				t.Errorf("%s: %+v", x.id, m)
			}
		}
	}
}

// What was acknowledged outlives the leader, and all of them at once.
func TestTheLeaderEnds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	leader.mustSet("t", 1)
	leader.stop()
	other := c.follower(leader)
	other.mustSee("t", 1)
	other.mustSet("t", 2)
	leader.start()
	leader.mustSee("t", 2)
	leader.mustSet("t", 3)
	for _, x := range c.nodes {
		x.stop()
	}
	for _, x := range c.nodes {
		x.start()
	}
	for _, x := range c.nodes {
		x.mustSee("t", 3)
	}
}

// A leader that is cut off answers nothing, the others elect another, and it follows when it is back.
func TestTheLeaderIsCutOff(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	leader.mustSet("t", 1)
	other := c.follower(leader)
	c.isolate(leader.n)
	other.mustSet("t", 2)
	other.mustSee("t", 2)
	short, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if n, err := leader.quota(short, "t"); err == nil {
		t.Errorf("cut off, it read %d", n)
	}
	if err := leader.set(short, "t", 3); err == nil {
		t.Error("cut off, it acknowledged")
	} else if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("cut off, it answered %v", err)
	}
	c.restore(leader.n)
	leader.mustSee("t", 2)
	leader.mustSet("t", 4)
	other.mustSee("t", 4)
}

// A controller that hears nobody, and whom all hear, or the other way round, keeps nobody from working.
func TestLinksThatPassOneWay(t *testing.T) {
	for _, hears := range []bool{false, true} {
		t.Run(fmt.Sprint("hears ", hears), func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			leader := c.settled(3)
			other := c.follower(leader)
			for _, y := range c.nodes {
				if y == leader {
					continue
				}
				if hears {
					c.cut(leader.n, y.n)
				} else {
					c.cut(y.n, leader.n)
				}
			}
			c.until("the others work", func() bool {
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
				defer cancel()
				return other.set(ctx, "t", 1) == nil
			})
			c.restore(leader.n)
			leader.mustSee("t", 1)
		})
	}
}

// Without a majority nothing is acknowledged and nothing is read; with it again everything goes on.
func TestWithoutAMajority(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.nodes[0].stop()
	c.nodes[0].timing.patience = 8 * time.Second
	c.nodes[0].start()
	c.settled(3)
	c.nodes[0].mustSet("t", 1)
	c.nodes[1].stop()
	c.nodes[2].stop()
	// Without a leader it is given up sooner than one is waited for that does not answer.
	start := time.Now()
	_, err := c.nodes[0].quota(t.Context(), "t")
	if !errors.Is(err, volume.ErrUnavailable) || time.Since(start) >= c.nodes[0].timing.patience {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	for _, f := range []func(ctx context.Context) error{
		func(ctx context.Context) error { return c.nodes[0].set(ctx, "t", 2) },
		func(ctx context.Context) error { _, err := c.nodes[0].quota(ctx, "t"); return err },
	} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if err := f(ctx); err == nil {
			t.Error("one of three acknowledged")
		}
		cancel()
	}
	alone := func() {
		t.Helper()
		list, err := c.nodes[0].store.Members(t.Context())
		if err != nil || len(list) != 3 {
			t.Fatalf("%+v, %v", list, err)
		}
		for _, m := range list {
			if !m.Voter || m.Answers != (m.ID == c.nodes[0].id) {
				t.Errorf("%+v, and only %s is there", m, c.nodes[0].id)
			}
		}
	}
	alone()
	c.nodes[0].stop()
	c.nodes[0].start() // it is not let in, and knows from its disk who could do that
	alone()
	c.nodes[1].start()
	c.nodes[1].mustSet("t", 3)
	c.nodes[0].mustSee("t", 3)
}

// A controller that missed more than the log keeps gets the state as a whole, and its new state outlives it.
func TestALateFollowerGetsASnapshot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	late := c.follower(c.settled(3))
	late.stop()
	leader := c.settled(3)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 12 {
				leader.mustSet(fmt.Sprint("t", g), int64(i))
			}
		})
	}
	wg.Wait()
	least := uint64(1 << 62)
	for _, x := range c.nodes {
		if x == late {
			continue
		}
		x.mustSee("t0", 11)
		r := x.store.raft.Load()
		keep := r.ReloadableConfig()
		keep.TrailingLogs = 5
		if err := r.ReloadConfig(keep); err != nil {
			t.Fatal(err)
		}
		if err := r.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		first, err := x.store.logs.FirstIndex()
		if err != nil || first < 50 {
			t.Fatalf("the log begins at %d, %v", first, err)
		}
		least = min(least, first)
	}
	late.start()
	for g := range 8 {
		late.mustSee(fmt.Sprint("t", g), 11)
	}
	c.until("it has a log of its own", func() bool { n, err := late.store.logs.FirstIndex(); return err == nil && n >= least })
	leader.mustSet("t0", 100)
	late.mustSee("t0", 100)
	late.stop()
	late.start()
	late.mustSee("t0", 100)
}

// A cluster grows from one controller and its state to five, and shrinks; those that were removed take no part.
func TestGrowAndShrink(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.nodes[0].mustSet("t", 1)
	for n := 2; n <= 5; n++ {
		x := c.add()
		c.settled(n)
		x.mustSee("t", int64(n-1))
		x.mustSet("t", int64(n))
	}
	gone := c.settled(5) // the leader
	if err := c.follower(gone).store.Remove(within(t), gone.id); err != nil {
		t.Fatal(err)
	}
	c.until("it knows that it was removed", func() bool { return gone.store.Failed() != nil })
	if err := gone.set(within(t), "t", 9); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("removed, it answered %v", err)
	}
	gone.stop()
	c.settled(4).mustSee("t", 5)
	if err := c.settled(4).store.Remove(within(t), "n9"); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("removed a stranger: %v", err)
	}
	// With its old disk it does not come back; with an empty one it may.
	gone.start()
	c.until("it is refused", func() bool { return gone.store.Failed() != nil })
	gone.stop()
	gone.putBack("")
	if gone.n == 0 {
		return // it would begin a cluster of its own
	}
	gone.start()
	c.settled(5)
	gone.mustSee("t", 5)
}

func TestTheLastControllerStays(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	if err := c.nodes[0].store.Remove(within(t), "n1"); !errors.Is(err, volume.ErrInUse) {
		t.Error(err)
	}
}

// A node joins as itself only.
func TestNobodyJoinsAsAnother(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.add()
	c.settled(2)
	_, err := x.store.peers.call(within(t), c.nodes[0].address, callJoin, []byte(`{"id":"n9","address":"127.0.0.1:1","incarnation":"x"}`))
	if !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("n2 joined as n9: %v", err)
	}
}

// A node that was removed does not come back as a controller by itself, with the certificate that it still has.
func TestARemovedNodeIsNotAdmitted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	leader := c.settled(1)
	if _, err := leader.store.Propose(within(t), command.RemoveNode{Node: "gone"}); err != nil {
		t.Fatal(err)
	}
	err := leader.store.admit(within(t), admit{ID: "gone", Address: newAddress(), Incarnation: "1"})
	if !errors.Is(err, volume.ErrDenied) {
		t.Errorf("it is admitted: %v", err)
	}
	if x := leader.store.servers(); len(x) != 1 {
		t.Errorf("members %+v", x)
	}
}

// Peers without a certificate of the cluster get nowhere.
func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	stranger := &cluster{t: t, ca: newAuthority(t), links: map[[2]int]*proxy{}}
	t.Cleanup(stranger.close)
	x := stranger.add()
	stranger.settled(1)
	for _, call := range []callKind{callPropose, callKnown, callTerm} {
		if _, err := x.store.peers.call(within(t), c.nodes[0].address, call, nil); !errors.Is(err, errUnsent) && !errors.Is(err, errLost) {
			t.Errorf("call %d of a stranger: %v", call, err)
		}
	}
}

// The connections of a peer that has been replaced end, in both directions and at once; those that are made later are others.
func TestConnectionsAreDropped(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	leader.mustSet("t", 1)
	i := slices.IndexFunc(c.nodes, func(x *node) bool { return x != leader })
	gone, m := c.nodes[i].id, leader.store.mux
	if _, err := leader.store.peers.call(within(t), c.nodes[i].address, callTerm, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.nodes[i].store.peers.call(within(t), leader.address, callTerm, nil); err != nil {
		t.Fatal(err)
	}
	conns := map[*tracked]volume.NodeID{}
	m.mu.Lock()
	for x := range m.conns {
		if x.proved != nil {
			conns[x], _ = commonName(*x.proved)
		}
	}
	m.mu.Unlock()
	dialled, others := 0, 0
	leader.store.Drop(func(s tls.ConnectionState) bool {
		id, err := commonName(s)
		return err == nil && id == gone
	})
	for x, id := range conns {
		closed := errors.Is(x.SetReadDeadline(time.Now().Add(time.Hour)), net.ErrClosed)
		switch {
		case id == gone && !closed:
			t.Errorf("a connection with %s from %s to %s is open still", id, x.LocalAddr(), x.RemoteAddr())
		case id != gone && !closed:
			others++
		}
		if x.LocalAddr().String() != leader.address && id == gone {
			dialled++
		}
	}
	if dialled == 0 || dialled == len(conns) || others == 0 {
		t.Errorf("%d connections were dialled, %d of others stayed, of %d", dialled, others, len(conns))
	}
	c.settled(3).mustSet("t", 2)
}

// While the leader's disk hangs another controller leads; when it is back, so is the controller.
func TestAStalledDisk(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	leader.mustSet("t", 1)
	leader.hang <- struct{}{} // the next write waits
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	hung := make(chan error, 1)
	go func() { hung <- leader.set(ctx, "u", 1) }()
	other := c.follower(leader)
	other.mustSet("t", 2)
	if id, _ := other.store.Leader(); id == leader.id {
		t.Error("it still leads")
	}
	other.mustSee("t", 2)
	<-leader.hang
	leader.mustSee("t", 2)
	if err := <-hung; err == nil {
		other.mustSee("u", 1)
	}
	leader.mustSet("t", 3)
	other.mustSee("t", 3)
}

// A proposal whose answer is lost is sent again under its name and applied once.
func TestAnAnswerIsLost(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	other := c.follower(leader)
	v := testVolume()
	if _, err := leader.store.Propose(within(t), registerNode()); err != nil {
		t.Fatal(err)
	}
	other.mustSee("t", 0)
	c.cut(leader.n, other.n)
	done := make(chan error, 1)
	var res command.Result
	go func() {
		var err error
		res, err = other.store.Propose(within(t), command.CreateVolume{Volume: v})
		done <- err
	}()
	c.until("the leader has it", func() bool { _, err := leader.store.Volume(within(t), v.ID); return err == nil })
	// The connection ends, unanswered.
	p, err := c.link(other.n, leader.n)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	for _, x := range p.conns {
		_ = x.Close()
	}
	p.mu.Unlock()
	c.heal(leader.n, other.n)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if x, ok := res.(command.Volume); !ok || !x.Created {
		t.Errorf("sent twice, it was answered %+v", res)
	}
}

func testVolume() volume.Volume {
	return volume.Volume{
		ID: "vol-1", Name: "name", Tenant: "t", State: volume.Creating, Size: 1 << 30, CreatedAt: 5,
		Parameters:   volume.Parameters{Replicas: 1, MinInSync: 1, DataLocality: volume.LocalityPreferred, BlockSize: 4096},
		Capabilities: []volume.Capability{{Access: volume.AccessMount, Mode: volume.SingleNodeWriter}},
		Replicas:     []volume.Replica{{ID: "rep-1", Node: "n1", Pool: "p1", Role: volume.InSync}},
	}
}

func registerNode() command.RegisterNode {
	return command.RegisterNode{Now: 1, Node: volume.Node{ID: "n1", Pools: []volume.Pool{{ID: "p1", Name: "default", Kind: volume.PoolDir, Path: "/p", Capacity: 100 << 30, OverProvision: 2}}}}
}

// An address may change while a controller is down.
func TestAnAddressChanges(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	x := c.follower(c.settled(3))
	x.stop()
	c.mu.Lock()
	x.address = newAddress()
	for k, p := range c.links {
		if k[1] == x.n {
			p.close()
			delete(c.links, k)
		}
	}
	c.mu.Unlock()
	x.start()
	c.until("all know the new address", func() bool {
		for _, y := range c.nodes {
			m, err := y.store.Members(within(t))
			if err != nil || len(m) != 3 {
				return false
			}
			for _, m := range m {
				if m.ID == x.id && (m.Address != x.address || !m.Answers) {
					return false
				}
			}
		}
		return true
	})
	x.mustSet("t", 1)
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	x := c.nodes[0]
	x.mustSet("t", 1)
	second := x.options
	x.c.nodes[0].stop()
	for what, change := range map[string]func(o *Options){
		"no TLS and not plaintext": func(o *Options) { o.Server, o.Client = nil, nil },
		"TLS one way":              func(o *Options) { o.Client = nil },
		"plaintext and TLS":        func(o *Options) { o.Plaintext = true },
		"no id":                    func(o *Options) { o.ID = "" },
		"another's directory":      func(o *Options) { o.ID = "other" },
		"no address":               func(o *Options) { o.Advertise = "" },
	} {
		o := second()
		change(&o)
		s, err := Open(o)
		if err == nil {
			t.Errorf("%s: opened", what)
			_ = s.Close()
		}
		_ = o.Listener.Close()
	}
	x.start()
	x.mustSee("t", 1)
}

// A leader of an earlier term is not confirmed, whatever it believes itself: what it would read may be old.
func TestAFormerLeaderIsNotConfirmed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	former := c.settled(3)
	r := former.store.raft.Load()
	term := r.CurrentTerm()
	if !former.store.majority(within(t), r, term) {
		t.Error("the leader is not confirmed")
	}
	other := c.follower(former)
	c.until("another one leads", func() bool {
		_ = r.LeadershipTransfer().Error()
		_, self := former.store.Leader()
		return !self
	})
	c.settled(3)
	if former.store.majority(within(t), r, term) {
		t.Error("a former leader is confirmed")
	}
	c.isolate(other.n)
	c.isolate(former.n)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if former.store.majority(ctx, r, r.CurrentTerm()) {
		t.Error("one of three is a majority")
	}
	c.restore(former.n)
	c.restore(other.n)
}
