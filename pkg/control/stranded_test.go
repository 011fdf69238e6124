package control_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// stranded is a volume attached to n1, whose replica there is the only one in sync, and n1 does not answer; a second one,
// where there is one, is behind.
func stranded(t *testing.T, replicas int) (*world, volume.Volume) {
	t.Helper()
	w := newCluster(t)
	v := w.serve(w.mustAttach(w.mustCreate(replicated("v", replicas)).ID, "n1"))
	if v.Replicas[0].Node != "n1" {
		t.Fatalf("on %s", on(v.Replicas))
	}
	for _, r := range v.Replicas[1:] {
		w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{r.ID}})
		w.agents.reports[r.ID] = control.ReplicaReport{Present: true, Role: volume.Stale, Lineage: 1, ConfigVersion: 1, Size: gib}
	}
	w.agents.setDown("n1", true)
	return w, w.get(v.ID)
}

// serve is that the node to which a volume is attached begins its engine.
func (w *world) serve(v volume.Volume) volume.Volume {
	w.t.Helper()
	if _, err := w.Commit(context.Background(), v.ID, replication.Change{Attach: &replication.Attach{Node: v.Attachment.Node}}); err != nil {
		w.t.Fatal(err)
	}
	return w.get(v.ID)
}

func TestSalvageEndsAnAttachmentThatNothingElseEnds(t *testing.T) {
	ctx := context.Background()
	w, v := stranded(t, 2)
	stale := v.Replicas[1]
	_, err := w.Salvage(ctx, v.ID, stale.ID, false)
	wantErr(t, err, volume.ErrUnavailable) // n1 reported a moment ago
	if now := w.get(v.ID); now.Lineage != 1 || now.Attachment == nil || now.Owner != "n1" {
		t.Fatalf("%+v", now)
	}
	w.silence("n1", 5*time.Minute)
	wantErr(t, w.Detach(ctx, v.ID, "n1"), volume.ErrUnavailable)
	why, err := w.Why(ctx, v.ID)
	if err != nil || !strings.Contains(why, "salvage the volume from another replica") {
		t.Errorf("%q %v", why, err)
	}
	// Nothing is given up while the replica cannot be fenced: the engine may reach it.
	w.agents.script("Fence", volume.ErrUnavailable)
	_, err = w.Salvage(ctx, v.ID, stale.ID, false)
	wantErr(t, err, volume.ErrUnavailable)
	if now := w.get(v.ID); now.Lineage != 1 {
		t.Fatalf("%+v", now)
	}
	got, err := w.Salvage(ctx, v.ID, stale.ID, false)
	if err != nil || got.Lineage != 2 || got.Attachment != nil || got.Owner != "" || got.Epoch <= v.Epoch {
		t.Fatalf("%+v %v", got, err)
	}
	if fenced := w.agents.epochs[stale.ID]; fenced <= v.Epoch || fenced >= got.Epoch {
		t.Errorf("fenced in epoch %d; the engine's was %d, the record's is %d", fenced, v.Epoch, got.Epoch)
	}
	// The old engine, should it live: nothing that it asks for is granted.
	for name, change := range map[string]replication.Change{
		"another epoch": {Attach: &replication.Attach{Node: "n1"}},
		"a change":      {Reconfigure: &replication.Reconfigure{Epoch: v.Epoch, ConfigVersion: got.ConfigVersion, Add: []replication.Proof{{ID: v.Replicas[0].ID, Incarnation: 1, BootID: 1}}}},
	} {
		if _, err := w.Commit(ctx, v.ID, change); err == nil {
			t.Errorf("the engine that was ended got %s", name)
		}
	}
	w.mustAttach(v.ID, "n3")
	// The node goes, with what is left there.
	if _, err := w.ForgetPool(ctx, "p1", false); err != nil {
		t.Error(err)
	}
	if _, err := w.Node(ctx, "n1"); err != nil { // it is a member still: its certificate is good until it is removed
		t.Errorf("the node went with its pool: %v", err)
	}
	wantErr(t, w.RemoveNode(ctx, "n1"), nil)
}

