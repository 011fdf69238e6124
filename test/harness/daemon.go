package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

const (
	// readyWithin bounds a start: from exec to Probe answering ready.
	readyWithin = 60 * time.Second
	// goneWithin bounds the end of a killed process. It can only be passed by one that waits for I/O that it was to
	// serve itself.
	goneWithin = 30 * time.Second
	// marker is the variable by which the children of a daemon are known.
	marker = "BALLAST_HARNESS"
)

// Options of a daemon. Only Dir and Bin are required.
type Options struct {
	// Dir holds data, sockets, mounts and the log. Its path is short: socket names have a limit of 108 bytes.
	Dir string
	Bin Binaries
	// NodeID is "node-1" where none is given.
	NodeID string
	// Split serves controller and node on sockets of their own.
	Split bool
	// Args are added to the command line.
	Args []string
	// Wrap makes the command that runs the daemon; it must become the daemon, with the same process id.
	Wrap func(name string, args ...string) *exec.Cmd
	// Env is added to the environment.
	Env []string
}

// Daemon is one ballastd and its directory. Its methods may be called at once, except Start, Kill, Stop and Close.
type Daemon struct {
	o   Options
	log *os.File

	mu   sync.Mutex
	cmd  *exec.Cmd
	gone chan struct{} // closed when cmd has been waited for
	err  error         // what Wait returned
	want bool          // an end is wanted: it is no crash

	fuse  *fuseWatch
	csi   *CSI
	admin *grpc.ClientConn
}

// New prepares a daemon in o.Dir, which is made where it is missing, and its clients. It does not start it.
func New(o Options) (*Daemon, error) {
	if o.NodeID == "" {
		o.NodeID = "node-1"
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, err
	}
	// Mount tables name real paths.
	dir, err := filepath.EvalSymlinks(o.Dir)
	if err != nil {
		return nil, err
	}
	if o.Dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(o.Dir, "ballastd.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	d := &Daemon{o: o, log: log}
	if d.csi, err = dialCSI(d.ControllerSocket(), d.NodeSocket()); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if d.admin, err = Dial(d.AdminSocket()); err != nil {
		return nil, errors.Join(err, d.csi.close(), log.Close())
	}
	d.fuse = watchFUSE(o.Dir)
	return d, nil
}

// Paths and names.

func (d *Daemon) Dir() string         { return d.o.Dir }
func (d *Daemon) NodeID() string      { return d.o.NodeID }
func (d *Daemon) DataDir() string     { return filepath.Join(d.o.Dir, "data") }
func (d *Daemon) RunDir() string      { return filepath.Join(d.o.Dir, "run") }
func (d *Daemon) PoolDir() string     { return filepath.Join(d.DataDir(), "pools", "default") }
func (d *Daemon) AdminSocket() string { return filepath.Join(d.RunDir(), "admin.sock") }
func (d *Daemon) LogPath() string     { return d.log.Name() }

// ControllerSocket serves Identity, Controller and SnapshotMetadata.
func (d *Daemon) ControllerSocket() string {
	if d.o.Split {
		return filepath.Join(d.RunDir(), "controller.sock")
	}
	return filepath.Join(d.RunDir(), "csi.sock")
}

// NodeSocket serves Identity and Node.
func (d *Daemon) NodeSocket() string {
	if d.o.Split {
		return filepath.Join(d.RunDir(), "node.sock")
	}
	return filepath.Join(d.RunDir(), "csi.sock")
}

// CSI is a client that survives restarts: calls wait until the daemon serves again, or their context ends.
func (d *Daemon) CSI() *CSI { return d.csi }

// Admin is a client of the admin API; it survives restarts as CSI does.
func (d *Daemon) Admin() adminpb.AdminClient { return adminpb.NewAdminClient(d.admin) }

func (d *Daemon) args() []string {
	args := []string{
		"--data-dir", d.DataDir(), "--run-dir", d.RunDir(), "--node-id", d.o.NodeID,
		"--admin-endpoint", "unix://" + d.AdminSocket(),
	}
	if d.o.Split {
		args = append(args, "--controller-endpoint", "unix://"+d.ControllerSocket(), "--node-endpoint", "unix://"+d.NodeSocket())
	} else {
		args = append(args, "--csi-endpoint", "unix://"+d.ControllerSocket())
	}
	return append(args, d.o.Args...)
}

// Start starts the process and waits until Probe says ready.
func (d *Daemon) Start(ctx context.Context) error {
	if err := d.Launch(); err != nil {
		return err
	}
	return d.WaitReady(ctx)
}

// Launch starts the process and does not wait for it to be ready.
func (d *Daemon) Launch() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd != nil {
		return errors.New("the daemon runs already")
	}
	wrap := d.o.Wrap
	if wrap == nil {
		wrap = exec.Command
	}
	cmd := wrap(d.o.Bin.Ballastd, d.args()...)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	cmd.Env = append(os.Environ(), marker+"="+d.o.Dir)
	cmd.Env = append(cmd.Env, d.o.Env...)
	// A group of its own, so that Ctrl-C reaches us first; and no daemon outlives a test that was killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	gone := make(chan struct{})
	d.cmd, d.gone, d.want, d.err = cmd, gone, false, nil
	go func() { // ends with the process, which Kill, Stop and Close wait for
		err := cmd.Wait()
		d.mu.Lock()
		d.err = err
		d.mu.Unlock()
		close(gone)
	}()
	return nil
}

