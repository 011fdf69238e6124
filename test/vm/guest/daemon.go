package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	poolMount = "/data"
	dataDir   = poolMount + "/ballast"
	runDir    = "/run/ballast"
	socket    = runDir + "/csi.sock"
	nodeID    = "guest"
)

// daemon is a running ballastd.
type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
	err   error         // why, once ended is closed

	mu    sync.Mutex
	lines []string // of its log
}

// startDaemon starts ballastd on the mounted disk and returns once it serves.
func startDaemon(ctx context.Context) (*daemon, *client, error) {
	d := &daemon{
		cmd:   exec.Command("ballastd", "--data-dir", dataDir, "--run-dir", runDir, "--node-id", nodeID, "--csi-endpoint", "unix://"+socket),
		ended: make(chan struct{}),
	}
	out, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, nil, err
	}
	d.cmd.Stdout = os.Stdout
	if err := d.cmd.Start(); err != nil {
		return nil, nil, err
	}
	go func() {
		defer close(d.ended)
		// The log also goes to the console, for people.
		s := bufio.NewScanner(io.TeeReader(out, os.Stderr))
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			d.mu.Lock()
			d.lines = append(d.lines, s.Text())
			d.mu.Unlock()
		}
		d.err = d.cmd.Wait()
	}()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	go func() {
		select {
		case <-d.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	c, err := dial(ctx, socket)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("ballastd does not serve: %w", err), d.stop())
	}
	return d, c, nil
}

// stop asks the daemon to end, as an init system does, and waits until it has. A daemon that logged an error has failed:
// no scenario gives it reason to.
func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.ended:
	case <-time.After(time.Minute):
		return errors.New("ballastd did not end within a minute of SIGTERM")
	}
	if d.err != nil {
		return fmt.Errorf("ballastd: %w", d.err)
	}
	if lines := d.logged("error"); len(lines) > 0 {
		return fmt.Errorf("ballastd logged errors: %s", strings.Join(lines, "\n"))
	}
	return nil
}

// logged returns the lines of the log of these levels.
func (d *daemon) logged(levels ...string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var found []string
	for _, line := range d.lines {
		for _, level := range levels {
			if strings.Contains(line, "level="+strings.ToUpper(level)) {
				found = append(found, line)
			}
		}
	}
	return found
}

// makePool makes a filesystem on the disk and mounts it for the daemon's data.
func makePool(fstype string) error {
	args := map[string][]string{"ext4": {"-q", "-E", "nodiscard"}, "xfs": {"-q", "-K"}}[fstype]
	if args == nil {
		return fmt.Errorf("no pool on a %q", fstype)
	}
	if err := command("mkfs."+fstype, append(args, disk)...); err != nil {
		return err
	}
	return mountDisk(fstype, poolMount)
}
