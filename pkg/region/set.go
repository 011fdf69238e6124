// Package region is a set of small integers: the regions (1 MiB) or extents (64 KiB) of a volume that are dirty, missed or
// still to be copied. It is sparse, iterates in order, and is encoded as runs with a bound on what a decoder accepts.
//
// A Set is plain memory without locks. Its zero value is empty and ready.
package region

import "math/bits"

const (
	pageWords = 64
	pageBits  = pageWords * 64
	// Max is the greatest member, exclusive: 64 TiB in extents of 64 KiB.
	Max = 1 << 30
)

type page struct {
	words [pageWords]uint64
	count int
}

// Set holds integers in [0, Max). Cost of Add, Has and Remove does not depend on its size.
type Set struct {
	// Invariant: a page that is not nil has at least one bit; count is the sum of the pages' counts.
	dir   []*page
	spare []*page
	count int
}

// maxSpare bounds the pages kept for reuse, so that a set that was large once does not stay so.
const maxSpare = 16

func (s *Set) page(i uint32) *page {
	at := int(i / pageBits)
	if at >= len(s.dir) {
		if at >= Max/pageBits {
			panic("region: number out of range")
		}
		s.dir = append(s.dir, make([]*page, at+1-len(s.dir))...)
	}
	p := s.dir[at]
	if p == nil {
		if n := len(s.spare); n > 0 {
			p, s.spare = s.spare[n-1], s.spare[:n-1]
		} else {
			p = new(page)
		}
		s.dir[at] = p
	}
	return p
}

// release gives an empty page back.
func (s *Set) release(at int) {
	p := s.dir[at]
	s.dir[at] = nil
	if len(s.spare) < maxSpare {
		*p = page{}
		s.spare = append(s.spare, p)
	}
}

// Add puts i in and tells whether it was not there. It panics where i ≥ Max: callers bound what comes from outside.
func (s *Set) Add(i uint32) bool {
	p := s.page(i)
	w, b := &p.words[i/64%pageWords], uint64(1)<<(i%64)
	if *w&b != 0 {
		return false
	}
	*w |= b
	p.count++
	s.count++
	return true
}

// AddRange puts [from, to) in.
func (s *Set) AddRange(from, to uint32) {
	for from < to {
		if from%64 == 0 && to-from >= 64 {
			p := s.page(from)
			w := &p.words[from/64%pageWords]
			n := 64 - bits.OnesCount64(*w)
			*w = ^uint64(0)
			p.count += n
			s.count += n
			from += 64
			continue
		}
		s.Add(from)
		from++
	}
}

// Has tells whether i is in the set.
func (s *Set) Has(i uint32) bool {
	at := int(i / pageBits)
	return at < len(s.dir) && s.dir[at] != nil && s.dir[at].words[i/64%pageWords]&(1<<(i%64)) != 0
}

// HasRange tells whether any of [from, to) is in the set.
func (s *Set) HasRange(from, to uint32) bool {
	i, ok := s.Next(from)
	return ok && i < to
}

// Remove takes i out and tells whether it was there.
func (s *Set) Remove(i uint32) bool {
	if !s.Has(i) {
		return false
	}
	at := int(i / pageBits)
	p := s.dir[at]
	p.words[i/64%pageWords] &^= 1 << (i % 64)
	p.count--
	s.count--
	if p.count == 0 {
		s.release(at)
	}
	return true
}

// RemoveRange takes [from, to) out.
func (s *Set) RemoveRange(from, to uint32) {
	for i, ok := s.Next(from); ok && i < to; i, ok = s.Next(i + 1) {
		s.Remove(i)
	}
}

// Len is the number of members.
func (s *Set) Len() int { return s.count }

// Empty tells whether there is no member.
func (s *Set) Empty() bool { return s.count == 0 }

// Clear takes everything out.
func (s *Set) Clear() {
	if s.count == 0 {
		return
	}
	for at, p := range s.dir {
		if p != nil {
			s.release(at)
		}
	}
	s.count = 0
}

// Next returns the first member ≥ from.
func (s *Set) Next(from uint32) (uint32, bool) {
	for at := int(from / pageBits); at < len(s.dir); at++ {
		if p := s.dir[at]; p != nil {
			for w := int(from / 64 % pageWords); w < pageWords; w++ {
				if word := p.words[w] >> (from % 64); word != 0 {
					return uint32(at*pageBits+w*64) + from%64 + uint32(bits.TrailingZeros64(word)), true
				}
				from = 0
			}
		}
		from = 0
	}
	return 0, false
}

// NextRun returns the first run of members that starts at or after from, at most limit of them.
func (s *Set) NextRun(from uint32, limit uint32) (Run, bool) {
	first, ok := s.Next(from)
	if !ok {
		return Run{}, false
	}
	n := uint32(1)
	for n < limit && first+n < Max && s.Has(first+n) {
		n++
	}
	return Run{First: first, N: n}, true
}

// Union adds all of o.
func (s *Set) Union(o *Set) {
	for at, from := range o.dir {
		if from == nil {
			continue
		}
		to := s.page(uint32(at * pageBits))
		for w, word := range from.words {
			add := bits.OnesCount64(word &^ to.words[w])
			to.words[w] |= word
			to.count += add
			s.count += add
		}
	}
}

// Subtract removes all of o.
func (s *Set) Subtract(o *Set) {
	for at, from := range o.dir {
		if from == nil || at >= len(s.dir) || s.dir[at] == nil {
			continue
		}
		to := s.dir[at]
		for w, word := range from.words {
			del := bits.OnesCount64(word & to.words[w])
			to.words[w] &^= word
			to.count -= del
			s.count -= del
		}
		if to.count == 0 {
			s.release(at)
		}
	}
}

// Clone returns a copy.
func (s *Set) Clone() *Set {
	c := new(Set)
	c.Union(s)
	return c
}

// Equal tells whether both have the same members.
func (s *Set) Equal(o *Set) bool {
	if s.count != o.count {
		return false
	}
	for i, ok := s.Next(0); ok; i, ok = s.Next(i + 1) {
		if !o.Has(i) {
			return false
		}
	}
	return true
}
