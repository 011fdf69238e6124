package extentstore

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// missedExtents is how many extents a page of what a peer missed has: 256 MiB.
	missedExtents = 4096
	missedWords   = missedExtents / 64
	maxMissedPage = uint32(volume.MaxSize/layer.ExtentSize/missedExtents) - 1
	// maxPeers bounds the peers that a replica tracks. The protocol has fewer.
	maxPeers = 16
	// maxMissedDirty is how many pages wait for a commit before one is made; at twice as many, writes wait for it.
	// cleanMissed is how many stay in memory that need not, so that what is missed again costs nothing. A page is about
	// 600 bytes. Both are of a pool.
	maxMissedDirty = 4096
	cleanMissed    = 8192
	// maxRuns bounds one answer.
	maxRuns = 1 << 16
)

// missed is what one absent peer missed. All fields are guarded by the journal's mu; no does not change.
type missed struct {
	no  uint32
	tag replication.MissedTag
	// header: the tag is to be stored, after the pages.
	header bool
	gone   bool // dropped
	pages  map[uint32]*missedPage
	has    presence // pages with any extent, in memory or stored
}

// missedPage is a page in memory.
type missedPage struct {
	m    *missed
	idx  uint32
	bits [missedWords]uint64
	// partial: what is stored is to be added.
	partial, dirty bool
	inflight       int // commits under way
}

// Missed are the absent peers that are tracked, by name.
func (h *Replica) Missed() []replication.MissedTag {
	l := h.log
	l.mu.Lock()
	defer l.mu.Unlock()
	tags := make([]replication.MissedTag, 0, len(l.peers))
	for _, m := range l.peers {
		tags = append(tags, m.tag)
	}
	slices.SortFunc(tags, func(a, b replication.MissedTag) int {
		if a.Peer < b.Peer {
			return -1
		}
		return 1
	})
	return tags
}

// TrackMissed begins tracking a peer with nothing missed, durably. One that is tracked stays as it is.
func (h *Replica) TrackMissed(ctx context.Context, tag replication.MissedTag) error {
	if err := h.begin(ctx); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	l.mu.Lock()
	if l.peers[tag.Peer] == nil {
		m, err := l.track(tag)
		if err != nil {
			l.mu.Unlock()
			return err
		}
		m.header = true
		l.noted.Add(1)
	}
	l.mu.Unlock()
	return l.flush()
}

// track makes a peer in memory. mu is held.
func (l *journal) track(tag replication.MissedTag) (*missed, error) {
	if err := volume.CheckName("replica id", string(tag.Peer)); err != nil {
		return nil, err
	}
	if len(l.peers) == maxPeers {
		return nil, fmt.Errorf("more than %d absent peers: %w", maxPeers, volume.ErrInvalid)
	}
	m := &missed{no: l.nextNo, tag: tag, pages: map[uint32]*missedPage{}}
	l.nextNo++
	l.peers[tag.Peer] = m
	return m, nil
}

// NoteMissed adds the extents of [off, off+n) to what a tracked peer missed, in memory: the next Flush makes it durable. A
// peer that is not tracked is passed over.
func (h *Replica) NoteMissed(peer volume.ReplicaID, off, n int64) {
	if off < 0 || n <= 0 || off > volume.MaxSize-n {
		return // no write either
	}
	l := h.log
	l.mu.Lock()
	m := l.peers[peer]
	if m == nil || !l.miss(m, uint32(off/layer.ExtentSize), uint32((off+n-1)/layer.ExtentSize)+1) {
		l.mu.Unlock()
		return
	}
	l.noted.Add(1)
	l.mu.Unlock()
	if l.p.missedDirty.Load() >= l.p.opts.maxMissed {
		l.p.flushSoon()
	}
}

// miss adds extents and tells whether any was not there, as far as is known. mu is held.
func (l *journal) miss(m *missed, from, to uint32) (changed bool) {
	for from < to {
		idx := from / missedExtents
		end := min(to, (idx+1)*missedExtents)
		pg := m.pages[idx]
		if pg == nil {
			pg = &missedPage{m: m, idx: idx, partial: m.has.has(idx)}
			m.pages[idx] = pg
			m.has.add(idx)
			l.p.missedPages.Add(1)
		}
		more := false
		for from < end {
			w := from % missedExtents / 64
			mask := ^uint64(0) << (from % 64)
			if left := end - from/64*64; left < 64 {
				mask &= 1<<left - 1
			}
			more = more || pg.bits[w]&mask != mask
			pg.bits[w] |= mask
			from = (from/64 + 1) * 64
		}
		from = end
		if more && !pg.dirty {
			pg.dirty = true
			l.dirty = append(l.dirty, pg)
			l.p.missedDirty.Add(1)
		}
		changed = changed || more
	}
	return changed
}

