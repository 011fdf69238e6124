package main

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/clusterapi"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// A machine that joins under a name has a generation of its own, also when it asks again and with each renewal.
func TestGenerationsOfAName(t *testing.T) {
	store, err := meta.Open("", meta.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	ca, err := pki.NewCA("c1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a := admission{Service: control.New(store, nil, control.Options{}), ca: ca}
	ctx := t.Context()
	token := func(node volume.NodeID) jointoken.Token {
		t.Helper()
		x, err := jointoken.New(rand.Reader, ca.Pin())
		if err != nil {
			t.Fatal(err)
		}
		now := volume.Timestamp(time.Now().UnixNano())
		err = a.CreateJoinToken(ctx, jointoken.Record{
			ID: x.ID(), Hash: x.Hash(), Roles: []string{"storage"}, Node: node, Uses: 1, CreatedAt: now, ExpiresAt: now + volume.Timestamp(time.Hour),
		})
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	newKey := func() (pki.Key, []byte, [sha256.Size]byte) {
		t.Helper()
		key, err := pki.NewKey()
		csr, requestErr := key.Request()
		hash, hashErr := pki.KeyHash(csr)
		if err := errors.Join(err, requestErr, hashErr); err != nil {
			t.Fatal(err)
		}
		return key, csr, hash
	}
	generation := func(chain []byte, key pki.Key, err error) uint64 {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.NewCredentials(chain, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Self().Generation
	}
	join := func(x jointoken.Token) (again func() uint64) {
		t.Helper()
		key, csr, hash := newKey()
		return func() uint64 {
			t.Helper()
			r, err := a.Join(ctx, clusterapi.Join{Claim: jointoken.Claim{Token: x.ID(), Hash: x.Hash(), Node: "n1", Key: fmt.Sprintf("%x", hash)}, CSR: csr})
			return generation(r.Chain, key, err)
		}
	}
	first := join(token(""))
	if g := first(); g != 1 {
		t.Errorf("the first is of generation %d", g)
	}
	if err := a.RegisterNode(ctx, volume.Node{ID: "n1", Roles: []volume.NodeRole{volume.RoleStorage}}); err != nil {
		t.Fatal(err)
	}
	second := join(token("n1"))
	for range 2 { // its answer was lost
		if g := second(); g != 2 {
			t.Errorf("the second is of generation %d", g)
		}
	}
	if g := first(); g != 1 {
		t.Errorf("the first is of generation %d now", g)
	}
	for _, had := range []uint64{1, 2} {
		key, csr, _ := newKey()
		chain, err := a.Renew(ctx, "n1", had, csr)
		if g := generation(chain, key, err); g != had {
			t.Errorf("generation %d is renewed as %d", had, g)
		}
	}
	if g, err := a.Generations(ctx); err != nil || len(g) != 1 || g["n1"] != 2 {
		t.Errorf("%v, %v", g, err)
	}
}
