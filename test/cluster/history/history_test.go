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
