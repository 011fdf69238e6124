package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Credentials are one peer's certificate and key, and the CA that it trusts. The TLS configurations made from them use
// what was set last, so a renewed certificate needs no restart. They are safe for concurrent use.
type Credentials struct {
	now func() time.Time
	cur atomic.Pointer[current]
}

type current struct {
	cert  tls.Certificate
	self  Peer
	since time.Time // NotBefore
	ca    *x509.Certificate
	roots *x509.CertPool
}

// NewCredentials takes what CA.Issue answered for a key. now is the clock; nil is time.Now. It returns volume.ErrInvalid
// where the parts do not fit together. An expired certificate is taken: it is the peers who refuse it.
func NewCredentials(chain []byte, key Key, now func() time.Time) (*Credentials, error) {
	if now == nil {
		now = time.Now
	}
	cur, err := newCurrent(chain, key)
	if err != nil {
		return nil, err
	}
	c := &Credentials{now: now}
	c.cur.Store(cur)
	return c, nil
}

func newCurrent(chain []byte, key Key) (*current, error) {
	certs, extra, err := decode(chain)
	if err != nil {
		return nil, err
	}
	if len(certs) != 2 || extra != nil || key.signer == nil {
		return nil, fmt.Errorf("credentials are a certificate, the CA's and a key: %w", volume.ErrInvalid)
	}
	leaf, ca := certs[0], certs[1]
	if !samePublic(leaf.PublicKey, key.signer) {
		return nil, fmt.Errorf("the certificate is for another key: %w", volume.ErrInvalid)
	}
	cluster, err := clusterOf(ca)
	if err != nil {
		return nil, err
	}
	self, err := PeerOf(leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, volume.ErrInvalid)
	}
	if err := leaf.CheckSignatureFrom(ca); err != nil || self.Cluster != cluster {
		return nil, fmt.Errorf("the certificate of %s is not from the CA of cluster %s: %w", self, cluster, volume.ErrInvalid)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return &current{
		cert: tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.Raw}, PrivateKey: key.signer, Leaf: leaf},
		self: self, since: leaf.NotBefore, ca: ca, roots: roots,
	}, nil
}

// Set takes a renewed certificate: of the same holder, from the same CA.
func (c *Credentials) Set(chain []byte, key Key) error {
	cur, err := newCurrent(chain, key)
	if err != nil {
		return err
	}
	if err := c.fits(cur); err != nil {
		return err
	}
	c.cur.Store(cur)
	return nil
}

// fits returns volume.ErrInvalid for what is not of the same holder and CA.
func (c *Credentials) fits(fresh *current) error {
	old := c.cur.Load()
	if pin(fresh.ca) != pin(old.ca) || fresh.self.Kind != old.self.Kind || fresh.self.Name != old.self.Name {
		return fmt.Errorf("a certificate of %s, cluster %s, cannot replace one of %s, cluster %s: %w",
			fresh.self, fresh.self.Cluster, old.self, old.self.Cluster, volume.ErrInvalid)
	}
	return nil
}

// Self is what the certificate says of its holder.
func (c *Credentials) Self() Peer { return c.cur.Load().self }

// Pin is the hash of the CA's public key.
func (c *Credentials) Pin() [sha256.Size]byte { return pin(c.cur.Load().ca) }

// Expired tells whether peers refuse the certificate for its age.
func (c *Credentials) Expired() bool { return c.now().After(c.Self().NotAfter) }

// Server is the configuration of one who is called: callers show a certificate of the cluster that verify admits. A nil
// verify admits all of them.
func (c *Credentials) Server(verify Verify) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &c.cur.Load().cert, nil
		},
		// The chain is verified below, by our clock and the roots of now.
		ClientAuth: tls.RequireAnyClientCert,
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := c.admit(s, x509.ExtKeyUsageClientAuth, verify)
			return err
		},
		// A resumed session would carry the decision of another day.
		SessionTicketsDisabled: true,
	}
}

// ServerWithJoin is Server, but it also admits callers without any certificate: nodes that want to join. What they may
// call is for the server to check: PeerIn finds no peer on their connections.
func (c *Credentials) ServerWithJoin(verify Verify) *tls.Config {
	cfg := c.Server(verify)
	cfg.ClientAuth = tls.RequestClientCert
	withCert := cfg.VerifyConnection
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return nil
		}
		return withCert(s)
	}
	return cfg
}

// Client is the configuration of a caller. Whoever is called shows a certificate of a node of the cluster that verify
// admits; host names are not looked at.
func (c *Credentials) Client(verify Verify) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &c.cur.Load().cert, nil
		},
		// Names are not what the cluster's certificates are about: VerifyConnection does all the verifying.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := c.admit(s, x509.ExtKeyUsageServerAuth, verify)
			return err
		},
	}
}

func (c *Credentials) admit(s tls.ConnectionState, usage x509.ExtKeyUsage, verify Verify) (Peer, error) {
	cur := c.cur.Load()
	p, err := verified(s, cur.roots, usage, c.now())
	if err != nil {
		return Peer{}, err
	}
	if p.Cluster != cur.self.Cluster {
		return Peer{}, fmt.Errorf("%s is of cluster %s, not %s: %w", p, p.Cluster, cur.self.Cluster, ErrRefused)
	}
	if verify != nil {
		if err := verify(p); err != nil {
			return Peer{}, err
		}
	}
	return p, nil
}

// verified checks the chain of a connection's peer and returns whom it names.
func verified(s tls.ConnectionState, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) (Peer, error) {
	if len(s.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("the peer shows no certificate: %w", ErrRefused)
	}
	leaf := s.PeerCertificates[0]
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return Peer{}, fmt.Errorf("the peer's certificate is valid from %s to %s, it is %s (are the clocks right? a node with an "+
			"expired certificate needs a new join token): %w", leaf.NotBefore.UTC(), leaf.NotAfter.UTC(), now.UTC(), ErrRefused)
	case err != nil:
		return Peer{}, fmt.Errorf("the peer's certificate: %w: %w", err, ErrRefused)
	case leaf.IsCA:
		return Peer{}, fmt.Errorf("the peer shows a CA's certificate: %w", ErrRefused)
	}
	return PeerOf(leaf)
}

// PeerIn is who is at the other end of a connection made with one of the configurations of this package. It returns
// ErrRefused where there is no certificate.
func PeerIn(s tls.ConnectionState) (Peer, error) {
	if len(s.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("the peer shows no certificate: %w", ErrRefused)
	}
	return PeerOf(s.PeerCertificates[0])
}

// JoinClient is the configuration of a node that has no certificate yet: whoever is called is a controller of the cluster
// whose CA has this public key hash. now is the clock; nil is time.Now.
func JoinClient(want [sha256.Size]byte, now func() time.Time) *tls.Config {
	if now == nil {
		now = time.Now
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // as in Client
		VerifyConnection: func(s tls.ConnectionState) error {
			for _, c := range s.PeerCertificates[min(1, len(s.PeerCertificates)):] {
				if pin(c) != want {
					continue
				}
				cluster, err := clusterOf(c)
				if err != nil {
					return err
				}
				roots := x509.NewCertPool()
				roots.AddCert(c)
				p, err := verified(s, roots, x509.ExtKeyUsageServerAuth, now())
				if err != nil {
					return err
				}
				if p.Cluster != cluster {
					return fmt.Errorf("%s is of cluster %s, not %s: %w", p, p.Cluster, cluster, ErrRefused)
				}
				return HasRole(RoleController)(p)
			}
			return fmt.Errorf("the peer is not of the cluster that the join token is for: %w", ErrRefused)
		},
	}
}
