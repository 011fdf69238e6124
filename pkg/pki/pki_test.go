package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

var epoch = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

func at(t time.Time) func() time.Time { return func() time.Time { return t } }

func newCA(t testing.TB, cluster string) *CA {
	t.Helper()
	ca, err := NewCA(cluster, epoch)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func request(t testing.TB) ([]byte, Key) {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	return csr, key
}

func issue(t testing.TB, ca *CA, id Identity, life time.Duration, now func() time.Time) *Credentials {
	t.Helper()
	csr, key := request(t)
	chain, err := ca.Issue(csr, id, life, epoch)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCredentials(chain, key, now)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// shake runs a handshake and returns what each side says of it, and whom the server saw. In TLS 1.3 a client learns that
// it was refused when it reads.
func shake(client, server *tls.Config) (seen tls.ConnectionState, clientErr, serverErr error) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	s := tls.Server(b, server)
	go func() {
		defer close(done)
		if serverErr = s.Handshake(); serverErr == nil {
			_, serverErr = s.Write([]byte{1})
		}
		b.Close()
	}()
	c := tls.Client(a, client)
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	a.Close()
	<-done
	return s.ConnectionState(), clientErr, serverErr
}

func TestHandshake(t *testing.T) {
	ca, other := newCA(t, "c1"), newCA(t, "c2")
	twin := newCA(t, "c1") // the same name, another key
	now := at(epoch.Add(time.Hour))
	n1 := issue(t, ca, Node("n1", RoleStorage), 0, now)
	n2 := issue(t, ca, Node("n2", RoleController, RoleStorage), 0, now)
	strange := issue(t, ca, Node("a/b?role=controller&#%é", RoleStorage), 0, now)
	viewer := issue(t, ca, Admin("eve", RoleViewer), 0, now)
	brief := issue(t, ca, Node("n3", RoleStorage), time.Minute, now)
	early := issue(t, ca, Node("n4", RoleStorage), 0, now)
	removed := func(p Peer) error {
		if p.Name == "n1" {
			return fmt.Errorf("%s was removed: %w", p, ErrRefused)
		}
		return nil
	}

	late := func(c *Credentials) *Credentials { // the same certificate, seen by another clock
		l := &Credentials{now: at(epoch.Add(NodeLifetime + time.Hour))}
		l.cur.Store(c.cur.Load())
		return l
	}
	slow := func(c *Credentials) *Credentials {
		l := &Credentials{now: at(epoch.Add(-time.Hour))}
		l.cur.Store(c.cur.Load())
		return l
	}
	legacy := n1.Client(nil)
	legacy.MinVersion, legacy.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	bare := n1.Client(nil)
	bare.GetClientCertificate = nil

	for _, tt := range []struct {
		name           string
		client, server *tls.Config
		want           string // "" is admitted, else who refuses
		text           string
	}{
		{"nodes of one cluster", n1.Client(IsNode("n2")), n2.Server(IsNode("n1")), "", ""},
		{"any name", strange.Client(nil), n2.Server(IsNode("a/b?role=controller&#%é")), "", ""},
		{"an admin calls", viewer.Client(HasRole(RoleController)), n2.Server(nil), "", ""},
		{"another cluster's caller", issue(t, other, Node("n1", RoleStorage), 0, now).Client(nil), n2.Server(nil), "both", "certificate"},
		{"another cluster is called", n1.Client(nil), issue(t, other, Node("n2", RoleStorage), 0, now).Server(nil), "client", "unknown authority"},
		{"a forged caller", forge(t, twin, n2, "n1", now).Client(nil), n2.Server(nil), "server", "certificate"},
		{"a forged server", n1.Client(nil), forge(t, twin, n1, "n2", now).Server(nil), "client", "certificate"},
		{"wrong node called", n1.Client(IsNode("n3")), n2.Server(nil), "client", `not node "n3"`},
		{"wrong node calls", n1.Client(nil), n2.Server(IsNode("n3")), "server", `not node "n3"`},
		{"wrong role called", n2.Client(HasRole(RoleController)), n1.Server(nil), "client", "role controller"},
		{"wrong role calls", n1.Client(nil), n2.Server(HasRole(RoleController)), "server", "role controller"},
		{"an admin is no node", viewer.Client(nil), n2.Server(HasRole(RoleStorage)), "server", "role storage"},
		{"an admin cannot be called", n1.Client(nil), viewer.Server(nil), "client", "usage"},
		{"expired caller", brief.Client(nil), n2.Server(nil), "server", "join token"},
		{"expired server", n1.Client(nil), brief.Server(nil), "client", "join token"},
		{"not yet valid", early.Client(nil), slow(n2).Server(nil), "server", "valid from"},
		{"a year later", late(n1).Client(nil), late(n2).Server(nil), "both", "valid from"},
		{"removed", n1.Client(nil), n2.Server(All(nil, HasRole(RoleStorage), removed)), "server", "removed"},
		{"not removed", n2.Client(nil), n2.Server(All(HasRole(RoleStorage), removed)), "", ""},
		{"without certificate", bare, n2.Server(nil), "server", "certificate"},
		{"TLS 1.2", legacy, n2.Server(nil), "both", "protocol version"},
		{"join", JoinClient(ca.Pin(), now), n2.ServerWithJoin(nil), "", ""},
		{"join: members are checked as ever", n1.Client(nil), n2.ServerWithJoin(removed), "server", "removed"},
		{"join: a member", n2.Client(nil), n2.ServerWithJoin(removed), "", ""},
		{"join: where one cannot", JoinClient(ca.Pin(), now), n2.Server(nil), "server", "certificate"},
		{"join: another cluster", JoinClient(other.Pin(), now), n2.ServerWithJoin(nil), "client", "join token"},
		{"join: no controller", JoinClient(ca.Pin(), now), n1.ServerWithJoin(nil), "client", "role controller"},
		{"join: an expired controller", JoinClient(ca.Pin(), at(epoch.Add(2*NodeLifetime))), n2.ServerWithJoin(nil), "client", "valid from"},
		{"join: the CA shown, its key not had", JoinClient(ca.Pin(), now), forge(t, twin, n1, "n2", now).ServerWithJoin(nil), "client", "certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seen, clientErr, serverErr := shake(tt.client, tt.server)
			if tt.want == "" {
				if clientErr != nil || serverErr != nil {
					t.Fatalf("client: %v, server: %v", clientErr, serverErr)
				}
				if p, err := PeerIn(seen); strings.HasPrefix(tt.name, "join: a member") && (err != nil || p.Name != "n2") {
					t.Errorf("the server sees %v, %v", p, err)
				}
				if _, err := PeerIn(seen); tt.name == "join" && !errors.Is(err, ErrRefused) {
					t.Errorf("a peer without certificate: %v", err)
				}
				return
			}
			err := clientErr
			if tt.want == "server" {
				err = serverErr
			}
			if clientErr == nil || serverErr == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("client: %v, server: %v; want %q from %s", clientErr, serverErr, tt.text, tt.want)
			}
		})
	}
}

