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

// orphan makes a snapshot, of the bytes given, of a volume with two replicas, on n1 and n2, which is deleted then.
func (w *world) orphan(name, bytes string) volume.Snapshot {
	w.t.Helper()
	v := w.mustCreate(replicated(name, 2))
	for _, r := range v.Replicas {
		w.agents.write(r.ID, bytes)
	}
	x := w.mustSnapshot("s"+name, v.ID)
	wantErr(w.t, w.DeleteVolume(context.Background(), v.ID), nil)
	return x
}

// fill does what engines of copies do in the end: the second replica is filled, and seals what the first has of snapshots.
func (w *world) fill() {
	w.t.Helper()
	ctx := context.Background()
	vs, err := w.store.Volumes(ctx, "", 0)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, v := range vs {
		if v.Kept == "" || v.State != volume.Ready || v.Owner == "" || v.Replicas[1].Role == volume.InSync {
			continue
		}
		from, to := v.Replicas[0], v.Replicas[1]
		w.agents.mu.Lock()
		source, there := w.agents.replicas[from.ID]
		target, made := w.agents.replicas[to.ID]
		down := w.agents.down[from.Node] || w.agents.down[to.Node]
		at := func(x volume.SnapshotID, p volume.PoolID) volume.SnapshotID {
			return volume.SnapshotID(fmt.Sprintf("%s@%s", x, p))
		}
		if there && made && !down {
			target.bytes = source.bytes
			w.agents.replicas[to.ID] = target
			target.bytes = w.agents.snapshots[at(v.Kept, from.Pool)].bytes
			w.agents.snapshots[at(v.Kept, to.Pool)] = target
		}
		w.agents.mu.Unlock()
		if !there || !made || down {
			continue
		}
		w.propose(command.Commit{Volume: v.ID, Change: replication.Change{Reconfigure: &replication.Reconfigure{
			Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Add: []replication.Proof{{ID: to.ID, Incarnation: 1, BootID: 1}}}}})
		if _, err := w.store.Propose(ctx, command.AddHolder{Snapshot: v.Kept, Node: v.Owner, Replica: to.ID}); err != nil && !errors.Is(err, volume.ErrNotFound) {
			w.t.Fatal(err)
		}
	}
}

// copyOn takes up once what is planned of copies, and what is unfinished.
func (w *world) copyOn(ctx context.Context) (planned int, err error) {
	st, err := w.State(ctx)
	if err != nil {
		return 0, err
	}
	for _, a := range reconcile.Repairs(st, reconcile.Limits{}) {
		switch a.Kind {
		case reconcile.Copy:
			err = errors.Join(err, w.CopySnapshot(ctx, volume.SnapshotID(a.ID), a.From, a.Pool))
		case reconcile.Sync:
			if w.get(volume.ID(a.ID)).Kept == "" {
				continue
			}
			err = errors.Join(err, w.Sync(ctx, volume.ID(a.ID)))
		case reconcile.End:
			err = errors.Join(err, w.EndCopy(ctx, volume.ID(a.ID), a.Replica))
		default:
			continue
		}
		planned++
	}
	w.fill()
	p, e := w.Pending(ctx)
	err = errors.Join(err, e)
	for _, id := range p.Volumes {
		err = errors.Join(err, w.ResumeVolume(ctx, id))
	}
	return planned, err
}

// copyAll goes on until nothing is planned; what is away may stay unfinished.
func (w *world) copyAll() {
	w.t.Helper()
	for range 20 {
		if _, err := w.copyOn(context.Background()); err != nil && !errors.Is(err, volume.ErrUnavailable) {
			w.t.Fatal(err)
		}
	}
}

