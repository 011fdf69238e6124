package metaraft

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// authority issues the certificates of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

// tls returns what a node serves and calls with.
func (a *authority) tls(t testing.TB, name, address string) (server, client *tls.Config) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.ParseIP(host)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool}
	client = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c}, RootCAs: a.pool}
	return server, client
}

func commonName(s tls.ConnectionState) (volume.NodeID, error) {
	if len(s.PeerCertificates) == 0 {
		return "", errors.New("no certificate")
	}
	return volume.NodeID(s.PeerCertificates[0].Subject.CommonName), nil
}

// cluster is some controllers of one test. Every pair of them talks through proxies.
type cluster struct {
	t     testing.TB
	ca    *authority
	nodes []*node

	mu    sync.Mutex
	links map[[2]int]*proxy
	where map[int]string // address of a node
}

type node struct {
	c       *cluster
	n       int
	id      volume.NodeID
	dir     string
	address string
	hang    chan struct{} // writes of the log wait while there is something in it
	store   *Store        // nil while it is down
	timing  timing        // of the next start
}

var quick = timing{
	heartbeat: 250 * time.Millisecond, stall: time.Second, patience: 30 * time.Second, pause: 100 * time.Millisecond, snapshots: 4096,
}

// newCluster starts n controllers, the first of which begins the cluster, and waits until all have a vote.
func newCluster(t testing.TB, n int) *cluster {
	c := &cluster{t: t, ca: newAuthority(t), links: map[[2]int]*proxy{}}
	t.Cleanup(c.close)
	for range n {
		c.add()
	}
	c.settled(n)
	return c
}

// close ends the proxies; the controllers have ended.
func (c *cluster) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.links {
		p.close()
	}
}

// add starts one more controller, which joins the first of those that run.
func (c *cluster) add() *node {
	x := &node{c: c, n: len(c.nodes), id: volume.NodeID(fmt.Sprint("n", len(c.nodes)+1)), dir: c.t.TempDir(), hang: make(chan struct{}, 1), timing: quick}
	x.address = newAddress()
	c.nodes = append(c.nodes, x)
	c.t.Cleanup(x.stop) // after TempDir, to come before its end
	x.start()
	return x
}

var addresses atomic.Uint32

// newAddress is one that nobody else takes while nobody listens there: nobody connects from it.
func newAddress() string {
	n := addresses.Add(1)
	return fmt.Sprintf("127.%d.%d.%d:7410", 1+os.Getpid()%200, 1+n/200%200, 1+n%200)
}

func listen(t testing.TB, address string) net.Listener {
	t.Helper()
	for range 100 {
		ln, err := net.Listen("tcp", address)
		if err == nil {
			return ln
		}
		time.Sleep(20 * time.Millisecond) // connections of the former one end
	}
	t.Fatalf("%s stays taken", address)
	return nil
}

func (x *node) options() Options {
	x.c.mu.Lock()
	if x.c.where == nil {
		x.c.where = map[int]string{}
	}
	x.c.where[x.n] = x.address
	x.c.mu.Unlock()
	server, client := x.c.ca.tls(x.c.t, string(x.id), x.address)
	o := Options{
		ID: x.id, Dir: x.dir, Listener: listen(x.c.t, x.address), Advertise: x.address, Server: server, Client: client, Identify: commonName,
		Bootstrap: x.n == 0, timing: x.timing, network: x.dial, Logger: testLogger(x.id),
	}
	o.timing.hang = func() {
		x.hang <- struct{}{}
		<-x.hang
	}
	if x.n > 0 {
		for _, y := range x.c.nodes[:x.n] {
			o.Join = append(o.Join, y.address)
		}
	}
	return o
}

func testLogger(id volume.NodeID) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo})).With("node", id)
}

func (x *node) start() {
	x.c.t.Helper()
	s, err := Open(x.options())
	if err != nil {
		x.c.t.Fatal(err)
	}
	x.store = s
}