// AddMissed adds extents to what a peer missed and sets its tag; durable, with all that was noted before. The tag is so
// only once all of the extents are.
func (h *Replica) AddMissed(ctx context.Context, tag replication.MissedTag, extents []region.Run) error {
	if err := checkRuns(extents, volume.MaxSize/layer.ExtentSize); err != nil {
		return err
	}
	if err := h.begin(ctx); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	l.mu.Lock()
	m := l.peers[tag.Peer]
	if m == nil {
		var err error
		if m, err = l.track(tag); err != nil {
			l.mu.Unlock()
			return err
		}
	}
	if l.p.opts.broken.tagBeforeMissed {
		m.tag, m.header = tag, true
	}
	l.mu.Unlock()
	for _, run := range extents {
		for from := run.First; from < run.End(); {
			if err := errors.Join(ctx.Err(), l.bound(l.p.opts.maxMissed)); err != nil {
				return err
			}
			to := min(run.End(), (from/missedExtents+1)*missedExtents)
			if err := l.change(m, func() { l.miss(m, from, to) }); err != nil {
				return err
			}
			from = to
		}
	}
	if err := l.change(m, func() { m.tag, m.header = tag, true }); err != nil {
		return err
	}
	return l.flush()
}

// change changes what a peer missed, unless it was dropped meanwhile.
func (l *journal) change(m *missed, f func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.gone {
		return fmt.Errorf("peer %s was dropped meanwhile: %w", m.tag.Peer, volume.ErrBusy)
	}
	f()
	l.noted.Add(1)
	return nil
}

// bound flushes where so many pages are dirty.
func (l *journal) bound(pages int64) error {
	if l.p.missedDirty.Load() < pages {
		return nil
	}
	l.p.flushSoon() // other replicas' pages as well
	return l.flush()
}

// DropMissed forgets what a peer missed, or all of them where peer is ""; durable.
func (h *Replica) DropMissed(ctx context.Context, peer volume.ReplicaID) error {
	if err := h.begin(ctx); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	var left []purge
	l.mu.Lock()
	for id, m := range l.peers {
		if peer != "" && id != peer {
			continue
		}
		m.gone = true
		delete(l.peers, id)
		l.p.missedPages.Add(-int64(len(m.pages)))
		if !l.p.opts.broken.dropInMemory {
			l.dropped = append(l.dropped, m.no)
		}
		left = append(left, purge{id: l.id, no: m.no})
		l.noted.Add(1)
	}
	l.mu.Unlock()
	if err := l.flush(); err != nil {
		return err
	}
	p := l.p
	p.mu.Lock()
	p.purges = append(p.purges, left...)
	p.mu.Unlock()
	p.kick()
	return nil
}

// MissedRuns returns at most limit runs of what a peer missed, from an extent on, and where to go on; more tells whether
// there is anything left. A peer that is not tracked is volume.ErrNotFound.
func (h *Replica) MissedRuns(ctx context.Context, peer volume.ReplicaID, from uint32, limit int) (since volume.ConfigVersion, runs []region.Run, next uint32, more bool, err error) {
	if err := h.enter(0, 0); err != nil {
		return 0, nil, 0, false, err
	}
	defer h.life.RUnlock()
	l := h.log
	l.mu.Lock()
	m := l.peers[peer]
	if m != nil {
		since = m.tag.Since
	}
	l.mu.Unlock()
	if m == nil {
		return 0, nil, 0, false, fmt.Errorf("peer %s is not tracked: %w", peer, volume.ErrNotFound)
	}
	out := runList{limit: min(max(limit, 1), maxRuns)}
	for {
		if err := ctx.Err(); err != nil {
			return 0, nil, 0, false, err
		}
		l.mu.Lock()
		idx, ok := m.has.next(from / missedExtents)
		l.mu.Unlock()
		if !ok || idx > maxMissedPage {
			return since, out.runs, 0, false, nil
		}
		words, err := l.page(m, idx)
		if err != nil {
			return 0, nil, 0, false, err
		}
		base := idx * missedExtents
		from = max(from, base)
		for first, ok := nextBit(words[:], from-base); ok; first, ok = nextBit(words[:], from-base) {
			end := first + 1
			for end < missedExtents && words[end/64]>>(end%64)&1 == 1 {
				end++
			}
			if !out.add(base+first, base+end) {
				return since, out.runs, base + first, true, nil
			}
			from = base + end
			if end == missedExtents {
				break
			}
		}
		from = base + missedExtents
	}
}