func (w *world) snapshotOf(id volume.SnapshotID) volume.Snapshot {
	w.t.Helper()
	x, err := w.store.Snapshot(context.Background(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return x
}

func (w *world) holders(id volume.SnapshotID) string {
	w.t.Helper()
	var on []string
	for _, h := range w.snapshotOf(id).Holders {
		on = append(on, string(h.Node))
	}
	slices.Sort(on)
	return strings.Join(on, " ")
}

// begin goes on until a snapshot is being copied.
func (w *world) begin(x volume.Snapshot) volume.Volume {
	w.t.Helper()
	plan := w.planned()
	if len(plan) != 1 || plan[0].Kind != reconcile.Copy || plan[0].ID != string(x.ID) {
		w.t.Fatalf("planned %+v", plan)
	}
	w.carryOut(plan[0])
	v := w.get(x.Volume)
	if v.Kept != x.ID || v.State != volume.Ready || v.Owner != v.Replicas[0].Node {
		w.t.Fatalf("%+v", v)
	}
	return v
}

const replicaTimeout = 15 * time.Minute // is more than the reconciler's

func TestASnapshotOutlivesItsHolders(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	x := w.orphan("v", "precious")
	w.silence("n2", 5*time.Minute)
	if plan := w.planned(); len(plan) != 0 {
		t.Errorf("planned %+v after a short time", plan)
	}
	w.silence("n2", replicaTimeout)
	before, err := w.Quotas(ctx)
	wantErr(t, err, nil)
	v := w.begin(x)

	// What is there for the copy is nobody's volume.
	for name, call := range map[string]func() error{
		"get": func() error { _, err := w.Volume(ctx, v.ID); return err }, "health": func() error { _, err := w.Health(ctx, v.ID); return err },
		"attach": func() error {
			_, err := w.Attach(ctx, control.Attach{Volume: v.ID, Node: "n1", Capability: mount()[0]})
			return err
		},
		"expand": func() error { _, err := w.ExpandVolume(ctx, v.ID, 4*gib, 0); return err }, "modify": func() error { _, err := w.ModifyVolume(ctx, v.ID, control.Modify{}); return err },
		"snapshot": func() error {
			_, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "t", Volume: v.ID})
			return err
		},
		"group": func() error {
			_, err := w.CreateGroup(ctx, control.CreateGroup{Name: "g", Volumes: []volume.ID{v.ID}})
			return err
		},
		"clone": func() error {
			r := create("clone")
			r.Source = &volume.Source{Volume: v.ID}
			_, err := w.CreateVolume(ctx, r)
			return err
		},
		"salvage": func() error { _, err := w.Salvage(ctx, v.ID, v.Replicas[0].ID, true); return err }, "candidates": func() error { _, err := w.Candidates(ctx, v.ID); return err },
		"why": func() error { _, err := w.Why(ctx, v.ID); return err },
	} {
		if err := call(); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	vs, _, err := w.Volumes(ctx, control.Page{All: true})
	if err != nil || len(vs) != 0 {
		t.Errorf("listed: %+v %v", vs, err)
	}
	if bs, err := w.DrainBlockers(ctx, "n1"); err != nil || len(bs) != 1 || bs[0].Snapshot != x.ID { // not for the volume's sake
		t.Errorf("n1 must not be drained for %v %v", bs, err)
	}
	if after, err := w.Quotas(ctx); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("use was %v, is %v", before, after)
	}
	if got, err := w.Record(ctx, v.ID); err != nil || got.Kept != x.ID {
		t.Errorf("nodes find %+v, %v", got, err)
	}

	w.copyAll()
	if _, err := w.store.Volume(ctx, v.ID); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("the copy has not ended: %v", err)
	}
	if got := w.holders(x.ID); got != "n1 n2 n3" {
		t.Fatalf("held by %s", got)
	}
	w.silence("n1", replicaTimeout)
	w.comesBack("n2")
	w.agents.setDown("n2", true)
	r := replicated("restored", 1)
	r.Source, r.Preferred = &volume.Source{Snapshot: x.ID}, []volume.NodeID{"n3"}
	got := w.mustCreate(r)
	if got.Replicas[0].Node != "n3" || w.agents.contents(got.Replicas[0].ID) != "precious" {
		t.Errorf("restored on %s: %q", on(got.Replicas), w.agents.contents(got.Replicas[0].ID))
	}
	w.comesBack("n1")
	w.comesBack("n2")
	w.reconcile()
	w.check()
	w.deleteAll()
	w.check()
	if ks, err := w.store.Remains(ctx); err != nil || len(ks) != 0 {
		t.Errorf("%+v is kept for nothing: %v", ks, err)
	}
}

// What makes a copy pointless ends it, wherever it is, and what it was made with is freed.
func TestACopyEnds(t *testing.T) {
	for name, why := range map[string]func(w *world, x volume.Snapshot, v volume.Volume){
		"its holder is back": func(w *world, _ volume.Snapshot, _ volume.Volume) { w.comesBack("n2") },
		"the target is away": func(w *world, _ volume.Snapshot, v volume.Volume) { w.silence(v.Replicas[1].Node, 3*time.Minute) },
		"the target is taken": func(w *world, _ volume.Snapshot, v volume.Volume) {
			wantErr(w.t, w.EmptyNode(context.Background(), v.Replicas[1].Node), nil)
		},
		"the source is damaged": func(w *world, x volume.Snapshot, v volume.Volume) {
			w.scrubbed(v.Replicas[0].Node, nil, []volume.SnapshotID{x.ID})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newCluster(t)
			x := w.orphan("v", "precious")
			w.silence("n2", replicaTimeout)
			v := w.begin(x)
			why(w, x, v)
			plan := w.planned()
			if len(plan) == 0 || plan[0].Kind != reconcile.End {
				t.Fatalf("planned %+v", plan)
			}
			if err := w.EndCopy(context.Background(), volume.ID(plan[0].ID), plan[0].Replica); err != nil && !errors.Is(err, volume.ErrUnavailable) {
				t.Fatal(err)
			}
			for range 3 {
				for i := 1; i <= 4; i++ {
					w.comesBack(volume.NodeID(fmt.Sprint("n", i)))
				}
				w.reconcile()
			}
			w.check()
			w.deleteAll()
			w.check()
		})
	}
}

func TestDeletedWhileItIsCopied(t *testing.T) {
	ctx := context.Background()
	for _, filled := range []bool{false, true} {
		w := newCluster(t)
		x := w.orphan("v", "precious")
		w.silence("n2", replicaTimeout)
		v := w.begin(x)
		wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
		if filled { // an order to seal it comes late
			w.fill()
		}
		w.comesBack("n2")
		w.copyAll()
		w.reconcile()
		if _, err := w.store.Snapshot(ctx, x.ID); !errors.Is(err, volume.ErrNotFound) {
			t.Error(err)
		}
		if _, err := w.store.Volume(ctx, v.ID); !errors.Is(err, volume.ErrNotFound) {
			t.Error(err)
		}
		w.check()
		if rs, ss := w.agents.held(); len(rs)+len(ss) > 0 {
			t.Errorf("filled %v: left %v %v", filled, rs, ss)
		}
	}
}

// A node that was away when the volume was deleted, or that goes while it is copied to, keeps nobody waiting.
func TestWhatIsAwayIsFreedWhenItReturns(t *testing.T) {
	ctx := context.Background()
	w := newCluster(t)
	v := w.mustCreate(replicated("v", 2))
	for _, r := range v.Replicas {
		w.agents.write(r.ID, "precious")
	}
	x := w.mustSnapshot("s", v.ID)
	w.silence("n2", 3*time.Minute)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	if got := w.get(v.ID); got.State != volume.Deleting {
		t.Fatalf("%+v", got)
	}
	w.silence("n2", replicaTimeout)
	got := w.begin(x)
	to := got.Replicas[1].Node
	w.agents.setDown("n2", true)
	w.silence(to, 3*time.Minute) // n2 reports again, and does not answer
	w.copyAll()
	w.silence("n2", replicaTimeout)
	w.agents.setDown(to, true)
	for range 10 {
		w.now = w.now.Add(time.Second)
		_, _ = w.copyOn(ctx)
	}
	if on := w.holders(x.ID); on != "n1 n2 n3" && on != "n1 n2 n4" {
		t.Errorf("held by %s", on)
	}
	for i := 1; i <= 4; i++ {
		w.comesBack(volume.NodeID(fmt.Sprint("n", i)))
	}
	w.copyAll()
	w.reconcile()
	w.check()
	w.deleteAll()
	w.check()
}

// A pool that is gone for good takes its end of a copy with it.
func TestForgetPoolOfACopy(t *testing.T) {
	ctx := context.Background()
	for end := range 2 {
		w := newCluster(t)
		x := w.orphan("v", "precious")
		w.silence("n2", replicaTimeout)
		v := w.begin(x)
		node := v.Replicas[end].Node
		w.silence(node, 3*time.Minute)
		w.comesBack("n2")
		_, err := w.ForgetPool(ctx, v.Replicas[end].Pool, false)
		wantErr(t, err, nil)
		w.agents.mu.Lock() // with its disk
		for id, r := range w.agents.replicas {
			if r.node == node {
				delete(w.agents.replicas, id)
			}
		}
		for id := range w.agents.snapshots {
			if strings.HasSuffix(string(id), "@"+string(v.Replicas[end].Pool)) {
				delete(w.agents.snapshots, id)
			}
		}
		w.agents.mu.Unlock()
		w.copyAll()
		if got := w.holders(x.ID); strings.Contains(got, string(node)) || len(strings.Fields(got)) < 2 {
			t.Errorf("end %d: held by %s", end, got)
		}
		w.check()
	}
}

// Where a pool cannot make its end, the copy ends: another is chosen next time.
func TestARefusedCopyEnds(t *testing.T) {
	ctx := context.Background()
	for _, refusal := range []error{volume.ErrNotFound, volume.ErrNoSpace} {
		w := newCluster(t)
		x := w.orphan("v", "precious")
		w.silence("n2", replicaTimeout)
		w.agents.script("CreateReplica", refusal)
		plan := w.planned()
		wantErr(t, w.CopySnapshot(ctx, x.ID, plan[0].From, plan[0].Pool), refusal)
		if _, err := w.store.Volume(ctx, x.Volume); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%v: it is still there: %v", refusal, err)
		}
		w.check()
		w.copyAll()
		if got := w.holders(x.ID); got != "n1 n2 n3" {
			t.Errorf("held by %s", got)
		}
		w.check()
	}
}

