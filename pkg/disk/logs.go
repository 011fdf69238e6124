package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Logs are those of a Badger database, which writes them through a memory map, where a full filesystem is fatal. They are given
// their space before: like this a commit that has begun ends well, whoever takes the space meanwhile. A filesystem that
// cannot preallocate, or has no room, is left as it is.
type Logs struct {
	dir  string
	size int64

	mu   sync.Mutex
	last int // the newest that was seen
}

// logName is the name of a log; each has the next number.
const logName = "%05d.mem"

// AllocateLogs gives the newest log of an open database in dir its space, which is size bytes.
func AllocateLogs(dir string, size int64) (*Logs, error) {
	l := &Logs{dir: dir, size: size}
	names, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	if err == nil && len(names) > 0 {
		_, err = fmt.Sscanf(filepath.Base(slices.Max(names)), logName, &l.last)
		l.last--
	}
	if err != nil {
		return nil, fmt.Errorf("logs in %s: %w", dir, err)
	}
	l.Allocate()
	return l, nil
}

// Allocate gives logs that are new since the last call their space; it is called after each commit. Of a database in
// memory they are nil.
func (l *Logs) Allocate() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		f, err := os.OpenFile(filepath.Join(l.dir, fmt.Sprintf(logName, l.last+1)), os.O_RDWR, 0)
		if err != nil {
			return // there is none yet
		}
		l.last++
		_ = unix.Fallocate(int(f.Fd()), 0, 0, l.size)
		_ = f.Close()
	}
}
