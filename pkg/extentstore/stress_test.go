package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// slowFile makes races wide: it sometimes pauses before and after an operation.
type slowFile struct {
	*disk.Mem
	pause func()
}

func (f slowFile) ReadAt(p []byte, off int64) error {
	f.pause()
	defer f.pause()
	return f.Mem.ReadAt(p, off)
}

func (f slowFile) WriteAt(p []byte, off int64) error {
	f.pause()
	defer f.pause()
	return f.Mem.WriteAt(p, off)
}

// stress runs writers, cuts, clones, deletes and the background work at once, for a while, and reports the first thing
// that reads wrong.
func stress(broken rules, d time.Duration, seed uint64) (err error) {
	m := newMachine()
	pause := func() {
		if rand.IntN(8) == 0 {
			time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
		}
	}
	p, err := start("/memory", deps{file: slowFile{m.file, pause}, kv: m.kv, space: m.space},
		Options{Capacity: 2000 * layer.ExtentSize, CacheBytes: 1, MergeRate: 1 << 40, broken: broken})
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = p.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	const size = layer.PageSpan + 8*layer.ExtentSize
	if err := p.CreateReplica(ctx, ReplicaSpec{ID: "r", Volume: "v", Size: size}); err != nil {
		return err
	}
	dev, err := p.OpenReplica(ctx, "r")
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	// Each writer owns one block in four of the same extents: they meet in masks and slots, not in bytes.
	const writers = 4
	for k := range writers {
		rng := rand.New(rand.NewPCG(seed, uint64(k)))
		g.Go(func() error { return stressWriter(ctx, dev, k, writers, rng) })
	}
	g.Go(func() error { return stressSnapshots(ctx, p, rand.New(rand.NewPCG(seed, 99))) })
	g.Go(func() error { return stressClones(ctx, p, rand.New(rand.NewPCG(seed, 98))) })
	g.Go(func() error { return stressCheck(ctx, m) })
	g.Go(func() error {
		for ctx.Err() == nil {
			if err := dev.Flush(context.Background()); err != nil {
				return err
			}
			time.Sleep(time.Millisecond)
		}
		return nil
	})
	return g.Wait()
}

// stressWriter checks that a block that only it writes has what it wrote last.
func stressWriter(ctx context.Context, dev Device, k, writers int, rng *rand.Rand) error {
	want := map[int64]uint64{}
	buf, got := make([]byte, layer.BlockSize), make([]byte, layer.BlockSize)
	bg := context.Background() // requests are never cut off
	for n := uint64(1); ctx.Err() == nil; n++ {
		extent := []int64{0, 1, 2, 3, 127, 128, 129}[rng.IntN(7)]
		b := extent*layer.BlocksPerExtent + int64(rng.IntN(layer.BlocksPerExtent/writers)*writers+k)
		stamp := n<<8 | uint64(k) + 1
		var err error
		switch rng.IntN(5) {
		case 0:
			stamp = 0
			err = dev.Zero(bg, b*layer.BlockSize, layer.BlockSize)
		case 1: // less than a block: the rest stays as it was
			if want[b] == 0 {
				continue
			}
			stamp = want[b]
			fillStamp(buf, stamp)
			err = dev.WriteAt(bg, buf[512:1000], b*layer.BlockSize+512)
		default:
			fillStamp(buf, stamp)
			err = dev.WriteAt(bg, buf, b*layer.BlockSize)
		}
		if err != nil {
			return err
		}
		want[b] = stamp
		for c, s := range want {
			if c != b && rng.IntN(len(want)) > 2 {
				continue
			}
			if err := dev.ReadAt(bg, got, c*layer.BlockSize); err != nil {
				return err
			}
			if fillStamp(buf, s); !bytes.Equal(got, buf) {
				return fmt.Errorf("writer %d: block %d has %x, want %x", k, c, got[:16], buf[:16])
			}
		}
	}
	return nil
}

func fillStamp(b []byte, stamp uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], stamp)
	}
}

// snapshotSum reads all of a snapshot.
func snapshotSum(p *Pool, id volume.SnapshotID) (uint32, error) {
	s, err := p.OpenSnapshot(context.Background(), id)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	b := make([]byte, 8*layer.ExtentSize)
	var sum uint32
	for _, off := range []int64{0, layer.PageSpan - 2*layer.ExtentSize} {
		if err := s.ReadAt(context.Background(), b, off); err != nil {
			return 0, err
		}
		sum = crc32.Update(sum, layer.Castagnoli, b)
	}
	return sum, nil
}

