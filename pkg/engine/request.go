package engine

import (
	"errors"
	"sync"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// errReplicas: no replica that is in sync could serve the request.
var errReplicas = errors.New("no in-sync replica can serve it")

// request is one operation of the device's user.
type request struct {
	tag   uint64
	buf   *buffer // nil: it has no data
	reads bool
	ended chan result
}

// result is how a request ended. Of a read it has the data, or hole where all of it is zeros. With kept its buffer may still
// be used by a replica, and is never to be used again.
type result struct {
	code replication.Result
	hole bool
	kept bool
	data []byte
}

var requestPool = sync.Pool{New: func() any { return &request{ended: make(chan result, 1)} }}

// requests finds those under way by their tags, the low half of which is an index, and the buffers of writes by where they lie.
// That of a read is lent once, and kept from then on where more than an answer may come of that.
type requests struct {
	list    []*request
	free    []uint32
	gen     uint64
	buffers map[*byte]*buffer
	// late are the buffers of writes that were answered while a resync's target still has to get them, by tag.
	late map[uint64]*buffer
}

func (r *requests) init() { r.buffers, r.late = map[*byte]*buffer{}, map[uint64]*buffer{} }

func (r *requests) add(q *request, buf *buffer, reads bool) {
	var i uint32
	if n := len(r.free); n > 0 {
		i, r.free = r.free[n-1], r.free[:n-1]
	} else {
		i = uint32(len(r.list))
		r.list = append(r.list, nil)
	}
	r.gen++
	q.tag, q.buf, q.reads = r.gen<<32|uint64(i), buf, reads
	r.list[i] = q
	if buf != nil && !reads {
		r.buffers[&buf.b[0]] = buf
	}
}

func (r *requests) get(tag uint64) *request {
	i := tag & (1<<32 - 1)
	if i < uint64(len(r.list)) && r.list[i] != nil && r.list[i].tag == tag {
		return r.list[i]
	}
	return nil
}

// buffer of a message to be sent; nil where its data is not a write's.
func (r *requests) buffer(m *replication.Message) *buffer {
	if len(m.Data) == 0 || m.Kind == replication.KindRead {
		return nil
	}
	return r.buffers[&m.Data[0]]
}

// remove forgets a request, and its buffer unless that is to be sent again.
func (r *requests) remove(q *request, late bool) {
	i := uint32(q.tag)
	r.list[i] = nil
	r.free = append(r.free, i)
	switch {
	case q.buf == nil || q.reads:
	case late:
		q.buf.retain()
		r.late[q.tag] = q.buf
	default:
		delete(r.buffers, &q.buf.b[0])
	}
}

// released says that the buffer of an answered write will not be sent any more.
func (r *requests) released(tag uint64) {
	if b := r.late[tag]; b != nil {
		delete(r.late, tag)
		delete(r.buffers, &b.b[0])
		b.release()
	}
}

func (r *requests) all() []*request {
	var all []*request
	for _, q := range r.list {
		if q != nil {
			all = append(all, q)
		}
	}
	return all
}

// end gives a request its result; the mutex is held.
func (e *Engine) end(q *request, f *replication.Effect) {
	late := f.Busy && f.Result == replication.ResultOK && !q.reads
	e.requests.remove(q, late)
	q.ended <- result{f.Result, f.Hole, f.Busy && !late, f.Data}
}
