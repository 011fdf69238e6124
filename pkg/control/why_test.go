package control_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var update = flag.Bool("update", false, "write the golden files anew")

// What is said of each state of a replicated volume, and how bad it is. Each starts with three replicas, on n1 to n3, of
// four nodes.
func TestWhy(t *testing.T) {
	ctx := context.Background()
	remove := func(w *world, v volume.Volume, i int) {
		w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[i].ID}})
	}
	runs := func(w *world, node volume.NodeID, e volume.EngineReport) {
		w.agents.running, w.agents.runner = &e, node
	}
	says := func(w *world, node volume.NodeID, s volume.Severity, reason, message string) {
		if w.agents.atDevice == nil {
			w.agents.atDevice = map[volume.NodeID][]volume.Condition{}
		}
		w.agents.atDevice[node] = append(w.agents.atDevice[node], volume.Condition{Severity: s, Reason: reason, Message: message})
	}
	modify := func(w *world, v volume.Volume, m control.Modify) {
		if _, err := w.ModifyVolume(ctx, v.ID, m); err != nil {
			w.t.Fatal(err)
		}
	}
	two, four := 2, 4
	for _, c := range []struct {
		name  string
		set   func(w *world, v volume.Volume)
		worst volume.Severity
	}{
		{"not attached", func(*world, volume.Volume) {}, ""},
		{"attached", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			runs(w, "n4", volume.EngineReport{Phase: "live", Waiting: 3})
		}, ""},
		{"looked after", func(w *world, v volume.Volume) { w.propose(command.OpenEngine{Volume: v.ID, Node: "n2"}) }, ""},
		{"waits for a lease", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			runs(w, "n4", volume.EngineReport{Phase: "fencing", Waiting: 1})
			says(w, "n4", volume.Inaccessible, replication.CondLease, "an engine on another node may still serve reads for 3500 ms")
		}, volume.Inaccessible},
		{"engine is starting", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			runs(w, "n4", volume.EngineReport{Phase: "marking", Dirty: 3 << 20})
		}, ""},
		{"waits for an in-sync member", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			remove(w, v, 2)
			w.silence("n1", time.Hour)
			runs(w, "n4", volume.EngineReport{Phase: "fencing", Waiting: 2})
			says(w, "n4", volume.Inaccessible, replication.CondNoReplica, "no replica that was in sync can be reached: bring one of their nodes back")
		}, volume.Inaccessible},
		{"engine cut off from the replicas", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			runs(w, "n4", volume.EngineReport{Phase: "fencing"})
			says(w, "n4", volume.Inaccessible, replication.CondNoReplica, "no replica that was in sync can be reached: bring one of their nodes back")
		}, volume.Inaccessible},
		{"one away", func(w *world, _ volume.Volume) { w.silence("n2", time.Hour) }, volume.Degraded},
		{"one does not answer", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			w.agents.setDown("n2", true)
			runs(w, "n4", volume.EngineReport{Phase: "live"})
			says(w, "n4", volume.Degraded, replication.CondDegraded, "1 of 3 replicas are not in sync")
			says(w, "n4", volume.Degraded, replication.CondReplicaWaits, fmt.Sprintf("replica %s on node n2 does not answer", v.Replicas[1].ID))
		}, volume.Degraded},
		{"resync", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			runs(w, "n4", volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: v.Replicas[1].ID, Done: 1 << 30, Left: 1 << 30, Rate: 64 << 20, Snapshots: 2}}})
			says(w, "n4", volume.Degraded, replication.CondDegraded, "1 of 3 replicas are not in sync")
		}, volume.Degraded},
		{"resync that hardly moves", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			runs(w, "n4", volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: v.Replicas[1].ID, Left: 1 << 40, Rate: 1}}})
		}, volume.Degraded},
		{"rebuild", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n1")
			w.propose(command.AddReplica{Volume: v.ID, Replica: volume.Replica{ID: "rep-new", Pool: "p4", Role: volume.Filling}})
			runs(w, "n1", volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: "rep-new", Full: true, Done: 10 << 20, Left: 990 << 20, Rate: 8 << 20}}})
		}, volume.Degraded},
		{"member poisoned", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			says(w, "n4", volume.Inaccessible, replication.CondNotWhole, fmt.Sprintf(
				"replica %s was poisoned by a failed sync, or is on another disk than it was: reopen it; if no other replica comes back, salvage the volume", v.Replicas[0].ID))
		}, volume.Inaccessible},
		{"pool full", func(w *world, _ volume.Volume) {
			w.agents.conditions = []volume.Condition{{Severity: volume.Degraded, Reason: "PoolFull",
				Message: "pool p2 has no space left, writes to new places wait: delete volumes or snapshots, or enlarge the pool"}}
			w.agents.troubled = "n2"
		}, volume.Degraded},
		{"minInSync not met", func(w *world, v volume.Volume) {
			modify(w, v, control.Modify{MinInSync: &two})
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			remove(w, v, 2)
			w.silence("n2", time.Hour)
			says(w, "n4", volume.Inaccessible, replication.CondMinInSync, "1 replicas are in sync, minInSync is 2: writes wait until another is, or minInSync is lowered")
		}, volume.Inaccessible},
		{"all in sync away", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			remove(w, v, 1)
			remove(w, v, 2)
			w.silence("n1", time.Hour)
		}, volume.Inaccessible},
		{"all away and its node too", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n1")
			remove(w, v, 1)
			remove(w, v, 2)
			w.silence("n1", time.Hour)
		}, volume.Inaccessible},
		{"its disk is away", func(w *world, v volume.Volume) { w.register("n2", pool("p2", "n2", 0)) }, volume.Degraded},
		{"deleting with a node away", func(w *world, v volume.Volume) {
			w.silence("n2", time.Hour)
			_ = w.DeleteVolume(ctx, v.ID)
		}, ""},
		{"controllers without a majority", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			says(w, "n4", volume.Inaccessible, replication.CondControllers, "a change of who is in sync is not committed: I/O that depends on it waits until a majority of the controllers answers")
		}, volume.Inaccessible},
		{"owner away", func(w *world, v volume.Volume) { w.mustAttach(v.ID, "n4"); w.silence("n4", time.Hour) }, volume.Inaccessible},
		{"owner does not answer", func(w *world, v volume.Volume) { w.mustAttach(v.ID, "n4"); w.agents.setDown("n4", true) }, volume.Inaccessible},
		{"being detached", func(w *world, v volume.Volume) {
			v = w.mustAttach(v.ID, "n4")
			w.propose(command.BeginDetach{Volume: v.ID, Epoch: v.Attachment.Epoch})
		}, ""},
		{"being taken away", func(w *world, v volume.Volume) {
			v = w.mustAttach(v.ID, "n4")
			w.propose(command.BeginDetach{Volume: v.ID, Epoch: v.Attachment.Epoch})
			w.propose(command.ForceDetach{Volume: v.ID, Epoch: v.Attachment.Epoch})
		}, ""},
		{"snapshot pending", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			w.propose(command.BeginSnapshot{ID: "snap-1", Name: "s", Volume: v.ID})
		}, ""},
		{"one missing", func(w *world, v volume.Volume) { modify(w, v, control.Modify{Replicas: &four}) }, volume.Degraded},
		{"one leaves", func(w *world, v volume.Volume) {
			w.propose(command.DropReplica{Volume: v.ID, Replica: v.Replicas[2].ID})
		}, volume.Degraded},
		{"one node has a trouble of its own", func(w *world, v volume.Volume) {
			w.agents.conditions = []volume.Condition{{Severity: volume.Inaccessible, Reason: "Trouble", Message: "that node only"}}
			w.agents.troubled = "n2"
		}, volume.Degraded},
		{"every node has", func(w *world, v volume.Volume) {
			w.agents.conditions = []volume.Condition{{Severity: volume.Inaccessible, Reason: "Trouble", Message: "all of them"}}
		}, volume.Inaccessible},
		{"a device of the past", func(w *world, v volume.Volume) {
			w.mustAttach(v.ID, "n4")
			says(w, "n1", volume.Inaccessible, "DeviceNotRestored", "the volume is not usable on node n1 since a restart")
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newCluster(t)
			v := w.mustCreate(replicated("db", 3))
			c.set(w, v)
			why, err := w.Why(ctx, v.ID)
			if err != nil {
				t.Fatal(err)
			}
			why = strings.NewReplacer(string(v.ID), "vol-1", strings.TrimPrefix(string(v.ID), "vol-"), "1").Replace(why)
			golden(t, strings.ReplaceAll(c.name, " ", "_"), why)
			h, err := w.Health(ctx, v.ID)
			if err != nil && c.name != "deleting with a node away" {
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

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "why", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.TrimSpace(string(want)), got); d != "" {
		t.Errorf("want -, got +\n%s", d)
	}
}
