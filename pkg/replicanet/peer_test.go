package replicanet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// unread fails the test where a frame of a link is queued or being written: its data would still be read.
func unread(t *testing.T, l *Link) {
	t.Helper()
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	for _, f := range slices.Concat(l.c.batch[min(l.c.sent, len(l.c.batch)):], l.c.queue) {
		if f.link == l {
			t.Fatal("data of a link that was closed is still being sent")
		}
	}
}

func both(t *testing.T, f func(t *testing.T, secure bool)) {
	t.Run("plain", func(t *testing.T) { f(t, false) })
	t.Run("tls", func(t *testing.T) { f(t, true) })
}

// TestMessages: what is sent arrives whole, in order, on the right link, with the link's names.
func TestMessages(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		const volumes, each = 5, 80
		rep := newReplica(t)
		rep.got = make(chan replication.Message, volumes*each)
		_, addr := serve(t, acceptor(func(_ context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error) {
			if l.Node() != "client" {
				t.Errorf("caller is %q", l.Node())
			}
			return &collector{rep}, nil
		}), secure)
		c := dial(t, secure)
		var wg sync.WaitGroup
		engines := make([]*engine, volumes)
		for v := range volumes {
			e := newEngine()
			engines[v] = e
			l := open(t, c, target(addr, v), e)
			defer l.Close()
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(v), 1))
				for i := range each {
					data := make([]byte, 1+r.IntN(1+[]int{100, 5000, 70000, replication.MaxData - 1}[r.IntN(4)]))
					for at := range data {
						data[at] = byte(v*31 + i)
					}
					l.Send(&replication.Message{Kind: replication.KindWrite, Epoch: volume.Epoch(v), Session: 3, Seq: uint64(i), Op: uint64(2 * i),
						Off: int64(i) << 20, Len: int64(len(data)), Data: data, FUA: i%2 == 0})
					l.Flush()
				}
			})
		}
		next := map[volume.ID]uint64{}
		for range volumes * each {
			m := within(t, "message", rep.got)
			v := uint64(m.Epoch)
			want := target("", int(v))
			if m.Volume != want.Volume || m.Replica != want.Replica || m.Seq != next[m.Volume] || m.Op != 2*m.Seq || m.Session != 3 ||
				m.Kind != replication.KindWrite || m.Off != int64(m.Seq)<<20 || m.Len != int64(len(m.Data)) || m.FUA != (m.Seq%2 == 0) {
				t.Fatalf("got %v of %s, want %d", m.Seq, m.Volume, next[m.Volume])
			}
			next[m.Volume]++
			if n := bytes.Count(m.Data, []byte{byte(v*31 + m.Seq)}); n != len(m.Data) {
				t.Fatalf("data of %s %d is damaged", m.Volume, m.Seq)
			}
		}
		wg.Wait()
		for v, e := range engines {
			for i := range each {
				m := within(t, "answer", e.answers)
				if !m.Reply || m.Seq != uint64(i) || m.Epoch != volume.Epoch(v) || m.Conn == 0 {
					t.Fatalf("answer %d of %d: %+v", i, v, m)
				}
			}
		}
	})
}

// collector keeps the data of what it gets.
type collector struct{ *replica }

func (r *collector) Receive(l *Link, m *replication.Message) {
	kept := *m
	kept.Data = bytes.Clone(m.Data)
	r.got <- kept
	l.Send(&replication.Message{Kind: m.Kind, Reply: true, Epoch: m.Epoch, Session: m.Session, Seq: m.Seq})
	l.Flush()
}

