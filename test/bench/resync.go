package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/test/harness"
)

// resyncSizes are in bytes.
type resyncSizes struct {
	volume, extents, blocks int64
	// window is how long the foreground is measured, and most the size of its volume.
	window time.Duration
	most   int64
	rounds int
}

// settle is how long a volume rests before a node goes, until nothing is in its replicas' write-intent logs: a region is
// taken out 10 to 20 s after its last write, and that is stored within 5 s more.
const settle = 30 * time.Second

func sizesOfResync() resyncSizes {
	if quick {
		return resyncSizes{256 << 20, 16 << 20, 1 << 20, 5 * time.Second, 1 << 30, 1}
	}
	return resyncSizes{1 << 30, 64 << 20, 16 << 20, 15 * time.Second, 6 << 30, 3}
}

// resyncs is a cluster whose first node has the volumes that are measured.
type resyncs struct {
	*three
	resyncSizes
	w io.Writer
}

// benchResync measures what a replica costs that comes back or is made: what is copied, how fast, and what a workload
// feels of it.
func benchResync(ctx context.Context, w io.Writer) error {
	return withThree(ctx, nil, func(t *three) error {
		r := &resyncs{three: t, resyncSizes: sizesOfResync(), w: w}
		if err := r.returns(ctx); err != nil {
			return err
		}
		speed, err := r.rebuilds(ctx)
		if err != nil {
			return err
		}
		return r.foreground(ctx, speed)
	}, "--pool-capacity=16Gi", "--log-level=warn")
}

// with runs fn with a raw block volume that is filled and published on the first node, and deletes it.
func (r *resyncs) with(ctx context.Context, name string, size int64, replicas int, fn func(path string) error) error {
	c := &harness.Claim{Name: name, Size: size, Parameters: map[string]string{"replicas": strconv.Itoa(replicas)}}
	if err := r.at[0].Up(ctx, c); err != nil {
		return err
	}
	path := r.at[0].TargetPath(c)
	if _, err := r.fio(ctx, path, workload{rw: "write", block: "1m", depth: 4}, "--end_fsync=1"); err != nil {
		return fmt.Errorf("fill %s: %w", name, err)
	}
	if err := r.inSync(ctx, name, replicas); err != nil {
		return err
	}
	if err := fn(path); err != nil {
		return err
	}
	return errors.Join(r.at[0].Down(ctx, c), r.at[0].Delete(ctx, c))
}

func (r *resyncs) fio(ctx context.Context, path string, load workload, more ...string) (fioReport, error) {
	// Of threads nothing is left when it is killed.
	return fio(ctx, load, append(more, "--thread", "--ioengine=io_uring", "--direct=1", "--allow_file_create=0", "--filename="+path)...)
}

// returns measures what is copied to a node that was away.
func (r *resyncs) returns(ctx context.Context) error {
	fmt.Fprintf(r.w, "## Incremental resync\n\nThree nodes on one machine, a filled raw volume of %d MiB with three replicas, in use on the first. The third is killed "+
		"(kill -9), the volume is written to, the node is started again. Changed is what was written, in whole extents of 64 KiB; received is all that the node's process "+
		"received over TCP from its start until it was in sync, TLS and the controllers' talk included; the time counts from its start.\n\n", r.volume>>20)
	fmt.Fprintf(r.w, "| Written meanwhile | written | changed | received | received / changed | received / written | in sync after |\n|---|---|---|---|---|---|---|\n")
	defer fmt.Fprintln(r.w)
	return r.with(ctx, "returned", r.volume, 3, func(path string) error {
		if err := r.away(ctx, path, workload{"whole extents, scattered", "randwrite", "64k", 4}, r.extents); err != nil {
			return err
		}
		return r.away(ctx, path, workload{"4 KiB blocks, scattered", "randwrite", "4k", 4}, r.blocks)
	})
}

