// Package keylock serialises calls by key, and lets identical calls share one piece of work.
//
// Orchestrators repeat calls that have timed out while the first one still works, and some read ABORTED as fatal. So a
// call that is identical to one in flight joins it and gets its result; only a conflicting one is refused.
package keylock

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// DefaultLinger is how long work goes on for which no caller waits any more.
const DefaultLinger = 2 * time.Minute

// Locks holds the work in flight, at most one piece per key. Work belongs to Locks, not to the caller that started it:
// it goes on when that one gives up, so that a repeat finds it further on. It is cancelled when nobody has waited for it
// for the linger time, when a conflicting call asks for its key while nobody waits, and by Close.
type Locks struct {
	linger time.Duration

	// mu guards what follows and the work's fields; it is never held while work runs.
	mu     sync.Mutex
	work   map[string]*work
	closed bool
	wg     sync.WaitGroup
}

type work struct {
	key, print string
	waiting    int
	// abandoned work has been cancelled: nobody joins it, a repeat waits for its end and starts anew.
	abandoned bool
	cancel    context.CancelFunc
	expire    *time.Timer
	done      chan struct{}
	value     any
	err       error
}

// PanicError is the result of work that panicked.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// New makes Locks. Close ends them.
func New(linger time.Duration) *Locks {
	return &Locks{linger: linger, work: map[string]*work{}}
}

// Do runs fn under key, or joins the call in flight under the same key that has the same print, and returns its result.
// It returns volume.ErrBusy at once if the key is taken by a call of another print, and ctx's error when ctx ends first;
// fn may then still be running. Fn's context carries the values of the first caller's ctx, but not its end.
//
// Callers that join share the value: they must not change it. All users of a key must use one type T.
func Do[T any](ctx context.Context, l *Locks, key, print string, fn func(context.Context) (T, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, err
	}
	for {
		w, again, err := l.join(ctx, key, print, func(ctx context.Context) (any, error) { return fn(ctx) })
		if err != nil {
			return zero, err
		}
		if again != nil {
			select {
			case <-again:
				continue
			case <-ctx.Done():
				return zero, ctx.Err()
			}
		}
		select {
		case <-w.done:
			if w.err != nil {
				return zero, w.err
			}
			v, _ := w.value.(T) // a nil interface has no type to assert
			return v, nil
		case <-ctx.Done():
			l.leave(w)
			return zero, ctx.Err()
		}
	}
}

// join returns work to wait for; or the end of abandoned work after which to try again.
func (l *Locks) join(ctx context.Context, key, print string, fn func(context.Context) (any, error)) (*work, <-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, nil, fmt.Errorf("the service is stopping: %w", volume.ErrUnavailable)
	}
	w := l.work[key]
	switch {
	case w == nil:
		w = l.start(ctx, key, print, fn)
	case w.print != print:
		if w.waiting == 0 {
			w.abandon()
		}
		return nil, nil, fmt.Errorf("another operation on %s is under way, try again: %w", key, volume.ErrBusy)
	case w.abandoned:
		return nil, w.done, nil
	}
	w.waiting++
	if w.expire != nil {
		w.expire.Stop()
		w.expire = nil
	}
	return w, nil, nil
}

// start runs fn in a goroutine that Close waits for. The caller holds mu.
func (l *Locks) start(ctx context.Context, key, print string, fn func(context.Context) (any, error)) *work {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &work{key: key, print: print, cancel: cancel, done: make(chan struct{})}
	l.work[key] = w
	l.wg.Go(func() {
		w.value, w.err = protect(ctx, fn)
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.work, key)
		cancel()
		if w.expire != nil {
			w.expire.Stop()
		}
		close(w.done)
	})
	return w
}

// leave is a waiter's departure. The last one starts the linger time.
func (l *Locks) leave(w *work) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.waiting--
	if w.waiting > 0 || w.abandoned || l.work[w.key] != w {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(l.linger, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if w.expire == t { // else someone joined meanwhile
			w.abandon()
		}
	})
	w.expire = t
}

// abandon cancels the work. The caller holds mu.
func (w *work) abandon() {
	w.abandoned = true
	w.cancel()
}

// Close refuses new calls, cancels the work in flight and waits for its end, or for ctx.
func (l *Locks) Close(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	for _, w := range l.work {
		w.abandon()
	}
	l.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		l.wg.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("operations are still running: %w", ctx.Err())
	}
}

// protect turns a panic into an error: nobody else could recover it in work's own goroutine.
func protect(ctx context.Context, fn func(context.Context) (any, error)) (v any, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, &PanicError{Value: p, Stack: debug.Stack()}
		}
	}()
	return fn(ctx)
}