// A replica that the old engine began to copy to, after it was looked at and before it was fenced, is not salvaged.
func TestSalvageLooksAgainAfterTheFence(t *testing.T) {
	ctx := context.Background()
	w, v := stranded(t, 2)
	w.silence("n1", 5*time.Minute)
	stale := v.Replicas[1].ID
	w.agents.onFence = func() {
		r := w.agents.reports[stale]
		r.Role = volume.Filling
		w.agents.reports[stale] = r
	}
	_, err := w.Salvage(ctx, v.ID, stale, true)
	wantErr(t, err, volume.ErrInvalid)
	if now := w.get(v.ID); now.Lineage != 1 {
		t.Errorf("%+v", now)
	}
}

func TestDeleteDoesNotWaitForTheNodeItIsDetachedFrom(t *testing.T) {
	ctx := context.Background()
	w, v := stranded(t, 1)
	wantErr(t, w.DeleteVolume(ctx, v.ID), volume.ErrInUse) // nobody has said that it is not used any more
	wantErr(t, w.Detach(ctx, v.ID, ""), volume.ErrUnavailable)
	wantErr(t, w.DeleteVolume(ctx, v.ID), volume.ErrUnavailable) // it may still end it
	w.silence("n1", 5*time.Minute)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	if now := w.get(v.ID); now.State != volume.Deleting || now.Attachment != nil || now.Owner != "" || now.Epoch <= v.Epoch {
		t.Errorf("%+v", now)
	}
	w.mustCreate(replicated("v", 2)) // its name is free
	wantErr(t, w.RemoveNode(ctx, "n1"), volume.ErrInUse)
	if _, err := w.ForgetPool(ctx, "p1", false); err != nil {
		t.Error(err)
	}
	wantErr(t, w.RemoveNode(ctx, "n1"), nil) // the count of what is attached there is right
	_, err := w.store.Volume(ctx, v.ID)
	wantErr(t, err, volume.ErrNotFound)
}

func TestForgettingThePoolOfTheOnlyReplicaEndsTheAttachment(t *testing.T) {
	ctx := context.Background()
	w, v := stranded(t, 1)
	w.silence("n1", 5*time.Minute)
	_, err := w.ForgetPool(ctx, "p1", false)
	wantErr(t, err, volume.ErrInUse)
	lost, err := w.ForgetPool(ctx, "p1", true)
	if err != nil || fmt.Sprint(lost.Volumes) != fmt.Sprint([]volume.ID{v.ID}) {
		t.Fatalf("%+v %v", lost, err)
	}
	if now := w.get(v.ID); !now.Lost || now.Attachment != nil || now.Owner != "" {
		t.Errorf("%+v", now)
	}
	wantErr(t, w.RemoveNode(ctx, "n1"), nil)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
}

// A node that answers and cannot end an engine does not hold the volume: replicas that are in sync refuse it, also one that is
// on that node.
func TestANodeThatCannotEndItsEngineIsFenced(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name  string
		where []volume.NodeID // who is in sync
		fails func(w *world)
		want  error
	}{
		{"refuses", []volume.NodeID{"n1", "n2"}, func(w *world) { w.agents.script("Detach", fmt.Errorf("the device hangs")) }, nil},
		{"is busy", []volume.NodeID{"n1", "n2"}, func(w *world) { w.agents.script("Detach", volume.ErrBusy) }, nil},
		{"hangs", []volume.NodeID{"n1", "n2"}, func(w *world) { w.agents.hanging("n1") }, nil},
		{"hangs and has the only replica", []volume.NodeID{"n1"}, func(w *world) { w.agents.hanging("n1") }, nil},
		{"hangs, and the replica is down", []volume.NodeID{"n2"}, func(w *world) { w.agents.hanging("n1"); w.agents.setDown("n2", true) }, volume.ErrUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newCluster(t)
			r := replicated("v", len(c.where))
			r.Preferred = c.where
			v := w.serve(w.mustAttach(w.mustCreate(r).ID, "n1"))
			if len(v.Replicas) != len(c.where) || v.Replicas[0].Node != c.where[0] {
				t.Fatalf("on %s", on(v.Replicas))
			}
			c.fails(w)
			wantErr(t, w.Detach(ctx, v.ID, "n1"), c.want)
			now := w.get(v.ID)
			if c.want != nil {
				if now.Attachment == nil || now.Owner != "n1" {
					t.Errorf("forced out though nobody refuses it: %+v", now)
				}
				return
			}
			if now.Attachment != nil || now.Clean || now.Epoch <= v.Epoch {
				t.Errorf("%+v", now)
			}
			if got := w.agents.epochs[now.Replicas[len(now.Replicas)-1].ID]; got != now.Epoch {
				t.Errorf("fenced with epoch %d, want %d", got, now.Epoch)
			}
			w.mustAttach(v.ID, "n3")
		})
	}
}

