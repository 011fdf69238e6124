package replicanet

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// readAhead is the size of a connection's read buffer, in bytes: what one system call may bring of small messages.
	readAhead = 64 << 10
	// maxQueued bounds what waits to be sent on one connection. The machines bound what is under way long before: a peer
	// that has so much to read does not read.
	maxQueuedBytes  = 1 << 30
	maxQueuedFrames = 1 << 18
	// stuckAfter is how long a frame of a link that was closed may still be on its way out before the connection is given up.
	stuckAfter = 200 * time.Millisecond
)

var (
	// errClosed: this side closed the connection or link.
	errClosed = errors.New("closed")
	errStuck  = errors.New("the peer does not read")
)

// Owner is told when Data that was given to Send is not needed any more.
type Owner interface {
	// Release is called once for each Send, by any goroutine, with locks of this package not held. It must be quick.
	Release()
}

// frame is a queued message.
type frame struct {
	head  [headLen]byte
	rest  []byte
	data  []byte
	owner Owner
	link  *Link // nil for control frames
}

func (f *frame) len() int { return headLen + len(f.rest) + len(f.data) }

// control is who opens the links of a connection. It is called by the reader; an error ends the connection.
type control interface {
	open(num uint32, rest []byte) error
	opened(num uint32, rest []byte) error
	// close is told before the link, if there is one, ends.
	close(num uint32)
}

// conn is one connection with a peer that has proved itself.
type conn struct {
	peer volume.NodeID
	sums bool // the data has checksums
	out  output
	in   *bufio.Reader
	sink *sink // what in reads from through TLS; nil without
	// budget bounds the data that was received and not freed, in bytes; 0 is no bound.
	budget int64

	mu    sync.Mutex
	queue []frame
	// batch is being written by whoever set writing; batch[:sent] is written. spare is memory for the next queue.
	batch, spare []frame
	sent         int
	batches      uint64
	queued       int // bytes in queue
	writing      bool
	broken       error
	links        map[uint32]*Link
	held         int64 // received data that was not freed

	changed *sync.Cond // on mu: held shrank, writing ended, or the connection broke
	handoff chan struct{}
	done    chan struct{} // closed when broken
	wg      sync.WaitGroup
}

// newConn takes over a connection after its handshake; it must be run.
func newConn(t *transport, budget int64) *conn {
	c := &conn{
		peer: t.peer, sums: t.sink == nil, out: t.out, in: t.in, sink: t.sink, budget: budget,
		links: map[uint32]*Link{}, handoff: make(chan struct{}, 1), done: make(chan struct{}),
	}
	c.changed = sync.NewCond(&c.mu)
	c.wg.Go(c.writer)
	return c
}

// abort ends the connection; its reader then ends its links.
func (c *conn) abort(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.breaks(err)
}

// breaks is abort; mu is held.
func (c *conn) breaks(err error) {
	if c.broken == nil {
		c.broken = err
		close(c.done)
		c.changed.Broadcast()
		c.out.close()
	}
}

// cause is why the connection broke.
func (c *conn) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// enqueue returns the place of a new frame in the queue, to be filled in while mu is held; nil where it would never be sent.
func (c *conn) enqueue(l *Link, size int) *frame {
	if c.broken != nil || l != nil && l.ended {
		return nil
	}
	if c.queued > maxQueuedBytes || len(c.queue) >= maxQueuedFrames {
		c.breaks(errStuck)
		return nil
	}
	c.queue = append(c.queue, frame{link: l})
	c.queued += size
	return &c.queue[len(c.queue)-1]
}

// post queues a control frame.
func (c *conn) post(kind byte, link uint32, rest []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.enqueue(nil, headLen+len(rest)); f != nil {
		f.rest = rest
		putControl(&f.head, kind, link, rest)
	}
}

// take makes what is queued the batch to write. It tells whether there is any; mu is held.
func (c *conn) take() bool {
	if len(c.queue) == 0 || c.broken != nil {
		return false
	}
	c.batch, c.queue, c.spare = c.queue, c.spare[:0], nil
	c.sent, c.queued = 0, 0
	c.batches++
	c.writing = true
	return true
}

