package extentstore

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
)

const (
	// scrubEvery is how long after the last the next scrub begins.
	scrubEvery = 7 * 24 * time.Hour
	// scrubSoon leaves a start time for what is more urgent; scrubRetry is how long after an error the next try is.
	scrubSoon, scrubRetry = time.Minute, time.Hour
	// scrubSave is after how many bytes the position is made durable.
	scrubSave = 1 << 30
)

// errChecksum: what was read of a sealed layer is not what was summed.
var errChecksum = fmt.Errorf("checksum: %w", layer.ErrCorrupt)

// errDamaged is what is left of such a finding after a restart.
var errDamaged = fmt.Errorf("an earlier scrub found %w", errChecksum)

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

// verify reads an extent that blocks are copied from or to: the sum that it gets afterwards would hide its damage.
func (c carry) verify(p *Pool, e layer.Entry) error {
	known, ok := c[e.Slot]
	if !ok || known.data != e.Data {
		return nil
	}
	crc, err := extentSum(p.file, e, p.copyBuf)
	if err == nil && crc != known.crc {
		err = errChecksum
	}
	return err
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

// Scrub reads all that has a checksum, paced by MergeRate, and notes what differs: Conditions tells it, also after a
// restart, until a later scrub finds the layer sound, and background work leaves it alone. It goes on where an earlier one
// was cut off. The error is of the reading itself or the context's.
func (p *Pool) Scrub(ctx context.Context) error {
	if err := p.use(); err != nil {
		return err
	}
	defer p.users.RUnlock()
	// What it notes is committed.
	if err := p.waitRoom(ctx); err != nil {
		return err
	}
	at, err := p.lastScrub()
	if err != nil {
		return err
	}
	var saved, read int64
	for l := p.layerFrom(at.layer); l != nil; l = p.layerFrom(at.layer) {
		if at.layer != l.id {
			at.layer, at.page = l.id, 0
		}
		sound := at.page == 0
		for idx, ok := l.pages.next(at.page); ok; idx, ok = l.pages.next(idx + 1) {
			if err := p.waitRoom(ctx); err != nil {
				return err
			}
			n, verified, err := p.scrubPage(l, idx)
			if err != nil {
				return err
			}
			sound = sound && verified
			at.page = idx + 1
			select {
			case <-ctx.Done():
				return errors.Join(ctx.Err(), p.saveScrub(at))
			case <-p.ctx.Done():
				return errors.Join(errPoolClosed, p.saveScrub(at))
			case <-time.After(time.Duration(float64(n) / float64(p.opts.MergeRate) * float64(time.Second))):
			}
			if read += n; read-saved >= scrubSave {
				saved = read
				if err := p.saveScrub(at); err != nil {
					return err
				}
			}
		}
		if sound {
			p.mu.Lock()
			var err error
			if l.damaged.Load() {
				p.log.Info("scrub finds a layer sound again", "layer", l.id)
				err = p.noteDamage(l, nil)
			}
			p.mu.Unlock()
			if err != nil {
				return err
			}
		}
		at.layer, at.page = l.id+1, 0
	}
	return p.saveScrub(scrubRecord{ended: time.Now().Unix()})
}

// layerFrom is the layer with the lowest id from that on. A merge moves pages to higher ones.
func (p *Pool) layerFrom(id uint64) (next *chain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.layers {
		if l.id >= id && (next == nil || l.id < next.id) {
			next = l
		}
	}
	return next
}

// lastScrub is what is known of the last scrub. A new pool counts as scrubbed.
func (p *Pool) lastScrub() (scrubRecord, error) {
	b, err := p.kv.Get([]byte{keyScrub})
	if err != nil {
		return scrubRecord{}, err
	}
	if b == nil {
		r := scrubRecord{ended: time.Now().Unix()}
		return r, p.saveScrub(r)
	}
	return decodeScrub(b)
}

func (p *Pool) saveScrub(r scrubRecord) error {
	return p.commitOps([]op{{[]byte{keyScrub}, r.encode()}})
}

// scrubPage holds the worker: nothing of a sealed layer changes meanwhile. Verified tells that all of the page was read
// and is what was summed.
func (p *Pool) scrubPage(l *chain, idx uint32) (bytes int64, verified bool, err error) {
	p.worker.Lock()
	defer p.worker.Unlock()
	p.mu.Lock()
	skip := p.layers[l.id] != l || !l.summed || l.dead()
	p.mu.Unlock()
	if skip {
		return 0, false, nil
	}
	e, _, err := p.copyOf(l, idx)
	if err != nil {
		return 0, false, err
	}
	crcs, err := p.sumsOf(l, idx, &e)
	if crcs == nil || err != nil {
		return 0, false, err
	}
	verified = true
	for i, x := range e {
		if x.Slot == 0 {
			continue
		}
		c, err := extentSum(p.file, x, p.copyBuf)
		if err == nil && c != crcs[0] {
			err = errChecksum
		}
		if err != nil {
			verified = false
			off := int64(idx)*layer.PageSpan + int64(i)*layer.ExtentSize
			p.log.Error("scrub has found damage", "layer", l.id, "offset", off, "slot", x.Slot, "error", err)
			p.mu.Lock()
			err = p.noteDamage(l, fmt.Errorf("at offset %d: %w", off, err))
			p.mu.Unlock()
			if err != nil {
				return bytes, false, err
			}
		}
		crcs = crcs[1:]
		bytes += int64(x.Data.Count()) * layer.BlockSize
	}
	return bytes, verified, nil
}

// runScrubber scrubs once a week, restarts or not. Where damage is known of it begins soon after a start: which extents they
// were is not stored, and there may be more.
func (p *Pool) runScrubber() error {
	for first := true; ; first = false {
		last, err := p.lastScrub()
		if err != nil {
			if p.ctx.Err() == nil {
				p.log.Error("scrub", "error", err)
			}
			return nil
		}
		wait := last.due(time.Now())
		if first && p.distrusted.Load() > 0 {
			wait = scrubSoon
		}
		t := time.NewTimer(wait)
		select {
		case <-p.ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		if err := p.Scrub(p.ctx); err != nil && p.ctx.Err() == nil {
			p.log.Error("scrub", "error", err)
			if p.failure() != nil {
				return nil
			}
			select {
			case <-p.ctx.Done():
				return nil
			case <-time.After(scrubRetry):
			}
		}
	}
}

// due is how long to wait for the next scrub. One that was cut off goes on soon; a clock that was set back does not
// put it off for more than the usual time.
func (r scrubRecord) due(now time.Time) time.Duration {
	if r.layer != 0 {
		return scrubSoon
	}
	return min(max(scrubSoon, time.Unix(r.ended, 0).Add(scrubEvery).Sub(now)), scrubEvery)
}
