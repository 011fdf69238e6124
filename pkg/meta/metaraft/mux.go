package metaraft

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	handshakeTime = 5 * time.Second
	maxConns      = 256 // accepted at a time
	maxCalls      = 64  // of one connection, carried out at a time
	longestCall   = 30 * time.Second
)

// mux is the controller's one listener: it tells raft's connections from calls.
type mux struct {
	ln             net.Listener
	server, client *tls.Config // nil is plaintext
	advertise      string
	// identify names the node at the other end of a TLS connection; nil leaves it unnamed.
	identify func(tls.ConnectionState) (volume.NodeID, error)
	handle   func(ctx context.Context, peer volume.NodeID, kind callKind, payload []byte) (uint8, []byte)
	network  func(ctx context.Context, network, address string) (net.Conn, error)
	log      *slog.Logger
	refused  repeat.Trouble

	ctx    context.Context // ends with the mux
	cancel context.CancelFunc
	wg     sync.WaitGroup
	raft   chan net.Conn

	mu    sync.Mutex
	conns map[*tracked]struct{} // all that are open, dialled ones too
}

func (m *mux) start() {
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.raft = make(chan net.Conn)
	m.conns = map[*tracked]struct{}{}
	m.wg.Go(m.accept)
}

// shut ends every connection; wait then waits for the calls under way and for raft to let go of its connections.
func (m *mux) shut() error {
	m.cancel()
	err := m.ln.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	m.mu.Lock()
	for c := range m.conns {
		_ = c.Conn.Close()
	}
	m.mu.Unlock()
	return err
}

// drop ends the connections of peers that gone finds by what they proved in the handshake.
func (m *mux) drop(gone func(tls.ConnectionState) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.conns {
		if c.proved != nil && gone(*c.proved) {
			_ = c.Conn.Close() // whoever uses it notices
		}
	}
}

func (m *mux) wait() { m.wg.Wait() }

// track has shut close a connection; false is a mux that is closed.
func (m *mux) track(c net.Conn) (*tracked, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		_ = c.Close()
		return nil, false
	}
	t := &tracked{Conn: c, m: m}
	m.conns[t] = struct{}{}
	return t, true
}

type tracked struct {
	net.Conn
	m *mux
	// proved is what the handshake ended with; nil before that, and without TLS. Guarded by m.mu.
	proved *tls.ConnectionState
}

// secured notes who is at the other end.
func (t *tracked) secured(s tls.ConnectionState) {
	t.m.mu.Lock()
	defer t.m.mu.Unlock()
	t.proved = &s
}

func (t *tracked) Close() error {
	t.m.mu.Lock()
	delete(t.m.conns, t)
	t.m.mu.Unlock()
	return t.Conn.Close()
}

func (m *mux) accept() {
	slots := make(chan struct{}, maxConns)
	for {
		c, err := m.ln.Accept()
		if err != nil {
			if m.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			m.log.Warn("a connection to this controller was not accepted", "error", err)
			select { // no descriptors, most likely
			case <-time.After(100 * time.Millisecond):
			case <-m.ctx.Done():
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			m.log.Warn("too many connections to this controller", "limit", maxConns, "refused", c.RemoteAddr().String())
			_ = c.Close()
			continue
		}
		m.wg.Go(func() {
			defer func() { <-slots }()
			m.serve(c)
		})
	}
}

// serve finds out what a connection is for and carries it out; raft's is handed on.
func (m *mux) serve(raw net.Conn) {
	conn, ok := m.track(raw)
	if !ok {
		return
	}
	var c net.Conn = conn
	var peer volume.NodeID
	_ = c.SetDeadline(time.Now().Add(handshakeTime))
	if m.server != nil {
		t := tls.Server(c, m.server)
		err := t.HandshakeContext(m.ctx)
		if err == nil && m.identify != nil {
			peer, err = m.identify(t.ConnectionState())
		}
		if err != nil {
			if m.ctx.Err() == nil && m.refused.Again() {
				m.log.Warn("a connection to this controller was refused", "from", raw.RemoteAddr().String(), "error", err)
			}
			_ = c.Close()
			return
		}
		conn.secured(t.ConnectionState())
		c = t
	}
	var head [len(preface) + 1]byte
	if _, err := io.ReadFull(c, head[:]); err != nil || string(head[:len(preface)]) != preface {
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	switch head[len(preface)] {
	case forRaft:
		ended := make(chan struct{})
		select {
		case m.raft <- &reported{Conn: c, ended: ended}:
			<-ended // it counts against maxConns
		case <-m.ctx.Done():
			_ = c.Close()
		}
	case forCalls:
		m.answer(c, peer)
	default:
		_ = c.Close()
	}
}

// reported tells when it is closed.
type reported struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (r *reported) Close() error {
	r.once.Do(func() { close(r.ended) })
	return r.Conn.Close()
}

// answer carries out the calls of a connection until it ends.
func (m *mux) answer(c net.Conn, peer volume.NodeID) {
	var calls sync.WaitGroup
	defer calls.Wait()
	defer c.Close()
	ctx, cancel := context.WithCancel(m.ctx) // a caller that is gone waits for nothing
	defer cancel()
	var writing sync.Mutex
	slots := make(chan struct{}, maxCalls)
	in := bufio.NewReader(c)
	for {
		f, err := readFrame(in)
		if err != nil {
			return
		}
		slots <- struct{}{}
		calls.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, min(f.wait, longestCall))
			defer cancel()
			status, payload := m.handle(ctx, peer, callKind(f.kind), f.payload)
			b := appendFrame(nil, frame{id: f.id, kind: status, payload: payload})
			writing.Lock()
			defer writing.Unlock()
			_ = c.SetWriteDeadline(time.Now().Add(handshakeTime))
			if _, err := c.Write(b); err != nil {
				_ = c.Close()
			}
		})
	}
}

// dial opens a connection for a purpose.
func (m *mux) dial(ctx context.Context, address string, purpose byte) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	raw, err := m.network(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn, ok := m.track(raw)
	if !ok {
		return nil, net.ErrClosed
	}
	var c net.Conn = conn
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if m.client != nil {
		config := m.client
		if config.ServerName == "" && !config.InsecureSkipVerify {
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				return nil, errors.Join(err, c.Close())
			}
			config = config.Clone()
			config.ServerName = host
		}
		t := tls.Client(c, config)
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		conn.secured(t.ConnectionState())
		c = t
	}
	if _, err := c.Write(append([]byte(preface), purpose)); err != nil {
		return nil, errors.Join(fmt.Errorf("controller at %s: %w", address, err), c.Close())
	}
	_ = c.SetDeadline(time.Time{})
	return c, nil
}

// The methods that raft.NetworkTransport wants of its stream layer.

type streams struct {
	*mux
	closed chan struct{}
}

// Accept implements net.Listener. It ends with Close, not with the mux, whose owner closes both.
func (s streams) Accept() (net.Conn, error) {
	select {
	case c := <-s.raft:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. It is called once.
func (s streams) Close() error {
	close(s.closed)
	return nil
}

// Addr is where others reach this controller.
func (s streams) Addr() net.Addr { return address(s.advertise) }

// Dial implements raft.StreamLayer.
func (s streams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	return s.dial(ctx, string(to), forRaft)
}

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }
