package replication

type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opZero
	opCopy // read at one replica, written to others
	opHash // digests of two replicas compared
)

// changes tells whether bytes are written.
func (k opKind) changes() bool { return k == opWrite || k == opZero || k == opCopy }

// op is an operation that holds, or awaits, a range lock; or one that awaits its admission.
type op struct {
	kind   opKind
	fua    bool
	shared bool
	// unlocked ops keep nobody out.
	unlocked, started, answered, hole bool
	// reads: the lock is given back when the source has been read.
	reads bool
	// busy: the client is, or was, told to leave the data alone. doomed: no member could read it. lent: a member was given
	// the client's memory to read to.
	busy, doomed, lent bool

	tag    uint64
	off, n int64
	data   []byte
	from   int64 // range lock, whole blocks
	to     int64

	// conflicts is the number of earlier ops whose locks it awaits.
	conflicts int
	// want are those it goes to; sent those of them that were sent it in their session and did not answer; acked those that
	// carried it out; bad those that failed to read it.
	want, sent, acked, bad PeerSet

	// Of a copy or a comparison: read from src first; then done is told whether it came about.
	src     Slot
	stage   copyStage
	digests [2][]byte
	fill    *resync
	probe   bool // a comparison that decides whether to copy
	unit    *reconcile

	prev, next *op
}

type copyStage uint8

const (
	copyReading copyStage = iota
	copyWriting
)

func (o *op) client() bool { return o.kind <= opZero }

// opList is in order of arrival.
type opList struct {
	first, last *op
	n           int
}

func (l *opList) push(o *op) {
	o.prev, o.next = l.last, nil
	if l.last != nil {
		l.last.next = o
	} else {
		l.first = o
	}
	l.last = o
	l.n++
}

func (l *opList) remove(o *op) {
	if o.prev != nil {
		o.prev.next = o.next
	} else {
		l.first = o.next
	}
	if o.next != nil {
		o.next.prev = o.prev
	} else {
		l.last = o.prev
	}
	l.n--
}

func (e *Engine) newOp(kind opKind, off, n int64) *op {
	o := e.free
	if o == nil {
		o = &op{}
	} else {
		e.free = o.next
	}
	*o = op{kind: kind, off: off, n: n, from: off - off%e.g.Block, to: off + n + (e.g.Block-(off+n)%e.g.Block)%e.g.Block,
		shared: kind == opRead || kind == opHash}
	return o
}

func (e *Engine) freeOp(o *op) {
	*o = op{next: e.free}
	e.free = o
}

// admit locks the range, and starts the operation when it has the lock.
func (e *Engine) admit(o *op) {
	if o.kind.changes() && o.fill == nil && !e.unlogged {
		from, to := e.g.regions(o.off, o.n)
		before := len(e.active.all)
		for i := from; i < to; i++ {
			e.active.touch(i, e.flush.round, e.now)
		}
		if n := len(e.active.all); n > before && n > e.g.MaxActive*3/4 && !e.flush.running {
			e.flush.wanted = true // before it is full
		}
	}
	if !o.unlocked && !e.cfg.Rules.WithoutRangeLock {
		for p := e.ops.first; p != nil; p = p.next {
			if o.awaits(p) {
				o.conflicts++
			}
		}
	}
	e.ops.push(o)
	if o.conflicts == 0 {
		e.start(o)
	}
}

// awaits tells whether o must wait for the earlier p.
func (o *op) awaits(p *op) bool {
	return o.from < p.to && p.from < o.to && !(o.shared && p.shared) && !p.unlocked && !o.unlocked
}

// finish unlocks the range and lets go whoever waited.
func (e *Engine) finish(o *op) {
	if o.sent != 0 {
		e.forget(o)
	}
	if rs := o.fill; rs != nil {
		rs.ops--
		e.copying -= o.n
	}
	if e.active.starved {
		e.retry = true // it may have been the last in a region that can be cleared now
	}
	next := o.next
	e.ops.remove(o)
	e.unlock(o, next)
	e.freeOp(o)
}

// unlock lets go whoever of those from p on awaited o.
func (e *Engine) unlock(o, p *op) {
	for p != nil {
		after := p.next
		if p.conflicts > 0 && p.awaits(o) {
			if p.conflicts--; p.conflicts == 0 {
				e.start(p)
			}
		}
		p = after
	}
	o.unlocked = true
}
