package layer

import "math/bits"

// FreeMap is a set of free slots that hands out runs of them. Its memory is one bit per slot and a little.
type FreeMap struct {
	words []uint64 // bit set: free
	sum   []uint64 // bit set: the word has a free slot
	free  int
	hint  int // word where the last run was found
}

// NewFreeMap returns a set that can hold slots below total, and holds none.
func NewFreeMap(total int) *FreeMap {
	words := (total + 63) / 64
	return &FreeMap{words: make([]uint64, words), sum: make([]uint64, (words+63)/64)}
}

// Free is the number of slots in the set.
func (f *FreeMap) Free() int { return f.free }

// Has tells whether the slot is in the set.
func (f *FreeMap) Has(s Slot) bool {
	w := int(s / 64)
	return w < len(f.words) && f.words[w]&(1<<(s%64)) != 0
}

// Add puts a slot into the set. It reports false, and changes nothing, where it is there already or out of range.
func (f *FreeMap) Add(s Slot) bool {
	w, bit := int(s/64), uint64(1)<<(s%64)
	if w >= len(f.words) || f.words[w]&bit != 0 {
		return false
	}
	f.words[w] |= bit
	f.sum[w/64] |= 1 << (w % 64)
	f.free++
	return true
}

// Remove takes a slot out of the set. It reports false, and changes nothing, where it is not in it.
func (f *FreeMap) Remove(s Slot) bool {
	if !f.Has(s) {
		return false
	}
	w := int(s / 64)
	f.words[w] &^= 1 << (s % 64)
	if f.words[w] == 0 {
		f.sum[w/64] &^= 1 << (w % 64)
	}
	f.free--
	return true
}

// Take removes a run of at most n adjacent slots and returns it; count is 0 where the set is empty. Runs follow each
// other, so that what is written together lies together.
func (f *FreeMap) Take(n int) (first Slot, count int) {
	if f.free == 0 || n <= 0 {
		return 0, 0
	}
	w := f.next(f.hint)
	f.hint = w
	first = Slot(w*64 + bits.TrailingZeros64(f.words[w]))
	for s := first; count < n && f.Remove(s); s++ {
		count++
	}
	return first, count
}

// next is the first word from w on, going round, that has a free slot. The set is not empty.
func (f *FreeMap) next(w int) int {
	if f.words[w] != 0 {
		return w
	}
	i := w / 64
	if x := f.sum[i] >> (w % 64) << (w % 64); x != 0 {
		return i*64 + bits.TrailingZeros64(x)
	}
	for {
		if i++; i == len(f.sum) {
			i = 0
		}
		if f.sum[i] != 0 {
			return i*64 + bits.TrailingZeros64(f.sum[i])
		}
	}
}