func (r *resyncs) away(ctx context.Context, path string, load workload, bytes int64) error {
	if err := rest(ctx, settle); err != nil {
		return err
	}
	node := r.Nodes()[2]
	if err := node.Kill(); err != nil {
		return err
	}
	if err := r.await(ctx, "returned", "a stale replica on "+node.NodeID(), func(rs []*adminpb.Replica) bool {
		return slices.ContainsFunc(rs, func(x *adminpb.Replica) bool { return x.GetNode() == node.NodeID() && x.GetRole() == "stale" })
	}); err != nil {
		return err
	}
	log := filepath.Join(node.Dir(), "writes-"+load.block) // fio appends to one that is there
	if _, err := r.fio(ctx, path, load, fmt.Sprintf("--io_size=%d", bytes), "--end_fsync=1", "--write_iolog="+log); err != nil {
		return err
	}
	written, changed, err := writesIn(log)
	if err != nil {
		return err
	}
	from := time.Now()
	if err := node.Launch(); err != nil {
		return err
	}
	traffic := &traffic{pid: node.Pid(), seen: map[string]int64{}}
	var failed error
	full := false
	if err := r.await(ctx, "returned", "all replicas in sync", func(rs []*adminpb.Replica) bool {
		failed = errors.Join(failed, traffic.look(ctx))
		full = full || slices.ContainsFunc(rs, func(x *adminpb.Replica) bool { return x.GetResync().GetFull() })
		return failed != nil || !slices.ContainsFunc(rs, func(x *adminpb.Replica) bool { return x.GetRole() != "in-sync" })
	}); err != nil {
		return err
	}
	took := time.Since(from)
	if full {
		return fmt.Errorf("%s: nobody knew what the replica had missed, all of it was copied", load.name)
	}
	if err := errors.Join(failed, traffic.look(ctx)); err != nil {
		return err
	}
	received := traffic.received()
	if received < written {
		return fmt.Errorf("%s: %d bytes were written, but only %d were seen to arrive: they were counted wrongly", load.name, written, received)
	}
	mib := func(n int64) float64 { return float64(n) / (1 << 20) }
	fmt.Fprintf(r.w, "| %s | %.1f MiB | %.1f MiB | %.1f MiB | %.2f | %.2f | %.1f s |\n", load.name, mib(written), mib(changed), mib(received),
		mib(received)/mib(changed), mib(received)/mib(written), took.Seconds())
	return nil
}

