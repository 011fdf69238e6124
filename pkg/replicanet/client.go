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
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// defaultConns is the number of connections to a node. A link lies on one of them.
	defaultConns = 2
	// dialPause is how long the failure of a dial stands for the next: many volumes may want the same node.
	dialPause = 50 * time.Millisecond
	// idleAfter is how long a connection without links is kept.
	idleAfter = 10 * time.Second
)

// ClientConfig is what a Client needs.
type ClientConfig struct {
	Cluster string
	// Node is this one.
	Node volume.NodeID
	// TLS returns the configuration for calling a node: from pki.Credentials.Client. Nil speaks in clear, which Insecure
	// must allow.
	TLS      func(volume.NodeID) *tls.Config
	Insecure bool
	// Conns is the number of connections to a node; 0 is the default.
	Conns int
	Log   *slog.Logger
}

// Client reaches replicas on other nodes.
type Client struct {
	cfg    ClientConfig
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// dial makes TCP connections.
	dial func(ctx context.Context, address string) (net.Conn, error)

	mu     sync.Mutex
	closed bool
	lanes  map[destination][]*lane
}

type destination struct {
	node    volume.NodeID
	address string
}

// NewClient returns a client without connections: they are made when they are needed.
func NewClient(cfg ClientConfig) (*Client, error) {
	if cfg.TLS == nil && !cfg.Insecure {
		return nil, errInsecure
	}
	if cfg.Conns <= 0 {
		cfg.Conns = defaultConns
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := net.Dialer{Timeout: handshakeTimeout}
	dial := func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	return &Client{cfg: cfg, ctx: ctx, cancel: cancel, dial: dial, lanes: map[destination][]*lane{}}, nil
}

// Close ends all connections and waits until their links are closed.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
}

// Drop ends the connections to nodes that are not to be called any more, as Server.Drop does.
func (c *Client) Drop(gone func(pki.Peer) bool) {
	c.mu.Lock()
	var end []*conn
	for _, lanes := range c.lanes {
		for _, n := range lanes {
			select {
			case <-n.ready:
				if n.conn != nil && gone(n.conn.proved) {
					end = append(end, n.conn)
				}
			default:
			}
		}
	}
	c.mu.Unlock()
	for _, conn := range end {
		conn.abort(errGone)
	}
}

// Target is a replica on another node.
type Target struct {
	Node volume.NodeID
	// Address is HOST:PORT.
	Address string
	Volume  volume.ID
	Replica volume.ReplicaID
}

// Dial opens a link to a replica, over a connection that stands or a new one. It returns volume.ErrNotFound where the node
// does not have the replica, and volume.ErrUnavailable for anything else that may pass.
func (c *Client) Dial(ctx context.Context, t Target, h Handler) (*Link, error) {
	n, err := c.lane(destination{t.Node, t.Address})
	if err != nil {
		return nil, err
	}
	defer n.release()
	select {
	case <-n.ready:
	case <-ctx.Done():
		return nil, fmt.Errorf("node %s: %w: %w", t.Node, ctx.Err(), volume.ErrUnavailable)
	}
	if n.conn == nil {
		return nil, fmt.Errorf("node %s at %s: %w: %w", t.Node, t.Address, n.err, volume.ErrUnavailable)
	}
	return n.open(ctx, t, h)
}

// lane is one connection, from the decision to make it until it is over.
type lane struct {
	c  *Client
	to destination
	// ready is closed when conn is set, or err, for good.
	ready chan struct{}
	conn  *conn
	err   error

	// Guarded by c.mu.
	over    bool // no more links
	users   int  // calls of Dial under way
	next    uint32
	pending map[uint32]*asked
	idle    *time.Timer
}

// asked is a link that the node was asked for.
type asked struct {
	link   *Link
	answer chan error // has room
}

// lane returns the least used connection to a node, or begins another. The caller releases it.
func (c *Client) lane(to destination) (*lane, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("%w: %w", errClosed, volume.ErrUnavailable)
	}
	var best *lane
	least := 0
	for _, n := range c.lanes[to] {
		if load := n.load(); best == nil || load < least {
			best, least = n, load
		}
	}
	if best == nil || least > 0 && len(c.lanes[to]) < c.cfg.Conns {
		best = &lane{c: c, to: to, ready: make(chan struct{}), pending: map[uint32]*asked{}}
		c.lanes[to] = append(c.lanes[to], best)
		c.wg.Go(best.run)
	}
	best.users++
	return best, nil
}

// load is how many links it has or is to have; c.mu is held.
func (n *lane) load() int {
	links := 0
	select {
	case <-n.ready:
		if n.conn != nil {
			links = n.conn.count()
		}
	default:
	}
	return links + n.users
}

// release ends a use of lane.
func (n *lane) release() {
	n.c.mu.Lock()
	n.users--
	n.c.mu.Unlock()
	n.rest()
}