// flush writes what is queued, as far as the socket takes it at once; the writer goes on with the rest.
func (c *conn) flush() {
	c.mu.Lock()
	if c.writing || !c.take() {
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	if c.write(false) && c.finish(false) {
		return
	}
	c.mu.Lock()
	if c.broken != nil {
		c.writing = false
		c.changed.Broadcast()
	} else {
		c.handoff <- struct{}{} // has room: only who set writing puts something in
	}
	c.mu.Unlock()
}

// writer goes on where flush stopped.
func (c *conn) writer() {
	for {
		select {
		case <-c.done:
		case <-c.handoff:
			for c.write(true) && !c.finish(true) {
			}
			c.mu.Lock()
			broken := c.broken != nil
			c.mu.Unlock()
			if !broken {
				continue
			}
			c.stopWriting()
			return
		}
		select {
		case <-c.handoff:
			c.stopWriting()
		default:
		}
		return
	}
}

func (c *conn) stopWriting() {
	c.mu.Lock()
	c.writing = false
	c.changed.Broadcast()
	c.mu.Unlock()
}

// finish ends a batch and tells whether writing is over. If not, and next is set, the next batch is taken.
func (c *conn) finish(next bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spare, c.batch, c.sent = c.batch[:0], nil, 0
	if c.broken != nil || len(c.queue) == 0 {
		c.writing = false
		c.changed.Broadcast()
		return true
	}
	if next {
		c.take()
	}
	return false
}

// write writes the batch; it tells whether all of it is written. Where it may not block it stops when the socket is full.
func (c *conn) write(block bool) bool {
	for c.sent < len(c.batch) || c.out.pending() {
		n, err := c.out.write(c.batch[c.sent:], block)
		if err != nil {
			c.abort(fmt.Errorf("to node %s: %w", c.peer, err))
			return false
		}
		c.release(n)
		if !block {
			return c.sent == len(c.batch) && !c.out.pending()
		}
	}
	return true
}

// release lets go of the next n frames of the batch.
func (c *conn) release(n int) {
	done := c.batch[c.sent : c.sent+n]
	c.mu.Lock()
	c.sent += n
	c.mu.Unlock()
	for i := range done {
		if o := done[i].owner; o != nil {
			o.Release()
		}
		done[i] = frame{}
	}
}

// run reads until the connection breaks, and then ends every link. It returns why.
func (c *conn) run(k control) error {
	err := c.read(k)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("node %s closed the connection: %w", c.peer, err)
	}
	c.abort(err)
	c.wg.Wait()
	err = c.cause()

	c.mu.Lock()
	for c.writing {
		c.changed.Wait()
	}
	left := append(c.batch[min(c.sent, len(c.batch)):], c.queue...)
	c.batch, c.queue = nil, nil
	links := c.links
	c.links = nil
	for _, l := range links {
		l.ended = true
	}
	c.mu.Unlock()
	for i := range left {
		if o := left[i].owner; o != nil {
			o.Release()
		}
	}
	for _, l := range links {
		l.h.Closed(l, err)
	}
	return err
}

// read takes frames until there are no more.
func (c *conn) read(k control) error {
	var (
		h     [headLen]byte
		rest  []byte
		m     replication.Message
		dirty []*Link // got messages since the last EndBatch
		last  *Link
	)
	endBatch := func() {
		for _, l := range dirty {
			l.dirty = false
			l.h.EndBatch(l)
		}
		dirty = dirty[:0]
	}
	for {
		if len(dirty) > 0 && !c.ready(headLen) {
			endBatch()
		}
		if _, err := io.ReadFull(c.in, h[:]); err != nil {
			return err
		}
		hd, err := getHead(&h)
		if err != nil {
			return err
		}
		if cap(rest) < hd.rest {
			rest = make([]byte, hd.rest)
		}
		rest = rest[:hd.rest]
		if _, err := io.ReadFull(c.in, rest); err != nil {
			return err
		}
		if err := getBody(&m, &h, hd, rest); err != nil {
			return err
		}
		switch hd.kind {
		case kindOpen:
			if err := k.open(hd.link, rest); err != nil {
				return err
			}
			continue
		case kindOpened:
			if err := k.opened(hd.link, rest); err != nil {
				return err
			}
			continue
		case kindClose:
			k.close(hd.link)
			if l := c.drop(hd.link); l != nil {
				endBatch()
				last = nil
				l.h.Closed(l, fmt.Errorf("node %s closed the link: %w", c.peer, io.EOF))
			}
			continue
		}
		if cap(rest) > readAhead {
			rest = nil // rare
		}
		if last == nil || last.num != hd.link {
			last = c.link(hd.link)
		}
		if hd.data > 0 {
			if len(dirty) > 0 && !c.ready(hd.data) {
				endBatch() // what is there should not wait for what is still to come
			}
			if err := c.receive(&m, hd, last); err != nil {
				return err
			}
		}
		if last == nil || last.gone.Load() {
			c.Free(m.Data)
			last = nil
			continue // it was on its way when this side closed the link
		}
		m.Volume, m.Replica, m.Conn = last.volume, last.replica, last.id
		if !last.dirty {
			last.dirty = true
			dirty = append(dirty, last)
		}
		last.h.Receive(last, &m)
	}
}

