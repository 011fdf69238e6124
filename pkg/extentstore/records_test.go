package extentstore

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

// decoders read what a record's bytes say and encode it again.
var decoders = map[string]func(b []byte) ([]byte, error){
	"pool":     func(b []byte) ([]byte, error) { r, err := decodePool(b); return r.encode(), err },
	"damaged":  func(b []byte) ([]byte, error) { r, err := decodeLayer(b); return r.encode(), err },
	"layer":    func(b []byte) ([]byte, error) { r, err := decodeLayer(b); return r.encode(), err },
	"replica":  func(b []byte) ([]byte, error) { r, err := decodeReplica(b); return r.encode(), err },
	"snapshot": func(b []byte) ([]byte, error) { r, err := decodeSnapshot(b); return r.encode(), err },
	"sums":     func(b []byte) ([]byte, error) { r, err := decodeSums(b); return r.encode(), err },
	"scrub":    func(b []byte) ([]byte, error) { r, err := decodeScrub(b); return r.encode(), err },
	"state":    func(b []byte) ([]byte, error) { s, err := decodeState(b); return encodeState(s), err },
	"peer":     func(b []byte) ([]byte, error) { t, err := decodePeer(b); return encodePeer(t), err },
	"wil": func(b []byte) ([]byte, error) {
		var w [groupRegions / 64]uint64
		err := decodeWords("log", b, w[:])
		return encodeWords(w[:]), err
	},
	"super": func(b []byte) ([]byte, error) {
		r, none, err := decodeSuper(b)
		if none {
			return b, err
		}
		return encodeSuper(r), err
	},
}

var records = map[string][]byte{
	"pool":     poolRecord{formatVersion, "pool-1", "dir"}.encode(),
	"layer":    layerRecord{parent: 7, summed: true}.encode(),
	"replica":  replicaRecord{head: 3, journal: 2, size: 1 << 30, volume: "vol-1", tenant: "t"}.encode(),
	"snapshot": snapshotRecord{layer: 3, number: 4, size: 1 << 30, volume: "vol-1", tenant: "t", replica: "r"}.encode(),
	"sums":     sums{page: 9, crcs: []uint32{1, 2, 3}}.encode(),
	"damaged":  layerRecord{parent: 7, damaged: true}.encode(),
	"scrub":    scrubRecord{1 << 33, 7, 9}.encode(),
	"state":    encodeState([]byte("opaque")),
	"peer":     encodePeer(tag("r", 9)),
	"wil":      encodeWords(make([]uint64, groupRegions/64)),
	"super":    encodeSuper(poolRecord{formatVersion, "pool-1", "dir"}),
}

func TestRecordsDetectDamage(t *testing.T) {
	for name, b := range records {
		if again, err := decoders[name](b); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: %x becomes %x: %v", name, b, again, err)
		}
		for i := range b {
			if _, err := decoders[name](b[:i]); err == nil && i > 0 {
				t.Errorf("%s cut to %d bytes decodes", name, i)
			}
			for bit := range 8 {
				c := slices.Clone(b)
				c[i] ^= 1 << bit
				if _, err := decoders[name](c); err == nil {
					t.Errorf("%s with bit %d of byte %d flipped decodes", name, bit, i)
				}
			}
		}
	}
}

func FuzzRecords(f *testing.F) {
	for name, b := range records {
		f.Add(name, b)
	}
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		decode := decoders[name]
		if decode == nil {
			return
		}
		if again, err := decode(b); err == nil && !bytes.HasPrefix(b, again) {
			t.Fatalf("%s: %x becomes %x", name, b, again)
		}
	})
}

func TestPresence(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	var s presence
	model := map[uint32]bool{}
	for range 3000 {
		idx := rng.Uint32N(maxPages)
		if rng.IntN(2) == 0 {
			idx = []uint32{0, 63, 64, 1<<15 - 1, 1 << 15, maxPages - 1}[rng.IntN(6)]
		}
		if rng.IntN(3) > 0 {
			s.add(idx)
			model[idx] = true
		} else {
			s.remove(idx)
			delete(model, idx)
		}
		if s.has(idx) != model[idx] {
			t.Fatalf("page %d", idx)
		}
	}
	var got, want []uint32
	for idx, ok := s.next(0); ok; idx, ok = s.next(idx + 1) {
		got = append(got, idx)
	}
	for idx := range model {
		want = append(want, idx)
	}
	slices.Sort(want)
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%d pages, want %d", len(got), len(want))
	}
}
