package clusterapi

import (
	"context"
	"crypto/tls"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/ballast-csi/ballast/pkg/pki"
)

// Connections are those that are open between a member and others, by who proved to be at the other end. The zero value has none.
type Connections struct {
	mu   sync.Mutex
	open map[*proved]struct{}
}

// Drop ends those of peers that are not to be spoken to any more, with the calls that are under way on them.
func (c *Connections) Drop(gone func(pki.Peer) bool) {
	var end []*proved
	c.mu.Lock()
	for p := range c.open {
		if gone(p.peer) {
			end = append(end, p)
			delete(c.open, p) // what gRPC has not taken over yet it closes below this
		}
	}
	c.mu.Unlock()
	for _, p := range end {
		_ = p.raw.Close() // without a word, which might have to wait; gRPC notices, and closes it as well
	}
}

// proved is a connection after its handshake.
type proved struct {
	net.Conn
	raw  net.Conn // below TLS
	peer pki.Peer
	of   *Connections
}

// Close implements net.Conn.
func (p *proved) Close() error {
	p.of.mu.Lock()
	delete(p.of.open, p)
	p.of.mu.Unlock()
	return p.Conn.Close()
}

// over is TLS whose connections are noted.
func (c *Connections) over(config *tls.Config) credentials.TransportCredentials {
	return noting{credentials.NewTLS(config), c}
}

type noting struct {
	credentials.TransportCredentials
	in *Connections
}

// ClientHandshake implements credentials.TransportCredentials.
func (n noting) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := n.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return n.in.note(raw, conn, info), info, nil
}

// ServerHandshake implements credentials.TransportCredentials.
func (n noting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := n.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return n.in.note(raw, conn, info), info, nil
}

// Clone implements credentials.TransportCredentials.
func (n noting) Clone() credentials.TransportCredentials {
	return noting{n.TransportCredentials.Clone(), n.in}
}

// note adds a connection. One that wants to join has no certificate, and is nobody yet.
func (c *Connections) note(raw, conn net.Conn, info credentials.AuthInfo) net.Conn {
	t, ok := info.(credentials.TLSInfo)
	if !ok {
		return conn
	}
	peer, err := pki.PeerIn(t.State)
	if err != nil {
		return conn
	}
	p := &proved{conn, raw, peer, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = map[*proved]struct{}{}
	}
	c.open[p] = struct{}{}
	return p
}
