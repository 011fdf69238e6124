// Command demo shows Ballast at work, in a temporary directory: it starts the real daemon, three times or once, talks CSI to
// it as an orchestrator does, and looks at the result with the real ballastctl. It needs root and takes about half a minute;
// it takes away all that it made, also where it fails or is interrupted, and any failure is an exit code of 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case err == nil:
	case interrupted:
		fmt.Fprintln(os.Stderr, "\ninterrupted; everything was taken away")
		os.Exit(130)
	default:
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	bin := flag.String("bin", "", "`directory` of ballastd and ballastctl (default: build them)")
	fast := flag.Bool("fast", false, "do not pause for reading")
	nodes := flag.Int("nodes", 3, "3 for a cluster and a failover, 1 for one node from end to end")
	keepLog := flag.String("log", "", "`file` to copy the daemon's log to")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("it makes loop devices and mounts, so it needs root; try: sudo make demo")
	}
	// A failure leaves nothing behind but what it says.
	dir, err := os.MkdirTemp("", "ballast-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	binaries := harness.In(*bin)
	if *bin == "" {
		if binaries, err = harness.Build(ctx, dir, false); err != nil {
			return err
		}
	}
	out := newScreen(os.Stdout)
	switch *nodes {
	case 1:
		return oneNode(ctx, dir, binaries, out, *fast, *keepLog)
	case 3:
		return threeNodes(ctx, dir, binaries, out, *fast, *keepLog)
	}
	return fmt.Errorf("there is no demo with %d nodes, only with 1 and with 3", *nodes)
}

func oneNode(ctx context.Context, dir string, bin harness.Binaries, out *screen, fast bool, keepLog string) (err error) {
	d, err := harness.New(harness.Options{
		Dir: dir, Bin: bin, NodeID: "node-1",
		Args: []string{"--pool-capacity", "8Gi"},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(keepLogs(ctx, err, keepLog, d), d.Close()) }()
	s := &show{
		d: d, out: out, bin: bin, fast: fast,
		o: &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: dir + "/pods", PerCall: 30 * time.Second},
	}
	return s.play(ctx)
}

func threeNodes(ctx context.Context, dir string, bin harness.Binaries, out *screen, fast bool, keepLog string) (err error) {
	c, err := harness.NewCluster(harness.ClusterOptions{Dir: dir, Bin: bin, Nodes: 3, Args: []string{"--pool-capacity", "8Gi"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(keepLogs(ctx, err, keepLog, c.Nodes()...), c.Close()) }()
	s := &clusterShow{show: show{d: c.Nodes()[0], out: out, bin: bin, fast: fast}, c: c}
	return s.play(ctx)
}

// keepLogs adds the end of the daemons' logs to an error, and copies the logs to a file where one is given.
func keepLogs(ctx context.Context, err error, file string, daemons ...*harness.Daemon) error {
	var all []byte
	for _, d := range daemons {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe end of the log of %s:\n%s", err, d.NodeID(), d.LogTail(15))
		}
		b, readErr := os.ReadFile(d.LogPath())
		err = errors.Join(err, readErr)
		all = append(all, b...)
	}
	if file != "" {
		err = errors.Join(err, os.WriteFile(file, all, 0o644))
	}
	return err
}
