package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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

// teardown ends what was begun, the last first.
type teardown []func() error

func (d teardown) all() error {
	var errs []error
	for _, down := range slices.Backward(d) {
		errs = append(errs, down())
	}
	return errors.Join(errs...)
}

// used is what its processes have used so far: processor time, and how often one of their threads gave way to another.
func (s *service) used() (cpu time.Duration, switches int64, err error) {
	for _, pid := range s.pids {
		c, err := harness.ProcessCost(pid)
		if err != nil {
			return 0, 0, err
		}
		n, err := contextSwitches(pid)
		if err != nil {
			return 0, 0, err
		}
		cpu, switches = cpu+c.CPU, switches+n
	}
	return cpu, switches, nil
}

// contextSwitches sums those of the threads that a process has now.
func contextSwitches(pid int) (sum int64, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(line, ":")
			if name != "voluntary_ctxt_switches" && name != "nonvoluntary_ctxt_switches" {
				continue
			}
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", file, err)
			}
			sum += n
		}
	}
	return sum, nil
}

// measured is requests per second, and what the service's processes used for one.
type measured struct {
	perSecond float64
	cpu       time.Duration
	switches  float64
}

func (s *service) measure(ctx context.Context, load workload) (m measured, err error) {
	cpu, switches, err := s.used()
	if err != nil {
		return m, err
	}
	if m.perSecond, err = runFio(ctx, load, "--ioengine=nbd", "--uri="+s.uri); err != nil {
		return m, err
	}
	cpuAfter, switchesAfter, err := s.used()
	requests := m.perSecond * frontendFor.Seconds()
	m.cpu, m.switches = time.Duration(float64(cpuAfter-cpu)/requests), float64(switchesAfter-switches)/requests
	return m, err
}

var replicationLoads = []workload{
	{"4 KiB random write, QD 1", "randwrite", "4k", 1},
	{"4 KiB random write, QD 32", "randwrite", "4k", 32},
	{"1 MiB sequential write, QD 4", "write", "1m", 4},
	{"4 KiB random read, QD 1", "randread", "4k", 1},
	{"4 KiB random read, QD 32", "randread", "4k", 32},
}

// benchReplication measures an engine with replicas over loopback TCP, through NBD, against QEMU's quorum driver, against the
// least that three copies take, and against what the disks give: three plain files written at once.
func benchReplication(ctx context.Context, w io.Writer) (err error) {
	fmt.Fprintf(w, "## Replication\n\nfio's nbd engine, one connection over a Unix socket, for %v, all in turns; medians of %d. Every copy is a file of %d MiB, "+
		"filled before, on the same filesystem, with a process of its own, and opened with O_DIRECT but for nbdkit's, which goes through the page cache and drops it (cache=none). "+
		"The first replica is on the engine's node, the others over loopback TCP. Quorum is QEMU's, of three nbdkit over loopback TCP and of three qemu-storage-daemon over Unix sockets (O_DIRECT). "+
		"Bare is this NBD server on three copies by the least that it takes: two sends, a pwrite and two receives, one process per copy, no protocol. "+
		"The limit is fio with io_uring on three plain files at once: what each of them gets.\n\n", frontendFor, frontendRounds, frontendSize>>20)
	dir, err := os.MkdirTemp("", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ballast := func(replicas int, secure bool) func(context.Context, string) (*service, error) {
		return func(ctx context.Context, dir string) (*service, error) { return engineUp(ctx, dir, replicas, secure) }
	}
	quorum := func(direct bool) func(context.Context, string) (*service, error) {
		return func(ctx context.Context, dir string) (*service, error) { return quorumUp(ctx, dir, direct) }
	}
	systems := []replicated{
		{"quorum", quorum(false)}, {"direct-quorum", quorum(true)}, {"bare", bareUp},
		{"1-replica", ballast(1, false)}, {"2-replicas", ballast(2, false)}, {"3-replicas", ballast(3, false)}, {"3-TLS", ballast(3, true)},
	}
	const theirs, direct, least, three, secure = 1, 2, 3, 6, 7 // their columns
	services, down, err := filledServices(ctx, dir, systems)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, down()) }()
	for i := range 3 {
		if _, err := backingFile(ctx, dir, fmt.Sprintf("plain.%d", i)); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "| Workload | limit | quorum | quorum, O_DIRECT | bare | 1 replica | 2 | 3 | 3, TLS | 3 / limit | 3 / quorum | 3 / quorum, O_DIRECT | 3 / bare | TLS / plain |\n"+
		"|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	costs := &strings.Builder{}
	for _, load := range chosen(replicationLoads) {
		used := make([][]measured, len(systems)+1)
		m, err := inTurns(load, len(systems)+1, func(i int) (float64, error) {
			if i == 0 {
				limit, err := runFioFor(ctx, load, frontendFor, "--ioengine=io_uring", "--direct=1", "--allow_file_create=0", "--numjobs=3",
					"--group_reporting", "--directory="+dir, "--filename_format=plain.$jobnum", fmt.Sprintf("--size=%d", frontendSize))
				return limit / 3, err
			}
			v, err := services[i-1].measure(ctx, load)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", systems[i-1].name, err)
			}
			used[i] = append(used[i], v)
			return v.perSecond, nil
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s", load.name)
		for _, v := range m {
			fmt.Fprintf(w, " | %s", load.show(v))
		}
		fmt.Fprintf(w, " | %.2f | %.2f | %.2f | %.2f | %.2f |\n", m[three]/m[0], m[three]/m[theirs], m[three]/m[direct], m[three]/m[least], m[secure]/m[three])
		fmt.Fprintf(costs, "| %s", load.name)
		for _, i := range []int{theirs, direct, least, three} {
			slices.SortFunc(used[i], func(a, b measured) int { return cmp.Compare(a.cpu, b.cpu) })
			median := used[i][len(used[i])/2]
			fmt.Fprintf(costs, " | %d µs, %.1f", median.cpu.Microseconds(), median.switches)
		}
		fmt.Fprintln(costs, " |")
	}
	fmt.Fprintf(w, "\nWhat all processes of a system, but for fio, use for a request: processor time, and context switches.\n\n"+
		"| Workload | quorum | quorum, O_DIRECT | bare | 3 replicas |\n|---|---|---|---|---|\n%s\n", costs)
	return nil
}
