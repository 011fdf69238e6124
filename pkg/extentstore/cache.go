package extentstore

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/layer"
)

// presence is the set of pages that a layer has, so that a lookup asks the database only for what is there. Bits change
// under the lock of the page's stripe.
type presence struct {
	top [256]atomic.Pointer[[512]atomic.Uint64]
}

func (s *presence) has(idx uint32) bool {
	m := s.top[idx>>15].Load()
	return m != nil && m[idx>>6&511].Load()&(1<<(idx&63)) != 0
}

func (s *presence) add(idx uint32) {
	m := s.top[idx>>15].Load()
	if m == nil {
		m = new([512]atomic.Uint64)
		if !s.top[idx>>15].CompareAndSwap(nil, m) {
			m = s.top[idx>>15].Load()
		}
	}
	m[idx>>6&511].Or(1 << (idx & 63))
}

func (s *presence) remove(idx uint32) {
	if m := s.top[idx>>15].Load(); m != nil {
		m[idx>>6&511].And(^uint64(1 << (idx & 63)))
	}
}

// maxPages is the number of pages of the largest volume.
const maxPages = 256 << 15

// next is the first page of the set from idx on; ok is false at the end.
func (s *presence) next(idx uint32) (_ uint32, ok bool) {
	for idx < maxPages {
		m := s.top[idx>>15].Load()
		if m == nil {
			idx = (idx>>15 + 1) << 15
			continue
		}
		w := m[idx>>6&511].Load() >> (idx & 63)
		if w != 0 {
			return idx + uint32(bits.TrailingZeros64(w)), true
		}
		idx = (idx>>6 + 1) << 6
	}
	return 0, false
}

// nextInChain is the first page that any layer from head down to, not including, end has.
func (p *Pool) nextInChain(head, end *chain, idx uint32) (_ uint32, ok bool) {
	for {
		var first uint32
		ok = false
		gone := p.gone.Load()
		for l := head; l != nil && l != end; l = l.parent.Load() {
			if i, has := l.pages.next(idx); has && (!ok || i < first) {
				first, ok = i, true
			}
		}
		// A page that a merge moved up from a layer not yet looked at into one looked at already would be missed.
		if p.gone.Load() == gone {
			return first, ok
		}
	}
}

// forget drops a page of which nothing is left, or that is in another layer now. The stripe is locked for writing.
func (p *Pool) forget(st *stripe, l *chain, idx uint32) {
	delete(st.pages, pageID{l.id, idx})
	p.gone.Add(1)
	l.pages.remove(idx)
}

type pageID struct {
	layer uint64
	idx   uint32
}

// page is a map page in memory. All fields are guarded by its stripe, but ref.
type page struct {
	pageID
	e layer.Page
	// dirty: changed since it was last copied for a commit. inflight counts commits under way.
	dirty    bool
	inflight int
	// pins counts writes and merges that will change the page: it stays in memory, with the slots reserved in it.
	pins int
	// freed slots are owned by what is stored until the next commit of this page.
	freed []layer.Slot
	ref   atomic.Bool
}

func (pg *page) evictable() bool { return !pg.dirty && pg.inflight == 0 && pg.pins == 0 }

// stripes spread the pages over locks. All layers' pages of one index share a stripe, so that a lookup through a chain
// and a merge of one layer into another exclude each other.
const stripeCount = 256

type stripe struct {
	sync.RWMutex
	pages map[pageID]*page
}

func (p *Pool) stripe(idx uint32) *stripe { return &p.stripes[idx*2654435761>>24] }

// load returns the page of a layer, nil where it has none. The stripe is locked for writing.
func (p *Pool) load(st *stripe, l *chain, idx uint32) (*page, error) {
	id := pageID{l.id, idx}
	if pg := st.pages[id]; pg != nil {
		pg.ref.Store(true)
		return pg, nil
	}
	if !l.pages.has(idx) {
		return nil, nil
	}
	b, err := p.kv.Get(pageKey(keyPage, l.id, idx))
	if err != nil {
		return nil, err
	}
	pg := &page{pageID: id}
	if err := pg.e.Decode(b); err != nil {
		return nil, fmt.Errorf("page %d of layer %d: %w", idx, l.id, err)
	}
	p.insert(st, pg)
	return pg, nil
}

// create is load, and makes the page where there is none.
func (p *Pool) create(st *stripe, l *chain, idx uint32) (*page, error) {
	pg, err := p.load(st, l, idx)
	if pg != nil || err != nil {
		return pg, err
	}
	pg = &page{pageID: pageID{l.id, idx}}
	p.insert(st, pg)
	l.pages.add(idx)
	return pg, nil
}

// insert makes room first: pages that were not used since they were last passed by go.
func (p *Pool) insert(st *stripe, pg *page) {
	if len(st.pages) >= p.stripePages {
		for id, old := range st.pages {
			if old.evictable() && !old.ref.Swap(false) {
				delete(st.pages, id)
				if len(st.pages) < p.stripePages {
					break
				}
			}
		}
	}
	pg.ref.Store(true)
	st.pages[pg.pageID] = pg
}

// lockChain locks the stripe of a page and returns the pages that the layers from head down to, not including, end have
// of it, head first. The caller unlocks with unlock(exclusive).
func (p *Pool) lockChain(head, end *chain, idx uint32, buf []*page) (st *stripe, pages []*page, exclusive bool, err error) {
	st = p.stripe(idx)
	st.RLock()
	pages, complete := buf[:0], true
	for l := head; l != nil && l != end && complete; l = l.parent.Load() {
		if !l.pages.has(idx) {
			continue
		}
		pg := st.pages[pageID{l.id, idx}]
		if complete = pg != nil; complete {
			if !pg.ref.Load() {
				pg.ref.Store(true)
			}
			pages = append(pages, pg)
		}
	}
	if complete {
		return st, pages, false, nil
	}
	st.RUnlock()
	st.Lock()
	pages = pages[:0]
	for l := head; l != nil && l != end; l = l.parent.Load() {
		pg, err := p.load(st, l, idx)
		if err != nil {
			st.Unlock()
			return nil, nil, false, err
		}
		if pg != nil {
			pages = append(pages, pg)
		}
	}
	return st, pages, true, nil
}

func (st *stripe) unlock(exclusive bool) {
	if exclusive {
		st.Unlock()
	} else {
		st.RUnlock()
	}
}

// markDirty puts the page on its layer's list for the next commit. The stripe is locked for writing.
func (p *Pool) markDirty(l *chain, pg *page) {
	if pg.dirty {
		return
	}
	pg.dirty = true
	p.dirtyPages.Add(1)
	l.dirtyMu.Lock()
	l.dirty = append(l.dirty, pg)
	l.dirtyMu.Unlock()
}
