package control_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// newCluster is a world of nodes n1 to n4, each with a pool of 100 GiB.
func newCluster(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	for i := 2; i <= 4; i++ {
		n := volume.NodeID(fmt.Sprint("n", i))
		w.register(n, pool(volume.PoolID(fmt.Sprint("p", i)), n, 100*gib))
	}
	return w
}

func replicated(name string, n int) control.CreateVolume {
	r := create(name)
	r.Parameters.Replicas = n
	r.Preferred = []volume.NodeID{"n1"}
	return r
}

func on(rs []volume.Replica) string {
	var s []string
	for _, r := range rs {
		s = append(s, fmt.Sprintf("%s:%s", r.Node, r.Role))
	}
	slices.Sort(s)
	return strings.Join(s, " ")
}

func (w *world) get(id volume.ID) volume.Volume {
	w.t.Helper()
	v, err := w.store.Volume(context.Background(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// silence lets a node be down, for long enough to be noticed; the others go on reporting, and somebody goes on looking.
func (w *world) silence(node volume.NodeID, d time.Duration) {
	w.t.Helper()
	w.agents.setDown(node, true)
	for ; d > 0; d -= time.Minute {
		w.now = w.now.Add(min(d, time.Minute))
		for i := 1; i <= 4; i++ {
			n := volume.NodeID(fmt.Sprint("n", i))
			if n != node {
				w.register(n, pool(volume.PoolID(fmt.Sprint("p", i)), n, 100*gib))
			}
		}
		if _, err := w.State(context.Background()); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) comesBack(node volume.NodeID) {
	w.t.Helper()
	w.agents.setDown(node, false)
	w.register(node, pool(volume.PoolID("p"+strings.TrimPrefix(string(node), "n")), node, 100*gib))
}

// commit is what a volume's engine asks for.
func (w *world) commit(id volume.ID, c replication.Reconfigure) {
	w.t.Helper()
	v := w.get(id)
	c.Epoch, c.ConfigVersion = v.Epoch, v.ConfigVersion
	if _, err := w.Commit(context.Background(), id, replication.Change{Reconfigure: &c}); err != nil {
		w.t.Fatal(err)
	}
}

// engine does what the engine of a volume does in the end: what is behind and can be reached is in sync.
func (w *world) engine(id volume.ID) {
	w.t.Helper()
	v := w.get(id)
	if v.Owner == "" {
		return
	}
	for _, r := range v.Replicas {
		w.agents.mu.Lock()
		x, there := w.agents.replicas[r.ID]
		down := w.agents.down[r.Node]
		if there && !down && r.Role != volume.InSync {
			x.bytes = w.agents.replicas[v.InSync()[0].ID].bytes
			w.agents.replicas[r.ID] = x
		}
		w.agents.mu.Unlock()
		if there && !down && r.Role != volume.InSync {
			w.commit(id, replication.Reconfigure{Add: []replication.Proof{{ID: r.ID, Incarnation: 1, BootID: 1}}})
		}
	}
}

func (w *world) carryOut(a reconcile.Action) {
	w.t.Helper()
	ctx := context.Background()
	var err error
	switch a.Kind {
	case reconcile.Add:
		err = w.AddReplica(ctx, volume.ID(a.ID), a.Pool)
	case reconcile.Drop:
		err = w.DropReplica(ctx, volume.ID(a.ID), a.Replica)
	case reconcile.Sync:
		err = w.Sync(ctx, volume.ID(a.ID))
	case reconcile.Move:
		err = w.DropHolder(ctx, volume.SnapshotID(a.ID), a.Pool)
	case reconcile.Copy:
		err = w.CopySnapshot(ctx, volume.SnapshotID(a.ID), a.From, a.Pool)
	case reconcile.End:
		err = w.EndCopy(ctx, volume.ID(a.ID), a.Replica)
	}
	if err != nil {
		w.t.Fatalf("%+v: %v", a, err)
	}
}

// repair plans and carries out repairs, with engines that do their part, until none are planned.
func (w *world) repair() {
	w.t.Helper()
	ctx := context.Background()
	for range 20 {
		st, err := w.State(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		actions := reconcile.Repairs(st, reconcile.Limits{})
		for _, a := range actions {
			w.carryOut(a)
		}
		for _, v := range st.Volumes {
			if v.State == volume.Ready {
				w.engine(v.ID)
			}
		}
		p, err := w.Pending(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, id := range p.Volumes {
			_ = w.ResumeVolume(ctx, id) // what is away stays unfinished
		}
		if len(actions) == 0 {
			return
		}
	}
	w.t.Fatal("repairs do not end")
}

func TestCreateOnSeveralNodes(t *testing.T) {
	w := newCluster(t)
	for n := 1; n <= 4; n++ {
		v := w.mustCreate(replicated(fmt.Sprint("v", n), n))
		if len(v.InSync()) != n || v.Replicas[0].Node != "n1" || v.Lineage != 1 || v.Epoch != 1 {
			t.Errorf("%d replicas: %+v", n, v)
		}
	}
	_, err := w.CreateVolume(context.Background(), replicated("five", 5))
	wantErr(t, err, volume.ErrNoSpace)
	w.check()
	w.deleteAll()
	w.check()
}

func TestANodeThatDoesNotAnswerIsReplacedAtCreate(t *testing.T) {
	w := newCluster(t)
	w.agents.setDown("n2", true) // nobody has noticed yet
	v := w.mustCreate(replicated("v", 3))
	if got := on(v.Replicas); got != "n1:in-sync n3:in-sync n4:in-sync" {
		t.Errorf("on %s", got)
	}
	w.agents.setDown("n3", true)
	_, err := w.CreateVolume(context.Background(), replicated("w", 3)) // there are not enough others
	wantErr(t, err, volume.ErrUnavailable)
	w.agents.setDown("n2", false)
	w.agents.setDown("n3", false)
	w.mustCreate(replicated("w", 3))
	w.reconcile()
	w.check()
}

func TestForcedDetach(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 3)).ID, "n1")
	if _, err := w.Commit(ctx, v.ID, replication.Change{Attach: &replication.Attach{Node: "n1"}}); err != nil { // its engine begins
		t.Fatal(err)
	}
	v = w.get(v.ID)
	w.agents.setDown("n1", true)
	w.agents.leases["n2"] = 30 * time.Millisecond
	begin := time.Now()
	wantErr(t, w.Detach(ctx, v.ID, "n1"), nil)
	if waited := time.Since(begin); waited < 30*time.Millisecond {
		t.Errorf("the lease was not waited for: %s", waited)
	}
	now := w.get(v.ID)
	if now.Attachment != nil || now.Owner != "" || now.Clean || now.Epoch != v.Epoch+1 || now.Silent != "n1" {
		t.Errorf("%+v", now)
	}
	for _, r := range now.Replicas {
		if got := w.agents.epochs[r.ID]; r.Node != "n1" && got != now.Epoch {
			t.Errorf("replica on %s is fenced with epoch %d, want %d", r.Node, got, now.Epoch)
		}
	}
	w.mustAttach(v.ID, "n4") // it has no replica
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	if now := w.get(v.ID); !now.Clean {
		t.Errorf("a clean detach: %+v", now)
	}
	w.check()
}

func TestADetachThatCannotBeFencedIsNone(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n1")
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[1].ID}})
	w.agents.setDown("n1", true)
	wantErr(t, w.Detach(ctx, v.ID, "n1"), volume.ErrUnavailable)
	_, err := w.Attach(ctx, control.Attach{Volume: v.ID, Node: "n2", Capability: mount()[0]})
	wantErr(t, err, volume.ErrInUse)
	if now := w.get(v.ID); now.Attachment == nil || now.Owner != "n1" {
		t.Errorf("%+v", now)
	}
	w.agents.setDown("n1", false)
	w.reconcile()
	w.check()
	w.mustAttach(v.ID, "n2")
}

