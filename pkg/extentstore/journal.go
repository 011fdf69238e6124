package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// journal is what the replication protocol keeps with a replica: its state, the write-intent log, and what absent peers
// missed. It is in memory while the replica is open. One that the protocol does not use has no keys and costs nothing.
type journal struct {
	p  *Pool
	id uint64 // in keys; never that of another replica of the pool

	stating sync.Mutex // one SetState at a time

	mu      sync.Mutex // a small lock: nothing else is taken under it
	state   []byte
	groups  map[uint32]*wilGroup
	marked  int // regions in the write-intent log
	peers   map[volume.ReplicaID]*missed
	nextNo  uint32
	dirty   []*missedPage
	dropped []uint32 // numbers of peers whose record is to be deleted
	// noted counts what changed in missed; saved is its value that is known to be durable.
	noted, saved atomic.Uint64
}

// journalKey is the key of a record of a journal: of what kind, of which journal, and numbers that depend on the kind.
func journalKey(kind byte, id uint64, numbers ...uint32) []byte {
	b := binary.BigEndian.AppendUint64(append(make([]byte, 0, 17), kind), id)
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

// parseJournalKey returns the numbers of a key that should have n of them; n is at most 2.
func parseJournalKey(b []byte, n int) (id uint64, numbers [2]uint32, ok bool) {
	if len(b) != 9+4*n {
		return 0, numbers, false
	}
	for i := range n {
		numbers[i] = binary.BigEndian.Uint32(b[9+4*i:])
	}
	return binary.BigEndian.Uint64(b[1:]), numbers, true
}

// journalKinds are the kinds of a journal's records, with how many numbers a key has.
var journalKinds = []struct {
	kind    byte
	numbers int
}{{keyState, 0}, {keyWIL, 1}, {keyPeer, 1}, {keyMissed, 2}, {keyFlushed, 0}}

// loadJournal reads all but what was missed, of which it only notes what there is.
func (p *Pool) loadJournal(id uint64) (*journal, error) {
	l := &journal{p: p, id: id, groups: map[uint32]*wilGroup{}, peers: map[volume.ReplicaID]*missed{}}
	b, err := p.kv.Get(journalKey(keyState, id))
	if err != nil {
		return nil, err
	}
	if b != nil {
		if l.state, err = decodeState(b); err != nil {
			return nil, err
		}
	}
	err = p.kv.Scan(journalKey(keyWIL, id), func(k, v []byte) error {
		_, n, ok := parseJournalKey(k, 1)
		g := &wilGroup{l: l, idx: n[0]}
		err := decodeWords("the write-intent log", v, g.stored[:])
		if !ok || n[0] > maxWILGroup || err != nil {
			return errors.Join(err, badKey(k))
		}
		g.bits = g.stored
		l.groups[g.idx] = g
		l.marked += count(g.bits[:])
		return nil
	})
	if err != nil {
		return nil, err
	}
	byNo := map[uint32]*missed{}
	err = p.kv.Scan(journalKey(keyPeer, id), func(k, v []byte) error {
		_, n, ok := parseJournalKey(k, 1)
		tag, err := decodePeer(v)
		if !ok || err != nil || l.peers[tag.Peer] != nil {
			return errors.Join(err, badKey(k))
		}
		m := &missed{no: n[0], tag: tag, pages: map[uint32]*missedPage{}}
		l.peers[tag.Peer], byNo[m.no] = m, m
		l.nextNo = max(l.nextNo, m.no+1)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return l, p.kv.Scan(journalKey(keyMissed, id), func(k, _ []byte) error {
		_, n, ok := parseJournalKey(k, 2)
		if !ok || n[1] > maxMissedPage {
			return badKey(k)
		}
		l.nextNo = max(l.nextNo, n[0]+1) // of one that was dropped, too: it may not be all gone yet
		if m := byNo[n[0]]; m != nil {
			m.has.add(n[1])
		}
		return nil
	})
}

// flush makes durable what was noted before it was called.
func (l *journal) flush() error {
	n := l.noted.Load()
	if l.saved.Load() >= n {
		return l.p.failure()
	}
	if err := l.p.flushAll(nil, []*journal{l}); err != nil {
		return err
	}
	raise(&l.saved, n)
	return nil
}

// raise sets a counter that never falls.
func raise(c *atomic.Uint64, n uint64) {
	for old := c.Load(); old < n && !c.CompareAndSwap(old, n); old = c.Load() {
	}
}

// State is the protocol's state as SetState made it durable last, nil where it never did. The caller does not change it.
func (h *Replica) State() []byte {
	l := h.log
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// SetState makes the protocol's state durable, which is at most replication.MaxState bytes; it goes with the replica.
func (h *Replica) SetState(ctx context.Context, state []byte) error {
	if len(state) > replication.MaxState {
		return fmt.Errorf("protocol state of %d bytes: %w", len(state), volume.ErrInvalid)
	}
	if err := h.begin(ctx); err != nil {
		return err
	}
	defer h.life.RUnlock()
	l := h.log
	l.stating.Lock()
	defer l.stating.Unlock()
	state = bytes.Clone(state)
	if !l.p.opts.broken.stateInMemory {
		if err := l.p.commitOps([]op{{journalKey(keyState, l.id), encodeState(state)}}); err != nil {
			return err
		}
	}
	l.mu.Lock()
	l.state = state
	l.mu.Unlock()
	return nil
}

// begin begins a request that commits: it waits while the database has no room.
func (h *Replica) begin(ctx context.Context) error {
	if err := h.enter(0, 0); err != nil {
		return err
	}
	err := errors.Join(ctx.Err(), h.r.p.failure())
	if err == nil {
		err = h.r.p.waitRoom(ctx)
	}
	if err != nil {
		h.life.RUnlock()
	}
	return err
}

// purge is what is left of a journal whose replica was deleted, or with all false, of one peer in it.
type purge struct {
	id  uint64
	all bool
	no  uint32
}

// purgeStep bounds the keys that are deleted at once.
const purgeStep = 4000

var errEnough = errors.New("enough")

// stepPurge deletes some keys; done tells that there was nothing to delete.
func (p *Pool) stepPurge() (done bool, err error) {
	p.mu.Lock()
	if len(p.purges) == 0 {
		p.mu.Unlock()
		return true, nil
	}
	next := p.purges[0]
	p.mu.Unlock()
	prefixes := [][]byte{journalKey(keyMissed, next.id, next.no)}
	if next.all {
		prefixes = nil
		for _, k := range journalKinds {
			prefixes = append(prefixes, journalKey(k.kind, next.id))
		}
	}
	var ops []op
	for _, prefix := range prefixes {
		err := p.kv.Scan(prefix, func(k, _ []byte) error {
			if len(ops) == purgeStep {
				return errEnough
			}
			ops = append(ops, op{key: bytes.Clone(k)})
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return false, err
		}
	}
	if len(ops) > 0 {
		if err := p.commitOps(ops); err != nil {
			return false, err
		}
	}
	if len(ops) < purgeStep {
		p.mu.Lock()
		p.purges = slices.Delete(p.purges, 0, 1)
		p.mu.Unlock()
	}
	return false, nil
}

// findPurges finds what a crash left of deletions: records of journals that no replica has, and of peers without a record.
func (p *Pool) findPurges() error {
	owners := map[uint64]bool{}
	for _, r := range p.replicas {
		owners[r.journal] = true
		p.nextLayer = max(p.nextLayer, r.journal)
	}
	peers, seen := map[purge]bool{}, map[purge]bool{}
	for _, kind := range journalKinds {
		err := p.kv.Scan([]byte{kind.kind}, func(k, _ []byte) error {
			id, n, ok := parseJournalKey(k, kind.numbers)
			if !ok {
				return badKey(k)
			}
			p.nextLayer = max(p.nextLayer, id)
			found := purge{id: id, all: true}
			if owners[id] {
				found = purge{id: id, no: n[0]}
				if kind.kind == keyPeer {
					peers[found] = true
				}
				if kind.kind != keyMissed || peers[found] {
					return nil
				}
			}
			if !seen[found] {
				seen[found] = true
				p.purges = append(p.purges, found)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
