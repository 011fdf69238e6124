// Package ioflusher marks the process as one that the kernel needs to free memory: it serves block devices, so while it
// allocates, the kernel must not wait for I/O to them (PR_SET_IO_FLUSHER, prctl(2)).
package ioflusher

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// envDone guards against an endless loop where the attribute does not survive execve.
const envDone = "BALLAST_IO_FLUSHER"

// Enable marks all threads of the process. The attribute belongs to a thread and is inherited, and Go has started
// threads by now: so it is set on one thread, which then executes the program again. Where it is set already, or not
// permitted (it takes CAP_SYS_RESOURCE, and Linux 5.6), Enable returns; in the latter case with a warning. Call it first
// in main.
func Enable(log *slog.Logger) {
	if err := enable(); err != nil {
		log.Warn("cannot mark the process as an I/O flusher; under memory pressure its devices may stall", "error", err)
	}
}

// Enabled tells whether the calling thread is marked. It takes CAP_SYS_RESOURCE too.
func Enabled() (bool, error) {
	v, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	if err != nil {
		return false, fmt.Errorf("PR_GET_IO_FLUSHER (it takes CAP_SYS_RESOURCE): %w", err)
	}
	return v == 1, nil
}

func enable() error {
	runtime.LockOSThread() // execve keeps the attributes of the thread that calls it
	defer runtime.UnlockOSThread()
	again := os.Getenv(envDone) != ""
	os.Unsetenv(envDone) // not for our children
	on, err := Enabled()
	if err != nil || on {
		return err
	}
	if again {
		return errors.New("the mark was lost when the program was executed again")
	}
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_IO_FLUSHER: %w", err)
	}
	path, err := os.Executable()
	if err == nil {
		err = unix.Exec(path, os.Args, append(os.Environ(), envDone+"=1"))
	}
	_ = unix.Prctl(unix.PR_SET_IO_FLUSHER, 0, 0, 0, 0) // one thread alone is of no use
	return fmt.Errorf("execute the program again: %w", err)
}