// TestClose: nothing goes over a link that has ended, and its handler hears nothing; another link is of no concern.
func TestClose(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		rep := newReplica(t)
		rep.got = make(chan replication.Message, 100)
		s, addr := serve(t, rep, secure)
		c := dial(t, secure)
		e := newEngine()
		old := open(t, c, target(addr, 1), e)
		old.Close()
		old.Close()
		within(t, "end of the old link", rep.closed)
		l := open(t, c, target(addr, 1), e)
		if l.ID() == old.ID() || l.c != old.c {
			t.Error("a new link on the same connection is wanted")
		}
		old.Send(&replication.Message{Kind: replication.KindWrite, Data: []byte("y")})
		old.Flush()
		unread(t, old)
		l.Send(&replication.Message{Kind: replication.KindPing, Seq: 5})
		l.Flush()
		if m := within(t, "message", rep.got); m.Kind != replication.KindPing || m.Seq != 5 {
			t.Fatalf("%+v", m)
		}
		within(t, "answer", e.answers)
		if len(e.closed) > 0 {
			t.Error("who closes a link is told that it ended")
		}

		// The connection breaks: that is said, and the next link is on another.
		named := func(name string) func(pki.Peer) bool {
			return func(p pki.Peer) bool { return p.Name == name && (p.Cluster != "") == secure }
		}
		for seq, drop := range map[uint64]func(){6: func() { s.Drop(named("client")) }, 7: func() { c.Drop(named("server")) }} {
			s.Drop(named("server"))
			c.Drop(named("client"))
			l.Send(&replication.Message{Kind: replication.KindPing, Seq: 10 + seq})
			l.Flush()
			if m := within(t, "message over what was not dropped", rep.got); m.Seq != 10+seq {
				t.Fatalf("%+v", m)
			}
			within(t, "answer", e.answers)
			drop()
			if err := within(t, "end", e.closed); err == nil {
				t.Error("no reason")
			}
			within(t, "end at the server", rep.closed)
			l.Close()
			l = open(t, c, target(addr, 1), e)
			l.Send(&replication.Message{Kind: replication.KindPing, Seq: seq})
			l.Flush()
			if m := within(t, "message", rep.got); m.Seq != seq {
				t.Fatalf("%+v", m)
			}
			within(t, "answer", e.answers)
		}
		c.Close()
		if err := within(t, "end", e.closed); !errors.Is(err, errClosed) {
			t.Error(err)
		}
		if _, err := c.Dial(t.Context(), target(addr, 1), e); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("a closed client: %v", err)
		}
	})
}

// TestServerClosesLink: the engine's side is told.
func TestServerClosesLink(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		links := make(chan *Link, 10)
		rep := newReplica(t)
		_, addr := serve(t, acceptor(func(_ context.Context, l *Link, _ volume.ID, _ volume.ReplicaID) (Handler, error) {
			links <- l
			return rep, nil
		}), secure)
		c := dial(t, secure)
		for range 3 {
			e := newEngine()
			l := open(t, c, target(addr, 1), e)
			within(t, "link at the server", links).Close()
			within(t, "end", e.closed)
			l.Close()
		}
		if len(rep.closed) > 0 {
			t.Error("who closes a link is told that it ended")
		}
	})
}

// TestDialFails: with what errors.
func TestDialFails(t *testing.T) {
	begun := make(chan bool, 1)
	fails := map[volume.ID]error{
		"vol-1": fmt.Errorf("gone: %w", volume.ErrNotFound),
		"vol-2": fmt.Errorf("starting: %w", volume.ErrUnavailable),
		"vol-3": errors.New(strings.Repeat("pool is on fire ", 100)),
	}
	rep := newReplica(t)
	_, addr := serve(t, acceptor(func(ctx context.Context, _ *Link, v volume.ID, _ volume.ReplicaID) (Handler, error) {
		if v == "vol-4" {
			begun <- true
			<-ctx.Done()
		}
		return rep, fails[v]
	}), false)
	c := dial(t, false)
	e := newEngine()
	for v, want := range map[int]error{1: volume.ErrNotFound, 2: volume.ErrUnavailable, 3: volume.ErrUnavailable} {
		if _, err := c.Dial(t.Context(), target(addr, v), e); !errors.Is(err, want) {
			t.Errorf("volume %d: %v", v, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if _, err := c.Dial(ctx, target(addr, 4), e); !errors.Is(err, volume.ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("an opening that was cancelled: %v", err)
	}
	if _, err := c.Dial(ctx, target(addr, 5), e); err == nil {
		t.Error("a cancelled context opens a link")
	}
	if _, err := c.Dial(t.Context(), target("127.0.0.1:1", 5), e); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("nobody there: %v", err)
	}
	l := open(t, c, target(addr, 5), e)
	l.Close()
	within(t, "end of a link", rep.closed)
}

// TestCloseWhileOpening: an Open that takes its time does not leave a link behind.
func TestCloseWhileOpening(t *testing.T) {
	rep := newReplica(t)
	begun, goOn := make(chan bool), make(chan bool)
	_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) {
		begun <- true
		<-goOn
		return rep, nil
	}), false)
	c := dial(t, false)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	e := newEngine()
	if l, err := c.Dial(ctx, target(addr, 1), e); err == nil {
		t.Fatalf("%+v", l)
	}
	goOn <- true
	within(t, "end of what was opened for nobody", rep.closed)
	if len(e.closed) > 0 {
		t.Error("a link that never was is said to have ended")
	}
}