// rest sets the time after which a connection without links is closed.
func (n *lane) rest() {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	select {
	case <-n.ready:
	default:
		return // run does it
	}
	if n.over || n.conn == nil || n.load() > 0 || n.idle != nil {
		return
	}
	n.idle = time.AfterFunc(idleAfter, func() {
		n.c.mu.Lock()
		n.idle = nil
		unused := !n.over && n.load() == 0
		if unused {
			n.leave()
		}
		n.c.mu.Unlock()
		if unused {
			n.conn.abort(errClosed)
		}
	})
}

// leave takes a lane out of use; c.mu is held.
func (n *lane) leave() {
	n.over = true
	lanes := slices.DeleteFunc(n.c.lanes[n.to], func(l *lane) bool { return l == n })
	if len(lanes) == 0 {
		delete(n.c.lanes, n.to)
	} else {
		n.c.lanes[n.to] = lanes
	}
	if n.idle != nil {
		n.idle.Stop()
	}
}

// run is the life of the connection.
func (n *lane) run() {
	t, err := n.connect(n.c.ctx)
	if err != nil {
		n.err = err
		close(n.ready)
		select {
		case <-time.After(dialPause):
		case <-n.c.ctx.Done():
		}
		n.c.mu.Lock()
		n.leave()
		n.c.mu.Unlock()
		return
	}
	n.conn = newConn(t, 0)
	stop := context.AfterFunc(n.c.ctx, func() { n.conn.abort(errClosed) })
	defer stop()
	close(n.ready)
	n.rest()
	err = n.conn.run(n)
	n.c.mu.Lock()
	if !n.over {
		n.leave()
	}
	pending := n.pending
	n.pending = nil
	n.c.mu.Unlock()
	for _, a := range pending {
		a.answer <- err
	}
	if !errors.Is(err, errClosed) {
		n.c.cfg.Log.Warn("replica protocol: connection lost", "node", n.to.node, "address", n.to.address, "err", err)
	}
}

func (n *lane) connect(ctx context.Context) (*transport, error) {
	nc, err := n.c.dial(ctx, n.to.address)
	if err != nil {
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("%s is not TCP", n.to.address)
	}
	var cfg *tls.Config
	if n.c.cfg.TLS != nil {
		cfg = n.c.cfg.TLS(n.to.node)
	}
	return greet(ctx, tcp, cfg, n.c.cfg.Cluster, n.c.cfg.Node, n.to.node)
}

// open asks the node for a link.
func (n *lane) open(ctx context.Context, t Target, h Handler) (*Link, error) {
	a := &asked{answer: make(chan error, 1)}
	n.c.mu.Lock()
	if n.pending == nil {
		n.c.mu.Unlock()
		return nil, fmt.Errorf("node %s: %w: %w", t.Node, n.conn.cause(), volume.ErrUnavailable)
	}
	n.next++
	num := n.next
	a.link = newLink(n.conn, num, t.Volume, t.Replica, h)
	a.link.over = n.rest
	n.pending[num] = a
	n.c.mu.Unlock()
	rest := appendString(nil, t.Volume)
	rest = appendString(rest, t.Replica)
	n.conn.post(kindOpen, num, rest)
	n.conn.flush()
	var err error
	select {
	case err = <-a.answer:
	case <-ctx.Done():
		n.c.mu.Lock()
		_, unanswered := n.pending[num]
		delete(n.pending, num)
		n.c.mu.Unlock()
		if unanswered {
			n.conn.post(kindClose, num, nil)
			n.conn.flush()
			err = ctx.Err()
		} else if err = <-a.answer; err == nil {
			a.link.Close()
			err = ctx.Err()
		}
	}
	if err != nil {
		if !errors.Is(err, volume.ErrNotFound) && !errors.Is(err, volume.ErrUnavailable) {
			err = fmt.Errorf("%w: %w", err, volume.ErrUnavailable)
		}
		return nil, fmt.Errorf("node %s: replica %s: %w", t.Node, t.Replica, err)
	}
	return a.link, nil
}

// opened implements control.
func (n *lane) opened(num uint32, rest []byte) error {
	r := reader{b: rest}
	name, text := r.string(), r.text(maxRefusal)
	if r.bad || len(r.b) > 0 {
		return fmt.Errorf("answer to the opening of a link: %w", errWire)
	}
	n.c.mu.Lock()
	a := n.pending[num]
	delete(n.pending, num)
	n.c.mu.Unlock()
	switch {
	case a == nil: // nobody waits any more; the node was told
	case name == "not-found":
		a.answer <- fmt.Errorf("%s: %w", text, volume.ErrNotFound)
	case name != "":
		a.answer <- fmt.Errorf("%s: %w", text, volume.ErrUnavailable)
	case n.conn.add(a.link):
		a.answer <- nil
	default:
		a.answer <- n.conn.cause()
	}
	return nil
}

// asks implements control: a server asks for nothing.
func (n *lane) asks(uint32, []byte) error {
	return fmt.Errorf("a server opens a link: %w", errWire)
}

func (n *lane) closes(uint32) {}
