package replicanet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// authority certifies the nodes of a test's cluster.
type authority struct{ ca *pki.CA }

var cluster = sync.OnceValues(func() (*authority, error) {
	ca, err := pki.NewCA("test", time.Now())
	return &authority{ca}, err
})

func credentials(t testing.TB, node volume.NodeID) *pki.Credentials {
	t.Helper()
	a, err := cluster()
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.ca.Issue(csr, pki.Node(node, pki.RoleStorage), 0, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.NewCredentials(chain, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// acceptor is an Acceptor made of a function.
type acceptor func(ctx context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error)

func (a acceptor) Open(ctx context.Context, l *Link, v volume.ID, r volume.ReplicaID) (Handler, error) {
	return a(ctx, l, v, r)
}

// serve starts a server of node "server" on loopback.
func serve(t testing.TB, a Acceptor, secure bool, change ...func(*Server)) (*Server, string) {
	t.Helper()
	cfg := ServerConfig{Cluster: "test", Node: "server", Acceptor: a, Log: quiet(), Insecure: !secure}
	if secure {
		cfg.TLS = credentials(t, "server").Server(pki.HasRole(pki.RoleStorage))
	}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(s)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-done); err != nil {
			t.Error(err)
		}
	})
	return s, l.Addr().String()
}

// dial returns a client of node "client".
func dial(t testing.TB, secure bool) *Client {
	t.Helper()
	cfg := ClientConfig{Cluster: "test", Node: "client", Log: quiet(), Insecure: !secure}
	if secure {
		cred := credentials(t, "client")
		cfg.TLS = tlsOf(cred)
	}
	c, err := NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// replica answers as a replica would: data that is written is checked to be of one byte, what is read is of one byte.
type replica struct {
	t    testing.TB
	fill []byte
	// got has a send for each message, unless it is nil.
	got    chan replication.Message
	closed chan error
}

func newReplica(t testing.TB) *replica {
	r := &replica{t: t, fill: make([]byte, replication.MaxData), closed: make(chan error, 100)}
	for i := range r.fill {
		r.fill[i] = 7
	}
	return r
}

func (r *replica) Open(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) {
	return r, nil
}

func (r *replica) Receive(l *Link, m *replication.Message) {
	if r.got != nil {
		r.got <- *m
	}
	answer := replication.Message{Kind: m.Kind, Reply: true, Epoch: m.Epoch, Session: m.Session, Seq: m.Seq, Op: m.Op, Off: m.Off, Len: m.Len}
	if m.Kind == replication.KindRead {
		answer.Data = r.fill[:m.Len]
	}
	l.Send(&answer)
	l.Flush()
}

func (r *replica) Closed(_ *Link, err error) { r.closed <- err }

// engine is a Handler that tells what happens by channels.
type engine struct {
	closed  chan error
	answers chan replication.Message
}

func newEngine() *engine {
	return &engine{make(chan error, 100), make(chan replication.Message, 10000)}
}

func (e *engine) Receive(_ *Link, m *replication.Message) { e.answers <- *m }
func (e *engine) Closed(_ *Link, err error)               { e.closed <- err }

// open dials until it succeeds.
func open(t testing.TB, c *Client, to Target, h Handler) *Link {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		l, err := c.Dial(context.Background(), to, h)
		if err == nil {
			return l
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func target(addr string, v int) Target {
	return Target{Node: "server", Address: addr, Volume: volume.ID(fmt.Sprint("vol-", v)), Replica: volume.ReplicaID(fmt.Sprint("rep-", v))}
}

// within receives from a channel; a test that waits for longer hangs.
func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(time.Minute):
		t.Fatalf("no %s", what)
	}
	panic("unreachable")
}

func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func tlsOf(c *pki.Credentials) func(volume.NodeID) *tls.Config {
	return func(n volume.NodeID) *tls.Config { return c.Client(pki.IsNode(n)) }
}
