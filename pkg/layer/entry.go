package layer

import "math/bits"

// Mask has one bit per block of an extent; bit 0 is the first block.
type Mask uint16

// AllBlocks is the mask of a whole extent.
const AllBlocks Mask = 0xffff

// Blocks returns the mask of n blocks from block first on.
func Blocks(first, n int) Mask {
	return Mask((uint32(1)<<n - 1) << first)
}

// Count is the number of blocks in the mask.
func (m Mask) Count() int { return bits.OnesCount16(uint16(m)) }

// Run returns the first run of blocks in the mask, and the mask without it. An empty mask has n 0.
func (m Mask) Run() (first, n int, rest Mask) {
	if m == 0 {
		return 0, 0, 0
	}
	first = bits.TrailingZeros16(uint16(m))
	n = bits.TrailingZeros32(^(uint32(m) >> first))
	return first, n, m &^ Blocks(first, n)
}

// Slot numbers a 64 KiB piece of the data file. Slot 0 is the pool's superblock: in an entry it means none.
type Slot uint32

// Offset is where the slot begins in the data file, in bytes.
func (s Slot) Offset() int64 { return int64(s) * ExtentSize }

// Entry says where one extent of one layer is.
//
// Invariant: Data & Zero == 0. Invariant, once stored: Slot == 0 exactly when Data == 0. In memory a slot may be
// reserved before the first block in it is valid.
type Entry struct {
	Slot Slot
	// Data are the blocks whose bytes are in the slot.
	Data Mask
	// Zero are the blocks that read as zeros whatever the layers below hold.
	Zero Mask
}

// Covers are the blocks that the entry decides: what is below is not looked at.
func (e Entry) Covers() Mask { return e.Data | e.Zero }

// Stored is the entry as it may be written to the page: a slot without valid blocks is left out.
func (e Entry) Stored() Entry {
	if e.Data == 0 {
		e.Slot = 0
	}
	return e
}

// sane tells whether a stored entry keeps the invariants.
func (e Entry) sane() bool {
	return e.Data&e.Zero == 0 && (e.Slot == 0) == (e.Data == 0)
}

// Visible returns the blocks of want that have data, looking through the entries of one extent from the head down.
// Those neither here nor in the result read as zeros.
func Visible(chain []Entry, want Mask) Mask {
	var found Mask
	for _, e := range chain {
		found |= want & e.Data
		if want &^= e.Covers(); want == 0 {
			break
		}
	}
	return found
}

// Write marks blocks as valid in the entry's slot.
func (e Entry) Write(b Mask) Entry {
	e.Data |= b
	e.Zero &^= b
	return e
}

// Discard makes blocks read as zeros. Below are the blocks that the layers underneath would show: only those need to
// be hidden. The slot is returned for freeing when nothing in it is valid any more.
func (e Entry) Discard(b, below Mask) (after Entry, freed Slot) {
	e.Data &^= b
	e.Zero = e.Zero&^b | b&below
	if e.Data == 0 {
		freed, e.Slot = e.Slot, 0
	}
	return e, freed
}
