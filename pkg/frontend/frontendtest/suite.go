// Package frontendtest is the conformance suite of frontend.Frontend. It needs root, mkfs and fsck of ext4, xfs and
// btrfs, and fio.
package frontendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const mib = 1 << 20

// Run checks that the frontends which mk makes keep the contract. Mk is called once per subtest; the suite closes them.
func Run(t *testing.T, mk func(t *testing.T) frontend.Frontend) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, f frontend.Frontend)
	}{
		{"Attach", testAttach},
		{"Refused", testRefused},
		{"BlockSizes", testBlockSizes},
		{"RawIO", testRawIO},
		{"Fio", testFio},
		{"Discard", testDiscard},
		{"ReadOnly", testReadOnly},
		{"Resize", testResize},
		{"Errors", testErrors},
		{"SlowDevice", testSlowDevice},
		{"FlushIsDurable", testFlushIsDurable},
		{"DetachSyncs", testDetachSyncs},
		{"DetachBusy", testDetachBusy},
		{"DetachCancelled", testDetachCancelled},
		{"AbortHung", testAbortHung},
		{"AbortWhileOpen", testAbortWhileOpen},
		{"Parallel", testParallel},
		{"CloseAborts", testCloseAborts},
		{"Ext4", func(t *testing.T, f frontend.Frontend) { testFilesystem(t, f, "ext4") }},
		{"Xfs", func(t *testing.T, f frontend.Frontend) { testFilesystem(t, f, "xfs") }},
		{"Btrfs", func(t *testing.T, f frontend.Frontend) { testFilesystem(t, f, "btrfs") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := mk(t)
			t.Cleanup(func() { noError(t, "Close", f.Close()) })
			// A process that hangs in I/O on a device that it serves itself cannot even be killed.
			watchdog := time.AfterFunc(time.Minute, func() {
				t.Error("hangs; closing the frontend")
				f.Close()
			})
			t.Cleanup(func() { watchdog.Stop() })
			test.run(t, f)
		})
	}
}

func testAttach(t *testing.T, f frontend.Frontend) {
	ctx := t.Context()
	dev := blocktest.NewMem(16 * mib)
	path := attach(t, f, "vol-1", dev, frontend.Options{BlockSize: 4096})
	if again := attach(t, f, "vol-1", dev, frontend.Options{BlockSize: 4096}); again != path {
		t.Errorf("a second Attach returned %s, the first %s", again, path)
	}
	if other := attach(t, f, "vol-2", blocktest.NewMem(16*mib), frontend.Options{BlockSize: 4096}); other == path {
		t.Errorf("two names share %s", path)
	}
	if got := kernelSize(t, path); got != 16*mib {
		t.Errorf("the kernel sees %d bytes", got)
	}
	noError(t, "Detach", f.Detach(ctx, "vol-1"))
	noError(t, "Detach again", f.Detach(ctx, "vol-1"))
	noError(t, "Detach of an unknown name", f.Detach(ctx, "vol-9"))
	noError(t, "Abort of an unknown name", f.Abort(ctx, "vol-9"))
	if err := f.Resize(ctx, "vol-9"); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("Resize of an unknown name = %v, want ErrNotFound", err)
	}
	attach(t, f, "vol-1", dev, frontend.Options{BlockSize: 512, ReadOnly: true}) // a new life, other options
}

func testRefused(t *testing.T, f frontend.Frontend) {
	for what, c := range map[string]struct {
		name string
		size int64
		o    frontend.Options
	}{
		"an empty name":      {"", mib, frontend.Options{BlockSize: 4096}},
		"a path":             {"../vol", mib, frontend.Options{BlockSize: 4096}},
		"a dot":              {".", mib, frontend.Options{BlockSize: 4096}},
		"a control byte":     {"a\nb", mib, frontend.Options{BlockSize: 4096}},
		"a long name":        {string(bytes.Repeat([]byte{'a'}, 129)), mib, frontend.Options{BlockSize: 4096}},
		"no block size":      {"vol", mib, frontend.Options{}},
		"an odd block size":  {"vol", mib, frontend.Options{BlockSize: 1000}},
		"no size":            {"vol", 0, frontend.Options{BlockSize: 4096}},
		"a size in between":  {"vol", mib + 512, frontend.Options{BlockSize: 4096}},
		"a size below a 512": {"vol", mib + 1, frontend.Options{BlockSize: 512}},
	} {
		if path, err := f.Attach(t.Context(), c.name, blocktest.NewMem(c.size), c.o); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("Attach with %s = %q, %v; want ErrInvalid", what, path, err)
		}
	}
}