// runList gathers at most limit runs, and joins those that touch.
type runList struct {
	limit int
	runs  []region.Run
}

// add takes [first, end), which begins not before the end of what was added last; false: there is no room for it.
func (r *runList) add(first, end uint32) bool {
	if n := len(r.runs); n > 0 && r.runs[n-1].End() == first {
		r.runs[n-1].N += end - first
		return true
	}
	if len(r.runs) == r.limit {
		return false
	}
	r.runs = append(r.runs, region.Run{First: first, N: end - first})
	return true
}

func nextBit(words []uint64, from uint32) (uint32, bool) {
	for i := int(from / 64); i < len(words); i++ {
		if w := words[i] >> (from % 64); w != 0 {
			return from + uint32(bits.TrailingZeros64(w)), true
		}
		from = uint32(i+1) * 64
	}
	return 0, false
}

// page is what a peer missed in a page, as it is now.
func (l *journal) page(m *missed, idx uint32) (words [missedWords]uint64, err error) {
	l.mu.Lock()
	pg := m.pages[idx]
	whole := pg != nil && !pg.partial
	if pg != nil {
		words = pg.bits
	}
	l.mu.Unlock()
	if whole {
		return words, nil
	}
	stored, err := l.stored(m, idx)
	if err != nil {
		return words, err
	}
	for i, w := range stored {
		words[i] |= w
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.gone {
		return words, fmt.Errorf("peer %s is not tracked any more: %w", m.tag.Peer, volume.ErrNotFound)
	}
	return words, nil
}

func (l *journal) stored(m *missed, idx uint32) (words [missedWords]uint64, err error) {
	b, err := l.p.kv.Get(journalKey(keyMissed, l.id, m.no, idx))
	if b == nil || err != nil {
		return words, err
	}
	return words, decodeWords("what a peer missed", b, words[:])
}

// missedCopy is a page whose copy is being stored.
type missedCopy struct {
	l  *journal
	pg *missedPage
}

// copyMissed copies the dirty pages, then the tags: a tag says that all pages before it are there.
func (l *journal) copyMissed(b *batch) error {
	l.mu.Lock()
	dirty := l.dirty
	l.dirty = nil
	var partial []*missedPage
	for _, pg := range dirty {
		if pg.partial && !pg.m.gone {
			partial = append(partial, pg)
		}
	}
	l.mu.Unlock()
	for _, pg := range partial {
		// Nobody else stores this page: one whose commit is under way is whole.
		words, err := l.stored(pg.m, pg.idx)
		l.mu.Lock()
		if err != nil {
			l.mu.Unlock()
			return l.p.fail(err) // other pages of this round are not dirty any more
		}
		for i, w := range words {
			pg.bits[i] |= w
		}
		pg.partial = false
		l.mu.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, pg := range dirty {
		pg.dirty = false
		l.p.missedDirty.Add(-1)
		if pg.m.gone {
			continue
		}
		pg.inflight++
		b.missed = append(b.missed, missedCopy{l, pg})
		b.units = append(b.units, []op{{journalKey(keyMissed, l.id, pg.m.no, pg.idx), encodeWords(pg.bits[:])}})
	}
	for _, m := range l.peers {
		if m.header {
			m.header = false
			b.units = append(b.units, []op{{journalKey(keyPeer, l.id, m.no), encodePeer(m.tag)}})
		}
	}
	for _, no := range l.dropped {
		b.units = append(b.units, []op{{key: journalKey(keyPeer, l.id, no)}})
	}
	l.dropped = nil
	return nil
}

// committed lets a page go where there are too many in memory: one that is not used any more rather than this one.
func (c missedCopy) committed() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.pg.inflight--
	m := c.pg.m
	if m.gone {
		return
	}
	tries := 8
	for idx, pg := range m.pages {
		if tries--; tries < 0 || c.l.p.missedPages.Load() <= cleanMissed {
			return
		}
		if !pg.dirty && pg.inflight == 0 {
			delete(m.pages, idx)
			c.l.p.missedPages.Add(-1)
		}
	}
}

// release gives back what a journal that is closed has in memory.
func (l *journal) release() {
	l.p.dropLazy(l)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.peers {
		l.p.missedPages.Add(-int64(len(m.pages)))
		m.gone = true
	}
	l.p.missedDirty.Add(-int64(len(l.dirty)))
	l.dirty = nil
}
