package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

var readLoads = []workload{
	{"4 KiB random read, QD 1", "randread", "4k", 1},
	{"4 KiB random read, QD 32", "randread", "4k", 32},
	{"1 MiB sequential read, QD 4", "read", "1m", 4},
}

// benchReads measures reads from the replica on the engine's node, through NBD, against nbdkit's file plugin.
func benchReads(ctx context.Context, w io.Writer) error {
	fmt.Fprintf(w, "## Local read\n\nfio's nbd engine, one connection over a Unix socket, for %v, all in turns; medians of %d. %d MiB, filled before. The engine reads "+
		"from the replica on its own node; of three, the others are reached over loopback TCP. CPU is what all processes of a system use for one request, but for fio. "+
		"In memory (tmpfs) both copy from the page cache. On the disk replicas are opened with O_DIRECT. nbdkit cannot do that: with cache=none it drops pages that it has read, and with "+
		"fadvise=random nothing is read ahead, so that all that it serves comes from the disk, too.\n\n", frontendFor, frontendRounds, frontendSize>>20)
	fmt.Fprintf(w, "| Where | workload | nbdkit | 1 replica | 3 replicas | 1 / nbdkit | 3 / nbdkit | CPU of nbdkit | of 1 replica | of 3 |\n"+
		"|---|---|---|---|---|---|---|---|---|---|\n")
	if err := readRows(ctx, w, "memory", memoryDir); err != nil {
		return err
	}
	if err := readRows(ctx, w, "disk", "", "cache=none", "fadvise=random"); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return nil
}

// readRows measures in a directory of a parent, "" being where temporary files are.
func readRows(ctx context.Context, w io.Writer, where, parent string, options ...string) (err error) {
	dir, err := os.MkdirTemp(parent, "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	systems := []replicated{
		{"nbdkit", func(ctx context.Context, dir string) (*service, error) { return nbdkitUp(ctx, dir, options...) }},
		{"1-replica", func(ctx context.Context, dir string) (*service, error) { return engineUp(ctx, dir, 1, false) }},
		{"3-replicas", func(ctx context.Context, dir string) (*service, error) { return engineUp(ctx, dir, 3, false) }},
	}
	services, down, err := filledServices(ctx, dir, systems)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, down()) }()
	for _, load := range chosen(readLoads) {
		cost := make([]samples, len(systems))
		m, err := inTurns(load, len(systems), func(i int) (float64, error) {
			m, err := services[i].measure(ctx, load)
			cost[i] = append(cost[i], m.cpu)
			return m.perSecond, err
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %.2f | %.2f", where, load.name, load.show(m[0]), load.show(m[1]), load.show(m[2]), m[1]/m[0], m[2]/m[0])
		for _, c := range cost {
			fmt.Fprintf(w, " | %d µs", c.at(50).Microseconds())
		}
		fmt.Fprintln(w, " |")
	}
	return nil
}

// filledServices brings systems up, each in a directory of its name in dir, and writes all of their volumes.
func filledServices(ctx context.Context, dir string, systems []replicated) (services []*service, down func() error, err error) {
	var downs teardown
	for _, s := range systems {
		up, err := filledService(ctx, filepath.Join(dir, s.name), s)
		if err != nil {
			return nil, nil, errors.Join(err, downs.all())
		}
		services, downs = append(services, up), append(downs, up.down)
	}
	return services, downs.all, nil
}

// filledService brings a system up in a directory to be made, and writes all of its volume: what was never written would be
// too easy to read and to write.
func filledService(ctx context.Context, dir string, s replicated) (*service, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	up, err := s.up(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	fill := workload{name: "fill", rw: "write", block: "1m", depth: 4}
	if _, err := runFioFor(ctx, fill, 0, "--ioengine=nbd", "--uri="+up.uri, fmt.Sprintf("--size=%d", frontendSize), "--end_fsync=1"); err != nil {
		return nil, errors.Join(fmt.Errorf("fill %s: %w", s.name, err), up.down())
	}
	return up, nil
}
