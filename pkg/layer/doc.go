// Package layer is the extent map as pure values: entries and pages, their encoding, the lookup of a block through a
// chain of layers, the merge of a layer into its child, the difference between layers, and the map of free slots.
//
// It does no I/O, starts no goroutine and takes no lock.
package layer

const (
	// BlockSize is the unit of I/O, in bytes.
	BlockSize = 4096
	// BlocksPerExtent is the width of a mask.
	BlocksPerExtent = 16
	// ExtentSize is the unit of allocation, in bytes: one slot of the data file.
	ExtentSize = BlockSize * BlocksPerExtent
	// ExtentsPerPage is the number of entries of a page.
	ExtentsPerPage = 128
	// PageSpan is how much of a volume one page maps, in bytes.
	PageSpan = ExtentSize * ExtentsPerPage
)