// WaitReady waits until Probe says ready. It fails early where the process has ended.
func (d *Daemon) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	d.mu.Lock()
	gone := d.gone
	d.mu.Unlock()
	if gone == nil {
		return errors.New("the daemon does not run")
	}
	for {
		one, stop := context.WithTimeout(ctx, time.Second)
		r, err := d.csi.Probe(one, &csi.ProbeRequest{})
		stop()
		if err == nil && (r.GetReady() == nil || r.GetReady().GetValue()) {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("ballastd ended while starting: %v\n%s", d.err, d.LogTail(40))
		case <-ctx.Done():
			return fmt.Errorf("ballastd is not ready: %v (%w)\n%s", err, ctx.Err(), d.LogTail(40))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Pid of the process, 0 where none runs.
func (d *Daemon) Pid() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Kill ends the process with SIGKILL and waits until it is gone.
func (d *Daemon) Kill() error {
	d.fuse.sample()
	return d.end(syscall.SIGKILL, goneWithin)
}

// Stop ends the process with SIGTERM and waits until it is gone. An exit status other than 0 is an error.
func (d *Daemon) Stop() error {
	d.fuse.sample()
	return d.end(syscall.SIGTERM, 2*goneWithin)
}

func (d *Daemon) end(sig syscall.Signal, within time.Duration) error {
	d.mu.Lock()
	cmd, gone := d.cmd, d.gone
	if cmd == nil {
		d.mu.Unlock()
		return nil
	}
	select {
	case <-gone:
		d.cmd = nil
		d.mu.Unlock()
		return fmt.Errorf("ballastd had ended by itself: %v\n%s", d.err, d.LogTail(60))
	default:
	}
	err := cmd.Process.Signal(sig)
	d.mu.Unlock()
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-gone:
	case <-time.After(within):
		err := fmt.Errorf("ballastd (pid %d) is still there %v after %v:\n%s\n%s", cmd.Process.Pid, within, sig,
			stacks(cmd.Process.Pid), d.LogTail(40))
		// Whoever waits for its devices, the test perhaps, is to be set free.
		return errors.Join(err, cmd.Process.Kill(), Sweep(d.o.Dir))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cmd = nil
	if sig != syscall.SIGKILL && d.err != nil {
		return fmt.Errorf("ballastd ended on %v with: %v\n%s", sig, d.err, d.LogTail(60))
	}
	return nil
}

// Signal sends a signal to the process.
func (d *Daemon) Signal(sig syscall.Signal) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return errors.New("the daemon does not run")
	}
	return d.cmd.Process.Signal(sig)
}

// Close ends the process if it runs, closes the clients, and takes off the machine whatever is left of it: mounts and
// loop devices. The directory stays.
func (d *Daemon) Close() error {
	err := d.end(syscall.SIGKILL, goneWithin)
	err = errors.Join(err, d.csi.close(), d.admin.Close(), d.fuse.close(), Sweep(d.o.Dir))
	return errors.Join(err, d.log.Close())
}

// bad matches what a healthy process never prints.
var bad = regexp.MustCompile(`(?m)^(panic: |fatal error: |WARNING: DATA RACE|SIGSEGV)`)

// LogTrouble returns what the log has of panics and races, with some context, or "".
func (d *Daemon) LogTrouble() string {
	b, err := os.ReadFile(d.LogPath())
	if err != nil {
		return err.Error()
	}
	at := bad.FindIndex(b)
	if at == nil {
		return ""
	}
	return string(b[max(0, at[0]-2000):min(len(b), at[0]+6000)])
}

// LogTail is the end of the log, at most n lines.
func (d *Daemon) LogTail(n int) string {
	st, err := os.Stat(d.LogPath())
	if err != nil {
		return err.Error()
	}
	b := make([]byte, min(st.Size(), 1<<20))
	if k, err := d.log.ReadAt(b, st.Size()-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
		return err.Error()
	} else {
		b = b[:k]
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		if len(l) > 400 {
			lines[i] = l[:400] + "…"
		}
	}
	return strings.Join(lines, "\n")
}

// Ctl runs ballastctl against this daemon and returns its standard output.
func (d *Daemon) Ctl(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, d.o.Bin.Ballastctl, args...)
	cmd.Env = append(os.Environ(), "BALLAST_ADMIN_SOCKET="+d.AdminSocket(), "NO_COLOR=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("ballastctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}

// stacks are the kernel's stacks of a process' threads that wait in it: for a process that cannot be killed.
func stacks(pid int) string {
	var b strings.Builder
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return err.Error()
	}
	for _, t := range tasks {
		state, err := os.ReadFile(filepath.Join(t, "stat"))
		if err != nil {
			continue
		}
		if i := bytes.LastIndexByte(state, ')'); i < 0 || i+2 >= len(state) || state[i+2] != 'D' {
			continue
		}
		stack, err := os.ReadFile(filepath.Join(t, "stack"))
		if err != nil {
			stack = []byte(err.Error())
		}
		fmt.Fprintf(&b, "thread %s waits in the kernel:\n%s\n", filepath.Base(t), stack)
	}
	return b.String()
}
