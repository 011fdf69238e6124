package jointoken

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const made = volume.Timestamp(1_000_000)

func newToken(t testing.TB) Token {
	t.Helper()
	tok, err := New(rand.Reader, sha256.Sum256([]byte("ca")))
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func record(tok Token, uses int) Record {
	return Record{ID: tok.ID(), Hash: tok.Hash(), Roles: []string{"storage"}, Uses: uses,
		CreatedAt: made, ExpiresAt: made + volume.Timestamp(DefaultLifetime)}
}

func key(name string) string {
	h := sha256.Sum256([]byte(name))
	return hex.EncodeToString(h[:])
}

func TestText(t *testing.T) {
	tok := newToken(t)
	text := tok.Text()
	got, err := Parse(" " + text + "\n")
	if err != nil || got != tok {
		t.Fatalf("%v, %v", got, err)
	}
	for i := range text {
		b := []byte(text)
		if b[i] = 'A'; text[i] == 'A' {
			b[i] = 'B'
		}
		if _, err := Parse(string(b)); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("character %d changed: %v", i, err)
		}
	}
	for _, s := range []string{"", prefix, text[:len(text)-1], text + "A", strings.TrimPrefix(text, prefix)} {
		if _, err := Parse(s); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
	secret := hex.EncodeToString(tok.secret[:])
	for _, s := range []string{fmt.Sprint(tok), fmt.Sprintf("%v %+v %#v %s", tok, tok, tok, tok), tok.Hash(), tok.ID()} {
		if strings.Contains(s, secret[:8]) || strings.Contains(s, text[len(prefix)+12:][:8]) || !strings.Contains(s+tok.ID(), tok.ID()) {
			t.Errorf("the secret is in %q", s)
		}
	}
	if _, err := New(bytes.NewReader(make([]byte, 20)), tok.CA); err == nil {
		t.Error("a token of too little chance")
	}
}

func TestCheck(t *testing.T) {
	tok := newToken(t)
	if err := record(tok, 3).Check(); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*Record)
		want   error
	}{
		"id":           {func(r *Record) { r.ID = "x" }, volume.ErrInvalid},
		"capital id":   {func(r *Record) { r.ID = "ABCDEF0123456789" }, volume.ErrInvalid},
		"hash":         {func(r *Record) { r.Hash = r.Hash[1:] }, volume.ErrInvalid},
		"no roles":     {func(r *Record) { r.Roles = nil }, volume.ErrInvalid},
		"unknown role": {func(r *Record) { r.Roles = []string{"admin"} }, volume.ErrInvalid},
		"a role twice": {func(r *Record) { r.Roles = []string{"storage", "storage"} }, volume.ErrInvalid},
		"no uses":      {func(r *Record) { r.Uses = 0 }, volume.ErrOutOfRange},
		"many uses":    {func(r *Record) { r.Uses = MaxUses + 1 }, volume.ErrOutOfRange},
		"named, twice": {func(r *Record) { r.Node, r.Uses = "n", 2 }, volume.ErrOutOfRange},
		"never valid":  {func(r *Record) { r.ExpiresAt = r.CreatedAt }, volume.ErrOutOfRange},
		"too long":     {func(r *Record) { r.ExpiresAt = r.CreatedAt + volume.Timestamp(MaxLifetime) + 1 }, volume.ErrOutOfRange},
		"long node":    {func(r *Record) { r.Node = volume.NodeID(strings.Repeat("n", 257)) }, volume.ErrInvalid},
		"long maker":   {func(r *Record) { r.CreatedBy = strings.Repeat("n", 129) }, volume.ErrInvalid},
		"used":         {func(r *Record) { r.Redeemed = make([]Redemption, 1) }, volume.ErrInvalid},
	} {
		r := record(tok, 3)
		tt.change(&r)
		if err := r.Check(); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := Claim{Token: tok.ID(), Hash: tok.Hash(), Node: "n1", Key: key("n1")}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Claim){
		"token": func(c *Claim) { c.Token = "" },
		"hash":  func(c *Claim) { c.Hash = "zz" },
		"key":   func(c *Claim) { c.Key = strings.ToUpper(c.Key) },
		"node":  func(c *Claim) { c.Node = "" },
		"long":  func(c *Claim) { c.Node = volume.NodeID(strings.Repeat("n", 257)) },
	} {
		c := good
		change(&c)
		if err := c.Check(); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRedeem(t *testing.T) {
	tok, other := newToken(t), newToken(t)
	type step struct {
		after  int64 // nanoseconds since the record was made
		node   volume.NodeID
		key    string
		member bool
		hash   string // "" is the right one
		want   error
	}
	const hour = 3600 * int64(1e9)
	for name, tt := range map[string]struct {
		uses  int
		node  volume.NodeID
		steps []step
		used  int
	}{
		"once": {1, "", []step{
			{0, "n1", "k1", false, "", nil},
			{1, "n2", "k2", false, "", volume.ErrInUse},
		}, 1},
		"the answer was lost": {1, "", []step{
			{0, "n1", "k1", false, "", nil},
			{1, "n1", "k1", true, "", nil},
			{hour, "n1", "k1", true, "", nil},
			{24 * hour, "n1", "k1", true, "", volume.ErrStale},
		}, 1},
		"a thief with the node's name": {1, "", []step{
			{0, "n1", "k1", false, "", nil},
			{1, "n1", "k2", true, "", volume.ErrInUse},
		}, 1},
		"three nodes": {3, "", []step{
			{0, "n1", "k1", false, "", nil},
			{0, "n2", "k2", false, "", nil},
			{0, "n1", "k3", true, "", volume.ErrExists},
			{0, "n3", "k3", false, "", nil},
			{0, "n4", "k4", false, "", volume.ErrInUse},
		}, 3},
		"expired":                       {1, "", []step{{24 * hour, "n1", "k1", false, "", volume.ErrStale}, {24*hour - 1, "n1", "k1", false, "", nil}}, 1},
		"forged":                        {1, "", []step{{0, "n1", "k1", false, other.Hash(), volume.ErrNotFound}, {0, "n1", "k1", false, "x", volume.ErrNotFound}}, 0},
		"forged and expired look alike": {1, "", []step{{25 * hour, "n1", "k1", false, other.Hash(), volume.ErrNotFound}}, 0},
		"a member must be named":        {1, "", []step{{0, "n1", "k1", true, "", volume.ErrExists}}, 0},
		"a member by name":              {1, "n1", []step{{0, "n2", "k1", false, "", volume.ErrInUse}, {0, "n1", "k1", true, "", nil}, {0, "n1", "k2", true, "", volume.ErrInUse}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := record(tok, tt.uses)
			r.Node = tt.node
			for i, s := range tt.steps {
				c := Claim{Token: tok.ID(), Hash: tok.Hash(), Node: s.node, Key: key(s.key)}
				if s.hash != "" {
					c.Hash = s.hash
				}
				before := r
				before.Redeemed = append([]Redemption(nil), r.Redeemed...)
				got, err := r.Redeem(made+volume.Timestamp(s.after), c, s.member)
				if !errors.Is(err, s.want) {
					t.Fatalf("step %d: %v, want %v", i, err, s.want)
				}
				if err != nil && !reflect.DeepEqual(got, r) || !reflect.DeepEqual(r.Redeemed, before.Redeemed) {
					t.Fatalf("step %d changed the record", i)
				}
				r = got
			}
			if len(r.Redeemed) != tt.used {
				t.Errorf("used %d times", len(r.Redeemed))
			}
			if r.Spent(made+volume.Timestamp(24*hour)-1) || !r.Spent(made+volume.Timestamp(24*hour)) {
				t.Error("it is spent when it has expired, not before")
			}
		})
	}
	if _, err := record(tok, 1).Redeem(made, Claim{Token: other.ID(), Hash: tok.Hash()}, false); !errors.Is(err, volume.ErrNotFound) {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(newToken(f).Text())
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := Parse(s)
		if err == nil && tok.Text() != strings.TrimSpace(s) {
			t.Errorf("%q is taken as %q", s, tok.Text())
		}
	})
}
