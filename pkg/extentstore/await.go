package extentstore

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxAwaited bounds the calls of a pool that wait for its disk at once, with those whose callers have gone: on a disk that hangs
// their number does not grow with each try.
const maxAwaited = 64

// await calls fn, which may wait for the disk, and returns its error. A disk that hangs holds up fn but not the caller: that one
// gets volume.ErrUnavailable when ctx ends and looks at nothing that fn sets; drop, unless it is nil, takes back what fn comes to do
// for it.
func (p *Pool) await(ctx context.Context, fn func() error, drop func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case p.awaited <- struct{}{}:
	case <-ctx.Done():
		return p.hangs(ctx)
	case <-p.ctx.Done():
		return errPoolClosed
	}
	done := make(chan error) // who takes the error has what was done
	go func() {
		defer func() { <-p.awaited }()
		err := fn()
		select {
		case done <- err:
		case <-ctx.Done():
			if err == nil && drop != nil {
				drop()
			}
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return p.hangs(ctx)
	}
}

func (p *Pool) hangs(ctx context.Context) error {
	return fmt.Errorf("pool %s: its disk has not answered in time; try again, and if it stays silent look at the kernel's log and at the disk: %w: %w",
		p.id, ctx.Err(), volume.ErrUnavailable)
}
