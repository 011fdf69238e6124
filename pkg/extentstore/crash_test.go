package extentstore

import (
	"errors"
	"flag"
	"testing"
)

var seeds = flag.Int("seeds", 30, "random worlds of TestModel, a third of them with the race detector")

// TestModel runs random operations against the model, with crashes.
func TestModel(t *testing.T) {
	const parts = 4
	for part := range uint64(parts) {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			n := uint64(*seeds)
			if raced {
				n = (n + 2) / 3
			}
			for seed := part; seed < n; seed += parts {
				w, err := newWorld(seed, rules{})
				if err == nil {
					err = w.run(6, 60, 150)
				}
				if err != nil {
					t.Fatal(w.report(err))
				}
			}
		})
	}
}

// TestCrashAtEveryStep repeats the same operations with the power failing at each of their durable steps in turn; with the race
// detector at each fourth.
func TestCrashAtEveryStep(t *testing.T) {
	stride := 1
	if raced {
		stride = 4
	}
	for _, seed := range []uint64{1001, 1002} {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			for steps := 0; ; steps += stride {
				done, err := crashAt(seed, steps)
				if err != nil {
					t.Fatalf("crash after %d steps: %v", steps, err)
				}
				if done {
					t.Logf("seed %d has %d durable steps", seed, steps)
					break
				}
			}
		})
	}
}

// crashAt makes the operations of a seed; done tells that they took no more steps than that.
func crashAt(seed uint64, steps int) (done bool, err error) {
	w, err := newWorld(seed, rules{})
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			err = errors.New(w.report(err))
		}
	}()
	w.power.left = steps
	for i := 0; i < 50 && !w.power.off; i++ {
		if err := w.act(); err != nil && !w.power.off {
			return false, err
		}
	}
	done = !w.power.off
	w.power.mu.Lock()
	w.power.off = true
	w.power.mu.Unlock()
	if err := w.crash(-1); err != nil {
		return false, err
	}
	return done, errors.Join(w.quiet(), w.verify(false), w.p.Close())
}
