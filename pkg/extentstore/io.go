package extentstore

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
)

// seg is a run of bytes that lies together in memory and in the data file.
type seg struct {
	at, n int   // in the buffer
	off   int64 // in the data file
}

// scratch is what one request needs besides its buffer.
type scratch struct {
	segs    []seg
	extents []target
	pages   [8]*page
	edge    []byte // two blocks, aligned
}

var scratchPool = sync.Pool{New: func() any { return &scratch{edge: disk.Aligned(2 * layer.BlockSize)} }}

// add joins a run to the last one where it continues it.
func (s *scratch) add(at, n int, off int64) {
	if k := len(s.segs) - 1; k >= 0 {
		if l := &s.segs[k]; l.at+l.n == at && l.off+int64(l.n) == off {
			l.n += n
			return
		}
	}
	s.segs = append(s.segs, seg{at, n, off})
}

// read fills b from off as seen from head. It may be called at any time: what it looks up stays in place until it is
// done.
func (p *Pool) read(head *chain, b []byte, off int64) error {
	s := scratchPool.Get().(*scratch)
	defer scratchPool.Put(s)
	defer p.grace.exit(p.grace.enter())
	s.segs = s.segs[:0]
	for at := 0; at < len(b); {
		n := int(min(int64(len(b)-at), layer.PageSpan-(off+int64(at))%layer.PageSpan))
		if err := p.resolve(s, head, b[at:at+n], off+int64(at), at); err != nil {
			return err
		}
		at += n
	}
	if p.distrusted.Load() > 0 && len(b) > 0 {
		if err := p.verifyRead(head, off, int64(len(b))); err != nil {
			return err
		}
	}
	for _, g := range s.segs {
		if err := p.file.ReadAt(b[g.at:g.at+g.n], g.off); err != nil {
			return err
		}
	}
	return nil
}

// resolve looks up what lies in one page: segments for what has data, zeros at once for the rest. At is where b begins
// in the request's buffer.
func (p *Pool) resolve(s *scratch, head *chain, b []byte, off int64, at int) error {
	st, pages, exclusive, err := p.lockChain(head, nil, off, int64(len(b)), s.pages[:])
	if err != nil {
		return err
	}
	defer st.unlock(exclusive)
	if len(pages) == 0 {
		clear(b)
		return nil
	}
	for done := 0; done < len(b); {
		o := off + int64(done)
		n := int(min(int64(len(b)-done), layer.ExtentSize-o%layer.ExtentSize))
		_, i := place(o)
		want := blocksOf(o, int64(n))
		none := want
		for _, pg := range pages {
			e := pg.e[i]
			none &^= want & e.Data
			for hit := want & e.Data; hit != 0; {
				var first, count int
				first, count, hit = hit.Run()
				from, to := clip(first, count, o, n)
				s.add(at+done+from, to-from, e.Slot.Offset()+o%layer.ExtentSize+int64(from))
			}
			if want &^= e.Covers(); want == 0 {
				break
			}
		}
		for none != 0 {
			var first, count int
			first, count, none = none.Run()
			from, to := clip(first, count, o, n)
			clear(b[done+from : done+to])
		}
		done += n
	}
	return nil
}

// clip turns a run of blocks of an extent into bytes of a request of n bytes at o in that extent.
func clip(first, count int, o int64, n int) (from, to int) {
	start := int(o % layer.ExtentSize)
	return max(0, first*layer.BlockSize-start), min(n, (first+count)*layer.BlockSize-start)
}

// target is an extent that a write goes to.
type target struct {
	slot layer.Slot
	// bits are the blocks to mark valid once they are written. Where there are any, the page is pinned.
	bits layer.Mask
}

