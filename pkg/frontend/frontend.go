// Package frontend is the port through which the kernel sees a block.Device as a block device.
package frontend

import (
	"context"
	"errors"

	"github.com/ballast-csi/ballast/pkg/block"
)

// ErrBusy is returned by Detach while the kernel still holds the device: a filesystem on it is mounted or a process
// has it open.
var ErrBusy = errors.New("device is in use")

// Options of a device as the kernel sees it.
type Options struct {
	// BlockSize is the logical block size, 512 or 4096 bytes.
	BlockSize int
	ReadOnly  bool
}

// Frontend makes devices of the kernel. Name is a volume's id: one device per name.
type Frontend interface {
	// Attach returns the path of a kernel block device that serves dev. It returns the same path while name is
	// attached already. The frontend does not close dev.
	Attach(ctx context.Context, name string, dev block.Device, o Options) (path string, err error)
	// Resize makes the kernel see dev's present size.
	Resize(ctx context.Context, name string) error
	// Detach removes the kernel device once all that was written to it has reached dev. An unknown name is nil. It
	// returns ErrBusy, and changes nothing, while the kernel still uses the device.
	Detach(ctx context.Context, name string) error
	// Abort fails all I/O of the device, that in flight and all to come, and frees what the kernel lets go of; the rest
	// is freed when its last user is gone. When it returns nothing of the device reaches dev any more. An unknown name
	// is nil.
	Abort(ctx context.Context, name string) error
	// Close aborts what is still attached.
	Close() error
}
