package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// pressure writes more buffered data to a filesystem on a volume than the machine has memory, from several writers: the
// kernel must reclaim memory by writing pages that only ballastd can take, while ballastd needs memory itself. Writers
// that stand still for stall have deadlocked.
func pressure(ctx context.Context, r *reporter, args []string) error {
	flags := flag.NewFlagSet("pressure", flag.ContinueOnError)
	total := flags.Int64("mib", 512, "to write")
	stall := flags.Duration("stall", time.Minute, "without progress is a deadlock")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// The kernel starts to write late and throttles late: the worst case.
	for name, value := range map[string]string{"dirty_background_ratio": "70", "dirty_ratio": "90", "panic_on_oom": "1"} {
		if err := os.WriteFile("/proc/sys/vm/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	if err := makePool("ext4"); err != nil {
		return err
	}
	d, c, err := startDaemon(ctx)
	if err != nil {
		return err
	}
	v := &vol{name: "pressure", fstype: "ext4", size: 2 * *total * mib}
	if err := errors.Join(c.create(ctx, v, ""), c.publish(ctx, v)); err != nil {
		return err
	}
	var progress atomic.Int64
	watched, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go watch(watched, cancel, &progress, *stall)

	const writers = 4
	each := *total * mib / writers
	begin := time.Now()
	done := make(chan error, 1)
	go func() {
		var g errgroup.Group
		for i := range writers {
			g.Go(func() error {
				return fillAndSync(filepath.Join(v.target(), fmt.Sprint(i)), pattern{seed: uint64(i)}, each, &progress)
			})
		}
		done <- g.Wait()
	}()
	select {
	case err = <-done:
	case <-watched.Done():
		err = context.Cause(watched)
	}
	if err != nil {
		return err
	}
	r.value("written", "%d MiB in %s", *total, time.Since(begin).Round(100*time.Millisecond))
	// Read from the volume, not from memory.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return err
	}
	for i := range writers {
		if err := verifyFile(filepath.Join(v.target(), fmt.Sprint(i)), pattern{seed: uint64(i)}, each, &progress); err != nil {
			return err
		}
	}
	return errors.Join(c.unpublish(ctx, v), c.delete(ctx, v), d.stop())
}

// watch ends the scenario, and has the kernel print the tasks that are blocked, when progress stands still.
func watch(ctx context.Context, stop context.CancelCauseFunc, progress *atomic.Int64, stall time.Duration) {
	last, since := int64(-1), time.Now()
	for ctx.Err() == nil {
		time.Sleep(time.Second)
		if now := progress.Load(); now != last {
			last, since = now, time.Now()
			continue
		}
		if time.Since(since) < stall {
			continue
		}
		if err := os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0); err != nil {
			stop(err)
		}
		info, _ := os.ReadFile("/proc/meminfo")
		var dirty []string
		for line := range strings.Lines(string(info)) {
			if strings.HasPrefix(line, "Dirty") || strings.HasPrefix(line, "Writeback") || strings.HasPrefix(line, "MemFree") {
				dirty = append(dirty, strings.Join(strings.Fields(line), " "))
			}
		}
		stop(fmt.Errorf("deadlock: nothing moved for %s at %d bytes; %s", stall, last, strings.Join(dirty, ", ")))
		return
	}
}

func fillAndSync(name string, p pattern, size int64, progress *atomic.Int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 256<<10)
	for off := int64(0); off < size; off += int64(len(buf)) {
		p.fill(buf, off, 1)
		if _, err := f.Write(buf); err != nil {
			return err
		}
		progress.Add(int64(len(buf)))
	}
	// A sync of much data is slow but not still: the progress is that of writeback.
	for off := int64(0); off < size; off += 4 * mib {
		if err := unix.SyncFileRange(int(f.Fd()), off, 4*mib, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
			return err
		}
		progress.Add(1)
	}
	return errors.Join(f.Sync(), f.Close())
}

func verifyFile(name string, p pattern, size int64, progress *atomic.Int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	want, got := make([]byte, 256<<10), make([]byte, 256<<10)
	for off := int64(0); off < size; off += int64(len(want)) {
		p.fill(want, off, 1)
		if _, err := f.ReadAt(got, off); err != nil {
			return err
		}
		if string(want) != string(got) {
			return fmt.Errorf("%w: %s differs at %d", errLost, name, off)
		}
		progress.Add(1)
	}
	return nil
}