func TestAReplicaThatStaysAway(t *testing.T) {
	ctx := context.Background()
	for _, attached := range []bool{true, false} {
		t.Run(fmt.Sprint("attached ", attached), func(t *testing.T) {
			w := newCluster(t)
			v := w.mustCreate(replicated("v", 3))
			for _, r := range v.Replicas {
				w.agents.write(r.ID, "precious")
			}
			lost := v.Replicas[2]
			if attached {
				w.mustAttach(v.ID, "n1")
				w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{lost.ID}})
			}
			w.silence(lost.Node, 5*time.Minute)
			w.repair()
			if got := w.get(v.ID); len(got.Replicas) != 3 || len(got.Leaving) != 0 {
				t.Fatalf("it may still come back: %s", on(got.Replicas))
			}
			w.silence(lost.Node, 6*time.Minute)
			w.repair()
			got := w.get(v.ID)
			if len(got.InSync()) != 3 || slices.ContainsFunc(got.Replicas, func(r volume.Replica) bool { return r.Node == lost.Node }) || len(got.Leaving) != 1 {
				t.Fatalf("on %s, leaving %s", on(got.Replicas), on(got.Leaving))
			}
			for _, r := range got.Replicas {
				if w.agents.contents(r.ID) != "precious" {
					t.Errorf("replica on %s has %q", r.Node, w.agents.contents(r.ID))
				}
			}
			// The node returns, and has what it should not have any more.
			w.comesBack(lost.Node)
			w.repair()
			w.reconcile()
			if got := w.get(v.ID); len(got.Leaving) != 0 || got.Owner != "" != attached {
				t.Errorf("%+v", got)
			}
			w.check()
			wantErr(t, w.Detach(ctx, v.ID, ""), nil)
			w.deleteAll()
			w.check()
		})
	}
}

