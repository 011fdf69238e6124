package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/block"
)

// suiteSize is not a multiple of an extent, and larger than block.MaxIO.
const suiteSize = 40<<20 + 3*block.Size

// Run checks that the devices which mk makes keep block.Device's contract. Mk is called once per subtest, with a size
// that is a multiple of block.Size, and leaves closing to t.Cleanup. A new device reads as zeros.
func Run(t *testing.T, mk func(t *testing.T, size int64) block.Device) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, dev block.Device)
	}{
		{"Size", testSize},
		{"Range", testRange},
		{"Fresh", testFresh},
		{"Unaligned", testUnaligned},
		{"LargeIO", testLargeIO},
		{"ZeroAll", testZeroAll},
		{"Model", testModel},
		{"Disjoint", testDisjoint},
		{"Overlapping", testOverlapping},
		{"FlushUnderLoad", testFlushUnderLoad},
		{"Cancelled", testCancelled},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, mk(t, suiteSize)) })
	}
}

func testSize(t *testing.T, dev block.Device) {
	if got := dev.Size(); got != suiteSize {
		t.Fatalf("Size() = %d, want %d", got, int64(suiteSize))
	}
}

func testRange(t *testing.T, dev block.Device) {
	ctx := t.Context()
	size := dev.Size()
	for _, r := range []struct{ off, n int64 }{
		{-1, 1}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {1 << 62, 1}, {-1 << 62, 0}, {size - block.Size, 2 * block.Size},
	} {
		p := make([]byte, r.n)
		for i := range p {
			p[i] = 0xff
		}
		for op, err := range map[string]error{
			"ReadAt": dev.ReadAt(ctx, make([]byte, r.n), r.off), "WriteAt": dev.WriteAt(ctx, p, r.off), "Zero": dev.Zero(ctx, r.off, r.n),
		} {
			if !errors.Is(err, block.ErrRange) {
				t.Errorf("%s(off %d, length %d) = %v, want ErrRange", op, r.off, r.n, err)
			}
		}
	}
	if err := dev.Zero(ctx, 0, -1); !errors.Is(err, block.ErrRange) {
		t.Errorf("Zero(0, -1) = %v, want ErrRange", err)
	}
	expect(t, dev, size-block.Size, make([]byte, block.Size)) // nothing of it was carried out
	for _, off := range []int64{0, 17, size} {
		noError(t, "empty ReadAt", dev.ReadAt(ctx, nil, off))
		noError(t, "empty WriteAt", dev.WriteAt(ctx, nil, off))
		noError(t, "empty Zero", dev.Zero(ctx, off, 0))
	}
}

func testFresh(t *testing.T, dev block.Device) {
	expect(t, dev, 0, make([]byte, 1<<20))
	expect(t, dev, dev.Size()-12345, make([]byte, 12345))
	noError(t, "Flush", dev.Flush(t.Context()))
}

func testUnaligned(t *testing.T, dev block.Device) {
	ctx := t.Context()
	rng := rand.New(rand.NewPCG(1, 2))
	const window = 256 << 10
	base := dev.Size() - window
	model := random(rng, window)
	noError(t, "WriteAt", dev.WriteAt(ctx, model, base))
	for _, r := range []struct{ off, n int64 }{
		{0, 1}, {1, 1}, {4095, 2}, {4095, 4098}, {512, 512}, {65535, 2}, {65536 - 512, 1024}, {100, 150000}, {window - 1, 1},
	} {
		p := random(rng, r.n)
		noError(t, "WriteAt", dev.WriteAt(ctx, p, base+r.off))
		copy(model[r.off:], p)
		expect(t, dev, base, model)
		expect(t, dev, base+r.off, p)
		noError(t, "Zero", dev.Zero(ctx, base+r.off, (r.n+1)/2))
		clear(model[r.off : r.off+(r.n+1)/2])
		expect(t, dev, base, model)
	}
}

func testLargeIO(t *testing.T, dev block.Device) {
	p := random(rand.New(rand.NewPCG(3, 4)), block.MaxIO)
	noError(t, "WriteAt of MaxIO", dev.WriteAt(t.Context(), p, 4096+512))
	expect(t, dev, 4096+512, p)
}

// testZeroAll zeros in one call what was written sparsely: Zero's length is not bounded by MaxIO.
func testZeroAll(t *testing.T, dev block.Device) {
	ctx := t.Context()
	for off := int64(0); off < dev.Size()-8192; off += 3 << 20 {
		noError(t, "WriteAt", dev.WriteAt(ctx, bytes.Repeat([]byte{7}, 8192), off))
	}
	noError(t, "Zero of the whole device", dev.Zero(ctx, 0, dev.Size()))
	noError(t, "Flush", dev.Flush(ctx))
	for off := int64(0); off < dev.Size(); off += 1 << 20 {
		expect(t, dev, off, make([]byte, min(1<<20, dev.Size()-off)))
	}
}

// testModel makes random requests, and compares with a flat array of bytes.
func testModel(t *testing.T, dev block.Device) {
	ctx := t.Context()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const window = 2 << 20
	base := int64(7) << 20
	model := make([]byte, window)
	for range 400 {
		off := rng.Int64N(window)
		n := min(rng.Int64N(1<<(1+rng.IntN(18))), window-off)
		if rng.IntN(2) == 0 { // aligned
			off, n = off&^(block.Size-1), n&^(block.Size-1)
		}
		switch rng.IntN(8) {
		case 0, 1, 2:
			p := random(rng, n)
			noError(t, "WriteAt", dev.WriteAt(ctx, p, base+off))
			copy(model[off:], p)
		case 3, 4:
			noError(t, "Zero", dev.Zero(ctx, base+off, n))
			clear(model[off : off+n])
		case 5:
			noError(t, "Flush", dev.Flush(ctx))
		default:
			expect(t, dev, base+off, model[off:off+n])
		}
	}
	expect(t, dev, base, model)
	expect(t, dev, base-4096, make([]byte, 4096))
	expect(t, dev, base+window, make([]byte, 4096))
}

