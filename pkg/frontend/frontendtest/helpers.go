package frontendtest

import (
	"encoding/binary"
	"os"
	"os/exec"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/frontend"
)

func attach(t *testing.T, f frontend.Frontend, name string, dev block.Device, o frontend.Options) string {
	t.Helper()
	path, err := f.Attach(t.Context(), name, dev, o)
	noError(t, "Attach", err)
	return path
}

func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	file, err := os.OpenFile(path, flags, 0)
	noError(t, "open", err)
	t.Cleanup(func() { file.Close() })
	return file
}

func kernelSize(t *testing.T, path string) int64 {
	t.Helper()
	file, err := os.Open(path)
	noError(t, "open", err)
	defer file.Close()
	var size uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		t.Fatalf("BLKGETSIZE64: %v", errno)
	}
	return int64(size)
}

// aligned makes a slice that starts at a page, as O_DIRECT wants.
func aligned(n int) []byte {
	p := make([]byte, n+4096)
	skip := 4096 - int(uintptr(unsafe.Pointer(&p[0]))%4096)
	return p[skip : skip+n]
}

// fill makes bytes that depend on seed and on the place.
func fill(p []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := 0; i+8 <= len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s after 10 s", what)
		}
	}
}

func noError(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
