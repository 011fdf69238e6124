package replication

import (
	"fmt"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// wire carries effects between an engine and its replicas by direct calls, with stores that do nothing.
type wire struct {
	e    *Engine
	reps map[volume.ReplicaID]*Replica
	m    Membership
	now  Now
	msgs []Message // to replicas
	acks []Message
	eff  []ReplicaEffect
}

func newWire(b *testing.B, replicas int) *wire {
	w := &wire{reps: map[volume.ReplicaID]*Replica{}, now: Second}
	const size = 1 << 30
	var members []Member
	for i := range replicas {
		id := volume.ReplicaID(fmt.Sprintf("r%d", i))
		r, err := NewReplica(ReplicaConfig{Volume: "vol", Replica: id, Incarnation: 1, BootID: 1, Geometry: DefaultGeometry(),
			Timing: DefaultTiming()}, Stored{Size: size}, w.now)
		if err != nil {
			b.Fatal(err)
		}
		w.reps[id] = r
		members = append(members, Member{ID: id, Node: volume.NodeID(id), Incarnation: 1})
	}
	m, err := NewMembership("vol", size, 1, members)
	if err != nil {
		b.Fatal(err)
	}
	if w.m, err = m.Apply(Change{Attach: &Attach{Node: "r0"}}); err != nil {
		b.Fatal(err)
	}
	if w.e, err = NewEngine(EngineConfig{Node: "r0", Geometry: DefaultGeometry(), Timing: DefaultTiming()}, w.m, w.now); err != nil {
		b.Fatal(err)
	}
	for _, a := range members {
		w.e.Connected(w.now, a.ID)
		w.drain()
	}
	w.drain()
	if w.e.phase != phaseLive {
		b.Fatalf("%+v", w.e.Status())
	}
	return w
}

// drain carries everything out until nothing is left, and returns the number of answers to the client.
func (w *wire) drain() (answers int) {
	for {
		for _, f := range w.e.Effects() {
			switch f.Kind {
			case EffectSend:
				w.msgs = append(w.msgs, f.Msg)
			case EffectAnswer:
				answers++
			case EffectCommit:
				n, err := w.m.Apply(f.Change)
				if err != nil {
					panic(err)
				}
				w.m = n
				id := f.Commit
				w.e.Committed(w.now, id, CommitDone, n)
			}
		}
		if len(w.msgs) == 0 {
			return answers
		}
		for i := range w.msgs {
			r := w.reps[w.msgs[i].Replica]
			r.Receive(w.now, &w.msgs[i])
			for todo := r.Effects(); len(todo) > 0; todo = r.Effects() {
				w.eff = append(w.eff[:0], todo...)
				for j := range w.eff {
					if w.eff[j].Answer {
						w.acks = append(w.acks, w.eff[j].Msg)
					} else {
						r.Done(w.now, w.eff[j].Store.ID, StoreResult{})
					}
				}
			}
		}
		w.msgs = w.msgs[:0]
		for i := range w.acks {
			w.e.Receive(w.now, &w.acks[i])
		}
		w.acks = w.acks[:0]
	}
}

func BenchmarkWrite4K(b *testing.B) {
	for _, n := range []int{1, 3} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("replicas=%d/depth=%d", n, depth), func(b *testing.B) {
				w := newWire(b, n)
				data := make([]byte, 4096)
				b.ReportAllocs()
				for i := 0; b.Loop(); {
					for range depth {
						i++
						w.e.Write(w.now, uint64(i), int64(i*7919%262144)*4096, data, false)
					}
					w.drain()
					w.now += Now(depth) * 1000
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*depth), "ns/write")
			})
		}
	}
}

func BenchmarkRead4K(b *testing.B) {
	w := newWire(b, 3)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		w.e.Read(w.now, uint64(i), int64(i*7919%262144)*4096, 4096, nil)
		w.drain()
		w.now += 1000
	}
}
