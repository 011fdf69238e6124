package extentstore

import "sync"

// ranges is a lock on ranges of bytes, shared or exclusive, granted in the order of the asking where they overlap.
type ranges struct {
	mu   sync.Mutex
	list []*held // granted and waiting, in order of arrival
}

type held struct {
	from, to  int64
	shared    bool
	waiting   bool
	conflicts int // earlier ones that overlap
	granted   chan struct{}
}

var heldPool = sync.Pool{New: func() any { return &held{granted: make(chan struct{}, 1)} }}

func (h *held) conflictsWith(o *held) bool {
	return h.from < o.to && o.from < h.to && !(h.shared && o.shared)
}

// lock waits until [from, to) is the caller's. Holders do bounded work, so the wait ends.
func (r *ranges) lock(from, to int64, shared bool) *held {
	h := heldPool.Get().(*held)
	h.from, h.to, h.shared, h.conflicts = from, to, shared, 0
	r.mu.Lock()
	for _, o := range r.list {
		if h.conflictsWith(o) {
			h.conflicts++
		}
	}
	h.waiting = h.conflicts > 0
	r.list = append(r.list, h)
	wait := h.waiting
	r.mu.Unlock()
	if wait {
		<-h.granted
	}
	return h
}

func (r *ranges) unlock(h *held) {
	r.mu.Lock()
	at := 0
	for r.list[at] != h {
		at++
	}
	copy(r.list[at:], r.list[at+1:])
	r.list[len(r.list)-1] = nil
	r.list = r.list[:len(r.list)-1]
	for _, o := range r.list[at:] {
		if o.waiting && o.conflictsWith(h) {
			if o.conflicts--; o.conflicts == 0 {
				o.waiting = false
				o.granted <- struct{}{}
			}
		}
	}
	r.mu.Unlock()
	heldPool.Put(h)
}
