package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/nbd"
)

// benchNBD measures pkg/nbd against nbdkit's file plugin, each on a file of its own in memory, over a Unix socket.
func benchNBD(ctx context.Context, w io.Writer) (err error) {
	fmt.Fprintf(w, "## NBD server\n\nfio's nbd engine, one connection over a Unix socket, for %v, the two in turns; medians of %d. Each serves a file of "+
		"%d MiB in memory (tmpfs).\n\n", frontendFor, frontendRounds, frontendSize>>20)
	dir, err := os.MkdirTemp("/dev/shm", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var uris []string
	nbdkit := func(ctx context.Context, dir string) (*service, error) { return nbdkitUp(ctx, dir) }
	for _, up := range []func(context.Context, string) (*service, error){nbdUp, nbdkit} {
		s, err := up(ctx, dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.down()) }()
		uris = append(uris, s.uri)
	}
	fmt.Fprintf(w, "| Workload | Ballast | nbdkit | Ballast / nbdkit |\n|---|---|---|---|\n")
	for _, load := range chosen(workloads) {
		m, err := inTurns(load, len(uris), func(i int) (float64, error) {
			return runFio(ctx, load, "--ioengine=nbd", "--uri="+uris[i])
		})
		if err != nil {
			return err
		}
		ours, theirs := m[0], m[1]
		fmt.Fprintf(w, "| %s | %s | %s | %.2f |\n", load.name, load.show(ours), load.show(theirs), ours/theirs)
	}
	fmt.Fprintln(w)
	return nil
}

func nbdURI(socket string) string { return "nbd+unix:///?socket=" + socket }

func nbdUp(ctx context.Context, dir string) (*service, error) {
	path, err := backingFile(ctx, dir, "ballast")
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "ballast.sock")
	stop, err := serveNBD(ctx, socket, fileDevice{int(file.Fd())})
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &service{nbdURI(socket), []int{os.Getpid()}, func() error { return errors.Join(stop(), file.Close()) }}, nil
}

// serveNBD serves a device on a socket until it is stopped.
func serveNBD(ctx context.Context, socket string, d block.Device) (stop func() error, err error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	serving, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- nbd.Serve(serving, l, []nbd.Export{{Device: d}}, nbd.Options{}) }()
	return func() error {
		cancel()
		return <-done
	}, nil
}

// nbdkitUp serves a file with nbdkit's file plugin, which is given options.
func nbdkitUp(ctx context.Context, dir string, options ...string) (*service, error) {
	path, err := backingFile(ctx, dir, "nbdkit")
	if err != nil {
		return nil, err
	}
	socket, ready := filepath.Join(dir, "nbdkit.sock"), filepath.Join(dir, "nbdkit.pid")
	cmd := exec.Command("nbdkit", append([]string{"--foreground", "--unix", socket, "--pidfile", ready, "file", path}, options...)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := func() error {
		err := cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait() // it ends with the signal's status
		return err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			return &service{nbdURI(socket), []int{cmd.Process.Pid}, stop}, nil
		}
		if time.Now().After(end) {
			return nil, errors.Join(errors.New("nbdkit does not come up"), stop())
		}
	}
}
