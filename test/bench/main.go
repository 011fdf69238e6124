// Command bench measures Ballast against the alternatives on the same machine in the same run: only the ratios mean
// anything. It needs root, fio, nbdkit and qemu-storage-daemon.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime/pprof"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/disk"
)

// benchmarks in the order in which "all" runs them.
var benchmarks = []struct {
	name string
	run  func(ctx context.Context, w io.Writer) error
}{
	{"frontend", benchFrontend},
	{"nbd", benchNBD},
	{"store", benchStore},
	{"replication", benchReplication},
	{"reads", benchReads},
	{"rpc", benchRPC},
	{"cluster", benchThreeNodes},
	{"resync", benchResync},
	{"failover", benchFailover},
	{"idle", benchIdle},
}

// replicaCommand is the first argument of the processes that the replication benchmark starts.
const replicaCommand = "replica"

// quick has "cluster" and "resync" be small and short: to see that they work, for their figures say little then.
var quick bool

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, w io.Writer) (err error) {
	var names []string
	for _, b := range benchmarks {
		names = append(names, b.name)
	}
	disk.UseProcessors() // as ballastd does
	if len(args) > 2 && args[0] == replicaCommand {
		return replicaProcess(ctx, args[1:])
	}
	if len(args) == 2 && args[0] == bareCommand {
		return bareCopy(ctx, args[1])
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	profile := flags.String("cpuprofile", "", "write a CPU profile of this process to the `file`")
	flags.Func("workload", "measure only workloads whose names match the `expression`", func(s string) (err error) {
		wantedLoads, err = regexp.Compile(s)
		return err
	})
	flags.BoolVar(&quick, "quick", false, "make cluster and resync small and short: their figures say little then")
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: bench [options] all|%s ...\n", strings.Join(names, "|"))
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	wanted := flags.Args()
	if slices.Contains(wanted, "all") {
		wanted = names
	}
	if len(wanted) == 0 {
		flags.Usage()
		return errors.New("no benchmark was named")
	}
	for _, name := range wanted {
		if !slices.Contains(names, name) {
			flags.Usage()
			return fmt.Errorf("there is no benchmark %q", name)
		}
	}
	if *profile != "" {
		file, err := os.Create(*profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer func() {
			pprof.StopCPUProfile()
			err = errors.Join(err, file.Close())
		}()
	}
	for _, b := range benchmarks {
		if !slices.Contains(wanted, b.name) {
			continue
		}
		if err := b.run(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
	}
	return nil
}