// testDisjoint lets writers of neighbouring bytes, far below a block, run at once: none may undo another's.
func testDisjoint(t *testing.T, dev block.Device) {
	const writers, part, stride = 8, 700, 8 * 700
	g, ctx := errgroup.WithContext(t.Context())
	for w := range writers {
		g.Go(func() error {
			p, q := make([]byte, part), make([]byte, part)
			for i := range 120 {
				off := int64(i%20)*stride + int64(w)*part
				for j := range p {
					p[j] = byte(w*31 + i + j)
				}
				var err error
				if i%7 == 3 {
					clear(p)
					err = dev.Zero(ctx, off, part)
				} else {
					err = dev.WriteAt(ctx, p, off)
				}
				if err == nil {
					err = dev.ReadAt(ctx, q, off)
				}
				if err != nil {
					return err
				}
				if !bytes.Equal(p, q) {
					return fmt.Errorf("writer %d: bytes at %d are not those just written", w, off)
				}
			}
			return nil
		})
	}
	noError(t, "disjoint writers", g.Wait())
}

// testOverlapping lets writers stamp the same blocks while others read them: every block is of one writer, whole.
func testOverlapping(t *testing.T, dev block.Device) {
	const blocks = 40 // two and a half extents
	stamp := func(p []byte, v uint64) {
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], v)
		}
	}
	check := func(p []byte) error {
		for b := 0; b < len(p); b += block.Size {
			first := p[b : b+8]
			for i := b; i < b+block.Size; i += 8 {
				if !bytes.Equal(first, p[i:i+8]) {
					return fmt.Errorf("block %d mixes stamps %x and %x", b/block.Size, first, p[i:i+8])
				}
			}
		}
		return nil
	}
	g, ctx := errgroup.WithContext(t.Context())
	for w := range 6 {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			p := make([]byte, blocks*block.Size)
			for i := range 80 {
				first := rng.IntN(blocks)
				n := 1 + rng.IntN(blocks-first)
				q := p[:n*block.Size]
				off := int64(first) * block.Size
				var err error
				switch {
				case w < 3:
					stamp(q, uint64(w)<<32|uint64(i)+1)
					err = dev.WriteAt(ctx, q, off)
				case w == 3:
					err = dev.Zero(ctx, off, int64(len(q)))
				default:
					if err = dev.ReadAt(ctx, q, off); err == nil {
						err = check(q)
					}
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	noError(t, "overlapping requests", g.Wait())
	p := make([]byte, blocks*block.Size)
	noError(t, "ReadAt", dev.ReadAt(t.Context(), p, 0))
	noError(t, "the end state", check(p))
}

func testFlushUnderLoad(t *testing.T, dev block.Device) {
	g, ctx := errgroup.WithContext(t.Context())
	for w := range 4 {
		g.Go(func() error {
			p := bytes.Repeat([]byte{byte(w + 1)}, block.Size)
			for i := range 40 {
				if err := dev.WriteAt(ctx, p, int64(i*4+w)*block.Size); err != nil {
					return err
				}
				if i%8 == w {
					if err := dev.Flush(ctx); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	noError(t, "writes and flushes", g.Wait())
	for w := range 4 {
		expect(t, dev, int64(39*4+w)*block.Size, bytes.Repeat([]byte{byte(w + 1)}, block.Size))
	}
}

// testCancelled asks with a context that is done: the answer comes at once, and each block is old or new.
func testCancelled(t *testing.T, dev block.Device) {
	old, fresh := bytes.Repeat([]byte{1}, 4*block.Size), bytes.Repeat([]byte{2}, 4*block.Size)
	noError(t, "WriteAt", dev.WriteAt(t.Context(), old, 0))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for op, err := range map[string]error{
		"ReadAt": dev.ReadAt(ctx, make([]byte, 4096), 0), "WriteAt": dev.WriteAt(ctx, fresh, 0), "Flush": dev.Flush(ctx),
	} {
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a done context = %v, want nil or context.Canceled", op, err)
		}
	}
	got := make([]byte, 4*block.Size)
	noError(t, "ReadAt", dev.ReadAt(t.Context(), got, 0))
	for b := 0; b < len(got); b += block.Size {
		if p := got[b : b+block.Size]; !bytes.Equal(p, old[:block.Size]) && !bytes.Equal(p, fresh[:block.Size]) {
			t.Errorf("block %d is neither old nor new", b/block.Size)
		}
	}
	noError(t, "Flush afterwards", dev.Flush(t.Context()))
}

func random(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	for i := len(p) &^ 7; i < len(p); i++ {
		p[i] = byte(rng.Uint32())
	}
	return p
}

func expect(t *testing.T, dev block.Device, off int64, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xa5}, len(want))
	noError(t, "ReadAt", dev.ReadAt(t.Context(), got, off))
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d of the device is %#x, want %#x (read of %d bytes at %d)", off+int64(i), got[i], want[i], len(want), off)
		}
	}
}

func noError(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
