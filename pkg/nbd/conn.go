package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
)

// conn is one client.
type conn struct {
	s   *server
	raw net.Conn
	net net.Conn // raw, or TLS on it
	r   *bufio.Reader
	h   handshake

	// stopping: no request is read any more.
	stopping atomic.Bool

	// Of transmission:
	ctx     context.Context // of requests; ends with a client that went away
	cancel  context.CancelFunc
	out     *replies
	window  *window
	work    chan task
	workers int
	wg      sync.WaitGroup // of workers
	failure atomic.Pointer[error]
}

// task is a request that was read.
type task struct {
	request
	payload *buffer // of a write
	charge  int     // to the window
	refused errno   // where it is known already that it fails
}

func newConn(s *server, nc net.Conn) *conn {
	return &conn{s: s, raw: nc, net: nc, r: bufio.NewReaderSize(nc, 64<<10), h: handshake{exports: s.exports, offerTLS: s.o.TLS != nil}}
}

// shut ends the reading of requests; it may be called at any time.
func (c *conn) shut() {
	c.stopping.Store(true)
	_ = c.raw.SetReadDeadline(time.Unix(1, 0))
}

// cut ends the connection.
func (c *conn) cut() { _ = c.raw.Close() }

// fail remembers why the connection ends, and ends it.
func (c *conn) fail(err error) {
	c.failure.CompareAndSwap(nil, &err)
	c.cancel()
	c.cut()
}

// serve returns when the connection has ended and nothing of it runs; nil where the client or a stop ended it in order.
func (c *conn) serve() error {
	defer func() { _ = c.net.Close() }() // it tells the client, where there is TLS
	if err := c.raw.SetDeadline(time.Now().Add(c.s.o.NegotiationTime)); err != nil || c.stopped() {
		return nil
	}
	ready, err := c.negotiate()
	if err != nil || !ready {
		return c.ordinary(err)
	}
	if err := c.raw.SetDeadline(time.Time{}); err != nil {
		return nil
	}
	c.ctx, c.cancel = context.WithCancel(c.s.requests)
	defer c.cancel()
	c.window = newWindow()
	c.out = newReplies(c.net, c.window, c.s.o.StallTime, c.fail)
	c.work = make(chan task)
	err = c.transmit()
	if err != nil {
		// The client is gone, or is not one: nobody waits for the answers.
		c.cancel()
	}
	close(c.work)
	c.wg.Wait()
	if f := c.failure.Load(); f != nil {
		err = *f
	}
	return c.ordinary(err)
}

// ordinary is nil for the ways in which connections end every day.
func (c *conn) ordinary(err error) error {
	if c.stopped() {
		return nil
	}
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// stopped tells whether a stop was asked for. Where it answers false after the read deadline was changed, shut comes
// after that, and its deadline holds.
func (c *conn) stopped() bool { return c.stopping.Load() }

// negotiate is true once the client has chosen an export, false where it ended the session.
func (c *conn) negotiate() (bool, error) {
	out := appendGreeting(nil)
	if _, err := c.net.Write(out); err != nil {
		return false, err
	}
	var flags [clientFlagsSize]byte
	if _, err := io.ReadFull(c.r, flags[:]); err != nil {
		return false, err
	}
	var err error
	if c.h.noZeroes, err = parseClientFlags(flags); err != nil {
		return false, err
	}
	for {
		var head [optionHeaderSize]byte
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return false, err
		}
		o, n, err := parseOptionHeader(head)
		if err != nil {
			return false, err
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return false, err
		}
		var v verdict
		out, v, err = c.h.option(o, data, out[:0])
		if len(out) > 0 {
			if _, err := c.net.Write(out); err != nil {
				return false, err
			}
		}
		switch {
		case err != nil:
			return false, err
		case v == hangUp:
			return false, nil
		case v == startTLS:
			if err := c.secure(); err != nil {
				return false, err
			}
		case v == transmit:
			return true, nil
		}
	}
}

func (c *conn) secure() error {
	if c.r.Buffered() > 0 {
		// It was sent in the clear, and would be taken for what came within TLS.
		return fmt.Errorf("data after STARTTLS: %w", errProtocol)
	}
	t := tls.Server(c.raw, c.s.o.TLS)
	if err := t.Handshake(); err != nil { // the negotiation's deadline bounds it
		return err
	}
	c.net = t
	c.r.Reset(t)
	c.h.secured()
	return nil
}

// transmit reads requests and hands them out, until the client says that it leaves, or a stop.
func (c *conn) transmit() error {
	for {
		if c.stopped() {
			return nil
		}
		head, err := c.r.Peek(requestSize)
		if err != nil {
			if c.stopped() && errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			}
			return err
		}
		req, err := parseRequest(head)
		if err != nil {
			return err
		}
		if _, err := c.r.Discard(requestSize); err != nil {
			return err
		}
		if req.cmd == cmdDisc {
			return nil
		}
		t := task{request: req, refused: c.check(req)}
		if err := c.admit(&t); err != nil {
			return err
		}
		c.hand(t)
	}
}

// check tells what a request is refused with, 0 if it is not. Sizes are checked by the device.
func (c *conn) check(req request) errno {
	switch {
	case req.flags&^allowedFlags(req.cmd) != 0:
		return eInval
	case req.cmd == cmdRead && req.length > block.MaxIO:
		return eInval
	case req.cmd == cmdBlockStatus && (!c.h.contexts() || req.length == 0):
		return eInval
	case c.h.chosen.ReadOnly && (req.cmd == cmdWrite || req.cmd == cmdTrim || req.cmd == cmdWriteZeroes):
		return ePerm
	}
	return 0
}

// admit waits for room for a request, and reads its payload.
func (c *conn) admit(t *task) error {
	if t.cmd == cmdWrite && t.length > block.MaxIO {
		return fmt.Errorf("write of %d bytes: %w", t.length, errProtocol)
	}
	t.charge = minCharge
	if t.cmd == cmdWrite || t.cmd == cmdRead && t.refused == 0 {
		t.charge = max(t.charge, int(t.length))
	}
	if !c.window.take(c.ctx.Done(), t.charge) {
		return c.ctx.Err()
	}
	if t.cmd != cmdWrite {
		return nil
	}
	if t.refused == 0 {
		t.payload = getBuffer(int(t.length))
	}
	if err := c.receive(t); err != nil {
		t.payload.release()
		return err
	}
	return nil
}

// receive reads a write's payload, or skips it where there is no buffer.
func (c *conn) receive(t *task) error {
	slow := c.r.Buffered() < int(t.length)
	for at := 0; at < int(t.length); {
		n := min(int(t.length)-at, stallPiece)
		if slow {
			if err := c.raw.SetReadDeadline(time.Now().Add(c.s.o.StallTime)); err != nil {
				return err
			}
		}
		var err error
		if t.payload == nil {
			_, err = c.r.Discard(n)
		} else {
			_, err = io.ReadFull(c.r, t.payload.b[at:at+n])
		}
		if err != nil {
			return err
		}
		at += n
	}
	if slow {
		return c.raw.SetReadDeadline(time.Time{})
	}
	return nil
}

// hand gives a task to a worker that is idle, or to a new one. The window bounds their number.
func (c *conn) hand(t task) {
	c.out.running.Add(1)
	select {
	case c.work <- t:
		return
	default:
	}
	if c.workers == Window/minCharge {
		c.work <- t
		return
	}
	c.workers++
	c.wg.Go(func() {
		c.run(t)
		for t := range c.work {
			c.run(t)
		}
	})
}
