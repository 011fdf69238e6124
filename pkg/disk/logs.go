package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Logs see to the space of a Badger database, which writes through memory maps, where a full filesystem is fatal (SIGBUS). What
// it writes next has its space before: the log; the log after it; and the table that a full log becomes, in the form of a file
// that is given up when the log is full. Like this what was begun ends well, whoever takes the space meanwhile. A filesystem that
// cannot preallocate is left as it is. Of a database in memory they are nil.
//
// The order of calls is OpenLogs, opening the database, Opened; Close, closing the database.
type Logs struct {
	dir  string
	size int64 // of a log

	mu        sync.Mutex
	newest    int   // the log that is written
	allocated bool  // it has its space
	noLinks   bool  // the filesystem has no links: the database makes its next log itself
	room      bool  // there is the file for a table
	written   int64 // to the newest since it was begun, at most
	committed bool  // something was, since it was opened
	full      int   // the last log that was given up to become a table; it is removed when that is made
}

const (
	// logName is the name of a log; each has the next number.
	logName = "%05d.mem"
	// spareName is a log's until it has its space.
	spareName = "next"
	// roomName is the file for a table.
	roomName = "room"
	// openFloor is what a database takes to be opened, beside the tables that its logs become.
	openFloor = 2 << 20
	// closeWait bounds how long it is waited for a table that is being made.
	closeWait = 5 * time.Second
	closePoll = 10 * time.Millisecond
	// logFull is what a database says, in the goroutine that writes and with its lock held, when the log is full.
	logFull = "Flushing memtable, mt.size=%d size of flushChan: %d\n"
)

// table bounds the table that a log becomes: a log is full at half its size, and exceeded by one commit.
func (l *Logs) table() int64 { return l.size / 8 * 5 }

// roomSize is table, and what filesystems take for themselves.
func (l *Logs) roomSize() int64 { return l.size / 4 * 3 }