func TestNobodyIsAwayBecauseNobodyLooked(t *testing.T) {
	w := newCluster(t)
	w.mustCreate(replicated("v", 3))
	if _, err := w.State(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(time.Hour) // no controller was there to report to
	st, err := w.State(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if as := reconcile.Repairs(st, reconcile.Limits{}); len(as) != 0 || len(st.Away) != 4 {
		t.Errorf("%v, away %v", as, st.Away)
	}
}

func TestDeleteDoesNotWaitForAReplicaThatIsAway(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 3))
	w.silence("n2", time.Hour)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	if got := w.get(v.ID); len(got.Replicas) != 1 || got.Replicas[0].Node != "n2" || got.Epoch != v.Epoch+1 {
		t.Errorf("%s", on(got.Replicas))
	}
	ns, err := w.Nodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range ns {
		if p := n.Pools[0]; (p.Provisioned > 0) != (n.ID == "n2") {
			t.Errorf("pool %s has %d provisioned", p.ID, p.Provisioned)
		}
	}
	w.comesBack("n2")
	w.reconcile()
	w.check()
}

func TestReplicasAreChangedOnline(t *testing.T) {
	ctx := context.Background()
	for _, attached := range []bool{true, false} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 1))
		w.agents.write(v.Replicas[0].ID, "precious")
		if attached {
			w.mustAttach(v.ID, "n1")
		}
		for _, n := range []int{2, 3, 1, 3, 2} {
			if _, err := w.ModifyVolume(ctx, v.ID, control.Modify{Replicas: &n}); err != nil {
				t.Fatal(err)
			}
			w.repair()
			got := w.get(v.ID)
			if len(got.InSync()) != n || len(got.Replicas) != n || len(got.Leaving) != 0 {
				t.Fatalf("%d wanted, attached %t: %s", n, attached, on(got.Replicas))
			}
			for _, r := range got.Replicas {
				if w.agents.contents(r.ID) != "precious" {
					t.Errorf("replica on %s has %q", r.Node, w.agents.contents(r.ID))
				}
			}
			w.reconcile()
			w.check()
		}
		two, three := 2, 3
		_, err := w.ModifyVolume(ctx, v.ID, control.Modify{MinInSync: &three, Replicas: &two})
		wantErr(t, err, volume.ErrInvalid)
		if got, err := w.ModifyVolume(ctx, v.ID, control.Modify{MinInSync: &two}); err != nil || got.Parameters.MinInSync != 2 {
			t.Errorf("%+v %v", got.Parameters, err)
		}
	}
}

