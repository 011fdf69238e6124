package layer

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

func entry(t *rapid.T, name string, slot Slot) Entry {
	e := Entry{Slot: slot, Data: Mask(rapid.Uint16().Draw(t, name+" data"))}
	e.Zero = Mask(rapid.Uint16().Draw(t, name+" zero")) &^ e.Data
	return e.Stored()
}

// blocks are the values of an extent's blocks: a slot's bytes are its number and the block.
func blocks(chain ...Entry) (v [BlocksPerExtent]int) {
	for b := range v {
		for _, e := range chain {
			if e.Data&(1<<b) != 0 {
				v[b] = int(e.Slot)*100 + b
				break
			}
			if e.Zero&(1<<b) != 0 {
				break
			}
		}
	}
	return v
}

func TestMergeKeepsBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		child, parent := entry(t, "child", 1), entry(t, "parent", 2)
		var chain []Entry
		bottom := rapid.Bool().Draw(t, "bottom")
		if !bottom {
			chain = []Entry{entry(t, "below", 3)}
		}
		want := blocks(append([]Entry{child, parent}, chain...)...)
		m := PlanMerge(parent, child, bottom)
		if !m.Child.sane() {
			t.Fatalf("entry %+v breaks an invariant", m.Child)
		}
		if m.Copy&child.Covers() != 0 {
			t.Fatalf("copies over valid blocks %04x", m.Copy&child.Covers())
		}
		got := blocks(append([]Entry{m.Child}, chain...)...)
		for b := range got {
			if m.Copy&(1<<b) != 0 {
				got[b] = int(parent.Slot)*100 + b
			}
		}
		if got != want {
			t.Fatalf("merge changed %v to %v", want, got)
		}
		owners := 0
		for _, s := range []Slot{m.Child.Slot, m.Free} {
			if s == parent.Slot && s != 0 {
				owners++
			}
		}
		if parent.Slot != 0 && owners != 1 {
			t.Fatalf("parent's slot has %d owners after the merge", owners)
		}
		if bottom && m.Child.Zero != 0 {
			t.Fatalf("hides %04x of nothing", m.Child.Zero)
		}
	})
}

func TestDiscardAndWrite(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		head, lower := entry(t, "head", 1), entry(t, "lower", 2)
		b := Mask(rapid.Uint16().Draw(t, "blocks"))
		after, freed := head.Discard(b, Visible([]Entry{lower}, AllBlocks))
		if !after.sane() {
			t.Fatalf("entry %+v breaks an invariant", after)
		}
		if (freed != 0) != (head.Slot != 0 && after.Slot == 0) {
			t.Fatalf("%+v discarded to %+v frees slot %d", head, after, freed)
		}
		was, is := blocks(head, lower), blocks(after, lower)
		for i := range is {
			want := was[i]
			if b&(1<<i) != 0 {
				want = 0
			}
			if is[i] != want {
				t.Fatalf("block %d reads %d, want %d", i, is[i], want)
			}
		}
		after.Slot = 1
		if w := after.Write(b); w.Data&b != b || w.Zero&b != 0 {
			t.Fatalf("write of %04x gives %+v", b, w)
		}
	})
}

func TestPageCodec(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var p Page
		for range rapid.IntRange(0, 20).Draw(t, "n") {
			i := rapid.IntRange(0, ExtentsPerPage-1).Draw(t, "i")
			p[i] = entry(t, "e", Slot(rapid.Uint32Range(1, 1<<32-1).Draw(t, "slot")))
		}
		b := p.Append([]byte("x"))[1:]
		var q Page
		if err := q.Decode(b); err != nil || q != p {
			t.Fatalf("decoded %v: %v", q, err)
		}
		b[rapid.IntRange(0, len(b)-1).Draw(t, "flip")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if err := q.Decode(b); err == nil {
			t.Fatal("a flipped bit went unnoticed")
		}
	})
}

func TestReservedSlotIsNotStored(t *testing.T) {
	var p, q Page
	p[3] = Entry{Slot: 9}
	p[4] = Entry{Slot: 10, Zero: 1}
	if err := q.Decode(p.Append(nil)); err != nil {
		t.Fatal(err)
	}
	if want := (Page{4: {Zero: 1}}); q != want {
		t.Fatalf("stored %v", q)
	}
}

func FuzzPageDecode(f *testing.F) {
	p := Page{0: {Slot: 1, Data: 1}, 127: {Zero: 3}}
	f.Add(p.Append(nil))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Page
		if p.Decode(b) == nil && !bytes.Equal(p.Append(nil), b) {
			t.Fatal("a page that decodes must be what we encode")
		}
	})
}

func TestMaskRuns(t *testing.T) {
	for m := range 1 << 16 {
		var sum Mask
		rest := Mask(m)
		last := -1
		for rest != 0 {
			first, n, r := rest.Run()
			if first <= last {
				t.Fatalf("mask %04x: run at %d after block %d", m, first, last)
			}
			last = first + n
			sum |= Blocks(first, n)
			rest = r
		}
		if sum != Mask(m) {
			t.Fatalf("mask %04x gives runs %04x", m, sum)
		}
	}
}

func TestRunsJoinAndClip(t *testing.T) {
	var got [][2]int64
	r := Runs{From: BlockSize/2 + 1, To: 3 * ExtentSize, Emit: func(off, n int64) error {
		got = append(got, [2]int64{off, n})
		return nil
	}}
	for _, a := range []struct {
		off int64
		m   Mask
	}{{0, 3}, {ExtentSize, 0x8000}, {2 * ExtentSize, 0xffff}, {3 * ExtentSize, 1}} {
		if err := r.Add(a.off, a.m); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	want := [][2]int64{{2049, 2*BlockSize - 2049}, {2*ExtentSize - BlockSize, ExtentSize + BlockSize}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] {
		t.Fatalf("runs %v, want %v", got, want)
	}
}

func TestFreeMap(t *testing.T) {
	const total = 10_000
	rng := rand.New(rand.NewPCG(1, 2))
	f, model := NewFreeMap(total), map[Slot]bool{}
	for s := Slot(1); s < total; s++ {
		f.Add(s)
		model[s] = true
	}
	var taken []Slot
	for range 20_000 {
		if rng.IntN(3) > 0 {
			first, n := f.Take(1 + rng.IntN(40))
			if n == 0 && len(model) > 0 {
				t.Fatalf("no run though %d are free", len(model))
			}
			for i := range n {
				s := first + Slot(i)
				if !model[s] {
					t.Fatalf("slot %d handed out twice", s)
				}
				delete(model, s)
				taken = append(taken, s)
			}
		} else if len(taken) > 0 {
			for range min(len(taken), 60) {
				i := rng.IntN(len(taken))
				if !f.Add(taken[i]) || f.Add(taken[i]) {
					t.Fatal("adding twice must be refused")
				}
				model[taken[i]] = true
				taken[i] = taken[len(taken)-1]
				taken = taken[:len(taken)-1]
			}
		}
		if f.Free() != len(model) {
			t.Fatalf("%d free, want %d", f.Free(), len(model))
		}
	}
	if f.Add(total+64) || f.Remove(total+64) || f.Has(0) {
		t.Fatal("slots out of range")
	}
}
