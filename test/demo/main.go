// Command demo shows one node of Ballast at work, in a temporary directory: it starts the real daemon, talks CSI to it as
// an orchestrator does, and looks at the result with the real ballastctl. It needs root and takes about half a minute;
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
	d, err := harness.New(harness.Options{
		Dir: dir, Bin: binaries, NodeID: "node-1",
		Args: []string{"--pool-capacity", "8Gi"},
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe end of the daemon's log:\n%s", err, d.LogTail(15))
		}
		if *keepLog != "" {
			b, readErr := os.ReadFile(d.LogPath())
			if readErr == nil {
				readErr = os.WriteFile(*keepLog, b, 0o644)
			}
			err = errors.Join(err, readErr)
		}
		err = errors.Join(err, d.Close())
	}()
	s := &show{
		d: d, out: newScreen(os.Stdout), bin: binaries, fast: *fast,
		o: &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: dir + "/pods", PerCall: 30 * time.Second},
	}
	return s.play(ctx)
}