func TestANodeIsEmptied(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	a, b := w.mustCreate(replicated("a", 1)), w.mustCreate(replicated("b", 2))
	w.mustAttach(b.ID, "n1")
	wantErr(t, w.RemoveNode(ctx, "n1"), volume.ErrInUse)
	wantErr(t, w.EmptyNode(ctx, "n1"), nil)
	w.repair()
	for _, id := range []volume.ID{a.ID, b.ID} {
		if got := w.get(id); strings.Contains(on(got.Replicas), "n1") || len(got.InSync()) != got.Parameters.Replicas {
			t.Errorf("on %s", on(got.Replicas))
		}
	}
	w.reconcile()
	w.check()
	wantErr(t, w.RemoveNode(ctx, "n1"), volume.ErrInUse) // b is attached to it
	wantErr(t, w.Detach(ctx, b.ID, ""), nil)
	wantErr(t, w.RemoveNode(ctx, "n1"), nil)
	if removed, err := w.RemovedNodes(ctx); err != nil || !slices.Equal(removed, []volume.NodeID{"n1"}) {
		t.Errorf("%v %v", removed, err)
	}
	wantErr(t, w.RegisterNode(ctx, volume.Node{ID: "n1"}), volume.ErrInUse)
}

func TestDrainIsGrantedOnlyWithACleanCopyElsewhere(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2)) // on n1 and n2
	alone := w.mustCreate(create("alone"))
	other := alone.Replicas[0].Node
	err := w.DrainNode(ctx, other)
	if wantErr(t, err, volume.ErrInUse); err != nil && !strings.Contains(err.Error(), string(alone.ID)) {
		t.Errorf("%v does not name %s", err, alone.ID)
	}
	snap, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: alone.ID})
	wantErr(t, err, nil)
	wantErr(t, w.DeleteVolume(ctx, alone.ID), nil)
	err = w.DrainNode(ctx, other)
	if wantErr(t, err, volume.ErrInUse); err != nil && !strings.Contains(err.Error(), "snapshot "+string(snap.ID)) {
		t.Errorf("%v does not name %s", err, snap.ID)
	}
	wantErr(t, w.DeleteSnapshot(ctx, snap.ID), nil)
	wantErr(t, w.DrainNode(ctx, "n1"), nil)
	wantErr(t, w.DrainNode(ctx, "n1"), nil)
	err = w.DrainNode(ctx, "n2")
	if wantErr(t, err, volume.ErrInUse); err != nil && !strings.Contains(err.Error(), string(v.ID)) {
		t.Errorf("%v does not name %s", err, v.ID)
	}
	if bs, err := w.DrainBlockers(ctx, "n2"); err != nil || len(bs) != 1 || bs[0].Volume != v.ID {
		t.Errorf("%v %v", bs, err)
	}
	if got := w.mustCreate(replicated("new", 3)); strings.Contains(on(got.Replicas), "n1") {
		t.Errorf("placed on a drained node: %s", on(got.Replicas))
	}
	// Two drains at once do not both see the other's node stay.
	_, err = w.store.Propose(ctx, command.SetNodeState{Node: "n2", State: volume.NodeDrained})
	wantErr(t, err, volume.ErrBusy)
	wantErr(t, w.UndrainNode(ctx, "n1"), nil)
	wantErr(t, w.DrainNode(ctx, "n2"), nil)
	wantErr(t, w.DrainNode(ctx, "n9"), volume.ErrNotFound)
}

