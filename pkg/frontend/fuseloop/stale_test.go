package fuseloop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// TestKilled kills a process that serves a mounted filesystem with I/O in flight, and one device that nobody uses.
func TestKilled(t *testing.T) {
	dir, mount := t.TempDir(), t.TempDir()
	// Others, who must not be touched: a frontend whose directory's name begins with the same letters, and a plain loop
	// device on a file in the directory.
	otherDir := dir + "-other"
	t.Cleanup(func() { os.RemoveAll(otherDir) })
	other := newFrontend(t, otherDir)
	otherPath, err := other.Attach(t.Context(), "vol", blocktest.NewMem(16<<20), frontend.Options{BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}

	p := startProcess(t, dir)
	path, unused := p.do(t, "attach vol 256"), p.do(t, "attach unused 16")
	if _, err := New(t.Context(), Options{RunDir: dir}); !errors.Is(err, volume.ErrInUse) {
		t.Fatalf("New of a directory in use = %v, want ErrInUse", err)
	}
	plainFile := filepath.Join(dir, "plain")
	run(t, "truncate", "-s", "16M", plainFile)
	plain := run(t, "losetup", "--find", "--show", plainFile)
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", plain).Run() })

	run(t, "mkfs.ext4", "-q", path)
	if err := unix.Mount(path, mount, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	p.do(t, "hang vol")
	writers := make(chan error, 5)
	for i := range cap(writers) {
		go func() {
			file := filepath.Join(mount, string(rune('a'+i)))
			writers <- exec.Command("dd", "if=/dev/zero", "of="+file, "bs=1M", "count=8", "conv=fsync", "status=none").Run()
		}()
	}
	time.Sleep(300 * time.Millisecond)
	p.kill()
	for range cap(writers) {
		select {
		case err := <-writers:
			if err == nil {
				t.Error("a write that hung was acknowledged")
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a writer still hangs after the process was killed")
		}
	}

	f := newFrontend(t, dir)
	want := []StaleDevice{{Name: "vol", LoopPath: path, Mounts: []string{mount}}}
	for range 2 { // the mount of the file is detached by now
		stale, err := f.Stale(t.Context())
		if err != nil || len(stale) != 1 || stale[0].Name != "vol" || stale[0].LoopPath != path || len(stale[0].Mounts) != 1 || stale[0].Mounts[0] != mount {
			loops, _ := boundLoops()
			t.Fatalf("Stale() = %v, %v; want %v; bound: %v; %v", stale, err, want, loops, run(t, "sh", "-c", "losetup -l; grep loop /proc/self/mountinfo; dmesg | tail -30"))
		}
		if err := f.Clean(t.Context()); !errors.Is(err, frontend.ErrBusy) || !strings.Contains(err.Error(), mount) {
			t.Fatalf("Clean() = %v, want ErrBusy that names %s", err, mount)
		}
	}
	if bound(unused, dir) {
		t.Errorf("%s, which nobody used, is still bound", unused)
	}

	// The name can have a new life meanwhile.
	again, err := f.Attach(t.Context(), "vol", blocktest.NewMem(16<<20), frontend.Options{BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if again == path {
		t.Errorf("the new device is at %s, where the dead one is mounted", path)
	}
	run(t, "dd", "if=/dev/zero", "of="+again, "bs=1M", "count=8", "oflag=direct", "status=none")
	if stale, err := f.Stale(t.Context()); err != nil || len(stale) != 1 {
		t.Errorf("Stale() = %v, %v; want the dead device only", stale, err)
	}

	if err := unix.Unmount(mount, 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return !bound(path, dir) })
	waitFor(t, func() bool { // nobody calls Clean
		left, err := os.ReadDir(filepath.Join(dir, "devices"))
		return err == nil && len(left) == 1
	})
	if stale, err := f.Stale(t.Context()); err != nil || len(stale) != 0 {
		t.Errorf("Stale() after the unmount = %v, %v", stale, err)
	}
	if err := f.Detach(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	run(t, "dd", "if=/dev/zero", "of="+otherPath, "bs=1M", "count=8", "oflag=direct", "status=none")
	if !bound(plain, dir) {
		t.Error("another's loop device was freed")
	}
}

// TestKilledWaitingForItself kills a process of which a thread waits for I/O that the process itself would answer: it
// cannot die until the next one aborts its connections.
func TestKilledWaitingForItself(t *testing.T) {
	dir := t.TempDir()
	p := startProcess(t, dir)
	path := p.do(t, "attach vol 16")
	p.do(t, "hang vol")
	p.do(t, "write vol")
	time.Sleep(200 * time.Millisecond)
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	f := newFrontend(t, dir)
	if err := p.cmd.Wait(); err == nil {
		t.Error("the killed process ended well")
	}
	waitFor(t, func() bool { return !bound(path, dir) })
	if err := f.Clean(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestKilledWhileSyncing kills a process that syncs a device of its own, which hangs: nobody helps it to die.
func TestKilledWhileSyncing(t *testing.T) {
	dir := t.TempDir()
	p := startProcess(t, dir)
	path := p.do(t, "attach vol 64")
	p.do(t, "hang vol")
	run(t, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=8", "conv=notrunc", "status=none")
	p.do(t, "detach vol")
	waitFor(t, func() bool { return waitsIn(t, p.cmd.Process.Pid, unix.SYS_FSYNC) })
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = p.cmd.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the process still waits for itself")
	}
	f := newFrontend(t, dir) // which ends it in any case
	<-ended
	waitFor(t, func() bool { return !bound(path, dir) })
	if err := f.Clean(t.Context()); err != nil {
		t.Error(err)
	}
}

// waitsIn tells whether a thread of the process waits uninterruptibly in a system call.
func waitsIn(t *testing.T, pid, call int) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(threads, func(thread string) bool {
		status, _ := os.ReadFile(filepath.Join(thread, "status"))
		now, _ := os.ReadFile(filepath.Join(thread, "syscall"))
		return strings.Contains(string(status), "\nState:\tD") && strings.HasPrefix(string(now), strconv.Itoa(call)+" ")
	})
}

// TestAbortedFromOutside aborts a connection as an operator might: Attach makes a device that works.
func TestAbortedFromOutside(t *testing.T) {
	f := newFrontend(t, t.TempDir())
	dev := blocktest.NewMem(16 << 20)
	path, err := f.Attach(t.Context(), "vol", dev, frontend.Options{BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path) // a user that stays
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	server := f.devices["vol"].server
	f.ctl.abort(server.conn, server.path)
	waitFor(t, server.dead)
	again, err := f.Attach(t.Context(), "vol", dev, frontend.Options{BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if again == path {
		t.Errorf("the new device is at %s, where the dead one is open", path)
	}
	run(t, "dd", "if=/dev/zero", "of="+again, "bs=1M", "count=4", "oflag=direct", "status=none")
	if err := f.Detach(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	if err := file.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Clean(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestForeignFile has something in the run directory that is not Ballast's, beside a dead device that is in use.
func TestForeignFile(t *testing.T) {
	f := newFrontend(t, t.TempDir())
	path, err := f.Attach(t.Context(), "vol", blocktest.NewMem(16<<20), frontend.Options{BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	user, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	if err := f.Abort(t.Context(), "vol"); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(f.dir, "a file")
	if err := os.WriteFile(foreign, []byte("of somebody"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Clean(t.Context()); !errors.Is(err, frontend.ErrBusy) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), foreign) {
		t.Errorf("Clean() = %v, want both to be named", err)
	}
	if err := os.Remove(foreign); err != nil {
		t.Fatal(err)
	}
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		files, err := os.ReadDir(f.dir)
		return err == nil && len(files) == 0
	})
}

// TestLetGoOfMeanwhile has the last user of a dead device leave while it is looked whether there is one.
func TestLetGoOfMeanwhile(t *testing.T) {
	f := newFrontend(t, t.TempDir())
	for i := range 100 {
		path, err := f.Attach(t.Context(), "vol", blocktest.NewMem(16<<20), frontend.Options{BlockSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		user, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Abort(t.Context(), "vol"); err != nil {
			t.Fatal(err)
		}
		left := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(i) * 20 * time.Microsecond)
			left <- user.Close()
		}()
		err = f.Clean(t.Context())
		switch files, _ := os.ReadDir(f.dir); {
		case err != nil && !errors.Is(err, frontend.ErrBusy):
			t.Fatal(err)
		case err == nil && len(files) != 0:
			t.Fatalf("round %d: Clean() = nil and left %v", i, files)
		}
		if err := <-left; err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeaks goes through all ways in which a device ends.
func TestLeaks(t *testing.T) {
	dir := t.TempDir()
	life := func() {
		f := newFrontend(t, dir)
		for i := range 20 {
			dev := blocktest.NewFaulty(blocktest.NewMem(16 << 20))
			path, err := f.Attach(t.Context(), "vol", dev, frontend.Options{BlockSize: 4096})
			if err != nil {
				t.Fatal(err)
			}
			run(t, "dd", "if=/dev/zero", "of="+path, "bs=1M", "count=4", "status=none")
			switch i % 3 {
			case 0:
				err = f.Detach(t.Context(), "vol")
			case 1:
				err = f.Abort(t.Context(), "vol")
			case 2: // an Attach whose caller has left
				_, _ = f.Attach(canceled(), "vol2", dev, frontend.Options{BlockSize: 4096})
				err = errors.Join(f.Detach(t.Context(), "vol2"), f.Abort(t.Context(), "vol"))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.Attach(t.Context(), "odd", &growing{Device: blocktest.NewMem(16 << 20)}, frontend.Options{BlockSize: 4096}); err == nil {
			t.Fatal("Attach of a device whose size is in doubt passed")
		}
		if _, err := f.Attach(t.Context(), "vol", blocktest.NewMem(16<<20), frontend.Options{BlockSize: 4096}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	life() // what the runtime keeps is there by then
	before := census(t, dir)
	life()
	var after string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if after = census(t, dir); after == before {
			break
		}
	}
	if after != before {
		t.Errorf("left over: %s; before: %s", after, before)
	}
	files, err := os.ReadDir(filepath.Join(dir, "devices"))
	if err != nil || len(files) != 0 {
		t.Errorf("files left: %v, %v", files, err)
	}
}

// growing shows another size to everyone who asks.
type growing struct {
	block.Device
	n atomic.Int64
}

func (g *growing) Size() int64 { return g.Device.Size() + 4096*g.n.Add(1) }

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}
