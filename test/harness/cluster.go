package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/test/netlab"
)

// clusterPort is the first of those that each node uses, on an address of its own.
const clusterPort = 9820

// ClusterOptions of a cluster.
type ClusterOptions struct {
	// Dir has a directory for each node.
	Dir string
	Bin Binaries
	// Nodes is how many, Controllers how many of them are controllers: the first ones; 0 is all.
	Nodes, Controllers int
	// Lab has the nodes' networks. Without one they are at addresses of the machine's loopback device.
	Lab *netlab.Lab
	// Split is as in Options.
	Split bool
	// Args are added to every node's command line.
	Args []string
}

// Cluster is several daemons that are the nodes n1, n2 and so on of one cluster.
type Cluster struct {
	o     ClusterOptions
	nodes []*Daemon
}

// NewCluster prepares the nodes; Start starts them.
func NewCluster(o ClusterOptions) (*Cluster, error) {
	if o.Controllers == 0 {
		o.Controllers = o.Nodes
	}
	c := &Cluster{o: o}
	for i := range o.Nodes {
		d := Options{Dir: filepath.Join(o.Dir, fmt.Sprintf("n%d", i+1)), Bin: o.Bin, NodeID: fmt.Sprintf("n%d", i+1), Split: o.Split}
		d.Args = append(slices.Clone(o.Args), "--listen", c.address(i))
		if o.Lab != nil {
			d.Wrap = func(name string, args ...string) *exec.Cmd { return o.Lab.Command(i, name, args...) }
		}
		n, err := New(d)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.nodes = append(c.nodes, n)
	}
	return c, nil
}

func (c *Cluster) address(i int) string {
	host := fmt.Sprintf("127.0.77.%d", i+1)
	if c.o.Lab != nil {
		host = c.o.Lab.Nodes()[i].Addr.String()
	}
	return fmt.Sprintf("%s:%d", host, clusterPort)
}

// Nodes of the cluster, in order.
func (c *Cluster) Nodes() []*Daemon { return c.nodes }

// Start makes the cluster: the first node founds it, the others join. Every controller has a vote then: it can do without
// any minority of them.
func (c *Cluster) Start(ctx context.Context) error {
	if err := c.nodes[0].Start(ctx); err != nil {
		return err
	}
	for i := 1; i < len(c.nodes); i++ {
		if err := c.Join(ctx, i); err != nil {
			return err
		}
	}
	return c.WaitVoting(ctx, c.o.Controllers)
}

// WaitVoting waits until so many controllers have caught up and count for a majority.
func (c *Cluster) WaitVoting(ctx context.Context, controllers int) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		out, err := c.nodes[0].Ctl(ctx, "cluster", "status", "-o", "json")
		var status struct {
			Controllers []struct{ Voter bool }
		}
		if err == nil {
			err = json.Unmarshal(out, &status)
		}
		voters := 0
		for _, x := range status.Controllers {
			if x.Voter {
				voters++
			}
		}
		if err == nil && voters == controllers {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d controllers have a vote: %w", voters, controllers, errors.Join(err, ctx.Err()))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Join starts a node for the first time: with a token that the first node gives.
func (c *Cluster) Join(ctx context.Context, i int) error {
	roles := "storage"
	if i < c.o.Controllers {
		roles = "controller,storage"
	}
	out, err := c.nodes[0].Ctl(ctx, "cluster", "join-token", "create", "--role", roles, "--node", c.nodes[i].NodeID(), "-o", "json")
	if err != nil {
		return err
	}
	var token struct{ Token string }
	if err := json.Unmarshal(out, &token); err != nil || token.Token == "" {
		return fmt.Errorf("join token %q: %w", out, err)
	}
	n := c.nodes[i]
	args := n.o.Args
	n.o.Args = append(slices.Clone(args), "--join", token.Token, "--controllers", c.address(0))
	err = n.Start(ctx)
	n.o.Args = args // from now on it finds its cluster by itself
	if err != nil {
		return fmt.Errorf("node %s: %w", n.NodeID(), err)
	}
	return nil
}

// Restart starts every node that does not run, at once.
func (c *Cluster) Restart(ctx context.Context) error {
	var errs []error
	for _, n := range c.nodes {
		if n.Pid() == 0 {
			errs = append(errs, n.Launch())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, n := range c.nodes {
		errs = append(errs, n.WaitReady(ctx))
	}
	return errors.Join(errs...)
}

// Close ends all nodes as Daemon.Close does.
func (c *Cluster) Close() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.Close())
	}
	return errors.Join(errs...)
}