// OpenLogs prepares a database for being opened, of logs that are size bytes. Where the filesystem has no room for that it
// returns ErrNoSpace.
func OpenLogs(dir string, size int64) (*Logs, error) {
	l := &Logs{dir: dir, size: size}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(l.path(spareName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	logs, err := l.logs()
	if err != nil {
		return nil, err
	}
	need := int64(openFloor)
	for n, used := range logs {
		if used {
			need += l.table()
			if err := readAnew(l.log(n)); err != nil {
				return nil, err
			}
		} else if err := os.Remove(l.log(n)); err != nil { // it is not one that can be opened
			return nil, err
		}
	}
	if err := l.roomFor(need); err != nil {
		return nil, fmt.Errorf("not opened; delete something else on its filesystem, then start again: %w", err)
	}
	return l, nil
}

// Opened is called when the database is open.
func (l *Logs) Opened() error {
	logs, err := l.logs()
	if err != nil {
		return err
	}
	for n := range logs {
		l.newest = max(l.newest, n)
	}
	l.full = l.newest - 1
	l.Prepare()
	return nil
}

// Wrote is told of each commit: its keys and values, and 64 bytes for each of them.
func (l *Logs) Wrote(n int) {
	if l == nil {
		return
	}
	l.mu.Lock()
	l.written += int64(n)
	l.committed = true
	l.mu.Unlock()
	l.Prepare()
}

// Prepare sees to it that what comes next has its space, and tells whether it does; without, nothing may be committed.
func (l *Logs) Prepare() bool {
	if l == nil {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	next := l.advance()
	if !l.room && l.making() {
		// What is free is for the table that is being made, unless there is much more.
		free, err := l.free()
		if err != nil || free < l.table()+2*l.size {
			return false
		}
	}
	if !l.allocated {
		if allocateFile(l.log(l.newest), os.O_RDWR, 0, l.size) != nil {
			return false
		}
		l.allocated = true
	}
	if !next && !l.noLinks && l.makeNext() != nil {
		return false
	}
	if l.written > l.size/8*3 {
		// The next commit may be the one that fills the log, and then it is late to give something up.
		return l.roomFor(l.table()) == nil
	}
	if !l.room && !l.making() {
		if err := allocateFile(l.path(roomName), os.O_RDWR|os.O_CREATE, 0, l.roomSize()); err != nil {
			_ = os.Truncate(l.path(roomName), 0)
			return false
		}
		l.room = true
	}
	return true
}

// roomFor gives up what was kept where less is free.
func (l *Logs) roomFor(n int64) error {
	free, err := l.free()
	if err == nil && free < n {
		if err = l.give(); err == nil {
			free, err = l.free()
		}
	}
	if err == nil && free < n {
		err = fmt.Errorf("%d bytes are free for the database in %s, it needs %d: %w", free, l.dir, n, ErrNoSpace)
	}
	return err
}

// making tells whether a table is being made of a log.
func (l *Logs) making() bool {
	_, err := os.Lstat(l.log(l.full))
	return err == nil
}

// advance finds the log that is written, and tells whether the next one is made.
func (l *Logs) advance() (next bool) {
	for {
		st, err := os.Lstat(l.log(l.newest + 1))
		if err != nil || st.Size() == 0 {
			return err == nil
		}
		l.newest++
		l.allocated, l.written = false, 0
	}
}

// makeNext makes the next log, with its space beyond its end: the database takes an empty file for a new one. It gets its name
// when it is ready, for after that it is the database's.
func (l *Logs) makeNext() error {
	spare := l.path(spareName)
	err := allocateFile(spare, os.O_RDWR|os.O_CREATE|os.O_EXCL, unix.FALLOC_FL_KEEP_SIZE, l.size)
	if err == nil {
		switch err = os.Link(spare, l.log(l.newest+1)); {
		case errors.Is(err, os.ErrExist):
			err = nil // the database was faster
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			l.noLinks, err = true, nil
		}
	}
	return errors.Join(err, os.Remove(spare), SyncDir(l.dir))
}

// Heard is told the formats of what the database logs.
func (l *Logs) Heard(format string) {
	if l == nil || format != logFull {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.advance()
	l.full = l.newest
	_ = l.give() // it is there, or gone already
}

// Close gives up what the database needs to be closed. Where that is not enough it returns ErrNoSpace, and the database is to be
// left as it is: its logs have all that was committed.
func (l *Logs) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for wait := time.Duration(0); l.making() && wait < closeWait; wait += closePoll {
		time.Sleep(closePoll)
	}
	if l.advance() {
		next := l.log(l.newest + 1)
		if err := errors.Join(os.Truncate(next, 0), os.Remove(next)); err != nil { // some free nothing soon by a removal alone
			return err
		}
	}
	if !l.committed {
		return nil
	}
	if err := l.roomFor(l.table()); err != nil {
		return fmt.Errorf("not closed, it goes on from its logs when it is opened again: %w", err)
	}
	return nil
}

// give frees the space for a table.
func (l *Logs) give() error {
	l.room = false
	if err := os.Truncate(l.path(roomName), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// logs are the logs that there are, and whether the database has begun them.
func (l *Logs) logs() (map[int]bool, error) {
	names, err := filepath.Glob(l.path("*.mem"))
	if err != nil {
		return nil, err
	}
	logs := map[int]bool{}
	for _, name := range names {
		var n int
		if _, err := fmt.Sscanf(filepath.Base(name), logName, &n); err != nil {
			return nil, fmt.Errorf("log %s: %w", name, err)
		}
		st, err := os.Lstat(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // an open database removes those that have become tables
		}
		if err != nil {
			return nil, err
		}
		logs[n] = st.Size() > 0
	}
	return logs, nil
}

func (l *Logs) path(name string) string { return filepath.Join(l.dir, name) }
func (l *Logs) log(n int) string        { return l.path(fmt.Sprintf(logName, n)) }
func (l *Logs) free() (int64, error)    { return NewDirSpace(l.dir, 0).Free() }

// readAnew has a log read from the disk: what an earlier process failed to sync may still be in the page cache, and counts as clean.
func readAnew(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dropClean(f), f.Close())
}

// allocateFile gives a file its space, where the filesystem can.
func allocateFile(path string, flags int, mode uint32, size int64) error {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	for {
		if err = unix.Fallocate(int(f.Fd()), mode, 0, size); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	return errors.Join(err, f.Close())
}
