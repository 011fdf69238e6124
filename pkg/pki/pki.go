// Package pki is the cluster's own certificate authority and the TLS that everything between nodes runs on. A certificate
// names a node or an admin in a URI, and its roles; peers are verified by that and by the cluster's CA, never by host name.
// TLS 1.3 only.
//
// A node proves itself with a join token (package jointoken) once, then with its certificate, which it renews by itself. A
// node that was removed, or a certificate that was withdrawn, is refused by the Verify hook of whoever is called.
package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// ErrRefused is wrapped by every error about a peer that is not who it must be.
var ErrRefused = errors.New("peer refused")

// Kind is what a certificate names.
type Kind string

// Kinds.
const (
	KindNode  Kind = "node"
	KindAdmin Kind = "admin"
)

// Role is what a peer may do. Nodes and admins have roles of their own.
type Role string

// Roles. Each role of admins covers the ones before it.
const (
	RoleController Role = "controller"
	RoleStorage    Role = "storage"

	RoleViewer   Role = "viewer"
	RoleOperator Role = "operator"
	RoleAdmin    Role = "admin"
)

var (
	nodeRoles  = []Role{RoleController, RoleStorage}
	adminRoles = []Role{RoleViewer, RoleOperator, RoleAdmin}
)

// Identity is what a certificate says of its holder.
type Identity struct {
	Kind Kind
	// Name is the node's id, or the admin's name.
	Name string
	// Roles of a node: one or both; of an admin: one.
	Roles []Role
	// Generation of a node counts the joins under its name: a machine that joins under the name of another takes its place, and
	// the other's certificate is refused from then on. That of the founder of a cluster, and an admin's, is 0.
	Generation uint64
}

// Node is the identity of a node.
func Node(id volume.NodeID, roles ...Role) Identity {
	return Identity{Kind: KindNode, Name: string(id), Roles: roles}
}

// Admin is the identity of an admin.
func Admin(name string, role Role) Identity {
	return Identity{Kind: KindAdmin, Name: name, Roles: []Role{role}}
}

// Check returns volume.ErrInvalid where an identity cannot be certified.
func (i Identity) Check() error {
	var most int
	var known []Role
	var limit int
	switch i.Kind {
	case KindNode:
		known, most, limit = nodeRoles, len(nodeRoles), volume.MaxNodeIDLen
	case KindAdmin:
		known, most, limit = adminRoles, 1, volume.MaxNameLen
	default:
		return fmt.Errorf("identity of kind %q: %w", i.Kind, volume.ErrInvalid)
	}
	if i.Name == "" || len(i.Name) > limit {
		return fmt.Errorf("the name of a %s has 1 to %d bytes, not %d: %w", i.Kind, limit, len(i.Name), volume.ErrInvalid)
	}
	if len(i.Roles) == 0 || len(i.Roles) > most {
		return fmt.Errorf("%s %q has %d roles: %w", i.Kind, i.Name, len(i.Roles), volume.ErrInvalid)
	}
	if i.Kind != KindNode && i.Generation != 0 {
		return fmt.Errorf("%s %q has no generation: %w", i.Kind, i.Name, volume.ErrInvalid)
	}
	for n, r := range i.Roles {
		if !slices.Contains(known, r) || slices.Contains(i.Roles[:n], r) {
			return fmt.Errorf("%s %q cannot have role %q: %w", i.Kind, i.Name, r, volume.ErrInvalid)
		}
	}
	return nil
}

// Has tells whether an identity has a role or, of an admin, one that covers it.
func (i Identity) Has(r Role) bool {
	if slices.Contains(i.Roles, r) {
		return true
	}
	want := slices.Index(adminRoles, r)
	return i.Kind == KindAdmin && want >= 0 && slices.ContainsFunc(i.Roles, func(have Role) bool {
		return slices.Index(adminRoles, have) >= want
	})
}

// String is for people and logs.
func (i Identity) String() string {
	roles := make([]string, len(i.Roles))
	for n, r := range i.Roles {
		roles[n] = string(r)
	}
	return fmt.Sprintf("%s %q (%s)", i.Kind, i.Name, strings.Join(roles, ", "))
}

const scheme = "ballast"

