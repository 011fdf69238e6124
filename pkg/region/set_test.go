package region

import (
	"bytes"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// members lists a set.
func members(s *Set) []uint32 {
	var list []uint32
	for i, ok := s.Next(0); ok; i, ok = s.Next(i + 1) {
		list = append(list, i)
	}
	return list
}

// TestAgainstMap does the same to a Set and to a map.
func TestAgainstMap(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		sets := [2]*Set{{}, {}}
		maps := [2]map[uint32]bool{{}, {}}
		number := rapid.Custom(func(r *rapid.T) uint32 {
			base := rapid.SampledFrom([]uint32{0, 60, 4090, 9000, 50000}).Draw(r, "base")
			return base + uint32(rapid.IntRange(0, 80).Draw(r, "offset"))
		})
		for range 60 {
			k := rapid.IntRange(0, 1).Draw(r, "set")
			s, m := sets[k], maps[k]
			from := number.Draw(r, "from")
			to := min(from+uint32(rapid.IntRange(0, 100).Draw(r, "n")), Max)
			switch rapid.IntRange(0, 7).Draw(r, "what") {
			case 0:
				if s.Add(from) == m[from] {
					r.Fatal("Add")
				}
				m[from] = true
			case 1:
				if s.Remove(from) != m[from] {
					r.Fatal("Remove")
				}
				delete(m, from)
			case 2:
				s.AddRange(from, to)
				for i := from; i < to; i++ {
					m[i] = true
				}
			case 3:
				s.RemoveRange(from, to)
				for i := from; i < to; i++ {
					delete(m, i)
				}
			case 4:
				s.Union(sets[1-k])
				for i := range maps[1-k] {
					m[i] = true
				}
			case 5:
				s.Subtract(sets[1-k])
				for i := range maps[1-k] {
					delete(m, i)
				}
			case 6:
				has := false
				for i := from; i < to; i++ {
					has = has || m[i]
				}
				if s.HasRange(from, to) != has || s.Has(from) != m[from] {
					r.Fatal("Has")
				}
			case 7:
				if rapid.IntRange(0, 9).Draw(r, "clear") == 0 {
					s.Clear()
					clear(m)
				}
			}
			var want []uint32
			for i := range m {
				want = append(want, i)
			}
			slices.Sort(want)
			if got := members(s); !slices.Equal(got, want) || s.Len() != len(want) || s.Empty() != (len(want) == 0) {
				r.Fatalf("%v, want %v", got, want)
			}
			if c := s.Clone(); !c.Equal(s) || !s.Equal(c) {
				r.Fatal("clone differs")
			}
		}
		// Through pages of runs, and through bytes, it stays the same.
		var again Set
		for from, more := uint32(0), true; more; {
			var runs []Run
			runs, from, more = sets[0].Runs(from, 3)
			b := AppendRuns(nil, runs)
			decoded, rest, err := DecodeRuns(append(b, 7), 3)
			if err != nil || !bytes.Equal(rest, []byte{7}) {
				r.Fatal(err, rest)
			}
			if diff := cmp.Diff(runs, decoded); diff != "" {
				r.Fatal(diff)
			}
			again.AddRuns(decoded)
		}
		if !again.Equal(sets[0]) {
			r.Fatalf("%v, want %v", members(&again), members(sets[0]))
		}
		again.RemoveRuns([]Run{{0, Max}})
		if !again.Empty() {
			r.Fatal("not empty")
		}
	})
}

// The greatest member is that of a volume of 64 TiB.
func TestEnd(t *testing.T) {
	var s Set
	s.AddRange(Max-100, Max)
	if r, ok := s.NextRun(0, Max); !ok || r != (Run{Max - 100, 100}) || s.Len() != 100 {
		t.Fatal(r, ok)
	}
	s.RemoveRange(Max-100, Max)
	if _, ok := s.Next(0); ok {
		t.Fatal("not empty")
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, b := range map[string][]byte{
		"nothing":        {},
		"a count alone":  {1},
		"too many":       AppendRuns(nil, []Run{{0, 1}, {2, 1}, {4, 1}}),
		"an empty run":   {1, 0, 0},
		"past the end":   AppendRuns(nil, []Run{{Max - 1, 2}}),
		"a huge count":   {0xff, 0xff, 0xff, 0xff, 0x7f},
		"a cut-off run":  {1, 5},
		"too far a gap":  {1, 0xff, 0xff, 0xff, 0xff, 0x7f, 1},
		"an endless one": {1, 0, 0xff, 0xff, 0xff, 0xff, 0x7f},
	} {
		if runs, _, err := DecodeRuns(b, 2); err == nil {
			t.Errorf("%s: %v", name, runs)
		}
	}
}

func FuzzDecodeRuns(f *testing.F) {
	f.Add(AppendRuns(nil, []Run{{0, 1}, {5, 7}, {Max - 1, 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, _, err := DecodeRuns(b, 100)
		if err != nil {
			return
		}
		at := uint64(0)
		for _, r := range runs {
			if !r.Valid() || uint64(r.First) < at {
				t.Fatalf("%v", runs)
			}
			at = uint64(r.End())
		}
		again, _, err := DecodeRuns(AppendRuns(nil, runs), 100)
		if err != nil || !slices.Equal(runs, again) {
			t.Fatalf("%v became %v: %v", runs, again, err)
		}
	})
}

// A flush covers what had ended when it began.
func TestGenerations(t *testing.T) {
	var g Generations
	g.Add(1)
	g.AddRange(2, 4)
	g.Begin()
	g.Add(3) // under way
	g.Add(9)
	if !g.Old().Has(1) || g.Old().Has(9) {
		t.Fatal("old is what was there")
	}
	g.Succeed()
	var s Set
	g.Into(&s)
	if got := members(&s); !slices.Equal(got, []uint32{3, 9}) {
		t.Fatal(got)
	}
	g.Begin()
	g.Begin() // the first failed
	if g.Empty() {
		t.Fatal("a flush that did not succeed covers nothing")
	}
	g.Succeed()
	if !g.Empty() {
		t.Fatal("not empty")
	}
	g.Add(1)
	g.Clear()
	if !g.Empty() {
		t.Fatal("not cleared")
	}
}
