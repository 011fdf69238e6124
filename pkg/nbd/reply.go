package nbd

import (
	"bufio"
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// reply is what is sent for one request: its head, and for a read the bytes.
type reply struct {
	head [32]byte
	n    int    // bytes of head
	long []byte // follows the head, where it is not in body
	body *buffer
	// charge is given back to the window once the reply was sent: what waits for a slow client counts, too.
	charge int
}

// replies sends answers. Who has one and finds nobody sending sends it, and whatever others add meanwhile: at low depth
// nobody is woken for it, at high depth many leave in one system call.
type replies struct {
	conn   net.Conn
	window *window
	stall  time.Duration
	// running is how many requests have no answer yet.
	running atomic.Int32
	// fail is told of the first error.
	fail func(error)

	mu      sync.Mutex
	queue   []reply
	sending bool
	err     error

	// The rest is the sender's.
	spare []reply
	heads []byte
	iov   net.Buffers
	size  int           // bytes in iov
	tls   *bufio.Writer // gathers records; nil without TLS
}

func newReplies(conn net.Conn, room *window, stall time.Duration, fail func(error)) *replies {
	w := &replies{conn: conn, window: room, stall: stall, fail: fail}
	if _, ok := conn.(*tls.Conn); ok {
		w.tls = bufio.NewWriterSize(conn, 64<<10)
	}
	return w
}

// send returns once the reply was sent, or is about to be by another goroutine of this connection.
func (w *replies) send(r reply) {
	w.mu.Lock()
	if w.err != nil {
		w.mu.Unlock()
		w.done(&r)
		return
	}
	w.queue = append(w.queue, r)
	if w.sending {
		w.mu.Unlock()
		return
	}
	w.sending = true
	if w.running.Load() > 0 {
		// Let those that are about to have an answer add it: a turn of the scheduler costs less than a system call.
		w.mu.Unlock()
		runtime.Gosched()
		w.mu.Lock()
	}
	for len(w.queue) > 0 {
		batch := w.queue
		w.queue = w.spare[:0]
		failed := w.err != nil
		w.mu.Unlock()
		var err error
		if !failed {
			err = w.write(batch)
		}
		for i := range batch {
			w.done(&batch[i])
		}
		w.spare = batch
		if err != nil {
			w.fail(err)
		}
		w.mu.Lock()
		if err != nil {
			w.err = err
		}
	}
	w.sending = false
	w.mu.Unlock()
}

// done gives back what a reply held.
func (w *replies) done(r *reply) {
	r.body.release()
	w.window.give(r.charge)
	*r = reply{}
}

func (w *replies) write(batch []reply) error {
	// Heads without bytes between them leave as one piece.
	w.heads = w.heads[:0]
	for i := range batch {
		w.heads = append(w.heads, batch[i].head[:batch[i].n]...)
	}
	from, to := 0, 0
	for i := range batch {
		r := &batch[i]
		to += r.n
		if more := r.bytes(); len(more) > 0 {
			if err := errors.Join(w.add(w.heads[from:to]), w.add(more)); err != nil {
				return err
			}
			from = to
		}
	}
	return errors.Join(w.add(w.heads[from:to]), w.flush())
}

// add has bytes sent, now or with the next ones.
func (w *replies) add(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), stallPiece-w.size)
		w.iov = append(w.iov, p[:n])
		p = p[n:]
		if w.size += n; w.size == stallPiece {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush sends what was added.
func (w *replies) flush() error {
	if w.size == 0 {
		return nil
	}
	iov := w.iov
	w.iov, w.size = w.iov[:0], 0
	defer clear(iov)
	if err := w.conn.SetWriteDeadline(time.Now().Add(w.stall)); err != nil {
		return err
	}
	if w.tls == nil {
		left := iov // which is used up
		_, err := left.WriteTo(w.conn)
		return err
	}
	for _, p := range iov {
		if _, err := w.tls.Write(p); err != nil {
			return err
		}
	}
	return w.tls.Flush()
}

// bytes are what follows the head.
func (r *reply) bytes() []byte {
	if r.body != nil {
		return r.body.b
	}
	return r.long
}
