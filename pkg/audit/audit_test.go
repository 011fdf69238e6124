package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func open(t *testing.T, path string, o Options) *Log {
	t.Helper()
	if o.Now == nil {
		o.Now = func() time.Time { return time.Unix(5, 0) }
	}
	l, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func objects(t *testing.T, l *Log, n int) string {
	t.Helper()
	es, err := l.Tail(n)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Object)
	}
	return strings.Join(out, " ")
}

func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{})
	ctx := WithActor(context.Background(), "admin:alice")
	l.Record(ctx, "volume.create", "vol-1", "1 GiB", nil)
	l.Record(context.Background(), "volume.free", "vol-2", "", errors.New("node n1 is away\nreally"))
	l.Record(ctx, "volume.create", strings.Repeat("x", 5000), "\xff", nil)
	es, err := l.Tail(10)
	if err != nil || len(es) != 3 {
		t.Fatalf("%v %v", es, err)
	}
	want := []Event{
		{Time: time.Unix(5, 0).UTC(), Actor: "admin:alice", Action: "volume.create", Object: "vol-1", Detail: "1 GiB", Outcome: OK},
		{Time: time.Unix(5, 0).UTC(), Actor: "system", Action: "volume.free", Object: "vol-2", Outcome: "node n1 is away\nreally"},
	}
	for i, e := range want {
		if es[i] != e {
			t.Errorf("%+v, want %+v", es[i], e)
		}
	}
	if n := len(es[2].Object); n > maxField+3 {
		t.Errorf("%d bytes from outside are kept", n)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := open(t, filepath.Join(dir, "audit.log"), Options{MaxBytes: 300, Keep: 2})
	for i := range 30 {
		l.Record(context.Background(), "a", fmt.Sprint(i), "", nil)
	}
	if got := objects(t, l, 4); got != "26 27 28 29" {
		t.Errorf("tail: %s", got)
	}
	all := objects(t, l, 1000)
	if !strings.HasSuffix(all, "27 28 29") || strings.HasPrefix(all, "0 ") {
		t.Errorf("all: %s", all)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 3 {
		t.Errorf("%d files, %v", len(files), err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Size() > 300 {
			t.Errorf("%s has %d bytes, %v", f.Name(), info.Size(), err)
		}
	}
}

func TestATornLineCostsOneEvent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{})
	l.Record(context.Background(), "a", "1", "", nil)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Record(context.Background(), "a", "lost", "", nil) // said to the logger
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(`{"action":"a","obj`)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	l = open(t, path, Options{})
	l.Record(context.Background(), "a", "2", "", nil)
	if got := objects(t, l, 10); got != "1 2" {
		t.Errorf("events: %s", got)
	}
	if got, err := l.Tail(0); got != nil || err != nil {
		t.Errorf("%v %v", got, err)
	}
}

// limited calls fn under a limit of the process's.
func limited(t *testing.T, resource int, limit uint64, fn func()) {
	t.Helper()
	var was unix.Rlimit
	if err := unix.Getrlimit(resource, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	fn()
	if err := unix.Setrlimit(resource, &was); err != nil {
		t.Fatal(err)
	}
}

// A log that cannot begin a new file keeps its old ones, and goes on when it can.
func TestRotationThatFails(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "audit.log"), Options{MaxBytes: 300, Keep: 2})
	record := func(i int) { l.Record(context.Background(), "a", fmt.Sprint(i), "", nil) }
	for i := range 3 {
		record(i)
	}
	limited(t, unix.RLIMIT_NOFILE, 3, func() {
		for i := range 10 {
			record(100 + i)
		}
	})
	if got := objects(t, l, 10); got != "0 1 2" {
		t.Errorf("events while no file can be opened: %q", got)
	}
	record(3)
	if got := objects(t, l, 10); got != "0 1 2 3" {
		t.Errorf("events: %q", got)
	}
}

// A disk that is full in the midst of an event costs that one.
func TestHalfAnEventCostsNoOther(t *testing.T) {
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path, Options{})
	record := func(object string) { l.Record(context.Background(), "a", object, "", nil) }
	record("1")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	limited(t, unix.RLIMIT_FSIZE, uint64(info.Size())+10, func() { record("lost") })
	record("2")
	if got := objects(t, l, 10); got != "1 2" {
		t.Errorf("events: %q", got)
	}
}

func TestRecordsAtOnce(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "audit.log"), Options{MaxBytes: 4000, Keep: 100})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() { l.Record(context.Background(), "a", fmt.Sprint(i), "", nil) })
	}
	wg.Wait()
	if es, err := l.Tail(100); err != nil || len(es) != 50 {
		t.Errorf("%d events, %v", len(es), err)
	}
}
