package region

import (
	"encoding/binary"
	"errors"
)

// Run is N members beginning with First.
type Run struct{ First, N uint32 }

// End is one past the last.
func (r Run) End() uint32 { return r.First + r.N }

// Valid tells whether the run is not empty and lies within [0, Max).
func (r Run) Valid() bool { return r.N > 0 && r.N <= Max && r.First < Max && r.First+r.N <= Max }

// ErrEncoding: the bytes are not an encoded list of runs, or hold more than the caller allows.
var ErrEncoding = errors.New("region: malformed runs")

// Runs returns up to limit runs of members ≥ from, in order, and the number from which to go on; more tells whether there
// is anything left.
func (s *Set) Runs(from uint32, limit int) (runs []Run, next uint32, more bool) {
	for len(runs) < limit {
		r, ok := s.NextRun(from, Max)
		if !ok {
			return runs, 0, false
		}
		runs = append(runs, r)
		from = r.End()
	}
	_, more = s.Next(from)
	return runs, from, more
}

// AddRuns adds runs that are valid.
func (s *Set) AddRuns(runs []Run) {
	for _, r := range runs {
		s.AddRange(r.First, r.End())
	}
}

// RemoveRuns takes runs out.
func (s *Set) RemoveRuns(runs []Run) {
	for _, r := range runs {
		s.RemoveRange(r.First, r.End())
	}
}

// AppendRuns encodes ordered, disjoint runs: their number, then for each the gap to the one before and its length, all as
// uvarints.
func AppendRuns(b []byte, runs []Run) []byte {
	b = binary.AppendUvarint(b, uint64(len(runs)))
	at := uint32(0)
	for _, r := range runs {
		b = binary.AppendUvarint(b, uint64(r.First-at))
		b = binary.AppendUvarint(b, uint64(r.N))
		at = r.End()
	}
	return b
}

// DecodeRuns decodes at most limit runs and returns what follows them. The result is ordered, disjoint and within [0, Max);
// ErrEncoding otherwise.
func DecodeRuns(b []byte, limit int) ([]Run, []byte, error) {
	n, b, err := uvarint(b)
	if err != nil {
		return nil, nil, err
	}
	// Each run takes two bytes at least: a count beyond that is not believed.
	if n > uint64(limit) || n > uint64(len(b)/2) {
		return nil, nil, ErrEncoding
	}
	var runs []Run
	at := uint64(0)
	for range n {
		var gap, length uint64
		if gap, b, err = uvarint(b); err != nil {
			return nil, nil, err
		}
		if length, b, err = uvarint(b); err != nil {
			return nil, nil, err
		}
		if gap > Max || length == 0 || length > Max || at+gap+length > Max {
			return nil, nil, ErrEncoding
		}
		runs = append(runs, Run{First: uint32(at + gap), N: uint32(length)})
		at += gap + length
	}
	return runs, b, nil
}

func uvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, ErrEncoding
	}
	return v, b[n:], nil
}