func TestSnapshotsOfSeveralReplicas(t *testing.T) {
	for _, attached := range []bool{true, false} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 3))
		for _, r := range v.Replicas {
			w.agents.write(r.ID, "precious")
		}
		if attached {
			w.mustAttach(v.ID, "n4")
		}
		x := w.mustSnapshot("s", v.ID)
		if len(x.Holders) != 3 || x.Cut != nil || w.get(v.ID).Barrier != nil {
			t.Errorf("%+v", x)
		}
		if again := w.mustSnapshot("s", v.ID); again.ID != x.ID {
			t.Errorf("another one: %s", again.ID)
		}
		if !attached && (w.get(v.ID).Owner != "" || len(w.agents.engines) != 0) {
			t.Error("the engine still runs")
		}
		// One that is behind is no holder; a restore goes where the bytes are, and is filled elsewhere.
		w.mustAttach(v.ID, "n4")
		w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[1].ID}})
		y := w.mustSnapshot("t", v.ID)
		if len(y.Holders) != 2 {
			t.Errorf("%+v", y.Holders)
		}
		for i, from := range []volume.Source{{Snapshot: y.ID}, {Volume: v.ID}} {
			r := replicated(fmt.Sprint("restored", i), 3)
			r.Source = &from
			z := w.mustCreate(r)
			if len(z.InSync()) != 2+i || len(z.Replicas) != 3 { // by then the source's third is back
				t.Errorf("restored on %s", on(z.Replicas))
			}
			w.repair()
			z = w.get(z.ID)
			for _, r := range z.InSync() {
				if w.agents.contents(r.ID) != "precious" {
					t.Errorf("%v: replica on %s has %q", from, r.Node, w.agents.contents(r.ID))
				}
			}
			if len(z.InSync()) != 3 {
				t.Errorf("filled on %s", on(z.Replicas))
			}
		}
		w.reconcile()
		w.check()
		w.deleteAll()
		w.check()
	}
}

func TestACutThatAMemberFailsInStartsOver(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 3)).ID, "n1")
	w.agents.script("CutSnapshot", volume.ErrBusy)
	x := w.mustSnapshot("s", v.ID)
	if len(x.Holders) != 3 || w.get(v.ID).Barriers != 2 {
		t.Errorf("%+v", w.get(v.ID))
	}
	// A member goes between the announcement and the end: the barrier of the record is of another configuration.
	_, err := w.store.Propose(ctx, command.BeginSnapshot{ID: "snap-0", Name: "late", Volume: v.ID})
	wantErr(t, err, nil)
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[2].ID}})
	late, err := w.store.Snapshot(ctx, "snap-0")
	wantErr(t, err, nil)
	w.reconcile() // drops it
	if _, err := w.store.Snapshot(ctx, "snap-0"); !errors.Is(err, volume.ErrNotFound) || w.get(v.ID).Barrier != nil {
		t.Errorf("%+v is still pending: %v", late, err)
	}
	w.check()
}

