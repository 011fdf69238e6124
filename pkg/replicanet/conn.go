package replicanet

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki"
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
	// hungAfter is how long a link whose handler gives nothing back may keep others from receiving.
	hungAfter = time.Second
	// aloneHungAfter is that of a link that is alone: only others that are being opened wait, and its engine has little patience
	// left.
	aloneHungAfter = 3 * time.Second
	// stuckAfter is how long a frame of a link that was closed may still be on its way out before the connection is given up.
	stuckAfter = 200 * time.Millisecond
)

var (
	// errClosed: this side closed the connection or link.
	errClosed = errors.New("closed")
	errStuck  = errors.New("the peer does not read")
	errHung   = errors.New("too much is under way that does not end")
)

// frame is a queued message.
type frame struct {
	head [headLen]byte
	rest []byte
	data []byte
	link *Link // nil for control frames
}

func (f *frame) len() int { return headLen + len(f.rest) + len(f.data) }

// control is who opens the links of a connection. It is called by the reader; an error ends the connection.
type control interface {
	// asks is called for kindOpen, opened for kindOpened.
	asks(num uint32, rest []byte) error
	opened(num uint32, rest []byte) error
	// closes is called for kindClose, before the link, if there is one, ends.
	closes(num uint32)
}

// conn is one connection with a peer that has proved itself.
type conn struct {
	peer   volume.NodeID
	proved pki.Peer // the same, by its certificate; without TLS it has no Cluster
	sums   bool     // the data has checksums
	out    output
	in     *bufio.Reader
	sink   *sink // what in reads from through TLS; nil without
	// budget bounds held; 0 is no bound.
	budget int

	mu    sync.Mutex
	queue []frame
	// batch is being written by whoever set writing; batch[:sent] is written. spare is memory for the next queue.
	batch, spare []frame
	sent         int
	queued       int // bytes in queue
	writing      bool
	flushing     bool // somebody is about to take the queue
	corked       bool // the reader will flush, when it has handed over what has come
	over         bool // nothing of the connection is used any more
	broken       error
	waiting      int // calls of await
	links        map[uint32]*Link
	held         int // received data that is lent to handlers, in bytes

	cork bool // as the reader has set it
	// balance is messages sent less messages received: how many requests are under way, negative where they are the peer's.
	balance atomic.Int64

	changed *sync.Cond // on mu: held shrank, writing ended, or the connection broke
	handoff chan struct{}
	done    chan struct{} // closed when broken
	wg      sync.WaitGroup
}

