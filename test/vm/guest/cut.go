package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/test/vm/report"
)

// cutWork is the work during which the power is cut: a raw volume and a filesystem volume are written to, while
// snapshots of the raw one come and go. A third volume is written and discarded without ever a flush: nothing of it is
// promised, except that it never shows the bytes of another volume or place; it keeps the disk's cache full.
type cutWork struct {
	pool  string // filesystem of the pool's disk
	raw   *vol
	fs    *vol
	noise *vol
	data  pattern // of raw
	gens  files   // in fs
	loose pattern // of noise
}

func newCutWork(flags *flag.FlagSet, args []string) (*cutWork, error) {
	w := &cutWork{
		raw:   &vol{name: "raw", size: 32 * mib},
		fs:    &vol{name: "files", size: 320 * mib},
		noise: &vol{name: "noise", size: 32 * mib},
		data:  pattern{zeros: true},
		loose: pattern{zeros: true},
	}
	flags.StringVar(&w.pool, "pool", "ext4", "filesystem of the pool's disk")
	flags.StringVar(&w.fs.fstype, "fs", "ext4", "filesystem of the volume")
	seed := flags.Uint64("seed", 1, "of all that is random")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	w.data.seed, w.data.blocks = *seed, w.raw.size/block
	w.loose.seed, w.loose.blocks = *seed+1, w.noise.size/block
	w.gens = files{seed: *seed, dir: w.fs.target()}
	return w, nil
}

// keepSnapshots is how many snapshots exist while the next is made; then the oldest is deleted.
const keepSnapshots = 2

