package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/frontend/fuseloop"
)

const (
	frontendSize   = 512 << 20
	frontendFor    = 2 * time.Second
	frontendRounds = 3
)

// workload is one row of the table: a pattern of fio.
type workload struct {
	name  string
	rw    string
	block string
	depth int
}

var workloads = []workload{
	{"4 KiB random read, QD 1", "randread", "4k", 1},
	{"4 KiB random write, QD 1", "randwrite", "4k", 1},
	{"4 KiB random read, QD 32", "randread", "4k", 32},
	{"4 KiB random write, QD 32", "randwrite", "4k", 32},
	{"1 MiB sequential read, QD 4", "read", "1m", 4},
	{"1 MiB sequential write, QD 4", "write", "1m", 4},
}

// wantedLoads, where it is set, matches the names of those to be measured.
var wantedLoads *regexp.Regexp

func chosen(all []workload) []workload {
	return slices.DeleteFunc(slices.Clone(all), func(l workload) bool { return wantedLoads != nil && !wantedLoads.MatchString(l.name) })
}

// show makes a result of runFio one for people.
func (l workload) show(v float64) string {
	if l.block == "1m" {
		return fmt.Sprintf("%.0f MiB/s", v)
	}
	return fmt.Sprintf("%.1fk IOPS", v/1000)
}

// benchFrontend measures fuseloop against the same through QEMU, and against a plain loop device: each on a file of its
// own, all files opened with O_DIRECT, all loop devices with direct I/O and 4 KiB blocks.
func benchFrontend(ctx context.Context, w io.Writer) (err error) {
	fmt.Fprintf(w, "## Frontend\n\nfio (io_uring, direct) on the kernel's block device for %v, the three in turns; medians of %d. Each is backed by a file of "+
		"%d MiB in memory (tmpfs), so that the frontend's own cost shows, opened with O_DIRECT. QEMU is qemu-storage-daemon with a FUSE export "+
		"(aio=native) and a loop device on it.\n\n", frontendFor, frontendRounds, frontendSize>>20)
	dir, err := os.MkdirTemp("/dev/shm", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var paths []string
	for _, up := range []func(context.Context, string) (string, func() error, error){fuseloopUp, qemuUp, plainUp} {
		path, down, err := up(ctx, dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, down()) }()
		paths = append(paths, path)
	}
	fmt.Fprintf(w, "| Workload | fuseloop | QEMU's export | plain loop | fuseloop / QEMU | fuseloop / plain |\n|---|---|---|---|---|---|\n")
	for _, load := range chosen(workloads) {
		m, err := inTurns(load, len(paths), func(i int) (float64, error) {
			return runFio(ctx, load, "--ioengine=io_uring", "--direct=1", "--allow_file_create=0", "--filename="+paths[i])
		})
		if err != nil {
			return err
		}
		ours, qemu, plain := m[0], m[1], m[2]
		fmt.Fprintf(w, "| %s | %s | %s | %s | %.2f | %.2f |\n", load.name, load.show(ours), load.show(qemu), load.show(plain), ours/qemu, ours/plain)
	}
	fmt.Fprintln(w)
	return nil
}

// runFio returns requests per second: of 1 MiB ones, MiB per second. Where says to what.
func runFio(ctx context.Context, load workload, where ...string) (float64, error) {
	return runFioFor(ctx, load, frontendFor, where...)
}

// inTurns runs a workload on each of n systems, one after another and again, and returns the median of each.
func inTurns(load workload, n int, run func(system int) (float64, error)) ([]float64, error) {
	results := make([][]float64, n)
	for range frontendRounds {
		for i := range n {
			v, err := run(i)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", load.name, err)
			}
			results[i] = append(results[i], v)
		}
	}
	medians := make([]float64, n)
	for i := range n {
		medians[i] = median(results[i])
	}
	return medians, nil
}

// runFioFor is runFio for a given time, or, where it is 0, over the whole size once.
func runFioFor(ctx context.Context, load workload, span time.Duration, where ...string) (float64, error) {
	if span > 0 {
		where = append(where, "--time_based", fmt.Sprintf("--runtime=%d", int(span.Seconds())))
	}
	r, err := fio(ctx, load, where...)
	return r.Read.IOPS + r.Write.IOPS, err
}

// fioReport is what is looked at of a report of fio's.
type fioReport struct {
	Read, Write struct {
		IOPS float64
		// Latency is from the submission to the end of a request, in nanoseconds.
		Latency struct {
			Percentile map[string]float64
		} `json:"clat_ns"`
	}
}