// newConn takes over a connection after its handshake; it must be run.
func newConn(t *transport, budget int) *conn {
	c := &conn{
		peer: volume.NodeID(t.peer.Name), proved: t.peer, sums: t.sink == nil, out: t.out, in: t.in, sink: t.sink, budget: budget,
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
	c.writing = true
	return true
}

// flush writes what is queued, as far as the socket takes it at once; the writer goes on with the rest.
func (c *conn) flush() {
	c.mu.Lock()
	if c.writing || c.flushing || c.corked || len(c.queue) == 0 {
		c.mu.Unlock()
		return
	}
	if n := c.balance.Load(); n < -1 || n > 1 {
		// Others are likely to have something to send too: let them, and write it together.
		c.flushing = true
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
		c.flushing = false
	}
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
	c.mu.Lock()
	clear(c.batch[c.sent : c.sent+n])
	c.sent += n
	if c.waiting > 0 {
		c.changed.Broadcast()
	}
	c.mu.Unlock()
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
	links := c.links
	c.links = nil
	for _, l := range links {
		c.end(l)
	}
	c.queue, c.batch, c.over = nil, nil, true
	c.changed.Broadcast()
	c.mu.Unlock()
	for _, l := range links {
		l.close(err)
	}
	return err
}

// read takes frames until there are no more.
func (c *conn) read(k control) error {
	var (
		h    [headLen]byte
		rest []byte
		m    replication.Message
		last *Link
	)
	for {
		if !c.ready(headLen) {
			c.setCork(false)
		}
		if _, err := io.ReadFull(c.in, h[:]); err != nil {
			return err
		}
		hd, err := getHead(&h)
		if err != nil {
			return err
		}
		if cap(rest) < hd.rest || cap(rest) > readAhead {
			rest = make([]byte, hd.rest) // long ones are rare and not kept
		}
		rest = rest[:hd.rest]
		if !c.ready(hd.rest) {
			c.setCork(false)
		}
		if _, err := io.ReadFull(c.in, rest); err != nil {
			return err
		}
		if err := getBody(&m, &h, hd, rest); err != nil {
			return err
		}
		switch hd.kind {
		case kindOpen:
			err = k.asks(hd.link, rest)
		case kindOpened:
			err = k.opened(hd.link, rest)
		case kindClose:
			k.closes(hd.link)
			if l := c.link(hd.link); l != nil && c.drop(l) {
				l.close(fmt.Errorf("node %s closed the link: %w", c.peer, io.EOF))
			}
		default:
			c.balance.Add(-1)
			c.setCork(c.ready(hd.data + headLen))
			if last == nil || last.num != hd.link {
				last = c.link(hd.link)
			}
			if hd.data > 0 {
				err = c.receive(&m, hd, last)
			}
			if err == nil && last != nil && !last.receive(&m) {
				last = nil
			}
		}
		if err != nil {
			return err
		}
	}
}

// ready tells whether n bytes can be read without waiting.
func (c *conn) ready(n int) bool {
	n -= c.in.Buffered()
	return n <= 0 || c.sink != nil && c.sink.ready() >= n
}

// setCork says whether what is sent is to wait until the reader has handed over what has come: answers to it go out
// together.
func (c *conn) setCork(on bool) {
	if c.cork == on {
		return
	}
	c.cork = on
	c.mu.Lock()
	c.corked = on
	c.mu.Unlock()
	if !on {
		c.flush()
	}
}

// receive reads a message's data into memory of its own. That of a request is lent to the link's handler.
func (c *conn) receive(m *replication.Message, hd head, l *Link) error {
	if err := c.hold(hd.data); err != nil {
		return err
	}
	m.Data = getBuffer(hd.data)
	_, err := io.ReadFull(c.in, m.Data)
	if err == nil && (c.sums && checksum(m.Data) != hd.dataSum || !c.sums && hd.dataSum != 0) {
		err = fmt.Errorf("wrong checksum of data: %w", errWire)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && l != nil && !l.ended && !m.Reply {
		if l.lent == nil {
			l.lent = map[request][]byte{}
		}
		r := request{m.Session, m.Seq}
		if l.lent[r] == nil {
			if len(l.lent) == 0 {
				l.moved = time.Now()
			}
			l.lent[r] = m.Data
			l.held += len(m.Data)
			return nil
		}
		err = fmt.Errorf("request %d of session %d comes twice: %w", m.Seq, m.Session, errWire)
	}
	c.unhold(hd.data)
	if err != nil || l == nil || l.ended {
		putBuffer(m.Data)
		m.Data = nil
	}
	return err
}

// hold waits until n more bytes may be received. Links whose handlers hang are ended then: their engines begin anew, and send
// nothing before what they had sent has ended.
func (c *conn) hold(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.budget > 0 && c.held > 0 && c.held+n > c.budget && c.broken == nil {
		if c.cork {
			c.mu.Unlock()
			c.setCork(false)
			c.mu.Lock()
			continue
		}
		l, wait := c.hung()
		if l != nil {
			c.mu.Unlock()
			if c.drop(l) {
				l.close(errHung)
				c.post(kindClose, l.num, nil)
				c.flush()
			}
			c.mu.Lock()
			continue
		}
		timer := time.AfterFunc(wait, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changed.Broadcast()
		})
		c.changed.Wait()
		timer.Stop()
	}
	if c.broken != nil {
		return c.broken
	}
	c.held += n
	return nil
}

// hung returns the link that holds most of those that have given nothing back for too long, or in how long to look again; mu is
// held.
func (c *conn) hung() (most *Link, wait time.Duration) {
	now := time.Now()
	patience := hungAfter
	if len(c.links) == 1 {
		patience = aloneHungAfter
	}
	wait = hungAfter
	for _, l := range c.links {
		if l.held == 0 {
			continue
		}
		if left := patience - now.Sub(l.moved); left > 0 {
			wait = min(wait, left)
		} else if most == nil || l.held > most.held {
			most = l
		}
	}
	return most, wait
}

// unhold is the reverse of hold; mu is held.
func (c *conn) unhold(n int) {
	full := c.budget > 0 && c.held+replication.MaxData > c.budget
	c.held -= n
	if full {
		c.changed.Broadcast()
	}
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

// drop forgets a link and what is queued for it. It tells whether it was there.
func (c *conn) drop(l *Link) bool {
	c.mu.Lock()
	if c.links[l.num] != l {
		c.mu.Unlock()
		return false
	}
	delete(c.links, l.num)
	c.end(l)
	kept := c.queue[:0]
	for i := range c.queue {
		f := &c.queue[i]
		if f.link != l {
			kept = append(kept, *f)
			continue
		}
		c.queued -= f.len()
	}
	clear(c.queue[len(kept):])
	c.queue = kept
	c.mu.Unlock()
	if l.over != nil {
		l.over()
	}
	return true
}

// end marks a link as ended; mu is held.
func (c *conn) end(l *Link) {
	l.ended = true
	l.gone.Store(true)
	for _, data := range l.lent {
		c.unhold(len(data)) // its memory is not used again: the handler may still be at it
	}
	l.lent, l.held = nil, 0
}

// await waits until nothing of a dropped link is being written. If that takes long, the connection is given up: what is half
// written cannot be taken back.
func (c *conn) await(l *Link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.busyWith(l) {
		return
	}
	timer := time.AfterFunc(stuckAfter, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.busyWith(l) {
			c.breaks(errStuck)
		}
	})
	defer timer.Stop()
	c.waiting++
	for c.busyWith(l) {
		c.changed.Wait()
	}
	c.waiting--
}

// busyWith tells whether a frame of l is being written, or is being dropped with its connection; mu is held.
func (c *conn) busyWith(l *Link) bool {
	return c.broken != nil && !c.over || c.batch != nil &&
		slices.ContainsFunc(c.batch[min(c.sent, len(c.batch)):], func(f frame) bool { return f.link == l })
}
