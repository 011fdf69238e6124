// Command guest is the first process of the virtual machine in which test/vm runs its scenarios. It makes the machine
// usable, runs the scenario that its arguments name, reports over a virtio port, and ends the machine.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/test/vm/report"
)

// scenarios by name; each gets the arguments after the name.
var scenarios = map[string]func(ctx context.Context, r *reporter, args []string) error{
	"plain-write":  plainWrite,
	"plain-verify": plainVerify,
	"flusher":      flusher,
	"expand":       expand,
	"cut-write":    cutWrite,
	"cut-verify":   cutVerify,
	"pressure":     pressure,
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this is the first process of a virtual machine, not a command")
		os.Exit(2)
	}
	r, err := boot()
	if err == nil {
		err = run(r, os.Args[1:])
	}
	if err != nil {
		slog.Error("scenario failed", "err", err)
		if r != nil {
			r.send(report.Event{Kind: report.Failed, Text: err.Error()})
		}
	} else {
		r.send(report.Event{Kind: report.Done})
	}
	unix.Sync()
	// QEMU runs with -no-reboot: a restart ends it, without need of ACPI.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		slog.Error("reboot", "err", err)
	}
	select {}
}

func run(r *reporter, args []string) (err error) {
	if len(args) == 0 || scenarios[args[0]] == nil {
		return fmt.Errorf("no scenario in %q", args)
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return scenarios[args[0]](context.Background(), r, args[1:])
}

// boot mounts what a process expects, loads the modules and opens the line to the host.
func boot() (*reporter, error) {
	for _, m := range []struct{ source, target, fstype, data string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"tmpfs", "/run", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", ""},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, 0, m.data); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return nil, fmt.Errorf("share mounts: %w", err)
	}
	os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	list, err := os.ReadFile("/etc/modules-to-load")
	if err != nil {
		return nil, err
	}
	for _, m := range strings.Fields(string(list)) {
		if err := loadModule(m); err != nil {
			return nil, err
		}
	}
	r, err := openReporter()
	if err != nil {
		return nil, err
	}
	_, err = await(disk)
	return r, err
}

// await waits for the driver to make a device, and returns its path.
func await(pattern string) (string, error) {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if found, err := filepath.Glob(pattern); err != nil || len(found) == 1 {
			return strings.Join(found, ""), err
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("%s did not appear", pattern)
		}
	}
}

// disk is the virtual machine's disk.
const disk = "/dev/vda"

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", file, err)
	}
	return nil
}

// reporter writes events to the host.
type reporter struct {
	mu   sync.Mutex
	port *os.File
}

func openReporter() (*reporter, error) {
	port, err := await("/dev/vport*p1")
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(port, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", port, err)
	}
	return &reporter{port: os.NewFile(uintptr(fd), port)}, nil
}

// send returns when the host's machine has taken the event.
func (r *reporter) send(e report.Event) {
	line, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.port.Write(append(line, '\n')); err != nil {
		slog.Error("report", "err", err)
	}
}

func (r *reporter) acked(stream string, n int64) {
	r.send(report.Event{Kind: report.Acked, Name: stream, N: n})
}

func (r *reporter) value(name string, format string, args ...any) {
	r.send(report.Event{Kind: report.Value, Name: name, Text: fmt.Sprintf(format, args...)})
}
