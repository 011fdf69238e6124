package replicanet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// defaultConns is the number of connections to a node. A volume's link lies on one of them.
	defaultConns = 2
	// redialMin and redialMax bound the pauses between attempts to reach a node, and to open a link on it.
	redialMin, redialMax = 50 * time.Millisecond, 2 * time.Second
	// openTimeout is how long a node may take to open a link before the connection is given up.
	openTimeout = 10 * time.Second
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
	return &Client{cfg: cfg, ctx: ctx, cancel: cancel, lanes: map[destination][]*lane{}}, nil
}

// Close ends all connections and waits for what they called.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
}

// Target is a replica on another node.
type Target struct {
	Node volume.NodeID
	// Address is HOST:PORT.
	Address string
	Volume  volume.ID
	Replica volume.ReplicaID
}

// PeerHandler gets what happens between an engine and a replica. Its methods are called one at a time, as those of Handler
// are, and under the same rules.
type PeerHandler interface {
	// Connected gives a new link; the one before it has ended.
	Connected(l *Link)
	Receive(l *Link, m *replication.Message)
	EndBatch(l *Link)
	// Disconnected says that a link has ended, otherwise than by Reconnect or Close. Another will be made.
	Disconnected(l *Link, err error)
}

// Peer is a replica on another node, reached or not. It is reached for until it is closed.
type Peer struct {
	target Target
	h      PeerHandler
	lane   *lane

	mu     sync.Mutex
	closed bool
	link   *Link
	err    error // why there is no link
	pause  time.Duration
	timer  *time.Timer
}

// Open begins to reach for a replica.
func (c *Client) Open(t Target, h PeerHandler) *Peer {
	p := &Peer{target: t, h: h, err: errors.New("not tried yet")}
	to := destination{t.Node, t.Address}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		p.closed, p.err = true, errClosed
		return p
	}
	lanes := c.lanes[to]
	var best *lane
	for _, l := range lanes {
		if best == nil || len(l.peers) < len(best.peers) {
			best = l
		}
	}
	if best == nil || len(best.peers) > 0 && len(lanes) < c.cfg.Conns {
		ctx, cancel := context.WithCancel(c.ctx)
		best = &lane{c: c, to: to, cancel: cancel, peers: map[*Peer]bool{}}
		c.lanes[to] = append(lanes, best)
		c.wg.Go(func() { best.run(ctx) })
	}
	best.peers[p] = true
	p.lane = best
	c.mu.Unlock()
	best.again(p)
	return p
}

// Err is why the replica is not reached; nil when it is.
func (p *Peer) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Reconnect gives the present link up and makes a new one. Nothing is received on the old one after the Receive that may be
// under way.
func (p *Peer) Reconnect() {
	if p.lane == nil {
		return
	}
	p.mu.Lock()
	l := p.link
	if p.closed || l == nil {
		p.mu.Unlock()
		return // another is being made already
	}
	p.link, p.err = nil, errors.New("reconnecting")
	p.mu.Unlock()
	l.Close()
	p.lane.again(p)
}

// Close ends the reaching. A call of the handler that is under way may still end after Close has returned.
func (p *Peer) Close() {
	if p.lane == nil {
		return
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed, p.err = true, errClosed
	l := p.link
	p.link = nil
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	if l != nil {
		l.Close()
	}
	p.lane.remove(p)
}

func (p *Peer) linked() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.link != nil
}

func (p *Peer) failed(err error) {
	p.mu.Lock()
	if !p.closed {
		p.err = err
	}
	p.mu.Unlock()
}

// lane is one connection to a node, whether it stands or not.
type lane struct {
	c      *Client
	to     destination
	cancel context.CancelFunc

	// Guarded by c.mu.
	peers   map[*Peer]bool
	conn    *conn
	next    uint32
	pending map[uint32]*asked // links asked for on conn
}

// asked is a link that the node was asked for.
type asked struct {
	peer  *Peer
	timer *time.Timer
}

// remove forgets a peer; the last one takes the connection along.
func (n *lane) remove(p *Peer) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	delete(n.peers, p)
	for num, a := range n.pending {
		if a.peer == p {
			a.timer.Stop()
			delete(n.pending, num)
			// The answer, when it comes, finds nobody and is answered with a close.
		}
	}
	if len(n.peers) > 0 {
		return
	}
	n.cancel()
	lanes := n.c.lanes[n.to]
	for i, l := range lanes {
		if l == n {
			lanes = append(lanes[:i:i], lanes[i+1:]...)
			break
		}
	}
	if len(lanes) == 0 {
		delete(n.c.lanes, n.to)
	} else {
		n.c.lanes[n.to] = lanes
	}
}

// again asks for a peer's link where there is a connection; where there is none, the next one does.
func (n *lane) again(p *Peer) {
	n.c.mu.Lock()
	c := n.conn
	if c != nil && n.peers[p] {
		n.ask(c, p)
	}
	n.c.mu.Unlock()
	if c != nil {
		c.flush()
	}
}

