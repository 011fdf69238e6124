package extentstore

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
)

// errFull: no slot is free. The write waits; callers of the package never see it.
var errFull = errors.New("pool is full")

const (
	// growSlots is how many slots a thin file is extended by at once: what is written in turn lies together.
	growSlots = 256
	// commitFloor is the free space, in bytes, below which the reserve is given up, so that the database never meets a
	// full filesystem: it writes through a memory map, where that is fatal.
	commitFloor = 48 << 20
	// lastFloor is the free space, in bytes, below which nothing is committed any more once the reserve is gone.
	lastFloor = 24 << 20
	// growFloor is the free space, in bytes, that data never takes.
	growFloor = 64 << 20
)

// allocator hands out slots and makes writes wait for them. It belongs to one pool.
type allocator struct {
	mu sync.Mutex
	// ready slots are free and have their space in the filesystem; holes are free and have not.
	ready, holes *layer.FreeMap
	used, limit  int // slots
	waiters      []*waiter
	grow         sync.Mutex
}

// waiter gets a slot, or a closed channel when the pool has failed.
type waiter struct{ slot chan layer.Slot }

// take returns a run of at most n free slots, or errFull, also while others wait: they come first.
func (p *Pool) take(n int) (layer.Slot, int, error) {
	a := &p.alloc
	a.mu.Lock()
	if len(a.waiters) > 0 {
		a.mu.Unlock()
		return 0, 0, errFull
	}
	s, n, err := p.takeLocked(n)
	a.mu.Unlock()
	return s, n, err
}

// takeLocked unlocks alloc.mu while it extends the file.
func (p *Pool) takeLocked(n int) (layer.Slot, int, error) {
	a := &p.alloc
	for {
		if n = min(n, a.limit-a.used); n <= 0 {
			return 0, 0, errFull
		}
		if s, n := a.ready.Take(n); n > 0 {
			a.used += n
			return s, n, nil
		}
		if a.holes.Free() == 0 {
			return 0, 0, errFull
		}
		a.mu.Unlock()
		err := p.extend()
		a.mu.Lock()
		if err != nil {
			return 0, 0, err
		}
	}
}

// extend makes some holes ready.
func (p *Pool) extend() error {
	a := &p.alloc
	a.grow.Lock()
	defer a.grow.Unlock()
	a.mu.Lock()
	if a.ready.Free() > 0 {
		a.mu.Unlock()
		return nil
	}
	s, n := a.holes.Take(growSlots)
	a.mu.Unlock()
	if n == 0 {
		return errFull
	}
	err := p.roomFor(int64(n) * layer.ExtentSize)
	if err == nil {
		err = p.file.Allocate(s.Offset(), int64(n)*layer.ExtentSize)
	}
	to := a.ready
	if err != nil {
		to = a.holes
	}
	a.mu.Lock()
	for i := range n {
		to.Add(s + layer.Slot(i))
	}
	a.mu.Unlock()
	if isNoSpace(err) {
		return errFull
	}
	return err
}

// roomFor refuses what would leave the filesystem of a thin pool without room for the database. A reserve that was given
// up is not for data either.
func (p *Pool) roomFor(n int64) error {
	free, err := p.space.Free()
	if err != nil {
		return err
	}
	if !p.space.Held() {
		n += p.opts.Reserve
	}
	if free < n+growFloor {
		return disk.ErrNoSpace
	}
	return nil
}

// keepRoom gives the reserve up before the database would meet a full filesystem, and tells whether there is room then.
func (p *Pool) keepRoom() bool {
	return (p.makeRoom(commitFloor) || p.makeRoom(lastFloor)) && p.kv.Room()
}

// makeRoom tells whether so many bytes are free, and gives the reserve up for them.
func (p *Pool) makeRoom(n int64) bool {
	free, err := p.space.Free()
	if err != nil || free >= n {
		return true
	}
	if p.space.Held() {
		if err := p.space.Release(); err != nil {
			p.log.Error("cannot give up the reserve", "error", err)
		} else {
			p.log.Warn("the filesystem of the pool is full; its reserve was given up until there is room again", "free", free)
		}
		free, err = p.space.Free()
	}
	return err != nil || free >= n
}

