package replicanet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// maxConns bounds a server's connections, those in the handshake included.
	maxConns = 1024
	// maxLinks bounds the links of one connection, those being opened included.
	maxLinks = 4096
	// receiveBudget bounds the data received on one connection and not yet given back, in bytes. Reading stops there for
	// all volumes of the connection, until those whose stores hang are ended (hungAfter).
	receiveBudget = 256 << 20
)

// Acceptor opens replicas for engines.
type Acceptor interface {
	// Open returns who serves a replica to a node's engine over a link: it may be used from then on, but its Receive is not
	// called before Open has returned. volume.ErrNotFound where there is no such replica, volume.ErrUnavailable where it
	// cannot be served now; the engine's node asks again. Open may take its time; ctx ends with the connection.
	Open(ctx context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error)
}

// ServerConfig is what a Server needs.
type ServerConfig struct {
	Cluster string
	Node    volume.NodeID
	// TLS is from pki.Credentials.Server. Nil speaks in clear to everybody, which Insecure must allow.
	TLS      *tls.Config
	Insecure bool
	Acceptor Acceptor
	Log      *slog.Logger
}

// Server serves the replicas of a node.
type Server struct {
	cfg    ServerConfig
	budget int
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	refused repeat.Trouble

	mu        sync.Mutex
	closed    bool
	listeners []net.Listener
	conns     map[*conn]bool
	count     int // connections, those in the handshake included
}

var errInsecure = errors.New("neither TLS nor Insecure is set")

// NewServer returns a server that serves nobody yet.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.TLS == nil && !cfg.Insecure {
		return nil, errInsecure
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{cfg: cfg, budget: receiveBudget, ctx: ctx, cancel: cancel, conns: map[*conn]bool{}}, nil
}

// Serve takes over a listener for TCP and serves whoever calls, until Close; it then returns nil.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return l.Close()
	}
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	for {
		nc, err := l.Accept()
		if s.ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			// Out of file descriptors, say: that passes. Anything else does not.
			var te interface{ Temporary() bool }
			if !errors.As(err, &te) || !te.Temporary() {
				return err
			}
			s.cfg.Log.Warn("replica protocol: accept", "err", err)
			select {
			case <-s.ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		tcp, ok := nc.(*net.TCPConn)
		if !ok || !s.begin() {
			nc.Close()
			continue
		}
		s.wg.Go(func() {
			defer s.end()
			s.serve(tcp)
		})
	}
}

func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.count >= maxConns {
		return false
	}
	s.count++
	return true
}

func (s *Server) end() {
	s.mu.Lock()
	s.count--
	s.mu.Unlock()
}

// serve is the life of one connection.
func (s *Server) serve(tcp *net.TCPConn) {
	from := tcp.RemoteAddr()
	t, err := welcome(s.ctx, tcp, s.cfg.TLS, s.cfg.Cluster, s.cfg.Node)
	if err != nil {
		if s.ctx.Err() == nil && s.refused.Again() {
			s.cfg.Log.Warn("replica protocol: a caller is turned away", "from", from, "err", err)
		}
		return
	}
	c := newConn(t, s.budget)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		c.abort(errClosed)
	} else {
		s.conns[c] = true
		s.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(s.ctx)
	o := &opener{s: s, c: c, ctx: ctx, opening: map[uint32]bool{}}
	err = c.run(o)
	cancel()
	o.wg.Wait()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.cfg.Log.Debug("replica protocol: connection ended", "node", c.peer, "from", from, "err", err)
}

var errGone = errors.New("the node is not spoken to any more")

// Drop ends the connections of nodes that are not to be served any more. Peers without TLS have no Cluster.
func (s *Server) Drop(gone func(pki.Peer) bool) {
	s.mu.Lock()
	var end []*conn
	for c := range s.conns {
		if gone(c.proved) {
			end = append(end, c)
		}
	}
	s.mu.Unlock()
	for _, c := range end {
		c.abort(errGone)
	}
}

// Close ends all connections, and waits until their links are closed.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	listeners := slices.Clone(s.listeners)
	s.listeners = nil
	var conns []*conn
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	s.cancel()
	var errs []error
	for _, l := range listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range conns {
		c.abort(errClosed)
	}
	s.wg.Wait()
	return errors.Join(errs...)
}

// opener opens the links that a client asks for.
type opener struct {
	s   *Server
	c   *conn
	ctx context.Context
	wg  sync.WaitGroup

	mu      sync.Mutex
	opening map[uint32]bool // false: closed again meanwhile
}

func (o *opener) asks(num uint32, rest []byte) error {
	r := reader{b: rest}
	v, rep := volume.ID(r.string()), volume.ReplicaID(r.string())
	if r.bad || len(r.b) > 0 {
		return fmt.Errorf("opening of a link: %w", errWire)
	}
	o.mu.Lock()
	_, twice := o.opening[num]
	full := len(o.opening)+o.c.count() >= maxLinks
	if !twice && !full {
		o.opening[num] = true
	}
	o.mu.Unlock()
	if twice || o.c.link(num) != nil {
		return fmt.Errorf("link %d is opened twice: %w", num, errWire)
	}
	if full {
		o.answer(num, fmt.Errorf("node %s has %d links open already: %w", o.c.peer, maxLinks, volume.ErrUnavailable))
		return nil
	}
	o.wg.Go(func() {
		l := newLink(o.c, num, v, rep, nil)
		h, err := o.s.cfg.Acceptor.Open(o.ctx, l, v, rep)
		if err != nil {
			o.mu.Lock()
			delete(o.opening, num)
			o.mu.Unlock()
			o.answer(num, err)
			return
		}
		l.h = h
		o.mu.Lock()
		wanted := o.opening[num]
		delete(o.opening, num)
		added := wanted && o.c.add(l)
		o.mu.Unlock()
		if !added {
			o.c.mu.Lock()
			o.c.end(l)
			o.c.mu.Unlock()
			l.close(errClosed)
			return
		}
		o.answer(num, nil)
	})
	return nil
}

// closes notes that the client closes a link: one that is being opened is not wanted any more.
func (o *opener) closes(num uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, ok := o.opening[num]; ok {
		o.opening[num] = false
	}
}

func (o *opener) opened(uint32, []byte) error {
	return fmt.Errorf("an answer from a client: %w", errWire)
}

func (o *opener) answer(num uint32, err error) {
	var rest []byte
	name, text := "", ""
	if err != nil {
		name, text = failure(err), bounded(err.Error())
	}
	rest = appendString(rest, name)
	rest = appendString(rest, text)
	o.c.post(kindOpened, num, rest)
	o.c.flush()
}

// failure names an error of Acceptor.Open for the other end.
func failure(err error) string {
	if errors.Is(err, volume.ErrNotFound) {
		return "not-found"
	}
	return "unavailable"
}
