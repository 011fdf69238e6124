package replicanet

import (
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Handler gets what arrives on a link. Its methods are called by the goroutine that reads the connection, one at a time
// for one link: while one of them runs, nothing else arrives, from any link of the connection. They must not wait for a
// message.
type Handler interface {
	// Receive takes a message. It is valid during the call, less its Data and what its pointers refer to: those are the
	// handler's, who gives Data back by Link.Free when it is not needed any more; if that never happens, a server stops
	// reading. The message's Conn is the link's ID.
	Receive(l *Link, m *replication.Message)
	// EndBatch follows the last Receive of those that arrived together: the time to flush what they gave rise to.
	EndBatch(l *Link)
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

	ended bool        // guarded by c.mu: nothing is queued any more
	gone  atomic.Bool // nothing is received any more
	dirty bool        // the reader's
}

var lastLink atomic.Uint64

func newLink(c *conn, num uint32, v volume.ID, r volume.ReplicaID, h Handler) *Link {
	return &Link{id: lastLink.Add(1), num: num, volume: v, replica: r, c: c, h: h}
}

// ID is unique among the links of this process.
func (l *Link) ID() uint64 { return l.id }

// Node is the node at the other end.
func (l *Link) Node() volume.NodeID { return l.c.peer }

// Send queues a message; Flush sends it. The link's own Volume and Replica are sent. Nothing of m is kept but Data, which
// must not be changed until owner is told; a nil owner never changes it. On a link that has ended the message goes
// nowhere, and owner is told at once.
func (l *Link) Send(m *replication.Message, owner Owner) {
	rest := appendRest(nil, m)
	var sum uint32
	if l.c.sums && len(m.Data) > 0 {
		sum = checksum(m.Data)
	}
	l.c.mu.Lock()
	f := l.c.enqueue(l, headLen+len(rest)+len(m.Data))
	if f != nil {
		f.rest, f.data, f.owner = rest, m.Data, owner
		putHead(&f.head, m, l.num, rest, sum)
	}
	l.c.mu.Unlock()
	if f == nil && owner != nil {
		owner.Release()
	}
}

// Flush sends what is queued on the link's connection. It does not wait for the peer.
func (l *Link) Flush() { l.c.flush() }

// Free takes back the Data of a message that was received on the link. It may be called after the link has ended.
func (l *Link) Free(data []byte) { l.c.Free(data) }

// Close ends the link. What is queued is dropped and its owners are told; where a message is half-way out they are told
// soon. A Receive that is under way may still end after Close has returned.
func (l *Link) Close() {
	if l.c.drop(l.num) == l {
		l.c.post(kindClose, l.num, nil)
		l.c.flush()
	}
}
