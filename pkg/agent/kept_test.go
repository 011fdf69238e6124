package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// parts is a trio with the controllers' own state and use cases, and a clock that a test moves.
type parts struct {
	*trio
	store   *meta.Store
	service *control.Service
	ahead   atomic.Int64
}

func newParts(t *testing.T) *parts {
	store, err := meta.Open("", meta.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	p := &parts{store: store}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	p.service = control.New(store, p, control.Options{Now: func() time.Time { return time.Now().Add(time.Duration(p.ahead.Load())) }})
	p.trio = newTrioOf(t, p.service)
	p.until("the nodes have registered", func() bool {
		ns, err := p.service.Nodes(t.Context())
		return err == nil && len(ns) == 3
	})
	return p
}

// until waits for something, while what is planned and unfinished is carried out.
func (p *parts) until(what string, is func() bool) {
	p.t.Helper()
	for start := time.Now(); !is(); time.Sleep(50 * time.Millisecond) {
		p.carryOn()
		if time.Since(start) > time.Minute {
			vs, _ := p.store.Volumes(p.t.Context(), "", 0)
			xs, _ := p.store.Snapshots(p.t.Context(), "", "", 0)
			p.t.Fatalf("in vain: %s\n%+v\n%+v", what, vs, xs)
		}
	}
}

// carryOn is a pass of the reconciler.
func (p *parts) carryOn() {
	p.t.Helper()
	ctx := p.t.Context()
	for i := range 3 { // what a node reports every minute or when it changed
		id := nodeName(i + 1)
		p.mu.Lock()
		n := p.nodes[id]
		p.mu.Unlock()
		if n != nil {
			if err := p.service.ReportUsage(ctx, id, n.usage()); err != nil && !errors.Is(err, volume.ErrNotFound) {
				p.t.Fatal(err)
			}
		}
	}
	st, err := p.service.State(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, a := range reconcile.Repairs(st, reconcile.Limits{}) {
		switch a.Kind {
		case reconcile.Copy:
			err = p.service.CopySnapshot(ctx, volume.SnapshotID(a.ID), a.From, a.Pool)
		case reconcile.Sync:
			err = p.service.Sync(ctx, volume.ID(a.ID))
		case reconcile.End:
			err = p.service.EndCopy(ctx, volume.ID(a.ID), a.Replica)
		case reconcile.Move:
			err = p.service.DropHolder(ctx, volume.SnapshotID(a.ID), a.Pool)
		}
		if err != nil {
			p.t.Logf("%+v: %v", a, err)
		}
	}
	q, err := p.service.Pending(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, id := range q.Volumes {
		_ = p.service.ResumeVolume(ctx, id) // what is away stays unfinished
	}
	for _, id := range q.Snapshots {
		_ = p.service.ResumeSnapshot(ctx, id)
	}
}

// pass lets time go by, in which the nodes that run report.
func (p *parts) pass(d time.Duration) {
	p.t.Helper()
	for ; d > 0; d -= time.Minute {
		p.ahead.Add(int64(time.Minute))
		p.carryOn()
	}
}

// engine returns the engine of a volume that nobody has attached, on its first replica's node.
func (p *parts) engine(v volume.Volume) interface {
	ReadAt(ctx context.Context, b []byte, off int64) error
	WriteAt(ctx context.Context, b []byte, off int64) error
} {
	p.t.Helper()
	if err := p.service.Sync(p.t.Context(), v.ID); err != nil {
		p.t.Fatal(err)
	}
	known, ok := p.nodes[v.Replicas[0].Node].known(v.ID)
	if !ok || known.get().inst == nil {
		p.t.Fatal("no engine runs")
	}
	return known.get().inst.e
}

func pattern(text string) []byte { return bytes.Repeat([]byte(text), int(mib)/len(text)) }

// orphans makes a volume with so many replicas, writes to it around two snapshots, expands it, and deletes it.
func (p *parts) orphans(replicas int) []volume.Snapshot {
	p.t.Helper()
	ctx := p.t.Context()
	v, err := p.service.CreateVolume(ctx, control.CreateVolume{Name: "v", RequiredBytes: 16 * mib, Parameters: volume.Parameters{Replicas: replicas},
		Capabilities: []volume.Capability{blockCap(volume.SingleNodeWriter)}})
	if err != nil {
		p.t.Fatal(err)
	}
	e := p.engine(v)
	var xs []volume.Snapshot
	for i, text := range []string{"first...", "second.."} {
		for _, off := range []int64{0, 8 * mib} {
			if err := e.WriteAt(ctx, pattern(text), off+int64(i)*mib/2); err != nil {
				p.t.Fatal(err)
			}
		}
		x, err := p.service.CreateSnapshot(ctx, control.CreateSnapshot{Name: text, Volume: v.ID})
		if err != nil || len(x.Holders) != replicas {
			p.t.Fatalf("%+v %v", x, err)
		}
		xs = append(xs, x)
	}
	if _, err := p.service.ExpandVolume(ctx, v.ID, 24*mib, 0); err != nil {
		p.t.Fatal(err)
	}
	for _, off := range []int64{0, 20 * mib} {
		if err := p.engine(v).WriteAt(ctx, pattern("never..."), off); err != nil {
			p.t.Fatal(err)
		}
	}
	if err := p.service.DeleteVolume(ctx, v.ID); err != nil {
		p.t.Fatal(err)
	}
	p.until("the volume is gone", func() bool { _, err := p.store.Volume(ctx, v.ID); return errors.Is(err, volume.ErrNotFound) })
	return xs
}

// contents are the bytes of the snapshots that orphans makes.
func contentsOf(i int) []byte {
	want := make([]byte, 16*mib)
	for _, off := range []int64{0, 8 * mib} {
		copy(want[off:], pattern("first..."))
		if i == 1 {
			copy(want[off+mib/2:], pattern("second.."))
		}
	}
	return want
}

func (p *parts) on(id volume.SnapshotID, node volume.NodeID) bool {
	x, err := p.service.Snapshot(p.t.Context(), id)
	return err == nil && slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Node == node })
}

// third is the node that holds nothing.
func (p *parts) third(x volume.Snapshot) volume.NodeID {
	for i := range 3 {
		if id := nodeName(i + 1); !p.on(x.ID, id) {
			return id
		}
	}
	p.t.Fatal("all nodes hold it")
	return ""
}

// TestASnapshotOutlivesItsHolders: one of two nodes that hold snapshots of a deleted volume is lost. A third gets them, whole, and
// they are restored from it when the other is lost as well.
func TestASnapshotOutlivesItsHolders(t *testing.T) {
	p := newParts(t)
	ctx := t.Context()
	xs := p.orphans(2)
	stays, lost, third := xs[0].Holders[0].Node, xs[0].Holders[1].Node, p.third(xs[0])
	p.stop(lost)
	p.pass(5 * time.Minute)
	if _, err := p.store.Volume(ctx, xs[0].Volume); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("a copy was begun before it was time: %v", err)
	}
	p.pass(10 * time.Minute)
	for _, x := range xs {
		p.until("it is copied", func() bool { return p.on(x.ID, third) })
	}
	p.until("the copies have ended", func() bool { _, err := p.store.Volume(ctx, xs[0].Volume); return errors.Is(err, volume.ErrNotFound) })
	for _, node := range []volume.NodeID{stays, third} {
		u := p.nodes[node].usage()
		if len(u.Replicas) != 0 || len(u.Snapshots) != 2 {
			t.Errorf("node %s has %+v", node, u)
		}
		for i, x := range xs {
			p.same(node, x, contentsOf(i))
		}
	}
	for _, x := range xs { // a comparison finds them alike
		var ds [2]control.Digest
		for i, node := range []volume.NodeID{stays, third} {
			var err error
			if ds[i], err = p.Digest(ctx, volume.Replica{Node: node, Pool: p.pool(node)}, x.ID, 0, control.MaxDigests); err != nil {
				t.Fatal(err)
			}
		}
		if len(ds[0].Regions) != 2 || !reflect.DeepEqual(ds[0].Regions, ds[1].Regions) {
			t.Errorf("snapshot %s and its copy: %+v", x.Name, ds)
		}
	}
	ns, err := p.service.Nodes(ctx)
	for _, n := range ns {
		if err != nil || n.Pools[0].Provisioned != 0 {
			t.Errorf("%+v is provisioned, %v", n.Pools[0], err)
		}
	}

	p.stop(stays)
	for i, x := range xs {
		v, err := p.service.CreateVolume(ctx, control.CreateVolume{Name: fmt.Sprint("r", i), RequiredBytes: 16 * mib, Preferred: []volume.NodeID{third},
			Source: &volume.Source{Snapshot: x.ID}, Capabilities: []volume.Capability{blockCap(volume.SingleNodeWriter)}})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 16*mib)
		e := p.engine(v)
		for off := int64(0); off < int64(len(got)); off += mib {
			if err := e.ReadAt(ctx, got[off:off+mib], off); err != nil {
				t.Fatal(err)
			}
		}
		if v.Replicas[0].Node != third || !bytes.Equal(got, contentsOf(i)) {
			t.Errorf("restored on node %s: not what was in snapshot %s", v.Replicas[0].Node, x.Name)
		}
	}
	for _, v := range []string{"r0", "r1"} { // their engines end before the nodes do
		x, err := p.store.VolumeByName(ctx, v)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.service.DeleteVolume(ctx, x.ID); err != nil {
			t.Error(err)
		}
	}
}

