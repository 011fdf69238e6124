package throttle

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const kib, mib = 1 << 10, 1 << 20

func TestConformance(t *testing.T) {
	for name, q := range map[string]volume.QoS{"unlimited": {}, "limited": {IOPS: 1e6, Bandwidth: 4 << 30}} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(_ *testing.T, size int64) block.Device {
				d := New(blocktest.NewMem(size))
				d.SetLimits(q)
				return d
			})
		})
	}
}

// TestLimits only bounds times from below: that a request took no less than the limit allows.
func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		qos   volume.QoS
		size  int // of a request
		n     int
		least time.Duration // less what an idle device has saved
	}{
		"more than the bucket holds": {volume.QoS{Bandwidth: 512 * kib}, mib / 4, 1, 250 * time.Millisecond},
		"bandwidth":                  {volume.QoS{Bandwidth: 1 * mib}, 4 * kib, 128, 250 * time.Millisecond},
		"requests":                   {volume.QoS{IOPS: 100}, 4 * kib, 50, 250 * time.Millisecond},
		"one request per second":     {volume.QoS{IOPS: 1}, 4 * kib, 2, time.Second},
		"both":                       {volume.QoS{IOPS: 1e6, Bandwidth: 1 * mib}, 64 * kib, 8, 250 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := New(blocktest.NewMem(8 * mib))
			d.SetLimits(c.qos)
			start := time.Now()
			var g errgroup.Group
			for i := range c.n {
				g.Go(func() error {
					if i%2 == 0 {
						return d.ReadAt(t.Context(), make([]byte, c.size), 0)
					}
					return d.WriteAt(t.Context(), make([]byte, c.size), 0)
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took < c.least-10*time.Millisecond {
				t.Errorf("%d requests took %v, the limit allows no less than %v", c.n, took, c.least)
			}
		})
	}
}

func TestFlushAndZeroPass(t *testing.T) {
	d := New(blocktest.NewMem(8 * mib))
	d.SetLimits(volume.QoS{IOPS: 1, Bandwidth: 1})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for range 100 {
		if err := errors.Join(d.Flush(ctx), d.Zero(ctx, 0, 8*mib)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	d := New(blocktest.NewMem(8 * mib))
	d.SetLimits(volume.QoS{Bandwidth: 1})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.WriteAt(ctx, make([]byte, mib), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WriteAt = %v, want the context's error", err)
	}
}

// TestChangedWhileWaiting lifts a limit under requests that would wait for days.
func TestChangedWhileWaiting(t *testing.T) {
	for name, q := range map[string]volume.QoS{"lifted": {}, "raised": {IOPS: 1e6, Bandwidth: 1 << 30}} {
		t.Run(name, func(t *testing.T) {
			d := New(blocktest.NewMem(8 * mib))
			d.SetLimits(volume.QoS{IOPS: 1, Bandwidth: 1})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var g errgroup.Group
			for range 20 {
				g.Go(func() error { return d.ReadAt(ctx, make([]byte, mib), 0) })
			}
			time.Sleep(20 * time.Millisecond)
			d.SetLimits(q)
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

func BenchmarkUnlimited(b *testing.B) {
	d := New(nop{blocktest.NewMem(mib)})
	p := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if err := d.ReadAt(b.Context(), p, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// nop reads nothing.
type nop struct{ block.Device }

func (nop) ReadAt(context.Context, []byte, int64) error { return nil }
