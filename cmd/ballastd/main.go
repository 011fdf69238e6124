// Command ballastd is Ballast's daemon. Without configuration it is a one-node cluster in its data directory.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/ballast-csi/ballast/pkg/ioflusher"
)

// version is set when it is linked.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := run(ctx, os.Args[1:], process{stdout: os.Stdout, stderr: os.Stderr, prepare: ioflusher.Enable})
	stop()
	os.Exit(code)
}
