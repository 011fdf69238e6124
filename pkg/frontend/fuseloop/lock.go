package fuseloop

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// takeLock locks the file for this process, or returns volume.ErrInUse.
//
// A process that was killed while one of its own threads waited for I/O on a device that it served itself does not die:
// nobody answers the I/O, and its connections are only aborted when it is dead. Where the lock's holder is such a one,
// takeLock calls abort, which ends that I/O, and waits for the lock.
func takeLock(ctx context.Context, path string, abort func() error) (*os.File, error) {
	lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(10 * time.Second)
	for aborted := false; ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !aborted && dying(lock) {
			if err := abort(); err != nil {
				lock.Close()
				return nil, err
			}
			aborted = true
		}
		if !aborted || time.Now().After(deadline) || ctx.Err() != nil {
			lock.Close()
			return nil, fmt.Errorf("another process holds %s; stop it first: %w", path, volume.ErrInUse)
		}
	}
	pid := strconv.Itoa(os.Getpid())
	if _, err := lock.WriteAt([]byte(pid+"\n"), 0); err != nil {
		lock.Close()
		return nil, err
	}
	if err := lock.Truncate(int64(len(pid) + 1)); err != nil {
		lock.Close()
		return nil, err
	}
	return lock, nil
}

// dying tells whether each thread of the process that wrote its id into the lock file is dead or has been killed: none
// of them will run in user space again.
func dying(lock *os.File) bool {
	text := make([]byte, 32)
	n, _ := lock.ReadAt(text, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil || pid <= 0 || pid == os.Getpid() {
		return false
	}
	threads, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task/*/status"))
	if err != nil || len(threads) == 0 {
		return false // in another pid namespace, or gone
	}
	for _, thread := range threads {
		status, err := os.ReadFile(thread)
		if err == nil && !killed(string(status)) {
			return false
		}
	}
	return true
}

// killed reads a thread's status as proc_pid_status(5) describes it.
func killed(status string) bool {
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if pending, err := strconv.ParseUint(value, 16, 64); err == nil && pending&(1<<(unix.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return false
}
