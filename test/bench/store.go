package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/volume"
	"github.com/ballast-csi/ballast/test/harness"
)

const (
	storeSize  = 1 << 30
	storeBlock = 4096
	// storeFor is how long one cell of the table runs; the median of storeRounds is shown.
	storeFor    = 3 * time.Second
	storeRounds = 3
	// manyExtents is how many extents the snapshot's volume has, memory permitting.
	manyExtents = 1_000_000
	extentSize  = 64 << 10
)

// target is what is written to: a volume of the store, or a plain file opened as the store opens its own.
type target struct {
	write func(p []byte, off int64) error
	sync  func() error
}

// benchStore measures the extent store alone, against plain files, and the time of a snapshot.
func benchStore(ctx context.Context, w io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fmt.Fprintf(w, "## Extent store\n\n4 KiB random writes to 1 GiB for %v and one flush at the end, through the store directly, and to a plain file on the "+
		"same filesystem opened the same way (O_DIRECT). Both in turns; medians of %d.\n\n", storeFor, storeRounds)
	fmt.Fprintf(w, "| Volume | QD | store | plain file | ratio |\n|---|---|---|---|---|\n")
	for _, state := range []string{"fresh", "filled", "after a snapshot"} {
		for _, depth := range []int{1, 32} {
			if err := storeRow(ctx, w, dir, state, depth); err != nil {
				return fmt.Errorf("%s, QD %d: %w", state, depth, err)
			}
		}
	}
	fmt.Fprintln(w)
	return storeSnapshots(ctx, w)
}

func storeRow(ctx context.Context, w io.Writer, dir, state string, depth int) error {
	var store, plain []float64
	for round := range storeRounds {
		one := filepath.Join(dir, "round")
		err := withPool(ctx, filepath.Join(one, "pool"), extentstore.Options{}, func(p *extentstore.Pool) error {
			v, err := newVolume(ctx, p, "v", storeSize)
			if err != nil {
				return err
			}
			t := target{
				write: func(b []byte, off int64) error { return v.WriteAt(ctx, b, off) },
				sync:  func() error { return v.Flush(ctx) },
			}
			err = storePrepare(state, t)
			if err == nil && state == "after a snapshot" {
				err = p.Cut(ctx, "v", "s")
			}
			if err == nil {
				var iops float64
				iops, err = randomWrites(ctx, t, depth, uint64(round))
				store = append(store, iops)
			}
			return errors.Join(err, v.Close())
		})
		if err != nil {
			return errors.Join(err, os.RemoveAll(one))
		}
		f, err := disk.OpenFile(filepath.Join(one, "plain"), disk.Options{})
		if err != nil {
			return err
		}
		t := target{write: f.WriteAt, sync: f.Sync}
		err = f.Grow(storeSize)
		if err == nil {
			err = storePrepare(state, t)
		}
		if err == nil {
			var iops float64
			iops, err = randomWrites(ctx, t, depth, uint64(round))
			plain = append(plain, iops)
		}
		if err := errors.Join(err, f.Close(), os.RemoveAll(one)); err != nil {
			return err
		}
	}
	s, p := median(store), median(plain)
	fmt.Fprintf(w, "| %s | %d | %.1fk IOPS | %.1fk IOPS | %.2f |\n", state, depth, s/1000, p/1000, s/p)
	return nil
}

// storePrepare fills what is to be filled, and has it on disk.
func storePrepare(state string, t target) error {
	if state == "fresh" {
		return nil
	}
	b := disk.Aligned(1 << 20)
	for i := range b {
		b[i] = byte(i * 31)
	}
	for off := int64(0); off < storeSize; off += int64(len(b)) {
		if err := t.write(b, off); err != nil {
			return err
		}
	}
	return t.sync()
}

