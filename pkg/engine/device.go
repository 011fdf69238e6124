package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/replication"
)

var _ block.Device = (*Engine)(nil)

// Size implements block.Device.
func (e *Engine) Size() int64 { return e.size.Load() }

// ReadAt implements block.Device.
func (e *Engine) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := block.CheckRange(off, int64(len(p)), e.Size()); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), replication.MaxData)
		if err := e.read(ctx, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (e *Engine) read(ctx context.Context, p []byte, off int64) error {
	buf := getBuffer(len(p))
	res, err := e.do(ctx, buf, true, func(now replication.Now, tag uint64) { e.m.Read(now, tag, off, int64(len(p)), buf.b) })
	switch {
	case err != nil:
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	case res.hole:
		clear(p)
	default:
		copy(p, res.data)
	}
	if !res.kept {
		buf.release()
	}
	return nil
}

// WriteAt implements block.Device. Replicas get the same bytes whatever the caller does with p afterwards: they are copied.
func (e *Engine) WriteAt(ctx context.Context, p []byte, off int64) error {
	return e.write(ctx, p, off, false)
}

// WriteDurably is WriteAt and a Flush of what it wrote.
func (e *Engine) WriteDurably(ctx context.Context, p []byte, off int64) error {
	return e.write(ctx, p, off, true)
}

func (e *Engine) write(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := block.CheckRange(off, int64(len(p)), e.Size()); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), replication.MaxData)
		buf := getBuffer(n)
		copy(buf.b, p)
		if _, err := e.do(ctx, buf, false, func(now replication.Now, tag uint64) { e.m.Write(now, tag, off, buf.b, fua) }); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
		}
		buf.release()
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Zero implements block.Device.
func (e *Engine) Zero(ctx context.Context, off, n int64) error {
	if err := block.CheckRange(off, n, e.Size()); err != nil {
		return err
	}
	for n > 0 {
		// Pieces end where a region does, so that each touches as few of them as it can.
		limit := replication.MaxZero(e.cfg.Geometry)
		piece := min(n, limit-off%e.cfg.Geometry.Region)
		if _, err := e.do(ctx, nil, false, func(now replication.Now, tag uint64) { e.m.Zero(now, tag, off, piece, false) }); err != nil {
			return fmt.Errorf("zero %d bytes at %d: %w", piece, off, err)
		}
		off, n = off+piece, n-piece
	}
	return nil
}

// Flush implements block.Device.
func (e *Engine) Flush(ctx context.Context) error {
	if _, err := e.do(ctx, nil, false, func(now replication.Now, tag uint64) { e.m.Flush(now, tag) }); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// do gives the machine one operation and waits for its end. The buffer is the caller's again, to be released, when the
// error is nil and it is not kept; after an error it must be left to the garbage collector, for replicas may still be sent
// what is in it, or read to it.
func (e *Engine) do(ctx context.Context, buf *buffer, reads bool, begin func(now replication.Now, tag uint64)) (result, error) {
	if e.cfg.Meter != nil && buf != nil {
		defer func(start time.Time) { e.cfg.Meter.record(time.Since(start)) }(time.Now())
	}
	q := requestPool.Get().(*request)
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return result{}, e.gone()
	}
	e.requests.add(q, buf, reads)
	tag := q.tag
	begin(now(), tag)
	fx := e.take()
	e.mu.Unlock()
	e.carryOut(fx)

	var res result
	select {
	case res = <-q.ended:
	case <-ctx.Done():
		e.step(func() {
			if e.requests.get(tag) == q {
				e.m.Cancel(now(), tag)
			}
		})
		res = <-q.ended // Cancel ends it, or Close did
	}
	requestPool.Put(q)
	switch res.code {
	case replication.ResultOK:
		return res, nil
	case replication.ResultRange:
		return res, block.ErrRange
	case replication.ResultGone:
		return res, e.gone()
	}
	if err := ctx.Err(); err != nil {
		return res, err
	}
	return res, errReplicas
}
