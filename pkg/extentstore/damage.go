package extentstore

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// noteDamage makes damage to a layer known for good, or forgets it where err is nil. Pool.mu is held.
func (p *Pool) noteDamage(l *chain, err error) error {
	l.bad = err
	if l.damaged.Load() == (err != nil) || p.layers[l.id] != l {
		return nil
	}
	if l.damaged.Store(err != nil); err != nil {
		p.distrusted.Add(1)
	} else {
		p.distrusted.Add(-1)
	}
	return p.commitOps([]op{{layerKey(l.id), l.record().encode()}})
}

// forgetLayer is for one that is not there any more. Pool.mu is held.
func (p *Pool) forgetLayer(l *chain) {
	delete(p.layers, l.id)
	if l.damaged.Load() {
		p.distrusted.Add(-1)
	}
}

// Damaged are the replicas and snapshots that have bytes in a layer of which a scrub found some not to be what was written.
// Reads of just these fail.
func (p *Pool) Damaged() (map[volume.ReplicaID]bool, map[volume.SnapshotID]bool) {
	replicas, snapshots := map[volume.ReplicaID]bool{}, map[volume.SnapshotID]bool{}
	if p.distrusted.Load() == 0 {
		return replicas, snapshots
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	in := func(l *chain) bool {
		for ; l != nil; l = l.parent.Load() {
			if l.damaged.Load() {
				return true
			}
		}
		return false
	}
	for id, r := range p.replicas {
		if in(r.head.Load()) {
			replicas[id] = true
		}
	}
	for id, s := range p.snapshots {
		if in(s.layer) {
			snapshots[id] = true
		}
	}
	return replicas, snapshots
}

// verifyRead compares with their checksums the extents of damaged layers that a read takes blocks from. One that differs fails
// the read: an engine asks another replica then, rather than hand out what nobody wrote. The caller is in the grace period.
func (p *Pool) verifyRead(head *chain, off, n int64) error {
	for end := off + n; off < end; {
		k := min(end-off, layer.PageSpan-off%layer.PageSpan)
		idx, _ := place(off)
		for l := head; l != nil; l = l.parent.Load() {
			if !l.damaged.Load() || !l.pages.has(idx) {
				continue
			}
			seen, err := p.seenOf(head, l, off, k)
			if err != nil {
				return err
			}
			if err := p.verifyExtents(l, idx, seen); err != nil {
				return err
			}
		}
		off += k
	}
	return nil
}

// seenOf are the blocks of a layer's page that a read within the page comes down to, by extent.
func (p *Pool) seenOf(head, l *chain, off, n int64) (seen [layer.ExtentsPerPage]layer.Mask, err error) {
	st, pages, exclusive, err := p.lockChain(head, l, off, n, nil)
	if err != nil {
		return seen, err
	}
	defer st.unlock(exclusive)
	var want need
	want.set(off, n)
	for _, pg := range pages {
		want.met(pg)
	}
	return want.want, nil
}

func (p *Pool) verifyExtents(l *chain, idx uint32, seen [layer.ExtentsPerPage]layer.Mask) error {
	e, ok, err := p.copyOf(l, idx)
	if !ok || err != nil {
		return err
	}
	crcs, err := p.sumsOf(l, idx, &e)
	if crcs == nil || err != nil {
		return err
	}
	buf := disk.Aligned(layer.ExtentSize)
	for i, x := range e {
		if x.Slot == 0 {
			continue
		}
		crc := crcs[0]
		if crcs = crcs[1:]; x.Data&seen[i] == 0 {
			continue
		}
		c, err := extentSum(p.file, x, buf)
		if err == nil && c != crc {
			err = errChecksum
		}
		if err != nil {
			return fmt.Errorf("layer %d, offset %d: %w", l.id, int64(idx)*layer.PageSpan+int64(i)*layer.ExtentSize, err)
		}
	}
	return nil
}