// TestIdle: a connection without links is closed, one with links is not.
func TestIdle(t *testing.T) {
	rep := newReplica(t)
	_, addr := serve(t, rep, false)
	c := dial(t, false)
	e := newEngine()
	a := open(t, c, target(addr, 1), e)
	b := open(t, c, target(addr, 2), e)
	third := open(t, c, target(addr, 3), e)
	if a.c == b.c || third.c != a.c && third.c != b.c {
		t.Error("three links want two connections")
	}
	lanes := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.lanes[destination{"server", addr}])
	}
	a.Close()
	b.Close()
	third.Close()
	if n := lanes(); n != 2 {
		t.Fatalf("%d connections", n)
	}
	c.mu.Lock()
	for _, n := range c.lanes[destination{"server", addr}] {
		n.idle.Reset(0)
	}
	c.mu.Unlock()
	for lanes() > 0 {
		time.Sleep(time.Millisecond)
	}
	open(t, c, target(addr, 1), e).Close()
}

// TestDialThatTakesLong: who does not want to wait leaves; the connection is there for the next, and closed when none comes.
func TestDialThatTakesLong(t *testing.T) {
	_, addr := serve(t, newReplica(t), false)
	c := dial(t, false)
	goOn, quick := make(chan bool), c.dial
	c.dial = func(ctx context.Context, address string) (net.Conn, error) {
		<-goOn
		return quick(ctx, address)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Dial(ctx, target(addr, 1), newEngine()); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	c.mu.Lock()
	n := c.lanes[destination{"server", addr}][0]
	if n.idle != nil {
		t.Error("what is not there yet is to be closed")
	}
	c.mu.Unlock()
	close(goOn)
	<-n.ready
	for armed := false; !armed; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		armed = n.idle != nil
		c.mu.Unlock()
	}
	open(t, c, target(addr, 1), newEngine()).Close()
}

