package disk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
)

// files are all implementations: the suite below runs on each.
func files(t *testing.T) map[string]func(t *testing.T) File {
	open := func(o Options) func(t *testing.T) File {
		return func(t *testing.T) File {
			f, err := OpenFile(filepath.Join(t.TempDir(), "data"), o)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	return map[string]func(t *testing.T) File{
		"direct":   open(Options{}),
		"buffered": open(Options{Buffered: true}),
		"fixed":    open(Options{Fixed: true}),
		"mem":      func(*testing.T) File { return &Mem{} },
	}
}

func TestConformance(t *testing.T) {
	for name, open := range files(t) {
		t.Run(name, func(t *testing.T) {
			for what, check := range map[string]func(*testing.T, File){
				"random": conformRandom, "range": conformRange, "parallel": conformParallel, "closed": conformClosed,
			} {
				t.Run(what, func(t *testing.T) {
					f := open(t)
					defer f.Close()
					if err := f.Grow(1 << 20); err != nil {
						t.Fatal(err)
					}
					check(t, f)
				})
			}
		})
	}
}

func conformRandom(t *testing.T, f File) {
	rng := rand.New(rand.NewPCG(1, 1))
	want := make([]byte, f.Size())
	for i := range 300 {
		blocks := 1 + rng.IntN(20)
		off := rng.IntN(len(want)/BlockSize-blocks) * BlockSize
		n := blocks * BlockSize
		switch rng.IntN(4) {
		case 0, 1:
			// Memory of any alignment.
			b := make([]byte, n+1)[rng.IntN(2):][:n]
			for j := range b {
				b[j] = byte(rng.Uint32())
			}
			if err := f.WriteAt(b, int64(off)); err != nil {
				t.Fatal(err)
			}
			copy(want[off:], b)
		case 2:
			if err := f.Punch(int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
			// Zeros or as before, and no third.
			got := make([]byte, n)
			if err := f.ReadAt(got, int64(off)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, make([]byte, n)) && !bytes.Equal(got, want[off:off+n]) {
				t.Fatal("a punched range is neither zeros nor as before")
			}
			copy(want[off:], got)
		case 3:
			if err := errors.Join(f.Allocate(int64(off), int64(n)), f.Sync()); err != nil {
				t.Fatal(err)
			}
		}
		// Reads of any alignment.
		n = 1 + rng.IntN(3*BlockSize)
		off = rng.IntN(len(want) - n)
		got := make([]byte, n)
		if err := f.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, want[off:off+n]) {
			t.Fatalf("step %d: read %d at %d differs: %v", i, n, off, err)
		}
	}
	if err := f.Grow(2 << 20); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, f.Size())
	if err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, append(want, make([]byte, 1<<20)...)) {
		t.Fatalf("after growing: %v", err)
	}
	if err := f.Grow(1); err != nil || f.Size() != 2<<20 {
		t.Fatalf("growing to less: size %d: %v", f.Size(), err)
	}
}