func testBlockSizes(t *testing.T, f frontend.Frontend) {
	for _, size := range []int{512, 4096} {
		path := attach(t, f, fmt.Sprintf("vol-%d", size), blocktest.NewMem(16*mib), frontend.Options{BlockSize: size})
		file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
		got, err := unix.IoctlGetInt(int(file.Fd()), unix.BLKSSZGET)
		noError(t, "BLKSSZGET", err)
		if got != size {
			t.Errorf("logical block size is %d, want %d", got, size)
		}
		p := aligned(size)
		fill(p, 7)
		_, err = file.WriteAt(p, int64(3*size))
		noError(t, "a write of one logical block", err)
		if size == 4096 {
			if _, err = file.WriteAt(aligned(512), 512); err == nil {
				t.Error("a direct write of 512 bytes passed on 4096-byte blocks")
			}
		}
	}
}

// testRawIO compares what the kernel reads and what the device holds after direct requests of many sizes at once.
func testRawIO(t *testing.T, f frontend.Frontend) {
	const size = 64 * mib
	dev := blocktest.NewMem(size)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 512})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	var g errgroup.Group
	const part = size / 8
	for w := range int64(8) {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			p, q := aligned(4*mib), aligned(4*mib)
			for range 20 {
				n := (1 + rng.Int64N(4*mib/512)) * 512
				if rng.IntN(2) == 0 {
					n = 4096
				}
				off := w*part + rng.Int64N((part-n)/512+1)*512
				fill(p[:n], rng.Uint64())
				if _, err := file.WriteAt(p[:n], off); err != nil {
					return err
				}
				if err := dev.ReadAt(t.Context(), q[:n], off); err != nil {
					return err
				}
				if !bytes.Equal(p[:n], q[:n]) {
					return fmt.Errorf("%d bytes written at %d are not on the device", n, off)
				}
				clear(q[:n])
				if _, err := file.ReadAt(q[:n], off); err != nil {
					return err
				}
				if !bytes.Equal(p[:n], q[:n]) {
					return fmt.Errorf("%d bytes read at %d are not those written", n, off)
				}
			}
			return nil
		})
	}
	noError(t, "direct I/O", g.Wait())
}

func testFio(t *testing.T, f frontend.Frontend) {
	path := attach(t, f, "vol", blocktest.NewMem(64*mib), frontend.Options{BlockSize: 4096})
	for _, engine := range []string{"io_uring", "libaio"} {
		run(t, "fio", "--name=verify", "--filename="+path, "--ioengine="+engine, "--direct=1", "--rw=randwrite", "--bssplit=4k/60:64k/30:1m/10",
			"--iodepth=32", "--size=64m", "--verify=crc32c", "--verify_fatal=1", "--end_fsync=1", "--randrepeat=0", "--allow_file_create=0", "--verify_state_save=0")
	}
}

func testDiscard(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(1 << 30)
	dev := blocktest.NewFaulty(mem)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	p := aligned(mib)
	for name, request := range map[string]uint{"discard": unix.BLKDISCARD, "write-zeroes": unix.BLKZEROOUT} {
		fill(p, 1)
		_, err := file.WriteAt(p, 8*mib)
		noError(t, "WriteAt", err)
		before, _ := dev.Calls(blocktest.Write)
		rng := [2]uint64{8*mib + 4096, mib - 8192}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), uintptr(request), uintptr(unsafe.Pointer(&rng)))
		if errno != 0 {
			t.Fatalf("%s: %v", name, errno)
		}
		clear(p[4096 : mib-4096])
		q := make([]byte, mib)
		noError(t, "ReadAt", mem.ReadAt(t.Context(), q, 8*mib))
		if !bytes.Equal(p, q) {
			t.Errorf("after %s the range does not read as zeros, or more than it does", name)
		}
		if after, _ := dev.Calls(blocktest.Write); after != before {
			t.Errorf("%s reached the device as %d writes", name, after-before)
		}
	}
	rng := [2]uint64{0, 1 << 30}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&rng)))
	if errno != 0 {
		t.Fatalf("discard of everything: %v", errno)
	}
	if got := mem.Allocated(); got != 0 {
		t.Errorf("%d bytes are allocated after a discard of everything", got)
	}
}