// waitRoom waits until the database has room. Without it, somebody else has filled the filesystem and the reserve too.
func (p *Pool) waitRoom(ctx context.Context) error {
	for first := true; !p.keepRoom(); first = false {
		if first {
			p.log.Error("the filesystem of the pool is full to the last; flushes wait until something else on it is deleted")
			p.starved.Add(1)
			defer p.starved.Add(-1)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ctx.Done():
			return disk.ErrNoSpace
		}
		if err := p.failure(); err != nil {
			return err // no room would help
		}
	}
	return nil
}

// wait returns a slot as soon as one is free and nobody has waited longer, or the error of what ended the wait.
func (p *Pool) wait(ctx context.Context, closed <-chan struct{}) (layer.Slot, error) {
	a := &p.alloc
	w := &waiter{make(chan layer.Slot, 1)}
	a.mu.Lock()
	a.waiters = append(a.waiters, w)
	first := len(a.waiters) == 1
	a.mu.Unlock()
	if first {
		p.log.Warn("pool is full: writes wait until space is freed")
	}
	p.kick()
	// Space may come back without our doing, where the filesystem is shared.
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		p.serve()
		if err := p.failure(); err != nil {
			p.leave(w)
			return 0, err
		}
		select {
		case s := <-w.slot:
			if s == 0 {
				return 0, p.failure()
			}
			return s, nil
		case <-ctx.Done():
			p.leave(w)
			return 0, ctx.Err()
		case <-closed:
			p.leave(w)
			return 0, block.ErrClosed
		case <-p.ctx.Done():
			p.leave(w)
			return 0, block.ErrClosed
		case <-again.C:
		}
	}
}

// leave takes a waiter off the list, and gives back what it was given meanwhile.
func (p *Pool) leave(w *waiter) {
	a := &p.alloc
	a.mu.Lock()
	a.waiters = slices.DeleteFunc(a.waiters, func(o *waiter) bool { return o == w })
	a.mu.Unlock()
	select {
	case s := <-w.slot:
		if s != 0 {
			p.giveBack(s)
		}
	default:
	}
}

// serve gives free slots to those who wait, the oldest first.
func (p *Pool) serve() {
	a := &p.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.waiters) > 0 {
		s, n, err := p.takeLocked(1)
		if err != nil {
			return
		}
		if len(a.waiters) == 0 {
			a.ready.Add(s)
			a.used -= n
			return
		}
		a.waiters[0].slot <- s
		a.waiters = a.waiters[1:]
	}
}

// giveBack returns slots that were never referred to.
func (p *Pool) giveBack(slots ...layer.Slot) {
	if len(slots) == 0 {
		return
	}
	a := &p.alloc
	a.mu.Lock()
	for _, s := range slots {
		if a.ready.Add(s) {
			a.used--
		}
	}
	a.mu.Unlock()
	p.serve()
}

// recycle makes slots free again that nothing durable refers to any more.
func (p *Pool) recycle(freed []layer.Slot) {
	if len(freed) == 0 {
		return
	}
	if p.opts.manual {
		p.reuse(freed)
		return
	}
	p.freed.mu.Lock()
	p.freed.slots = append(p.freed.slots, freed...)
	p.freed.mu.Unlock()
	select {
	case p.freed.some <- struct{}{}:
	default:
	}
}

// reuse waits for readers that may still look at the slots, gives their space to the filesystem and frees them.
func (p *Pool) reuse(slots []layer.Slot) {
	if !p.opts.broken.reuseBeforeGrace {
		p.grace.wait()
	}
	slices.Sort(slots)
	a := &p.alloc
	for len(slots) > 0 {
		n := 1
		for n < len(slots) && slots[n] == slots[0]+layer.Slot(n) {
			n++
		}
		to := a.ready
		if p.thin {
			// A hole that was not punched only takes space until it is written again.
			if err := p.file.Punch(slots[0].Offset(), int64(n)*layer.ExtentSize); err != nil && p.failure() == nil {
				p.log.Warn("cannot give freed space back to the filesystem", "error", err)
			}
			to = a.holes
		}
		a.mu.Lock()
		for _, s := range slots[:n] {
			if to.Add(s) {
				a.used--
			}
		}
		a.mu.Unlock()
		slots = slots[n:]
	}
	p.serve()
}

// full tells whether writes wait for space.
func (p *Pool) full() bool {
	p.alloc.mu.Lock()
	defer p.alloc.mu.Unlock()
	return len(p.alloc.waiters) > 0 || p.starved.Load() > 0
}

func isNoSpace(err error) bool { return disk.IsNoSpace(err) }
