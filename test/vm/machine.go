// Package vm runs Ballast in a QEMU virtual machine with Debian's kernel, for what a shared machine cannot show: a real
// power cut, a process with every capability, the growth of a mounted ext4, and writeback with little memory. QEMU
// emulates the processor: the tests need no KVM and take the same way everywhere.
//
// The guest's first process is the command in guest: a boot runs one scenario of it. Its disk is a cutdisk.Disk.
package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/test/vm/cutdisk"
	"github.com/ballast-csi/ballast/test/vm/report"
)

const qemu = "qemu-system-x86_64"

// Config is what a machine is made of.
type Config struct {
	Kernel, Initramfs string
	Disk              *cutdisk.Disk
	MemoryMiB         int
	// Scenario is the guest's scenario and its arguments. They hold no spaces.
	Scenario []string
	// Dir takes the machine's sockets and the log of its console.
	Dir string
}

// Machine is a running guest.
type Machine struct {
	// Events are what the guest reports; the channel is closed when the machine has ended.
	Events <-chan report.Event

	console string
	cmd     *exec.Cmd
	stderr  bytes.Buffer
	group   *errgroup.Group
	cancel  context.CancelFunc
}

// Start boots a machine. It ends when its scenario does, or when ctx is done. The caller reads Events to the end and
// calls Wait.
func Start(ctx context.Context, c Config) (*Machine, error) {
	ctx, cancel := context.WithCancel(ctx)
	m := &Machine{console: filepath.Join(c.Dir, "console.log"), cancel: cancel}
	socket := filepath.Join(c.Dir, "disk.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		cancel()
		return nil, err
	}
	m.cmd = exec.CommandContext(ctx, qemu,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(c.MemoryMiB),
		"-kernel", c.Kernel, "-initrd", c.Initramfs,
		"-append", "console=ttyS0 loglevel=7 panic=-1 mitigations=off -- "+strings.Join(c.Scenario, " "),
		"-blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+socket+",discard=unmap",
		"-device", "virtio-blk-pci,drive=disk,write-cache=on,discard=on,write-zeroes=on",
		"-chardev", "file,id=console,path="+m.console, "-serial", "chardev:console",
		"-chardev", "file,id=report,path=/dev/stdout", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=report")
	m.cmd.WaitDelay = 10 * time.Second
	m.cmd.Stderr = &m.stderr
	lines, err := m.cmd.StdoutPipe()
	if err == nil {
		err = m.cmd.Start()
	}
	if err != nil {
		cancel()
		listener.Close()
		return nil, fmt.Errorf("start %s (make deps installs it): %w", qemu, err)
	}
	events := make(chan report.Event, 64)
	m.Events = events
	m.group = &errgroup.Group{}
	m.group.Go(func() error { return c.Disk.Serve(listener) })
	m.group.Go(func() error {
		defer listener.Close()
		defer close(events)
		s := bufio.NewScanner(lines)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			var e report.Event
			if err := json.Unmarshal(s.Bytes(), &e); err != nil {
				return errors.Join(fmt.Errorf("the guest reported %q: %w", s.Text(), err), m.cmd.Wait())
			}
			events <- e
		}
		return m.cmd.Wait()
	})
	return m, nil
}

// Kill ends the machine at once: no guest code runs any more.
func (m *Machine) Kill() { m.cancel() }

// Wait returns when the machine has ended, with the error of the machine or its disk.
func (m *Machine) Wait() error {
	defer m.cancel()
	return m.group.Wait()
}

// Console returns the last lines that the guest's kernel and processes wrote.
func (m *Machine) Console(lines int) string {
	data, err := os.ReadFile(m.console)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n") + "\n" + m.stderr.String()
}

// errScenario wraps what a guest reported as failed.
var errScenario = errors.New("scenario failed")

// Run boots a machine and returns what its scenario reported, once it has ended well.
func Run(ctx context.Context, c Config) ([]report.Event, error) {
	m, err := Start(ctx, c)
	if err != nil {
		return nil, err
	}
	var events []report.Event
	var last report.Event
	for e := range m.Events {
		events, last = append(events, e), e
	}
	err = m.Wait()
	switch {
	case last.Kind == report.Failed:
		return events, fmt.Errorf("%w: %s\nthe guest's console ends with:\n%s", errScenario, last.Text, m.Console(40))
	case last.Kind != report.Done:
		return events, fmt.Errorf("the machine ended without a result (%v, %v); its console ends with:\n%s", err, ctx.Err(), m.Console(80))
	}
	return events, err
}