// ask queues the question for a link, unless there is one or it is asked for; c.mu is held.
func (n *lane) ask(c *conn, p *Peer) {
	if p.linked() {
		return
	}
	for _, a := range n.pending {
		if a.peer == p {
			return
		}
	}
	n.next++
	num := n.next
	n.pending[num] = &asked{peer: p, timer: time.AfterFunc(openTimeout, func() {
		c.abort(fmt.Errorf("node %s does not open replica %s", n.to.node, p.target.Replica))
	})}
	rest := appendString(nil, p.target.Volume)
	rest = appendString(rest, p.target.Replica)
	c.post(kindOpen, num, rest)
}

// opened is the answer.
func (n *lane) opened(num uint32, rest []byte) error {
	r := reader{b: rest}
	name, text := r.string(), r.text(maxRefusal)
	if r.bad || len(r.b) > 0 {
		return fmt.Errorf("answer to the opening of a link: %w", errWire)
	}
	n.c.mu.Lock()
	c := n.conn
	a := n.pending[num]
	delete(n.pending, num)
	n.c.mu.Unlock()
	if a == nil {
		if name == "" {
			c.post(kindClose, num, nil)
			c.flush()
		}
		return nil
	}
	a.timer.Stop()
	p := a.peer
	if name != "" {
		known := failures[name]
		if known == nil {
			known = volume.ErrUnavailable
		}
		p.retry(fmt.Errorf("node %s: %s: %w", n.to.node, text, known))
		return nil
	}
	l := newLink(c, num, p.target.Volume, p.target.Replica, p)
	if !c.add(l) {
		return c.cause()
	}
	p.mu.Lock()
	wanted := !p.closed && p.link == nil
	if wanted {
		p.link, p.err, p.pause = l, nil, 0
	}
	p.mu.Unlock()
	if !wanted {
		l.Close()
		return nil
	}
	p.h.Connected(l)
	return nil
}

// retry asks for the link again after a pause.
func (p *Peer) retry(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.err = err
	p.pause = min(max(2*p.pause, redialMin), redialMax)
	p.timer = time.AfterFunc(jitter(p.pause), func() { p.lane.again(p) })
}

// Receive implements Handler.
func (p *Peer) Receive(l *Link, m *replication.Message) { p.h.Receive(l, m) }

// EndBatch implements Handler.
func (p *Peer) EndBatch(l *Link) { p.h.EndBatch(l) }

// Closed implements Handler.
func (p *Peer) Closed(l *Link, err error) {
	p.mu.Lock()
	mine := p.link == l
	if mine {
		p.link, p.err = nil, err
	}
	p.mu.Unlock()
	if !mine {
		return
	}
	p.h.Disconnected(l, err)
	// Where the connection stands and the node closed the link only, a new one is due.
	p.lane.again(p)
}

// open implements control: a server asks for nothing.
func (n *lane) open(uint32, []byte) error {
	return fmt.Errorf("a server opens a link: %w", errWire)
}

func (n *lane) close(uint32) {}

// run keeps the connection.
func (n *lane) run(ctx context.Context) {
	var pause time.Duration
	said := ""
	for ctx.Err() == nil {
		stood, err := n.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if stood {
			pause = 0
		}
		if text := err.Error(); text != said {
			said = text
			n.c.cfg.Log.Warn("replica protocol: no connection", "node", n.to.node, "address", n.to.address, "err", err)
		}
		n.c.mu.Lock()
		for p := range n.peers {
			p.failed(err)
		}
		n.c.mu.Unlock()
		pause = min(max(2*pause, redialMin), redialMax)
		select {
		case <-ctx.Done():
		case <-time.After(jitter(pause)):
		}
	}
}

// connect is the life of one connection. It returns whether there was one, and why it ended or why there was none.
func (n *lane) connect(ctx context.Context) (stood bool, err error) {
	d := net.Dialer{Timeout: handshakeTimeout}
	nc, err := d.DialContext(ctx, "tcp", n.to.address)
	if err != nil {
		return false, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		nc.Close()
		return false, fmt.Errorf("%s is not TCP", n.to.address)
	}
	var cfg *tls.Config
	if n.c.cfg.TLS != nil {
		cfg = n.c.cfg.TLS(n.to.node)
	}
	t, err := greet(ctx, tcp, cfg, n.c.cfg.Cluster, n.c.cfg.Node, n.to.node)
	if err != nil {
		return false, err
	}
	c := newConn(t, 0)
	stop := context.AfterFunc(ctx, func() { c.abort(errClosed) })
	defer stop()
	n.c.mu.Lock()
	n.conn, n.next, n.pending = c, 0, map[uint32]*asked{}
	for p := range n.peers {
		n.ask(c, p)
	}
	n.c.mu.Unlock()
	c.flush()
	err = c.run(n)
	n.c.mu.Lock()
	n.conn = nil
	for _, a := range n.pending {
		a.timer.Stop()
	}
	n.pending = nil
	n.c.mu.Unlock()
	return true, err
}

// jitter keeps nodes from calling in step.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }
