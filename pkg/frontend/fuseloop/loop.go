package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/apart"
)

// maxDiscard bounds one discard or write-zeroes, in bytes: the kernel lets no write to the file pass while one is under
// way.
const maxDiscard = 256 << 20

// loop is an open loop device that is bound to a file. It is bound with LO_FLAGS_AUTOCLEAR: the kernel unbinds it when
// nobody has it open any more, this process included. So a crash leaves behind only what others use.
//
// It is open on a thread apart. In this process's common table it would be closed, which writes out its page cache,
// before the descriptors through which that is answered: the process would never be dead.
type loop struct {
	thread *apart.Thread
	fd     int
	path   string // /dev/loopN
}

// newLoop binds a free loop device to the file at path: one of those at paths wanted, if any can be had, and else one
// that is not taken.
func newLoop(ctx context.Context, path string, blockSize int, readOnly bool, wanted []string, taken func(path string) bool) (*loop, error) {
	access := unix.O_RDWR
	cfg := unix.LoopConfig{Size: uint32(blockSize)}
	cfg.Info.Flags = unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR
	if readOnly {
		access = unix.O_RDONLY
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path) // for old tools; nothing depends on it
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/loop-control (is the loop module loaded?): %w", err)
	}
	defer unix.Close(control)
	thread, err := apart.Start()
	if err != nil {
		return nil, err
	}
	for _, device := range wanted {
		l := &loop{thread: thread, path: device}
		if add(control, l.path) == nil && l.bind(path, access, &cfg) == nil {
			l.limitDiscard()
			return l, nil
		}
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		device, err := freeDevice(control, taken)
		if err != nil {
			thread.Stop()
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		l := &loop{thread: thread, path: device}
		if err = l.bind(path, access, &cfg); err == nil {
			l.limitDiscard()
			return l, nil
		}
		// Another process took it, or removed it, in between.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) {
			thread.Stop()
			return nil, err
		}
		select {
		case <-ctx.Done():
			thread.Stop()
			return nil, fmt.Errorf("%w; last: %w", ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

const devicePrefix = "/dev/loop"

// freeDevice returns the path of a loop device that is bound to nothing and not taken. It makes one where there is none.
func freeDevice(control int, taken func(path string) bool) (string, error) {
	n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", err
	}
	path := devicePrefix + strconv.Itoa(n)
	if !taken(path) {
		return path, nil
	}
	for {
		n++
		path = devicePrefix + strconv.Itoa(n)
		if taken(path) {
			continue
		}
		if err := add(control, path); err != nil {
			return "", err
		}
		if _, err := os.Stat(filepath.Join((&loop{path: path}).sysfs(), "loop")); errors.Is(err, os.ErrNotExist) { // not bound
			return path, nil
		}
	}
}

// add makes a loop device of that path, if there is none.
func add(control int, path string) error {
	n, err := strconv.ParseUint(strings.TrimPrefix(path, devicePrefix), 10, 20) // as many as there are minor numbers
	if err != nil {
		return fmt.Errorf("%s is no loop device: %w", path, err)
	}
	if err := unix.IoctlSetInt(control, unix.LOOP_CTL_ADD, int(n)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

// limitDiscard bounds a discard. Where sysfs is read-only the limit stays at 4 GiB, which is correct too.
func (l *loop) limitDiscard() {
	_ = os.WriteFile(filepath.Join(l.sysfs(), "queue/discard_max_bytes"), []byte(strconv.Itoa(maxDiscard)), 0)
}

// bind opens the device and binds it to the file at path.
func (l *loop) bind(path string, access int, cfg *unix.LoopConfig) error {
	err := l.open(access)
	if errors.Is(err, unix.ENOENT) { // /dev is not the kernel's, as in many containers
		if err := makeNode(l.path); err != nil {
			return err
		}
		err = l.open(access)
	}
	if err != nil {
		return err
	}
	return l.thread.Do(func() error {
		file, err := unix.Open(path, access|unix.O_CLOEXEC, 0)
		if err != nil {
			unix.Close(l.fd)
			return fmt.Errorf("open %s: %w", path, err)
		}
		defer unix.Close(file) // the device holds the file by itself
		cfg.Fd = uint32(file)
		if err := unix.IoctlLoopConfigure(l.fd, cfg); err != nil {
			unix.Close(l.fd)
			return fmt.Errorf("configure %s: %w", l.path, err)
		}
		return nil
	})
}

func (l *loop) open(access int) error {
	return l.thread.Do(func() (err error) {
		if l.fd, err = unix.Open(l.path, access|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", l.path, err)
		}
		return nil
	})
}

// makeNode makes the device node of a loop device that the kernel has.
func makeNode(path string) error {
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "dev"))
	if err != nil {
		return fmt.Errorf("find the number of %s: %w", path, err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("parse the number of %s, %q: %w", path, text, err)
	}
	err = unix.Mknod(path, unix.S_IFBLK|0o660, int(unix.Mkdev(major, minor)))
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

func (l *loop) sysfs() string { return filepath.Join("/sys/block", filepath.Base(l.path)) }

// size is what the kernel takes for the device's size, in bytes.
func (l *loop) size() (int64, error) {
	var size uint64
	err := l.thread.Do(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
			return fmt.Errorf("size of %s: %w", l.path, errno)
		}
		return nil
	})
	return int64(size), err
}

// refresh makes the device take the present size of the file at path.
func (l *loop) refresh(path string) error {
	return l.thread.Do(func() error {
		// The stat makes the kernel ask for the size; older loop drivers only look at what it knew.
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return fmt.Errorf("size of %s: %w", path, err)
		}
		if err := unix.IoctlSetInt(l.fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
			return fmt.Errorf("resize %s: %w", l.path, err)
		}
		return nil
	})
}

// sync writes what the page cache holds for the device, and flushes it. It returns an error of such a write once, also
// where somebody else was told of it.
func (l *loop) sync() error {
	return l.thread.Do(func() error {
		// The second pass is short. It narrows the gap in which someone else writes and closes the device unsynced.
		for range 2 {
			if err := unix.Fsync(l.fd); err != nil {
				return fmt.Errorf("sync %s: %w", l.path, err)
			}
		}
		return nil
	})
}

// unbind asks the kernel to unbind the device, and tells whether nobody else has it open: then it takes no more
// requests, and is free after close. Otherwise nothing has changed: it is unbound after the last close anyway.
func (l *loop) unbind() (alone bool, err error) {
	err = l.thread.Do(func() error {
		if err := unix.IoctlSetInt(l.fd, unix.LOOP_CLR_FD, 0); err != nil && err != unix.ENXIO {
			return fmt.Errorf("unbind %s: %w", l.path, err)
		}
		// Any other error is one of asking the file, whose connection is aborted: it is bound.
		_, err := unix.IoctlLoopGetStatus64(l.fd)
		alone = err == unix.ENXIO
		return nil
	})
	return alone, err
}

// backing is the path of the file that the device is bound to, as far as the kernel knows one.
func (l *loop) backing() (string, error) {
	text, err := os.ReadFile(filepath.Join(l.sysfs(), "loop/backing_file"))
	return strings.TrimSuffix(string(text), "\n"), err
}

func (l *loop) close() error {
	defer l.thread.Stop()
	return l.thread.Do(func() error { return unix.Close(l.fd) })
}

// boundLoop is a loop device as sysfs shows it.
type boundLoop struct {
	path    string // /dev/loopN
	backing string // the file's path, as far as the kernel knows one
	number  string // "major:minor"
}

// boundLoops lists the loop devices that are bound to a file, whoever's they are.
func boundLoops() ([]boundLoop, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var all []boundLoop
	for _, file := range files {
		dir := filepath.Dir(filepath.Dir(file))
		l := &loop{path: "/dev/" + filepath.Base(dir)}
		backing, err := l.backing()
		if err != nil { // unbound meanwhile
			continue
		}
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		if err != nil {
			continue
		}
		all = append(all, boundLoop{path: l.path, backing: backing, number: strings.TrimSpace(string(number))})
	}
	return all, nil
}
