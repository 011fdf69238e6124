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
	p.drop(st, pageID{l.id, idx})
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

// insert makes room where there are too many pages.
func (p *Pool) insert(st *stripe, pg *page) {
	pg.ref.Store(true)
	st.pages[pg.pageID] = pg
	p.cached.Add(1)
	// The stripes take turns: one that a deep chain fills may be larger than others. One that is in use is passed by.
	for tries := 0; p.cached.Load() > p.cachePages && tries < 8; tries++ {
		victim := &p.stripes[p.victim.Add(1)%stripeCount]
		if victim == st {
			p.evict(st)
		} else if victim.TryLock() {
			p.evict(victim)
			victim.Unlock()
		}
	}
}

// evict lets pages go that were not used since they were last passed by, until there are few enough. The stripe is
// locked for writing.
func (p *Pool) evict(st *stripe) {
	for _, pg := range st.pages {
		if pg.evictable() && !pg.ref.Swap(false) {
			p.drop(st, pg.pageID)
			if p.cached.Load() <= p.cachePages {
				return
			}
		}
	}
}

func (p *Pool) drop(st *stripe, id pageID) {
	if _, ok := st.pages[id]; ok {
		delete(st.pages, id)
		p.cached.Add(-1)
	}
}

// need are the blocks of a page that a lookup has not found yet, per extent.
type need struct {
	want        [layer.ExtentsPerPage]layer.Mask
	first, last int
}

// set begins the lookup of a range that lies in one page.
func (n *need) set(off, length int64) {
	_, n.first = place(off)
	_, n.last = place(off + length - 1)
	for i := n.first; i <= n.last; i++ {
		n.want[i] = layer.AllBlocks
	}
	n.want[n.first] &= blocksOf(off, min(length, layer.ExtentSize-off%layer.ExtentSize))
	end := off + length
	n.want[n.last] &= blocksOf(max(off, extentDown(end-1)), end-max(off, extentDown(end-1)))
}

// met takes what a page has, and tells whether nothing is left to be found further down.
func (n *need) met(pg *page) bool {
	var left layer.Mask
	for i := n.first; i <= n.last; i++ {
		n.want[i] &^= pg.e[i].Covers()
		left |= n.want[i]
	}
	return left == 0
}

// lockChain locks the stripe of a page and returns the pages that the layers from head down to, not including, end have
// of it, head first. With a length it leaves out those that the blocks of [off, off+length) do not need. The caller
// unlocks with unlock(exclusive).
func (p *Pool) lockChain(head, end *chain, off, length int64, buf []*page) (st *stripe, pages []*page, exclusive bool, err error) {
	idx, _ := place(off)
	var n need
	if length > 0 {
		n.set(off, length)
	}
	met := func(pg *page) bool { return length > 0 && n.met(pg) }
	st = p.stripe(idx)
	st.RLock()
	pages, complete := buf[:0], true
	for l := head; l != nil && l != end; l = l.parent.Load() {
		if !l.pages.has(idx) {
			continue
		}
		pg := st.pages[pageID{l.id, idx}]
		if pg == nil {
			complete = false
			break
		}
		if !pg.ref.Load() {
			pg.ref.Store(true)
		}
		if pages = append(pages, pg); met(pg) {
			break
		}
	}
	if complete {
		return st, pages, false, nil
	}
	st.RUnlock()
	st.Lock()
	if pages = pages[:0]; length > 0 {
		n.set(off, length)
	}
	for l := head; l != nil && l != end; l = l.parent.Load() {
		pg, err := p.load(st, l, idx)
		if err != nil {
			st.Unlock()
			return nil, nil, false, err
		}
		if pg == nil {
			continue
		}
		if pages = append(pages, pg); met(pg) {
			break
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