func (p *parts) same(node volume.NodeID, x volume.Snapshot, want []byte) {
	p.t.Helper()
	dev, err := p.nodes[node].cfg.Pools[0].OpenSnapshot(p.t.Context(), x.ID)
	if err != nil {
		p.t.Errorf("snapshot %s on node %s: %v", x.Name, node, err)
		return
	}
	defer dev.Close()
	got := make([]byte, len(want))
	for off := int64(0); off < int64(len(got)); off += mib {
		if err := dev.ReadAt(p.t.Context(), got[off:off+mib], off); err != nil {
			p.t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		p.t.Errorf("snapshot %s on node %s is not what was cut", x.Name, node)
	}
}

// TestSnapshotsLeaveAnEmptiedNode: they were cut while the volume had one replica and no engine, on a node that is emptied then,
// where one of them is being read.
func TestSnapshotsLeaveAnEmptiedNode(t *testing.T) {
	p := newParts(t)
	xs := p.orphans(1)
	was := xs[0].Holders[0].Node
	read, err := p.nodes[was].cfg.Pools[0].OpenSnapshot(t.Context(), xs[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.service.EmptyNode(t.Context(), was); err != nil {
		t.Fatal(err)
	}
	p.until("one is yet to be freed", func() bool {
		x, err := p.service.Snapshot(t.Context(), xs[0].ID)
		return err == nil && len(x.Leaving) == 1 && x.Leaving[0].Node == was && len(x.Holders) == 1
	})
	if _, there := p.nodes[was].usage().Snapshots[xs[0].ID]; !there {
		t.Error("it is gone while it is being read")
	}
	if err := read.Close(); err != nil {
		t.Error(err)
	}
	p.until("the node is empty", func() bool {
		u := p.nodes[was].usage()
		return len(u.Replicas)+len(u.Snapshots) == 0 && !p.on(xs[0].ID, was) && !p.on(xs[1].ID, was)
	})
	for i, x := range xs {
		x, err := p.service.Snapshot(t.Context(), x.ID)
		if err != nil || len(x.Holders) != 1 {
			t.Fatalf("%+v %v", x, err)
		}
		p.same(x.Holders[0].Node, x, contentsOf(i))
	}
	if err := p.service.RemoveNode(t.Context(), was); err != nil {
		t.Error(err)
	}
}

// TestDeletedWhileItIsCopied: nothing is left of it on any node, nor of what it was copied with, once all are back.
func TestDeletedWhileItIsCopied(t *testing.T) {
	p := newParts(t)
	ctx := t.Context()
	xs := p.orphans(2)
	lost := xs[0].Holders[1].Node
	p.stop(lost)
	p.pass(9 * time.Minute)
	p.ahead.Add(int64(time.Minute)) // the next pass begins it
	p.until("a copy has begun", func() bool {
		_, err := p.store.Volume(ctx, xs[0].Volume)
		x, _ := p.store.Snapshot(ctx, xs[0].ID)
		return err == nil || len(x.Holders) > len(xs[0].Holders) // or ended already
	})
	for _, x := range xs {
		if err := p.service.DeleteSnapshot(ctx, x.ID); err != nil {
			t.Error(err)
		}
	}
	p.start(lost)
	for _, x := range xs {
		p.until("it is gone", func() bool { _, err := p.store.Snapshot(ctx, x.ID); return errors.Is(err, volume.ErrNotFound) })
	}
	p.until("the copy is gone", func() bool { _, err := p.store.Volume(ctx, xs[0].Volume); return errors.Is(err, volume.ErrNotFound) })
	for i := range 3 {
		if u := p.nodes[nodeName(i+1)].usage(); len(u.Replicas)+len(u.Snapshots) > 0 {
			t.Errorf("node %s still has %v %v", nodeName(i+1), u.Replicas, u.Snapshots)
		}
	}
	if ks, err := p.store.Remains(ctx); err != nil || len(ks) > 0 {
		t.Errorf("%+v %v", ks, err)
	}
}

// at is what a node is asked, where it runs.
func at[T any](p *parts, node volume.NodeID, ask func(n *Node) (T, error)) (none T, err error) {
	p.mu.Lock()
	n := p.nodes[node]
	p.mu.Unlock()
	if n == nil {
		return none, fmt.Errorf("node %s is down: %w", node, volume.ErrUnavailable)
	}
	return ask(n)
}

func do(p *parts, node volume.NodeID, ask func(n *Node) error) error {
	_, err := at(p, node, func(n *Node) (bool, error) { return true, ask(n) })
	return err
}

// parts implements control.Agents: each node is asked what concerns it.

func (p *parts) CreateReplica(ctx context.Context, node volume.NodeID, r control.ReplicaSpec) error {
	return do(p, node, func(n *Node) error { return n.CreateReplica(ctx, node, r) })
}

func (p *parts) DeleteReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) error {
	return do(p, node, func(n *Node) error { return n.DeleteReplica(ctx, node, pool, id) })
}

func (p *parts) HasReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID) (bool, error) {
	return at(p, node, func(n *Node) (bool, error) { return n.HasReplica(ctx, node, pool, id) })
}

func (p *parts) ResizeReplica(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.ReplicaID, size int64) error {
	return do(p, node, func(n *Node) error { return n.ResizeReplica(ctx, node, pool, id, size) })
}

func (p *parts) ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch, size int64) error {
	return do(p, r.Node, func(n *Node) error { return n.ExpandVolume(ctx, r, id, epoch, size) })
}

