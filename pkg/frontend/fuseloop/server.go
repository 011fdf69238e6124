package fuseloop

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/ballast-csi/ballast/pkg/apart"
	"github.com/ballast-csi/ballast/pkg/block"
)

const (
	// maxBackground bounds the reads and writes of one device that the kernel has sent and not got back. It bounds a
	// hung device's memory too: a buffer each.
	maxBackground = 64
	// maxIdle is how many readers of one device may wait for requests at once. Two let one request follow another
	// without a goroutine being started; more save starts at a high queue depth.
	maxIdle = 4
	// trimAfter is how long a device is idle before the memory of large requests is given back.
	trimAfter = 2 * time.Second
	// minMinor is the oldest protocol 7.x that is spoken: what Linux 5.9 has. That version is needed for close_range too.
	minMinor = 31
)

// server answers the FUSE requests of one mount, whose root is a file: the device's bytes.
//
// Its readers are blocked in read(2) of /dev/fuse. The one that gets a request carries it out; the last idle one starts
// another first, so that a device that hangs in all requests still answers the next one. Their number is bounded by
// maxBackground and the few synchronous requests of the kernel.
type server struct {
	path     string // the mount
	fd       int    // of /dev/fuse
	conn     uint32 // the connection's number in fusectl
	dev      block.Device
	readOnly bool
	bufs     *buffers
	log      *slog.Logger
	failures rate.Sometimes

	ctx     context.Context // of every request to dev
	cancel  context.CancelFunc
	idle    atomic.Int32 // readers in read(2), or on their way there
	readers sync.WaitGroup
	stopped chan struct{} // closed when the last reader is gone
}

// newServer mounts dev at path, an existing file, and serves it.
func newServer(path string, dev block.Device, readOnly bool, bufs *buffers, log *slog.Logger) (*server, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse (is the fuse module loaded?): %w", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d", fd, unix.S_IFREG, os.Geteuid(), os.Getegid(), maxIO)
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount(fsSource, path, fsType, flags, data); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	s := &server{
		path: path, fd: fd, dev: dev, readOnly: readOnly, bufs: bufs, log: log,
		failures: rate.Sometimes{First: 3, Interval: 10 * time.Second}, stopped: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.start()
	go func() {
		s.readers.Wait()
		unix.Close(s.fd)
		close(s.stopped)
	}()
	var st unix.Stat_t
	err = apart.Do(func() error { return unix.Stat(path, &st) }) // answered by the readers: the protocol is up
	if err != nil {
		return s, fmt.Errorf("stat %s: %w", path, err)
	}
	s.conn = unix.Minor(st.Dev)
	return s, nil
}

// start adds a reader, which counts as idle from now on.
func (s *server) start() {
	s.idle.Add(1)
	s.readers.Add(1)
	go s.read()
}

// read takes and answers requests until the mount is gone or enough others wait for them.
func (s *server) read() {
	defer s.readers.Done()
	buf, err := s.bufs.get()
	for ; err != nil; buf, err = s.bufs.get() { // out of memory: requests wait
		s.log.Error("cannot take requests; trying again", "error", err)
		time.Sleep(time.Second)
	}
	defer s.bufs.put(buf)
	for {
		n, err := s.next(buf)
		if err != nil {
			return
		}
		if s.idle.Add(-1) == 0 {
			s.start()
		}
		if answer := s.handle(buf, n); answer != nil {
			s.write(answer)
		}
		if !s.rest() {
			return
		}
	}
}

// rest counts a reader as idle again; false if there are enough of them.
func (s *server) rest() bool {
	for {
		n := s.idle.Load()
		if n >= maxIdle {
			return false
		}
		if s.idle.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// next waits for a request and reads it to headerAt. It returns its length, or an error when the connection is gone.
func (s *server) next(buf *buffer) (int, error) {
	if buf.dirty > keepResident {
		poll := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, int(trimAfter/time.Millisecond)); n == 0 && err == nil {
			buf.trim()
		}
	}
	for {
		n, err := unix.Read(s.fd, buf.mem[headerAt:])
		switch err {
		case nil:
			buf.dirty = max(buf.dirty, headerAt+n-pageSize)
			return n, nil
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was aborted
		case unix.ENODEV, unix.ECONNABORTED:
			return 0, err
		default:
			s.log.Error("cannot take a request; trying again", "error", err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// write sends an answer. It fails only for a request that the kernel gave up: the connection was aborted.
func (s *server) write(answer []byte) {
	for {
		_, err := unix.Write(s.fd, answer)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil && err != unix.ENOENT && err != unix.ENODEV {
			s.log.Error("cannot answer the kernel", "error", err)
		}
		return
	}
}

// dead tells whether the connection is gone, and nothing of it is in the device any more.
func (s *server) dead() bool {
	select {
	case <-s.stopped:
		return true
	default:
		return false
	}
}

// quiesce makes every request in the device fail, and waits until none is left there. The connection is aborted.
func (s *server) quiesce(ctx context.Context) error {
	s.cancel()
	select {
	case <-s.stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for requests that the device has not given back: %w", ctx.Err())
	}
}