func TestGroups(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	a := w.mustAttach(w.mustCreate(replicated("a", 2)).ID, "n1")
	b := w.mustAttach(w.mustCreate(replicated("b", 1)).ID, "n2")
	c := w.mustCreate(replicated("c", 3)) // detached, with several in sync
	d := w.mustCreate(replicated("d", 1))
	all := []volume.ID{d.ID, c.ID, b.ID, a.ID}
	g, err := w.CreateGroup(ctx, control.CreateGroup{Name: "g", Volumes: all})
	if err != nil || g.State != volume.Ready || len(g.Members) != 4 || len(w.agents.drained) != 0 {
		t.Fatalf("%+v %v", g, err)
	}
	// All hold their writes before the first is cut, and go on after the last.
	last, first, release := -1, len(w.agents.calls), len(w.agents.calls)
	for i, call := range w.agents.calls {
		switch what, _, _ := strings.Cut(call, " "); what {
		case "Drain":
			last = i
		case "CutSnapshot":
			first = min(first, i)
		case "Release":
			release = min(release, i)
		}
	}
	if !(last >= 0 && last < first && first < release) {
		t.Errorf("calls %v", w.agents.calls)
	}
	again, err := w.CreateGroup(ctx, control.CreateGroup{Name: "g", Volumes: []volume.ID{a.ID, b.ID, c.ID, d.ID, a.ID}})
	if err != nil || again.ID != g.ID {
		t.Errorf("%+v %v", again, err)
	}
	_, err = w.CreateGroup(ctx, control.CreateGroup{Name: "g", Volumes: all[:2]})
	wantErr(t, err, volume.ErrExists)
	wantErr(t, w.DeleteSnapshot(ctx, g.Members[0].ID), volume.ErrInvalid)
	if got, err := w.Group(ctx, g.ID); err != nil || len(got.Members) != 4 {
		t.Errorf("%+v %v", got, err)
	}
	w.check()
	// One of them cannot be cut: nothing is left.
	for _, cause := range []error{volume.ErrNoSpace, volume.ErrUnavailable} {
		w.agents.script("CutSnapshot", cause)
		_, err = w.CreateGroup(ctx, control.CreateGroup{Name: "h", Volumes: all})
		wantErr(t, err, cause)
		w.reconcile()
		w.check()
		if xs, _, err := w.Snapshots(ctx, control.SnapshotFilter{}, control.Page{All: true}); err != nil || len(xs) != 4 {
			t.Errorf("%d snapshots, %v", len(xs), err)
		}
	}
	// An attach between the announcement and the end: the group is not of one instant.
	wantErr(t, w.DeleteGroup(ctx, g.ID), nil)
	wantErr(t, w.DeleteGroup(ctx, g.ID), nil)
	_, err = w.Group(ctx, g.ID)
	wantErr(t, err, volume.ErrNotFound)
	w.check()
}

func TestAGroupIsOfOneEpoch(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(create("v"))
	_, err := w.store.Propose(ctx, command.BeginGroup{ID: "group-1", Name: "g", Volumes: []volume.ID{v.ID}, IDs: []volume.SnapshotID{"snap-1"}})
	wantErr(t, err, nil)
	w.mustAttach(v.ID, "n1")
	cut := command.Cut{Snapshot: "snap-1", ConfigVersion: 1, Holders: []volume.ReplicaID{v.Replicas[0].ID}}
	_, err = w.store.Propose(ctx, command.FinishGroup{Group: "group-1", Cuts: []command.Cut{cut}})
	wantErr(t, err, volume.ErrBusy)
	w.reconcile()
	w.check()
}

func TestExpandOfSeveralReplicas(t *testing.T) {
	ctx := context.Background()
	for _, attached := range []bool{true, false} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 3))
		if attached {
			w.mustAttach(v.ID, "n4")
		}
		got, err := w.ExpandVolume(ctx, v.ID, 2*gib, 0)
		if err != nil || got.Size != 2*gib {
			t.Errorf("%+v %v", got, err)
		}
		w.check()
		// Refused by one while others have grown: nothing is exposed.
		method := map[bool]string{true: "ExpandVolume", false: "ResizeReplica"}[attached]
		w.agents.script(method, volume.ErrNoSpace)
		_, err = w.ExpandVolume(ctx, v.ID, 3*gib, 0)
		wantErr(t, err, volume.ErrNoSpace)
		if got := w.get(v.ID); got.Size != 2*gib || got.Target != 0 || len(got.InSync()) != 3 {
			t.Errorf("size %d, target %d, in sync %s", got.Size, got.Target, on(got.InSync()))
		}
		w.check()
		if got, err := w.ExpandVolume(ctx, v.ID, 3*gib, 0); err != nil || got.Size != 3*gib {
			t.Errorf("with room: %+v %v", got, err)
		}
		w.check()
		if attached {
			continue
		}
		// One did not answer, and when it is asked again it refuses.
		w.agents.script(method, volume.ErrUnavailable)
		_, err = w.ExpandVolume(ctx, v.ID, 4*gib, 0)
		wantErr(t, err, volume.ErrUnavailable)
		if got := w.get(v.ID); got.Size != 3*gib || got.Target != 4*gib {
			t.Errorf("size %d, target %d", got.Size, got.Target)
		}
		w.agents.script(method, volume.ErrNoSpace)
		wantErr(t, w.ResumeVolume(ctx, v.ID), nil)
		if got := w.get(v.ID); got.Size != 3*gib || got.Target != 0 {
			t.Errorf("size %d, target %d", got.Size, got.Target)
		}
		w.check()
	}
}