func TestHandshakeRefuses(t *testing.T) {
	_, plain := serve(t, newReplica(t), false)
	_, secure := serve(t, newReplica(t), true)
	cred := credentials(t, "client")
	for name, tt := range map[string]struct {
		addr string
		cfg  ClientConfig
		to   volume.NodeID
		want string
	}{
		"another cluster": {plain, ClientConfig{Cluster: "other", Node: "client", Insecure: true}, "server", "cluster"},
		"another node":    {plain, ClientConfig{Cluster: "test", Node: "client", Insecure: true}, "n9", "node"},
		"no name":         {plain, ClientConfig{Cluster: "test", Insecure: true}, "server", "name"},
		"plain to TLS":    {secure, ClientConfig{Cluster: "test", Node: "client", Insecure: true}, "server", ""},
		"TLS to plain":    {plain, ClientConfig{Cluster: "test", Node: "client", TLS: tlsOf(cred)}, "server", ""},
		"another's name":  {secure, ClientConfig{Cluster: "test", Node: "n3", TLS: tlsOf(cred)}, "server", "certificate is of node"},
		"a name not its":  {secure, ClientConfig{Cluster: "test", Node: "client", TLS: tlsOf(cred)}, "n9", "not node"},
		"nobody there":    {"127.0.0.1:1", ClientConfig{Cluster: "test", Node: "client", Insecure: true}, "server", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.cfg.Log = quiet()
			c, err := NewClient(tt.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			to := target(tt.addr, 1)
			to.Node = tt.to
			if _, err := c.Dial(t.Context(), to, newEngine()); !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := NewClient(ClientConfig{}); !errors.Is(err, errInsecure) {
		t.Error(err)
	}
	if _, err := NewServer(ServerConfig{}); !errors.Is(err, errInsecure) {
		t.Error(err)
	}
}

// TestGarbage: whatever a caller sends, the server goes on.
func TestGarbage(t *testing.T) {
	_, addr := serve(t, newReplica(t), false)
	good := hello{Min: 1, Max: 1, Cluster: "test", From: "client", To: "server"}
	frames := func(kind byte, rest []byte, mangle func(h *[headLen]byte)) []byte {
		var h [headLen]byte
		putControl(&h, kind, 1, rest)
		if mangle != nil {
			mangle(&h)
			seal(&h, rest)
		}
		return append(append(good.encode(), h[:]...), rest...)
	}
	names := appendString(appendString(nil, "vol-1"), "rep-1")
	for name, data := range map[string][]byte{
		"nothing":                   nil,
		"half a greeting":           good.encode()[:9],
		"another magic":             bytes.Repeat([]byte{0x16}, 100),
		"a long greeting":           append([]byte(magic), 1, 0, 1, 0, 0xff, 0xff),
		"future versions":           hello{Min: 2, Max: 9, Cluster: "test", From: "client", To: "server"}.encode(),
		"no versions":               hello{Min: 1, Max: 0, Cluster: "test", From: "client", To: "server"}.encode(),
		"zeros":                     append(good.encode(), make([]byte, headLen)...),
		"a long rest":               frames(kindOpen, names, func(h *[headLen]byte) { h[15] = 0xff }),
		"a control frame with data": frames(kindOpen, names, func(h *[headLen]byte) { h[16] = 1 }),
		"an unknown control frame":  frames(0xff, nil, nil),
		"an answer":                 frames(kindOpened, names, nil),
		"an opening cut short":      frames(kindOpen, names[:3], nil),
		"opened twice":              append(frames(kindOpen, names, nil), frames(kindOpen, names, nil)[len(good.encode()):]...),
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if _, err := nc.Write(data); err != nil {
				t.Fatal(err)
			}
			if name == "nothing" || strings.HasPrefix(name, "half") {
				return // it would be turned away after the handshake's time
			}
			nc.SetReadDeadline(time.Now().Add(time.Minute))
			if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				t.Error("the server keeps the connection")
			}
		})
	}
	open(t, dial(t, false), target(addr, 1), newEngine()).Close()
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// TestDamagedData: without TLS a checksum protects the data.
func TestDamagedData(t *testing.T) {
	rep := newReplica(t)
	rep.got = make(chan replication.Message, 10)
	_, addr := serve(t, rep, false)
	marker := bytes.Repeat([]byte("damage me "), 1000)
	front := proxy(t, addr, func(b []byte) {
		if i := bytes.Index(b, marker[:100]); i >= 0 {
			b[i+50] ^= 1
		}
	})
	e := newEngine()
	l := open(t, dial(t, false), target(front, 1), e)
	l.Send(&replication.Message{Kind: replication.KindWrite, Data: marker})
	l.Flush()
	within(t, "end", e.closed)
	l.Close()
	if len(rep.got) > 0 {
		t.Error("damaged data was taken")
	}
}

// proxy passes bytes on, those to the server through change.
func proxy(t *testing.T, addr string, change func([]byte)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", addr)
			if err != nil {
				a.Close()
				continue
			}
			wg.Go(func() { io.Copy(a, b); a.Close() })
			wg.Go(func() {
				defer b.Close()
				buf := make([]byte, 64<<10)
				for {
					n, err := a.Read(buf)
					if err != nil {
						return
					}
					change(buf[:n])
					if _, err := b.Write(buf[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// TestStuckPeer: a peer that takes nothing does not keep the data of a link that is closed.
func TestStuckPeer(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		block := make(chan bool)
		rep := newReplica(t)
		_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) {
			return &sleeper{rep, block}, nil
		}), secure)
		defer close(block)
		l := open(t, dial(t, secure), target(addr, 1), newEngine())
		data := make([]byte, replication.MaxData)
		for i := range 64 {
			l.Send(&replication.Message{Kind: replication.KindWrite, Seq: uint64(i), Data: data})
			l.Flush()
		}
		l.c.mu.Lock()
		left := len(l.c.batch) - l.c.sent + len(l.c.queue)
		l.c.mu.Unlock()
		if left == 0 {
			t.Fatal("64 MiB fit into the sockets")
		}
		l.Close()
		unread(t, l)
		clear(data) // the race detector sees who still reads it
	})
}

// TestWornOut: a connection is not used for longer than its keys are good for.
func TestWornOut(t *testing.T) {
	rep := newReplica(t)
	_, addr := serve(t, rep, true)
	c := dial(t, true)
	e := newEngine()
	old := open(t, c, target(addr, 1), e)
	defer old.Close()
	old.c.mu.Lock() // whoever writes had the lock before
	old.c.out.(*sealed).carried = maxSealed + 1
	old.c.mu.Unlock()
	old.Send(&replication.Message{Kind: replication.KindPing, Seq: 1})
	old.Flush()
	if err := within(t, "end", e.closed); !errors.Is(err, errWornOut) {
		t.Error(err)
	}
	l := open(t, c, target(addr, 1), e)
	defer l.Close()
	l.Send(&replication.Message{Kind: replication.KindPing, Seq: 2})
	l.Flush()
	if m := within(t, "answer", e.answers); m.Seq != 2 {
		t.Errorf("%+v", m)
	}
}

// sleeper does not take messages until it is let go.
type sleeper struct {
	*replica
	block chan bool
}

func (s *sleeper) Receive(l *Link, m *replication.Message) {
	<-s.block
}

// TestHungStore: a volume whose store hangs takes all that a connection may receive, and another on it goes on.
func TestHungStore(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		const most = 8
		hung, well := newReplica(t), newReplica(t)
		well.got = make(chan replication.Message, 100)
		_, addr := serve(t, acceptor(func(_ context.Context, _ *Link, v volume.ID, _ volume.ReplicaID) (Handler, error) {
			if v == target("", 1).Volume {
				return &hoarder{replica: hung, got: make(chan replication.Message, 1000)}, nil
			}
			return &collector{well}, nil
		}), secure, func(s *Server) { s.budget = most * replication.MaxData })
		c := dial(t, secure)
		c.cfg.Conns = 1
		waiting, served := newEngine(), newEngine()
		one, other := open(t, c, target(addr, 1), waiting), open(t, c, target(addr, 2), served)
		defer other.Close()
		data := make([]byte, replication.MaxData)
		for i := range 2 * most {
			one.Send(&replication.Message{Kind: replication.KindWrite, Session: 2, Seq: uint64(i), Data: data})
			one.Flush()
		}
		for i := range 2 * most {
			other.Send(&replication.Message{Kind: replication.KindWrite, Session: 2, Seq: uint64(i), Data: data})
			other.Flush()
			within(t, "answer to the other volume", served.answers)
		}
		within(t, "end of the hung one's link", waiting.closed)
		within(t, "end of it at the server", hung.closed)
		one.Close()
		if len(served.closed) > 0 {
			t.Error("the link of the other volume ended")
		}
	})
}