// The time to write out what a workload has written is for nodes that answer.
func TestANodeThatAnswersNothingIsNotWaitedFor(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	w := newCluster(t)
	w.endTimeout = time.Hour
	w.restart()
	v := w.serve(w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n1"))
	w.agents.hanging("n1")
	wantErr(t, w.Detach(ctx, v.ID, "n1"), nil)
	if now := w.get(v.ID); now.Attachment != nil || now.Clean || now.Epoch <= v.Epoch {
		t.Errorf("%+v", now)
	}
}

// An engine that its node begins while another is being closed has not ended with it.
func TestAnEngineBegunMeanwhileIsNotClosedCleanly(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	w.propose(command.OpenEngine{Volume: v.ID, Node: "n1"})
	w.agents.onDetach = func() {
		if _, err := w.Commit(ctx, v.ID, replication.Change{Attach: &replication.Attach{Node: "n1"}}); err != nil {
			t.Error(err)
		}
	}
	w.mustAttach(v.ID, "n2")
	if now := w.get(v.ID); now.SkipLease {
		t.Errorf("the lease of an engine that runs is not waited for: %+v", now)
	}
}

// Only the node that runs a volume's engine changes who is in sync and who holds its snapshots, and only the one that it is
// attached to says what is on it.
func TestWhoMayAskForAChange(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.serve(w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n1"))
	x := w.mustSnapshot("s", v.ID)
	remove := replication.Change{Reconfigure: &replication.Reconfigure{Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Remove: []volume.ReplicaID{v.Replicas[1].ID}}}
	fs := volume.Filesystem{Phase: volume.Formatting, Type: "ext4"}
	for name, call := range map[string]func(node volume.NodeID) error{
		"commit": func(n volume.NodeID) error { _, err := w.CommitBy(ctx, n, v.ID, remove); return err },
		"attach": func(n volume.NodeID) error {
			_, err := w.CommitBy(ctx, n, v.ID, replication.Change{Attach: &replication.Attach{Node: "n1"}})
			return err
		},
		"set filesystem": func(n volume.NodeID) error { return w.SetFilesystemBy(ctx, n, v.ID, fs) },
		"add holder":     func(n volume.NodeID) error { return w.AddHolderBy(ctx, n, x.ID, v.Replicas[1].ID) },
	} {
		before := w.get(v.ID)
		wantErr(t, call("n2"), volume.ErrDenied)
		if now := w.get(v.ID); now.Revision != before.Revision || now.Filesystem != before.Filesystem {
			t.Errorf("%s changed the record: %+v", name, now)
		}
	}
	// One that was the owner is told that it is none any more, so that its engine ends.
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	w.serve(w.mustAttach(v.ID, "n2"))
	m, err := w.CommitBy(ctx, "n1", v.ID, remove)
	if wantErr(t, err, replication.ErrStaleEpoch); m.Epoch <= v.Epoch {
		t.Errorf("%+v", m)
	}
	wantErr(t, w.SetFilesystemBy(ctx, "n1", v.ID, fs), volume.ErrDenied)
	wantErr(t, w.SetFilesystemBy(ctx, "n2", v.ID, fs), nil)
	wantErr(t, w.AddHolderBy(ctx, "n2", x.ID, v.Replicas[1].ID), nil)
	v = w.get(v.ID)
	remove.Reconfigure.Epoch, remove.Reconfigure.ConfigVersion = v.Epoch, v.ConfigVersion
	_, err = w.CommitBy(ctx, "n2", v.ID, remove)
	wantErr(t, err, nil)
}

func TestEnginesOfThePast(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	runs, moved, deleted := w.mustCreate(create("a")), w.mustCreate(create("b")), w.mustCreate(create("c"))
	engines := map[volume.ID]volume.Epoch{"vol-unknown": 1}
	for _, v := range []volume.Volume{runs, moved, deleted} {
		engines[v.ID] = w.serve(w.mustAttach(v.ID, "n1")).Epoch
	}
	wantErr(t, w.Detach(ctx, moved.ID, ""), nil)
	w.mustAttach(moved.ID, "n2")
	wantErr(t, w.Detach(ctx, deleted.ID, ""), nil)
	w.silence(deleted.Replicas[0].Node, 5*time.Minute)
	wantErr(t, w.DeleteVolume(ctx, deleted.ID), nil) // its record waits for the node
	ended, err := w.Ended(ctx, engines)
	want := []volume.ID{moved.ID, deleted.ID, "vol-unknown"}
	slices.Sort(want)
	if err != nil || !slices.Equal(ended, want) {
		t.Errorf("%v, want %v; %v", ended, want, err)
	}
}

// told is control.Members that notes who was told.
type told struct {
	mu    sync.Mutex
	by    []volume.NodeID
	fails volume.NodeID
}

func (m *told) Expel(_ context.Context, node, removed volume.NodeID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if node == m.fails {
		return volume.ErrUnavailable
	}
	m.by = append(m.by, node)
	return nil
}

// The removal of a node is answered when all that report refuse it.
func TestWhoIsToldOfARemovedNode(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	w.silence("n3", 5*time.Minute)
	m := &told{fails: "n2"}
	s := control.New(w.store, w.agents, control.Options{Now: func() time.Time { return w.now }, Members: m})
	wantErr(t, s.RemoveNode(ctx, "n4"), volume.ErrUnavailable)
	if removed, err := s.RemovedNodes(ctx); err != nil || !slices.Equal(removed, []volume.NodeID{"n4"}) {
		t.Errorf("%v %v", removed, err)
	}
	m.by, m.fails = nil, ""
	wantErr(t, s.RemoveNode(ctx, "n4"), nil)
	if slices.Sort(m.by); !slices.Equal(m.by, []volume.NodeID{"n1", "n2"}) { // not itself, and not one that is silent
		t.Errorf("told %v", m.by)
	}
}

// A node that looks after a volume that nobody has attached, and dies, does not keep it: another brings up what is behind.
func TestADeadNodeLooksAfterNothing(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 3))
	w.propose(command.OpenEngine{Volume: v.ID, Node: "n1"})
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[2].ID}})
	w.silence("n1", 5*time.Minute)
	wantErr(t, w.Sync(ctx, v.ID), nil)
	if now := w.get(v.ID); now.Owner != v.Replicas[1].Node {
		t.Errorf("node %q looks after it", now.Owner)
	}
}

// An engine that was forced out, by a replica that then could not be fenced, may be ended by its node after all.
func TestANodeEndsAnEngineThatWasForcedOut(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.serve(w.mustAttach(w.mustCreate(create("v")).ID, "n4"))
	w.agents.script("Detach", volume.ErrUnavailable)
	w.agents.script("Fence", volume.ErrNotFound)
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	if now := w.get(v.ID); now.Attachment != nil || now.Clean || now.Epoch <= v.Epoch {
		t.Errorf("%+v", now)
	}
	// A replica that its pool does not have cannot refuse anything: nothing is forced for it.
	v = w.serve(w.mustAttach(v.ID, "n4"))
	w.agents.reports[v.Replicas[0].ID] = control.ReplicaReport{}
	w.agents.script("Detach", volume.ErrUnavailable)
	wantErr(t, w.Detach(ctx, v.ID, ""), volume.ErrUnavailable)
	if now := w.get(v.ID); now.Owner != "n4" {
		t.Errorf("forced out: %+v", now)
	}
}
