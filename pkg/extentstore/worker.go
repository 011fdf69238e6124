package extentstore

import (
	"errors"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/layer"
)

// The worker frees, merges and sums layers, one at a time, in steps that each commit. What it does follows from the
// records alone, so it goes on after a restart where it stopped.

type task int

const (
	taskFree task = iota
	taskMerge
	taskSum
)

type job struct {
	task  task
	l     *chain
	child *chain // of a merge
	next  uint32 // page, where the task does not empty the layer
}

const (
	stepPages = 64
	stepBytes = 4 << 20
)

func (p *Pool) runWorker() error {
	for {
		started := time.Now()
		more, bytes, err := p.stepBytes()
		if err != nil && p.failure() == nil {
			p.log.Error("background work on the pool failed", "error", err)
			bytes = p.opts.MergeRate
		}
		pause := max(time.Since(started), time.Duration(float64(bytes)/float64(p.opts.MergeRate)*float64(time.Second)))
		var wait <-chan time.Time
		if more {
			if p.full() && err == nil {
				pause = 0
			}
			wait = time.After(pause)
		}
		select {
		case <-p.ctx.Done():
			return nil
		case <-p.kicked:
			if !more {
				continue
			}
			// Work that is paced is not hurried by a kick, but by a full pool.
			if !p.full() {
				select {
				case <-wait:
				case <-p.ctx.Done():
					return nil
				}
			}
		case <-wait:
		}
	}
}

// step does one step of background work, and tells whether there may be more.
func (p *Pool) step() (more bool, err error) {
	more, _, err = p.stepBytes()
	return more, err
}

func (p *Pool) stepBytes() (more bool, bytes int64, err error) {
	p.worker.Lock()
	defer p.worker.Unlock()
	if err := errors.Join(p.failure(), p.waitRoom(p.ctx)); err != nil {
		return false, 0, err
	}
	if done, err := p.stepPurge(); !done {
		return true, maxCommit, err
	}
	j := p.pick()
	if j == nil {
		return false, 0, nil
	}
	switch j.task {
	case taskFree:
		err = p.stepFree(j)
	case taskMerge:
		bytes, err = p.stepMerge(j)
	default:
		bytes, err = p.stepSum(j)
	}
	if err != nil && !isNoSpace(err) {
		// Other layers are not kept waiting for one that cannot be read.
		p.mu.Lock()
		j.l.bad, j.l.stuck, p.job = err, j.task == taskFree, nil
		if errors.Is(err, errChecksum) && p.failure() == nil {
			err = errors.Join(err, p.noteDamage(j.l, err))
		}
		p.mu.Unlock()
	}
	return true, bytes, err
}

// pick goes on with the present job while it is still to be done, or finds the next: what frees space comes first.
func (p *Pool) pick() *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	if j := p.job; j != nil && p.layers[j.l.id] == j.l {
		switch {
		case j.task == taskFree,
			j.task == taskMerge && j.l.mergeable() && !j.child.dead() && j.l.bad == nil,
			j.task == taskSum && !p.urgent && j.l.unsummed():
			return j
		}
	}
	p.job, p.urgent = nil, false
	for _, l := range p.layers {
		switch {
		case l.stuck:
		case l.dead():
			p.job = &job{task: taskFree, l: l}
			return p.job
		case l.bad != nil:
		case l.mergeable() && (p.job == nil || p.job.task == taskSum):
			p.job = &job{task: taskMerge, l: l}
		case l.unsummed() && p.job == nil:
			p.job = &job{task: taskSum, l: l}
		}
	}
	if p.job != nil && p.job.task == taskMerge {
		for _, c := range p.layers {
			if c.parent.Load() == p.job.l {
				p.job.child = c
			}
		}
	}
	return p.job
}

// unsummed layers are sealed to stay and lack checksums. Pool.mu is held.
func (l *chain) unsummed() bool {
	return l.head == nil && !l.summed && !l.dead() && !l.mergeable()
}

