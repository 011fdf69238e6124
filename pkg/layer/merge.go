package layer

// Merge is what must be done to move one extent of a layer into its only child.
type Merge struct {
	// Child is the child's entry afterwards; the layer's own becomes empty.
	Child Entry
	// Copy are the blocks to copy from the layer's slot to the child's before the child's entry is changed. They are not
	// valid in the child until then, so nobody reads them there.
	Copy Mask
	// Free is the layer's slot where it is not needed any more; 0 is none.
	Free Slot
}

// PlanMerge merges parent's entry into child's. The bottom layer of a chain hides nothing: bottom drops the masks of
// zeros.
func PlanMerge(parent, child Entry, bottom bool) Merge {
	missing := parent.Data &^ child.Covers()
	m := Merge{Child: child}
	m.Child.Zero |= parent.Zero &^ child.Covers()
	if bottom {
		m.Child.Zero = 0
	}
	m.Child.Data |= missing
	switch {
	case parent.Slot == 0:
	case missing == 0:
		m.Free = parent.Slot
	case child.Slot == 0:
		m.Child.Slot = parent.Slot
	default:
		m.Copy, m.Free = missing, parent.Slot
	}
	return m
}
