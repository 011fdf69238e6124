// Package throttle limits a device's requests and bytes per second.
package throttle

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// burst is how much of a limit an idle device saves up.
const burst = 250 * time.Millisecond

// Device wraps a device. Reads and writes wait for their turn; flushes and zeros pass.
type Device struct {
	block.Device
	limits atomic.Pointer[limits] // nil: none
	mu     sync.Mutex             // of SetLimits
}

// limits are what one SetLimits set.
type limits struct {
	qos      volume.QoS
	ops      *rate.Limiter // nil: none
	bytes    *rate.Limiter
	replaced chan struct{} // closed when others hold
}

// New wraps dev without limits.
func New(dev block.Device) *Device { return &Device{Device: dev} }

// SetLimits sets the limits, also for requests that wait now. Zero is none.
func (d *Device) SetLimits(q volume.QoS) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.limits.Load()
	if old != nil && old.qos == q {
		return
	}
	var l *limits
	if q.IOPS > 0 || q.Bandwidth > 0 {
		l = &limits{qos: q, ops: limiter(q.IOPS), bytes: limiter(q.Bandwidth), replaced: make(chan struct{})}
	}
	d.limits.Store(l)
	if old != nil {
		close(old.replaced)
	}
}

func limiter(perSecond int64) *rate.Limiter {
	if perSecond <= 0 {
		return nil
	}
	saved := max(1, min(float64(perSecond)*burst.Seconds(), 1<<30))
	return rate.NewLimiter(rate.Limit(perSecond), int(saved))
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.wait(ctx, len(p)); err != nil {
		return err
	}
	return d.Device.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.wait(ctx, len(p)); err != nil {
		return err
	}
	return d.Device.WriteAt(ctx, p, off)
}

// wait returns when one request of n bytes may go on. When the limits change meanwhile, it asks the new ones for what is
// left.
func (d *Device) wait(ctx context.Context, n int) error {
	if d.limits.Load() == nil {
		return nil
	}
	return d.waitLimited(ctx, n)
}

func (d *Device) waitLimited(ctx context.Context, n int) error {
	ops := 1
	for ops > 0 || n > 0 {
		l := d.limits.Load()
		if l == nil {
			return nil
		}
		for _, part := range []struct {
			bucket *rate.Limiter
			left   *int
		}{{l.ops, &ops}, {l.bytes, &n}} {
			if err := l.take(ctx, part.bucket, part.left); err != nil {
				return err
			}
		}
	}
	return nil
}

// take takes left tokens, a bucket's worth at a time. It leaves some when the limits were replaced.
func (l *limits) take(ctx context.Context, bucket *rate.Limiter, left *int) error {
	if bucket == nil {
		*left = 0
	}
	for *left > 0 {
		part := min(*left, bucket.Burst())
		turn := bucket.ReserveN(time.Now(), part)
		if delay := turn.Delay(); delay > 0 {
			timer := time.NewTimer(delay)
			select {
			case <-timer.C:
			case <-l.replaced:
				timer.Stop()
				return nil
			case <-ctx.Done():
				timer.Stop()
				turn.Cancel()
				return ctx.Err()
			}
		}
		*left -= part
	}
	return nil
}
