package fuseloop

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not so after 10 s")
		}
	}
}

// bound tells whether a loop device is bound to a file of the directory: the number may be another's by now.
func bound(path, dir string) bool {
	backing, err := (&loop{path: path}).backing()
	return err == nil && strings.HasPrefix(backing, dir+"/")
}

// census counts what a frontend could leak.
func census(t *testing.T, dir string) string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	loops, err := boundLoops()
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := mountPoints()
	if err != nil {
		t.Fatal(err)
	}
	ours := 0
	for _, l := range loops {
		if l.backing == "/" || strings.HasPrefix(l.backing, dir) {
			ours++
		}
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, dir) {
			ours++
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	buffers := 0
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err == nil && to-from == bufferSize {
			buffers++
		}
	}
	return fmt.Sprintf("%d descriptors, %d goroutines, %d loop devices and mounts, %d buffers", len(fds), runtime.NumGoroutine(), ours, buffers)
}