// fio runs a workload with more arguments.
func fio(ctx context.Context, load workload, more ...string) (fioReport, error) {
	args := append(more, "--name=bench", "--rw="+load.rw, "--bs="+load.block, fmt.Sprintf("--iodepth=%d", load.depth), "--output-format=json")
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Dir = os.TempDir() // its nbd engine leaves a file
	out, err := cmd.Output()
	if err != nil {
		return fioReport{}, fmt.Errorf("fio: %w: %s", err, stderr(err))
	}
	var report struct{ Jobs []fioReport }
	begin := max(0, bytes.IndexByte(out, '{')) // an engine may have something to say first
	if err := json.Unmarshal(out[begin:], &report); err != nil {
		return fioReport{}, fmt.Errorf("parse fio's report: %w", err)
	}
	if len(report.Jobs) != 1 {
		return fioReport{}, errors.New("fio reported no job")
	}
	return report.Jobs[0], nil
}

// backingFile makes a file whose blocks are all allocated.
func backingFile(ctx context.Context, dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	_, err := command(ctx, "dd", "if=/dev/zero", "of="+path, "bs=1M", fmt.Sprintf("count=%d", frontendSize>>20), "conv=fsync", "status=none")
	return path, err
}

func plainUp(ctx context.Context, dir string) (string, func() error, error) {
	file, err := backingFile(ctx, dir, "plain")
	if err != nil {
		return "", nil, err
	}
	return losetup(ctx, file)
}

// losetup binds a loop device with the settings that fuseloop uses.
func losetup(ctx context.Context, file string) (string, func() error, error) {
	path, err := command(ctx, "losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", file)
	if err != nil {
		return "", nil, err
	}
	return path, func() error {
		_, err := command(context.Background(), "losetup", "--detach", path)
		return err
	}, nil
}

func qemuUp(ctx context.Context, dir string) (_ string, _ func() error, err error) {
	file, err := backingFile(ctx, dir, "qemu")
	if err != nil {
		return "", nil, err
	}
	export := filepath.Join(dir, "export")
	if err := os.WriteFile(export, nil, 0o600); err != nil {
		return "", nil, err
	}
	ready := filepath.Join(dir, "qemu.pid")
	cmd := exec.Command("qemu-storage-daemon", "--blockdev", "driver=file,node-name=disk,filename="+file+",cache.direct=on,aio=native,discard=unmap",
		"--export", "type=fuse,id=export,node-name=disk,writable=on,mountpoint="+export, "--pidfile", ready)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop := func() error {
		err := cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait() // it ends with the signal's status
		return err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		if time.Now().After(end) {
			return "", nil, errors.Join(errors.New("qemu-storage-daemon does not come up"), stop())
		}
	}
	path, down, err := losetup(ctx, export)
	if err != nil {
		return "", nil, errors.Join(err, stop())
	}
	return path, func() error { return errors.Join(down(), stop()) }, nil
}

func fuseloopUp(ctx context.Context, dir string) (_ string, _ func() error, err error) {
	path, err := backingFile(ctx, dir, "fuseloop")
	if err != nil {
		return "", nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return "", nil, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	f, err := fuseloop.New(ctx, fuseloop.Options{RunDir: filepath.Join(dir, "run"), Logger: log})
	if err != nil {
		return "", nil, errors.Join(err, file.Close())
	}
	down := func() error { return errors.Join(f.Close(), file.Close()) }
	loop, err := f.Attach(ctx, "bench", fileDevice{int(file.Fd())}, frontend.Options{BlockSize: 4096})
	if err != nil {
		return "", nil, errors.Join(err, down())
	}
	return loop, down, nil
}

// fileDevice is a plain file as a device, with nothing in between.
type fileDevice struct{ fd int }

func (d fileDevice) ReadAt(_ context.Context, p []byte, off int64) error {
	return whole(len(p))(unix.Pread(d.fd, p, off))
}

func (d fileDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	return whole(len(p))(unix.Pwrite(d.fd, p, off))
}

func (d fileDevice) Zero(_ context.Context, off, n int64) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d fileDevice) Flush(context.Context) error { return unix.Fdatasync(d.fd) }

func (d fileDevice) Size() int64 { return frontendSize }

func whole(want int) func(int, error) error {
	return func(n int, err error) error {
		if err == nil && n != want {
			return io.ErrUnexpectedEOF
		}
		return err
	}
}

// command runs a program and returns its first line.
func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, stderr(err))
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}

func stderr(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return strings.TrimSpace(string(exit.Stderr))
	}
	return ""
}
