// Package history checks what a client of a block device saw: every read must have an explanation by the writes and
// flushes around it, across crashes of the client.
//
// Each block is a register of its own (linearizability is local: Herlihy and Wing, 1990), checked with porcupine. A crash
// ends every operation under way: a write that was not answered has taken effect before the crash or never does. What is
// left is the value last flushed or any one written since; once it was read it stays.
package history

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// Value is what a block holds; 0 is a block never written, or discarded.
type Value uint64

type kind uint8

const (
	write kind = iota
	read
	flush
	crash
)

type input struct {
	kind  kind
	block int
	value Value // of a write
}

// state is what a block may hold: now, and after a crash.
type state struct {
	now Value
	// left are the values that a crash may leave: the one last flushed and those written since, in order.
	left []Value
}

// History records operations. Its methods may be called at once.
type History struct {
	first []Value // what the blocks hold at first, by flush
	begin time.Time

	mu   sync.Mutex
	open map[int]*call
	// cut are the reads and flushes that a crash ended. An answer may still be on its way, of what was before the crash.
	cut  map[int]*call
	next int
	done []porcupine.Operation
}

type call struct {
	in    input
	start int64
	crash int64 // when a crash ended it
}

// New returns the empty history of a device with so many blocks, all of them never written.
func New(blocks int) *History { return From(make([]Value, blocks)) }

// From returns the empty history of a device whose blocks hold these values, flushed: what comes after a history that ended
// with a flush and a read of each block, with nothing under way.
func From(values []Value) *History {
	return &History{first: slices.Clone(values), begin: time.Now(), open: map[int]*call{}, cut: map[int]*call{}}
}

func (h *History) now() int64 { return int64(time.Since(h.begin)) }

func (h *History) start(in input) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	h.open[h.next] = &call{in: in, start: h.now()}
	return h.next
}

func (h *History) end(id int, out Value, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.cut[id]; c != nil {
		if delete(h.cut, id); ok {
			h.add(id, c, out, c.crash)
		}
		return
	}
	c := h.open[id]
	if c == nil {
		return // a write that a crash ended
	}
	if !ok && c.in.kind == write {
		return // it may still take effect, until the next crash
	}
	delete(h.open, id)
	if ok {
		h.add(id, c, out, h.now())
	}
}

// add records an operation that is known to have taken effect by a time, or may have.
func (h *History) add(id int, c *call, out Value, by int64) {
	if c.in.kind == flush || c.in.kind == crash {
		for b := range h.first {
			in := c.in
			in.block = b
			h.done = append(h.done, porcupine.Operation{ClientId: id, Input: in, Call: c.start, Output: out, Return: by})
		}
		return
	}
	h.done = append(h.done, porcupine.Operation{ClientId: id, Input: c.in, Call: c.start, Output: out, Return: by})
}

// Write is called before a write of a value that no other write has, or of 0, which a discard leaves too; the function that
// it returns after it, with whether it succeeded.
func (h *History) Write(block int, v Value) (ended func(ok bool)) {
	id := h.start(input{kind: write, block: block, value: v})
	return func(ok bool) { h.end(id, 0, ok) }
}

// Read is likewise; it is told what was read.
func (h *History) Read(block int) (ended func(v Value, ok bool)) {
	id := h.start(input{kind: read, block: block})
	return func(v Value, ok bool) { h.end(id, v, ok) }
}

// Flush covers the writes that ended before it.
func (h *History) Flush() (ended func(ok bool)) {
	id := h.start(input{kind: flush})
	return func(ok bool) { h.end(id, 0, ok) }
}

// Crash says that the client is gone: nothing of what is under way takes effect from now on. It is called when the next
// client has been given the device, before that one's first operation.
func (h *History) Crash() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	for id, c := range h.open {
		if c.in.kind == write {
			h.add(id, c, maybe, now)
		} else {
			c.crash = now
			h.cut[id] = c
		}
		delete(h.open, id)
	}
	h.next++
	h.add(h.next, &call{in: input{kind: crash}, start: now + 1}, 0, now+2)
}

// maybe is the output of a write that was not answered.
const maybe Value = 1

// Operations is how many have been recorded.
func (h *History) Operations() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.done)
}

// limit bounds the check of one history.
const limit = 2 * time.Minute

// Check returns an error that names the first block whose reads cannot be explained, with its operations.
func (h *History) Check() error {
	h.mu.Lock()
	ops := slices.Clone(h.done)
	for id, c := range h.open { // nobody crashed: they may take effect
		if c.in.kind == write {
			ops = append(ops, porcupine.Operation{ClientId: id, Input: c.in, Call: c.start, Output: maybe, Return: h.now()})
		}
	}
	h.mu.Unlock()
	byBlock := map[int][]porcupine.Operation{}
	for _, o := range ops {
		b := o.Input.(input).block
		byBlock[b] = append(byBlock[b], o)
	}
	for b, v := range h.first {
		switch porcupine.CheckOperationsTimeout(register(v), byBlock[b], limit) {
		case porcupine.Illegal:
			return fmt.Errorf("block %d: what was read cannot be explained:\n%s", b, describe(byBlock[b]))
		case porcupine.Unknown:
			return fmt.Errorf("block %d: %d operations could not be checked within %s", b, len(byBlock[b]), limit)
		}
	}
	return nil
}

// register is the model of a block that holds a value at first.
func register(first Value) porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{state{now: first, left: []Value{first}}} },
		Step: step,
		Equal: func(a, b any) bool {
			x, y := a.(state), b.(state)
			return x.now == y.now && slices.Equal(x.left, y.left)
		},
		DescribeOperation: func(in, out any) string { return text(in.(input), out.(Value)) },
	}).ToModel()
}

func step(s, in, out any) []any {
	old, i := s.(state), in.(input)
	switch i.kind {
	case write:
		took := state{now: i.value, left: append(slices.Clone(old.left), i.value)}
		if out.(Value) == maybe {
			return []any{took, old}
		}
		return []any{took}
	case read:
		if out.(Value) != old.now {
			return nil
		}
		return []any{old}
	case flush:
		return []any{state{now: old.now, left: []Value{old.now}}}
	default:
		var next []any
		for _, v := range old.left {
			next = append(next, state{now: v, left: []Value{v}})
		}
		return next
	}
}

func text(in input, out Value) string {
	switch in.kind {
	case write:
		if out == maybe {
			return fmt.Sprintf("write %d, not answered", in.value)
		}
		return fmt.Sprintf("write %d", in.value)
	case read:
		return fmt.Sprintf("read %d", out)
	case flush:
		return "flush"
	}
	return "crash"
}

// describe lists a block's last operations.
func describe(ops []porcupine.Operation) string {
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	var s string
	for _, o := range ops[max(0, len(ops)-200):] {
		s += fmt.Sprintf("  %12s … %12s  %s\n", time.Duration(o.Call), time.Duration(o.Return), text(o.Input.(input), o.Output.(Value)))
	}
	return s
}
