package replication

// reconcile is a region that is being made identical on all members.
type reconcile struct {
	region  uint32
	left    int // copies
	retryAt Now // after a failure
}

// maxSweep bounds the regions that the sweeper reconciles at once, beside those that the client waits for.
const maxSweep = 4

// reconcileFirst begins to reconcile the dirty ones of regions [from, to), because the client waits for them.
func (e *Engine) reconcileFirst(from, to uint32) {
	for i, ok := e.dirty.Next(from); ok && i < to; i, ok = e.dirty.Next(i + 1) {
		e.reconcile(i)
	}
}

// reconcileProgress sweeps what nobody asks for.
func (e *Engine) reconcileProgress() {
	if e.phase != phaseLive || e.dirty.Empty() || e.barrier != nil && e.barrier.holds() {
		return
	}
	running := 0 // what failed and waits for its next attempt keeps nobody out
	for _, r := range e.recon {
		if r.left > 0 {
			running++
		}
	}
	for i, ok := e.dirty.Next(0); ok && running < maxSweep; i, ok = e.dirty.Next(i + 1) {
		if e.reconcile(i) {
			running++
		}
	}
}

// reconcile copies a region from one member to all others. Which member is the source does not matter: each has a value
// that the client may see, until one has been seen. It tells whether it has begun.
func (e *Engine) reconcile(i uint32) bool {
	r := e.recon[i]
	if r != nil && (r.left > 0 || e.now < r.retryAt) {
		return false
	}
	r = &reconcile{region: i}
	e.recon[i] = r
	from := int64(i) * e.g.Region
	to := min(from+e.g.Region, e.size)
	var ops []*op
	for off := from; off < to; off += e.g.MaxCopy {
		o := e.newOp(opCopy, off, min(e.g.MaxCopy, to-off))
		o.unit = r
		ops = append(ops, o)
	}
	if r.left = len(ops); r.left == 0 {
		e.reconciled(r)
	}
	for _, o := range ops {
		e.admit(o)
	}
	return true
}

func (e *Engine) reconciled(r *reconcile) {
	delete(e.recon, r.region)
	if e.dirty.Remove(r.region) {
		e.active.touch(r.region, e.flush.round, e.now)
		if e.dirty.Empty() {
			e.flush.wanted = true
		}
	}
	e.retry = true
}

// startCopyWrite sends what a copy has read to those who are to have it.
func (e *Engine) startCopyWrite(o *op) {
	if o.fill != nil {
		if o.fill.dead {
			e.recheck = true
			return
		}
		o.want = PeerSet(0).With(o.fill.m.slot)
	} else {
		o.want = e.isr &^ (1 << o.src)
	}
	if o.reads {
		e.unlock(o, o.next)
	}
	o.acked, o.sent = 0, 0
	e.sending(o)
	e.sendAll(o)
	if o.want == 0 {
		e.recheck = true
	}
}

// settleCopy ends a copy that everyone who is to have it has.
func (e *Engine) settleCopy(o *op) {
	if o.stage != copyWriting {
		return
	}
	if o.fill != nil {
		if o.acked.Has(o.fill.m.slot) {
			e.filled(o)
			e.finish(o)
		}
		return
	}
	if o.want&e.isr&^o.acked != 0 {
		return
	}
	r := o.unit
	e.finish(o)
	if r.left--; r.left == 0 && r.retryAt == 0 {
		e.reconciled(r)
	}
}

// copyFailed is called for a copy that no member could read; the caller ends it.
func (e *Engine) copyFailed(o *op) {
	if o.fill != nil {
		e.dropTarget(o.fill.m)
		return
	}
	o.unit.left--
	o.unit.retryAt = e.now + Second
	e.retryAt = min(e.retryAt, o.unit.retryAt)
}
