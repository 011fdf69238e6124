// Package disk is the only road to a pool's data file: File, with the durability of each method, its implementation on
// the operating system, and an in-memory twin that can lose what was not synced, tear it, fail and fill up. It also
// holds the space that a pool keeps back beside its database, and the preparation of whole raw disks.
package disk

import (
	"errors"
	"fmt"
)

// BlockSize is the alignment, in bytes, at which I/O is passed through without a copy.
const BlockSize = 4096

// ErrNoSpace is wrapped by errors of a file or filesystem without room. What was asked may have been done in part.
var ErrNoSpace = errors.New("no space left on the filesystem")

// ErrClosed is returned by every method of a closed file.
var ErrClosed = errors.New("file is closed")

// ErrRange is wrapped by errors for bytes beyond the end of the file.
var ErrRange = errors.New("outside the file")

// File is a pool's data file, of a fixed size. All methods may be called at once; of overlapping writes in flight
// together any mix may result.
//
// Durability: after a crash each 512-byte sector written since the last Sync that returned nil holds the old bytes, the
// bytes of any of the writes since, or (after Punch) zeros. After a Sync that failed, all that was not durable before may
// be lost even though later Syncs return nil: the caller must not trust the file again until it is reopened and its
// contents are known by other means.
type File interface {
	// ReadAt fills p from off. What was never written reads as zeros. Any alignment; fast at that of BlockSize.
	ReadAt(p []byte, off int64) error
	// WriteAt writes p at off. It is visible to reads at once, and durable after the next Sync. off and len(p) are
	// multiples of BlockSize; the memory may have any alignment.
	WriteAt(p []byte, off int64) error
	// Sync makes all writes, punches and allocations that returned before it was called durable.
	Sync() error
	// Punch gives the space of [off, off+n) back where the file can; afterwards it reads as zeros or as before. It is
	// durable after the next Sync, and may be so before.
	Punch(off, n int64) error
	// Allocate makes sure that writes to [off, off+n) need no more space from the filesystem, where it can. Bytes are kept.
	Allocate(off, n int64) error
	// Size in bytes.
	Size() int64
	// Grow extends the file to size with bytes that read as zeros; durable when it returns. A smaller size changes nothing.
	Grow(size int64) error
	// Close does not sync.
	Close() error
}

func checkRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size-n {
		return fmt.Errorf("offset %d length %d of %d bytes: %w", off, n, size, ErrRange)
	}
	return nil
}

func checkWrite(off int64, n int, size int64) error {
	if off%BlockSize != 0 || n%BlockSize != 0 {
		return fmt.Errorf("write of %d bytes at %d is not in blocks of %d", n, off, BlockSize)
	}
	return checkRange(off, int64(n), size)
}
