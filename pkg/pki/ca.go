package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// CALifetime is how long a cluster's CA is valid: longer than any cluster is meant to live, since a CA is not renewed.
	CALifetime = 30 * 365 * 24 * time.Hour
	// NodeLifetime is how long a node's certificate is valid. It is renewed when a third of it is left, so a node may be
	// away for four months; after that it needs a new join token.
	NodeLifetime = 365 * 24 * time.Hour
	// AdminLifetime is what an admin's certificate gets, unless less is asked for.
	AdminLifetime = 365 * 24 * time.Hour

	// clockSkew is how far a certificate reaches back, for nodes whose clocks are behind.
	clockSkew = 10 * time.Minute

	// maxPEM bounds a file or an answer with certificates and keys, in bytes.
	maxPEM = 64 << 10
	// maxCSR bounds a signing request, in bytes.
	maxCSR = 8 << 10
)

// CA signs for one cluster.
type CA struct {
	cluster string
	cert    *x509.Certificate
	key     crypto.Signer
}

// NewClusterID returns a random cluster id.
func NewClusterID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, crypto/rand
	return hex.EncodeToString(b[:])
}

// NewCA makes the CA of a new cluster.
func NewCA(cluster string, now time.Time) (*CA, error) {
	if err := checkCluster(cluster); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"Ballast"}, CommonName: "Ballast cluster " + cluster},
		URIs:                  []*url.URL{caURI(cluster)},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(CALifetime),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{cluster: cluster, cert: cert, key: key}, nil
}

func caURI(cluster string) *url.URL { return &url.URL{Scheme: scheme, Host: cluster, Path: "/ca"} }

// clusterOf is the id of the cluster that a CA certificate is for.
func clusterOf(c *x509.Certificate) (string, error) {
	if !c.IsCA || len(c.URIs) != 1 {
		return "", fmt.Errorf("%q is no CA of a cluster: %w", c.Subject.CommonName, volume.ErrInvalid)
	}
	cluster := c.URIs[0].Host
	if err := checkCluster(cluster); err != nil {
		return "", err
	}
	if c.URIs[0].String() != caURI(cluster).String() {
		return "", fmt.Errorf("%s names no CA of a cluster: %w", c.URIs[0], volume.ErrInvalid)
	}
	return cluster, nil
}

// serial is 16 random bytes, positive, as RFC 5280 (4.1.2.2) allows.
func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:])
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:])
}

// Cluster is the cluster's id.
func (ca *CA) Cluster() string { return ca.cluster }

// Roots is the CA's certificate, PEM: what verifies every peer.
func (ca *CA) Roots() []byte { return encode("CERTIFICATE", ca.cert.Raw) }

// Pin is the hash of the CA's public key that join tokens carry.
func (ca *CA) Pin() [sha256.Size]byte { return pin(ca.cert) }

func pin(c *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// Marshal is the CA with its secret key, PEM. It goes to a controller's disk, and to a new controller that has proved
// itself; nowhere else.
func (ca *CA) Marshal() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		return nil, err
	}
	return append(ca.Roots(), encode("PRIVATE KEY", der)...), nil
}

// ParseCA is the reverse of Marshal. It returns volume.ErrInvalid for anything else.
func ParseCA(data []byte) (*CA, error) {
	certs, key, err := decode(data)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 || key == nil || !samePublic(certs[0].PublicKey, key) {
		return nil, fmt.Errorf("a CA is one certificate and its key: %w", volume.ErrInvalid)
	}
	cluster, err := clusterOf(certs[0])
	if err != nil {
		return nil, err
	}
	return &CA{cluster: cluster, cert: certs[0], key: key}, nil
}