// TestHungStoreAlone: a volume whose store hangs has taken all that a connection may receive, and is alone on it; others can be
// opened even so.
func TestHungStoreAlone(t *testing.T) {
	t.Parallel()
	const most = 8
	hung := newReplica(t)
	_, addr := serve(t, acceptor(func(_ context.Context, _ *Link, v volume.ID, _ volume.ReplicaID) (Handler, error) {
		if v == target("", 1).Volume {
			return &hoarder{replica: hung, got: make(chan replication.Message, 1000)}, nil
		}
		return &collector{newReplica(t)}, nil
	}), false, func(s *Server) { s.budget = most * replication.MaxData })
	c := dial(t, false)
	c.cfg.Conns = 1
	waiting := newEngine()
	one := open(t, c, target(addr, 1), waiting)
	data := make([]byte, replication.MaxData)
	for i := range most + 1 {
		one.Send(&replication.Message{Kind: replication.KindWrite, Session: 2, Seq: uint64(i), Data: data})
		one.Flush()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	other, err := c.Dial(ctx, target(addr, 2), newEngine())
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	within(t, "end of the hung one's link", waiting.closed)
	one.Close()
}

// TestBudget: a server reads no more than its handlers can hold.
func TestBudget(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		rep := &hoarder{replica: newReplica(t), got: make(chan replication.Message, 1000)}
		const most = 40
		_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) { return rep, nil }), secure,
			func(s *Server) { s.budget = most * replication.MaxData })
		e := newEngine()
		l := open(t, dial(t, secure), target(addr, 1), e)
		data := make([]byte, replication.MaxData)
		for i := range most + 30 {
			l.Send(&replication.Message{Kind: replication.KindWrite, Session: 2, Seq: uint64(i), Data: data})
			l.Flush()
		}
		var unanswered []replication.Message
		for range most {
			unanswered = append(unanswered, within(t, "message", rep.got))
		}
		time.Sleep(50 * time.Millisecond)
		if extra := len(rep.got); extra > 0 {
			t.Errorf("%d more than the budget", extra)
		}
		server := rep.link.Load()
		for range 30 {
			server.Send(&replication.Message{Kind: replication.KindWrite, Reply: true, Session: 2, Seq: unanswered[0].Seq})
			server.Flush()
			unanswered = append(unanswered[1:], within(t, "one more", rep.got))
			within(t, "answer", e.answers)
		}
		l.Close()
		within(t, "end", rep.closed)
		server.Send(&replication.Message{Kind: replication.KindWrite, Reply: true, Session: 2, Seq: unanswered[0].Seq})
		server.Flush()
		server.c.mu.Lock()
		defer server.c.mu.Unlock()
		if server.c.held != 0 {
			t.Errorf("%d bytes are held", server.c.held)
		}
	})
}

