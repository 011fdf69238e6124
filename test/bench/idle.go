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

func idleRow(ctx context.Context, w io.Writer, d *harness.Daemon, volumes int, watch time.Duration) error {
	rest := func(t time.Duration) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(t):
			return nil
		}
	}
	if err := rest(10 * time.Second); err != nil {
		return err
	}
	before, err := d.Cost()
	if err != nil {
		return err
	}
	from := time.Now()
	if err := rest(watch); err != nil {
		return err
	}
	after, err := d.Cost()
	if err != nil {
		return err
	}
	share := float64(after.CPU-before.CPU) / float64(time.Since(from))
	fmt.Fprintf(w, "| %d | %d MiB | %d MiB | %.2f %% | %d |\n", volumes, after.RSS>>20, after.Anonymous>>20, 100*share, after.Threads)
	return nil
}
