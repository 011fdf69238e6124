package replicanet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// owner counts its releases.
type owner struct{ n atomic.Int32 }

func (o *owner) Release() { o.n.Add(1) }

// released waits for one release and no other.
func (o *owner) released(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); o.n.Load() == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := o.n.Load(); n != 1 {
		t.Fatalf("released %d times", n)
	}
}

func both(t *testing.T, f func(t *testing.T, secure bool)) {
	t.Run("plain", func(t *testing.T) { f(t, false) })
	t.Run("tls", func(t *testing.T) { f(t, true) })
}

// TestMessages: what is sent arrives whole, in order, on the right link, with the link's names.
func TestMessages(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		const volumes, each = 5, 200
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
			p := c.Open(target(addr, v), e)
			defer p.Close()
			l := within(t, "connection", e.connected)
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(v), 1))
				for i := range each {
					data := make([]byte, 1+r.IntN(1+[]int{100, 5000, 70000, replication.MaxData - 1}[r.IntN(4)]))
					for at := range data {
						data[at] = byte(v*31 + i)
					}
					o := new(owner)
					l.Send(&replication.Message{Kind: replication.KindWrite, Epoch: volume.Epoch(v), Session: 3, Seq: uint64(i), Op: uint64(2 * i),
						Off: int64(i) << 20, Len: int64(len(data)), Data: data, FUA: i%2 == 0}, o)
					if i%3 == 0 {
						l.Flush()
					}
				}
				l.Flush()
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
			putBuffer(m.Data)
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
	answer := replication.Message{Kind: m.Kind, Reply: true, Epoch: m.Epoch, Seq: m.Seq}
	m.Data = bytes.Clone(m.Data)
	kept := m.Data
	r.got <- *m
	m.Data = nil
	l.c.mu.Lock()
	l.c.held -= int64(len(kept))
	l.c.changed.Broadcast()
	l.c.mu.Unlock()
	l.Send(&answer, nil)
}

// TestReconnect: a new link, and nothing goes over the old one.
func TestReconnect(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		rep := newReplica(t)
		rep.got = make(chan replication.Message, 100)
		s, addr := serve(t, rep, secure)
		e := newEngine()
		p := dial(t, secure).Open(target(addr, 1), e)
		old := within(t, "link", e.connected)
		if err := p.Err(); err != nil {
			t.Fatal(err)
		}
		queued := new(owner)
		old.Send(&replication.Message{Kind: replication.KindWrite, Data: []byte("x")}, queued) // not flushed
		p.Reconnect()
		queued.released(t)
		l := within(t, "new link", e.connected)
		if l.ID() == old.ID() {
			t.Fatal("the same link")
		}
		within(t, "end of the old link", rep.closed)
		late := new(owner)
		old.Send(&replication.Message{Kind: replication.KindWrite, Data: []byte("y")}, late)
		late.released(t)
		old.Flush()
		l.Send(&replication.Message{Kind: replication.KindPing, Seq: 5}, nil)
		l.Flush()
		if m := within(t, "message", rep.got); m.Kind != replication.KindPing || m.Seq != 5 {
			t.Fatalf("%+v", m)
		}

		// The connection breaks: that is said, and a new link comes by itself.
		s.Drop(func(n volume.NodeID) bool { return n == "client" })
		if err := within(t, "end", e.disconnected); err == nil {
			t.Error("no reason")
		}
		within(t, "end at the server", rep.closed)
		l = within(t, "link", e.connected)
		l.Send(&replication.Message{Kind: replication.KindPing, Seq: 6}, nil)
		l.Flush()
		if m := within(t, "message", rep.got); m.Seq != 6 {
			t.Fatalf("%+v", m)
		}
		p.Close()
		p.Close()
		p.Reconnect()
		within(t, "end at the server", rep.closed)
		if len(e.disconnected) > 0 || !errors.Is(p.Err(), errClosed) {
			t.Error("a closed peer is told of its end")
		}
	})
}

