package extentstore

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const benchSize = 1 << 30

// randomIO runs 4 KiB requests at that many at once.
func randomIO(b *testing.B, depth int, do func(p []byte, off int64) error) {
	b.SetBytes(block.Size)
	b.ResetTimer()
	start := time.Now()
	var left atomic.Int64
	left.Store(int64(b.N))
	errs := make(chan error, depth)
	for k := range depth {
		go func() {
			rng := rand.New(rand.NewPCG(uint64(k), uint64(b.N)))
			p := disk.Aligned(block.Size)
			for left.Add(-1) >= 0 {
				if err := do(p, rng.Int64N(benchSize/block.Size)*block.Size); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range depth {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "IOPS")
}

// BenchmarkRandom4K compares a replica with a plain file that is opened the same way and preallocated or not.
func BenchmarkRandom4K(b *testing.B) {
	for _, depth := range []int{1, 32} {
		for _, filled := range []bool{false, true} {
			b.Run(fmt.Sprintf("depth=%d/plain filled=%v", depth, filled), func(b *testing.B) {
				f, err := disk.OpenFile(filepath.Join(b.TempDir(), "plain"), disk.Options{})
				must(b, err)
				defer f.Close()
				must(b, f.Grow(benchSize))
				if filled {
					fill(b, func(p []byte, off int64) error { return f.WriteAt(p, off) })
					must(b, f.Sync())
				}
				randomIO(b, depth, func(p []byte, off int64) error { return f.WriteAt(p, off) })
			})
		}
		for _, state := range []string{"fresh", "filled", "snapshot"} {
			b.Run(fmt.Sprintf("depth=%d/replica %s", depth, state), func(b *testing.B) {
				p := openDir(b, b.TempDir(), Options{Capacity: 4 * benchSize})
				defer func() { must(b, p.Close()) }()
				d := newReplica(b, p, "r", benchSize, "")
				write := func(q []byte, off int64) error { return d.WriteAt(b.Context(), q, off) }
				if state != "fresh" {
					fill(b, write)
					must(b, d.Flush(b.Context()))
				}
				if state == "snapshot" {
					must(b, p.Cut(b.Context(), "r", "s"))
				}
				randomIO(b, depth, write)
			})
		}
	}
}

func fill(b *testing.B, write func(p []byte, off int64) error) {
	p := disk.Aligned(mib)
	for i := range p {
		p[i] = byte(i)
	}
	for off := int64(0); off < benchSize; off += mib {
		must(b, write(p, off))
	}
}

// BenchmarkFlush is a write and a flush, as a database's commit is.
func BenchmarkFlush(b *testing.B) {
	p := openDir(b, b.TempDir(), Options{Capacity: benchSize})
	defer func() { must(b, p.Close()) }()
	d := newReplica(b, p, "r", benchSize, "")
	f, err := disk.OpenFile(filepath.Join(b.TempDir(), "plain"), disk.Options{})
	must(b, err)
	defer f.Close()
	must(b, f.Grow(benchSize))
	b.Run("plain", func(b *testing.B) {
		randomIO(b, 1, func(q []byte, off int64) error {
			must(b, f.WriteAt(q, off%(64*mib)))
			return f.Sync()
		})
	})
	b.Run("replica", func(b *testing.B) {
		randomIO(b, 1, func(q []byte, off int64) error {
			must(b, d.WriteAt(b.Context(), q, off%(64*mib)))
			return d.Flush(b.Context())
		})
	})
}

// millionExtents makes a machine with a volume of 1 TiB and a million extents in it, each with one block.
func millionExtents(b *testing.B) (dir string) {
	dir = b.TempDir()
	p := openDir(b, dir, Options{Capacity: 128 << 30, manual: true})
	must(b, p.CreateReplica(b.Context(), ReplicaSpec{ID: "r", Volume: "v", Size: 1 << 40}))
	head := p.replicas["r"].head.Load().id
	const pages = 1 << 17 // of 8 extents each: 2^20
	var units [][]op
	slot := layer.Slot(1)
	for idx := range uint32(pages) {
		var pg layer.Page
		for i := range 8 {
			pg[i*16] = layer.Entry{Slot: slot, Data: 1}
			slot++
		}
		units = append(units, []op{{pageKey(keyPage, head, idx), pg.Append(nil)}})
	}
	must(b, p.store(units))
	must(b, p.Close())
	return dir
}

// BenchmarkMillionExtents is the opening of a pool, and a snapshot of a volume that is being written.
func BenchmarkMillionExtents(b *testing.B) {
	dir := millionExtents(b)
	o := Options{Capacity: 128 << 30, Reserve: mib}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			p, err := Open(b.Context(), dir, o)
			must(b, err)
			b.StopTimer()
			must(b, p.Close())
			b.StartTimer()
		}
	})
	p, err := Open(b.Context(), dir, o)
	must(b, err)
	defer func() { must(b, p.Close()) }()
	d, err := p.OpenReplica(b.Context(), "r")
	must(b, err)
	b.Run("snapshot", func(b *testing.B) {
		rng := rand.New(rand.NewPCG(1, 1))
		buf := bytes.Repeat([]byte{1}, block.Size)
		for n := 0; b.Loop(); n++ {
			b.StopTimer()
			for range 100 {
				must(b, d.WriteAt(b.Context(), buf, rng.Int64N(1<<40/layer.ExtentSize)*layer.ExtentSize))
			}
			b.StartTimer()
			must(b, p.Cut(b.Context(), "r", volume.SnapshotID(fmt.Sprintf("s%d", n))))
		}
	})
}