// uri is the certified form: ballast://CLUSTER/KIND/NAME?generation=...&role=...&role=...
func (i Identity) uri(cluster string) *url.URL {
	q := url.Values{}
	for _, r := range i.Roles {
		q.Add("role", string(r))
	}
	if i.Generation > 0 {
		q.Set("generation", strconv.FormatUint(i.Generation, 10))
	}
	return &url.URL{
		Scheme: scheme, Host: cluster, RawQuery: q.Encode(),
		Path:    "/" + string(i.Kind) + "/" + i.Name,
		RawPath: "/" + string(i.Kind) + "/" + url.PathEscape(i.Name),
	}
}

// parseURI is the reverse of uri; it takes nothing that uri would not have made.
func parseURI(u *url.URL) (cluster string, i Identity, err error) {
	kind, name, ok := strings.Cut(strings.TrimPrefix(u.EscapedPath(), "/"), "/")
	if u.Scheme != scheme || !ok {
		return "", Identity{}, fmt.Errorf("%s names neither a node nor an admin: %w", u, ErrRefused)
	}
	i.Kind = Kind(kind)
	if i.Name, err = url.PathUnescape(name); err != nil {
		return "", Identity{}, fmt.Errorf("%s: %w", u, ErrRefused)
	}
	if g := u.Query().Get("generation"); g != "" {
		if i.Generation, err = strconv.ParseUint(g, 10, 64); err != nil {
			return "", Identity{}, fmt.Errorf("%s: %w", u, ErrRefused)
		}
	}
	for _, r := range u.Query()["role"] {
		i.Roles = append(i.Roles, Role(r))
	}
	if err := errors.Join(checkCluster(u.Host), i.Check()); err != nil {
		return "", Identity{}, fmt.Errorf("%s: %w: %w", u, err, ErrRefused)
	}
	if i.uri(u.Host).String() != u.String() {
		return "", Identity{}, fmt.Errorf("%s is not in its canonical form: %w", u, ErrRefused)
	}
	return u.Host, i, nil
}

// Peer is who is at the other end of a connection.
type Peer struct {
	Identity
	// Cluster is the id of the cluster whose CA certified it.
	Cluster string
	// Serial is the certificate's, in hex.
	Serial string
	// NotAfter is when the certificate expires.
	NotAfter time.Time
}

// Verify decides on a peer whose certificate is valid; the handshake fails with its error. It is called on every new
// connection, so it must be quick.
type Verify func(Peer) error

// HasRole admits the nodes that have a role.
func HasRole(r Role) Verify {
	return func(p Peer) error {
		if p.Kind != KindNode || !p.Has(r) {
			return fmt.Errorf("%s is not a node with role %s: %w", p, r, ErrRefused)
		}
		return nil
	}
}

// IsNode admits one node only.
func IsNode(id volume.NodeID) Verify {
	return func(p Peer) error {
		if p.Kind != KindNode || p.Name != string(id) {
			return fmt.Errorf("%s is not node %q: %w", p, id, ErrRefused)
		}
		return nil
	}
}

// All admits whom each of its parts admits. Nil parts are passed over.
func All(parts ...Verify) Verify {
	return func(p Peer) error {
		for _, v := range parts {
			if v == nil {
				continue
			}
			if err := v(p); err != nil {
				return err
			}
		}
		return nil
	}
}

// PeerOf reads who a certificate names. It does not verify the certificate.
func PeerOf(c *x509.Certificate) (Peer, error) {
	if len(c.URIs) != 1 {
		return Peer{}, fmt.Errorf("a certificate with %d URIs: %w", len(c.URIs), ErrRefused)
	}
	cluster, id, err := parseURI(c.URIs[0])
	if err != nil {
		return Peer{}, err
	}
	return Peer{Identity: id, Cluster: cluster, Serial: c.SerialNumber.Text(16), NotAfter: c.NotAfter}, nil
}

// checkCluster wants what may stand as a host in a URI: 1 to 63 of a-z, 0-9 and inner hyphens.
func checkCluster(id string) error {
	ok := len(id) >= 1 && len(id) <= 63 && id[0] != '-' && id[len(id)-1] != '-'
	for _, r := range []byte(id) {
		ok = ok && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
	}
	if !ok {
		return fmt.Errorf("cluster id %q: %w", id, volume.ErrInvalid)
	}
	return nil
}
