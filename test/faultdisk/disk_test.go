package faultdisk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/disk"
)

const mib = 1 << 20

// A disk does what it is told, and is a good one before and after.
func TestFaults(t *testing.T) {
	d, err := New(t.TempDir(), 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	f, err := disk.OpenFile(filepath.Join(d.Path(), "data"), disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Grow(256 * mib); err != nil {
		t.Fatal(err)
	}
	b := disk.Aligned(4096)
	next := byte(0)
	good := func(when string) {
		t.Helper()
		next++
		copy(b, bytes.Repeat([]byte{next}, len(b)))
		got := disk.Aligned(4096)
		if err := errors.Join(f.WriteAt(b, 8192), f.Sync(), f.ReadAt(got, 8192)); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%s: %v", when, err)
		}
	}
	heal := func() {
		t.Helper()
		if err := d.Heal(); err != nil {
			t.Fatal(err)
		}
		good("after it was healed")
	}
	good("at first")

	if err := d.Fill(); err != nil {
		t.Fatal(err)
	}
	good("in place on a full disk")
	if err := f.Allocate(mib, 8*mib); !errors.Is(err, disk.ErrNoSpace) {
		t.Errorf("allocate on a full disk: %v", err)
	}
	heal()
	if err := f.Allocate(mib, 8*mib); err != nil {
		t.Errorf("allocate after a full disk: %v", err)
	}

	d.Fail(false)
	for name, err := range map[string]error{
		"write": f.WriteAt(b, 0), "sync": f.Sync(), "allocate": f.Allocate(32*mib, 4096), "punch": f.Punch(0, 4096), "grow": f.Grow(300 * mib),
		"create": os.WriteFile(filepath.Join(d.Path(), "new"), nil, 0o600), "mkdir": os.Mkdir(filepath.Join(d.Path(), "dir"), 0o700),
		"sync of a directory": disk.SyncDir(d.Path()),
	} {
		if !errors.Is(err, unix.EIO) {
			t.Errorf("%s on a failing disk: %v", name, err)
		}
	}
	if err := f.ReadAt(b, 8192); err != nil {
		t.Errorf("read of a disk that fails writes: %v", err)
	}
	d.Fail(true)
	if err := f.ReadAt(b, 8192); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a dead disk: %v", err)
	}
	heal()

	const late = 200 * time.Millisecond
	d.Slow(late)
	if begin := time.Now(); f.Sync() != nil || time.Since(begin) < late {
		t.Error("a slow disk syncs at once")
	}
	heal()

	d.Hang()
	done := make(chan error)
	go func() { done <- f.Sync() }()
	select {
	case err := <-done:
		t.Errorf("a disk that hangs answered: %v", err)
	case <-time.After(late):
	}
	heal()
	if err := <-done; err != nil {
		t.Errorf("what waited for a disk that hung: %v", err)
	}
}
