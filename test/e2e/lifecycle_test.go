package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/harness"
)

// TestKillDuringLifecycle kills the daemon at random moments while workers take volumes through everything that a
// volume can meet.
func TestKillDuringLifecycle(t *testing.T) {
	const stream = 1
	r := random(t, stream)
	b := newBed(t, 2*time.Minute)

	ctx, fail := context.WithCancelCause(b.ctx)
	defer fail(nil)
	var calm atomic.Bool // set when the killing is over: workers finish what they are at
	var ids idList
	var laps atomic.Int64
	var wg sync.WaitGroup
	for i, fsType := range []string{"ext4", "xfs", "", ""} {
		w := &worker{
			bed: b, name: fmt.Sprintf("w%d", i), fsType: fsType, ids: &ids,
			r: rand.New(rand.NewPCG(seed, uint64(stream*1000+i))),
		}
		wg.Go(func() {
			for !calm.Load() && ctx.Err() == nil {
				if err := w.lap(ctx); err != nil {
					fail(fmt.Errorf("%s (%q), lap %d, after %s: %w", w.name, w.fsType, w.laps, w.at, err))
					return
				}
				laps.Add(1)
			}
		})
	}

	kills := 0
	for end := time.Now().Add(bounded(t, 75*time.Second)); time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(time.Duration(50+r.IntN(2500)) * time.Millisecond)
		if err := b.Kill(); err != nil {
			fail(err)
			break
		}
		kills++
		time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
		if err := b.Start(ctx); err != nil && ctx.Err() == nil {
			fail(err)
			break
		}
	}
	calm.Store(true)
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		t.Fatalf("after %d kills and %d laps: %v", kills, laps.Load(), err)
	}
	t.Logf("%d kills, %d laps; failed attempts:\n%s", kills, laps.Load(), b.tally.String())
	b.nothingLeft(t, ids.all()...)
}

// idList collects the ids of volumes that existed.
type idList struct {
	mu  sync.Mutex
	ids []string
}

func (l *idList) add(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ids = append(l.ids, id)
}

func (l *idList) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ids
}

// worker takes one volume at a time through its life.
type worker struct {
	*bed
	name   string
	fsType string
	r      *rand.Rand
	ids    *idList
	laps   int
	at     string // the step that was begun last
}

func (w *worker) step(format string, args ...any) { w.at = fmt.Sprintf(format, args...) }

func (w *worker) size() int64 {
	if w.fsType == "xfs" {
		return xfsSize
	}
	return extSize
}

// lap is one life: create, use, snapshot, restore, clone, expand, delete.
func (w *worker) lap(ctx context.Context) error {
	w.laps++
	c := &harness.Claim{Name: fmt.Sprintf("%s-%d", w.name, w.laps), Size: w.size(), FSType: w.fsType}
	load := newWorkload(w.fsType, c.Size)
	w.step("up")
	if err := w.up(ctx, c, load); err != nil {
		return err
	}
	if err := w.use(ctx, c, load, 1+w.r.IntN(3)); err != nil {
		return err
	}

	w.step("snapshot")
	cut := load.fork()
	snap, err := w.o.Snapshot(ctx, c, c.Name+"-snap")
	if err != nil {
		return err
	}
	if err := w.use(ctx, c, load, 1+w.r.IntN(2)); err != nil {
		return err
	}
	if w.r.IntN(2) == 0 {
		if err := w.copyOf(ctx, c, harness.FromSnapshot(snap), "restored", cut.fork()); err != nil {
			return err
		}
	}
	if w.r.IntN(2) == 0 {
		w.step("expand")
		if err := w.expand(ctx, c); err != nil {
			return err
		}
		if err := w.use(ctx, c, load, 1); err != nil {
			return err
		}
	}
	if w.r.IntN(2) == 0 {
		if err := w.copyOf(ctx, c, harness.FromVolume(c.ID()), "clone", load.fork()); err != nil {
			return err
		}
	}
	w.step("again")
	if err := w.o.Again(ctx, c); err != nil {
		return err
	}
	if err := w.use(ctx, c, load, 0); err != nil {
		return err
	}
	w.step("down")
	if err := w.o.Down(ctx, c); err != nil {
		return err
	}

	// Source before snapshot, or after it.
	if w.r.IntN(2) == 0 {
		w.step("delete the volume first")
		if err := w.o.Delete(ctx, c); err != nil {
			return err
		}
		if err := w.copyOf(ctx, c, harness.FromSnapshot(snap), "orphan", cut); err != nil {
			return err
		}
		w.step("delete the snapshot")
		return w.o.DeleteSnapshot(ctx, snap)
	}
	w.step("delete the snapshot first")
	if err := w.o.DeleteSnapshot(ctx, snap); err != nil {
		return err
	}
	w.step("delete the volume")
	return w.o.Delete(ctx, c)
}