// stressCheck sees that what a crash would find is whole at any moment. Checksums are left out: the data file is newer.
func stressCheck(ctx context.Context, m *machine) error {
	for ctx.Err() == nil {
		kv := m.kv.clone()
		for k := range kv.m {
			if k[0] == keySums {
				delete(kv.m, k)
			}
		}
		r, err := check(context.Background(), m.file, kv, nil)
		if err != nil {
			return err
		}
		for _, p := range r.Problems {
			if !strings.HasSuffix(p, "lost its checksums") {
				return fmt.Errorf("check: %s", p)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// stressSnapshots cuts and deletes, and sees that no snapshot ever changes.
func stressSnapshots(ctx context.Context, p *Pool, rng *rand.Rand) error {
	sums := map[volume.SnapshotID]uint32{}
	var ids []volume.SnapshotID
	for n := 0; ctx.Err() == nil; n++ {
		id := volume.SnapshotID(fmt.Sprintf("s%d", n))
		if err := p.Cut(context.Background(), "r", id); err != nil {
			return err
		}
		sum, err := snapshotSum(p, id)
		if err != nil {
			return err
		}
		sums[id], ids = sum, append(ids, id)
		for _, id := range ids {
			if sum, err := snapshotSum(p, id); err != nil || sum != sums[id] {
				return errors.Join(err, fmt.Errorf("snapshot %s has changed", id))
			}
		}
		for len(ids) > 3 {
			k := rng.IntN(len(ids))
			if err := p.DeleteSnapshot(context.Background(), ids[k], "", 0); errors.Is(err, volume.ErrBusy) {
				continue
			} else if err != nil {
				return err
			}
			ids = append(ids[:k], ids[k+1:]...)
		}
		time.Sleep(time.Duration(rng.IntN(5)) * time.Millisecond)
	}
	return nil
}

// stressClones makes and deletes clones of whatever snapshot there is: they get the slots that others free.
func stressClones(ctx context.Context, p *Pool, rng *rand.Rand) error {
	bg := context.Background()
	junk := bytes.Repeat([]byte{0xee}, 4*layer.ExtentSize)
	for n := 0; ctx.Err() == nil; n++ {
		p.mu.Lock()
		var parent volume.SnapshotID
		for id := range p.snapshots {
			parent = id
		}
		p.mu.Unlock()
		id := volume.ReplicaID(fmt.Sprintf("c%d", n))
		err := p.CreateReplica(bg, ReplicaSpec{ID: id, Volume: "c", Size: layer.PageSpan + 8*layer.ExtentSize, Parent: parent})
		if errors.Is(err, volume.ErrNotFound) {
			continue
		} else if err != nil {
			return err
		}
		dev, err := p.OpenReplica(bg, id)
		if err != nil {
			return err
		}
		for range 3 {
			off := int64(rng.IntN(3)) * layer.ExtentSize
			err = errors.Join(err, dev.WriteAt(bg, junk, off), dev.Zero(bg, off, layer.ExtentSize))
		}
		if err = errors.Join(err, dev.Close(), p.DeleteReplica(bg, id)); err != nil {
			return err
		}
	}
	return nil
}

func TestStress(t *testing.T) {
	if err := stress(rules{}, 2*time.Second, uint64(time.Now().UnixNano())); err != nil {
		t.Fatal(err)
	}
}

// TestStressFindsBrokenRules is TestRules for what only goes wrong where things happen at once.
func TestStressFindsBrokenRules(t *testing.T) {
	for name, broken := range map[string]rules{
		"reuseBeforeGrace":  {reuseBeforeGrace: true},
		"cutWithoutBarrier": {cutWithoutBarrier: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(10) {
				if err := stress(broken, 3*time.Second, seed); err != nil {
					t.Logf("found: %v", err)
					return
				}
			}
			t.Error("nothing noticed that the rule is broken")
		})
	}
}

// copyHook calls back before the first read of a slot's second block.
type copyHook struct {
	*disk.Mem
	off  int64
	hook func()
}

func (f *copyHook) ReadAt(p []byte, off int64) error {
	err := f.Mem.ReadAt(p, off)
	if off == f.off && f.hook != nil {
		hook := f.hook
		f.hook = nil
		hook()
	}
	return err
}

// mergeRace writes a block that a merge is about to copy into the head: the write must win.
func mergeRace(broken rules) error {
	m := newMachine()
	file := &copyHook{Mem: m.file}
	p, err := start("/memory", deps{file: file, kv: m.kv, space: m.space}, Options{Capacity: 64 * mib, broken: broken, manual: true})
	if err != nil {
		return err
	}
	defer p.Close()
	ctx := context.Background()
	if err := p.CreateReplica(ctx, ReplicaSpec{ID: "r", Volume: "v", Size: mib}); err != nil {
		return err
	}
	dev, err := p.OpenReplica(ctx, "r")
	if err != nil {
		return err
	}
	old, now := bytes.Repeat([]byte{1}, layer.BlockSize), bytes.Repeat([]byte{2}, layer.BlockSize)
	if err := errors.Join(dev.WriteAt(ctx, old, layer.BlockSize), p.Cut(ctx, "r", "s"), dev.WriteAt(ctx, old, 0), p.DeleteSnapshot(ctx, "s", "", 0)); err != nil {
		return err
	}
	written := make(chan error, 1)
	file.off = layer.Slot(1).Offset() + layer.BlockSize
	file.hook = func() {
		go func() { written <- dev.WriteAt(ctx, now, layer.BlockSize) }()
		select { // kept out, it is not done before the merge of the extent is
		case err := <-written:
			written <- err
		case <-time.After(50 * time.Millisecond):
		}
	}
	for more := true; more; {
		if more, err = p.step(); err != nil {
			return err
		}
	}
	if file.hook != nil {
		return errors.New("the merge copied nothing")
	}
	if err := <-written; err != nil {
		return err
	}
	got := make([]byte, layer.BlockSize)
	if err := dev.ReadAt(ctx, got, layer.BlockSize); err != nil || !bytes.Equal(got, now) {
		return errors.Join(err, errors.New("a merge has overwritten a newer write"))
	}
	return nil
}

func TestMergeKeepsWritersOut(t *testing.T) {
	must(t, mergeRace(rules{}))
	if err := mergeRace(rules{mergeWithoutLock: true}); err == nil {
		t.Error("nothing noticed that the rule is broken")
	} else {
		t.Logf("found: %v", err)
	}
}