func TestASilentNodeIsNotWaitedFor(t *testing.T) {
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n4")
	w.agents.setDown("n4", true)
	w.silence("n4", time.Hour)
	w.agents.hanging("n4")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
}

func TestASnapshotIsDeletedWhereItMayHaveBeenFilledIn(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 2)).ID, "n1")
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{v.Replicas[1].ID}})
	x := w.mustSnapshot("s", v.ID)
	filled := volume.SnapshotID(fmt.Sprintf("%s@%s", x.ID, v.Replicas[1].Pool))
	w.agents.mu.Lock()
	w.agents.snapshots[filled] = fakeReplica{pool: v.Replicas[1].Pool}
	w.agents.mu.Unlock()
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	w.check()
}

func TestAReplicaThatLeavesTakesAlongWhatWasFilledIn(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 1)).ID, "n1")
	x := w.mustSnapshot("s", v.ID)
	two, one := 2, 1
	_, err := w.ModifyVolume(ctx, v.ID, control.Modify{Replicas: &two})
	wantErr(t, err, nil)
	w.repair()
	r := w.get(v.ID).Replicas[1]
	w.agents.mu.Lock() // its engine filled the snapshot in, and did not get to say so
	w.agents.snapshots[volume.SnapshotID(fmt.Sprintf("%s@%s", x.ID, r.Pool))] = fakeReplica{pool: r.Pool}
	w.agents.mu.Unlock()
	_, err = w.ModifyVolume(ctx, v.ID, control.Modify{Replicas: &one})
	wantErr(t, err, nil)
	w.repair()
	w.reconcile()
	w.check()
}

func TestASnapshotThatWasFilledInIsHeld(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 1)).ID, "n1")
	x := w.mustSnapshot("s", v.ID)
	two := 2
	_, err := w.ModifyVolume(ctx, v.ID, control.Modify{Replicas: &two})
	wantErr(t, err, nil)
	st, err := w.State(ctx)
	wantErr(t, err, nil)
	add := reconcile.Repairs(st, reconcile.Limits{})[0]
	wantErr(t, w.AddReplica(ctx, v.ID, add.Pool), nil)
	r := w.get(v.ID).Replicas[1]
	w.agents.mu.Lock()
	w.agents.snapshots[volume.SnapshotID(fmt.Sprintf("%s@%s", x.ID, r.Pool))] = fakeReplica{pool: r.Pool}
	w.agents.mu.Unlock()
	for i, want := range []int{1, 1, 2, 2} { // while it is being filled, and then
		if i == 2 {
			w.engine(v.ID)
		}
		w.now = w.now.Add(time.Minute)
		u := control.Usage{Snapshots: map[volume.SnapshotID]int64{x.ID: 7}}
		wantErr(t, w.ReportUsage(ctx, r.Node, u), nil)
		got, err := w.Snapshot(ctx, x.ID)
		if err != nil || len(got.Holders) != want || (want == 2) != (got.PhysicalBytes == 7) {
			t.Errorf("%d: %+v %v", i, got, err)
		}
		if strays, err := w.Strays(ctx); err != nil || len(strays) != 0 {
			t.Errorf("%+v %v", strays, err)
		}
	}
	w.check()
}

