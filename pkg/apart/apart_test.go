package apart

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTableIsOwn(t *testing.T) {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ours := int(f.Fd())

	thread, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	defer thread.Stop()
	var theirs int
	if err := thread.Do(func() (err error) {
		if _, err := unix.FcntlInt(uintptr(ours), unix.F_GETFD, 0); err != unix.EBADF {
			return errors.New("a descriptor of the process is there")
		}
		theirs, err = unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if theirs != 3 {
		t.Errorf("the first descriptor is %d", theirs)
	}
	// It is there for the next call, and f is still here.
	if err := thread.Do(func() error { return unix.Close(theirs) }); err != nil {
		t.Error(err)
	}
	if _, err := f.Stat(); err != nil {
		t.Error(err)
	}
}

func TestDo(t *testing.T) {
	want := errors.New("no")
	if err := Do(func() error { return want }); err != want {
		t.Errorf("got %v", err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := Do(func() error { return unix.Stat("/", new(unix.Stat_t)) }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestStopEndsTheThread sees that what is open there is closed.
func TestStopEndsTheThread(t *testing.T) {
	thread, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, w := os.NewFile(uintptr(p[0]), "r"), os.NewFile(uintptr(p[1]), "w")
	defer r.Close()
	if err := thread.Do(func() error {
		// The only way for a descriptor into the other table.
		pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			return err
		}
		_, err = unix.PidfdGetfd(pidfd, p[1], 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	closed := make(chan error, 1)
	go func() {
		_, err := r.Read(make([]byte, 1))
		closed <- err
	}()
	select {
	case err := <-closed:
		t.Fatalf("the writer was closed early: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	thread.Stop()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Fatal("the writer stayed open")
	}
}

// TestRuntimeWorksApart: the garbage collector polls the network on the thread that ends a cycle.
func TestRuntimeWorksApart(t *testing.T) {
	thread, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	defer thread.Stop()
	for range 20 {
		if err := thread.Do(func() error { runtime.GC(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
}
