// Package block is the port between what stores a volume's bytes and what serves them: Device.
//
// blocktest holds the conformance suite that every implementation passes, and devices that crash and fail on purpose.
package block

import (
	"context"
	"errors"
	"fmt"
)

const (
	// Size is the unit of I/O in bytes. A write of whole, aligned blocks is never torn across a crash by Ballast itself.
	Size = 4096
	// MaxIO bounds one read or write, in bytes. Zero takes any length.
	MaxIO = 32 << 20
)

// ErrClosed is returned once a device has been closed or fenced: nothing of the request was carried out.
var ErrClosed = errors.New("device is closed")

// ErrRange is returned for a request that does not lie within the device: nothing was carried out.
var ErrRange = errors.New("request is outside the device")

// Device is a volume as a flat array of bytes. Offsets and lengths are in bytes and may be unaligned.
//
// All methods may be called at once. Overlapping requests in flight together take effect in some order, whole blocks at
// a time. A request waits while the store cannot serve it now (a full pool); it ends early only when ctx is done or
// the device is closed. After an error other than ErrRange the range holds, per block, the old or the new bytes.
type Device interface {
	// ReadAt fills p from off. Bytes never written, or zeroed since, read as zeros.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt stores p at off. Readers see it at once; it survives a crash only after a later Flush returned nil.
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes [off, off+n) read as zeros, and frees the space where it can. Durable as a write is.
	Zero(ctx context.Context, off, n int64) error
	// Flush makes every write and zero that returned before it was called durable. A failed flush is not retried:
	// what was written since the last good one may be lost.
	Flush(ctx context.Context) error
	// Size in bytes; it grows when the device is resized and never shrinks.
	Size() int64
}

// CheckRange returns ErrRange unless [off, off+n) lies within size.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("offset %d length %d size %d: %w", off, n, size, ErrRange)
	}
	return nil
}
