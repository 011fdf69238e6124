package ioflusher

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is also the child process: it enables the mark and reports what its threads have.
func TestMain(m *testing.M) {
	if os.Getenv("IOFLUSHER_CHILD") != "" {
		os.Exit(child())
	}
	os.Exit(m.Run())
}

func child() int {
	Enable(slog.New(slog.NewTextHandler(os.Stdout, nil)))
	var wg sync.WaitGroup
	marks := make([]bool, 8)
	for i := range marks {
		wg.Go(func() {
			unix.Nanosleep(&unix.Timespec{Nsec: int64(50 * time.Millisecond)}, nil) // a thread each
			marks[i], _ = Enabled()
		})
	}
	wg.Wait()
	fmt.Println("marks", marks, "args", os.Args[1:])
	return 0
}

func permitted(t *testing.T) bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&head, &sets[0]); err != nil {
		t.Fatal(err)
	}
	return sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func run(t *testing.T, env ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "first", "second argument")
	cmd.Env = append(append(os.Environ(), "IOFLUSHER_CHILD=1"), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestEnable(t *testing.T) {
	out := run(t)
	want, warnings := "marks [true true true true true true true true] args [first second argument]", 0
	if !permitted(t) {
		want, warnings = strings.ReplaceAll(want, "true", "false"), 1
	}
	if !strings.Contains(out, want) {
		t.Errorf("the child says %q, want %q", out, want)
	}
	if n := strings.Count(out, "level=WARN"); n != warnings {
		t.Errorf("%d warnings, want %d: %s", n, warnings, out)
	}
}

// TestNoLoop starts a process as if it had been executed again already, without the mark.
func TestNoLoop(t *testing.T) {
	out := run(t, envDone+"=1")
	if n := strings.Count(out, "level=WARN"); n != 1 || strings.Count(out, "marks") != 1 {
		t.Errorf("want one warning and one run: %s", out)
	}
}