// TestServerClosesLink: the engine's side opens another.
func TestServerClosesLink(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		links := make(chan *Link, 10)
		rep := newReplica(t)
		_, addr := serve(t, acceptor(func(_ context.Context, l *Link, _ volume.ID, _ volume.ReplicaID) (Handler, error) {
			links <- l
			return rep, nil
		}), secure)
		e := newEngine()
		p := dial(t, secure).Open(target(addr, 1), e)
		defer p.Close()
		for range 3 {
			within(t, "link", e.connected)
			within(t, "link at the server", links).Close()
			within(t, "end", e.disconnected)
		}
		within(t, "link", e.connected)
	})
}

// TestOpenIsRefusedAtFirst: a replica that is not there yet is asked for again.
func TestOpenIsRefusedAtFirst(t *testing.T) {
	rep := newReplica(t)
	var tries atomic.Int32
	_, addr := serve(t, acceptor(func(ctx context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error) {
		switch tries.Add(1) {
		case 1:
			return nil, volume.ErrNotFound
		case 2:
			return nil, volume.ErrUnavailable
		case 3:
			return nil, errors.New(strings.Repeat("pool is on fire ", 100))
		}
		return rep, nil
	}), false)
	e := newEngine()
	p := dial(t, false).Open(target(addr, 1), e)
	defer p.Close()
	for {
		if err := p.Err(); errors.Is(err, volume.ErrNotFound) {
			break
		} else if err == nil || tries.Load() > 3 {
			break // it was too quick for us
		}
		time.Sleep(time.Millisecond)
	}
	within(t, "link", e.connected)
	if n := tries.Load(); n != 4 || p.Err() != nil {
		t.Errorf("%d tries, %v", n, p.Err())
	}
}

// TestCloseWhileOpening: an Open that takes its time does not leave a link behind.
func TestCloseWhileOpening(t *testing.T) {
	rep := newReplica(t)
	begun, goOn := make(chan bool, 10), make(chan bool)
	_, addr := serve(t, acceptor(func(ctx context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error) {
		if v == "vol-2" {
			return newReplica(t), nil
		}
		begun <- true
		select {
		case <-goOn:
			return rep, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}), false)
	c := dial(t, false)
	c.cfg.Conns = 1
	other := newEngine()
	defer c.Open(target(addr, 2), other).Close()
	within(t, "link", other.connected)
	e := newEngine()
	p := c.Open(target(addr, 1), e)
	within(t, "opening", begun)
	p.Close()
	goOn <- true
	within(t, "end of what was opened for nobody", rep.closed)
	if len(e.connected) > 0 {
		t.Error("a closed peer is connected")
	}
	// The connection of the others stands.
	if len(other.disconnected) > 0 {
		t.Error("another volume lost its link")
	}
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
			e := newEngine()
			to := target(tt.addr, 1)
			to.Node = tt.to
			p := c.Open(to, e)
			defer p.Close()
			for p.Err() == nil || strings.Contains(p.Err().Error(), "not tried") {
				time.Sleep(time.Millisecond)
			}
			if err := p.Err(); !strings.Contains(err.Error(), tt.want) || len(e.connected) > 0 {
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
			nc.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				t.Error("the server keeps the connection")
			}
		})
	}
	e := newEngine()
	defer dial(t, false).Open(target(addr, 1), e).Close()
	within(t, "link", e.connected)
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
	defer dial(t, false).Open(target(front, 1), e).Close()
	l := within(t, "link", e.connected)
	o := new(owner)
	l.Send(&replication.Message{Kind: replication.KindWrite, Data: marker}, o)
	l.Flush()
	within(t, "end", e.disconnected)
	o.released(t)
	within(t, "link", e.connected)
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
		e := newEngine()
		p := dial(t, secure).Open(target(addr, 1), e)
		l := within(t, "link", e.connected)
		data := make([]byte, replication.MaxData)
		owners := make([]owner, 64)
		for i := range owners {
			l.Send(&replication.Message{Kind: replication.KindWrite, Data: data}, &owners[i])
		}
		l.Flush()
		for owners[0].n.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
		if owners[63].n.Load() > 0 {
			t.Fatal("64 MiB fit into the sockets")
		}
		p.Close()
		for i := range owners {
			owners[i].released(t)
		}
		clear(data) // the race detector sees who still reads it
	})
}

