package history

import "testing"

// Each case is what one client after another saw of one block, or of two.
func TestCheck(t *testing.T) {
	w := func(h *History, v Value) { h.Write(0, v)(true) }
	r := func(h *History, v Value) { h.Read(0)(v, true) }
	for _, tc := range []struct {
		name string
		run  func(h *History)
		ok   bool
	}{
		{"never written", func(h *History) { r(h, 0) }, true},
		{"reads what was written", func(h *History) { w(h, 1); r(h, 1); w(h, 2); r(h, 2) }, true},
		{"an acknowledged write is not seen", func(h *History) { w(h, 1); w(h, 2); r(h, 1) }, false},
		{"a value from nowhere", func(h *History) { w(h, 1); r(h, 7) }, false},
		{"unflushed is lost in a crash", func(h *History) { w(h, 1); h.Crash(); r(h, 0) }, true},
		{"unflushed survives a crash", func(h *History) { w(h, 1); h.Crash(); r(h, 1) }, true},
		{"flushed is lost in a crash", func(h *History) { w(h, 1); h.Flush()(true); h.Crash(); r(h, 0) }, false},
		{"an older unflushed value is left", func(h *History) {
			w(h, 1)
			h.Flush()(true)
			w(h, 2)
			w(h, 3)
			h.Crash()
			r(h, 2)
		}, true},
		{"a value from before the flush is back", func(h *History) { w(h, 1); w(h, 2); h.Flush()(true); h.Crash(); r(h, 1) }, false},
		{"a failed flush promises nothing", func(h *History) { w(h, 1); h.Flush()(false); h.Crash(); r(h, 0) }, true},
		{"what a crash left stays", func(h *History) { w(h, 1); h.Crash(); r(h, 0); r(h, 1) }, false},
		{"an unanswered write takes effect", func(h *History) { h.Write(0, 1); r(h, 0); r(h, 1) }, true},
		{"an unanswered write is undone", func(h *History) { h.Write(0, 1); r(h, 1); r(h, 0) }, false},
		{"an unanswered write takes effect after the crash", func(h *History) { h.Write(0, 1); h.Crash(); r(h, 0); r(h, 1) }, false},
		{"a write that failed takes effect later", func(h *History) { h.Write(0, 1)(false); r(h, 0); r(h, 1) }, true},
		{"a flush covers all blocks", func(h *History) {
			w(h, 1)
			h.Write(1, 9)(true)
			h.Flush()(true)
			h.Crash()
			r(h, 1)
			h.Read(1)(0, true)
		}, false},
		{"two crashes", func(h *History) {
			w(h, 1)
			h.Crash()
			r(h, 1)
			h.Crash()
			r(h, 0)
		}, false}, // what was read after a crash is settled: replicas were reconciled
		{"a discard reads as zeros", func(h *History) { w(h, 1); w(h, 0); r(h, 0) }, true},
		{"a discard does not reach a replica that is read", func(h *History) { w(h, 1); w(h, 0); r(h, 0); r(h, 1) }, false},
		{"what was discarded comes back with a crash", func(h *History) { w(h, 1); h.Flush()(true); w(h, 0); h.Crash(); r(h, 1) }, true},
		{"a flushed discard is undone by a crash", func(h *History) { w(h, 1); w(h, 0); h.Flush()(true); h.Crash(); r(h, 1) }, false},
		{"a write of before a discard is undone", func(h *History) { w(h, 1); h.Flush()(true); w(h, 2); w(h, 0); r(h, 1) }, false},
		{"a read of another block's value", func(h *History) { w(h, 1); h.Write(1, 2)(true); r(h, 2) }, false},
		{"a write goes to another block", func(h *History) { w(h, 1); r(h, 1); h.Read(1)(1, true) }, false},
		{"a stale read by the old client after a new one wrote", func(h *History) {
			w(h, 1)
			h.Flush()(true)
			h.Crash()
			w(h, 2)
			r(h, 1)
		}, false},
		{"a read that failed promises nothing", func(h *History) { w(h, 1); h.Read(0)(7, false); r(h, 1) }, true},
		{"a read that is answered after the crash is of before", func(h *History) {
			w(h, 1)
			ended := h.Read(0)
			h.Crash()
			ended(1, true)
			r(h, 0)
		}, true},
		{"a read by the old client of what the new one wrote", func(h *History) {
			w(h, 1)
			ended := h.Read(0)
			h.Crash()
			w(h, 2)
			ended(2, true)
		}, false},
		{"a flush that is answered after the crash holds", func(h *History) {
			w(h, 1)
			ended := h.Flush()
			h.Crash()
			ended(true)
			r(h, 0)
		}, false},
		{"a flush that is never answered promises nothing", func(h *History) {
			w(h, 1)
			h.Flush()
			h.Crash()
			r(h, 0)
		}, true},
		{"concurrent writes in either order", func(h *History) {
			a, b := h.Write(0, 1), h.Write(0, 2)
			a(true)
			b(true)
			r(h, 1)
		}, true},
		{"concurrent writes in both orders", func(h *History) {
			a, b := h.Write(0, 1), h.Write(0, 2)
			a(true)
			b(true)
			r(h, 1)
			r(h, 2)
		}, false}, // replicas differ, and each is read once
		{"a write that is under way when the flush begins is not covered", func(h *History) {
			a := h.Write(0, 1)
			f := h.Flush()
			a(true)
			f(true)
			h.Crash()
			r(h, 0)
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := New(2)
			tc.run(h)
			if err := h.Check(); (err == nil) != tc.ok {
				t.Errorf("%v", err)
			}
		})
	}
}

// A history goes on from what another ended with.
func TestFrom(t *testing.T) {
	for _, tc := range []struct {
		name string
		run  func(h *History)
		ok   bool
	}{
		{"it is there", func(h *History) { h.Read(0)(5, true); h.Read(1)(0, true) }, true},
		{"it was flushed", func(h *History) { h.Crash(); h.Read(0)(5, true) }, true},
		{"it is gone", func(h *History) { h.Read(0)(0, true) }, false},
		{"it is lost in a crash", func(h *History) { h.Write(0, 6)(true); h.Crash(); h.Read(0)(0, true) }, false},
		{"it is back after a crash", func(h *History) { h.Write(0, 6)(true); h.Crash(); h.Read(0)(5, true) }, true},
		{"it is back after a flush", func(h *History) { h.Write(0, 6)(true); h.Flush()(true); h.Crash(); h.Read(0)(5, true) }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := From([]Value{5, 0})
			tc.run(h)
			if err := h.Check(); (err == nil) != tc.ok {
				t.Errorf("%v", err)
			}
		})
	}
}
