package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// quorumUp serves QEMU's quorum over NBD: of three nbdkit, which cannot do direct I/O, or of three of QEMU's own servers,
// which do, over Unix sockets.
func quorumUp(ctx context.Context, dir string, direct bool) (*service, error) {
	var procs []*exec.Cmd
	down := func() error {
		var errs []error
		for i := len(procs) - 1; i >= 0; i-- {
			errs = append(errs, procs[i].Process.Signal(unix.SIGTERM))
			_ = procs[i].Wait() // it ends with the signal's status
		}
		return errors.Join(errs...)
	}
	start := func(ready func() bool, name string, args ...string) error {
		cmd := exec.Command(name, args...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		procs = append(procs, cmd)
		for end := time.Now().Add(10 * time.Second); !ready(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				return fmt.Errorf("%s does not come up", name)
			}
		}
		return nil
	}
	var quorum []string
	args := []string{}
	for i := range 3 {
		path, err := backingFile(ctx, dir, fmt.Sprintf("copy%d", i))
		if err != nil {
			return nil, errors.Join(err, down())
		}
		port, err := freePort()
		if err != nil {
			return nil, errors.Join(err, down())
		}
		address := fmt.Sprintf("server.type=inet,server.host=127.0.0.1,server.port=%d", port)
		pid := filepath.Join(dir, fmt.Sprintf("copy%d.pid", i))
		server := []string{"nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", fmt.Sprint(port), "--pidfile", pid, "file", path, "cache=none"}
		if direct {
			// Over TCP it leaves Nagle's algorithm on, which makes 40 ms of each of many requests at once.
			socket := path + ".sock"
			address = "server.type=unix,server.path=" + socket
			server = []string{"qemu-storage-daemon", "--pidfile", pid, "--blockdev", "driver=file,node-name=f,cache.direct=on,aio=io_uring,filename=" + path,
				"--nbd-server", "addr.type=unix,addr.path=" + socket, "--export", "type=nbd,id=e,node-name=f,name=,writable=on"}
		}
		if err := start(func() bool { _, err := os.Stat(pid); return err == nil }, server[0], server[1:]...); err != nil {
			return nil, errors.Join(err, down())
		}
		args = append(args, "--blockdev", fmt.Sprintf("driver=nbd,node-name=c%d,%s", i, address))
		quorum = append(quorum, fmt.Sprintf("children.%d=c%d", i, i))
	}
	socket := filepath.Join(dir, "nbd.sock")
	args = append(args,
		"--blockdev", "driver=quorum,node-name=q,vote-threshold=2,"+strings.Join(quorum, ","),
		"--nbd-server", "addr.type=unix,addr.path="+socket, "--export", "type=nbd,id=e,node-name=q,name=,writable=on")
	if err := start(func() bool { _, err := os.Stat(socket); return err == nil }, "qemu-storage-daemon", args...); err != nil {
		return nil, errors.Join(err, down())
	}
	up := &service{uri: nbdURI(socket), down: down}
	for _, p := range procs {
		up.pids = append(up.pids, p.Process.Pid)
	}
	return up, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
