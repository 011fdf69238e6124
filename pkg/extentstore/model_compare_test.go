package extentstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// readAll reads the hot places.
func readAll(dev Device, size int64, fn func(b int64, p []byte) error) error {
	buf := make([]byte, layer.ExtentSize)
	for x := int64(0); x < 140; x++ {
		if x == 7 {
			x = 126 // nothing reaches from the hot extents to those between
		}
		n := min(layer.ExtentSize, size-x*layer.ExtentSize)
		if n <= 0 {
			break
		}
		if err := dev.ReadAt(context.Background(), buf[:n], x*layer.ExtentSize); err != nil {
			return err
		}
		for at := int64(0); at < n; at += layer.BlockSize {
			if err := fn((x*layer.ExtentSize+at)/layer.BlockSize, buf[at:at+layer.BlockSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

// compareVolume compares the bytes; after a crash each sector may be what was last flushed or anything newer, and what
// is found is taken over.
func (w *world) compareVolume(v *modelVolume, crashed bool) error {
	if !crashed {
		return readAll(v.dev, v.size(), func(b int64, p []byte) error {
			if !bytes.Equal(p, v.now(b)) {
				return fmt.Errorf("block %d of %s is %x, want %x", b, v.id, p[:16], v.now(b)[:16])
			}
			return nil
		})
	}
	if !slices.Contains(v.sizes, v.dev.Size()) {
		return fmt.Errorf("size of %s is %d, want one of %v", v.id, v.dev.Size(), v.sizes)
	}
	v.sizes = []int64{v.dev.Size()}
	grain := 512
	if w.m.file.TearAt == disk.BlockSize {
		grain = disk.BlockSize
	}
	return readAll(v.dev, v.size(), func(b int64, p []byte) error {
		may := v.blocks[b]
		if may == nil {
			may = [][]byte{zeros[:]}
		}
		for i := 0; i < len(p); i += grain {
			if !slices.ContainsFunc(may, func(m []byte) bool { return bytes.Equal(m[i:i+grain], p[i:i+grain]) }) {
				return fmt.Errorf("block %d of %s holds %x at %d after the crash, which is none of the %d values since the last flush, e.g. %x",
					b, v.id, p[i:i+16], i, len(may), may[0][i:i+16])
			}
		}
		if v.blocks[b] != nil || !bytes.Equal(p, zeros[:]) {
			v.blocks[b] = [][]byte{slices.Clone(p)}
		}
		return nil
	})
}

func (w *world) compareSnapshot(s *modelSnapshot) error {
	dev, err := w.p.OpenSnapshot(context.Background(), s.id)
	if err != nil {
		return err
	}
	defer dev.Close()
	if dev.Size() != s.size {
		return fmt.Errorf("size of %s is %d, want %d", s.id, dev.Size(), s.size)
	}
	return readAll(dev, s.size, func(b int64, p []byte) error {
		want := s.blocks[b]
		if want == nil {
			want = zeros[:]
		}
		if !bytes.Equal(p, want) {
			return fmt.Errorf("block %d of snapshot %s is %x, want %x", b, s.id, p[:16], want[:16])
		}
		return nil
	})
}

// diff compares a random pair of snapshots on one chain, or the data of one.
func (w *world) diff() error {
	s, ok := pick(w.rng, w.snaps)
	if !ok {
		return nil
	}
	touched := map[int64]bool{}
	var base *modelSnapshot
	for up := s; up != nil; up = up.parent {
		if up != s && w.snaps[up.id] != nil && w.rng.IntN(2) == 0 {
			base = up
			break
		}
		maps.Copy(touched, up.touched)
	}
	var id volume.SnapshotID
	var old map[int64][]byte
	if base != nil {
		id, old = base.id, base.blocks
	}
	from := int64(0)
	if w.rng.IntN(2) == 0 {
		from = w.rng.Int64N(s.size)
	}
	got, end := map[int64]bool{}, int64(-1)
	err := w.p.Extents(context.Background(), s.id, id, from, func(off, n int64) error {
		if off <= end || off < from || n <= 0 || off+n > s.size {
			return fmt.Errorf("run %d+%d after one that ends at %d, from %d", off, n, end, from)
		}
		end = off + n
		for b := off / layer.BlockSize; b*layer.BlockSize < end; b++ {
			got[b] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	for b := from / layer.BlockSize; b*layer.BlockSize < s.size; b++ {
		is, was := s.blocks[b], old[b]
		if is == nil {
			is = zeros[:]
		}
		if was == nil {
			was = zeros[:]
		}
		if !bytes.Equal(is, was) && !got[b] {
			return fmt.Errorf("block %d differs between %q and %s, and is not in the difference", b, id, s.id)
		}
		if got[b] && !touched[b] {
			return fmt.Errorf("block %d is in the difference of %q and %s, and was not touched", b, id, s.id)
		}
	}
	return nil
}

// verify compares everything that there is, and checks the pool's own books.
func (w *world) verify(crashed bool) error {
	for _, v := range w.vols {
		if err := errors.Join(w.compareVolume(v, crashed), w.compareJournal(v, crashed)); err != nil {
			return err
		}
	}
	for _, s := range w.snaps {
		if err := w.compareSnapshot(s); err != nil {
			return err
		}
	}
	if len(w.p.Replicas()) != len(w.vols) || len(w.p.snapshots) != len(w.snaps) {
		return fmt.Errorf("%d replicas and %d snapshots, want %d and %d", len(w.p.Replicas()), len(w.p.snapshots), len(w.vols), len(w.snaps))
	}
	return nil
}

// quiet does all background work and sees that nothing leaked.
func (w *world) quiet() error {
	for more := true; more; {
		var err error
		if more, err = w.p.step(); err != nil {
			return err
		}
	}
	for _, v := range w.vols {
		if err := w.p.flush(v.dev.r.head.Load()); err != nil {
			return err
		}
	}
	r, err := check(context.Background(), w.m.file, w.m.kv, nil)
	if err != nil || len(r.Problems) > 0 {
		return fmt.Errorf("check: %v %v", r.Problems, err)
	}
	a := &w.p.alloc
	if int64(a.used) != r.Extents || a.used+a.ready.Free()+a.holes.Free() != int(w.m.file.Size()/layer.ExtentSize)-1 {
		return fmt.Errorf("%d slots used, %d ready, %d holes of %d; pages have %d", a.used, a.ready.Free(), a.holes.Free(),
			w.m.file.Size()/layer.ExtentSize-1, r.Extents)
	}
	var sum int64
	u := w.p.Usage()
	for _, n := range u.Replicas {
		sum += n
	}
	for _, n := range u.Snapshots {
		sum += n
	}
	if sum != r.Extents*layer.ExtentSize || u.Deleted != 0 {
		return fmt.Errorf("usage is %d, pages have %d slots; %d deleted", sum, r.Extents, u.Deleted)
	}
	if r.Unreferenced != 0 || w.mergeable() {
		return fmt.Errorf("%d layers are left over", r.Unreferenced)
	}
	return nil
}

func (w *world) mergeable() bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(w.p.layers)), (*chain).mergeable)
}
