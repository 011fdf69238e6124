package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/test/cluster/history"
)

const (
	blockSize = 4096
	// blocks of a device that are used, a region apart from one another now and then.
	blocks = 48
	// workers of a client.
	workers = 4
)

// offset spreads the blocks over several regions: of four, three are side by side, and one has an extent of its own,
// which a discard frees.
func offset(b int) int64 {
	at := int64(b/4)*mib + int64(b%4)*blockSize
	if b%4 == 3 {
		at += mib / 2
	}
	return at
}

// client writes, discards, reads and flushes a block device, and tells a history of it.
type client struct {
	h *history.History
	// last value that was written by any client.
	last *atomic.Uint64
	// answered is when an operation last ended well, Unix time in nanoseconds.
	answered atomic.Int64

	file *os.File
	stop chan struct{}
	over sync.Once
	done sync.WaitGroup
	// dying: errors are expected from now on. superseded: another client has the volume, and nothing may end well that
	// begins from now on.
	dying, superseded atomic.Bool

	mu     sync.Mutex
	failed error // the first error that was not expected
}

// use starts a client of the device at a path.
func use(path string, h *history.History, last *atomic.Uint64, seed uint64) (*client, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	c := &client{h: h, last: last, file: os.NewFile(uintptr(fd), path), stop: make(chan struct{})}
	c.answered.Store(time.Now().UnixNano())
	for i := range workers {
		c.done.Go(func() { c.work(rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	return c, nil
}

// aligned is memory that direct I/O takes.
func aligned() []byte {
	b := make([]byte, 2*blockSize)
	shift := int(-uintptr(unsafe.Pointer(&b[0])) & (blockSize - 1))
	return b[shift : shift+blockSize]
}

func (c *client) work(rnd *rand.Rand) {
	buf := aligned()
	for {
		select {
		case <-c.stop:
			return
		default:
		}
		b := rnd.IntN(blocks)
		late := c.superseded.Load()
		var err error
		switch n := rnd.IntN(100); {
		case n < 42:
			err = c.write(b, history.Value(c.last.Add(1)), buf)
		case n < 47:
			err = c.zero(b, [...]uint{unix.BLKDISCARD, unix.BLKZEROOUT}[n%2])
		case n < 95:
			_, err = c.read(b, buf)
		default:
			err = c.flush()
		}
		if err == nil && late {
			err = errors.New("an operation ended well although the volume had been given to another node before it began")
		} else if err != nil && c.dying.Load() {
			return
		}
		if err != nil {
			c.mu.Lock()
			c.failed = errors.Join(c.failed, err)
			c.mu.Unlock()
			return
		}
		c.answered.Store(time.Now().UnixNano())
		time.Sleep(time.Duration(rnd.IntN(8)) * time.Millisecond)
	}
}

func (c *client) write(b int, v history.Value, buf []byte) error {
	for i := 0; i < blockSize; i += 8 {
		binary.LittleEndian.PutUint64(buf[i:], uint64(v))
	}
	ended := c.h.Write(b, v)
	_, err := c.file.WriteAt(buf, offset(b))
	ended(err == nil)
	return err
}

// zero discards a block, or writes zeros without sending them.
func (c *client) zero(b int, ioctl uint) error {
	span := [2]uint64{uint64(offset(b)), blockSize}
	ended := c.h.Write(b, 0)
	var err error
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, c.file.Fd(), uintptr(ioctl), uintptr(unsafe.Pointer(&span))); errno != 0 {
		err = fmt.Errorf("discard block %d: %w", b, errno)
	}
	ended(err == nil)
	return err
}

func (c *client) read(b int, buf []byte) (history.Value, error) {
	ended := c.h.Read(b)
	_, err := c.file.ReadAt(buf, offset(b))
	v := binary.LittleEndian.Uint64(buf)
	ended(history.Value(v), err == nil)
	for i := 8; err == nil && i < blockSize; i += 8 {
		if w := binary.LittleEndian.Uint64(buf[i:]); w != v {
			err = fmt.Errorf("block %d is torn: %d and %d", b, v, w)
		}
	}
	return history.Value(v), err
}

func (c *client) flush() error {
	ended := c.h.Flush()
	err := c.file.Sync()
	ended(err == nil)
	return err
}

// section ends the workers, flushes, and reads every block: what a history of what comes next begins with.
func (c *client) section() ([]history.Value, error) {
	c.rest()
	if err := c.trouble(); err != nil {
		return nil, err
	}
	if err := c.flush(); err != nil {
		return nil, err
	}
	values, buf := make([]history.Value, blocks), aligned()
	for b := range values {
		var err error
		if values[b], err = c.read(b, buf); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// trouble is the first error that a worker got and should not have got.
func (c *client) trouble() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed
}

// rest stops the workers and waits for them; those of a device that is dead, or about to be, end with its errors.
func (c *client) rest() {
	c.over.Do(func() { close(c.stop) })
	c.done.Wait()
}

// end rests and closes the device.
func (c *client) end() {
	c.rest()
	_ = c.file.Close() // a dead device may complain
}
