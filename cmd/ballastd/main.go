// Command ballastd is Ballast's daemon. Without configuration it is a one-node cluster in its data directory.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// version is set when it is linked.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
