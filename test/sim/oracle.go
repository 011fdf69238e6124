package sim

import (
	"fmt"
	"slices"
)

// write is one client operation that changes blocks: a write, a discard or a write of zeros. Its id is its index in
// oracle.writes; a written block carries the id as its content, so that whoever reads it knows where it came from.
type write struct {
	first, count int
	zero         bool
	start        int64 // logical time of the call
	end          int64 // of its acknowledgement or of its loss; 0 while it may still take effect
}

// never is the end of nothing: later than every logical time.
const never = int64(1) << 62

// block is what one block may hold. The sets are small: what is there in calm times is one element.
type block struct {
	// cur are the writes that a read starting now may return.
	cur []int32
	// base are the writes that a read may return after a crash of the client: the last flushed one and all newer ones.
	base []int32
}

// oracle knows what the bytes of one volume may be. It watches the client's calls and their answers only: what the
// replicas and engines believe does not matter to it.
type oracle struct {
	now    int64 // logical time: counts calls and answers
	writes []write
	blocks []block
}

func newOracle(blocks int) *oracle {
	o := &oracle{now: 1, writes: []write{{zero: true, start: 0, end: 1}}}
	o.grow(blocks)
	return o
}

// grow adds blocks of zeros.
func (o *oracle) grow(blocks int) {
	for len(o.blocks) < blocks {
		o.blocks = append(o.blocks, block{cur: []int32{0}, base: []int32{0}})
	}
	o.writes[0].count = len(o.blocks)
}

func (o *oracle) tick() int64 {
	o.now++
	return o.now
}

// begin records that the client calls for a write, and returns its id.
func (o *oracle) begin(first, count int, zero bool) int32 {
	id := int32(len(o.writes))
	o.writes = append(o.writes, write{first: first, count: count, zero: zero, start: o.tick()})
	for b := first; b < first+count; b++ {
		o.blocks[b].cur = append(o.blocks[b].cur, id)
		o.blocks[b].base = append(o.blocks[b].base, id)
	}
	return id
}

func (o *oracle) ended(id int32) int64 {
	if e := o.writes[id].end; e != 0 {
		return e
	}
	return never
}

// after keeps of set what may be the value when winner is known to have held at some moment not before since.
func (o *oracle) after(set []int32, winner int32, since int64) []int32 {
	return slices.DeleteFunc(set, func(x int32) bool { return x != winner && o.ended(x) <= since })
}

// acked records that a write was acknowledged; durable says that it was promised to survive (FUA).
func (o *oracle) acked(id int32, durable bool) {
	w := &o.writes[id]
	w.end = o.tick()
	for b := w.first; b < w.first+w.count; b++ {
		bl := &o.blocks[b]
		bl.cur = o.after(bl.cur, id, w.start)
		if durable {
			bl.base = o.after(bl.base, id, w.start)
		}
	}
}

// failed records that a write was answered with an error: it happened or not, but will not happen later.
func (o *oracle) failed(id int32) { o.writes[id].end = o.tick() }

// content is what a block holds after the write: its id, or 0 where it wrote zeros.
func (o *oracle) content(id int32) uint64 {
	if o.writes[id].zero {
		return 0
	}
	return uint64(id)
}

// view is what blocks may hold at one moment.
type view struct {
	at    int64
	first int
	sets  [][]int32
}

// look takes a view of count blocks.
func (o *oracle) look(first, count int) view {
	v := view{at: o.tick(), first: first, sets: make([][]int32, count)}
	n := 0
	for b := first; b < first+count; b++ {
		n += len(o.blocks[b].cur)
	}
	all := make([]int32, 0, n)
	for i := range v.sets {
		from := len(all)
		all = append(all, o.blocks[first+i].cur...)
		v.sets[i] = all[from:len(all):len(all)]
	}
	return v
}

