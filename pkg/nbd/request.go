package nbd

import (
	"context"
	"errors"
	"math"
	"sync"
	"syscall"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// maxExtents bounds one answer to a block status request.
	maxExtents = 1024
	// zeroPiece is how many zeros are written at once where no hole is wanted, in bytes.
	zeroPiece = 1 << 20
)

// zeros are written and never changed.
var zeros = sync.OnceValue(func() []byte { return disk.Aligned(zeroPiece) })

// run carries out a task and answers it.
func (c *conn) run(t task) {
	r, err := c.carryOut(&t)
	e := t.refused
	if e == 0 {
		e = c.errno(&t, err)
	}
	if e != 0 {
		r.body.release()
		r = reply{}
		if c.structured(t.cmd) {
			r.n = len(appendError(r.head[:0], t.cookie, e))
		} else {
			r.n = len(appendSimple(r.head[:0], t.cookie, e))
		}
	}
	t.payload.release()
	r.charge = t.charge
	c.out.running.Add(-1)
	c.out.send(r)
}

// structured tells whether the answer must be so.
func (c *conn) structured(cmd command) bool {
	return c.h.structured && (cmd == cmdRead || cmd == cmdBlockStatus)
}

// carryOut returns the answer to a request that succeeded.
func (c *conn) carryOut(t *task) (r reply, err error) {
	if t.refused != 0 {
		return r, nil
	}
	e := c.h.chosen
	off, n := int64(t.offset), int64(t.length)
	if t.offset > math.MaxInt64 {
		return r, block.ErrRange
	}
	switch t.cmd {
	case cmdRead:
		return c.read(t, off)
	case cmdBlockStatus:
		return c.blockStatus(t, off, n)
	case cmdWrite:
		err = e.Device.WriteAt(c.ctx, t.payload.b, off)
	case cmdTrim:
		err = e.Device.Zero(c.ctx, off, n)
	case cmdWriteZeroes:
		err = c.writeZeroes(t.flags, off, n)
	case cmdFlush:
		if !e.ReadOnly {
			err = e.Device.Flush(c.ctx)
		}
	case cmdCache: // a hint
		err = block.CheckRange(off, n, e.Device.Size())
	default:
		err = errUnknownCommand
	}
	if err == nil && t.flags&cmdFlagFUA != 0 && !e.ReadOnly && t.cmd != cmdFlush && t.cmd != cmdCache {
		err = e.Device.Flush(c.ctx)
	}
	r.n = len(appendSimple(r.head[:0], t.cookie, 0))
	return r, err
}

var (
	errUnknownCommand = errors.New("unknown command")
	errNotFast        = errors.New("zeroes without a hole are as slow as any write")
)

func (c *conn) read(t *task, off int64) (r reply, err error) {
	if c.h.structured {
		r.n = len(appendDataHead(r.head[:0], t.cookie, t.offset, int(t.length)))
	} else {
		r.n = len(appendSimple(r.head[:0], t.cookie, 0))
	}
	r.body = getBuffer(int(t.length))
	return r, c.h.chosen.Device.ReadAt(c.ctx, r.body.b, off)
}

// writeZeroes writes zeros where the client wants the space to stay allocated.
func (c *conn) writeZeroes(flags uint16, off, n int64) error {
	dev := c.h.chosen.Device
	if flags&cmdFlagNoHole == 0 {
		return dev.Zero(c.ctx, off, n)
	}
	if err := block.CheckRange(off, n, dev.Size()); err != nil {
		return err
	}
	if flags&cmdFlagFastZero != 0 {
		return errNotFast
	}
	for n > 0 {
		piece := min(n, zeroPiece)
		if err := dev.WriteAt(c.ctx, zeros()[:piece], off); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

func (c *conn) blockStatus(t *task, off, n int64) (r reply, err error) {
	if err := block.CheckRange(off, n, c.h.chosen.Device.Size()); err != nil {
		return r, err
	}
	limit := maxExtents
	if t.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	extents, err := statusOf(c.ctx, c.h.chosen.Extents, off, n, limit)
	if err != nil {
		return r, err
	}
	r.long = appendBlockStatus(nil, t.cookie, extents)
	return r, nil
}

// errEnough ends a walk that has found as much as is answered.
var errEnough = errors.New("enough")

// statusOf describes the beginning of [off, off+n) with at most limit extents, at least one: n and limit are not 0.
func statusOf(ctx context.Context, walk func(context.Context, int64, int64, func(off, n int64) error) error, off, n int64, limit int) ([]extent, error) {
	var out []extent
	at, end := off, off+n
	add := func(to int64, state uint32) error {
		if to <= at {
			return nil
		}
		if k := len(out) - 1; k >= 0 && out[k].state == state {
			out[k].length += uint32(to - at)
		} else if len(out) == limit {
			return errEnough
		} else {
			out = append(out, extent{uint32(to - at), state})
		}
		at = to
		return nil
	}
	err := walk(ctx, off, n, func(o, k int64) error {
		if err := add(min(o, end), stateHole); err != nil {
			return err
		}
		return add(min(o+k, end), stateData)
	})
	if err == nil {
		err = add(end, stateHole)
	}
	if errors.Is(err, errEnough) {
		err = nil
	}
	return out, err
}

// errno is how a device's error is told.
func (c *conn) errno(t *task, err error) errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, block.ErrRange):
		if t.cmd == cmdWrite || t.cmd == cmdWriteZeroes {
			return eNoSpc
		}
		return eInval
	case errors.Is(err, errUnknownCommand):
		return eInval
	case errors.Is(err, errNotFast):
		return eNotSup
	case errors.Is(err, block.ErrClosed), errors.Is(err, context.Canceled):
		return eShutdown
	case errors.Is(err, volume.ErrNoSpace), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return eNoSpc
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EROFS):
		return ePerm
	}
	c.s.o.Logger.Error("nbd: request failed", "export", c.h.chosen.Name, "command", t.cmd, "offset", t.offset, "length", t.length, "error", err)
	return eIO
}