// BenchmarkDeepChain reads through a thousand snapshots, each with a block of the same page: one that the head has, and
// one that only the first has.
func BenchmarkDeepChain(b *testing.B) {
	m := newMachine()
	p, err := m.open(Options{Capacity: 1 << 30, manual: true})
	must(b, err)
	defer func() { must(b, p.Close()) }()
	d := newReplica(b, p, "r", 64*mib, "")
	buf := make([]byte, block.Size)
	for i := range int64(1000) {
		must(b, d.WriteAt(b.Context(), buf, 0))
		must(b, d.WriteAt(b.Context(), buf, (1+i)*block.Size))
		must(b, p.Cut(b.Context(), "r", volume.SnapshotID(fmt.Sprintf("s%d", i))))
	}
	must(b, d.WriteAt(b.Context(), buf, 0))
	for name, off := range map[string]int64{"head": 0, "bottom": block.Size} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				must(b, d.ReadAt(b.Context(), buf, off))
			}
		})
	}
}

// BenchmarkJournal is what the replication protocol adds to writes: a mark of a region that is not in the write-intent log,
// one that is, and a note of what an absent peer misses.
func BenchmarkJournal(b *testing.B) {
	p := openDir(b, b.TempDir(), Options{Capacity: benchSize})
	defer func() { must(b, p.Close()) }()
	d := newReplica(b, p, "r", 1<<40, "")
	var next atomic.Uint32
	mark := func(b *testing.B) {
		i := next.Add(1) % (1 << 20)
		must(b, d.MarkWIL(b.Context(), runs(i, 1)))
		must(b, d.ClearWIL(b.Context(), runs(i, 1)))
	}
	b.Run("mark", func(b *testing.B) {
		for b.Loop() {
			mark(b)
		}
	})
	b.Run("mark depth=32", func(b *testing.B) {
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				mark(b)
			}
		})
	})
	b.Run("marked", func(b *testing.B) {
		must(b, d.MarkWIL(b.Context(), runs(7, 1)))
		for b.Loop() {
			must(b, d.MarkWIL(b.Context(), runs(7, 1)))
		}
	})
	must(b, d.TrackMissed(b.Context(), tag("absent", 1)))
	b.Run("note", func(b *testing.B) {
		rng := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			d.NoteMissed("absent", rng.Int64N(1<<28)*block.Size, block.Size)
		}
	})
	b.Run("open", func(b *testing.B) {
		must(b, p.CreateReplica(b.Context(), ReplicaSpec{ID: "plain", Volume: "v", Size: mib}))
		for b.Loop() {
			r, err := p.OpenReplica(b.Context(), "plain")
			must(b, err)
			must(b, r.Close())
		}
	})
}