func (p *parts) Fence(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch) (time.Duration, error) {
	return at(p, r.Node, func(n *Node) (time.Duration, error) { return n.Fence(ctx, r, id, epoch) })
}

func (p *parts) Inspect(ctx context.Context, r volume.Replica, id volume.ID) (control.ReplicaReport, error) {
	return at(p, r.Node, func(n *Node) (control.ReplicaReport, error) { return n.Inspect(ctx, r, id) })
}

func (p *parts) OpenEngine(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) error {
	return do(p, node, func(n *Node) error { return n.OpenEngine(ctx, node, id, epoch) })
}

func (p *parts) Evict(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, r volume.ReplicaID) error {
	return do(p, node, func(n *Node) error { return n.Evict(ctx, node, id, epoch, r) })
}

func (p *parts) CutSnapshot(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	return at(p, node, func(n *Node) ([]volume.ReplicaID, error) { return n.CutSnapshot(ctx, node, s) })
}

func (p *parts) Drain(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	return do(p, node, func(n *Node) error { return n.Drain(ctx, node, s) })
}

func (p *parts) Release(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	return do(p, node, func(n *Node) error { return n.Release(ctx, node, s) })
}

func (p *parts) DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	return do(p, node, func(n *Node) error { return n.DeleteSnapshot(ctx, node, pool, id, of, upTo) })
}

