package sim

import "math/rand/v2"

// Simulated time is in nanoseconds since the world began.
const (
	microsecond = int64(1000)
	millisecond = 1000 * microsecond
	second      = 1000 * millisecond
)

// event is something that is to happen at a time; of two at the same time, the one that was planned first.
type event struct {
	at  int64
	seq uint64
	do  func()
}

// schedule is the world's only source of time and order: a heap of events. All chance comes from its generator, so a
// seed replays everything.
type schedule struct {
	now  int64
	seq  uint64
	heap []event
	rng  *rand.Rand
}

func newSchedule(seed int64) schedule {
	return schedule{rng: rand.New(rand.NewPCG(uint64(seed), 0x62616c6c617374)), heap: make([]event, 0, 256)}
}

func before(a, b *event) bool { return a.at < b.at || a.at == b.at && a.seq < b.seq }

// after plans do for delay nanoseconds from now.
func (s *schedule) after(delay int64, do func()) {
	s.seq++
	s.heap = append(s.heap, event{at: s.now + max(delay, 0), seq: s.seq, do: do})
	i := len(s.heap) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !before(&s.heap[i], &s.heap[p]) {
			break
		}
		s.heap[i], s.heap[p] = s.heap[p], s.heap[i]
		i = p
	}
}

// next takes the earliest event, and sets the time to its own; false where there is none.
func (s *schedule) next() (event, bool) {
	if len(s.heap) == 0 {
		return event{}, false
	}
	e := s.heap[0]
	last := len(s.heap) - 1
	s.heap[0] = s.heap[last]
	s.heap[last] = event{}
	s.heap = s.heap[:last]
	for i := 0; ; {
		c := 2*i + 1
		if c >= last {
			break
		}
		if c+1 < last && before(&s.heap[c+1], &s.heap[c]) {
			c++
		}
		if !before(&s.heap[c], &s.heap[i]) {
			break
		}
		s.heap[c], s.heap[i] = s.heap[i], s.heap[c]
		i = c
	}
	s.now = e.at
	return e, true
}

// chance is true with probability p.
func (s *schedule) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

// between draws from [lo, hi).
func (s *schedule) between(lo, hi int64) int64 {
	if hi <= lo {
		return lo
	}
	return lo + s.rng.Int64N(hi-lo)
}

// pick draws from [0, n).
func (s *schedule) pick(n int) int { return s.rng.IntN(n) }

// wide draws from [lo, hi) so that each order of magnitude is as likely as the next: most delays are short, few are long.
func (s *schedule) wide(lo, hi int64) int64 {
	for v := lo; ; v *= 4 {
		if v*4 >= hi || s.rng.IntN(3) == 0 {
			return s.between(v, min(v*4, hi))
		}
	}
}