// ready tells whether n bytes can be read without waiting.
func (c *conn) ready(n int) bool {
	n -= c.in.Buffered()
	return n <= 0 || c.sink != nil && c.sink.ready() >= n
}

// receive reads a message's data into memory of its own.
func (c *conn) receive(m *replication.Message, hd head, l *Link) error {
	if err := c.hold(int64(hd.data)); err != nil {
		return err
	}
	m.Data = getBuffer(hd.data)
	if _, err := io.ReadFull(c.in, m.Data); err != nil {
		c.Free(m.Data)
		return err
	}
	if c.sums && checksum(m.Data) != hd.dataSum || !c.sums && hd.dataSum != 0 {
		c.Free(m.Data)
		return fmt.Errorf("wrong checksum of data: %w", errWire)
	}
	return nil
}

// hold waits until n more bytes may be received.
func (c *conn) hold(n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.budget > 0 && c.held > 0 && c.held+n > c.budget && c.broken == nil {
		c.changed.Wait()
	}
	if c.broken != nil {
		return c.broken
	}
	c.held += n
	return nil
}

// Free takes received data back.
func (c *conn) Free(data []byte) {
	if len(data) == 0 {
		return
	}
	c.mu.Lock()
	c.held -= int64(len(data))
	c.changed.Broadcast()
	c.mu.Unlock()
	putBuffer(data)
}

func (c *conn) link(num uint32) *Link {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.links[num]
}

// count is the number of links.
func (c *conn) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.links)
}

// add makes a link known; false where the connection is broken or has that number already.
func (c *conn) add(l *Link) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil || c.links == nil || c.links[l.num] != nil {
		return false
	}
	c.links[l.num] = l
	return true
}

// drop forgets a link and what is queued for it.
func (c *conn) drop(num uint32) *Link {
	c.mu.Lock()
	l := c.links[num]
	if l == nil {
		c.mu.Unlock()
		return nil
	}
	delete(c.links, num)
	l.ended = true
	l.gone.Store(true)
	var owners []Owner
	kept := c.queue[:0]
	for i := range c.queue {
		f := &c.queue[i]
		if f.link != l {
			kept = append(kept, *f)
			continue
		}
		c.queued -= f.len()
		if f.owner != nil {
			owners = append(owners, f.owner)
		}
	}
	clear(c.queue[len(kept):])
	c.queue = kept
	stuck, batch := c.busyWith(l), c.batches
	c.mu.Unlock()
	for _, o := range owners {
		o.Release()
	}
	if stuck {
		time.AfterFunc(stuckAfter, func() { c.unstick(l, batch) })
	}
	return l
}

// unstick gives the connection up where a frame of a closed link is still being written: its data is wanted back.
func (c *conn) unstick(l *Link, batch uint64) {
	c.mu.Lock()
	stuck := c.batches == batch && c.broken == nil && c.busyWith(l)
	c.mu.Unlock()
	if stuck {
		c.abort(errStuck)
	}
}

// busyWith tells whether a frame of l is being written; mu is held.
func (c *conn) busyWith(l *Link) bool {
	return slices.ContainsFunc(c.batch[min(c.sent, len(c.batch)):], func(f frame) bool { return f.link == l })
}
