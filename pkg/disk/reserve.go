package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Space is the room of the filesystem that holds a pool, with a reserve that is given up when it runs short, so that
// deletes, merges and the database go on.
type Space interface {
	// Free is how many bytes the filesystem still has for us, the reserve not counted while it is held.
	Free() (int64, error)
	// Total is the size of the filesystem, in bytes.
	Total() (int64, error)
	// Hold takes the reserve where it is not held and leaves at least margin bytes free beside it; it tells whether it is
	// held now. Durable when it returns.
	Hold(margin int64) (bool, error)
	// Release gives the reserve up. The space is free when it returns. A reserve that is not held is nil.
	Release() error
	// Held tells whether the reserve is held.
	Held() bool
}

// DirSpace is the Space of a directory: the reserve is a preallocated file in it.
type DirSpace struct {
	dir   string
	bytes int64

	mu   sync.Mutex
	held bool
}

const reserveName = "reserve"

// NewDirSpace returns the space of dir with a reserve of that many bytes; one that an earlier process left is held, if it
// has as many.
func NewDirSpace(dir string, reserve int64) *DirSpace {
	s := &DirSpace{dir: dir, bytes: reserve}
	var st unix.Stat_t
	if unix.Stat(s.path(), &st) == nil {
		s.held = st.Blocks*512 >= reserve
	}
	return s
}

func (s *DirSpace) path() string { return filepath.Join(s.dir, reserveName) }

// Free implements Space.
func (s *DirSpace) Free() (int64, error) {
	st, err := s.statfs()
	return int64(st.Bavail) * st.Frsize, err
}

// Total implements Space.
func (s *DirSpace) Total() (int64, error) {
	st, err := s.statfs()
	return int64(st.Blocks) * st.Frsize, err
}

func (s *DirSpace) statfs() (st unix.Statfs_t, err error) {
	for {
		err = unix.Statfs(s.dir, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return st, fmt.Errorf("free space of %s: %w", s.dir, err)
		}
		return st, nil
	}
}

// Hold implements Space.
func (s *DirSpace) Hold(margin int64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held || s.bytes == 0 {
		return true, nil
	}
	if free, err := s.Free(); err != nil || free < s.bytes+margin {
		return false, err
	}
	f, err := os.OpenFile(s.path(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return false, fmt.Errorf("reserve: %w", noSpace(err))
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, 0, s.bytes)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = fill(f, s.bytes)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		// A part of a reserve is of no use: leave the space to others.
		err = errors.Join(fmt.Errorf("reserve: %w", noSpace(err)), f.Truncate(0))
		if IsNoSpace(err) {
			return false, nil
		}
		return false, err
	}
	s.held = true
	return true, nil
}

// fill writes what the filesystem cannot preallocate.
func fill(f *os.File, n int64) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < n; off += int64(len(buf)) {
		if _, err := f.WriteAt(buf[:min(int64(len(buf)), n-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// Release implements Space.
func (s *DirSpace) Release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.held {
		return nil
	}
	if err := os.Truncate(s.path(), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reserve: %w", err)
	}
	s.held = false
	return nil
}

// Held implements Space.
func (s *DirSpace) Held() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.held }
