package engine

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Meter counts how long operations take. It may be shared by engines and used at once; the zero value is ready.
type Meter struct {
	// counts by time, four to each doubling from a microsecond on.
	counts [4 * 25]atomic.Uint32
}

func meterBucket(d time.Duration) int {
	us := uint64(max(d, time.Microsecond) / time.Microsecond)
	octave := bits.Len64(us) - 1
	quarter := int(us<<2>>octave) & 3
	return min(octave*4+quarter, 4*25-1)
}

// bucketEnd is the time that no operation of a bucket reaches.
func bucketEnd(i int) time.Duration {
	return time.Duration((uint64(5+i%4)<<(i/4)+3)/4) * time.Microsecond
}

func (m *Meter) record(d time.Duration) { m.counts[meterBucket(d)].Add(1) }

// Take returns how many operations ended since the last call, and the time that 99 of 100 of them kept to, about.
func (m *Meter) Take() (ops int, p99 time.Duration) {
	var counts [4 * 25]int
	for i := range m.counts {
		if m.counts[i].Load() > 0 {
			counts[i] = int(m.counts[i].Swap(0))
			ops += counts[i]
		}
	}
	rest := ops / 100 // may be slower
	for i := len(counts) - 1; i >= 0; i-- {
		if rest -= counts[i]; rest < 0 {
			return ops, bucketEnd(i)
		}
	}
	return 0, 0
}
