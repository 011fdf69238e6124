package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/ballast-csi/ballast/test/harness"
	"github.com/ballast-csi/ballast/test/netlab"
)

// failoverRuns is how often each way to lose a node is measured.
const failoverRuns = 9

// failover is a cluster of three with one volume on all of them.
type failover struct {
	*three
	lab   *netlab.Lab
	claim *harness.Claim
}

// benchFailover measures for how long a volume is away when its node is lost: until the first write with a sync is
// acknowledged on another node. The nodes take turns, so that the lost one leads the controllers now and then.
func benchFailover(ctx context.Context, w io.Writer) (err error) {
	lab, err := netlab.New(78, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	return withThree(ctx, lab, func(t *three) error {
		return (&failover{three: t, lab: lab, claim: &harness.Claim{
			Name: "moved", Size: 1 << 30, FSType: "ext4", Parameters: map[string]string{"replicas": "3"},
		}}).measure(ctx, w)
	}, "--pool-capacity", "8Gi")
}

func (f *failover) measure(ctx context.Context, w io.Writer) error {
	c := f.Cluster
	if err := f.at[0].Create(ctx, f.claim); err != nil {
		return err
	}
	fmt.Fprintf(w, "## Failover\n\nThree nodes on one machine, a volume of three replicas with ext4, from the loss of its node to the first synced write on another.\n\n")
	fmt.Fprintf(w, "| The node | n | median | max | detach, median | stage and publish, median |\n|---|---|---|---|---|---|\n")
	for _, way := range []struct {
		what string
		lose func(ctx context.Context, i int) error
		back func(ctx context.Context, i int) error
	}{
		{"gives it back (clean detach)", nil, nil},
		{"is killed (kill -9)", func(_ context.Context, i int) error { return c.Nodes()[i].Kill() },
			func(ctx context.Context, i int) error { return c.Nodes()[i].Start(ctx) }},
		{"is cut off", func(_ context.Context, i int) error { return f.lab.Isolate(i) },
			func(context.Context, int) error { return f.lab.HealAll() }},
	} {
		var all, detach, stage samples
		for run := range failoverRuns {
			from, to := run%3, (run+1)%3
			if err := f.run(ctx, from, to, way.lose, way.back, &all, &detach, &stage); err != nil {
				return fmt.Errorf("the node %s, run %d: %w", way.what, run+1, err)
			}
		}
		fmt.Fprintf(w, "| %s | %d | %.2f s | %.2f s | %.2f s | %.2f s |\n", way.what, len(all),
			all.at(50).Seconds(), all.at(100).Seconds(), detach.at(50).Seconds(), stage.at(50).Seconds())
	}
	fmt.Fprintln(w)
	return f.at[0].Delete(ctx, f.claim)
}

// run moves the volume from one node to another, once, and puts everything back.
func (f *failover) run(ctx context.Context, from, to int, lose, back func(context.Context, int) error, all, detach, stage *samples) error {
	old, other := f.at[from], f.at[to]
	if err := old.Up(ctx, f.claim); err != nil {
		return err
	}
	if err := f.write(old); err != nil {
		return err
	}
	if err := f.inSync(ctx, f.claim.Name, 3); err != nil {
		return err
	}
	if lose == nil {
		if err := errors.Join(old.Unpublish(ctx, f.claim), old.Unstage(ctx, f.claim)); err != nil {
			return err
		}
	} else if err := lose(ctx, from); err != nil {
		return err
	}
	gone := *other // its calls go to the node that lives
	gone.NodeID = old.NodeID
	if err := all.time(func() error {
		if err := detach.time(func() error { return gone.Detach(ctx, f.claim) }); err != nil {
			return err
		}
		return stage.time(func() error {
			for _, step := range []func(context.Context, *harness.Claim) error{other.Attach, other.Stage, other.Publish} {
				if err := step(ctx, f.claim); err != nil {
					return err
				}
			}
			return f.write(other)
		})
	}); err != nil {
		return err
	}
	if back != nil {
		if err := back(ctx, from); err != nil {
			return err
		}
		if err := errors.Join(old.Unpublish(ctx, f.claim), old.Unstage(ctx, f.claim)); err != nil {
			return err
		}
	}
	if err := f.inSync(ctx, f.claim.Name, 3); err != nil {
		return err
	}
	return other.Down(ctx, f.claim)
}

// write writes a block to a file of the volume, and syncs it.
func (f *failover) write(o *harness.Orchestrator) error {
	file, err := os.OpenFile(filepath.Join(o.TargetPath(f.claim), "file"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(make([]byte, 4096))
	return errors.Join(err, file.Sync(), file.Close())
}
