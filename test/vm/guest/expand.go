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

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// expand grows volumes while they are mounted and written to, and checks sizes and data, then and after a remount.
func expand(ctx context.Context, r *reporter, args []string) error {
	if err := flag.NewFlagSet("expand", flag.ContinueOnError).Parse(args); err != nil {
		return err
	}
	if err := makePool("ext4"); err != nil {
		return err
	}
	d, c, err := startDaemon(ctx)
	if err != nil {
		return err
	}
	for _, fstype := range []string{"ext4", "xfs", "btrfs", ""} {
		name := fstype
		if name == "" {
			name = "raw"
		}
		v := &vol{name: name, fstype: fstype, size: 320 * mib}
		begin := time.Now()
		if err := expandOne(ctx, r, c, v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		r.value(name, "grown online under writes in %s, remount and checks included", time.Since(begin).Round(100*time.Millisecond))
	}
	return d.stop()
}

func expandOne(ctx context.Context, r *reporter, c *client, v *vol) error {
	if err := errors.Join(c.create(ctx, v, ""), c.publish(ctx, v)); err != nil {
		return err
	}
	file := v.target()
	if v.fstype != "" {
		file = filepath.Join(file, "data")
	}
	p := pattern{seed: 7, blocks: 4096}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if v.fstype != "" {
		if err := f.Truncate(p.blocks * block); err != nil {
			return err
		}
	}
	var batches atomic.Int64
	stop := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error {
		for n := int64(1); ; n++ {
			select {
			case <-stop:
				return nil
			default:
			}
			if err := errors.Join(p.write(f, n), f.Sync()); err != nil {
				return err
			}
			batches.Store(n)
		}
	})
	grown := v.size + 192*mib
	before, err := visibleSize(v)
	if err == nil {
		time.Sleep(300 * time.Millisecond) // some writes before, some after
		err = c.expand(ctx, v, grown)
		time.Sleep(300 * time.Millisecond)
	}
	close(stop)
	if err = errors.Join(err, g.Wait()); err != nil {
		return err
	}
	after, err := visibleSize(v)
	if err != nil {
		return err
	}
	// Filesystems keep some of the space to themselves.
	if after < before+160*mib || after > grown {
		return fmt.Errorf("%d bytes are visible, %d before; the volume grew from %d to %d", after, before, v.size, grown)
	}
	if batches.Load() == 0 {
		return errors.New("nothing was written meanwhile")
	}
	if err := p.check(f, p.recall(batches.Load(), batches.Load())); err != nil {
		return err
	}
	// The new part takes data.
	if v.fstype == "" {
		end := aligned(block)
		p.fill(end, grown-block, 1)
		if _, err := f.WriteAt(end, grown-block); err != nil {
			return fmt.Errorf("write to the new end: %w", err)
		}
	} else if err := fillFile(filepath.Join(v.target(), "more"), before); err != nil {
		return fmt.Errorf("use more than there was before: %w", err)
	}
	if err := errors.Join(f.Close(), c.unpublish(ctx, v), c.publish(ctx, v)); err != nil {
		return err
	}
	again, err := visibleSize(v)
	if err != nil {
		return err
	}
	if again != after {
		return fmt.Errorf("%d bytes are visible after a remount, %d before it", again, after)
	}
	if f, err = os.OpenFile(file, os.O_RDONLY|unix.O_DIRECT, 0); err != nil {
		return err
	}
	defer f.Close()
	if err := p.check(f, p.recall(batches.Load(), batches.Load())); err != nil {
		return fmt.Errorf("after a remount: %w", err)
	}
	r.value(v.name, "%d batches written meanwhile; %d MiB visible before, %d after", batches.Load(), before/mib, after/mib)
	return errors.Join(f.Close(), c.unpublish(ctx, v), c.delete(ctx, v))
}

// visibleSize is a filesystem's size or a device's, in bytes.
func visibleSize(v *vol) (int64, error) {
	if v.fstype == "" {
		f, err := os.Open(v.target())
		if err != nil {
			return 0, err
		}
		defer f.Close()
		return f.Seek(0, 2)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.target(), &st); err != nil {
		return 0, err
	}
	return int64(st.Blocks) * st.Bsize, nil
}

// fillFile reserves size bytes in a new file.
func fillFile(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, size), f.Sync(), f.Close())
}