// Issue certifies the public key of a signing request (PKCS #10, DER) for an identity; of the request only the key is
// read. lifetime 0 is the usual one. The answer is the certificate and the CA's, PEM. It returns volume.ErrInvalid for a
// request that cannot be granted.
func (ca *CA) Issue(csr []byte, id Identity, lifetime time.Duration, now time.Time) ([]byte, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	public, err := KeyOf(csr)
	if err != nil {
		return nil, err
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	most := AdminLifetime
	if id.Kind == KindNode {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
		most = NodeLifetime
	}
	if lifetime == 0 {
		lifetime = most
	}
	if lifetime < 0 || lifetime > most {
		return nil, fmt.Errorf("certificates live up to %s, not %s: %w", most, lifetime, volume.ErrInvalid)
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"Ballast"}, OrganizationalUnit: []string{string(id.Kind)}},
		URIs:                  []*url.URL{id.uri(ca.cluster)},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key)
	if err != nil {
		return nil, err
	}
	return append(encode("CERTIFICATE", der), ca.Roots()...), nil
}

// Key is the secret half of a certificate.
type Key struct{ signer crypto.Signer }

// NewKey makes a key.
func NewKey() (Key, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return Key{k}, err
}

// ParseKey reads what Marshal made. It returns volume.ErrInvalid for anything else.
func ParseKey(data []byte) (Key, error) {
	certs, key, err := decode(data)
	if err != nil {
		return Key{}, err
	}
	if key == nil || len(certs) > 0 {
		return Key{}, fmt.Errorf("this is not one key: %w", volume.ErrInvalid)
	}
	return Key{key}, nil
}

// Marshal is the key, PEM.
func (k Key) Marshal() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.signer)
	if err != nil {
		return nil, err
	}
	return encode("PRIVATE KEY", der), nil
}

// Request is a signing request for the key, DER.
func (k Key) Request() ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.signer)
}

// KeyOf returns the public key of a signing request that proves to have the secret one. It returns volume.ErrInvalid for
// one that does not, or whose key is of a kind that Ballast does not make.
func KeyOf(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, fmt.Errorf("a signing request of %d bytes: %w", len(csr), volume.ErrInvalid)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("signing request: %w: %w", err, volume.ErrInvalid)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing request: %w: %w", err, volume.ErrInvalid)
	}
	switch k := req.PublicKey.(type) {
	case ed25519.PublicKey:
		return k, nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return k, nil
		}
	}
	return nil, fmt.Errorf("keys are P-256 or Ed25519: %w", volume.ErrInvalid)
}

// KeyHash is the SHA-256 of the public key in a signing request: the same key has the same hash however often it asks.
func KeyHash(csr []byte) ([sha256.Size]byte, error) {
	public, err := KeyOf(csr)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	return sha256.Sum256(der), err
}

func samePublic(public crypto.PublicKey, key crypto.Signer) bool {
	p, ok := public.(interface{ Equal(crypto.PublicKey) bool })
	return ok && p.Equal(key.Public())
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// decode reads certificates and at most one key. It takes nothing else.
func decode(data []byte) (certs []*x509.Certificate, key crypto.Signer, err error) {
	if len(data) > maxPEM {
		return nil, nil, fmt.Errorf("PEM of %d bytes: %w", len(data), volume.ErrInvalid)
	}
	for {
		var b *pem.Block
		b, data = pem.Decode(data)
		switch {
		case b == nil && len(bytes.TrimSpace(data)) > 0:
			return nil, nil, fmt.Errorf("this is not PEM: %w", volume.ErrInvalid)
		case b == nil:
			return certs, key, nil
		case b.Type == "CERTIFICATE":
			c, err := x509.ParseCertificate(b.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("certificate: %w: %w", err, volume.ErrInvalid)
			}
			certs = append(certs, c)
		case b.Type == "PRIVATE KEY" && key == nil:
			k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
			if err != nil {
				return nil, nil, errors.Join(errors.New("private key cannot be read"), volume.ErrInvalid)
			}
			s, ok := k.(crypto.Signer)
			if !ok {
				return nil, nil, fmt.Errorf("a key that cannot sign: %w", volume.ErrInvalid)
			}
			key = s
		default:
			return nil, nil, fmt.Errorf("PEM block %q: %w", b.Type, volume.ErrInvalid)
		}
	}
}