// sleeper does not take messages until it is let go.
type sleeper struct {
	*replica
	block chan bool
}

func (s *sleeper) Receive(l *Link, m *replication.Message) {
	<-s.block
	l.Free(m.Data)
}

// TestBudget: a server reads no more than its handlers can hold.
func TestBudget(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		rep := &hoarder{replica: newReplica(t), got: make(chan []byte, 1000)}
		_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) { return rep, nil }), secure)
		e := newEngine()
		p := dial(t, secure).Open(target(addr, 1), e)
		defer p.Close()
		l := within(t, "link", e.connected)
		data := make([]byte, replication.MaxData)
		const n = receiveBudget/replication.MaxData + 30
		owners := make([]owner, n)
		for i := range n {
			l.Send(&replication.Message{Kind: replication.KindWrite, Data: data}, &owners[i])
		}
		l.Flush()
		var held [][]byte
		for range receiveBudget / replication.MaxData {
			held = append(held, within(t, "data", rep.got))
		}
		time.Sleep(50 * time.Millisecond)
		if extra := len(rep.got); extra > 0 {
			t.Errorf("%d more than the budget", extra)
		}
		server := rep.link.Load()
		for range n - len(held) {
			server.Free(held[0])
			held = append(held[1:], within(t, "more data", rep.got))
		}
		s := within(t, "connection", connOf(server))
		p.Close()
		within(t, "end", rep.closed)
		for _, b := range held {
			server.Free(b)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held != 0 {
			t.Errorf("%d bytes are held", s.held)
		}
	})
}

func connOf(l *Link) chan *conn {
	c := make(chan *conn, 1)
	c <- l.c
	return c
}

type hoarder struct {
	*replica
	got  chan []byte
	link atomic.Pointer[Link]
}

func (h *hoarder) Receive(l *Link, m *replication.Message) {
	h.link.Store(l)
	h.got <- m.Data
}

// TestChaos: many volumes send while links and connections break all the time. Each owner is told once; each link delivers
// a prefix of what was sent on it, in order.
func TestChaos(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		before := runtime.NumGoroutine()
		t.Run("run", func(t *testing.T) { chaos(t, secure) })
		for end := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
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
				s.Drop(func(volume.NodeID) bool { return r.IntN(2) == 0 })
			}
		}
	})
	for v := range volumes {
		drivers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(v), 2))
			e := newEngine()
			p := c.Open(target(addr, v), e)
			defer p.Close()
			owners := make([]owner, 600)
			data := make([]byte, 40<<10)
			var l *Link
			seq := uint64(0)
			for i := range owners {
				for l == nil || len(e.connected) > 0 {
					l, seq = within(t, "link", e.connected), 0
				}
				seq++
				l.Send(&replication.Message{Kind: replication.KindWrite, Seq: seq, Data: data[:r.IntN(len(data))]}, &owners[i])
				switch r.IntN(40) {
				case 0:
					p.Reconnect()
					l = nil
				case 1, 2, 3, 4, 5:
					l.Flush()
				case 6:
					time.Sleep(time.Millisecond)
				}
				for len(e.answers) > 0 {
					<-e.answers
				}
				for len(e.disconnected) > 0 {
					<-e.disconnected
				}
			}
			if l != nil {
				l.Flush()
			}
			p.Close()
			for i := range owners {
				owners[i].released(t)
			}
			clear(data)
		})
	}
	drivers.Wait()
	close(stop)
	wg.Wait()
	if delivered.Load() < volumes*100 {
		t.Errorf("only %d messages were delivered", delivered.Load())
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
	l.Free(m.Data)
	l.Send(&replication.Message{Kind: m.Kind, Reply: true, Seq: m.Seq}, nil)
}

func (o *orderly) EndBatch(l *Link) { l.Flush() }

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
