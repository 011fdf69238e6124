package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// logDir is a directory in which a test plays the database.
type logDir struct {
	t   *testing.T
	dir string
}

const testLog = 4 << 20

// blocks is the space of a file, -1 where there is none.
func (d logDir) blocks(name string) int64 {
	d.t.Helper()
	var st unix.Stat_t
	err := unix.Stat(filepath.Join(d.dir, name), &st)
	if errors.Is(err, unix.ENOENT) {
		return -1
	}
	if err != nil {
		d.t.Fatal(err)
	}
	return st.Blocks * 512
}

// begin is how the database begins a log, whether the file is there or not.
func (d logDir) begin(name string) {
	d.t.Helper()
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(testLog), f.Close())
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

func (d logDir) remove(name string) {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.dir, name)); err != nil {
		d.t.Fatal(err)
	}
}

func (d logDir) open() *Logs {
	d.t.Helper()
	l, err := OpenLogs(d.dir, testLog)
	if err != nil {
		d.t.Fatal(err)
	}
	return l
}

// What a database writes next has its space: the log, the next log, and a table until a log becomes one.
func TestLogs(t *testing.T) {
	d := logDir{t, t.TempDir()}
	prepared := func(l *Logs, want bool) {
		t.Helper()
		if l.Prepare() != want {
			t.Errorf("prepared: %t", !want)
		}
	}
	has := func(name string, n int64) {
		t.Helper()
		if got := d.blocks(name); got < n || n <= 0 && got > n {
			t.Errorf("%s has %d bytes of space, want %d", name, got, n)
		}
	}
	d.begin("00009.mem") // is to become a table when the database is open
	d.begin("00010.mem")
	l := d.open()
	if err := l.Opened(); err != nil {
		t.Fatal(err)
	}
	has("00009.mem", 0)
	has("00010.mem", testLog)
	has("00011.mem", testLog)
	has(roomName, -1)
	d.remove("00009.mem")
	prepared(l, true)
	has(roomName, testLog/4*3)

	for _, log := range []string{"00010.mem", "00011.mem"} { // each full in its turn
		next := map[string]string{"00010.mem": "00011.mem", "00011.mem": "00012.mem"}[log]
		l.Heard(logFull)
		has(roomName, 0)
		prepared(l, true)
		has(roomName, 0) // it is the table's
		d.begin(next)
		has(next, testLog)
		prepared(l, true)
		has(roomName, 0)
		d.remove(log)
		prepared(l, true)
		has(roomName, testLog/4*3)
	}
	l.Heard("something else")
	has(roomName, testLog/4*3)
	// A database that was faster than we were.
	d.remove("00013.mem")
	d.begin("00013.mem")
	d.begin("00014.mem")
	prepared(l, true)
	has("00014.mem", testLog)
	has("00015.mem", testLog)
	has(spareName, -1)

	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	has("00015.mem", -1)
	// What a crash leaves beside the database's own.
	if err := os.WriteFile(filepath.Join(d.dir, "00015.mem"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(d.dir, "00014.mem"), filepath.Join(d.dir, spareName)); err != nil {
		t.Fatal(err)
	}
	d.open()
	has("00015.mem", -1)
	has(spareName, -1)
	has("00014.mem", testLog)

	var none *Logs
	prepared(none, true)
	none.Heard(logFull)
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

// noLinks is a directory on a filesystem without hard links, as FAT is.
type noLinks struct{ fs.LoopbackNode }

func (*noLinks) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

// Where the next log cannot be made, a log has its space as soon as it is there.
func TestLogsWithoutLinks(t *testing.T) {
	d := logDir{t, t.TempDir()}
	root := &fs.LoopbackRoot{Path: t.TempDir()}
	node := &noLinks{fs.LoopbackNode{RootData: root}}
	root.RootNode = node
	server, err := fs.Mount(d.dir, node, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true}})
	if err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	})
	l := d.open()
	d.begin("00001.mem")
	if err := l.Opened(); err != nil {
		t.Fatal(err)
	}
	for _, log := range []string{"00001.mem", "00002.mem"} {
		if !l.Prepare() {
			t.Fatalf("%s cannot be written", log)
		}
		if n := d.blocks(log); n < testLog {
			t.Errorf("%s has %d bytes of space", log, n)
		}
		if d.blocks("00003.mem") >= 0 || d.blocks(spareName) >= 0 {
			t.Error("something is left of what cannot be made")
		}
		if log == "00001.mem" {
			l.Heard(logFull)
			d.begin("00002.mem")
			d.remove(log)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// On a full filesystem nothing is prepared that has no space, and what was kept is enough to close and to open.
func TestLogsOnAFullFilesystem(t *testing.T) {
	d := logDir{t, t.TempDir()}
	if err := unix.Mount("none", d.dir, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.dir, 0); err != nil {
			t.Error(err)
		}
	})
	fill := func() {
		f, err := os.OpenFile(filepath.Join(d.dir, "hog"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = f.Write(make([]byte, 64<<10))
		}
		f.Close()
	}
	l := d.open()
	d.begin("00001.mem")
	if err := l.Opened(); err != nil {
		t.Fatal(err)
	}
	fill()
	if !l.Prepare() {
		t.Error("what was prepared is not any more")
	}
	// A log that is nearly full: what the table takes is free before it is needed, or the log is not filled.
	l.Wrote(testLog / 2)
	if !l.Prepare() || d.blocks(roomName) != 0 {
		t.Errorf("%d bytes are kept for the table of a log that is nearly full", d.blocks(roomName))
	}
	fill()
	if l.Prepare() {
		t.Error("the log may be filled, and its table has no space")
	}
	d.remove("hog")
	if !l.Prepare() {
		t.Error("the log may not be filled though there is room")
	}
	fill()
	l.Heard(logFull)
	d.begin("00002.mem")
	if d.blocks("00002.mem") < testLog {
		t.Error("the next log has no space")
	}
	if l.Prepare() || d.blocks(spareName) >= 0 {
		t.Error("prepared without room, or something is left of it")
	}
	d.remove("00001.mem") // it is a table now
	fill()
	if l.Prepare() || d.blocks(spareName) >= 0 {
		t.Error("prepared without room, or something is left of it")
	}
	l.Wrote(1)
	if err := l.Close(); !errors.Is(err, ErrNoSpace) {
		t.Errorf("close without room: %v", err)
	}
	if _, err := OpenLogs(d.dir, testLog); !errors.Is(err, ErrNoSpace) {
		t.Errorf("open without room: %v", err)
	}
	d.remove("hog")
	if !l.Prepare() {
		t.Error("not prepared though there is room")
	}
	fill()
	if err := l.Close(); err != nil {
		t.Errorf("close with what was kept: %v", err)
	}
	fill()
	d.remove("00002.mem")
	fill()
	if l = d.open(); l.Opened() != nil || l.Prepare() {
		t.Error("prepared without room")
	}
	if err := l.Close(); err != nil {
		t.Errorf("close of what nothing was committed to: %v", err)
	}
}

// An open database removes logs while it is looked which there are.
func TestLogsThatGo(t *testing.T) {
	d := logDir{t, t.TempDir()}
	d.begin("00002.mem")
	l := d.open()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				d.begin("00001.mem")
				d.remove("00001.mem")
			}
		}
	}()
	defer func() {
		close(stop)
		<-done
	}()
	for range 5000 {
		if logs, err := l.logs(); err != nil || !logs[2] {
			t.Fatalf("%v %v", logs, err)
		}
	}
}
