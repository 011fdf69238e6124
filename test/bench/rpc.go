package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/harness"
)

// rpcRuns is how often each call is measured.
const rpcRuns = 200

// listed is how many volumes the long list has.
const listed = 10_000

// samples are the durations of one thing measured.
type samples []time.Duration

// at is the p-th percentile, nearest rank.
func (s samples) at(p int) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(len(sorted)-1, (len(sorted)*p+99)/100-1)]
}

// time measures fn once.
func (s *samples) time(fn func() error) error {
	from := time.Now()
	if err := fn(); err != nil {
		return err
	}
	*s = append(*s, time.Since(from))
	return nil
}

func (s samples) row(w io.Writer, what string) {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
	fmt.Fprintf(w, "| %s | %d | %s | %s | %s |\n", what, len(s), ms(s.at(50)), ms(s.at(99)), ms(s.at(100)))
}

// withBinaries runs fn with the commands built into a temporary directory, which it removes with all that is in it.
func withBinaries(ctx context.Context, fn func(dir string, bin harness.Binaries) error) (err error) {
	dir, err := os.MkdirTemp("", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil || !mountsLeft(dir) {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	bin, err := harness.Build(ctx, dir, false)
	if err != nil {
		return err
	}
	return fn(dir, bin)
}

// withDaemon runs fn with a ballastd in a temporary directory.
func withDaemon(ctx context.Context, fn func(*harness.Daemon, *harness.Orchestrator) error, args ...string) error {
	return withBinaries(ctx, func(dir string, bin harness.Binaries) error { return runDaemon(ctx, dir, bin, fn, args) })
}

func runDaemon(ctx context.Context, dir string, bin harness.Binaries, fn func(*harness.Daemon, *harness.Orchestrator) error, args []string) (err error) {
	d, err := harness.New(harness.Options{Dir: dir, Bin: bin, Args: args})
	if err != nil {
		return err
	}
	defer func() {
		if e := d.Close(); e != nil {
			err = errors.Join(err, e)
		}
	}()
	if err := d.Start(ctx); err != nil {
		return err
	}
	o := &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: dir + "/o", PerCall: time.Minute}
	if err := fn(d, o); err != nil {
		return fmt.Errorf("%w\nthe end of the daemon's log:\n%s", err, d.LogTail(20))
	}
	return nil
}

// mountsLeft tells whether removing a directory would reach into something mounted.
func mountsLeft(dir string) bool {
	m, err := harness.MountsUnder(dir)
	return err != nil || len(m) > 0
}

// inParallel runs fn(0) to fn(n-1), at most so many at once, and returns the first error.
func inParallel(n, at int, fn func(i int) error) error {
	var mu sync.Mutex
	var first error
	var wg sync.WaitGroup
	next := make(chan int)
	for range at {
		wg.Go(func() {
			for i := range next {
				if err := fn(i); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	return first
}

// benchRPC measures CSI calls over the socket, one after the other, and a long list.
func benchRPC(ctx context.Context, w io.Writer) error {
	return withDaemon(ctx, func(d *harness.Daemon, o *harness.Orchestrator) error {
		fmt.Fprintf(w, "## CSI calls\n\nOne after the other over the Unix socket, every change durable when it is answered.\n\n")
		fmt.Fprintf(w, "| Call | n | p50 | p99 | max |\n|---|---|---|---|---|\n")
		if err := rpcCalls(ctx, w, o, rpcRuns, nil); err != nil {
			return err
		}
		return rpcList(ctx, w, o)
	}, "--over-provision=100", "--pool-capacity=50Gi", "--log-level=warn")
}

// rpcCalls measures each call so many times, on volumes with these parameters.
func rpcCalls(ctx context.Context, w io.Writer, o *harness.Orchestrator, runs int, parameters map[string]string) error {
	var create, attach, stageExt4, stageBlock, unstage, expand, snapshot, restore, clone, deleteSnapshot, deleteVolume samples
	for i := range runs {
		c := &harness.Claim{Name: fmt.Sprintf("v%d", i), Size: 64 << 20, Parameters: parameters}
		stage := &stageBlock
		if i%2 == 0 {
			c.FSType, stage = "ext4", &stageExt4
		}
		snap := ""
		fromSnapshot := &harness.Claim{Name: c.Name + "-r", Size: 2 * c.Size, FSType: c.FSType, Parameters: parameters}
		fromVolume := &harness.Claim{Name: c.Name + "-c", Size: 2 * c.Size, FSType: c.FSType, Parameters: parameters}
		for _, step := range []struct {
			s  *samples
			fn func() error
		}{
			{&create, func() error { return o.Create(ctx, c) }},
			{&attach, func() error { return o.Attach(ctx, c) }},
			{stage, func() error { return errors.Join(o.Stage(ctx, c), o.Publish(ctx, c)) }},
			{nil, func() error { return soil(o.TargetPath(c), c.FSType) }},
			{&snapshot, func() (err error) { snap, err = o.Snapshot(ctx, c, c.Name); return err }},
			{&restore, func() error { fromSnapshot.Source = harness.FromSnapshot(snap); return o.Create(ctx, fromSnapshot) }},
			{&clone, func() error { fromVolume.Source = harness.FromVolume(c.ID()); return o.Create(ctx, fromVolume) }},
			{&unstage, func() error { return errors.Join(o.Unpublish(ctx, c), o.Unstage(ctx, c)) }},
			{nil, func() error { return o.Down(ctx, c) }},
			{&expand, func() error { return o.Expand(ctx, c, 2*c.Size, false) }},
			{&deleteSnapshot, func() error { return o.DeleteSnapshot(ctx, snap) }},
			{&deleteVolume, func() error { return o.Delete(ctx, c) }},
			{nil, func() error { return errors.Join(o.Delete(ctx, fromSnapshot), o.Delete(ctx, fromVolume)) }},
		} {
			if err := ctx.Err(); err != nil {
				return err
			}
			once := step.s
			if once == nil {
				once = new(samples)
			}
			if err := once.time(step.fn); err != nil {
				return err
			}
		}
	}
	create.row(w, "CreateVolume")
	attach.row(w, "ControllerPublishVolume")
	stageExt4.row(w, "NodeStageVolume + NodePublishVolume, ext4 (with its mkfs)")
	stageBlock.row(w, "NodeStageVolume + NodePublishVolume, raw block")
	snapshot.row(w, "CreateSnapshot of a volume in use, with 1 MiB to flush")
	restore.row(w, "CreateVolume from a snapshot")
	clone.row(w, "CreateVolume from a volume")
	unstage.row(w, "NodeUnpublishVolume + NodeUnstageVolume")
	expand.row(w, "ControllerExpandVolume")
	deleteSnapshot.row(w, "DeleteSnapshot")
	deleteVolume.row(w, "DeleteVolume")
	return nil
}

// soil leaves 1 MiB in the page cache.
func soil(path, fsType string) error {
	if fsType != "" {
		path += "/file"
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(slices.Repeat([]byte{0xba}, 1<<20))
	return errors.Join(err, f.Close())
}

func rpcList(ctx context.Context, w io.Writer, o *harness.Orchestrator) error {
	from := time.Now()
	if err := inParallel(listed, 64, func(i int) error {
		return o.Create(ctx, &harness.Claim{Name: fmt.Sprintf("many-%d", i), Size: 1 << 20})
	}); err != nil {
		return err
	}
	made := time.Since(from)
	var list, paged samples
	for range 20 {
		if err := list.time(func() error {
			r, err := o.CSI.ListVolumes(ctx, &csi.ListVolumesRequest{})
			if err == nil && len(r.GetEntries()) != listed {
				err = fmt.Errorf("the list has %d of %d volumes", len(r.GetEntries()), listed)
			}
			return err
		}); err != nil {
			return err
		}
		if err := paged.time(func() error { return listPages(ctx, o) }); err != nil {
			return err
		}
	}
	list.row(w, "ListVolumes, 10,000 at once")
	paged.row(w, "ListVolumes, 10,000 in pages of 500")
	fmt.Fprintf(w, "\n10,000 volumes were created 64 at a time in %.1f s: %.0f a second.\n\n", made.Seconds(), listed/made.Seconds())
	return nil
}

func listPages(ctx context.Context, o *harness.Orchestrator) error {
	n := 0
	for token := ""; ; {
		r, err := o.CSI.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 500, StartingToken: token})
		if err != nil {
			return err
		}
		n += len(r.GetEntries())
		if token = r.GetNextToken(); token == "" {
			break
		}
	}
	if n != listed {
		return fmt.Errorf("the pages have %d of %d volumes", n, listed)
	}
	return nil
}