// cutWrite works until the power goes. It acknowledges batches ("raw"), generations ("files"), snapshots ("snapshot":
// the id, the last batch that must be in it, the last that may) and their deletions ("deleted": the id).
func cutWrite(ctx context.Context, r *reporter, args []string) error {
	w, err := newCutWork(flag.NewFlagSet("cut-write", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	if err := makePool(w.pool); err != nil {
		return err
	}
	_, c, err := startDaemon(ctx)
	if err != nil {
		return err
	}
	for _, v := range []*vol{w.noise, w.raw, w.fs} {
		if err := errors.Join(c.create(ctx, v, ""), c.publish(ctx, v)); err != nil {
			return err
		}
	}
	dev, err := os.OpenFile(w.raw.target(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	noise, err := os.OpenFile(w.noise.target(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer noise.Close()
	var issued, acked atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for n := int64(1); ctx.Err() == nil; n++ {
			issued.Store(n)
			if err := w.data.write(dev, n); err != nil {
				return err
			}
			if err := dev.Sync(); err != nil {
				return fmt.Errorf("flush: %w", err)
			}
			acked.Store(n)
			r.acked("raw", n)
		}
		return nil
	})
	g.Go(func() error {
		for n := int64(1); ctx.Err() == nil; n++ {
			if err := w.loose.write(noise, n); err != nil {
				return err
			}
		}
		return nil
	})
	g.Go(func() error {
		for n := int64(1); ctx.Err() == nil; n++ {
			if err := w.gens.write(n); err != nil {
				return err
			}
			r.acked("files", n)
		}
		return nil
	})
	g.Go(func() error {
		var kept []string
		for n := int64(1); ctx.Err() == nil; n++ {
			time.Sleep(300 * time.Millisecond)
			must := acked.Load()
			id, err := c.snapshot(ctx, w.raw, fmt.Sprintf("snapshot-%d", n))
			if err != nil {
				return err
			}
			r.send(report.Event{Kind: report.Acked, Name: "snapshot", N: n, Text: fmt.Sprintf("%s %d %d", id, must, issued.Load())})
			if kept = append(kept, id); len(kept) > keepSnapshots {
				if err := c.deleteSnapshot(ctx, kept[0]); err != nil {
					return err
				}
				r.send(report.Event{Kind: report.Acked, Name: "deleted", N: n, Text: kept[0]})
				kept = kept[1:]
			}
		}
		return nil
	})
	return g.Wait()
}

// cutVerify starts Ballast on what a power cut left, and compares it with what had been acknowledged.
func cutVerify(ctx context.Context, r *reporter, args []string) error {
	flags := flag.NewFlagSet("cut-verify", flag.ContinueOnError)
	raw := flags.Int64("raw", 0, "last acknowledged batch")
	gen := flags.Int64("files", 0, "last acknowledged generation")
	snapshot := flags.String("snapshot", "", "last acknowledged snapshot")
	must := flags.Int64("must", 0, "last batch that is in it")
	may := flags.Int64("may", 0, "last batch that may be in it")
	deleted := flags.String("deleted", "", "last snapshot whose deletion was acknowledged")
	w, err := newCutWork(flags, args)
	if err != nil {
		return err
	}
	if err := mountDisk(w.pool, poolMount); err != nil {
		return err
	}
	begin := time.Now()
	d, c, err := startDaemon(ctx)
	if err != nil {
		return err
	}
	r.value("recovery", "%s from the start of ballastd until it served", time.Since(begin).Round(10*time.Millisecond))
	if err := c.mustExist(ctx, w.raw, w.fs, w.noise); err != nil {
		return err
	}
	if err := w.verifyRaw(ctx, c, *raw); err != nil {
		return fmt.Errorf("raw volume: %w", err)
	}
	if err := w.verifyNoise(ctx, c); err != nil {
		return fmt.Errorf("volume that was never flushed: %w", err)
	}
	if err := errors.Join(c.publish(ctx, w.fs), w.gens.check(*gen)); err != nil {
		return fmt.Errorf("filesystem volume: %w", err)
	}
	if err := errors.Join(w.gens.write(*gen+1), w.gens.check(*gen+1), c.unpublish(ctx, w.fs)); err != nil {
		return fmt.Errorf("filesystem volume, after its recovery: %w", err)
	}
	if err := w.verifySnapshots(ctx, c, *snapshot, *deleted, *must, *may); err != nil {
		return err
	}
	if err := d.stop(); err != nil {
		return err
	}
	return w.checkOffline()
}

// mustExist finds acknowledged volumes by their names.
func (c *client) mustExist(ctx context.Context, vols ...*vol) error {
	for _, v := range vols {
		have, err := c.count(ctx)
		if err != nil {
			return err
		}
		if err := c.create(ctx, v, ""); err != nil {
			return err
		}
		now, err := c.count(ctx)
		if err != nil {
			return err
		}
		if now != have {
			return fmt.Errorf("%w: volume %s was created anew", errLost, v.name)
		}
	}
	return nil
}

func (c *client) count(ctx context.Context) (int, error) {
	l, err := c.controller.ListVolumes(ctx, &csi.ListVolumesRequest{})
	return len(l.GetEntries()), err
}

func (w *cutWork) verifyRaw(ctx context.Context, c *client, acked int64) error {
	if err := c.publish(ctx, w.raw); err != nil {
		return err
	}
	dev, err := os.OpenFile(w.raw.target(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := w.data.check(dev, w.data.recall(acked, acked+1)); err != nil {
		return err
	}
	// It is a usable device, not merely a readable one.
	if err := errors.Join(w.data.write(dev, acked+1), dev.Sync()); err != nil {
		return err
	}
	if err := w.data.check(dev, w.data.recall(acked+1, acked+1)); err != nil {
		return fmt.Errorf("after writing on: %w", err)
	}
	dev.Close()
	return c.unpublish(ctx, w.raw)
}

// verifyNoise checks that each sector is zeros or was once written there.
func (w *cutWork) verifyNoise(ctx context.Context, c *client) error {
	if err := c.publish(ctx, w.noise); err != nil {
		return err
	}
	dev, err := os.OpenFile(w.noise.target(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	_, err = w.loose.newest(dev)
	return errors.Join(err, dev.Close(), c.unpublish(ctx, w.noise))
}

// verifySnapshots checks that the acknowledged snapshot is there, the deleted one is not, and that a restore has the
// bytes of the moment of the cut.
func (w *cutWork) verifySnapshots(ctx context.Context, c *client, snapshot, deleted string, must, may int64) error {
	l, err := c.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	found := false
	for _, e := range l.GetEntries() {
		switch e.GetSnapshot().GetSnapshotId() {
		case deleted:
			return fmt.Errorf("snapshot %s is back after its deletion", deleted)
		case snapshot:
			found = e.GetSnapshot().GetReadyToUse()
		}
	}
	if snapshot == "" {
		return nil
	}
	if !found {
		return fmt.Errorf("%w: snapshot %s", errLost, snapshot)
	}
	restored := &vol{name: "restored", size: w.raw.size}
	if err := errors.Join(c.create(ctx, restored, snapshot), c.publish(ctx, restored)); err != nil {
		return err
	}
	dev, err := os.OpenFile(restored.target(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	err = w.data.checkMoment(dev, must, may)
	if err = errors.Join(err, dev.Close()); err != nil {
		return fmt.Errorf("restored from snapshot %s: %w", snapshot, err)
	}
	return errors.Join(c.unpublish(ctx, restored), c.delete(ctx, restored))
}

// checkOffline checks the pool, the volume's filesystem and the pool's own, each with its own tool.
func (w *cutWork) checkOffline() error {
	pool := filepath.Join(dataDir, "pools", "default")
	if err := command("ballastctl", "pool", "check", pool); err != nil {
		return err
	}
	image := filepath.Join(poolMount, "export")
	// After a second cut there is that of the first verification.
	if err := os.RemoveAll(image); err != nil {
		return err
	}
	if err := command("ballastctl", "pool", "export", pool, w.fs.id, image); err != nil {
		return err
	}
	if err := checkFilesystem(w.fs.fstype, image); err != nil {
		return fmt.Errorf("the volume's filesystem: %w", err)
	}
	if err := unix.Unmount(poolMount, 0); err != nil {
		return fmt.Errorf("unmount the pool's disk: %w", err)
	}
	if err := checkFilesystem(w.pool, disk); err != nil {
		return fmt.Errorf("the pool's disk: %w", err)
	}
	return nil
}

func checkFilesystem(fstype, device string) error {
	switch fstype {
	case "ext4":
		return command("e2fsck", "-f", "-n", device)
	case "xfs":
		return command("xfs_repair", "-n", device)
	default:
		return fmt.Errorf("no check for %q", fstype)
	}
}
