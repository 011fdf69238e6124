package pki

import (
	"context"
	"errors"
	"hash/fnv"
	"log/slog"
	"sync"
	"time"
)

const (
	// renewCheck is how often the clock is looked at, since it may jump.
	renewCheck = time.Hour
	// renewRetry is the first wait after a failure; it doubles up to renewCheck.
	renewRetry = time.Minute
	// renewTimeout bounds one attempt.
	renewTimeout = 30 * time.Second
)

// Renewal is what a Renewer needs.
type Renewal struct {
	Credentials *Credentials
	// Issue asks a controller for the certificate of a signing request; a controller asks its own CA.
	Issue func(ctx context.Context, csr []byte) (chain []byte, err error)
	// Save makes the new certificate durable before it is used.
	Save func(chain []byte, key Key) error
	Log  *slog.Logger
}

// Renewer replaces a certificate when a third of its life is left, each time with a new key.
type Renewer struct {
	r      Renewal
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// OpenRenewer starts renewing; Close ends it.
func OpenRenewer(r Renewal) *Renewer {
	ctx, cancel := context.WithCancel(context.Background())
	n := &Renewer{r: r, cancel: cancel}
	n.done.Go(func() { n.run(ctx) })
	return n
}

// Close ends the renewing and waits for what is under way.
func (n *Renewer) Close() {
	n.cancel()
	n.done.Wait()
}

func (n *Renewer) run(ctx context.Context) {
	retry := renewRetry
	for {
		wait := min(n.r.Credentials.dueIn(), renewCheck)
		if wait <= 0 {
			err := n.renew(ctx)
			self := n.r.Credentials.Self()
			if err == nil {
				n.r.Log.Info("certificate renewed", "serial", self.Serial, "notAfter", self.NotAfter)
				retry = renewRetry
				continue
			}
			if ctx.Err() != nil {
				return
			}
			n.r.Log.Error("the certificate could not be renewed", "err", err, "notAfter", self.NotAfter, "retryIn", retry)
			wait = retry
			retry = min(2*retry, renewCheck)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (n *Renewer) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	key, err := NewKey()
	if err != nil {
		return err
	}
	csr, err := key.Request()
	if err != nil {
		return err
	}
	chain, err := n.r.Issue(ctx, csr)
	if err != nil {
		return err
	}
	c := n.r.Credentials
	fresh, err := NewCredentials(chain, key, c.now)
	if err != nil {
		return err
	}
	// Else it would be asked for again and again.
	if fresh.dueIn() <= 0 {
		return errors.New("the certificate that was issued is itself due for renewal; are the clocks right?")
	}
	if err := c.fits(fresh.cur.Load()); err != nil {
		return err
	}
	if err := n.r.Save(chain, key); err != nil {
		return err
	}
	return c.Set(chain, key)
}

// dueIn is how long the certificate need not be renewed yet. Certificates that were made together are renewed at times of
// their own, up to a twentieth of their life apart.
func (c *Credentials) dueIn() time.Duration {
	cur := c.cur.Load()
	life := cur.self.NotAfter.Sub(cur.since)
	h := fnv.New32a()
	h.Write([]byte(cur.self.Serial))
	spread := time.Duration(h.Sum32()%1000) * (life / 20000)
	return cur.since.Add(life*2/3 - spread).Sub(c.now())
}
