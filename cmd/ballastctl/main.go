// Command ballastctl is the admin's tool of Ballast. `ballastctl help` documents it.
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
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := run(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
	stop()
	os.Exit(code)
}
