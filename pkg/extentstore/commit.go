package extentstore

import (
	"sync"

	"github.com/ballast-csi/ballast/pkg/layer"
)

// committer joins flushes: those that come while one is under way share the next.
type committer struct {
	mu   sync.Mutex
	open *round // what newcomers join
	// prepare is held while pages are copied and data is synced, store while the database commits. The second is
	// taken before the first is let go, so that commits happen in the order of the copies.
	prepare, store sync.Mutex
}

type round struct {
	layers   []*chain
	journals []*journal
	started  bool
	done     chan struct{}
	err      error
}

// copied is a dirty page as it will be stored.
type copied struct {
	pg *page
	l  *chain
}

// batch is what one round makes durable.
type batch struct {
	units  [][]op
	pages  []copied
	missed []missedCopy
	freed  []layer.Slot
}

// flush makes durable all that was written to these layers before it was called: data first, then their dirty pages.
func (p *Pool) flush(layers ...*chain) error { return p.flushAll(layers, nil) }

// flushAll is flush, and makes durable what was noted in journals, in the same commit.
func (p *Pool) flushAll(layers []*chain, journals []*journal) error {
	c := &p.commits
	c.mu.Lock()
	if c.open == nil {
		c.open = &round{done: make(chan struct{})}
	}
	r := c.open
	r.layers, r.journals = append(r.layers, layers...), append(r.journals, journals...)
	c.mu.Unlock()

	c.prepare.Lock()
	if r.started {
		c.prepare.Unlock()
		<-r.done
		return r.err
	}
	r.started = true
	c.mu.Lock()
	c.open = nil
	c.mu.Unlock()

	var b batch
	r.err = p.prepare(r, &b)
	c.store.Lock()
	c.prepare.Unlock()
	if r.err == nil && !p.opts.broken.commitBeforeSync && !p.opts.broken.ackBeforeCommit {
		// The sync may have taken long. The pages are not dirty any more: there is no way back.
		if err := p.waitRoom(p.ctx); err != nil {
			r.err = p.fail(err)
		} else {
			r.err = p.store(b.units)
		}
	}
	if r.err == nil {
		p.committed(&b)
	}
	close(r.done)
	c.store.Unlock()
	if r.err == nil && !p.opts.broken.reuseBeforeCommit {
		p.recycle(b.freed)
	}
	return r.err
}

// prepare copies the dirty pages and syncs the data that they refer to. The copy comes first: what is written during
// the sync is not in it, and belongs to the next round.
func (p *Pool) prepare(r *round, b *batch) error {
	if err := p.failure(); err != nil {
		return err
	}
	if err := p.waitRoom(p.ctx); err != nil {
		return err
	}
	if p.opts.broken.syncBeforeSnapshot {
		if err := p.sync(); err != nil {
			return err
		}
	}
	for _, l := range r.layers {
		p.copyDirty(l, b)
	}
	for _, l := range r.journals {
		if p.opts.broken.missedLeftOut {
			break
		}
		if err := l.copyMissed(b); err != nil {
			return err
		}
	}
	if p.opts.broken.reuseBeforeCommit {
		p.recycle(b.freed)
	}
	if p.opts.broken.commitBeforeSync {
		if err := p.store(b.units); err != nil {
			return err
		}
	}
	if p.opts.broken.syncBeforeSnapshot || len(r.layers) == 0 {
		return nil
	}
	return p.sync()
}

// sync never retries: after a failed fsync the kernel counts what it could not write as clean.
func (p *Pool) sync() error {
	err := p.file.Sync()
	if err != nil && p.opts.broken.retryFailedSync {
		err = p.file.Sync()
	}
	if err != nil {
		return p.fail(err)
	}
	return nil
}

func (p *Pool) copyDirty(l *chain, b *batch) {
	l.dirtyMu.Lock()
	dirty := l.dirty
	l.dirty = nil
	l.dirtyMu.Unlock()
	for _, pg := range dirty {
		st := p.stripe(pg.idx)
		st.Lock()
		unit := p.copyPage(l, pg, b)
		// Looked up under the lock of the page: a merge may begin while others are copied.
		merging := l.merging.Load()
		// A page that entries are being moved out of is stored together with the page that they move into: a slot has one
		// owner at every moment.
		if merging != nil {
			if from := st.pages[pageID{merging.id, pg.idx}]; from != nil && from.dirty {
				unit = append(unit, p.copyPage(merging, from, b)...)
			}
		}
		st.Unlock()
		b.units = append(b.units, unit)
	}
}

func (p *Pool) copyPage(l *chain, pg *page, b *batch) []op {
	pg.dirty = false
	pg.inflight++
	p.dirtyPages.Add(-1)
	b.pages = append(b.pages, copied{pg, l})
	b.freed = append(b.freed, pg.freed...)
	pg.freed = nil
	key := pageKey(keyPage, pg.layer, pg.idx)
	if pg.e.Empty() {
		return []op{{key: key}, {key: pageKey(keySums, pg.layer, pg.idx)}}
	}
	return []op{{key: key, val: pg.e.Append(nil)}}
}

// committed lets the pages go that are stored, and forgets those of which nothing is left.
func (p *Pool) committed(b *batch) {
	for _, c := range b.missed {
		c.committed()
	}
	for _, c := range b.pages {
		st := p.stripe(c.pg.idx)
		st.Lock()
		c.pg.inflight--
		if c.pg.evictable() && c.pg.e.Empty() {
			p.forget(st, c.l, c.pg.idx)
		}
		st.Unlock()
	}
}