func testReadOnly(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(16 * mib)
	p := aligned(4096)
	fill(p, 3)
	noError(t, "WriteAt", mem.WriteAt(t.Context(), p, 4096))
	dev := blocktest.NewFaulty(mem)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096, ReadOnly: true})
	file := open(t, path, unix.O_RDONLY|unix.O_DIRECT)
	q := aligned(4096)
	_, err := file.ReadAt(q, 4096)
	noError(t, "ReadAt", err)
	if !bytes.Equal(p, q) {
		t.Error("the bytes read are not the device's")
	}
	ro, err := unix.IoctlGetInt(int(file.Fd()), unix.BLKROGET)
	noError(t, "BLKROGET", err)
	if ro != 1 {
		t.Error("the kernel takes the device for writable")
	}
	if w, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		_, err = w.Write(p)
		w.Close()
		if err == nil {
			t.Error("a write passed")
		}
	}
	file.Close()
	noError(t, "Detach", f.Detach(t.Context(), "vol"))
	if n, _ := dev.Calls(blocktest.Write); n != 0 {
		t.Errorf("%d writes reached the device", n)
	}
}

func testResize(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(16 * mib)
	path := attach(t, f, "vol", mem, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	p := aligned(4096)
	for _, size := range []int64{16*mib + 4096, 64 * mib, 1 << 40} {
		mem.Grow(size)
		noError(t, "Resize", f.Resize(t.Context(), "vol"))
		if got := kernelSize(t, path); got != size {
			t.Fatalf("the kernel sees %d bytes, want %d", got, size)
		}
		fill(p, uint64(size))
		_, err := file.WriteAt(p, size-4096)
		noError(t, "a write to the last block", err)
		q := make([]byte, 4096)
		noError(t, "ReadAt", mem.ReadAt(t.Context(), q, size-4096))
		if !bytes.Equal(p, q) {
			t.Fatal("the write did not reach the device")
		}
		if size == 64*mib {
			break // the last needs too much memory to write to
		}
	}
	noError(t, "Resize without a change", f.Resize(t.Context(), "vol"))
}

func testErrors(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewFaulty(blocktest.NewMem(16 * mib))
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	p := aligned(4096)
	broken := blocktest.Fault{Err: errors.New("broken on purpose")}
	for name, c := range map[string]struct {
		op blocktest.Op
		do func() error
	}{
		"read":  {blocktest.Read, func() error { _, err := file.ReadAt(p, 0); return err }},
		"write": {blocktest.Write, func() error { _, err := file.WriteAt(p, 0); return err }},
		"flush": {blocktest.Flush, func() error {
			if _, err := file.WriteAt(p, 0); err != nil {
				return err
			}
			return file.Sync()
		}},
		"zero": {blocktest.Zero, func() error {
			rng := [2]uint64{0, 1 * mib}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&rng))); errno != 0 {
				return errno
			}
			return nil
		}},
	} {
		noError(t, name, c.do())
		dev.Set(c.op, broken)
		if err := c.do(); !errors.Is(err, unix.EIO) {
			t.Errorf("%s on a failing device = %v, want EIO", name, err)
		}
		dev.Set(c.op, blocktest.Fault{})
		noError(t, name+" once the device works again", c.do())
	}
}

// testSlowDevice has many requests wait in the device: they are not acknowledged, others pass, and they go on.
func testSlowDevice(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewFaulty(blocktest.NewMem(64 * mib))
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	const writes = 40
	var done atomic.Int32
	var g errgroup.Group
	for i := range writes {
		g.Go(func() error {
			_, err := file.WriteAt(aligned(4096), int64(i)*4096)
			done.Add(1)
			return err
		})
	}
	waitFor(t, "requests in the device at once", func() bool { return dev.Hanging(blocktest.Write) == writes })
	_, err := file.ReadAt(aligned(4096), 32*mib)
	noError(t, "a read meanwhile", err)
	time.Sleep(300 * time.Millisecond)
	if n := done.Load(); n != 0 {
		t.Errorf("%d writes were acknowledged before the device answered", n)
	}
	dev.Set(blocktest.Write, blocktest.Fault{})
	noError(t, "the writes", g.Wait())
}