func (x *node) stop() {
	if x.store == nil {
		return
	}
	if err := x.store.Close(); err != nil {
		x.c.t.Errorf("close %s: %v", x.id, err)
	}
	x.store = nil
}

// copyTo puts the files as they are somewhere else: what a copy of the disk would have. The state comes first: unlike a
// copy of a disk, this one takes time, and a log that is older than the state beside it is refused at once.
func (x *node) copyTo(dir string) {
	x.c.t.Helper()
	for _, part := range []string{"state", "snapshots", identityFile, logFile} {
		from, to := filepath.Join(x.dir, part), filepath.Join(dir, part)
		info, err := os.Stat(from)
		if err == nil && info.IsDir() {
			err = os.CopyFS(to, os.DirFS(from))
		} else if err == nil {
			var b []byte
			if b, err = os.ReadFile(from); err == nil {
				err = os.WriteFile(to, b, 0o600)
			}
		}
		if err != nil {
			x.c.t.Fatal(err)
		}
	}
}

// putBack makes the files what a copy has.
func (x *node) putBack(dir string) {
	x.c.t.Helper()
	files, err := os.ReadDir(x.dir)
	if err != nil {
		x.c.t.Fatal(err)
	}
	for _, f := range files {
		if err := os.RemoveAll(filepath.Join(x.dir, f.Name())); err != nil {
			x.c.t.Fatal(err)
		}
	}
	if dir != "" {
		if err := os.CopyFS(x.dir, os.DirFS(dir)); err != nil {
			x.c.t.Fatal(err)
		}
	}
}

// dial goes through the proxy of the link.
func (x *node) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c := x.c
	c.mu.Lock()
	to := -1
	for n, a := range c.where {
		if a == address {
			to = n
		}
	}
	c.mu.Unlock()
	if to >= 0 && to != x.n {
		p, err := c.link(x.n, to)
		if err != nil {
			return nil, err
		}
		address = p.address()
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

func (c *cluster) link(from, to int) (*proxy, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.links[[2]int{from, to}]
	if p == nil {
		var err error
		if p, err = newProxy(c.where[to]); err != nil {
			return nil, err
		}
		c.links[[2]int{from, to}] = p
	}
	return p, nil
}

// cut stops what goes from one controller to another, whoever opened the connection; heal lets it go on.
func (c *cluster) cut(from, to int)  { c.set(from, to, true) }
func (c *cluster) heal(from, to int) { c.set(from, to, false) }

func (c *cluster) set(from, to int, cut bool) {
	there, err := c.link(from, to)
	if err != nil {
		c.t.Error(err)
		return
	}
	back, err := c.link(to, from)
	if err != nil {
		c.t.Error(err)
		return
	}
	there.out.set(cut)
	back.in.set(cut)
}

// isolate cuts a controller off from all others, both ways; restore ends that.
func (c *cluster) isolate(n int) { c.alone(n, true) }
func (c *cluster) restore(n int) { c.alone(n, false) }

func (c *cluster) alone(n int, cut bool) {
	for _, x := range c.nodes {
		if x.n != n {
			c.set(n, x.n, cut)
			c.set(x.n, n, cut)
		}
	}
}

// until waits for something that must come about; tests are not about how long that takes.
func (c *cluster) until(what string, f func() bool) {
	c.t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, x := range c.nodes {
				if x.store == nil {
					c.t.Logf("%s is down", x.id)
					continue
				}
				id, _ := x.store.Leader()
				c.t.Logf("%s: leader %q, applied %d, failed %v, waits %s, members %v", x.id, id, x.store.m.Applied(), x.store.Failed(), *x.store.why.Load(), x.store.servers())
			}
			c.t.Fatalf("it never came about that %s", what)
		}
	}
}

