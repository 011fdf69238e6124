package disk

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cached is the number of a file's pages that are in the page cache.
func cached(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	in := make([]byte, (len(b)+os.Getpagesize()-1)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(unsafe.Pointer(unsafe.SliceData(in))))
	if errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, x := range in {
		n += int(x & 1)
	}
	return n
}

// dirOnDisk is a directory whose files are not their page cache.
func dirOnDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("a tmpfs is nothing but page cache")
	}
	return dir
}

// TestOpenReadsTheDisk: what an earlier process left in the page cache, and a failed sync of it made look clean, is not read.
func TestOpenReadsTheDisk(t *testing.T) {
	dir := dirOnDisk(t)
	path := filepath.Join(dir, "data")
	f, err := OpenFile(path, Options{Buffered: true})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 1<<20)
	for _, err := range []error{f.Grow(1 << 20), f.WriteAt(data, 0), f.Sync(), f.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if cached(t, path) == 0 {
		t.Skip("the filesystem keeps nothing in the page cache")
	}
	if f, err = OpenFile(path, Options{Buffered: true}); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n := cached(t, path); n > 0 {
		t.Errorf("%d pages are shown as an earlier process left them", n)
	}
	got := make([]byte, len(data))
	if err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was synced is not there: %v", err)
	}
}

// A log is read from the disk as well when a database is opened.
func TestLogsAreReadFromTheDisk(t *testing.T) {
	dir := dirOnDisk(t)
	path := filepath.Join(dir, "00007.mem")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(bytes.Repeat([]byte{7}, 1<<20))
	for _, err := range []error{err, f.Sync(), f.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if cached(t, path) == 0 {
		t.Skip("the filesystem keeps nothing in the page cache")
	}
	if _, err := OpenLogs(dir, 4<<20); err != nil {
		t.Fatal(err)
	}
	if n := cached(t, path); n > 0 {
		t.Errorf("%d pages are shown as an earlier process left them", n)
	}
}
