package replication

import (
	"slices"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// A snapshot that is given up while a replica seals it, or has another to seal first, is none of the replica's.
func TestForgottenSeals(t *testing.T) {
	r, err := NewReplica(ReplicaConfig{Volume: "vol", Replica: "r1", Incarnation: 1, BootID: 1, Geometry: DefaultGeometry(), Timing: DefaultTiming()},
		Stored{Size: 1 << 30}, 1)
	if err != nil {
		t.Fatal(err)
	}
	var seq uint64
	var answers []Status
	step := func() (stores []StoreOp) {
		for _, e := range r.Effects() {
			if e.Answer {
				answers = append(answers, e.Msg.Status)
			} else {
				stores = append(stores, e.Store)
			}
		}
		return stores
	}
	ask := func(kind Kind, change func(*Message)) []StoreOp {
		seq++
		m := &Message{Kind: kind, Volume: "vol", Replica: "r1", Epoch: 1, Session: 1, Seq: seq, Op: seq}
		change(m)
		r.Receive(1, m)
		return step()
	}
	end := func(ops []StoreOp) []StoreOp {
		t.Helper()
		if len(ops) != 1 {
			t.Fatalf("%d store operations: %+v", len(ops), ops)
		}
		r.Done(1, ops[0].ID, StoreResult{})
		return step()
	}
	seal := func(id volume.SnapshotID, number uint64) []StoreOp {
		return ask(KindSeal, func(m *Message) { m.Seal = &Seal{Snapshot: id, Number: number, ConfigVersion: 1} })
	}
	end(ask(KindFence, func(*Message) {}))
	end(ask(KindConfigure, func(m *Message) {
		m.Config = &Config{Lineage: 1, ConfigVersion: 1, Role: RoleISR, ISR: []volume.ReplicaID{"r1"}}
	}))
	running := seal("a", 1)
	if len(seal("b", 2))+len(seal("c", 3))+len(seal("b", 4)) != 0 {
		t.Fatal("seals run side by side")
	}
	r.Forget("a", 2)
	r.Forget("b", 2)
	if answers = nil; len(step()) != 0 || !slices.Equal(answers, []Status{StatusRefused}) {
		t.Errorf("the order that waits was answered %v", answers)
	}
	running = end(end(running)) // a, and c
	if end(running); !slices.Equal(r.snaps, []SealedSnapshot{{ID: "c", Number: 3}, {ID: "b", Number: 4}}) {
		t.Errorf("it has %v", r.snaps)
	}
	r.Forget("b", 3)
	r.Forget("c", 0)
	if !slices.Equal(r.snaps, []SealedSnapshot{{ID: "b", Number: 4}}) {
		t.Errorf("it has %v", r.snaps)
	}
}