// forge returns credentials that a stranger made with a CA of his own, shown under the CA certificate of the victim.
func forge(t *testing.T, twin *CA, victim *Credentials, name volume.NodeID, now func() time.Time) *Credentials {
	c := issue(t, twin, Node(name, RoleController, RoleStorage), 0, now)
	cur := *c.cur.Load()
	cur.cert.Certificate = [][]byte{cur.cert.Certificate[0], victim.cur.Load().ca.Raw}
	cur.roots = victim.cur.Load().roots
	c.cur.Store(&cur)
	return c
}

// TestRenewedInPlace: configurations made before a renewal use the new certificate.
func TestRenewedInPlace(t *testing.T) {
	ca := newCA(t, "c1")
	now := epoch.Add(time.Hour)
	clock := func() time.Time { return now }
	n1, n2 := issue(t, ca, Node("n1", RoleStorage), 0, clock), issue(t, ca, Node("n2", RoleController), 0, clock)
	client, server := n1.Client(nil), n2.Server(nil)

	now = epoch.Add(NodeLifetime + time.Hour)
	if !n1.Expired() {
		t.Error("an expired certificate is not expired")
	}
	if _, a, b := shake(client, server); a == nil || b == nil {
		t.Fatalf("expired certificates: %v, %v", a, b)
	}
	for _, c := range []*Credentials{n1, n2} {
		csr, key := request(t)
		chain, err := ca.Issue(csr, c.Self().Identity, 0, now)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Set(chain, key); err != nil {
			t.Fatal(err)
		}
	}
	if _, a, b := shake(client, server); a != nil || b != nil {
		t.Errorf("renewed certificates: %v, %v", a, b)
	}
	csr, key := request(t)
	for _, wrong := range []struct {
		ca *CA
		id Identity
	}{{ca, Node("n3", RoleStorage)}, {ca, Admin("n1", RoleAdmin)}, {newCA(t, "c1"), Node("n1", RoleStorage)}} {
		chain, err := wrong.ca.Issue(csr, wrong.id, 0, now)
		if err != nil {
			t.Fatal(err)
		}
		if err := n1.Set(chain, key); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s replaces n1: %v", wrong.id, err)
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	ca := newCA(t, "c1")
	good, _ := request(t)
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	big, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := Key{big}.Request()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		csr  []byte
		id   Identity
		life time.Duration
	}{
		"no kind":               {good, Identity{Name: "n"}, 0},
		"no name":               {good, Node("", RoleStorage), 0},
		"long name":             {good, Node(volume.NodeID(strings.Repeat("n", volume.MaxNodeIDLen+1)), RoleStorage), 0},
		"no role":               {good, Node("n"), 0},
		"an admin's role":       {good, Node("n", RoleAdmin), 0},
		"a role twice":          {good, Node("n", RoleStorage, RoleStorage), 0},
		"a node's role":         {good, Admin("a", RoleStorage), 0},
		"two roles":             {good, Identity{Kind: KindAdmin, Name: "a", Roles: []Role{RoleViewer, RoleAdmin}}, 0},
		"an admin's generation": {good, Identity{Kind: KindAdmin, Name: "a", Roles: []Role{RoleViewer}, Generation: 1}, 0},
		"too long a life":       {good, Node("n", RoleStorage), NodeLifetime + 1},
		"a negative life":       {good, Node("n", RoleStorage), -1},
		"no request":            {nil, Node("n", RoleStorage), 0},
		"a long request":        {make([]byte, maxCSR+1), Node("n", RoleStorage), 0},
		"a forged request":      {forged, Node("n", RoleStorage), 0},
		"a key of no choice":    {p384, Node("n", RoleStorage), 0},
	} {
		if _, err := ca.Issue(tt.csr, tt.id, tt.life, epoch); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := Key{ed}.Request()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Issue(csr, Node("n", RoleStorage), 0, epoch); err != nil {
		t.Errorf("Ed25519: %v", err)
	}
	for _, cluster := range []string{"", "A", "a.b", "-a", "a-", strings.Repeat("a", 64)} {
		if _, err := NewCA(cluster, epoch); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("cluster id %q: %v", cluster, err)
		}
	}
	if _, err := NewCA(NewClusterID(), epoch); err != nil {
		t.Error(err)
	}
}