// What a pool has without a record stays there, and another pool is chosen.
func TestAStrayIsNotMet(t *testing.T) {
	ctx := context.Background()
	for _, which := range []string{"itself", "an earlier one"} {
		w := newCluster(t)
		v := w.mustCreate(replicated("v", 2))
		x := w.mustSnapshot("s", v.ID)
		stray := x.ID
		w.now = w.now.Add(time.Second)
		if which == "an earlier one" {
			x = w.mustSnapshot("t", v.ID)
			for _, h := range w.snapshotOf(stray).Holders { // it has copies enough
				w.propose(command.DropHolder{Snapshot: stray, Pool: h.Pool, Lost: true})
			}
		}
		wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
		key := volume.SnapshotID(string(stray) + "@p3")
		w.agents.snapshots[key] = fakeReplica{node: "n3", pool: "p3", bytes: "of whom?"}
		w.silence("n2", replicaTimeout)
		plan := w.planned()
		if len(plan) != 1 || plan[0].Pool != "p3" {
			t.Fatalf("%s: planned %+v", which, plan)
		}
		wantErr(t, w.CopySnapshot(ctx, x.ID, plan[0].From, plan[0].Pool), volume.ErrExists)
		w.copyAll()
		if got := w.holders(x.ID); got != "n1 n2 n4" {
			t.Errorf("%s: held by %s", which, got)
		}
		if got := w.agents.snapshots[key].bytes; got != "of whom?" {
			t.Errorf("%s: the stray is %q", which, got)
		}
	}
}

// Nobody has said what was filled in: the engine ended first. And one that filled nothing in, as if the source had not had it.
func TestACopyIsSettled(t *testing.T) {
	ctx := context.Background()
	for _, there := range []bool{true, false} {
		w := newCluster(t)
		x := w.orphan("v", "precious")
		w.silence("n2", replicaTimeout)
		v := w.begin(x)
		w.propose(command.Commit{Volume: v.ID, Change: replication.Change{Reconfigure: &replication.Reconfigure{
			Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Add: []replication.Proof{{ID: v.Replicas[1].ID, Incarnation: 1, BootID: 1}}}}})
		if there {
			w.agents.snapshots[x.ID+"@p3"] = fakeReplica{node: "n3", pool: "p3", bytes: "precious"}
		}
		plan := w.planned()
		if len(plan) != 1 || plan[0].Kind != reconcile.Sync {
			t.Fatalf("planned %+v", plan)
		}
		wantErr(t, w.Sync(ctx, v.ID), nil)
		want := map[bool]string{true: "n1 n2 n3", false: "n1 n2"}[there]
		if got := w.holders(x.ID); got != want {
			t.Errorf("held by %s, want %s", got, want)
		}
		w.copyAll()
		want = map[bool]string{true: "n1 n2 n3", false: "n1 n2 n4"}[there]
		if got := w.holders(x.ID); got != want {
			t.Errorf("held by %s in the end, want %s", got, want)
		}
		w.check()
	}
}

// copyCase is a copy from beginning to end: of a snapshot that a node which is being emptied holds.
func copyCase(grow func(w *world)) useCase {
	copies := func(w *world, id volume.SnapshotID) (n int) {
		for _, h := range w.snapshotOf(id).Holders {
			if h.Node != "n2" {
				n++
			}
		}
		return n
	}
	return useCase{
		name: "copy of a snapshot",
		setup: func(w *world) string {
			grow(w)
			wantErr(w.t, w.UndrainNode(context.Background(), "n2"), nil)
			x := w.orphan("v", "precious")
			wantErr(w.t, w.EmptyNode(context.Background(), "n2"), nil)
			return string(x.ID)
		},
		run: func(w *world, ctx context.Context, arg string) error {
			id := volume.SnapshotID(arg)
			for range 20 {
				n, err := w.copyOn(ctx)
				if err != nil {
					return fmt.Errorf("%v: %w", err, volume.ErrUnavailable) // nobody has asked for it: it goes on later
				}
				if _, err = w.store.Volume(context.Background(), w.snapshotOf(id).Volume); n == 0 && errors.Is(err, volume.ErrNotFound) {
					return nil
				}
			}
			return fmt.Errorf("snapshot %s is copied and copied", id)
		},
		done: func(w *world, arg string) {
			if n := copies(w, volume.SnapshotID(arg)); n != 2 {
				w.t.Errorf("%d copies", n)
			}
			w.agents.mu.Lock()
			defer w.agents.mu.Unlock()
			if got := w.agents.snapshots[volume.SnapshotID(arg+"@p3")].bytes; got != "precious" {
				w.t.Errorf("copied %q", got)
			}
		},
	}
}
