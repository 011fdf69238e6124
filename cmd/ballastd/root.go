package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"
)

// Exit codes, documented in the root command's help.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitLocked = 3
)

type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// process is what a command line has of the process that it runs in.
type process struct {
	stdout, stderr io.Writer
	// prepare is called first when the daemon is to run. It may execute the program again.
	prepare func(*slog.Logger)
}

// run carries out a command line and returns the process's exit code. It ends when ctx does, after a clean stop.
func run(ctx context.Context, args []string, p process) int {
	root := newRoot(p)
	root.SetArgs(args)
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(p.stderr, "ballastd: %v\n", err)
	var u usageError
	switch {
	case errors.As(err, &u):
		return exitUsage
	case errors.Is(err, errLocked):
		return exitLocked
	}
	return exitFailed
}

func newRoot(p process) *cobra.Command {
	root := &cobra.Command{
		Use:   "ballastd",
		Short: "Run Ballast's daemon",
		Long: `ballastd serves volumes through CSI. Without configuration it is a one-node cluster that keeps all it has in its data
directory, and listens in its run directory:

  csi.sock     every CSI service; controller.sock and node.sock where the endpoints are split
  admin.sock   the admin API, for ballastctl

Each setting is a flag, an environment variable or a line of the YAML file that --config names, in this order of
precedence. --data-dir is BALLAST_DATA_DIR in the environment and data-dir in the file; CSI_ENDPOINT is --csi-endpoint.

It needs root, /dev/fuse, loop devices, and the tools of the filesystems that volumes are to carry. It answers CSI's
Probe as soon as the sockets are open, and is ready when what an earlier process left has been put in order. SIGTERM
stops it: calls under way are finished, devices are flushed and taken down.

Exit codes: 0 stopped, 1 failed, 2 wrong settings, 3 another ballastd runs in the data directory.`,
		Example: `  ballastd
  ballastd --data-dir /srv/ballast --pool fast=/mnt/nvme,capacity=500Gi --pool big=/mnt/hdd
  ballastd --config /etc/ballast/ballastd.yaml --log-format json`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("%q is no command; see ballastd --help", args[0])}
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	settings := addFlags(root.Flags())
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := settings.config(cmd.Flags())
		if err != nil {
			return usageError{err}
		}
		log := newLogger(p.stderr, cfg.logLevel, cfg.logFormat)
		p.prepare(log)
		return serve(cmd.Context(), cfg, log)
	}
	root.AddCommand(versionCommand())
	return root
}
