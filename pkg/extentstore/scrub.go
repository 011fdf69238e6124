package extentstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
)

// scrubEvery is how long after the last the next scrub begins.
const scrubEvery = 7 * 24 * time.Hour

// errChecksum: what was read of a sealed layer is not what was summed.
var errChecksum = fmt.Errorf("checksum: %w", layer.ErrCorrupt)

// stepSum makes the checksums of some pages of a sealed layer.
func (p *Pool) stepSum(j *job) (bytes int64, err error) {
	for bytes < stepBytes {
		idx, ok := j.l.pages.next(j.next)
		if !ok {
			p.mu.Lock()
			p.job = nil
			p.mu.Unlock()
			return bytes, p.setSummed(j.l, true)
		}
		n, err := p.sumPage(j.l, idx)
		if err != nil {
			return bytes, err
		}
		bytes += n
		j.next = idx + 1
	}
	return bytes, nil
}

func (p *Pool) sumPage(l *chain, idx uint32) (bytes int64, err error) {
	defer p.grace.exit(p.grace.enter())
	st := p.stripe(idx)
	st.Lock()
	pg, err := p.load(st, l, idx)
	if err != nil || pg == nil {
		st.Unlock()
		return 0, err
	}
	e := pg.e
	st.Unlock()
	s := sums{page: layer.PageSum(e.Append(nil))}
	if old, err := p.sumsOf(l, idx, &e); err != nil || old != nil {
		return 0, err // a merge has taken them along
	}
	for _, x := range e {
		if x.Data == 0 {
			continue
		}
		c, err := extentSum(p.file, x, p.copyBuf[:])
		if err != nil {
			return bytes, err
		}
		s.crcs = append(s.crcs, c)
		bytes += layer.ExtentSize
	}
	return bytes, p.commitOps([]op{{pageKey(keySums, l.id, idx), s.encode()}})
}

// extentSum is the CRC-32C of an extent's valid blocks, in order.
func extentSum(f disk.File, e layer.Entry, buf []byte) (c uint32, err error) {
	for m := e.Data; m != 0; {
		var first, n int
		first, n, m = m.Run()
		b := buf[:n*layer.BlockSize]
		if err := f.ReadAt(b, e.Slot.Offset()+int64(first)*layer.BlockSize); err != nil {
			return 0, err
		}
		c = crc32.Update(c, layer.Castagnoli, b)
	}
	return c, nil
}

func (p *Pool) setSummed(l *chain, summed bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.summed == summed || p.layers[l.id] != l {
		return nil
	}
	l.summed = summed
	return p.commitOps([]op{{layerKey(l.id), l.record().encode()}})
}

// sumsOf returns the checksums of a page by entry, nil where it has none that are valid. A decoder's refusal is none.
func (p *Pool) sumsOf(l *chain, idx uint32, e *layer.Page) ([]uint32, error) {
	b, err := p.kv.Get(pageKey(keySums, l.id, idx))
	if b == nil || err != nil {
		return nil, err
	}
	s, err := decodeSums(b)
	if err != nil || s.page != layer.PageSum(e.Append(nil)) || len(s.crcs) != e.Slots() {
		return nil, nil
	}
	return s.crcs, nil
}

// slotSum is the checksum of the blocks of a slot.
type slotSum struct {
	data layer.Mask
	crc  uint32
}

// carry remembers the checksums of slots that a merge moves, so that nobody reads all of a volume again because a
// snapshot was deleted, and takes damage for data.
type carry map[layer.Slot]slotSum

// add notes the checksums of a page.
func (c carry) add(p *Pool, l *chain, idx uint32) error {
	e, ok, err := p.copyOf(l, idx)
	if !ok || err != nil {
		return err
	}
	crcs, err := p.sumsOf(l, idx, &e)
	if crcs == nil || err != nil {
		return err
	}
	for _, x := range e {
		if x.Slot != 0 {
			c[x.Slot], crcs = slotSum{x.Data, crcs[0]}, crcs[1:]
		}
	}
	return nil
}

