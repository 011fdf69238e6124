package replication

// call is a request whose store operation is under way.
type call struct {
	id   uint64
	req  Message
	op   StoreOp
	wait int // regions whose mark is awaited before op may be emitted
	// then is called instead of an answer when op ended well.
	then func(StoreResult)
	busy bool
	// internal calls belong to no request.
	internal bool
}

// callTable finds calls by number without searching: the low half of a number is an index.
type callTable struct {
	all  []*call
	free []uint32
	gen  uint64
	// running is the number of requests' calls emitted and not ended.
	running int
}

func (t *callTable) add() *call {
	var i uint32
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
	} else {
		i = uint32(len(t.all))
		t.all = append(t.all, &call{})
	}
	t.gen++
	c := t.all[i]
	c.id, c.busy = t.gen<<32|uint64(i), true
	return c
}

func (t *callTable) get(id uint64) *call {
	i := id & (1<<32 - 1)
	if i >= uint64(len(t.all)) || !t.all[i].busy || t.all[i].id != id {
		return nil
	}
	return t.all[i]
}

func (t *callTable) remove(c *call) {
	t.free = append(t.free, uint32(c.id))
	*c = call{}
}

// store begins a request's store operation.
func (r *Replica) store(m *Message, op StoreOp) {
	c := r.calls.add()
	c.req, c.op = *m, op
	r.emit(c)
}

// storeThen begins a store operation after which f goes on.
func (r *Replica) storeThen(m *Message, op StoreOp, f func(StoreResult)) {
	c := r.calls.add()
	c.req, c.op, c.then = *m, op, f
	r.emit(c)
}

// emit is the point of execution: what was fenced since it was admitted ends here.
func (r *Replica) emit(c *call) {
	current := c.req.Epoch == r.st.Epoch && (c.req.Session == r.session || r.cfg.Rules.WithoutSessionCheck)
	if !current && !r.cfg.Rules.WithoutFenceAtExecution {
		r.answer(&c.req, StatusStaleSession)
		r.calls.remove(c)
		return
	}
	c.op.ID = c.id
	r.calls.running++
	r.out = append(r.out, ReplicaEffect{Store: c.op})
}

// emitInternal runs an operation that belongs to no request: a fence need not wait for it.
func (r *Replica) emitInternal(op StoreOp, f func(StoreResult)) {
	c := r.calls.add()
	c.op, c.then, c.internal = op, f, true
	c.op.ID = c.id
	r.out = append(r.out, ReplicaEffect{Store: c.op})
}

// Done tells that the store operation id ended.
func (r *Replica) Done(now Now, id uint64, res StoreResult) {
	r.now = now
	c := r.calls.get(id)
	if c == nil {
		return
	}
	if !c.internal {
		r.calls.running--
	}
	if c.then != nil {
		f := c.then
		r.calls.remove(c)
		f(res)
	} else {
		r.ended(c, res)
		r.calls.remove(c)
	}
	r.fenceProgress()
}

func (r *Replica) ended(c *call, res StoreResult) {
	m := &c.req
	st := res.Status
	switch c.op.Kind {
	case StoreWrite, StoreZero:
		if st == StatusIO && c.op.FUA && !r.cfg.Rules.WithoutPoison {
			r.poison() // it may have been the sync: the kernel reports a failed one once
		}
	case StoreSync, StoreSeal:
		if st == StatusIO && !r.cfg.Rules.WithoutPoison {
			r.poison()
		}
		if st == StatusOK && c.op.Kind == StoreSeal {
			r.sealed(m.Seal)
		}
	case StoreResize:
		if st == StatusOK {
			r.size = max(r.size, c.op.Len)
		}
	}
	if r.poisoned {
		st = StatusPoisoned
	}
	r.answer(m, st)
	if c.op.Kind == StoreSeal {
		defer r.nextSeal()
	}
	if st == StatusOK {
		a := &r.out[len(r.out)-1].Msg
		a.Data, a.Hole, a.Set = res.Data, res.Hole, res.Set
	}
}

// poison ends this life of the replica: what the kernel dropped after a failed sync cannot be known.
func (r *Replica) poison() {
	if r.poisoned {
		return
	}
	r.poisoned = true
	r.st.Poisoned = true
	r.save(func(bool) {}) // if even this fails, the restart gives itself away by its boot id
}

// persister makes states durable one after another, and tells each waiter when one that has its change is.
type persister struct {
	wanted, running, done uint64 // numbers of states
	waiters               []persistWaiter
}

type persistWaiter struct {
	number uint64
	f      func(ok bool)
}

// save makes st durable as it is now, then calls f.
func (r *Replica) save(f func(ok bool)) {
	p := &r.persist
	p.wanted++
	p.waiters = append(p.waiters, persistWaiter{number: p.wanted, f: f})
	r.saveNext()
}

func (r *Replica) saveNext() {
	p := &r.persist
	if p.running > p.done || p.wanted == p.done {
		return
	}
	p.running = p.wanted
	r.emitInternal(StoreOp{Kind: StorePersist, State: r.st.encode()}, func(res StoreResult) {
		p.done = p.running
		r.saved = res.Status == StatusOK
		var due []persistWaiter
		rest := p.waiters[:0]
		for _, w := range p.waiters {
			if w.number <= p.done {
				due = append(due, w)
			} else {
				rest = append(rest, w)
			}
		}
		p.waiters = rest
		for _, w := range due {
			w.f(res.Status == StatusOK)
		}
		r.saveNext()
	})
}

// window tells apart what was delivered before, among the last windowSize requests of a session.
type window struct {
	bits [windowSize / 64]uint64
	max  uint64
}

const windowSize = 4096

// first tells whether seq is new. What is too old to be told is taken for old.
func (w *window) first(seq uint64) bool {
	if seq > w.max {
		if seq-w.max >= windowSize {
			w.bits = [windowSize / 64]uint64{}
		} else {
			for s := w.max + 1; s < seq; s++ {
				w.bits[s/64%(windowSize/64)] &^= 1 << (s % 64)
			}
		}
		w.max = seq
		w.bits[seq/64%(windowSize/64)] |= 1 << (seq % 64)
		return true
	}
	if w.max-seq >= windowSize {
		return false
	}
	b := &w.bits[seq/64%(windowSize/64)]
	if *b>>(seq%64)&1 == 1 {
		return false
	}
	*b |= 1 << (seq % 64)
	return true
}
