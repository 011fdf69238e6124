package control_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// world is a cluster of one node n1 with pool p1 of 100 GiB.
type world struct {
	t      *testing.T
	store  *meta.Store
	f      *faults
	agents *fakeAgents
	now    time.Time
	// endTimeout is the service's after a restart; 100 ms where it is 0.
	endTimeout time.Duration
	*control.Service
}

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := meta.Open("", meta.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, store: st, f: &faults{}, now: time.Unix(1000, 0)}
	w.agents = newFakeAgents(w.f)
	w.agents.store = st
	w.restart()
	w.register("n1", pool("p1", "n1", 100*gib))
	return w
}

func pool(id volume.PoolID, node volume.NodeID, capacity int64) volume.Pool {
	return volume.Pool{ID: id, Name: "default", Node: node, Kind: volume.PoolDir, Path: "/pool", Capacity: capacity, OverProvision: 1}
}

func (w *world) register(n volume.NodeID, ps ...volume.Pool) {
	w.t.Helper()
	if err := w.RegisterNode(context.Background(), volume.Node{ID: n, Pools: ps}); err != nil {
		w.t.Fatal(err)
	}
}

// restart begins a new process over the same disks.
func (w *world) restart() {
	w.f.arm(0, "", nil)
	end := w.endTimeout
	if end == 0 {
		end = 100 * time.Millisecond
	}
	w.Service = control.New(faultyStore{w.store, w.f}, w.agents, control.Options{
		Now: func() time.Time { return w.now }, UndoTimeout: time.Hour, FenceTimeout: 50 * time.Millisecond, EndTimeout: end,
	})
}

// reconcile takes up what is unfinished until nothing is, copies of snapshots included.
func (w *world) reconcile() {
	w.t.Helper()
	for range 10 {
		copies, err := w.copyOn(context.Background())
		if err != nil {
			w.t.Fatal(err)
		}
		p, err := w.Pending(context.Background())
		if err != nil {
			w.t.Fatal(err)
		}
		if copies+len(p.Volumes)+len(p.Snapshots)+len(p.QoS) == 0 {
			return
		}
		for _, id := range p.Volumes {
			if err := w.ResumeVolume(context.Background(), id); err != nil {
				w.t.Fatalf("resume %s: %v", id, err)
			}
		}
		for _, id := range p.Snapshots {
			if err := w.ResumeSnapshot(context.Background(), id); err != nil {
				w.t.Fatalf("resume %s: %v", id, err)
			}
		}
		for _, id := range p.QoS {
			if err := w.ResumeQoS(context.Background(), id); err != nil {
				w.t.Fatalf("resume limits of %s: %v", id, err)
			}
		}
	}
	w.t.Fatal("unfinished work does not end")
}

// check compares the records with the data plane and the sums with the records: nothing leaks, nothing is missing.
func (w *world) check() {
	w.t.Helper()
	ctx := context.Background()
	vs, err := w.store.Volumes(ctx, "", 0)
	if err != nil {
		w.t.Fatal(err)
	}
	ss, err := w.store.Snapshots(ctx, "", "", 0)
	if err != nil {
		w.t.Fatal(err)
	}
	rs := []volume.ReplicaID{}
	provisioned := map[volume.PoolID]int64{}
	used := map[string]volume.Amounts{}
	for _, v := range vs {
		if v.State != volume.Ready || v.Target != 0 || len(v.Leaving) > 0 || (v.Attachment != nil && v.Attachment.Detaching) {
			w.t.Errorf("volume %s is unfinished: %+v", v.ID, v)
		}
		for _, r := range v.Replicas {
			rs = append(rs, r.ID)
			provisioned[r.Pool] += v.Size
			w.agents.mu.Lock()
			if got := w.agents.replicas[r.ID]; got.size < v.Size || got.pool != r.Pool || got.node != r.Node {
				w.t.Errorf("volume %s of %d bytes in %s has replica %+v", v.ID, v.Size, r.Pool, got)
			}
			w.agents.mu.Unlock()
		}
		u := used[v.Tenant]
		u.LogicalBytes += v.Size
		u.PhysicalBytes += v.PhysicalBytes
		u.Volumes++
		used[v.Tenant] = u
		w.agents.mu.Lock()
		if on, ok := w.agents.attached[v.ID]; ok && (v.Attachment == nil || v.Attachment.Node != on) {
			w.t.Errorf("volume %s can be written on node %s, attachment %+v", v.ID, on, v.Attachment)
		}
		w.agents.mu.Unlock()
	}
	snaps := []volume.SnapshotID{}
	for _, x := range ss {
		if x.State != volume.Ready || len(x.Leaving) > 0 {
			w.t.Errorf("snapshot %s is unfinished: %+v", x.ID, x)
		}
		for _, h := range x.Holders {
			snaps = append(snaps, volume.SnapshotID(fmt.Sprintf("%s@%s", x.ID, h.Pool)))
		}
		u := used[x.Tenant]
		u.PhysicalBytes += x.PhysicalBytes
		if !x.Hidden {
			u.Snapshots++
		}
		used[x.Tenant] = u
	}
	slices.Sort(rs)
	slices.Sort(snaps)
	gotR, gotS := w.agents.held()
	if d := cmp.Diff(rs, append([]volume.ReplicaID{}, gotR...)); d != "" {
		w.t.Errorf("replicas: records -, pools +\n%s", d)
	}
	if d := cmp.Diff(snaps, append([]volume.SnapshotID{}, gotS...)); d != "" {
		w.t.Errorf("snapshots: records -, pools +\n%s", d)
	}
	ns, err := w.store.Nodes(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, n := range ns {
		for _, p := range n.Pools {
			if p.Provisioned != provisioned[p.ID] {
				w.t.Errorf("pool %s has %d provisioned, volumes say %d", p.ID, p.Provisioned, provisioned[p.ID])
			}
		}
	}
	qs, err := w.store.Quotas(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	got := map[string]volume.Amounts{}
	for _, q := range qs {
		if q.Used != (volume.Amounts{}) {
			got[q.Tenant] = q.Used
		}
	}
	if d := cmp.Diff(used, got); d != "" {
		w.t.Errorf("use: records -, sums +\n%s", d)
	}
}

func mount() []volume.Capability {
	return []volume.Capability{{Access: volume.AccessMount, Mode: volume.SingleNodeWriter}}
}

func create(name string) control.CreateVolume {
	return control.CreateVolume{Name: name, RequiredBytes: gib, Capabilities: mount()}
}

func (w *world) mustCreate(r control.CreateVolume) volume.Volume {
	w.t.Helper()
	v, err := w.CreateVolume(context.Background(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) mustSnapshot(name string, id volume.ID) volume.Snapshot {
	w.t.Helper()
	x, err := w.CreateSnapshot(context.Background(), control.CreateSnapshot{Name: name, Volume: id})
	if err != nil {
		w.t.Fatal(err)
	}
	return x
}

func (w *world) mustAttach(id volume.ID, node volume.NodeID) volume.Volume {
	w.t.Helper()
	v, err := w.Attach(context.Background(), control.Attach{Volume: id, Node: node, Capability: mount()[0]})
	if err != nil {
		w.t.Fatal(err)
	}
	w.agents.stage(id, node)
	return v
}

func (w *world) propose(c command.Command) {
	w.t.Helper()
	if _, err := w.store.Propose(context.Background(), c); err != nil {
		w.t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if (want == nil) != (err == nil) || !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}