type hoarder struct {
	*replica
	got  chan replication.Message
	link atomic.Pointer[Link]
}

func (h *hoarder) Receive(l *Link, m *replication.Message) {
	h.link.Store(l)
	h.got <- *m
}

// TestRequestTwice: no peer sends one request twice on a link, and if one does its data is not mixed up.
func TestRequestTwice(t *testing.T) {
	rep := &hoarder{replica: newReplica(t), got: make(chan replication.Message, 10)}
	_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) { return rep, nil }), false)
	e := newEngine()
	l := open(t, dial(t, false), target(addr, 1), e)
	for range 2 {
		l.Send(&replication.Message{Kind: replication.KindWrite, Seq: 1, Data: make([]byte, 10)})
		l.Flush()
	}
	within(t, "end", e.closed)
	l.Close()
}

// TestChaos: many volumes send while links and connections break all the time. Each link delivers a
// prefix of what was sent on it, in order, and reads nothing after its Close.
func TestChaos(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		before := runtime.NumGoroutine()
		t.Run("run", func(t *testing.T) { chaos(t, secure) })
		for end := time.Now().Add(time.Minute); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Fatalf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
			}
		}
	})
}

func chaos(t *testing.T, secure bool) {
	const volumes = 8
	var delivered atomic.Int64
	s, addr := serve(t, acceptor(func(_ context.Context, l *Link, _ volume.ID, _ volume.ReplicaID) (Handler, error) {
		return &orderly{t: t, delivered: &delivered}, nil
	}), secure)
	c := dial(t, secure)
	stop := make(chan bool)
	var wg, drivers sync.WaitGroup
	wg.Go(func() {
		r := rand.New(rand.NewPCG(1, 1))
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(r.IntN(60)) * time.Millisecond):
				s.Drop(func(pki.Peer) bool { return r.IntN(2) == 0 })
			}
		}
	})
	for v := range volumes {
		drivers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(v), 2))
			data := make([]byte, 40<<10)
			var e *engine
			var l *Link
			seq := uint64(0)
			for range 600 {
				if l == nil {
					e = newEngine()
					l, seq = open(t, c, target(addr, v), e), 0
				}
				seq++
				l.Send(&replication.Message{Kind: replication.KindWrite, Seq: seq, Data: data[:r.IntN(len(data))]})
				l.Flush()
				switch r.IntN(40) {
				case 0:
					l.Close()
					unread(t, l)
					l = nil
				case 1:
					time.Sleep(time.Millisecond)
				}
				if len(e.closed) > 0 && l != nil {
					l.Close()
					unread(t, l)
					l = nil
				}
			}
			if l != nil {
				l.Close()
				unread(t, l)
			}
			clear(data) // the race detector sees who still reads it
		})
	}
	drivers.Wait()
	close(stop)
	wg.Wait()
	if delivered.Load() == 0 {
		t.Error("nothing was delivered")
	}
}

// orderly wants the messages of a link in order, without gaps.
type orderly struct {
	t         *testing.T
	delivered *atomic.Int64
	last      uint64
	closed    bool
}

func (o *orderly) Receive(l *Link, m *replication.Message) {
	if m.Seq != o.last+1 || o.closed {
		o.t.Errorf("message %d after %d, closed %v", m.Seq, o.last, o.closed)
	}
	o.last = m.Seq
	o.delivered.Add(1)
	l.Send(&replication.Message{Kind: m.Kind, Reply: true, Seq: m.Seq})
	l.Flush()
}

func (o *orderly) Closed(*Link, error) { o.closed = true }

func TestBuffers(t *testing.T) {
	for _, n := range []int{1, 72, 4096, 4097, 65536, replication.MaxData} {
		b := getBuffer(n)
		if len(b) != n || cap(b) < n || addressOf(b)%4096 != 0 {
			t.Errorf("%d bytes: length %d, capacity %d, at %x", n, len(b), cap(b), addressOf(b))
		}
		putBuffer(b)
	}
	for _, b := range [][]byte{nil, make([]byte, 10), make([]byte, 5000), make([]byte, 8192)[1:4097:4097], make([]byte, 2<<20)} {
		putBuffer(b)
	}
}