func TestGenerationIsCertified(t *testing.T) {
	ca := newCA(t, "c1")
	for _, generation := range []uint64{0, 1, 1<<64 - 1} {
		csr, key := request(t)
		id := Node("n/1", RoleStorage, RoleController)
		id.Generation = generation
		chain, err := ca.Issue(csr, id, 0, epoch)
		if err != nil {
			t.Fatal(err)
		}
		c, err := NewCredentials(chain, key, nil)
		if err != nil || c.Self().Generation != generation {
			t.Errorf("generation %d is certified as %+v, %v", generation, c.Self(), err)
		}
	}
	for _, g := range []string{"0", "01", "-1", "x", "18446744073709551616", "1&generation=2"} {
		u, err := url.Parse("ballast://c1/node/n1?generation=" + g + "&role=storage")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := parseURI(u); !errors.Is(err, ErrRefused) {
			t.Errorf("generation %s is taken: %v", g, err)
		}
	}
}

func TestRoles(t *testing.T) {
	for _, tt := range []struct {
		id   Identity
		role Role
		want bool
	}{
		{Admin("a", RoleAdmin), RoleViewer, true},
		{Admin("a", RoleAdmin), RoleAdmin, true},
		{Admin("a", RoleOperator), RoleAdmin, false},
		{Admin("a", RoleOperator), RoleViewer, true},
		{Admin("a", RoleViewer), RoleOperator, false},
		{Admin("a", RoleAdmin), RoleStorage, false},
		{Node("n", RoleStorage), RoleStorage, true},
		{Node("n", RoleStorage), RoleController, false},
		{Node("n", RoleStorage, RoleController), RoleViewer, false},
	} {
		if got := tt.id.Has(tt.role); got != tt.want {
			t.Errorf("%s has %s: %v", tt.id, tt.role, got)
		}
	}
}