// sums are those of a page after the merge, nil where blocks were copied: those are read again.
func (c carry) sums(p *Pool, l *chain, idx uint32) ([]op, error) {
	e, ok, err := p.copyOf(l, idx)
	if !ok || err != nil {
		return nil, err
	}
	s := sums{page: layer.PageSum(e.Append(nil))}
	for _, x := range e {
		if x.Slot == 0 {
			continue
		}
		known, ok := c[x.Slot]
		if !ok || known.data != x.Data {
			return nil, nil
		}
		s.crcs = append(s.crcs, known.crc)
	}
	return []op{{pageKey(keySums, l.id, idx), s.encode()}}, nil
}

// carrySums stores the checksums of pages that were merged.
func (p *Pool) carrySums(l *chain, pages []uint32, c carry) error {
	var ops []op
	for _, idx := range pages {
		o, err := c.sums(p, l, idx)
		if err != nil {
			return err
		}
		ops = append(ops, o...)
	}
	if len(ops) == 0 {
		return nil
	}
	return p.commitOps(ops)
}

// copyOf is the page of a sealed layer; ok is false where there is none.
func (p *Pool) copyOf(l *chain, idx uint32) (e layer.Page, ok bool, err error) {
	st := p.stripe(idx)
	st.Lock()
	defer st.Unlock()
	pg, err := p.load(st, l, idx)
	if pg == nil || err != nil {
		return e, false, err
	}
	return pg.e, true, nil
}

// Scrub reads all that has a checksum, paced by MergeRate, and notes what differs: Conditions tells it, and background
// work leaves such a layer alone. The error is of the reading itself or the context's.
func (p *Pool) Scrub(ctx context.Context) error {
	p.mu.Lock()
	layers := make([]*chain, 0, len(p.layers))
	for _, l := range p.layers {
		layers = append(layers, l)
	}
	p.mu.Unlock()
	slices.SortFunc(layers, func(a, b *chain) int { return cmp.Compare(a.id, b.id) })
	for _, l := range layers {
		for idx, ok := l.pages.next(0); ok; idx, ok = l.pages.next(idx + 1) {
			n, err := p.scrubPage(l, idx)
			if err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Duration(float64(n) / float64(p.opts.MergeRate) * float64(time.Second))):
			}
		}
	}
	return nil
}

// scrubPage holds the worker: nothing of a sealed layer changes meanwhile.
func (p *Pool) scrubPage(l *chain, idx uint32) (bytes int64, err error) {
	if err := p.use(); err != nil {
		return 0, err
	}
	defer p.users.RUnlock()
	p.worker.Lock()
	defer p.worker.Unlock()
	p.mu.Lock()
	skip := p.layers[l.id] != l || !l.summed || l.dead()
	p.mu.Unlock()
	if skip {
		return 0, nil
	}
	e, _, err := p.copyOf(l, idx)
	if err != nil {
		return 0, err
	}
	crcs, err := p.sumsOf(l, idx, &e)
	if crcs == nil || err != nil {
		return 0, err
	}
	for i, x := range e {
		if x.Slot == 0 {
			continue
		}
		c, err := extentSum(p.file, x, p.copyBuf)
		if err == nil && c != crcs[0] {
			err = errChecksum
		}
		if err != nil {
			off := int64(idx)*layer.PageSpan + int64(i)*layer.ExtentSize
			p.log.Error("scrub has found damage", "layer", l.id, "offset", off, "slot", x.Slot, "error", err)
			p.mu.Lock()
			l.bad = fmt.Errorf("at offset %d: %w", off, err)
			p.mu.Unlock()
		}
		crcs = crcs[1:]
		bytes += int64(x.Data.Count()) * layer.BlockSize
	}
	return bytes, nil
}

// runScrubber scrubs once a week.
func (p *Pool) runScrubber() error {
	t := time.NewTicker(scrubEvery)
	defer t.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return nil
		case <-t.C:
		}
		if err := p.Scrub(p.ctx); err != nil && !errors.Is(err, context.Canceled) && p.ctx.Err() == nil {
			p.log.Error("scrub", "error", err)
		}
	}
}
