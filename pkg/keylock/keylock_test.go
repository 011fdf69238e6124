package keylock

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func newLocks(t *testing.T) *Locks {
	l := New(time.Minute)
	t.Cleanup(func() {
		if err := l.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if len(l.work) != 0 {
			t.Errorf("%d entries left", len(l.work))
		}
	})
	return l
}

func TestIdenticalCallsShareOneRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		var runs atomic.Int32
		release := make(chan struct{})
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				v, err := Do(t.Context(), l, "k", "same", func(context.Context) (int32, error) {
					n := runs.Add(1)
					<-release
					return n, nil
				})
				if v != 1 || err != nil {
					t.Errorf("got %d, %v", v, err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if runs.Load() != 1 {
			t.Errorf("%d runs", runs.Load())
		}
		// The result is not kept: the next call runs again.
		if v, _ := Do(t.Context(), l, "k", "same", func(context.Context) (int, error) { return 7, nil }); v != 7 {
			t.Errorf("got %d, want a new run", v)
		}
	})
}

func TestConflictingCallIsRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		release := make(chan struct{})
		go Do(t.Context(), l, "k", "one", func(context.Context) (int, error) { <-release; return 0, nil })
		synctest.Wait()
		_, err := Do(t.Context(), l, "k", "two", func(context.Context) (int, error) { t.Error("ran"); return 0, nil })
		if !errors.Is(err, volume.ErrBusy) {
			t.Errorf("got %v, want ErrBusy", err)
		}
		if v, err := Do(t.Context(), l, "other", "two", func(context.Context) (int, error) { return 2, nil }); v != 2 || err != nil {
			t.Errorf("another key: %d, %v", v, err)
		}
		close(release)
	})
}

func TestWaiterLeavesAtItsOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		release := make(chan struct{})
		var runs atomic.Int32
		work := func(ctx context.Context) (int, error) {
			runs.Add(1)
			select {
			case <-release:
				return 5, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		first, cancel := context.WithCancel(t.Context())
		firstErr := make(chan error, 1)
		go func() { _, err := Do(first, l, "k", "p", work); firstErr <- err }()
		synctest.Wait()
		got := make(chan int, 1)
		go func() { v, _ := Do(t.Context(), l, "k", "p", work); got <- v }()
		short, done := context.WithTimeout(t.Context(), time.Second)
		defer done()
		if _, err := Do(short, l, "k", "p", work); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		cancel()
		if err := <-firstErr; !errors.Is(err, context.Canceled) {
			t.Errorf("first caller got %v", err)
		}
		close(release) // the work outlives the caller that started it
		if v := <-got; v != 5 {
			t.Errorf("joined caller got %d", v)
		}
		if runs.Load() != 1 {
			t.Errorf("%d runs", runs.Load())
		}
	})
}

func TestRepeatFindsTheWorkOfACancelledCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		var cut int
		var done atomic.Bool
		work := func(ctx context.Context) (int, error) {
			if done.Load() { // as an idempotent call does
				return 9, nil
			}
			select {
			case <-time.After(50 * time.Second):
				done.Store(true)
				return 9, nil
			case <-ctx.Done():
				cut++
				return 0, ctx.Err()
			}
		}
		for i := 0; ; i++ { // a caller with a timeout of 10 s, which is shorter than the work
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			v, err := Do(ctx, l, "k", "p", work)
			cancel()
			if err == nil {
				if v != 9 || i == 0 {
					t.Errorf("got %d after %d", v, i)
				}
				break
			}
			if i > 10 {
				t.Fatal("the repeats do not get ahead")
			}
			time.Sleep(3 * time.Second)
		}
		if cut != 0 {
			t.Errorf("the work was cut off %d times", cut)
		}
	})
}

func TestWorkWithoutWaitersIsCancelledAfterTheLingerTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		ended := make(chan time.Duration, 1)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := Do(ctx, l, "k", "p", func(ctx context.Context) (int, error) {
			<-ctx.Done()
			ended <- time.Since(start)
			return 0, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if d := <-ended; d != time.Second+time.Minute {
			t.Errorf("work was cancelled after %v", d)
		}
	})
}

func TestConflictCancelsWorkThatNobodyWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks(t)
		cleanup := make(chan struct{})
		stuck := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			<-cleanup
			return 0, ctx.Err()
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { time.Sleep(time.Second); cancel() }()
		_, _ = Do(ctx, l, "k", "stage", stuck)

		if _, err := Do(t.Context(), l, "k", "unstage", func(context.Context) (int, error) { return 1, nil }); !errors.Is(err, volume.ErrBusy) {
			t.Errorf("got %v while the old work still runs", err)
		}
		// A repeat of the abandoned call waits for its end and starts anew.
		again := make(chan int, 1)
		go func() {
			v, err := Do(t.Context(), l, "k", "stage", func(context.Context) (int, error) { return 3, nil })
			if err != nil {
				t.Error(err)
			}
			again <- v
		}()
		synctest.Wait()
		close(cleanup)
		if v := <-again; v != 3 {
			t.Errorf("got %d", v)
		}
		if v, err := Do(t.Context(), l, "k", "unstage", func(context.Context) (int, error) { return 1, nil }); v != 1 || err != nil {
			t.Errorf("got %d, %v", v, err)
		}
	})
}

func TestContextOfWork(t *testing.T) {
	l := newLocks(t)
	type key struct{}
	ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "v"), time.Hour)
	defer cancel()
	_, err := Do(ctx, l, "k", "p", func(ctx context.Context) (int, error) {
		if ctx.Value(key{}) != "v" {
			t.Error("the caller's values are lost")
		}
		if _, ok := ctx.Deadline(); ok {
			t.Error("the caller's deadline ends the work")
		}
		return 0, nil
	})
	if err != nil {
		t.Error(err)
	}
	cancel()
	if _, err := Do(ctx, l, "k", "p", func(context.Context) (int, error) { t.Error("ran"); return 0, nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestErrorsPanicsAndNil(t *testing.T) {
	l := newLocks(t)
	if _, err := Do(t.Context(), l, "k", "p", func(context.Context) (int, error) { return 1, volume.ErrNoSpace }); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("got %v", err)
	}
	_, err := Do(t.Context(), l, "k", "p", func(context.Context) (int, error) { panic("boom") })
	var p *PanicError
	if !errors.As(err, &p) || p.Value != "boom" || !strings.Contains(string(p.Stack), "keylock_test") {
		t.Errorf("got %v", err)
	}
	if v, err := Do(t.Context(), l, "k", "p", func(context.Context) (error, error) { return nil, nil }); v != nil || err != nil {
		t.Errorf("got %v, %v", v, err)
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(time.Minute)
		got := make(chan error, 1)
		go func() {
			_, err := Do(t.Context(), l, "k", "p", func(ctx context.Context) (int, error) {
				<-ctx.Done()
				time.Sleep(time.Second) // cleaning up
				return 0, ctx.Err()
			})
			got <- err
		}()
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := l.Close(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if _, err := Do(t.Context(), l, "k", "p", func(context.Context) (int, error) { return 0, nil }); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	})
}

// TestStress: at most one run per key at a time, whoever comes and goes, and nothing is left.
func TestStress(t *testing.T) {
	l := New(5 * time.Millisecond)
	var running [8]atomic.Int32
	var joined, busy, left, ran atomic.Int64
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 300 {
				k := rng.IntN(len(running))
				print := fmt.Sprint(rng.IntN(2))
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(3000))*time.Microsecond)
				pause := time.Duration(rng.IntN(4000)) * time.Microsecond
				deaf := rng.IntN(4) == 0
				v, err := Do(ctx, l, fmt.Sprint("key", k), print, func(ctx context.Context) (string, error) {
					ran.Add(1)
					if n := running[k].Add(1); n != 1 {
						t.Errorf("%d runs at once under one key", n)
					}
					defer running[k].Add(-1)
					if deaf {
						time.Sleep(pause)
						return print, nil
					}
					select {
					case <-time.After(pause):
						return print, nil
					case <-ctx.Done():
						return "", ctx.Err()
					}
				})
				switch {
				case err == nil:
					joined.Add(1)
					if v != print {
						t.Errorf("got the result of another call: %q, want %q", v, print)
					}
				case errors.Is(err, volume.ErrBusy):
					busy.Add(1)
				case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
					left.Add(1)
				default:
					t.Errorf("got %v", err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if err := l.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if len(l.work) != 0 {
		t.Errorf("%d entries left", len(l.work))
	}
	t.Logf("ran %d, joined or ran %d, refused %d, left %d", ran.Load(), joined.Load(), busy.Load(), left.Load())
}