// stepFree frees some pages of a dead layer, and in the end the layer.
func (p *Pool) stepFree(j *job) error {
	l := j.l
	// What is stored must be what is in memory, also of the layer that was being merged into this one.
	if err := p.flush(l); err != nil {
		return err
	}
	var ops []op
	var freed []layer.Slot
	var failed error
	for range stepPages {
		idx, ok := l.pages.next(0)
		if !ok {
			break
		}
		st := p.stripe(idx)
		st.Lock()
		pg, err := p.load(st, l, idx)
		if err != nil {
			st.Unlock()
			failed = fmt.Errorf("delete layer %d: %w", l.id, err)
			break
		}
		for _, e := range pg.e {
			if e.Slot != 0 {
				freed = append(freed, e.Slot)
			}
		}
		p.forget(st, l, idx)
		st.Unlock()
		ops = append(ops, op{key: pageKey(keyPage, l.id, idx)}, op{key: pageKey(keySums, l.id, idx)})
	}
	if p.opts.broken.reuseBeforeCommit {
		p.recycle(freed)
	}
	if len(ops) > 0 {
		if err := p.commitOps(ops); err != nil {
			return err
		}
		l.slots.Add(-int64(len(freed)))
		if !p.opts.broken.reuseBeforeCommit {
			p.recycle(freed)
		}
	}
	if _, ok := l.pages.next(0); ok {
		return failed
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.commitOps([]op{{key: layerKey(l.id)}}); err != nil {
		return err
	}
	p.forgetLayer(l)
	if parent := l.parent.Load(); parent != nil {
		parent.children--
	}
	p.job = nil
	return nil
}

// stepMerge moves some pages of a layer into its only child, and in the end takes the layer out of the chain.
func (p *Pool) stepMerge(j *job) (bytes int64, err error) {
	l, c := j.l, j.child
	if c.merging.Load() != l {
		// The child's checksums hold no longer.
		if err := p.setSummed(c, false); err != nil {
			return 0, err
		}
		c.merging.Store(l)
	}
	idx := uint32(0)
	p.mu.Lock()
	sealed := c.head == nil
	p.mu.Unlock()
	var failed error
	sums, pages := carry{}, []uint32(nil)
	for range stepPages {
		var ok bool
		if idx, ok = l.pages.next(idx); !ok || bytes >= stepBytes {
			break
		}
		failed = sums.add(p, l, idx)
		if sealed { // a head's slots are written in place, and have none
			failed = errors.Join(failed, sums.add(p, c, idx))
		}
		if failed != nil {
			break
		}
		pages = append(pages, idx)
		n, err := p.mergePage(l, c, idx, sums)
		if bytes += n; err != nil {
			failed = err
			break
		}
		idx++
	}
	// What was moved is stored also after an error: another merge may be of the child, and would store its page alone.
	if err := p.flush(c); err != nil {
		return bytes, errors.Join(failed, err)
	}
	if sealed {
		if err := p.carrySums(c, pages, sums); err != nil {
			return bytes, errors.Join(failed, err)
		}
	}
	if failed != nil {
		return bytes, errors.Join(failed, p.carrySums(l, pages, sums)) // what stays is known to be damaged, and stays so
	}
	if _, ok := l.pages.next(0); ok {
		return bytes, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !l.mergeable() {
		return bytes, nil // the child was deleted: both are dead
	}
	above := l.parent.Load()
	rec := c.record()
	rec.parent = l.record().parent
	if err := p.commitOps([]op{{layerKey(c.id), rec.encode()}, {key: layerKey(l.id)}}); err != nil {
		return bytes, err
	}
	c.parent.Store(above)
	c.merging.Store(nil)
	p.forgetLayer(l)
	p.job = nil
	return bytes, nil
}

// mergePage moves one page's entries from l into its child c, extent by extent, and leaves both pages dirty: they
// commit together.
func (p *Pool) mergePage(l, c *chain, idx uint32, known carry) (bytes int64, err error) {
	for i := range layer.ExtentsPerPage {
		n, err := p.mergeExtent(l, c, idx, i, known)
		if err != nil {
			return bytes, err
		}
		bytes += n
	}
	return bytes, nil
}

func (p *Pool) mergeExtent(l, c *chain, idx uint32, i int, known carry) (int64, error) {
	bottom := l.parent.Load() == nil
	st := p.stripe(idx)
	st.Lock()
	from, err := p.load(st, l, idx)
	empty := from != nil && from.e[i] == layer.Entry{}
	st.Unlock()
	if err != nil || from == nil || empty {
		return 0, err
	}
	defer p.keepWritersOut(c, int64(idx)*layer.PageSpan+int64(i)*layer.ExtentSize)()
	from, to, err := p.mergePair(st, l, c, idx)
	if err != nil {
		return 0, err
	}
	// Nobody else changes these entries now: the lock may be let go for the copy.
	m := layer.PlanMerge(from.e[i], to.e[i], bottom)
	if p.opts.broken.mergeForgetsZeros {
		m.Child.Zero = to.e[i].Zero
	}
	upper, lower := from.e[i], to.e[i]
	src, dst := upper.Slot, m.Child.Slot
	st.Unlock()
	if m.Copy != 0 && !p.opts.broken.mergeWithoutCopy {
		if err = errors.Join(known.verify(p, upper), known.verify(p, lower)); err == nil {
			err = p.copyBlocks(src, dst, m.Copy)
		}
	}
	st.Lock()
	defer st.Unlock()
	from.pins--
	to.pins--
	if err != nil {
		return 0, err
	}
	if m.Free != 0 {
		p.freeSlot(l, from, m.Free)
	} else if src != 0 {
		l.slots.Add(-1)
		c.slots.Add(1)
	}
	from.e[i], to.e[i] = layer.Entry{}, m.Child
	p.markDirty(c, to)
	if !from.dirty {
		from.dirty = true
		p.dirtyPages.Add(1)
	}
	return int64(m.Copy.Count()) * layer.BlockSize, nil
}

// mergePair returns both pages pinned, with their stripe locked.
func (p *Pool) mergePair(st *stripe, l, c *chain, idx uint32) (from, to *page, err error) {
	st.Lock()
	if from, err = p.load(st, l, idx); err == nil {
		from.pins++
		if to, err = p.create(st, c, idx); err != nil {
			from.pins--
		}
	}
	if err != nil {
		st.Unlock()
		return nil, nil, err
	}
	to.pins++
	return from, to, nil
}

// keepWritersOut holds the extent at off where c is a replica's head, and keeps it a head. A sealed layer has no writers.
func (p *Pool) keepWritersOut(c *chain, off int64) (release func()) {
	if p.opts.broken.mergeWithoutLock {
		return func() {}
	}
	p.mu.Lock()
	r := c.head
	p.mu.Unlock()
	if r == nil {
		return func() {}
	}
	r.gate.RLock()
	lk := r.ranges.lock(off, off+layer.ExtentSize, false)
	return func() {
		r.ranges.unlock(lk)
		r.gate.RUnlock()
	}
}

func (p *Pool) copyBlocks(src, dst layer.Slot, blocks layer.Mask) error {
	buf := p.copyBuf[:]
	for blocks != 0 {
		var first, n int
		first, n, blocks = blocks.Run()
		b := buf[:n*layer.BlockSize]
		at := int64(first) * layer.BlockSize
		if err := p.file.ReadAt(b, src.Offset()+at); err != nil {
			return err
		}
		if err := p.file.WriteAt(b, dst.Offset()+at); err != nil {
			return err
		}
	}
	return nil
}
