package cutdisk

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const atom = 512

func sectors(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*atom) }

// TestCut: what was flushed survives every cut after the flush; the rest is as the fate says.
func TestCut(t *testing.T) {
	d, err := New(t.TempDir(), 64*atom, atom, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(d.writeAt(sectors('a', 4), 0, false))
	do(d.writeAt(sectors('b', 4), 4*atom, false))
	do(d.flush(1)) // came before the second write was answered
	first := d.Position()
	do(d.writeAt(sectors('c', 4), 8*atom, true))
	do(d.zeroAt(0, 2*atom, false))
	do(d.writeAt(sectors('d', 4), 12*atom, false))

	sector := func(fate Fate, position, n int, seed uint64) byte {
		t.Helper()
		name := filepath.Join(t.TempDir(), "cut")
		if _, err := d.Cut(name, position, fate, rand.New(rand.NewPCG(seed, 0))); err != nil {
			t.Fatal(err)
		}
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(p) != 64*atom {
			t.Fatalf("the disk has %d bytes", len(p))
		}
		return p[n*atom]
	}
	for _, tc := range []struct {
		name     string
		fate     Fate
		position int
		sector   int
		want     byte
	}{
		{"flushed", Lose, first, 0, 'a'},
		{"answered after the flush was asked for", Lose, first, 4, 0},
		{"kept", Keep, first, 4, 'b'},
		{"not written yet", Keep, first, 8, 0},
		{"FUA", Lose, d.Position(), 8, 'c'},
		{"zeroed, lost", Lose, d.Position(), 0, 'a'},
		{"zeroed, kept", Keep, d.Position(), 0, 0},
		{"beyond what was zeroed", Keep, d.Position(), 2, 'a'},
		{"lost", Lose, d.Position(), 12, 0},
	} {
		if got := sector(tc.fate, tc.position, tc.sector, 1); got != tc.want {
			t.Errorf("%s: sector %d is %q, not %q", tc.name, tc.sector, got, tc.want)
		}
	}
	// Scatter loses and keeps, and never touches what was flushed.
	seen := map[byte]int{}
	for seed := range uint64(64) {
		seen[sector(Scatter, d.Position(), 12, seed)]++
		if got := sector(Scatter, d.Position(), 8, seed); got != 'c' {
			t.Fatalf("seed %d: a durable sector is %q", seed, got)
		}
	}
	if seen[0] < 8 || seen['d'] < 8 || len(seen) != 2 {
		t.Errorf("an unflushed sector was %v in 64 cuts", seen)
	}

	next, err := New(t.TempDir(), 64*atom, atom, filepath.Join(filepath.Dir(d.now.Name()), "now"))
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	got := make([]byte, atom)
	do(next.readAt(got, 12*atom))
	if got[0] != 'd' {
		t.Errorf("the base is not in the new disk: %q", got[0])
	}
	next.Halt()
	if err := next.writeAt(got, 0, false); err == nil {
		t.Error("a disk without power took a write")
	}
}