// writesIn reads a log of what fio wrote: the bytes, and the bytes of the extents that they are in.
func writesIn(log string) (written, changed int64, err error) {
	f, err := os.Open(log)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	extents := map[int64]bool{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		i := slices.Index(words, "write")
		if i < 0 {
			continue
		}
		if len(words) < i+3 {
			return 0, 0, fmt.Errorf("fio's log is not understood: %q", lines.Text())
		}
		off, err := strconv.ParseInt(words[i+1], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		n, err := strconv.ParseInt(words[i+2], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		written += n
		for e := off / extentSize; e*extentSize < off+n; e++ {
			extents[e] = true
		}
	}
	if written == 0 {
		return 0, 0, errors.New("fio's log has no writes")
	}
	return written, int64(len(extents)) * extentSize, lines.Err()
}

// traffic counts what a process receives over TCP, by asking the kernel again and again: the last moments of connections
// that were closed are missed.
type traffic struct {
	pid  int
	seen map[string]int64 // by connection
}

var bytesReceived = regexp.MustCompile(`\bbytes_received:(\d+)`)

func (t *traffic) look(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "ss", "--tcp", "--numeric", "--processes", "--info", "--oneline", "--no-header").Output()
	if err != nil {
		return fmt.Errorf("ss: %w: %s", err, stderr(err))
	}
	for line := range bytes.Lines(out) {
		m, words := bytesReceived.FindSubmatch(line), strings.Fields(string(line))
		if m == nil || !bytes.Contains(line, fmt.Appendf(nil, "pid=%d,", t.pid)) {
			continue
		}
		n, err := strconv.ParseInt(string(m[1]), 10, 64)
		if err != nil {
			return err
		}
		ends := strings.Join(words[3:5], " ")
		t.seen[ends] = max(t.seen[ends], n)
	}
	return nil
}

func (t *traffic) received() (sum int64) {
	for _, n := range t.seen {
		sum += n
	}
	return sum
}

// replicas sets how many replicas a volume is to have.
func (r *resyncs) replicas(ctx context.Context, name string, n int) error {
	_, err := r.Nodes()[0].Ctl(ctx, "volume", "set", name, "--replicas", strconv.Itoa(n))
	return err
}

// rebuilds measures how fast a volume that nobody writes gets a third replica, in MiB/s, against a copy of a file.
func (r *resyncs) rebuilds(ctx context.Context) (speed float64, err error) {
	fmt.Fprintf(r.w, "## Rebuild\n\nA filled volume of %d MiB in use, but idle, is given a third replica: from the command until it is in sync, copied, flushed and compared. "+
		"Beside it, in turns, a copy of a file of that size with O_DIRECT on the same disk; medians of %d.\n\n", r.volume>>20, r.rounds)
	err = r.with(ctx, "rebuilt", r.volume, 2, func(string) error {
		plain := filepath.Join(r.Nodes()[0].Dir(), "plain")
		defer os.Remove(plain)
		defer os.Remove(plain + ".copy")
		if _, err := command(ctx, "dd", "if=/dev/urandom", "of="+plain, "bs=1M", fmt.Sprintf("count=%d", r.volume>>20), "conv=fsync", "status=none"); err != nil {
			return err
		}
		var ours, files []float64
		for range r.rounds {
			from := time.Now()
			if err := errors.Join(r.replicas(ctx, "rebuilt", 3), r.inSync(ctx, "rebuilt", 3)); err != nil {
				return err
			}
			ours = append(ours, float64(r.volume>>20)/time.Since(from).Seconds())
			if err := errors.Join(r.replicas(ctx, "rebuilt", 2), r.inSync(ctx, "rebuilt", 2), rest(ctx, 2*time.Second)); err != nil {
				return err
			}
			from = time.Now()
			if _, err := command(ctx, "dd", "if="+plain, "of="+plain+".copy", "bs=1M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"); err != nil {
				return err
			}
			files = append(files, float64(r.volume>>20)/time.Since(from).Seconds())
		}
		speed = median(ours)
		fmt.Fprintf(r.w, "| rebuild | copy of a file | ratio |\n|---|---|---|\n| %.0f MiB/s | %.0f MiB/s | %.2f |\n\n", speed, median(files), speed/median(files))
		return nil
	})
	return speed, err
}

// foreground measures what a workload feels of a rebuild, of a volume that takes longer than that.
func (r *resyncs) foreground(ctx context.Context, speed float64) error {
	// Copying is about half of a rebuild, and longer ones are faster.
	gib := int64(speed*4*r.window.Seconds())/1024 + 1
	size := min(gib<<30, r.most)
	fmt.Fprintf(r.w, "## Foreground during a rebuild\n\nfio (io_uring, direct) writes at random to a filled raw volume of %d GiB with two replicas, for %v without and %v during "+
		"the rebuild of a third, which is under way all that time. What was copied includes what the writes made to be copied again.\n\n", size>>30, r.window, r.window)
	fmt.Fprintf(r.w, "| 4 KiB random writes | IOPS | p50 | p99 | p99.9 | during: IOPS | p50 | p99 | p99.9 | p99 / without | p99.9 / without | copied |\n"+
		"|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	defer fmt.Fprintln(r.w)
	return r.with(ctx, "busy", size, 2, func(path string) error {
		for _, f := range []struct {
			load workload
			more []string
		}{
			{workload{"300 a second, QD 1", "randwrite", "4k", 1}, []string{"--rate_iops=300"}},
			{workload{"as many as it can, QD 4", "randwrite", "4k", 4}, nil},
		} {
			if err := rest(ctx, 10*time.Second); err != nil { // for what was written and freed before
				return err
			}
			run := func(ctx context.Context, span time.Duration) (fioReport, error) {
				return r.fio(ctx, path, f.load, slices.Concat(f.more, []string{"--time_based", fmt.Sprintf("--runtime=%d", int(span.Seconds()))})...)
			}
			if err := r.foregroundRow(ctx, f.load.name, run); err != nil {
				return fmt.Errorf("%s: %w", f.load.name, err)
			}
		}
		return nil
	})
}

func (r *resyncs) foregroundRow(ctx context.Context, name string, run func(context.Context, time.Duration) (fioReport, error)) error {
	without, err := run(ctx, r.window)
	if err != nil {
		return err
	}
	if err := r.begin(ctx, run); err != nil {
		return err
	}
	type result struct {
		fioReport
		err error
	}
	done := make(chan result, 1)
	go func() {
		during, err := run(ctx, r.window)
		done <- result{during, err}
	}()
	from, first := time.Now(), r.copied(ctx)
	last := first
	var during result
	for over := false; !over; {
		select {
		case during = <-done:
			over = true
		case <-time.After(250 * time.Millisecond):
		}
		if last >= 0 {
			last = r.copied(ctx)
		}
	}
	span := time.Since(from)
	if during.err != nil {
		return during.err
	}
	fmt.Fprintf(r.w, "| %s | %.0f | %s", name, without.Write.IOPS, strings.Join(without.percentiles(), " | "))
	if last < 0 {
		fmt.Fprintf(r.w, " | the rebuild was over before the %v were: not measured | | | | | | |\n", r.window)
	} else {
		a, b := without.Write.Latency.Percentile, during.Write.Latency.Percentile
		fmt.Fprintf(r.w, " | %.0f | %s | %.2f | %.2f | %.0f MiB/s |\n", during.Write.IOPS, strings.Join(during.percentiles(), " | "),
			b[p99]/a[p99], b[p999]/a[p999], float64(last-first)/(1<<20)/span.Seconds())
	}
	return errors.Join(r.replicas(ctx, "busy", 2), r.inSync(ctx, "busy", 2))
}

// begin has a third replica made while a workload runs, and returns once copying is under way.
func (r *resyncs) begin(ctx context.Context, run func(context.Context, time.Duration) (fioReport, error)) error {
	warm, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() {
		_, err := run(warm, time.Hour)
		ended <- err
	}()
	err := errors.Join(r.replicas(ctx, "busy", 3), r.await(ctx, "busy", "copies to a third replica", func(rs []*adminpb.Replica) bool {
		return copiedTo(rs) > 0
	}))
	select {
	case e := <-ended:
		return errors.Join(err, fmt.Errorf("the workload ended early: %w", e))
	default:
	}
	stop()
	<-ended // with the signal's status
	return err
}

// copied is how many bytes the rebuild under way has copied, -1 where none is.
func (r *resyncs) copied(ctx context.Context) int64 {
	v, err := r.Nodes()[0].Admin().GetVolume(ctx, &adminpb.GetRequest{Ref: "busy"})
	if err != nil {
		return -1
	}
	return copiedTo(v.GetReplicas())
}

func copiedTo(rs []*adminpb.Replica) int64 {
	for _, x := range rs {
		if s := x.GetResync(); s != nil && slices.Contains([]string{"copy", "drain", "mirror"}, s.GetStage()) {
			return s.GetDoneBytes()
		}
	}
	return -1
}

// The names of percentiles in fio's report.
const p50, p99, p999 = "50.000000", "99.000000", "99.900000"

func (r fioReport) percentiles() (cells []string) {
	for _, p := range []string{p50, p99, p999} {
		cells = append(cells, fmt.Sprintf("%.2f ms", r.Write.Latency.Percentile[p]/1e6))
	}
	return cells
}
