package blocktest

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
)

func TestMem(t *testing.T) {
	Run(t, func(_ *testing.T, size int64) block.Device { return NewMem(size) })
}

func TestCrashable(t *testing.T) {
	Run(t, func(_ *testing.T, size int64) block.Device { return NewCrashable(size) })
	for name, mode := range map[string]CrashMode{"Lose": Lose, "Keep": Keep, "Tear": Tear} {
		t.Run(name, func(t *testing.T) {
			RunCrash(t, func(_ *testing.T, size int64, rng *rand.Rand) (block.Device, func() block.Device) {
				dev := NewCrashable(size)
				return dev, func() block.Device { return dev.Crash(mode, rng) }
			})
		})
	}
}

func TestFaulty(t *testing.T) {
	Run(t, func(_ *testing.T, size int64) block.Device { return NewFaulty(NewMem(size)) })
}

func TestCrashModes(t *testing.T) {
	ctx := t.Context()
	for _, test := range []struct {
		mode CrashMode
		want []byte // allowed
	}{{Lose, []byte{1}}, {Keep, []byte{3}}, {Tear, []byte{1, 2, 3}}} {
		seen := map[byte]bool{}
		for seed := range uint64(50) {
			dev := NewCrashable(block.Size)
			for v := byte(1); v <= 3; v++ {
				p := make([]byte, block.Size)
				p[0] = v
				noError(t, "WriteAt", dev.WriteAt(ctx, p, 0))
				if v == 1 {
					noError(t, "Flush", dev.Flush(ctx))
				}
			}
			back := dev.Crash(test.mode, rand.New(rand.NewPCG(seed, 0)))
			p := make([]byte, 1)
			if err := dev.ReadAt(ctx, p, 0); !errors.Is(err, block.ErrClosed) {
				t.Fatalf("the crashed device answers %v, want ErrClosed", err)
			}
			noError(t, "ReadAt", back.ReadAt(ctx, p, 0))
			seen[p[0]] = true
		}
		if len(seen) != len(test.want) {
			t.Errorf("mode %d brought back %v, want each of %v", test.mode, seen, test.want)
		}
		for _, v := range test.want {
			if !seen[v] {
				t.Errorf("mode %d never brought back version %d", test.mode, v)
			}
		}
	}
}

func TestFaults(t *testing.T) {
	broken := errors.New("broken")
	f := NewFaulty(NewMem(1 << 20))
	f.Set(Write, Fault{Err: broken, Skip: 1, Count: 1})
	for i, want := range []error{nil, broken, nil} {
		if err := f.WriteAt(t.Context(), []byte{1}, 0); !errors.Is(err, want) {
			t.Errorf("write %d = %v, want %v", i, err, want)
		}
	}
	f.Set(Flush, Fault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := f.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a hanging flush = %v, want the context's error", err)
	}
	done := make(chan error, 1)
	go func() { done <- f.Flush(t.Context()) }()
	for f.Hanging(Flush) == 0 {
		time.Sleep(time.Millisecond)
	}
	f.Set(Flush, Fault{})
	noError(t, "the released flush", <-done)
	if n, bytes := f.Calls(Write); n != 3 || bytes != 3 {
		t.Errorf("Calls(Write) = %d, %d; want 3, 3", n, bytes)
	}
}

func TestMemGrowAndClose(t *testing.T) {
	m := NewMem(4096)
	m.Grow(1 << 20)
	m.Grow(4096)
	if m.Size() != 1<<20 {
		t.Fatalf("size %d after Grow", m.Size())
	}
	expect(t, m, 4096, make([]byte, 1<<20-4096))
	noError(t, "WriteAt", m.WriteAt(t.Context(), []byte{1}, 1<<20-1))
	if got := m.Allocated(); got != chunkSize {
		t.Errorf("Allocated() = %d, want %d", got, chunkSize)
	}
	noError(t, "Close", m.Close())
	if err := m.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("ReadAt after Close = %v", err)
	}
}