// readDone checks a read that started with the view v and returned got, and learns from it.
func (o *oracle) readDone(v view, got []uint64) error {
	for i, c := range got {
		bl := &o.blocks[v.first+i]
		winner, matches := int32(-1), 0
		match := func(x int32) {
			if o.content(x) == c {
				winner = x
				matches++
			}
		}
		for _, x := range v.sets[i] {
			match(x)
		}
		for _, x := range bl.cur {
			if o.writes[x].start > v.at {
				match(x)
			}
		}
		// A write that began and was overwritten while the read ran is in neither set.
		if matches == 0 && c != 0 && int(c) < len(o.writes) && o.writes[c].start > v.at {
			winner, matches = int32(c), 1
		}
		if matches == 0 && c == 0 && o.zeroSince(v.first+i, v.at) {
			matches = 2
		}
		if matches == 0 {
			return fmt.Errorf("block %d returned %s, allowed were %s", v.first+i, o.name(c), o.names(v.sets[i]))
		}
		if matches == 1 {
			bl.cur = o.after(bl.cur, winner, v.at)
		}
	}
	return nil
}

// zeroSince tells whether a write of zeros to the block began after at.
func (o *oracle) zeroSince(b int, at int64) bool {
	for i := len(o.writes) - 1; i >= 0 && o.writes[i].start > at; i-- {
		if w := &o.writes[i]; w.zero && b >= w.first && b < w.first+w.count {
			return true
		}
	}
	return false
}

// flushDone learns that a flush which was called at the view v was acknowledged.
func (o *oracle) flushDone(v view) {
	o.tick()
	for i := range v.sets {
		bl := &o.blocks[v.first+i]
		bl.base = slices.DeleteFunc(bl.base, func(x int32) bool {
			return o.writes[x].start < v.at && !slices.Contains(v.sets[i], x)
		})
	}
}

// crash records that the client is gone and that a new one starts now: what was not flushed may be lost, and nothing of
// the old client happens any more.
func (o *oracle) crash() {
	now := o.tick()
	for i := range o.writes {
		if o.writes[i].end == 0 {
			o.writes[i].end = now
		}
	}
	for b := range o.blocks {
		bl := &o.blocks[b]
		bl.cur = append(bl.cur[:0], bl.base...)
	}
}

// allowedNow tells whether a replica's cache may hold c in block b.
func (o *oracle) allowedNow(b int, c uint64) bool { return o.in(o.blocks[b].cur, c) }

// allowedAfterCrash tells whether a replica may hold c in block b when all else is lost.
func (o *oracle) allowedAfterCrash(b int, c uint64) bool { return o.in(o.blocks[b].base, c) }

func (o *oracle) in(set []int32, c uint64) bool {
	for _, x := range set {
		if o.content(x) == c {
			return true
		}
	}
	return false
}

func (o *oracle) name(c uint64) string {
	if c == 0 {
		return "zeros"
	}
	return fmt.Sprintf("w%d", c)
}

func (o *oracle) names(set []int32) string {
	s := "{"
	for i, x := range set {
		if i > 0 {
			s += " "
		}
		s += fmt.Sprintf("w%d", x)
		if o.writes[x].zero {
			s += "(zeros)"
		}
	}
	return s + "}"
}

// ghost names a write that must never happen.
func (o *oracle) ghost(zero bool) int32 {
	id := int32(len(o.writes))
	now := o.tick()
	o.writes = append(o.writes, write{zero: zero, start: now, end: now})
	return id
}

// readLate checks a read of a client that was superseded while it ran.
func (o *oracle) readLate(v view, got []uint64) error {
	for i, c := range got {
		ok := o.in(v.sets[i], c) || c != 0 && int(c) < len(o.writes) && o.writes[c].start > v.at && o.writes[c].count > 0 ||
			c == 0 && o.zeroSince(v.first+i, v.at)
		if !ok {
			return fmt.Errorf("block %d returned %s, allowed were %s", v.first+i, o.name(c), o.names(v.sets[i]))
		}
	}
	return nil
}

// restart takes what a disk holds for the volume's bytes.
func (o *oracle) restart(cells []cell) {
	o.crash()
	for b := range o.blocks {
		var cur, base []int32
		if b < len(cells) {
			c := &cells[b]
			cur = append(cur, int32(c.cache))
			base = append(base, int32(c.cache))
			for _, x := range append([]written{{value: c.durable}}, c.unsynced...) {
				if id := int32(x.value); !slices.Contains(base, id) {
					base = append(base, id)
				}
			}
		} else {
			cur, base = []int32{0}, []int32{0}
		}
		// Until it is read, it may be any of them: the host may restart before that.
		o.blocks[b] = block{cur: append(cur[:0], base...), base: base}
	}
}
