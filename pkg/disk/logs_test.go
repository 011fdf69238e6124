package disk

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Each log has its space once it was looked at, and those of before are left alone.
func TestLogs(t *testing.T) {
	dir := t.TempDir()
	const size = 4 << 20
	log := func(name string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	has := func(path string) bool {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != size {
			t.Errorf("%s has %d bytes", path, st.Size)
		}
		return st.Blocks*512 >= size
	}
	older, newest := log("00009.mem"), log("00010.mem")
	l, err := AllocateLogs(dir, size)
	if err != nil {
		t.Fatal(err)
	}
	if has(older) || !has(newest) {
		t.Errorf("space: of the older log %t, of the newest %t", has(older), has(newest))
	}
	next, one := log("00011.mem"), log("00012.mem")
	l.Allocate()
	if !has(next) || !has(one) {
		t.Errorf("space: of the next log %t, of the one after %t", has(next), has(one))
	}
	if l, err = AllocateLogs(t.TempDir(), size); err != nil || l == nil {
		t.Errorf("no logs: %v", err)
	}
	var none *Logs
	none.Allocate()
}
