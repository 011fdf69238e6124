package blocktest

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
)

// RunCrash checks what survives a crash: per block, what the last flush made durable or anything newer. Mk makes a
// device and a function that crashes it and returns what came back; the first device is not used again.
func RunCrash(t *testing.T, mk func(t *testing.T, size int64, rng *rand.Rand) (dev block.Device, crash func() block.Device)) {
	const blocks = 48
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for round := range 30 {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		dev, crash := mk(t, blocks*block.Size, rng)
		var since [blocks][][]byte // contents since the last flush
		for b := range since {
			since[b] = [][]byte{make([]byte, block.Size)}
		}
		for range rng.IntN(60) {
			first := rng.IntN(blocks)
			n := 1 + rng.IntN(blocks-first)
			p := random(rng, int64(n)*block.Size)
			switch rng.IntN(6) {
			case 0:
				noError(t, "Flush", dev.Flush(t.Context()))
				for b := range since {
					since[b] = since[b][len(since[b])-1:]
				}
				continue
			case 1:
				clear(p)
				noError(t, "Zero", dev.Zero(t.Context(), int64(first)*block.Size, int64(len(p))))
			default:
				noError(t, "WriteAt", dev.WriteAt(t.Context(), p, int64(first)*block.Size))
			}
			for i := range n {
				since[first+i] = append(since[first+i], p[i*block.Size:(i+1)*block.Size])
			}
		}
		back := crash()
		if got := back.Size(); got != blocks*block.Size {
			t.Fatalf("round %d: size after the crash is %d, want %d", round, got, blocks*block.Size)
		}
		got := make([]byte, block.Size)
		for b := range since {
			noError(t, "ReadAt", back.ReadAt(t.Context(), got, int64(b)*block.Size))
			found := false
			for _, v := range since[b] {
				found = found || bytes.Equal(v, got)
			}
			if !found {
				t.Fatalf("round %d: block %d holds none of its %d contents since the last flush", round, b, len(since[b]))
			}
		}
		noError(t, "WriteAt after the crash", back.WriteAt(t.Context(), got, 0))
		noError(t, "Flush after the crash", back.Flush(t.Context()))
	}
}
