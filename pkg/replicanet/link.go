package replicanet

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Handler gets what arrives on a link. Its methods are called one at a time, by the goroutine that reads the connection:
// while one of them runs nothing else arrives, on any link of the connection.
type Handler interface {
	// Receive takes a message, which is valid during the call, less its Data and what its pointers refer to. The message's
	// Conn is the link's ID.
	//
	// The Data of a request is the handler's until it sends the answer (the message of the same Session and Seq), or the
	// link ends and it has no more use for it: every request with Data must be answered, or a server stops reading once
	// too much of it is out. The Data of an answer is the handler's for good.
	Receive(l *Link, m *replication.Message)
	// Closed is the last call of a link that ended otherwise than by its Close.
	Closed(l *Link, err error)
}

// Link is a way to one replica of one volume, or from it to its engine, until the connection breaks or one side closes it.
// It is safe for concurrent use.
type Link struct {
	id      uint64
	num     uint32
	volume  volume.ID
	replica volume.ReplicaID
	c       *conn
	h       Handler
	// over is called when a link of a client has ended; it may be nil.
	over func()

	calling sync.Mutex  // held by calls of h
	closed  bool        // guarded by calling: Close was called
	gone    atomic.Bool // nothing is received any more

	// Guarded by c.mu.
	ended bool // nothing is sent any more
	lent  map[request][]byte
	held  int       // bytes in lent
	moved time.Time // when something was given back last, or lent was empty
}

// request names a request among those of a link.
type request struct {
	session replication.Session
	seq     uint64
}

var lastLink atomic.Uint64

func newLink(c *conn, num uint32, v volume.ID, r volume.ReplicaID, h Handler) *Link {
	return &Link{id: lastLink.Add(1), num: num, volume: v, replica: r, c: c, h: h}
}

// ID is unique among the links of this process.
func (l *Link) ID() uint64 { return l.id }

// Node is the node at the other end.
func (l *Link) Node() volume.NodeID { return l.c.peer }

// Send queues a message; Flush sends it. The link's own Volume and Replica are sent. Nothing of m is kept but Data: that
// of a request must not be changed until it is answered or Close has returned, that of an answer never. On a link that
// has ended the message goes nowhere.
func (l *Link) Send(m *replication.Message) {
	rest := appendRest(nil, m)
	data := m.Data
	if m.Kind == replication.KindRead && !m.Reply {
		data = nil // where a replica in the same process would read to
	}
	var sum uint32
	if l.c.sums && len(data) > 0 {
		sum = checksum(data)
	}
	l.c.mu.Lock()
	if m.Reply {
		l.answered(request{m.Session, m.Seq})
	}
	if f := l.c.enqueue(l, headLen+len(rest)+len(data)); f != nil {
		f.rest, f.data = rest, data
		putHead(&f.head, m, l.num, rest, data, sum)
		l.c.balance.Add(1)
	}
	l.c.mu.Unlock()
}

// Flush sends what is queued on the link's connection, together with what others queue at the same time. It does not wait
// for the peer. A handler's flush is over when what has come with its message is handed over too.
func (l *Link) Flush() { l.c.flush() }

// answered takes a request's data back; c.mu is held.
func (l *Link) answered(r request) {
	if data := l.lent[r]; data != nil {
		delete(l.lent, r)
		l.held -= len(data)
		l.moved = time.Now()
		l.c.unhold(len(data))
		putBuffer(data)
	}
}

// Close ends the link. When it returns the handler is not called any more, and no Data of what was sent is read any more.
// It must not be called by a handler, nor with a lock held that a handler waits for.
func (l *Link) Close() {
	if l.c.drop(l) {
		l.c.post(kindClose, l.num, nil)
		l.c.flush()
	}
	l.c.await(l)
	l.calling.Lock() // a call may be under way
	defer l.calling.Unlock()
	l.closed = true
}

// receive gives the handler a message; false where the link has ended.
func (l *Link) receive(m *replication.Message) bool {
	l.calling.Lock()
	defer l.calling.Unlock()
	if l.gone.Load() {
		return false
	}
	m.Volume, m.Replica, m.Conn = l.volume, l.replica, l.id
	l.h.Receive(l, m)
	return true
}

// close tells the handler that the link, which was dropped, ended otherwise than by Close.
func (l *Link) close(err error) {
	l.calling.Lock()
	defer l.calling.Unlock()
	if !l.closed {
		l.h.Closed(l, err)
	}
}
