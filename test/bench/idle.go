package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// benchIdle measures what the daemon costs while nothing happens, with no volume and with 50 staged ones.
func benchIdle(ctx context.Context, w io.Writer) error {
	const volumes, watch = 50, 60 * time.Second
	return withDaemon(ctx, func(d *harness.Daemon, o *harness.Orchestrator) error {
		fmt.Fprintf(w, "## Idle cost\n\nOver %v each, after 10 s of rest. Every second volume carries ext4, the others are raw.\n\n", watch)
		fmt.Fprintf(w, "| Staged volumes | RSS | of it heap and stacks | CPU, of one core | threads |\n|---|---|---|---|---|\n")
		if err := idleRow(ctx, w, d, 0, watch/2); err != nil {
			return err
		}
		claims := make([]*harness.Claim, volumes)
		if err := inParallel(volumes, 2, func(i int) error {
			claims[i] = &harness.Claim{Name: fmt.Sprintf("idle%d", i), Size: 1 << 30, FSType: []string{"ext4", ""}[i%2]}
			return o.Up(ctx, claims[i])
		}); err != nil {
			return err
		}
		if err := idleRow(ctx, w, d, volumes, watch); err != nil {
			return err
		}
		fmt.Fprintln(w)
		return inParallel(volumes, 2, func(i int) error { return o.Down(ctx, claims[i]) })
	}, "--over-provision=100", "--log-level=warn")
}

// idleCost is what a daemon uses while nothing happens.
type idleCost struct {
	harness.Cost
	share float64 // of a core
}

// String is cells of a table: RSS, anonymous memory, CPU, threads.
func (c idleCost) String() string {
	return fmt.Sprintf("%d MiB | %d MiB | %.2f %% | %d", c.RSS>>20, c.Anonymous>>20, 100*c.share, c.Threads)
}

// idleCosts watches daemons for a while, all at once, after some rest.
func idleCosts(ctx context.Context, watch time.Duration, ds ...*harness.Daemon) ([]idleCost, error) {
	if err := rest(ctx, 10*time.Second); err != nil {
		return nil, err
	}
	var before []harness.Cost
	from := time.Now()
	for _, d := range ds {
		c, err := d.Cost()
		if err != nil {
			return nil, err
		}
		before = append(before, c)
	}
	if err := rest(ctx, watch); err != nil {
		return nil, err
	}
	var costs []idleCost
	for i, d := range ds {
		c, err := d.Cost()
		if err != nil {
			return nil, err
		}
		costs = append(costs, idleCost{c, float64(c.CPU-before[i].CPU) / float64(time.Since(from))})
	}
	return costs, nil
}

func idleRow(ctx context.Context, w io.Writer, d *harness.Daemon, volumes int, watch time.Duration) error {
	costs, err := idleCosts(ctx, watch, d)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "| %d | %v |\n", volumes, costs[0])
	return nil
}
