package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/test/harness"
	"github.com/ballast-csi/ballast/test/netlab"
)

// three is a cluster of three nodes on this machine, and an orchestrator's hand on each.
type three struct {
	*harness.Cluster
	at []*harness.Orchestrator
}

// withThree runs fn with a cluster in a temporary directory. Without a lab the nodes are at addresses of the loopback device.
func withThree(ctx context.Context, lab *netlab.Lab, fn func(*three) error, args ...string) error {
	return withBinaries(ctx, func(dir string, bin harness.Binaries) error { return runThree(ctx, dir, bin, lab, fn, args) })
}

func runThree(ctx context.Context, dir string, bin harness.Binaries, lab *netlab.Lab, fn func(*three) error, args []string) (err error) {
	c, err := harness.NewCluster(harness.ClusterOptions{Dir: dir, Bin: bin, Nodes: 3, Lab: lab, Args: args})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			for _, n := range c.Nodes() {
				err = fmt.Errorf("%w\nthe end of the log of %s:\n%s", err, n.NodeID(), n.LogTail(20))
			}
		}
		err = errors.Join(err, c.Close())
	}()
	if err := c.Start(ctx); err != nil {
		return err
	}
	t := &three{Cluster: c}
	for _, n := range c.Nodes() {
		// The end of a node sweeps its directory: what is published below it stays on no machine.
		t.at = append(t.at, &harness.Orchestrator{CSI: n.CSI(), NodeID: n.NodeID(), Dir: filepath.Join(n.Dir(), "pods"),
			PerCall: 30 * time.Second, Patience: time.Minute})
	}
	return fn(t)
}

// await asks whichever node answers for a volume's replicas, again and again, until they are as wanted.
func (t *three) await(ctx context.Context, name, what string, want func([]*adminpb.Replica) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for i := 0; ; i++ {
		one, stop := context.WithTimeout(ctx, 2*time.Second) // a node that was killed answers nothing
		v, err := t.Nodes()[i%3].Admin().GetVolume(one, &adminpb.GetRequest{Ref: name})
		stop()
		if err == nil && want(v.GetReplicas()) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s of volume %s, whose replicas are %v (%v): %w", what, name, v.GetReplicas(), err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// inSync waits until a volume has so many replicas, all of them in sync.
func (t *three) inSync(ctx context.Context, name string, n int) error {
	return t.await(ctx, name, fmt.Sprintf("%d replicas in sync", n), func(rs []*adminpb.Replica) bool {
		for _, r := range rs {
			if r.GetRole() != "in-sync" {
				return false
			}
		}
		return len(rs) == n
	})
}

// rest waits.
func rest(ctx context.Context, span time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(span):
		return nil
	}
}
