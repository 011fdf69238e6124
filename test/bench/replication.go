package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// replicated is what the table compares.
type replicated struct {
	name string
	up   func(ctx context.Context, dir string) (*service, error)
}

// service is something that serves a volume over NBD, in one process or several.
type service struct {
	uri  string
	pids []int
	down func() error
}

// cpu is what its processes have used so far.
func (s *service) cpu() (sum time.Duration, err error) {
	for _, pid := range s.pids {
		c, err := harness.ProcessCost(pid)
		if err != nil {
			return 0, err
		}
		sum += c.CPU
	}
	return sum, nil
}

var replicationLoads = []workload{
	{"4 KiB random write, QD 1", "randwrite", "4k", 1},
	{"4 KiB random write, QD 32", "randwrite", "4k", 32},
	{"1 MiB sequential write, QD 4", "write", "1m", 4},
	{"4 KiB random read, QD 1", "randread", "4k", 1},
	{"4 KiB random read, QD 32", "randread", "4k", 32},
}

// benchReplication measures an engine with replicas over loopback TCP, through NBD, against QEMU's quorum driver over
// nbdkit and against what the disks give: three plain files written at once.
func benchReplication(ctx context.Context, w io.Writer) (err error) {
	fmt.Fprintf(w, "## Replication\n\nfio's nbd engine, one connection over a Unix socket, for %v, all in turns; medians of %d. Every copy is a file of %d MiB, "+
		"filled before, on the same filesystem, opened with O_DIRECT; the first replica is on the engine's node, the others over loopback TCP. Quorum is QEMU's over three nbdkit, "+
		"over loopback TCP too; every copy has a process of its own. The limit is fio with io_uring on three plain files at once: what each of them gets. "+
		"CPU is what all processes of a system use for one request, but for fio.\n\n", frontendFor, frontendRounds, frontendSize>>20)
	dir, err := os.MkdirTemp("", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ballast := func(replicas int, secure bool) func(context.Context, string) (*service, error) {
		return func(ctx context.Context, dir string) (*service, error) { return engineUp(ctx, dir, replicas, secure) }
	}
	systems := []replicated{
		{"quorum", quorumUp}, {"1-replica", ballast(1, false)}, {"2-replicas", ballast(2, false)}, {"3-replicas", ballast(3, false)},
		{"3-TLS", ballast(3, true)},
	}
	const quorum, three, secure = 1, 4, 5 // their columns
	var services []*service
	for _, s := range systems {
		up, err := filledService(ctx, filepath.Join(dir, s.name), s)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, up.down()) }()
		services = append(services, up)
	}
	for i := range 3 {
		if _, err := backingFile(ctx, dir, fmt.Sprintf("plain.%d", i)); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "| Workload | limit | quorum | 1 replica | 2 | 3 | 3, TLS | 3 / limit | 3 / quorum | TLS / plain | CPU of quorum | of 3 replicas |\n"+
		"|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, load := range chosen(replicationLoads) {
		cost := make([]samples, len(systems)+1) // processor time of the servers for a request
		m, err := inTurns(load, len(systems)+1, func(i int) (float64, error) {
			if i == 0 {
				limit, err := runFioFor(ctx, load, frontendFor, "--ioengine=io_uring", "--direct=1", "--allow_file_create=0", "--numjobs=3",
					"--group_reporting", "--directory="+dir, "--filename_format=plain.$jobnum", fmt.Sprintf("--size=%d", frontendSize))
				return limit / 3, err
			}
			v, cpu, err := services[i-1].measure(ctx, load)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", systems[i-1].name, err)
			}
			cost[i] = append(cost[i], cpu)
			return v, nil
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s", load.name)
		for _, v := range m {
			fmt.Fprintf(w, " | %s", load.show(v))
		}
		fmt.Fprintf(w, " | %.2f | %.2f | %.2f | %d µs | %d µs |\n", m[three]/m[0], m[three]/m[quorum], m[secure]/m[three],
			cost[quorum].at(50).Microseconds(), cost[three].at(50).Microseconds())
	}
	fmt.Fprintln(w)
	return nil
}
