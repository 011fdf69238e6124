package volume

import "slices"

// Difference is what a comparison of a snapshot's copies has found.
type Difference struct {
	// Offset of the first region in which they differ, in bytes.
	Offset int64 `json:"offset"`
	// Alike are the pools whose copies of that region are equal, for each of the different copies.
	Alike [][]PoolID `json:"alike"`
}

// CopiesDiffer is the difference that the last comparison found, as far as it stands: a copy that is held no more, or that a scrub
// has found damaged since, is left out; nil where the others are alike.
func (s Snapshot) CopiesDiffer() *Difference {
	if s.Differs == nil {
		return nil
	}
	d := Difference{Offset: s.Differs.Offset}
	for _, pools := range s.Differs.Alike {
		var held []PoolID
		for _, p := range pools {
			if slices.ContainsFunc(s.Holders, func(h Replica) bool { return h.Pool == p && !h.Damaged }) {
				held = append(held, p)
			}
		}
		if len(held) > 0 {
			d.Alike = append(d.Alike, held)
		}
	}
	if len(d.Alike) < 2 {
		return nil
	}
	return &d
}
