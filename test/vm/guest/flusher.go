package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The bits of a task's flags that PR_SET_IO_FLUSHER sets (include/linux/sched.h, PR_IO_FLUSHER in kernel/sys.c). They
// are in the ninth field of /proc/PID/stat: how to see from outside what PR_GET_IO_FLUSHER tells a task of itself.
const (
	memallocNoIO  = 0x00080000
	localThrottle = 0x00100000
	ioFlusher     = memallocNoIO | localThrottle
)

// flusher checks that every thread of ballastd is an I/O flusher and that ballastd does not say that it had to do
// without anything.
func flusher(ctx context.Context, r *reporter, _ []string) error {
	if err := makePool("ext4"); err != nil {
		return err
	}
	d, c, err := startDaemon(ctx)
	if err != nil {
		return err
	}
	v := &vol{name: "busy", size: 64 * mib}
	if err := errors.Join(c.create(ctx, v, ""), c.publish(ctx, v)); err != nil {
		return err
	}
	// Work makes the runtime start more threads.
	dev, err := os.OpenFile(v.target(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	p := pattern{seed: 3, blocks: v.size / block, zeros: true}
	for n := range int64(50) {
		if err := p.write(dev, n+1); err != nil {
			return err
		}
	}
	if err := dev.Sync(); err != nil {
		return err
	}
	threads, err := taskFlags(d.cmd.Process.Pid)
	if err != nil {
		return err
	}
	var without []string
	for tid, flags := range threads {
		if flags&ioFlusher != ioFlusher {
			without = append(without, fmt.Sprintf("%d (flags %#x)", tid, flags))
		}
	}
	if len(without) > 0 {
		return fmt.Errorf("%d of %d threads of ballastd are no I/O flushers: %s", len(without), len(threads), strings.Join(without, ", "))
	}
	r.value("threads", "all %d threads of ballastd are I/O flushers", len(threads))
	if err := errors.Join(dev.Close(), c.unpublish(ctx, v), c.delete(ctx, v), d.stop()); err != nil {
		return err
	}
	if lines := d.logged("warn"); len(lines) > 0 {
		return fmt.Errorf("ballastd with every capability has something to warn of: %s", strings.Join(lines, "\n"))
	}
	return nil
}

// taskFlags returns the kernel's flags of each thread of a process.
func taskFlags(pid int) (map[int]uint64, error) {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return nil, err
	}
	flags := map[int]uint64{}
	for _, file := range stats {
		data, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			return nil, err
		}
		// The second field, the name, is in parentheses and may hold anything.
		_, rest, ok := strings.Cut(string(data), ") ")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 7 {
			return nil, fmt.Errorf("%s: %q", file, data)
		}
		tid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		if flags[tid], err = strconv.ParseUint(fields[6], 10, 64); err != nil {
			return nil, err
		}
	}
	if len(flags) == 0 {
		return nil, fmt.Errorf("process %d has no threads", pid)
	}
	return flags, nil
}
