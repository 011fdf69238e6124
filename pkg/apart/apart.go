// Package apart makes system calls that may wait for I/O on a device that this very process serves.
//
// A process that is killed while one of its threads waits in the kernel, uninterruptibly, for such I/O must not hold the
// descriptor through which it serves: nobody answers the I/O any more, the thread does not end, and as the threads share
// one table of descriptors nothing in it is closed, which would fail the I/O. It hangs for ever, its locks with it. The
// same happens when it dies with the device itself in its table: closing the device writes out its page cache first.
//
// So these calls are made on threads with a table of their own, which starts out with nothing of ours. When the process is killed, the
// common table is closed with the last of the other threads; that fails the I/O, and the thread apart ends too.
package apart

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Thread is a thread with its own table of descriptors. What is opened in one call of Do is there in the next ones.
type Thread struct {
	calls chan func()
	ended chan struct{}
}

// Start starts a thread. Stop must be called in the end.
func Start() (*Thread, error) {
	t := &Thread{calls: make(chan func()), ended: make(chan struct{})}
	started := make(chan error)
	go t.run(started)
	if err := <-started; err != nil {
		<-t.ended
		return nil, fmt.Errorf("give a thread its own table of descriptors: %w", err)
	}
	return t, nil
}

func (t *Thread) run(started chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread cannot end, so what is open there would never be closed. While it is held here another
		// goroutine gets another thread.
		locked := make(chan error)
		go t.run(locked)
		err := <-locked
		runtime.UnlockOSThread()
		started <- err
		return
	}
	defer close(t.ended) // the thread, which was never unlocked, ends with the goroutine, and its table with it
	err := emptyTable()
	started <- err
	if err != nil {
		return
	}
	for call := range t.calls {
		call()
	}
}

// emptyTable gives the calling thread a table of descriptors of its own and closes all of it but the standard ones and
// those that Go's runtime polls through: whichever thread ends a collection of garbage looks there, this one too.
func emptyTable() error {
	if err := startPoller(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	keep, err := pollers()
	if err != nil {
		return err
	}
	next := uint(3)
	for _, fd := range keep {
		if uint(fd) > next {
			if err := unix.CloseRange(next, uint(fd)-1, 0); err != nil {
				return err
			}
		}
		next = max(next, uint(fd)+1)
	}
	return unix.CloseRange(next, math.MaxUint32, 0)
}

// startPoller makes sure that the runtime has opened what it polls through: later it would be missing in the tables made
// before.
var startPoller = sync.OnceValue(func() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	return errors.Join(r.Close(), w.Close())
})

// pollers lists the descriptors of the calling thread that are event polls and event counters, in order.
func pollers() ([]int, error) {
	const dir = "/proc/thread-self/fd"
	list, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(list)
	var keep []int
	buf, target := make([]byte, 8192), make([]byte, 64)
	for {
		n, err := unix.ReadDirent(list, buf)
		if err != nil || n == 0 {
			slices.Sort(keep)
			return keep, err
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			fd, err := strconv.Atoi(name)
			if err != nil {
				continue
			}
			n, err := unix.Readlink(dir+"/"+name, target)
			if err != nil {
				return nil, err
			}
			if what := string(target[:n]); what == "anon_inode:[eventpoll]" || what == "anon_inode:[eventfd]" {
				keep = append(keep, fd)
			}
		}
	}
}

// Do runs fn on the thread and returns its error. Calls wait for each other. fn makes raw system calls only: package os,
// timers and whatever else goes through Go's poller would use descriptors that are not there.
func (t *Thread) Do(fn func() error) error {
	done := make(chan error, 1)
	t.calls <- func() { done <- fn() }
	return <-done
}

// Stop ends the thread and closes what is open there. Do must not be called any more.
func (t *Thread) Stop() {
	close(t.calls)
	<-t.ended
}

// Do runs fn on a thread of its own, under the conditions of Thread.Do; what fn leaves open is closed.
func Do(fn func() error) error {
	t, err := Start()
	if err != nil {
		return err
	}
	defer t.Stop()
	return t.Do(fn)
}
