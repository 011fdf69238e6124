package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// benchThreeNodes measures calls and idle cost on three nodes, with volumes of three replicas.
func benchThreeNodes(ctx context.Context, w io.Writer) error {
	runs, volumes, watch := rpcRuns, 50, 60*time.Second
	if quick {
		runs, volumes, watch = 10, 10, 5*time.Second
	}
	parameters := map[string]string{"replicas": "3"}
	return withThree(ctx, nil, func(t *three) error {
		fmt.Fprintf(w, "## CSI calls on three nodes\n\nThree controllers, every volume with three replicas. One after the other over the first node's Unix socket, every change durable "+
			"on a majority when it is answered. All three nodes share one disk.\n\n")
		fmt.Fprintf(w, "| Call | n | p50 | p99 | max |\n|---|---|---|---|---|\n")
		if err := rpcCalls(ctx, w, t.at[0], runs, parameters); err != nil {
			return err
		}
		fmt.Fprintln(w)
		return clusterIdle(ctx, w, t, volumes, watch, parameters)
	}, "--over-provision=100", "--pool-capacity=50Gi", "--log-level=warn")
}

func clusterIdle(ctx context.Context, w io.Writer, t *three, volumes int, watch time.Duration, parameters map[string]string) error {
	fmt.Fprintf(w, "## Idle cost of three nodes\n\nVolumes of three replicas, staged on the three nodes in turn; every node has a replica of each. Every second one carries ext4, "+
		"the others are raw. Over %v, after 10 s of rest.\n\n", watch)
	fmt.Fprintf(w, "| Node | staged there, of all | RSS | of it heap and stacks | CPU, of one core | threads |\n|---|---|---|---|---|---|\n")
	claims := make([]*harness.Claim, volumes)
	each := func(fn func(*harness.Orchestrator, *harness.Claim) error) error {
		return inParallel(volumes, 2, func(i int) error { return fn(t.at[i%3], claims[i]) })
	}
	rows := func(n int, watch time.Duration) error {
		costs, err := idleCosts(ctx, watch, t.Nodes()...)
		if err != nil {
			return err
		}
		for i, c := range costs {
			fmt.Fprintf(w, "| %s | %d of %d | %v |\n", t.Nodes()[i].NodeID(), (n+2-i)/3, n, c)
		}
		return nil
	}
	if err := rows(0, watch/2); err != nil {
		return err
	}
	for i := range claims {
		claims[i] = &harness.Claim{Name: fmt.Sprintf("idle%d", i), Size: 1 << 30, FSType: []string{"ext4", ""}[i%2], Parameters: parameters}
	}
	if err := each(func(o *harness.Orchestrator, c *harness.Claim) error { return o.Up(ctx, c) }); err != nil {
		return err
	}
	if err := rows(volumes, watch); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return each(func(o *harness.Orchestrator, c *harness.Claim) error { return o.Down(ctx, c) })
}
