package pki

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestRenewer lives through three years in which controllers are away at times.
func TestRenewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, err := NewCA("c1", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		key, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := key.Request()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := ca.Issue(csr, Node("n1", RoleStorage), 0, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		c, err := NewCredentials(chain, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		var asked, saved int
		var wrong bool
		r := OpenRenewer(Renewal{
			Credentials: c,
			Issue: func(_ context.Context, csr []byte) ([]byte, error) {
				asked++
				if asked%4 != 0 {
					return nil, errors.New("no controller answers")
				}
				id := Node("n1", RoleStorage)
				if wrong = asked%8 == 0; wrong {
					id = Node("n2", RoleStorage)
				}
				return ca.Issue(csr, id, 0, time.Now())
			},
			Save: func(chain []byte, key Key) error {
				if wrong {
					t.Error("another node's certificate is saved")
				}
				saved++
				return nil
			},
			Log: slog.New(slog.DiscardHandler),
		})
		serials := map[string]bool{}
		for range 3 * 365 {
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			if left := time.Until(c.Self().NotAfter); left < NodeLifetime/4 {
				t.Fatalf("%s left", left)
			}
			serials[c.Self().Serial] = true
		}
		r.Close()
		if saved < 4 || saved > 6 || len(serials) != saved+1 {
			t.Errorf("asked %d times, saved %d, %d certificates", asked, saved, len(serials))
		}
		before := asked
		time.Sleep(NodeLifetime)
		if asked != before {
			t.Error("it goes on after Close")
		}
	})
}

// TestRenewerOfUselessCertificates: a certificate that is due at once is not taken, and not asked for in a loop.
func TestRenewerOfUselessCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		made := time.Now()
		ca, err := NewCA("c1", made)
		if err != nil {
			t.Fatal(err)
		}
		key, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := key.Request()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := ca.Issue(csr, Node("n1", RoleStorage), time.Hour, made)
		if err != nil {
			t.Fatal(err)
		}
		c, err := NewCredentials(chain, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		asked := 0
		r := OpenRenewer(Renewal{
			Credentials: c,
			Issue: func(_ context.Context, csr []byte) ([]byte, error) {
				asked++
				return ca.Issue(csr, Node("n1", RoleStorage), time.Hour, made) // a clock that stands still
			},
			Save: func([]byte, Key) error { return errors.New("not to be kept") },
			Log:  slog.New(slog.DiscardHandler),
		})
		time.Sleep(24 * time.Hour)
		r.Close()
		if asked < 10 || asked > 60 {
			t.Errorf("asked %d times in a day", asked)
		}
	})
}
