package extentstore

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// groupRegions is how many regions a record of the write-intent log has.
	groupRegions = 512
	// regionSize is what a region is, in bytes.
	regionSize  = 1 << 20
	maxWILGroup = uint32(volume.MaxSize/regionSize/groupRegions) - 1
	// maxMarked bounds the regions of one write-intent log. The protocol keeps to half of it.
	maxMarked = 64 << 10
)

// wilGroup is one record of a write-intent log. All fields are guarded by the journal's mu.
type wilGroup struct {
	l   *journal
	idx uint32
	// bits are the log as it is to be; stored are those that a crash keeps for sure, whatever commit is under way.
	bits, stored [groupRegions / 64]uint64
	uses         int // rounds that will store it
}

// wilCommits joins marks: those that come while a commit is under way share the next.
type wilCommits struct {
	mu     sync.Mutex
	open   *wilRound   // what newcomers join
	lazy   []*wilGroup // changed, and not in a hurry
	commit sync.Mutex  // held while a round commits: records are stored in the order of their copies
}

type wilRound struct {
	groups []*wilGroup
	done   chan struct{}
	err    error
}

// WIL is the write-intent log.
func (h *Replica) WIL() []region.Run {
	l := h.log
	l.mu.Lock()
	defer l.mu.Unlock()
	var set region.Set
	for _, g := range l.groups {
		for i, w := range g.bits {
			for ; w != 0; w &= w - 1 {
				set.Add(g.idx*groupRegions + uint32(i*64+bits.TrailingZeros64(w)))
			}
		}
	}
	runs, _, _ := set.Runs(0, maxMarked)
	return runs
}

// MarkWIL puts regions into the write-intent log, durably. Those that are in it cost nothing.
func (h *Replica) MarkWIL(ctx context.Context, regions []region.Run) error {
	if err := checkRuns(regions, volume.MaxSize/regionSize); err != nil {
		return err
	}
	if err := h.begin(ctx); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	l.mu.Lock()
	more := l.marked
	for _, run := range regions {
		more += int(run.N)
	}
	if more > maxMarked {
		l.mu.Unlock()
		return fmt.Errorf("write-intent log of more than %d regions: %w", maxMarked, volume.ErrOutOfRange)
	}
	var need []*wilGroup
	for _, run := range regions {
		for i := run.First; i < run.End(); i++ {
			g := l.group(i / groupRegions)
			w, bit := i%groupRegions/64, uint64(1)<<(i%64)
			if g.bits[w]&bit == 0 {
				g.bits[w] |= bit
				l.marked++
			}
			if g.stored[w]&bit == 0 && !slices.Contains(need[max(0, len(need)-1):], g) {
				need = append(need, g)
				g.uses++
			}
		}
	}
	l.mu.Unlock()
	if len(need) == 0 {
		return nil
	}
	return h.r.p.commitWIL(need)
}

// group finds or makes a record. mu is held.
func (l *journal) group(idx uint32) *wilGroup {
	g := l.groups[idx]
	if g == nil {
		g = &wilGroup{l: l, idx: idx}
		l.groups[idx] = g
	}
	return g
}

// ClearWIL takes regions out of the write-intent log. After a crash they may be in it again.
func (h *Replica) ClearWIL(ctx context.Context, regions []region.Run) error {
	if err := checkRuns(regions, volume.MaxSize/regionSize); err != nil {
		return err
	}
	if err := h.enter(0, 0); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	l.mu.Lock()
	var lazy []*wilGroup
	for _, run := range regions {
		for i := run.First; i < run.End(); i++ {
			g := l.groups[i/groupRegions]
			w, bit := i%groupRegions/64, uint64(1)<<(i%64)
			if g == nil {
				i |= groupRegions - 1
			} else if g.bits[w]&bit != 0 {
				g.bits[w] &^= bit
				l.marked--
				if !slices.Contains(lazy[max(0, len(lazy)-1):], g) {
					lazy = append(lazy, g)
					g.uses++
				}
			}
		}
	}
	l.mu.Unlock()
	c := &l.p.wil
	c.mu.Lock()
	c.lazy = append(c.lazy, lazy...)
	c.mu.Unlock()
	return nil
}

// commitWIL stores groups, each of which was counted in uses, together with those that others want stored.
func (p *Pool) commitWIL(groups []*wilGroup) error {
	c := &p.wil
	c.mu.Lock()
	r := c.open
	first := r == nil
	if first {
		r = &wilRound{done: make(chan struct{})}
		c.open = r
	}
	r.groups = append(r.groups, groups...)
	c.mu.Unlock()
	if !first {
		<-r.done
		return r.err
	}
	c.commit.Lock()
	c.mu.Lock()
	c.open = nil
	r.groups = append(r.groups, c.lazy...)
	c.lazy = nil
	c.mu.Unlock()
	r.err = p.storeWIL(r.groups)
	c.commit.Unlock()
	close(r.done)
	return r.err
}

func (p *Pool) storeWIL(groups []*wilGroup) error {
	type copied [groupRegions / 64]uint64
	values := make(map[*wilGroup]copied, len(groups))
	var units [][]op
	for _, g := range groups {
		if _, ok := values[g]; ok {
			continue
		}
		g.l.mu.Lock()
		v := g.bits
		for i := range v {
			if !p.opts.broken.clearStaysStored {
				g.stored[i] &= v[i] // what is about to be taken out is not to be relied on
			}
		}
		g.l.mu.Unlock()
		values[g] = v
		o := op{key: journalKey(keyWIL, g.l.id, g.idx)}
		if v != (copied{}) {
			o.val = encodeWords(v[:])
		}
		units = append(units, []op{o})
	}
	if !p.opts.broken.markBeforeCommit {
		if err := p.store(units); err != nil {
			return err
		}
	}
	for _, g := range groups {
		g.l.mu.Lock()
		g.stored = values[g]
		if g.uses--; g.uses == 0 && g.bits == (copied{}) && g.stored == (copied{}) {
			delete(g.l.groups, g.idx)
		}
		g.l.mu.Unlock()
	}
	return nil
}

// settleWIL stores what was cleared and nobody has stored since.
func (p *Pool) settleWIL() {
	p.wil.mu.Lock()
	n := len(p.wil.lazy)
	p.wil.mu.Unlock()
	if n > 0 && p.failure() == nil && p.keepRoom() {
		_ = p.commitWIL(nil) // an error has stopped the pool
	}
}

// dropLazy forgets what of a journal is not in a hurry, and waits for a round that has it.
func (p *Pool) dropLazy(l *journal) {
	c := &p.wil
	c.commit.Lock()
	defer c.commit.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lazy = slices.DeleteFunc(c.lazy, func(g *wilGroup) bool { return g.l == l })
}

// checkRuns refuses what is not a list of ordered, disjoint runs of members below end.
func checkRuns(runs []region.Run, end int64) error {
	from := uint32(0)
	for _, r := range runs {
		if !r.Valid() || r.First < from || int64(r.End()) > end {
			return fmt.Errorf("run %d+%d: %w", r.First, r.N, volume.ErrOutOfRange)
		}
		from = r.End()
	}
	return nil
}

func count(words []uint64) (n int) {
	for _, w := range words {
		n += bits.OnesCount64(w)
	}
	return n
}