// randomWrites returns writes per second.
func randomWrites(ctx context.Context, t target, depth int, seed uint64) (float64, error) {
	var count atomic.Int64
	var mu sync.Mutex
	var first error
	var wg sync.WaitGroup
	from := time.Now()
	for i := range depth {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			b := disk.Aligned(storeBlock)
			b[0] = byte(i)
			for time.Since(from) < storeFor && ctx.Err() == nil {
				if err := t.write(b, r.Int64N(storeSize/storeBlock)*storeBlock); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	if first == nil {
		first = errors.Join(t.sync(), ctx.Err())
	}
	return float64(count.Load()) / time.Since(from).Seconds(), first
}

// withPool runs fn with a new pool.
func withPool(ctx context.Context, dir string, o extentstore.Options, fn func(*extentstore.Pool) error) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	o.Logger = slog.New(slog.DiscardHandler)
	p, err := extentstore.Open(ctx, dir, o)
	if err != nil {
		return err
	}
	return errors.Join(fn(p), p.Close())
}

func newVolume(ctx context.Context, p *extentstore.Pool, id string, size int64) (extentstore.Device, error) {
	err := p.CreateReplica(ctx, extentstore.ReplicaSpec{
		ID: volume.ReplicaID(id), Volume: volume.ID(id), Tenant: "bench", Size: size,
	})
	if err != nil {
		return nil, err
	}
	return p.OpenReplica(ctx, volume.ReplicaID(id))
}

// memoryDir is a filesystem in memory.
const memoryDir = "/dev/shm"

// storeSnapshots measures how long a snapshot takes, and how long the writes of a writer who goes on are held up by it.
// The pool is a raw disk in memory: what grows with the number of extents, if anything does, is the store's own work, and
// a real disk would have to hold 64 GiB for a million of them.
func storeSnapshots(ctx context.Context, w io.Writer) error {
	fmt.Fprintf(w, "Snapshot of a volume that is written to (4 KiB, QD 4), flushed before, on a RAM disk:\n\n")
	fmt.Fprintf(w, "| Extents | snapshot | longest write during it | p99 write without |\n|---|---|---|---|\n")
	var st unix.Statfs_t
	if err := unix.Statfs(memoryDir, &st); err != nil {
		return err
	}
	// Each extent takes a block, and some for the database and the filesystem.
	most := int64(st.Bavail) * st.Bsize / (3 * storeBlock)
	for _, extents := range []int64{1000, min(manyExtents, most)} {
		err := withMemoryDisk(ctx, extents*extentSize+4<<30, func(device, dir string) error {
			return withPool(ctx, dir, extentstore.Options{Kind: volume.PoolDisk, Device: device}, func(p *extentstore.Pool) error {
				v, err := newVolume(ctx, p, "v", 1<<40)
				if err != nil {
					return err
				}
				return errors.Join(snapshotRow(ctx, w, p, v, extents), v.Close())
			})
		})
		if err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	return nil
}

// withMemoryDisk runs fn with a loop device on a sparse file in memory, and an empty directory.
func withMemoryDisk(ctx context.Context, size int64, fn func(device, dir string) error) (err error) {
	top, err := os.MkdirTemp(memoryDir, "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, harness.Sweep(top))
		if !mountsLeft(top) {
			err = errors.Join(err, os.RemoveAll(top))
		}
	}()
	file, dir := filepath.Join(top, "disk"), filepath.Join(top, "pool")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("losetup: %w: %s", err, out)
	}
	return fn(strings.TrimSpace(string(out)), dir)
}

func snapshotRow(ctx context.Context, w io.Writer, p *extentstore.Pool, v extentstore.Device, extents int64) error {
	if err := inParallel(16, 16, func(i int) error {
		b := disk.Aligned(storeBlock)
		b[0] = 1
		for n := int64(i); n < extents && ctx.Err() == nil; n += 16 {
			if err := v.WriteAt(ctx, b, n*extentSize); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := errors.Join(ctx.Err(), v.Flush(ctx)); err != nil {
		return err
	}
	// The writers note each write with its end, so that those during the cut can be told from the others.
	type write struct {
		end  time.Time
		took time.Duration
	}
	var mu sync.Mutex
	var writes []write
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		done <- inParallel(4, 4, func(i int) error {
			r := rand.New(rand.NewPCG(7, uint64(i)))
			b := disk.Aligned(storeBlock)
			for !stop.Load() {
				from := time.Now()
				if err := v.WriteAt(ctx, b, r.Int64N(extents)*extentSize); err != nil {
					return err
				}
				end := time.Now()
				mu.Lock()
				writes = append(writes, write{end, end.Sub(from)})
				mu.Unlock()
			}
			return nil
		})
	}()
	time.Sleep(time.Second)
	from := time.Now()
	err := p.Cut(ctx, "v", "s")
	took := time.Since(from)
	time.Sleep(100 * time.Millisecond)
	stop.Store(true)
	if err := errors.Join(err, <-done); err != nil {
		return err
	}
	var longest time.Duration
	var before samples
	for _, x := range writes {
		switch {
		case x.end.Before(from):
			before = append(before, x.took)
		case x.end.Add(-x.took).Before(from.Add(took)):
			longest = max(longest, x.took)
		}
	}
	fmt.Fprintf(w, "| %d | %.1f ms | %.1f ms | %.2f ms |\n", extents, float64(took)/1e6, float64(longest)/1e6, float64(before.at(99))/1e6)
	return nil
}

func median(v []float64) float64 {
	s := samples{}
	for _, x := range v {
		s = append(s, time.Duration(x))
	}
	return float64(s.at(50))
}
