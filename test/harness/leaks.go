package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MountsUnder are the mounts at or below a directory, the deepest and latest first.
func MountsUnder(dir string) ([]*mountinfo.Info, error) {
	in, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !within(m.Mountpoint, dir), false })
	if err != nil {
		return nil, err
	}
	slices.Reverse(in)
	slices.SortStableFunc(in, func(a, b *mountinfo.Info) int { return len(b.Mountpoint) - len(a.Mountpoint) })
	return in, nil
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// Loop is a loop device with a file.
type Loop struct {
	Path, Backing string
}

// Loops are the loop devices whose file lies below dir, or is named by one of the volume ids (a file on a mount that was
// detached has lost its directory).
func Loops(dir string, ids ...string) ([]Loop, error) {
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var in []Loop
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // detached meanwhile
		}
		l := Loop{
			Path:    "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(name))),
			Backing: strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)"),
		}
		named := slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(l.Backing, id) })
		if within(l.Backing, dir) || named {
			in = append(in, l)
		}
	}
	return in, nil
}

// Sweep takes off the machine what lies below dir: it aborts and unmounts filesystems and detaches loop devices.
func Sweep(dir string) error {
	var last error
	for range 20 {
		last = sweep(dir)
		if last == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("something of %s is left on the machine: %w", dir, last)
}

func sweep(dir string) error {
	var errs []error
	mounts, err := MountsUnder(dir)
	errs = append(errs, err)
	// FUSE first: what waits for a dead server is set free by the force.
	for _, m := range mounts {
		if strings.HasPrefix(m.FSType, "fuse") {
			_ = unix.Unmount(m.Mountpoint, unix.MNT_FORCE) // often busy; it aborts the connection all the same
		}
	}
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	loops, err := Loops(dir)
	errs = append(errs, err)
	for _, l := range loops {
		errs = append(errs, detach(l))
	}
	left, err := MountsUnder(dir)
	errs = append(errs, err)
	for _, m := range left {
		errs = append(errs, fmt.Errorf("mount left: %s (%s from %s)", m.Mountpoint, m.FSType, m.Source))
	}
	if left, err := Loops(dir); err != nil || len(left) > 0 {
		errs = append(errs, fmt.Errorf("loop devices left: %v, %w", left, err))
	}
	return errors.Join(errs...)
}

func detach(l Loop) error {
	f, err := os.OpenFile(l.Path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", l.Path, err)
	}
	return nil
}

// Leaks lists what a daemon has left on the machine, once it is meant to hold nothing: mounts, loop devices, FUSE
// connections and processes. ids are the volumes that it had. Kernel work ends a little late, so it looks for a while:
// dead devices are cleared away in the background.
func (d *Daemon) Leaks(ids ...string) []string {
	var found []string
	for end := time.Now().Add(20 * time.Second); ; {
		found = d.leaks(ids)
		if len(found) == 0 || time.Now().After(end) {
			return found
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (d *Daemon) leaks(ids []string) []string {
	var found []string
	note := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	mounts, err := MountsUnder(d.o.Dir)
	if err != nil {
		note("%v", err)
	}
	for _, m := range mounts {
		if m.Mountpoint == d.fuse.control {
			continue // ours
		}
		note("mount %s (%s from %s)", m.Mountpoint, m.FSType, m.Source)
	}
	loops, err := Loops(d.o.Dir, ids...)
	if err != nil {
		note("%v", err)
	}
	for _, l := range loops {
		note("loop device %s on %s", l.Path, l.Backing)
	}
	conns, err := d.fuse.orphans()
	if err != nil {
		note("%v", err)
	}
	for _, c := range conns {
		note("FUSE connection %d without a mount", c)
	}
	procs, err := marked(d.o.Dir)
	if err != nil {
		note("%v", err)
	}
	for _, p := range procs {
		if p.pid != d.Pid() {
			note("process %d: %s", p.pid, p.cmdline)
		}
	}
	return found
}

type process struct {
	pid     int
	cmdline string
}

// marked are the processes that were started by the daemon of a directory, itself included.
func marked(dir string) ([]process, error) {
	names, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var found []process
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !slices.Contains(strings.Split(string(b), "\x00"), marker+"="+dir) {
			continue // ended, or not ours
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			return nil, err
		}
		cmdline, err := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
		if err != nil {
			continue
		}
		found = append(found, process{pid: pid, cmdline: string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))})
	}
	return found, nil
}

// fuseWatch remembers the FUSE connections that were seen below a directory.
type fuseWatch struct {
	dir     string
	control string // where fusectl is mounted by us, or ""
	stop    chan struct{}
	done    chan struct{}

	mu   sync.Mutex
	seen map[uint32]bool
}

func watchFUSE(dir string) *fuseWatch {
	w := &fuseWatch{dir: dir, stop: make(chan struct{}), done: make(chan struct{}), seen: map[uint32]bool{}}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			w.sample()
			select {
			case <-w.stop:
				return
			case <-tick.C:
			}
		}
	}()
	return w
}

func (w *fuseWatch) sample() {
	mounts, err := MountsUnder(w.dir)
	if err != nil {
		return // orphans meets the same error and reports it
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range mounts {
		if m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
			w.seen[uint32(m.Minor)] = true
		}
	}
}

// orphans are connections that were seen here, still exist and have no mount: nothing will ever end them.
func (w *fuseWatch) orphans() ([]uint32, error) {
	dir, err := w.connections()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	mounted := map[uint32]bool{} // numbers are used again, also by others on this machine
	for _, m := range mounts {
		mounted[uint32(m.Minor)] = mounted[uint32(m.Minor)] || m.Major == 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var left []uint32
	for _, e := range entries {
		n, err := strconv.ParseUint(e.Name(), 10, 32)
		if err == nil && w.seen[uint32(n)] && !mounted[uint32(n)] {
			left = append(left, uint32(n))
		}
	}
	return left, nil
}

// connections is where fusectl is mounted; it mounts it where nobody has.
func (w *fuseWatch) connections() (string, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.FSType == "fusectl" {
			return m.Mountpoint, nil
		}
	}
	point := filepath.Join(w.dir, "fusectl")
	if err := os.MkdirAll(point, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount("fusectl", point, "fusectl", 0, ""); err != nil {
		return "", fmt.Errorf("mount fusectl: %w", err)
	}
	w.control = point
	return point, nil
}

func (w *fuseWatch) close() error {
	close(w.stop)
	<-w.done
	if w.control == "" {
		return nil
	}
	return unix.Unmount(w.control, unix.MNT_DETACH)
}