func conformRange(t *testing.T, f File) {
	b := make([]byte, BlockSize)
	for name, err := range map[string]error{
		"read beyond":     f.ReadAt(b, f.Size()-1),
		"read negative":   f.ReadAt(b, -1),
		"write beyond":    f.WriteAt(b, f.Size()),
		"punch beyond":    f.Punch(f.Size(), BlockSize),
		"allocate beyond": f.Allocate(f.Size()-BlockSize, 2*BlockSize),
	} {
		if !errors.Is(err, ErrRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if f.WriteAt(b[:512], 0) == nil || f.WriteAt(b, 512) == nil {
		t.Error("a write that is not in blocks is refused")
	}
}

func conformParallel(t *testing.T, f File) {
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			b, got := bytes.Repeat([]byte{byte(i + 1)}, BlockSize), make([]byte, BlockSize)
			for k := range 8 {
				off := int64(k*16+i) * BlockSize
				if err := errors.Join(f.WriteAt(b, off), f.ReadAt(got, off)); err != nil || !bytes.Equal(got, b) {
					t.Errorf("writer %d: %v", i, err)
				}
				if i == 0 {
					if err := f.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func conformClosed(t *testing.T, f File) {
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, BlockSize)
	for name, err := range map[string]error{
		"read": f.ReadAt(b, 0), "write": f.WriteAt(b, 0),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fillMem returns a file with one synced and one unsynced generation of bytes.
func fillMem(t *testing.T) *Mem {
	m := &Mem{}
	if err := errors.Join(m.Grow(16*BlockSize), m.WriteAt(bytes.Repeat([]byte{1}, 16*BlockSize), 0), m.Sync()); err != nil {
		t.Fatal(err)
	}
	for i := range int64(16) {
		if err := m.WriteAt(bytes.Repeat([]byte{2}, BlockSize), i*BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func TestMemCrash(t *testing.T) {
	for _, tear := range []int{0, BlockSize} {
		var lost, kept, torn bool
		for seed := range uint64(20) {
			m := fillMem(t)
			m.TearAt = tear
			got := make([]byte, 16*BlockSize)
			if err := m.Crash(seed).ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			for b := range 16 {
				n := bytes.Count(got[b*BlockSize:][:BlockSize], []byte{2})
				if bytes.Count(got[b*BlockSize:][:BlockSize], []byte{1})+n != BlockSize || n%sector != 0 {
					t.Fatal("a crash made bytes up")
				}
				lost, kept, torn = lost || n == 0, kept || n == BlockSize, torn || n != 0 && n != BlockSize
			}
		}
		if !lost || !kept || torn != (tear == 0) {
			t.Errorf("tear at %d: lost %v, kept %v, torn %v", tear, lost, kept, torn)
		}
	}
}

func TestMemFailedSyncLies(t *testing.T) {
	m := fillMem(t)
	m.FailSync(ErrInjected)
	if err := m.Sync(); !errors.Is(err, ErrInjected) {
		t.Fatal(err)
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, BlockSize)
	if err := m.ReadAt(got, 0); err != nil || got[0] != 2 {
		t.Fatalf("reads %d before the crash: %v", got[0], err)
	}
	if err := m.Crash(1).ReadAt(got, 0); err != nil || got[0] != 1 {
		t.Fatalf("reads %d after it: %v", got[0], err)
	}
}

func TestMemFullAndFailing(t *testing.T) {
	m := &Mem{}
	b := make([]byte, BlockSize)
	if err := m.Grow(16 * BlockSize); err != nil {
		t.Fatal(err)
	}
	m.Limit(2 * BlockSize)
	if err := errors.Join(m.WriteAt(b, 0), m.Allocate(BlockSize, BlockSize), m.WriteAt(b, 0)); err != nil {
		t.Fatal(err)
	}
	if err := m.WriteAt(b, 2*BlockSize); !IsNoSpace(err) {
		t.Fatalf("beyond the limit: %v", err)
	}
	if err := errors.Join(m.Punch(0, BlockSize), m.WriteAt(b, 2*BlockSize)); err != nil {
		t.Fatal(err)
	}
	m.FailWrite(ErrInjected)
	m.FailRead(ErrInjected)
	if !errors.Is(m.WriteAt(b, 0), ErrInjected) || !errors.Is(m.ReadAt(b, 0), ErrInjected) {
		t.Fatal("injected errors")
	}
}

func TestReserve(t *testing.T) {
	dir := t.TempDir()
	s := NewDirSpace(dir, 8<<20)
	if held, err := s.Hold(1 << 62); err != nil || held || s.Held() {
		t.Fatalf("held without room: %v %v", held, err)
	}
	if held, err := s.Hold(0); err != nil || !held {
		t.Fatalf("held %v: %v", held, err)
	}
	if !NewDirSpace(dir, 8<<20).Held() {
		t.Fatal("the reserve of an earlier process counts")
	}
	if err := s.Release(); err != nil || s.Held() || NewDirSpace(dir, 8<<20).Held() {
		t.Fatalf("released: %v", err)
	}
	if err := s.Release(); err != nil {
		t.Fatal(err)
	}
}
