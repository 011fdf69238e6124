package control_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// useCase is one operation on a world that was set up for it.
type useCase struct {
	name  string
	setup func(w *world) (arg string)
	run   func(w *world, ctx context.Context, arg string) error
	// done checks what must hold once run returned nil.
	done func(w *world, arg string)
}

func useCases() []useCase {
	byName := func(w *world, name string) volume.Volume {
		v, err := w.store.VolumeByName(context.Background(), name)
		if err != nil {
			w.t.Fatal(err)
		}
		if v.State != volume.Ready {
			w.t.Fatalf("volume is %s", v.State)
		}
		return v
	}
	small := func(name string, src *volume.Source) control.CreateVolume {
		r := create(name)
		r.Source = src
		return r
	}
	return []useCase{
		{
			name:  "create",
			setup: func(*world) string { return "" },
			run: func(w *world, ctx context.Context, _ string) error {
				_, err := w.CreateVolume(ctx, create("v"))
				return err
			},
			done: func(w *world, _ string) { byName(w, "v") },
		},
		{
			name: "restore",
			setup: func(w *world) string {
				v := w.mustCreate(create("src"))
				w.agents.write(v.Replicas[0].ID, "precious")
				x := w.mustSnapshot("s", v.ID)
				if err := w.DeleteVolume(context.Background(), v.ID); err != nil {
					w.t.Fatal(err)
				}
				return string(x.ID)
			},
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.CreateVolume(ctx, small("v", &volume.Source{Snapshot: volume.SnapshotID(arg)}))
				return err
			},
			done: func(w *world, arg string) {
				if got := w.agents.contents(byName(w, "v").Replicas[0].ID); got != "precious" {
					w.t.Errorf("restored %q", got)
				}
			},
		},
		{
			name: "clone",
			setup: func(w *world) string {
				v := w.mustCreate(create("src"))
				w.agents.write(v.Replicas[0].ID, "precious")
				return string(v.ID)
			},
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.CreateVolume(ctx, small("v", &volume.Source{Volume: volume.ID(arg)}))
				return err
			},
			done: func(w *world, arg string) {
				if got := w.agents.contents(byName(w, "v").Replicas[0].ID); got != "precious" {
					w.t.Errorf("cloned %q", got)
				}
			},
		},
		{
			name:  "delete",
			setup: func(w *world) string { return string(w.mustCreate(create("v")).ID) },
			run:   func(w *world, ctx context.Context, arg string) error { return w.DeleteVolume(ctx, volume.ID(arg)) },
			done: func(w *world, arg string) {
				_, err := w.Volume(context.Background(), volume.ID(arg))
				wantErr(w.t, err, volume.ErrNotFound)
			},
		},
		{
			name: "delete with snapshot",
			setup: func(w *world) string {
				v := w.mustCreate(create("v"))
				w.mustSnapshot("s", v.ID)
				return string(v.ID)
			},
			run: func(w *world, ctx context.Context, arg string) error { return w.DeleteVolume(ctx, volume.ID(arg)) },
			done: func(w *world, arg string) {
				xs, _, err := w.Snapshots(context.Background(), control.SnapshotFilter{Volume: volume.ID(arg)}, control.Page{})
				if err != nil || len(xs) != 1 {
					w.t.Errorf("snapshots of the deleted volume: %v %v", xs, err)
				}
			},
		},
		{
			name:  "attach",
			setup: func(w *world) string { return string(w.mustCreate(create("v")).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.Attach(ctx, control.Attach{Volume: volume.ID(arg), Node: "n1", Capability: mount()[0]})
				return err
			},
			done: func(w *world, arg string) {
				if v := byName(w, "v"); v.Attachment == nil || v.Epoch != 2 {
					w.t.Errorf("attachment %+v, epoch %d", v.Attachment, v.Epoch)
				}
			},
		},
		{
			name: "detach",
			setup: func(w *world) string {
				return string(w.mustAttach(w.mustCreate(create("v")).ID, "n1").ID)
			},
			run: func(w *world, ctx context.Context, arg string) error { return w.Detach(ctx, volume.ID(arg), "n1") },
			done: func(w *world, arg string) {
				if v := byName(w, "v"); v.Attachment != nil {
					w.t.Errorf("attachment %+v", v.Attachment)
				}
				w.agents.mu.Lock()
				defer w.agents.mu.Unlock()
				if n, ok := w.agents.attached[volume.ID(arg)]; ok {
					w.t.Errorf("node %s can still write", n)
				}
			},
		},
		{
			name:  "expand",
			setup: func(w *world) string { return string(w.mustCreate(create("v")).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.ExpandVolume(ctx, volume.ID(arg), 2*gib, 0)
				return err
			},
			done: func(w *world, arg string) {
				if v := byName(w, "v"); v.Size != 2*gib {
					w.t.Errorf("size %d", v.Size)
				}
			},
		},
		{
			name: "modify",
			setup: func(w *world) string {
				return string(w.mustAttach(w.mustCreate(create("v")).ID, "n1").ID)
			},
			run: func(w *world, ctx context.Context, arg string) error {
				n := int64(100)
				_, err := w.ModifyVolume(ctx, volume.ID(arg), control.Modify{IOPS: &n})
				return err
			},
			done: func(w *world, arg string) {
				w.reconcile()
				if v := byName(w, "v"); v.QoS.IOPS != 100 || w.agents.qos[v.ID].IOPS != 100 {
					w.t.Errorf("limits: record %+v, node %+v", v.QoS, w.agents.qos[v.ID])
				}
			},
		},
		{
			name:  "snapshot",
			setup: func(w *world) string { return string(w.mustCreate(create("v")).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				v := byName(w, "v")
				bytes := "at " + fmt.Sprint(time.Now().UnixNano())
				w.agents.write(v.Replicas[0].ID, bytes)
				before, listErr := w.store.Snapshots(context.Background(), "", "", 0)
				if listErr != nil {
					return listErr
				}
				x, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: volume.ID(arg)})
				w.agents.mu.Lock()
				defer w.agents.mu.Unlock()
				if got := w.agents.snapshots[volume.SnapshotID(string(x.ID)+"@p1")].bytes; err == nil && got != bytes && !slices.ContainsFunc(before, func(o volume.Snapshot) bool { return o.ID == x.ID }) {
					w.t.Errorf("the snapshot has %q, acknowledged before it was %q", got, bytes)
				}
				return err
			},
			done: func(w *world, arg string) {
				xs, _, err := w.Snapshots(context.Background(), control.SnapshotFilter{}, control.Page{})
				if err != nil || len(xs) != 1 {
					w.t.Errorf("snapshots: %v %v", xs, err)
				}
			},
		},
		{
			name: "delete snapshot",
			setup: func(w *world) string {
				return string(w.mustSnapshot("s", w.mustCreate(create("v")).ID).ID)
			},
			run: func(w *world, ctx context.Context, arg string) error {
				return w.DeleteSnapshot(ctx, volume.SnapshotID(arg))
			},
			done: func(w *world, arg string) {
				_, err := w.Snapshot(context.Background(), volume.SnapshotID(arg))
				wantErr(w.t, err, volume.ErrNotFound)
			},
		},
	}
}