// settled waits until so many voters agree on a leader, and returns it.
func (c *cluster) settled(voters int) *node {
	c.t.Helper()
	var leader *node
	c.until(fmt.Sprintf("%d voters have a leader", voters), func() bool {
		leader = nil
		for _, x := range c.nodes {
			if x.store == nil || x.store.Failed() != nil {
				continue
			}
			if _, self := x.store.Leader(); !self {
				continue
			}
			if leader != nil {
				return false
			}
			leader = x
		}
		if leader == nil {
			return false
		}
		for _, x := range c.nodes {
			if x.store == nil || x.store.Failed() != nil {
				continue
			}
			if id, _ := x.store.Leader(); x.isMember(leader) && (id != leader.id || x.voters() != voters) {
				return false
			}
		}
		return true
	})
	return leader
}

// voters is how many there are to x's knowledge.
func (x *node) voters() (n int) {
	for _, s := range x.store.servers() {
		if s.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

func (x *node) isMember(leader *node) bool {
	for _, s := range leader.store.servers() {
		if string(s.ID) == string(x.id) {
			return true
		}
	}
	return false
}

func (c *cluster) follower(leader *node) *node {
	for _, x := range c.nodes {
		if x != leader && x.store != nil {
			return x
		}
	}
	c.t.Fatal("there is no follower")
	return nil
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// set makes a change that is easy to see, and quota sees it.
func (x *node) set(ctx context.Context, tenant string, n int64) error {
	_, err := x.store.Propose(ctx, command.SetQuota{Tenant: tenant, Limit: volume.Amounts{Volumes: n}})
	return err
}

func (x *node) mustSet(tenant string, n int64) {
	x.c.t.Helper()
	if err := x.set(within(x.c.t), tenant, n); err != nil {
		x.c.t.Fatalf("%s: %v", x.id, err)
	}
}

func (x *node) quota(ctx context.Context, tenant string) (int64, error) {
	list, err := x.store.Quotas(ctx)
	for _, q := range list {
		if q.Tenant == tenant {
			return q.Limit.Volumes, err
		}
	}
	return 0, err
}

func (x *node) mustSee(tenant string, want int64) {
	x.c.t.Helper()
	got, err := x.quota(within(x.c.t), tenant)
	if err != nil || got != want {
		x.c.t.Errorf("%s sees %d, %v; want %d", x.id, got, err, want)
	}
}

// proxy passes connections on to an address, each direction as long as it is open.
type proxy struct {
	ln      net.Listener
	to      string
	out, in gate
	wg      sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
	done  bool
}

// gate holds up what passes while it is shut.
type gate struct {
	mu   sync.Mutex
	shut chan struct{} // closed when it opens; nil while it is open
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case shut && g.shut == nil:
		g.shut = make(chan struct{})
	case !shut && g.shut != nil:
		close(g.shut)
		g.shut = nil
	}
}

func (g *gate) pass() {
	g.mu.Lock()
	shut := g.shut
	g.mu.Unlock()
	if shut != nil {
		<-shut
	}
}

func newProxy(to string) (*proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{ln: ln, to: to}
	p.wg.Go(p.run)
	return p, nil
}

func (p *proxy) address() string { return p.ln.Addr().String() }

func (p *proxy) run() {
	for {
		a, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() {
			p.out.pass()
			b, err := net.Dial("tcp", p.to)
			if err != nil {
				_ = a.Close()
				return
			}
			p.mu.Lock()
			if p.done {
				_, _ = a.Close(), b.Close()
			}
			p.conns = append(p.conns, a, b)
			p.mu.Unlock()
			p.wg.Go(func() { pass(b, a, &p.out) })
			p.wg.Go(func() { pass(a, b, &p.in) })
		})
	}
}

func pass(to, from net.Conn, g *gate) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			g.pass()
			if _, err := to.Write(b[:n]); err != nil {
				break
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				break
			}
			break
		}
	}
	_ = to.Close()
	_ = from.Close()
}

func (p *proxy) close() {
	_ = p.ln.Close()
	p.out.set(false)
	p.in.set(false)
	p.mu.Lock()
	p.done = true
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}
