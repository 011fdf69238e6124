package blocktest

import (
	"context"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
)

// Op is a method of block.Device that can be made to fail.
type Op int

// Ops.
const (
	Read Op = iota
	Write
	Zero
	Flush
	numOps
)

// Fault is what happens to requests of one kind. The zero Fault does nothing.
type Fault struct {
	// Delay comes first; it ends with ctx.
	Delay time.Duration
	// Hang waits until Set is called for the same Op, or ctx is done. The request is then carried out or fails with ctx's error.
	Hang bool
	// Err is returned without anything having been carried out.
	Err error
	// Skip is how many requests pass before the fault shows, and Count, unless 0, how many it hits.
	Skip, Count int
}

// Faulty wraps a device; faults may be set while it is in use.
type Faulty struct {
	dev block.Device

	mu      sync.Mutex
	faults  [numOps]Fault
	hits    [numOps]int
	changed [numOps]chan struct{} // closed by Set
	calls   [numOps]int
	bytes   [numOps]int64
	waiting [numOps]int
}

// NewFaulty wraps dev, without faults.
func NewFaulty(dev block.Device) *Faulty {
	f := &Faulty{dev: dev}
	for op := range f.changed {
		f.changed[op] = make(chan struct{})
	}
	return f
}

// Set replaces op's fault; requests that hang go on.
func (f *Faulty) Set(op Op, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[op], f.hits[op] = fault, 0
	close(f.changed[op])
	f.changed[op] = make(chan struct{})
}

// Calls is how many requests of a kind arrived, and the sum of their lengths in bytes.
func (f *Faulty) Calls(op Op) (n int, bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op], f.bytes[op]
}

// Hanging is how many requests of a kind hang now.
func (f *Faulty) Hanging(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waiting[op]
}

// Size implements block.Device.
func (f *Faulty) Size() int64 { return f.dev.Size() }

// ReadAt implements block.Device.
func (f *Faulty) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := f.before(ctx, Read, int64(len(p))); err != nil {
		return err
	}
	return f.dev.ReadAt(ctx, p, off)
}

// WriteAt implements block.Device.
func (f *Faulty) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := f.before(ctx, Write, int64(len(p))); err != nil {
		return err
	}
	return f.dev.WriteAt(ctx, p, off)
}

// Zero implements block.Device.
func (f *Faulty) Zero(ctx context.Context, off, n int64) error {
	if err := f.before(ctx, Zero, n); err != nil {
		return err
	}
	return f.dev.Zero(ctx, off, n)
}

// Flush implements block.Device.
func (f *Faulty) Flush(ctx context.Context) error {
	if err := f.before(ctx, Flush, 0); err != nil {
		return err
	}
	return f.dev.Flush(ctx)
}

func (f *Faulty) before(ctx context.Context, op Op, n int64) error {
	f.mu.Lock()
	f.calls[op]++
	f.bytes[op] += n
	fault, changed := f.faults[op], f.changed[op]
	f.hits[op]++
	if f.hits[op] <= fault.Skip || (fault.Count > 0 && f.hits[op] > fault.Skip+fault.Count) {
		fault = Fault{}
	}
	f.mu.Unlock()

	if fault.Delay > 0 {
		timer := time.NewTimer(fault.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fault.Hang {
		f.wait(op, 1)
		defer f.wait(op, -1)
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fault.Err
}

func (f *Faulty) wait(op Op, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting[op] += n
}
