package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestPatternCheck: the check accepts what a correct device may hold and finds what it may not.
func TestPatternCheck(t *testing.T) {
	p := pattern{seed: 5, blocks: 512}
	const acked = 40
	written := func(t *testing.T, upTo int64) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "device"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(p.blocks * block); err != nil {
			t.Fatal(err)
		}
		for n := int64(1); n <= upTo; n++ {
			if err := p.write(f, n); err != nil {
				t.Fatal(err)
			}
		}
		return f
	}
	last := p.batch(acked)[0]
	for _, tc := range []struct {
		name  string
		upTo  int64
		spoil func(f *os.File) error
		lost  bool
	}{
		{"all acknowledged", acked, nil, false},
		{"and a batch under way", acked + 1, nil, false},
		{"a batch missing", acked - 1, nil, true},
		{"a batch too many", acked + 2, nil, true},
		{"torn sector", acked, func(f *os.File) error {
			_, err := f.WriteAt([]byte{1, 2, 3}, last.off+100)
			return err
		}, true},
		{"zeroed block", acked, func(f *os.File) error {
			_, err := f.WriteAt(make([]byte, block), last.off)
			return err
		}, true},
		{"block of another place", acked, func(f *os.File) error {
			buf := make([]byte, sector)
			p.fill(buf, last.off+block, acked)
			_, err := f.WriteAt(buf, last.off)
			return err
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := written(t, tc.upTo)
			if tc.spoil != nil {
				if err := tc.spoil(f); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.check(f, p.recall(acked, acked+1)); errors.Is(err, errLost) != tc.lost {
				t.Errorf("check says %v", err)
			}
		})
	}
}

// TestRecallZeros: discarded ranges read as zeros in the history too.
func TestRecallZeros(t *testing.T) {
	p := pattern{seed: 9, blocks: 512, zeros: true}
	zeros := 0
	for n := int64(1); n <= 50; n++ {
		h := p.recall(n, n+1)
		for _, o := range p.batch(n + 1) {
			if !o.zero {
				continue
			}
			zeros++
			if pending := h.pending[o.off/sector]; !slices.Contains(pending, none) {
				t.Fatalf("batch %d zeroes %d, but %v are pending", n+1, o.off, pending)
			}
		}
	}
	if zeros == 0 {
		t.Fatal("no batch zeroes anything")
	}
}

// TestCheckMoment: a copy made while writes went on is no snapshot.
func TestCheckMoment(t *testing.T) {
	p := pattern{seed: 5, blocks: 512, zeros: false}
	f, err := os.Create(filepath.Join(t.TempDir(), "device"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(p.blocks * block); err != nil {
		t.Fatal(err)
	}
	for n := int64(1); n <= 20; n++ {
		if err := p.write(f, n); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.checkMoment(f, 18, 23); err != nil {
		t.Errorf("a moment: %v", err)
	}
	if err := p.checkMoment(f, 21, 23); !errors.Is(err, errLost) {
		t.Errorf("an acknowledged batch is missing, and the check says: %v", err)
	}
	if err := p.checkMoment(f, 15, 19); !errors.Is(err, errLost) {
		t.Errorf("a batch is there before its time, and the check says: %v", err)
	}
	if err := p.write(f, 23); err != nil { // without 21 and 22
		t.Fatal(err)
	}
	if err := p.checkMoment(f, 18, 23); !errors.Is(err, errLost) {
		t.Errorf("a hole in the order, and the check says: %v", err)
	}
}

func TestFilesCheck(t *testing.T) {
	f := files{seed: 1, dir: t.TempDir()}
	for n := int64(1); n <= 20; n++ {
		if err := errors.Join(f.write(n), f.check(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.check(19); err != nil {
		t.Errorf("a generation under way: %v", err)
	}
	for name, acked := range map[string]int64{"a generation lost": 21, "two generations too many": 18} {
		if err := f.check(acked); !errors.Is(err, errLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Truncate(f.slot(20), 5000); err != nil {
		t.Fatal(err)
	}
	if err := f.check(20); !errors.Is(err, errLost) {
		t.Errorf("a truncated file: %v", err)
	}
}