// testFlushIsDurable crashes the device after fsync: what was written before is there.
func testFlushIsDurable(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewCrashable(16 * mib)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR)
	p := make([]byte, mib)
	fill(p, 11)
	_, err := file.WriteAt(p, 5*mib)
	noError(t, "WriteAt", err)
	noError(t, "Sync", file.Sync())
	back := dev.Crash(blocktest.Lose, nil)
	q := make([]byte, mib)
	noError(t, "ReadAt", back.ReadAt(t.Context(), q, 5*mib))
	if !bytes.Equal(p, q) {
		t.Error("bytes that were synced are lost")
	}
	file.Close()
	noError(t, "Abort", f.Abort(t.Context(), "vol"))
}

// testDetachSyncs detaches with dirty page cache: it reaches the device, and durably.
func testDetachSyncs(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewCrashable(16 * mib)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	p := make([]byte, 3*mib)
	fill(p, 5)
	file := open(t, path, unix.O_RDWR)
	_, err := file.WriteAt(p, 4096)
	noError(t, "WriteAt", err)
	noError(t, "close", file.Close())
	noError(t, "Detach", f.Detach(t.Context(), "vol"))
	back := dev.Crash(blocktest.Lose, nil)
	q := make([]byte, len(p))
	noError(t, "ReadAt", back.ReadAt(t.Context(), q, 4096))
	if !bytes.Equal(p, q) {
		t.Error("bytes written before Detach are lost")
	}
}

func testDetachBusy(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(64 * mib)
	path := attach(t, f, "vol", mem, frontend.Options{BlockSize: 4096})
	for name, flags := range map[string]int{"read-only": unix.O_RDONLY, "read-write": unix.O_RDWR, "exclusive": unix.O_RDWR | unix.O_EXCL} {
		file := open(t, path, flags)
		if err := f.Detach(t.Context(), "vol"); !errors.Is(err, frontend.ErrBusy) {
			t.Errorf("Detach while open %s = %v, want ErrBusy", name, err)
		}
		if again := attach(t, f, "vol", mem, frontend.Options{BlockSize: 4096}); again != path {
			t.Errorf("the device moved from %s to %s", path, again)
		}
		if flags&unix.O_RDWR != 0 {
			_, err := file.WriteAt(make([]byte, 4096), 0)
			noError(t, "a write after the refused Detach", err)
			noError(t, "Sync", file.Sync())
		}
		noError(t, "close", file.Close())
	}
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT) // every user is gone, and the device is still there
	_, err := file.WriteAt(aligned(4096), 0)
	noError(t, "WriteAt", err)
	go func() { // a user that leaves soon is waited for
		time.Sleep(100 * time.Millisecond)
		file.Close()
	}()
	noError(t, "Detach", f.Detach(t.Context(), "vol"))
}

// testDetachCancelled detaches while a write hangs: the caller may leave, and nothing has changed.
func testDetachCancelled(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewFaulty(blocktest.NewMem(16 * mib))
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR)
	_, err := file.WriteAt(make([]byte, mib), 0)
	noError(t, "WriteAt", err)
	noError(t, "close", file.Close()) // syncs nothing: the frontend has the device open
	file = open(t, path, unix.O_RDWR)
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	_, err = file.WriteAt(make([]byte, mib), mib)
	noError(t, "WriteAt", err)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := f.Detach(ctx, "vol"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Detach of a hung device = %v, want the context's error", err)
	}
	dev.Set(blocktest.Write, blocktest.Fault{})
	noError(t, "Sync", file.Sync())
	noError(t, "close", file.Close())
	noError(t, "Detach", f.Detach(t.Context(), "vol"))
}

