package control_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What is said of each state of a replicated volume, and how bad it is.
func TestWhyOfSeveralReplicas(t *testing.T) {
	ctx := context.Background()
	remove := func(w *world, v volume.Volume, i int) {
		w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[i].ID}})
	}
	for _, c := range []struct {
		name  string
		set   func(w *world, v volume.Volume)
		worst volume.Severity
		says  []string
	}{
		{"healthy", func(*world, volume.Volume) {}, "", []string{"usable", "any node may attach it"}},
		{"attached", func(w *world, v volume.Volume) { w.mustAttach(v.ID, "n4") }, "", []string{"attached to node n4"}},
		{"one away", func(w *world, _ volume.Volume) { w.silence("n2", time.Hour) }, volume.Degraded, []string{"I/O goes on with the 2 in sync", "not reported for 1h0m0s"}},
		{"all in sync away", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			remove(w, v, 2)
			w.silence("n1", time.Hour)
		}, volume.Inaccessible, []string{"No replica that is in sync can be reached", "salvage", "comes back with it"}},
		{"behind", func(w *world, v volume.Volume) { w.mustAttach(v.ID, "n4"); remove(w, v, 1) }, volume.Degraded, []string{"being brought up"}},
		{"too few", func(w *world, v volume.Volume) {
			two := 2
			if _, err := w.ModifyVolume(ctx, v.ID, control.Modify{MinInSync: &two}); err != nil {
				w.t.Fatal(err)
			}
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			remove(w, v, 2)
		}, volume.Inaccessible, []string{"writes wait", "minInSync is 2"}},
		{"one missing", func(w *world, v volume.Volume) {
			four := 4
			if _, err := w.ModifyVolume(ctx, v.ID, control.Modify{Replicas: &four}); err != nil {
				w.t.Fatal(err)
			}
		}, volume.Degraded, []string{"3 of 4 replicas"}},
		{"one filling", func(w *world, v volume.Volume) {
			w.propose(command.AddReplica{Volume: v.ID, Replica: volume.Replica{ID: "rep-new", Pool: "p4", Role: volume.Filling}})
		}, volume.Degraded, []string{"rep-new on node n4 is being filled"}},
		{"the attached node is silent", func(w *world, v volume.Volume) { w.mustAttach(v.ID, "n4"); w.silence("n4", time.Hour) },
			volume.Inaccessible, []string{"node n4, to which it is attached, has not reported", "fences it first"}},
		{"looked after", func(w *world, v volume.Volume) { w.propose(command.OpenEngine{Volume: v.ID, Node: "n2"}) }, "", []string{"node n2 looks after"}},
		{"being taken away", func(w *world, v volume.Volume) {
			v = w.mustAttach(v.ID, "n4")
			w.propose(command.BeginDetach{Volume: v.ID, Epoch: v.Attachment.Epoch})
			w.propose(command.ForceDetach{Volume: v.ID, Epoch: v.Attachment.Epoch})
		}, "", []string{"refuse that node already"}},
		{"a snapshot is being cut", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			w.propose(command.BeginSnapshot{ID: "snap-1", Name: "s", Volume: v.ID})
		}, "", []string{"Snapshot snap-1 of it is being cut"}},
		{"one node has a trouble of its own", func(w *world, v volume.Volume) {
			w.agents.conditions = []volume.Condition{{Severity: volume.Inaccessible, Reason: "Trouble", Message: "that node only"}}
			w.agents.troubled = "n2"
		}, volume.Degraded, []string{"that node only"}},
		{"every node has", func(w *world, v volume.Volume) {
			w.agents.conditions = []volume.Condition{{Severity: volume.Inaccessible, Reason: "Trouble", Message: "all of them"}}
		}, volume.Inaccessible, []string{"all of them"}},
		{"one leaves", func(w *world, v volume.Volume) {
			w.propose(command.DropReplica{Volume: v.ID, Replica: v.Replicas[2].ID})
		},
			volume.Degraded, []string{"is none any more", "2 of 3 replicas"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newCluster(t)
			v := w.mustCreate(replicated("v", 3))
			c.set(w, v)
			why, err := w.Why(ctx, v.ID)
			if err != nil {
				t.Fatal(err)
			}
			for _, says := range c.says {
				if !strings.Contains(why, says) {
					t.Errorf("does not say %q: %s", says, why)
				}
			}
			h, err := w.Health(ctx, v.ID)
			if err != nil {
				t.Fatal(err)
			}
			var worst volume.Severity
			for _, c := range h.Conditions {
				if worst == "" || c.Severity == volume.Inaccessible {
					worst = c.Severity
				}
			}
			if worst != c.worst {
				t.Errorf("%q, want %q: %v", worst, c.worst, h.Conditions)
			}
		})
	}
}