func TestSalvage(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 3))
	r := v.Replicas
	w.mustAttach(v.ID, "n4")
	w.agents.reports[r[0].ID] = control.ReplicaReport{Present: true, Role: volume.InSync, Size: gib}
	_, err := w.Salvage(ctx, v.ID, r[1].ID, true) // it can be detached
	wantErr(t, err, volume.ErrInUse)
	w.commit(v.ID, replication.Reconfigure{Remove: []volume.ReplicaID{r[1].ID, r[2].ID}})
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	report := func(version volume.ConfigVersion) control.ReplicaReport {
		return control.ReplicaReport{Present: true, Role: volume.Stale, Lineage: 1, Epoch: 2, ConfigVersion: version, Size: gib}
	}
	w.agents.reports[r[0].ID], w.agents.reports[r[1].ID], w.agents.reports[r[2].ID] = report(9), report(3), report(4)
	_, err = w.Salvage(ctx, v.ID, r[1].ID, false) // the one in sync can be reached
	wantErr(t, err, volume.ErrInUse)
	w.agents.setDown("n1", true)
	list, err := w.Candidates(ctx, v.ID)
	if err != nil || len(list) != 3 || list[0].Replica.ID != r[2].ID || list[1].Replica.ID != r[1].ID || list[2].Report != nil || list[2].Against == "" {
		t.Fatalf("%+v %v", list, err)
	}
	_, err = w.Salvage(ctx, v.ID, r[1].ID, false) // an older one
	wantErr(t, err, volume.ErrInUse)
	_, err = w.Salvage(ctx, v.ID, r[0].ID, true) // it cannot be asked
	wantErr(t, err, volume.ErrInvalid)
	_, err = w.Salvage(ctx, v.ID, "rep-none", true)
	wantErr(t, err, volume.ErrNotFound)
	before := w.get(v.ID)
	got, err := w.Salvage(ctx, v.ID, r[2].ID, false)
	if err != nil || got.Lineage != 2 || got.Epoch <= before.Epoch || got.ConfigVersion <= 4 {
		t.Fatalf("%+v %v", got, err)
	}
	if in := got.InSync(); len(in) != 1 || in[0].ID != r[2].ID || len(got.Replicas) != 3 {
		t.Errorf("on %s", on(got.Replicas))
	}
}

func TestPhysicalBytesOfSeveralReplicas(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	x := w.mustSnapshot("s", v.ID)
	for i, r := range v.Replicas {
		u := control.Usage{Replicas: map[volume.ReplicaID]int64{r.ID: int64(10 + i)}, Snapshots: map[volume.SnapshotID]int64{x.ID: 5}}
		wantErr(t, w.ReportUsage(ctx, r.Node, u), nil)
	}
	if got := w.get(v.ID); got.PhysicalBytes != 21 {
		t.Errorf("%+v", got)
	}
	qs, err := w.Quotas(ctx)
	if want := (volume.Amounts{LogicalBytes: gib, PhysicalBytes: 31, Volumes: 1, Snapshots: 1}); err != nil || len(qs) != 1 || qs[0].Used != want {
		t.Errorf("%+v %v", qs, err)
	}
	w.check()
	w.deleteAll()
	w.check()
}

// TestLeaseIsCountedFromTheFence: a replica that does not answer is waited for while the lease of another runs, not before.
func TestLeaseIsCountedFromTheFence(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustAttach(w.mustCreate(replicated("v", 3)).ID, "n4")
	if _, err := w.Commit(ctx, v.ID, replication.Change{Attach: &replication.Attach{Node: "n4"}}); err != nil {
		t.Fatal(err)
	}
	const lease = time.Second
	w.agents.setDown("n4", true)
	w.agents.leases["n2"] = lease
	w.agents.slow["n3"] = lease - 100*time.Millisecond
	begin := time.Now()
	wantErr(t, w.Detach(ctx, v.ID, "n4"), nil)
	if waited := time.Since(begin); waited < lease || waited >= 2*lease-100*time.Millisecond {
		t.Errorf("a lease of %s was waited for in %s", lease, waited)
	}
}