// testAbortHung aborts while reads, writes, a flush and a Detach hang in the device: all fail, and nothing of them
// reaches the device.
func testAbortHung(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(64 * mib)
	dev := blocktest.NewFaulty(mem)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	_, err := file.WriteAt(aligned(4096), 0)
	noError(t, "WriteAt", err)
	for _, op := range []blocktest.Op{blocktest.Read, blocktest.Write, blocktest.Flush} {
		dev.Set(op, blocktest.Fault{Hang: true})
	}
	failed := make(chan error, 41)
	for i := range 20 {
		go func() {
			p := aligned(4096)
			fill(p, 1)
			_, err := file.WriteAt(p, int64(i)*4096)
			failed <- err
		}()
		go func() {
			_, err := file.ReadAt(aligned(4096), int64(i)*4096)
			failed <- err
		}()
	}
	waitFor(t, "requests that hang", func() bool { return dev.Hanging(blocktest.Write) > 0 && dev.Hanging(blocktest.Read) > 0 })
	go func() { failed <- f.Detach(t.Context(), "vol") }()
	time.Sleep(50 * time.Millisecond)
	noError(t, "Abort", f.Abort(t.Context(), "vol"))
	if n := dev.Hanging(blocktest.Write) + dev.Hanging(blocktest.Read) + dev.Hanging(blocktest.Flush); n != 0 {
		t.Errorf("%d requests are still in the device after Abort", n)
	}
	for range cap(failed) {
		select {
		case err := <-failed:
			if err == nil {
				t.Error("a request that hung was acknowledged")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a request still hangs after Abort")
		}
	}
	if mem.Allocated() > 64<<10 { // that of the first write
		t.Error("a write that failed reached the device")
	}
}

// testAbortWhileOpen uses the device after Abort, by a descriptor opened before.
func testAbortWhileOpen(t *testing.T, f frontend.Frontend) {
	mem := blocktest.NewMem(16 * mib)
	dev := blocktest.NewFaulty(mem)
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file, buffered := open(t, path, unix.O_RDWR|unix.O_DIRECT), open(t, path, unix.O_RDWR)
	_, err := buffered.WriteAt(make([]byte, mib), 0) // dirty page cache
	noError(t, "WriteAt", err)
	noError(t, "Abort", f.Abort(t.Context(), "vol"))
	writes, _ := dev.Calls(blocktest.Write)
	if _, err := file.WriteAt(aligned(4096), 0); err == nil {
		t.Error("a write after Abort passed")
	}
	if _, err := file.ReadAt(aligned(4096), 0); err == nil {
		t.Error("a read after Abort passed")
	}
	if err := buffered.Sync(); err == nil {
		t.Error("a sync after Abort passed")
	}
	// The name is free for a new life, on another kernel device, while the old one is still open.
	second := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	if second == path {
		t.Errorf("the new device is at %s, where the old one is still open", path)
	}
	if n, _ := dev.Calls(blocktest.Write); n != writes {
		t.Errorf("%d writes of the aborted device reached it", n-writes)
	}
	noError(t, "Detach", f.Detach(t.Context(), "vol"))
}

func testParallel(t *testing.T, f frontend.Frontend) {
	var g errgroup.Group
	for i := range 20 {
		g.Go(func() error {
			name := fmt.Sprintf("vol-%d", i)
			mem := blocktest.NewMem(16 * mib)
			var paths [2]string
			var twice errgroup.Group // equal calls at once
			for j := range paths {
				twice.Go(func() (err error) {
					paths[j], err = f.Attach(t.Context(), name, mem, frontend.Options{BlockSize: 4096})
					return err
				})
			}
			if err := twice.Wait(); err != nil {
				return err
			}
			if paths[0] != paths[1] {
				return fmt.Errorf("%s is at %s and at %s", name, paths[0], paths[1])
			}
			file, err := os.OpenFile(paths[0], os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				return err
			}
			p, q := aligned(mib), make([]byte, mib)
			fill(p, uint64(i))
			_, err = file.WriteAt(p, 0)
			if err = errors.Join(err, file.Close()); err != nil {
				return err
			}
			if err := f.Detach(t.Context(), name); err != nil {
				return err
			}
			if err := mem.ReadAt(t.Context(), q, 0); err != nil {
				return err
			}
			if !bytes.Equal(p, q) {
				return fmt.Errorf("%s holds another's bytes", name)
			}
			return nil
		})
	}
	noError(t, "parallel devices", g.Wait())
}

func testCloseAborts(t *testing.T, f frontend.Frontend) {
	dev := blocktest.NewFaulty(blocktest.NewMem(16 * mib))
	path := attach(t, f, "vol", dev, frontend.Options{BlockSize: 4096})
	file := open(t, path, unix.O_RDWR|unix.O_DIRECT)
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	failed := make(chan error, 1)
	go func() {
		_, err := file.WriteAt(aligned(4096), 0)
		failed <- err
	}()
	waitFor(t, "a write that hangs", func() bool { return dev.Hanging(blocktest.Write) > 0 })
	noError(t, "Close", f.Close())
	if err := <-failed; err == nil {
		t.Error("a write that hung was acknowledged")
	}
	if _, err := f.Attach(t.Context(), "vol", dev, frontend.Options{BlockSize: 4096}); err == nil {
		t.Error("Attach passed after Close")
	}
}