// copyOf makes a volume from a source, looks at it, uses it, and deletes it.
func (w *worker) copyOf(ctx context.Context, of *harness.Claim, source *csi.VolumeContentSource, what string, load workload) error {
	w.step("up of the %s", what)
	c := &harness.Claim{Name: of.Name + "-" + what, Size: of.Size, FSType: of.FSType, Source: source}
	if err := w.up(ctx, c, load); err != nil {
		return err
	}
	if err := w.use(ctx, c, load, 1); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	w.step("down of the %s", what)
	if err := w.o.Down(ctx, c); err != nil {
		return err
	}
	w.step("delete of the %s", what)
	return w.o.Delete(ctx, c)
}

func (w *worker) up(ctx context.Context, c *harness.Claim, load workload) error {
	if err := w.o.Up(ctx, c); err != nil {
		return err
	}
	w.ids.add(c.ID())
	return w.verify(ctx, c, load)
}

// use writes some rounds and reads everything back.
func (w *worker) use(ctx context.Context, c *harness.Claim, load workload, rounds int) error {
	for range rounds {
		w.step("write to %s", c.Name)
		if err := load.write(w.r, w.o.TargetPath(c)); err == nil {
			continue
		}
		// The device died under the workload. Its replacement finds what was flushed.
		if err := w.revive(ctx, c); err != nil {
			return err
		}
		if err := w.verify(ctx, c, load); err != nil {
			return err
		}
	}
	return w.verify(ctx, c, load)
}

func (w *worker) revive(ctx context.Context, c *harness.Claim) error {
	w.step("revive %s", c.Name)
	return w.o.Again(ctx, c)
}

func (w *worker) verify(ctx context.Context, c *harness.Claim, load workload) error {
	for end := time.Now().Add(w.o.Patience); ; {
		w.step("verify %s", c.Name)
		err := load.verify(w.o.TargetPath(c))
		if err == nil || errors.Is(err, errLost) || time.Now().After(end) {
			return err
		}
		if err := w.revive(ctx, c); err != nil {
			return err
		}
	}
}

// expand grows the volume: while it is in use, except ext4, whose growing the kernel refuses in some containers.
func (w *worker) expand(ctx context.Context, c *harness.Claim) error {
	before, err := w.total(ctx, c)
	if err != nil {
		return err
	}
	size := c.Size + 16*mib
	if w.fsType == "ext4" {
		if err := w.o.Down(ctx, c); err != nil {
			return err
		}
		if err := w.o.Expand(ctx, c, size, false); err != nil {
			return err
		}
		if err := w.o.Again(ctx, c); err != nil {
			return err
		}
	} else {
		if err := w.o.Expand(ctx, c, size, false); err != nil {
			return err
		}
		one := *w.o
		one.Patience = 0
		if err := one.NodeExpand(ctx, c, size); err != nil {
			// The device may be dead; what stages it again grows it too.
			if err := w.revive(ctx, c); err != nil {
				return err
			}
		}
	}
	after, err := w.total(ctx, c)
	if err == nil && after < before+8*mib {
		err = fmt.Errorf("%s shows %d bytes after it was expanded by 16 MiB from %d", c.Name, after, before)
	}
	return err
}

// total is what the workload sees: the device's or the filesystem's size in bytes.
func (w *worker) total(ctx context.Context, c *harness.Claim) (n int64, err error) {
	for end := time.Now().Add(w.o.Patience); ; {
		if n, err = visible(c.FSType, w.o.TargetPath(c)); err == nil || time.Now().After(end) {
			return n, err
		}
		if err := w.revive(ctx, c); err != nil {
			return 0, err
		}
	}
}