func TestSameKeySameHash(t *testing.T) {
	a, key := request(t)
	b, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	other, _ := request(t)
	ha, errA := KeyHash(a)
	hb, errB := KeyHash(b)
	ho, errO := KeyHash(other)
	if errors.Join(errA, errB, errO) != nil || ha != hb || ha == ho {
		t.Errorf("%x %x %x, %v %v %v", ha, hb, ho, errA, errB, errO)
	}
	if _, err := KeyHash(nil); !errors.Is(err, volume.ErrInvalid) {
		t.Error(err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "ca.pem")
	if _, err := LoadCA(file); !errors.Is(err, volume.ErrNotFound) {
		t.Fatal(err)
	}
	ca := newCA(t, "c1")
	if err := SaveCA(file, ca); err != nil {
		t.Fatal(err)
	}
	got, err := LoadCA(file)
	if err != nil || got.Pin() != ca.Pin() || got.Cluster() != "c1" {
		t.Fatalf("%v, %v", got, err)
	}

	join := filepath.Join(dir, "join.pem")
	key, err := JoinKey(join)
	if err != nil {
		t.Fatal(err)
	}
	again, err := JoinKey(join)
	if err != nil || !samePublic(key.signer.Public(), again.signer) {
		t.Fatalf("the key changed: %v", err)
	}
	csr, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := got.Issue(csr, Node("n1", RoleStorage), 0, epoch)
	if err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "node.pem")
	if _, err := Load(node, nil); !errors.Is(err, volume.ErrNotFound) {
		t.Fatal(err)
	}
	_, wrong := request(t)
	if err := Save(node, chain, wrong); !errors.Is(err, volume.ErrInvalid) {
		t.Fatalf("a certificate is kept with another's key: %v", err)
	}
	if err := Save(node, chain, key); err != nil {
		t.Fatal(err)
	}
	c, err := Load(node, at(epoch))
	if err != nil || c.Self().Name != "n1" || c.Pin() != ca.Pin() {
		t.Fatal(err)
	}
	for _, f := range []string{file, join, node} {
		info, err := os.Stat(f)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}

	if err := os.Chmod(node, 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(node, nil); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("a key that all can read: %v", err)
	}
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("hello"), "cut": chain[:len(chain)-40], "roots": ca.Roots(), "long": make([]byte, maxPEM+1),
		"a foreign block": []byte("-----BEGIN X-----\nAAAA\n-----END X-----\n"),
	} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadCA(file); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s as a CA: %v", name, err)
		}
		if _, err := Load(file, nil); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s as credentials: %v", name, err)
		}
		if _, err := JoinKey(file); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s as a key: %v", name, err)
		}
	}
	if _, err := JoinKey(filepath.Join(dir, "absent", "key")); err == nil {
		t.Error("a key was kept in a directory that is not there")
	}
}

// TestNoSecretInErrors: what cannot be read is not shown either.
func TestNoSecretInErrors(t *testing.T) {
	_, key := request(t)
	data, err := key.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data = bytes.Replace(data, []byte("PRIVATE KEY"), []byte("CERTIFICATE"), 2)
	_, _, err = decode(data)
	if err == nil || strings.Contains(err.Error(), string(data[40:60])) {
		t.Error(err)
	}
}

func FuzzParseURI(f *testing.F) {
	for _, id := range []Identity{Node("n1", RoleStorage), {Kind: KindNode, Name: "n1", Roles: []Role{RoleStorage}, Generation: 7}, Node("a/b", RoleController, RoleStorage), Admin("x y", RoleViewer)} {
		f.Add(id.uri("c1").String())
	}
	f.Add("ballast://c1/node/n1?role=storage&x=1")
	f.Add("ballast://c1/node/n1?generation=0&role=storage")
	f.Add("ballast://c1/node/n1?generation=18446744073709551616&role=storage")
	f.Add("ballast://u@c1/node/%6e1?role=storage")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		cluster, id, err := parseURI(u)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		if id.Check() != nil || checkCluster(cluster) != nil || id.uri(cluster).String() != u.String() {
			t.Fatalf("%q is taken as %s of %q", s, id, cluster)
		}
	})
}

func FuzzDecode(f *testing.F) {
	ca := newCA(f, "c1")
	data, err := ca.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	csr, key := request(f)
	chain, err := ca.Issue(csr, Node("n", RoleStorage), 0, epoch)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(chain)
	f.Fuzz(func(_ *testing.T, data []byte) {
		ParseCA(data)
		NewCredentials(data, key, nil)
		KeyOf(data)
	})
}