// severalCases are use cases on three nodes, with two replicas.
func severalCases() []useCase {
	grow := func(w *world) {
		for _, i := range []string{"2", "3"} {
			w.register(volume.NodeID("n"+i), pool(volume.PoolID("p"+i), volume.NodeID("n"+i), 100*gib))
		}
	}
	made := func(w *world) volume.Volume {
		grow(w)
		v := w.mustCreate(replicated("v", 2))
		for _, r := range v.Replicas {
			w.agents.write(r.ID, "precious")
		}
		return v
	}
	ready := func(w *world, name string) volume.Volume {
		v, err := w.store.VolumeByName(context.Background(), name)
		if err != nil || len(v.InSync()) != 2 || v.State != volume.Ready {
			w.t.Fatalf("volume %s: %+v %v", name, v, err)
		}
		return v
	}
	return []useCase{
		copyCase(grow),
		leaveCase(grow),
		{
			name:  "create on two nodes",
			setup: func(w *world) string { grow(w); return "" },
			run: func(w *world, ctx context.Context, _ string) error {
				_, err := w.CreateVolume(ctx, replicated("v", 2))
				return err
			},
			done: func(w *world, _ string) { ready(w, "v") },
		},
		{
			name:  "clone on two nodes",
			setup: func(w *world) string { return string(made(w).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				r := replicated("c", 2)
				r.Source = &volume.Source{Volume: volume.ID(arg)}
				_, err := w.CreateVolume(ctx, r)
				return err
			},
			done: func(w *world, _ string) {
				v, err := w.store.VolumeByName(context.Background(), "c")
				if err != nil || v.State != volume.Ready || len(v.Replicas) != 2 { // one of them may have to be filled
					w.t.Fatalf("%+v %v", v, err)
				}
				for _, r := range v.InSync() {
					if got := w.agents.contents(r.ID); got != "precious" {
						w.t.Errorf("replica on %s has %q", r.Node, got)
					}
				}
			},
		},
		{
			name:  "delete on two nodes",
			setup: func(w *world) string { return string(made(w).ID) },
			run:   func(w *world, ctx context.Context, arg string) error { return w.DeleteVolume(ctx, volume.ID(arg)) },
			done: func(w *world, arg string) {
				_, err := w.Volume(context.Background(), volume.ID(arg))
				wantErr(w.t, err, volume.ErrNotFound)
			},
		},
		{
			name:  "forced detach",
			setup: func(w *world) string { return string(w.mustAttach(made(w).ID, "n3").ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				w.agents.setDown("n3", true)
				defer w.agents.setDown("n3", false)
				return w.Detach(ctx, volume.ID(arg), "n3")
			},
			done: func(w *world, arg string) {
				if v := ready(w, "v"); v.Attachment != nil || v.Owner != "" {
					w.t.Errorf("%+v", v)
				}
				w.agents.mu.Lock()
				defer w.agents.mu.Unlock()
				if n, ok := w.agents.attached[volume.ID(arg)]; ok {
					w.t.Errorf("node %s can still write", n)
				}
			},
		},
		{
			name:  "expand on two nodes",
			setup: func(w *world) string { return string(made(w).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.ExpandVolume(ctx, volume.ID(arg), 2*gib, 0)
				return err
			},
			done: func(w *world, _ string) {
				if v := ready(w, "v"); v.Size != 2*gib {
					w.t.Errorf("size %d", v.Size)
				}
			},
		},
		{
			name:  "snapshot of two replicas",
			setup: func(w *world) string { return string(made(w).ID) },
			run: func(w *world, ctx context.Context, arg string) error {
				_, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: volume.ID(arg)})
				return err
			},
			done: func(w *world, _ string) {
				xs, _, err := w.Snapshots(context.Background(), control.SnapshotFilter{}, control.Page{})
				if err != nil || len(xs) != 1 || len(xs[0].Holders) != 2 {
					w.t.Errorf("snapshots: %v %v", xs, err)
				}
			},
		},
		{
			name: "group",
			setup: func(w *world) string {
				v := made(w)
				w.mustAttach(v.ID, "n1")
				return string(v.ID) + " " + string(w.mustCreate(create("other")).ID)
			},
			run: func(w *world, ctx context.Context, arg string) error {
				r := control.CreateGroup{Name: "g"}
				for _, id := range strings.Fields(arg) {
					r.Volumes = append(r.Volumes, volume.ID(id))
				}
				_, err := w.CreateGroup(ctx, r)
				return err
			},
			done: func(w *world, _ string) {
				gs, err := w.store.Groups(context.Background())
				if err != nil || len(gs) != 1 || gs[0].State != volume.Ready || len(gs[0].Snapshots) != 2 {
					w.t.Errorf("groups: %+v %v", gs, err)
				}
			},
		},
	}
}

// Every use case is struck at every side effect in every way, and then taken on in three ways: the same call again, in
// a new process or in the same one, and the reconciler followed by the deletion of everything. Nothing may leak or hang.
func TestStruckAtEveryStep(t *testing.T) {
	several := severalCases()
	for i, u := range append(several, useCases()...) {
		for _, m := range modes {
			for _, after := range []string{"retry", "retry without restart", "reconcile"} {
				crash := m == crashBefore || m == crashAfter
				if after == "retry without restart" && (crash || i < len(several)) {
					continue // a crash is a restart, and the rest is the same on several nodes
				}
				if i < len(several) && (m == crashBefore || m == failBefore || m == inUse) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%s", u.name, m, after), func(t *testing.T) {
					t.Parallel()
					w := newWorld(t)
					for k := 1; ; k++ {
						if k > 30 {
							t.Fatal("the use case has no end")
						}
						if !strike(w, u, m, k, after) {
							return
						}
						if t.Failed() {
							t.Fatalf("struck at step %d", k)
						}
					}
				})
			}
		}
	}
}