func (p *parts) Detach(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch) (bool, error) {
	return at(p, node, func(n *Node) (bool, error) { return n.Detach(ctx, node, id, epoch) })
}

func (p *parts) SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, q volume.QoS) error {
	return do(p, node, func(n *Node) error { return n.SetQoS(ctx, node, id, epoch, q) })
}

func (p *parts) Observe(ctx context.Context, node volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	return at(p, node, func(n *Node) ([]control.Observation, error) { return n.Observe(ctx, node, of) })
}

func (p *parts) Digest(ctx context.Context, h volume.Replica, s volume.SnapshotID, offset int64, regions int) (control.Digest, error) {
	return at(p, h.Node, func(n *Node) (control.Digest, error) { return n.Digest(ctx, h, s, offset, regions) })
}

func (p *parts) Extents(ctx context.Context, h volume.Replica, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error {
	return do(p, h.Node, func(n *Node) error { return n.Extents(ctx, h, s, base, offset, fn) })
}

// TestTheOlderSnapshotIsDeleted: a snapshot is filled in by what differs from an older one that both pools have, and that is deleted
// where it is read from. The younger one is filled in all the same.
func TestTheOlderSnapshotIsDeleted(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 3)
	c.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = nil })
	ctx, n := t.Context(), c.nodes["n1"]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	cut := func(id volume.SnapshotID, text string) {
		known, _ := n.known(vol1)
		must(known.get().inst.e.WriteAt(ctx, pattern(text), 4*mib))
		s := c.snapshot("n1", id, false)
		holders, err := n.CutSnapshot(ctx, "n1", s)
		must(err)
		c.complete(s, holders)
	}
	must(n.OpenEngine(ctx, "n1", vol1, 1))
	cut("snap-1", "first...")
	must(n.Evict(ctx, "n1", vol1, c.cluster.epoch(vol1), c.replica(3).ID))
	_, err := c.cluster.Commit(ctx, vol1, replication.Change{DropReplica: &replication.DropReplica{ID: c.replica(3).ID}})
	must(err)
	must(n.OpenEngine(ctx, "n1", vol1, c.cluster.epoch(vol1)))
	must(c.nodes["n3"].DeleteReplica(ctx, "n3", c.pool("n3"), c.replica(3).ID))
	cut("snap-2", "second..")
	must(n.cfg.Pools[0].DeleteSnapshot(ctx, "snap-1", "", 0)) // the engine does not know

	r := volume.Replica{ID: "rep-new", Node: "n3", Pool: c.pool("n3")}
	must(c.nodes["n3"].CreateReplica(ctx, "n3", control.ReplicaSpec{ID: r.ID, Volume: vol1, Pool: r.Pool, Size: 16 * mib, Parent: "snap-1"}))
	_, err = c.cluster.Commit(ctx, vol1, replication.Change{AddReplica: &replication.Member{ID: r.ID, Node: r.Node, Pool: r.Pool}})
	must(err)
	must(n.OpenEngine(ctx, "n1", vol1, c.cluster.epoch(vol1)))
	c.waitInSync(2)
	dev, err := c.nodes["n3"].cfg.Pools[0].OpenSnapshot(ctx, "snap-2")
	must(err)
	got := make([]byte, mib)
	must(dev.ReadAt(ctx, got, 4*mib))
	must(dev.Close())
	if !bytes.Equal(got, pattern("second..")) {
		t.Error("the snapshot is not what was cut")
	}
	c.detach("n1")
}
