package replication

import (
	"fmt"
	"testing"
)

func live(t *testing.T, replicas int) *world {
	t.Helper()
	w := newWorld(replicas, 512)
	if err := w.attach("n1", EngineConfig{}); err != nil {
		t.Fatal(err)
	}
	w.advance(Second)
	if w.e.phase != phaseLive {
		t.Fatalf("phase %d: %v", w.e.phase, w.log)
	}
	return w
}

func (w *world) write(off int64, data string) uint64 {
	w.tag++
	w.e.Write(w.now, w.tag, off, []byte(data), false)
	w.effects()
	return w.tag
}

func TestWriteRead(t *testing.T) {
	for n := 1; n <= 5; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			w := live(t, n)
			a := w.write(0, "aaaaaaaa")
			w.run()
			if f, ok := w.answer[a]; !ok || f.Result != ResultOK {
				t.Fatalf("write not answered: %v", w.log)
			}
			w.tag++
			w.e.Read(w.now, w.tag, 0, 8, nil)
			w.effects()
			w.run()
			if f := w.answer[w.tag]; string(f.Data) != "aaaaaaaa" {
				t.Fatalf("read %q: %v", f.Data, w.log)
			}
			if d := w.differ(); d != nil {
				t.Fatal(d)
			}
		})
	}
}

func TestFailureAndReturn(t *testing.T) {
	w := live(t, 3)
	w.trace = true
	h := w.host("r3")
	h.cut = true
	w.disconnect(h)
	a := w.write(0, "aaaaaaaa")
	w.run()
	if _, ok := w.answer[a]; ok {
		t.Fatalf("answered before the removal: %v", w.log)
	}
	w.advance(3 * Second)
	if _, ok := w.answer[a]; !ok {
		t.Fatalf("not answered after the removal: %v", w.log)
	}
	w.write(128, "bbbbbbbb")
	w.run()
	h.cut = false
	w.connect(w.e, h)
	w.advance(20 * Second)
	if len(w.m.ISR()) != 3 || w.differ() != nil {
		for _, l := range w.log {
			t.Log(l)
		}
		t.Fatalf("isr %v differ %v", w.m.ISR(), w.differ())
	}
}