// strike tells whether there was a step k. It leaves an empty world.
func strike(w *world, u useCase, m mode, k int, after string) (reached bool) {
	t := w.t
	arg := u.setup(w)
	w.check()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w.f.arm(k, m, cancel)
	err := u.run(w, ctx, arg)
	reached = w.f.steps() >= k
	if !reached && err != nil {
		t.Fatalf("step %d: %v", k, err)
	}
	w.f.arm(0, "", nil)
	if err == nil {
		u.done(w, arg)
	}
	if final(err) { // nothing exists and nothing is running
		w.check()
	}
	if after != "retry without restart" || m == crashBefore || m == crashAfter {
		w.restart()
	}
	switch after {
	case "retry", "retry without restart":
		if err := u.run(w, context.Background(), arg); err != nil {
			t.Errorf("the retry fails: %v", err)
			return reached
		}
		u.done(w, arg)
		w.reconcile()
		u.done(w, arg)
	case "reconcile":
		w.reconcile()
	}
	w.check()
	w.deleteAll()
	w.check()
	return reached
}

// Faults at many steps, of the calls and of what takes them up again. Final answers are true, and once the faults end
// everything does.
func TestStruckOften(t *testing.T) {
	for _, u := range append(useCases(), severalCases()...) {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			for seed := range uint64(15) {
				rng := rand.New(rand.NewPCG(seed, 7))
				arg := u.setup(w)
				for range 3 {
					ctx, cancel := context.WithCancel(context.Background())
					w.f.arm(0, "", cancel)
					w.f.often = func() mode {
						if rng.IntN(3) > 0 {
							return ""
						}
						return modes[rng.IntN(len(modes))]
					}
					err := u.run(w, ctx, arg)
					cancel()
					w.restart()
					if final(err) {
						w.freeDeleted() // earlier attempts may have left tombstones, and said so
						w.check()
					}
					w.f.often = func() mode { return modes[rng.IntN(len(modes))] }
					w.f.cutOff = func() {}
					w.resume()
					w.restart()
					if t.Failed() {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				w.reconcile()
				w.check()
				w.deleteAll()
				w.check()
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// freeDeleted ends what has a tombstone.
func (w *world) freeDeleted() {
	p, err := w.Pending(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range p.Snapshots {
		if x, err := w.store.Snapshot(context.Background(), id); err == nil && x.State == volume.Deleting {
			wantErr(w.t, w.ResumeSnapshot(context.Background(), id), nil)
		}
	}
}

// resume takes up once what is unfinished, whatever comes of it.
func (w *world) resume() {
	p, err := w.Pending(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, id := range p.Volumes {
		_ = w.ResumeVolume(context.Background(), id)
	}
	for _, id := range p.Snapshots {
		_ = w.ResumeSnapshot(context.Background(), id)
	}
}

// final tells whether a caller reads an error as the end of the matter.
func final(err error) bool {
	for _, e := range []error{context.Canceled, context.DeadlineExceeded, volume.ErrUnavailable, volume.ErrBusy, errCrash} {
		if errors.Is(err, e) {
			return false
		}
	}
	return err != nil
}

func (w *world) deleteAll() {
	w.t.Helper()
	ctx := context.Background()
	vs, _, err := w.Volumes(ctx, control.Page{})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, v := range vs {
		if err := w.Detach(ctx, v.ID, ""); err != nil {
			w.t.Error(err)
		}
		if err := w.DeleteVolume(ctx, v.ID); err != nil {
			w.t.Error(err)
		}
	}
	gs, err := w.store.Groups(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, g := range gs {
		if err := w.DeleteGroup(ctx, g.ID); err != nil {
			w.t.Error(err)
		}
	}
	xs, _, err := w.Snapshots(ctx, control.SnapshotFilter{}, control.Page{})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, x := range xs {
		if err := w.DeleteSnapshot(ctx, x.ID); err != nil {
			w.t.Error(err)
		}
	}
	if rs, ss := w.agents.held(); len(rs)+len(ss) > 0 {
		w.t.Errorf("left: %v %v", rs, ss)
	}
}