// write stores b at off. It waits while the pool is full, with no lock held, and goes on where it stopped.
func (h *Replica) write(ctx context.Context, b []byte, off int64) error {
	var hand []layer.Slot // slots that are ours and not yet in use
	defer func() { h.r.p.giveBack(hand...) }()
	for len(b) > 0 {
		if h.isClosed() {
			return block.ErrClosed
		}
		if err := errors.Join(ctx.Err(), h.r.p.failure()); err != nil {
			return err
		}
		if err := h.r.bound(2 * h.r.p.opts.maxDirty); err != nil {
			return err
		}
		n, err := h.r.writeSome(b, off, &hand)
		if err != nil && !isNoSpace(err) && !errors.Is(err, errFull) {
			return err
		}
		b, off = b[n:], off+int64(n)
		if isNoSpace(err) {
			// The filesystem has no room for what has a slot: ours or a copy-on-write one's. Look again soon.
			if err := h.starve(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			s, err := h.r.p.wait(ctx, h.closed)
			if err != nil {
				return err
			}
			hand = append(hand, s)
		}
	}
	return nil
}

// starve waits a moment for room in the filesystem.
func (h *Replica) starve(ctx context.Context) error {
	p := h.r.p
	p.starved.Add(1)
	defer p.starved.Add(-1)
	p.kick()
	t := time.NewTimer(200 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-h.closed:
	case <-p.ctx.Done():
	}
	return block.ErrClosed
}

// bound flushes where so many pages are dirty that their number would grow for ever, were they not waited for.
func (r *replica) bound(pages int64) error {
	if r.p.dirtyPages.Load() < pages {
		return nil
	}
	r.p.flushSoon() // other replicas' pages as well
	return r.p.flush(r.head.Load())
}

// maxWrite bounds what is written under one lock, in bytes.
const maxWrite = 4 << 20

// writeSome writes a prefix of b and returns its length. With errFull or disk.ErrNoSpace the rest found no room.
func (r *replica) writeSome(b []byte, off int64, hand *[]layer.Slot) (n int, err error) {
	b = b[:min(int64(len(b)), maxWrite-off%layer.BlockSize)]
	r.gate.RLock()
	defer r.gate.RUnlock()
	s := scratchPool.Get().(*scratch)
	defer scratchPool.Put(s)
	s.extents = s.extents[:0]
	n, err = r.writeLocked(s, b, off, hand)
	r.abandon(s.extents, off)
	return n, err
}

// writeLocked leaves the extents that were not published in s.
func (r *replica) writeLocked(s *scratch, b []byte, off int64, hand *[]layer.Slot) (n int, err error) {
	p, head := r.p, r.head.Load()
	lk := r.ranges.lock(blockDown(off), blockUp(off+int64(len(b))), false)
	defer r.ranges.unlock(lk)
	defer p.grace.exit(p.grace.enter())

	var short error
	for n < len(b) {
		o := off + int64(n)
		k := int(min(int64(len(b)-n), layer.ExtentSize-o%layer.ExtentSize))
		t, err := p.target(head, o, blocksOf(o, int64(k)), int(extentUp(off+int64(len(b)))-extentDown(o))/layer.ExtentSize, hand)
		if err != nil {
			short = err
			break
		}
		s.extents = append(s.extents, t)
		n += k
	}
	if n == 0 {
		return 0, short
	}
	if err := r.writeData(s, head, b[:n], off); err != nil {
		return 0, err
	}
	p.publish(head, s.extents, off)
	s.extents = s.extents[:0]
	return n, short
}

// target finds the slot that an extent's blocks go to, and reserves one where the head has none.
func (p *Pool) target(head *chain, off int64, bits layer.Mask, want int, hand *[]layer.Slot) (target, error) {
	idx, i := place(off)
	st := p.stripe(idx)
	st.RLock()
	if pg := st.pages[pageID{head.id, idx}]; pg != nil && pg.e[i].Data&bits == bits {
		s := pg.e[i].Slot
		if !pg.ref.Load() {
			pg.ref.Store(true)
		}
		st.RUnlock()
		return target{slot: s}, nil
	}
	st.RUnlock()
	for {
		st.Lock()
		pg, err := p.load(st, head, idx)
		if err != nil {
			st.Unlock()
			return target{}, err
		}
		if pg != nil && pg.e[i].Slot != 0 {
			t := target{slot: pg.e[i].Slot, bits: bits &^ pg.e[i].Data}
			if t.bits != 0 {
				pg.pins++
			}
			st.Unlock()
			return t, nil
		}
		if k := len(*hand); k > 0 {
			if pg == nil {
				pg, err = p.create(st, head, idx)
				if err != nil {
					st.Unlock()
					return target{}, err
				}
			}
			t := target{slot: (*hand)[0], bits: bits}
			*hand = (*hand)[1:]
			pg.e[i].Slot = t.slot
			pg.pins++
			head.slots.Add(1)
			st.Unlock()
			return t, nil
		}
		st.Unlock()
		first, n, err := p.take(want)
		if err != nil {
			return target{}, err
		}
		for k := range n {
			*hand = append(*hand, first+layer.Slot(k))
		}
	}
}

// writeData writes whole blocks; what the first and the last had outside of b is read first.
func (r *replica) writeData(s *scratch, head *chain, b []byte, off int64) error {
	p := r.p
	// Middle blocks go out as they are; an edge that is not a whole block goes through the edge buffer.
	lead := int(blockUp(off) - off)
	if lead > 0 {
		lead = min(lead, len(b))
		if err := r.writeEdge(s, head, b[:lead], off, 0); err != nil {
			return err
		}
	}
	body := len(b) - (len(b)-lead)%layer.BlockSize
	if body < len(b) {
		if err := r.writeEdge(s, head, b[body:], off+int64(body), 1); err != nil {
			return err
		}
	}
	s.segs = s.segs[:0]
	base := extentDown(off)
	for at := lead; at < body; {
		o := off + int64(at)
		n := int(min(int64(body-at), layer.ExtentSize-o%layer.ExtentSize))
		t := s.extents[(extentDown(o)-base)/layer.ExtentSize]
		s.add(at, n, t.slot.Offset()+o%layer.ExtentSize)
		at += n
	}
	for _, g := range s.segs {
		if err := p.file.WriteAt(b[g.at:g.at+g.n], g.off); err != nil {
			return err
		}
	}
	return nil
}

// writeEdge writes a part of one block: read, modify, write, under the block's range lock.
func (r *replica) writeEdge(s *scratch, head *chain, b []byte, off int64, which int) error {
	buf := s.edge[which*layer.BlockSize:][:layer.BlockSize]
	// read takes a scratch of its own: s holds the extents of this write.
	if err := r.p.read(head, buf, blockDown(off)); err != nil {
		return err
	}
	copy(buf[off-blockDown(off):], b)
	base := extentDown(off)
	t := s.extents[0]
	if k := len(s.extents) - 1; which == 1 && k > 0 {
		t = s.extents[k]
	}
	return r.p.file.WriteAt(buf, t.slot.Offset()+blockDown(off)-base)
}

// publish marks written blocks valid.
func (p *Pool) publish(head *chain, extents []target, off int64) {
	p.changePinned(head, extents, off, func(pg *page, i int, t target) { pg.e[i] = pg.e[i].Write(t.bits) })
}

// abandon lets go of what a failed write has pinned, and frees the slots that it reserved and nobody else has used
// since. The gate is held.
func (r *replica) abandon(extents []target, off int64) {
	if len(extents) == 0 {
		return
	}
	from := extentDown(off)
	// Whole extents are locked: another write to the same slot may be under way.
	lk := r.ranges.lock(from, from+int64(len(extents))*layer.ExtentSize, false)
	defer r.ranges.unlock(lk)
	head := r.head.Load()
	r.p.changePinned(head, extents, off, func(pg *page, i int, _ target) {
		if pg.e[i].Slot != 0 && pg.e[i].Data == 0 {
			r.p.freeSlot(head, pg, pg.e[i].Slot)
			pg.e[i].Slot = 0
		}
	})
}

// changePinned changes the pages of a write and lets them go. They are dirty then: one that was stored meanwhile may be empty,
// and is forgotten by its next commit only.
func (p *Pool) changePinned(head *chain, extents []target, off int64, change func(pg *page, i int, t target)) {
	off = extentDown(off)
	for k, t := range extents {
		if t.bits == 0 {
			continue
		}
		idx, i := place(off + int64(k)*layer.ExtentSize)
		st := p.stripe(idx)
		st.Lock()
		pg := st.pages[pageID{head.id, idx}]
		change(pg, i, t)
		pg.pins--
		p.markDirty(head, pg)
		st.Unlock()
	}
}

// freeSlot frees a slot of the page with the next commit of it. The page's stripe is locked.
func (p *Pool) freeSlot(l *chain, pg *page, s layer.Slot) {
	pg.freed = append(pg.freed, s)
	l.slots.Add(-1)
}

// zero makes a range read as zeros: whole blocks by the map alone, parts of blocks by writing.
func (h *Replica) zero(ctx context.Context, off, n int64) error {
	p := h.r.p
	end := off + n
	first, last := blockUp(off), blockDown(end)
	if first > last {
		return h.zeroPart(ctx, off, n)
	}
	if off < first {
		if err := h.zeroPart(ctx, off, first-off); err != nil {
			return err
		}
	}
	if last < end {
		if err := h.zeroPart(ctx, last, end-last); err != nil {
			return err
		}
	}
	for off := first; off < last; {
		if h.isClosed() {
			return block.ErrClosed
		}
		if err := errors.Join(ctx.Err(), p.failure()); err != nil {
			return err
		}
		next := min(last, (off/layer.PageSpan+1)*layer.PageSpan)
		idx, _ := place(off)
		if has, ok := p.nextInChain(h.r.head.Load(), nil, idx); !ok {
			return nil
		} else if has > idx {
			off = int64(has) * layer.PageSpan
			continue
		}
		if err := h.r.zeroPage(off, next-off); err != nil {
			return err
		}
		off = next
		if err := h.r.bound(p.opts.maxDirty); err != nil {
			return err
		}
	}
	return nil
}

// zeroPart zeroes a part of one block. What reads as zeros already needs nothing.
func (h *Replica) zeroPart(ctx context.Context, off, n int64) error {
	var buf [layer.BlockSize]byte
	if err := h.r.p.read(h.r.head.Load(), buf[:n], off); err != nil {
		return err
	}
	if buf == [layer.BlockSize]byte{} {
		return nil
	}
	clear(buf[:n])
	return h.write(ctx, buf[:n], off)
}

// zeroPage zeroes whole blocks within one page.
func (r *replica) zeroPage(off, n int64) error {
	p := r.p
	r.gate.RLock()
	defer r.gate.RUnlock()
	// Whole extents are locked: a slot may be freed, and no write to other blocks in it may be under way.
	lk := r.ranges.lock(extentDown(off), extentUp(off+n), false)
	defer r.ranges.unlock(lk)
	head := r.head.Load()
	idx, _ := place(off)
	st := p.stripe(idx)
	st.Lock()
	defer st.Unlock()
	var below []*page
	for l := head.parent.Load(); l != nil; l = l.parent.Load() {
		b, err := p.load(st, l, idx)
		if err != nil {
			return err
		}
		if b != nil {
			below = append(below, b)
		}
	}
	// The page that changes is looked up last: a lookup may evict what was looked up before.
	pg, err := p.load(st, head, idx)
	if err != nil {
		return err
	}
	chainEntries := make([]layer.Entry, len(below))
	for end := off + n; off < end; {
		k := min(end-off, layer.ExtentSize-off%layer.ExtentSize)
		_, i := place(off)
		for j, b := range below {
			chainEntries[j] = b.e[i]
		}
		bits := blocksOf(off, k)
		visible := layer.Visible(chainEntries, bits)
		if p.opts.broken.discardForgetsBelow {
			visible = 0
		}
		var e layer.Entry
		if pg != nil {
			e = pg.e[i]
		}
		if after, freed := e.Discard(bits, visible); after != e {
			if pg == nil {
				if pg, err = p.create(st, head, idx); err != nil {
					return err
				}
			}
			pg.e[i] = after
			if freed != 0 {
				p.freeSlot(head, pg, freed)
			}
			p.markDirty(head, pg)
		}
		off += k
	}
	return nil
}
