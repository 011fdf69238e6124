package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/frontend/fuseloop"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// trio is three nodes in this process, which reach each other.
type trio struct {
	t       *testing.T
	dir     string
	cluster *fakeCluster
	// controllers are asked instead of cluster, where there are any.
	controllers Cluster

	mu    sync.Mutex
	nodes map[volume.NodeID]*Node // those that run
	lines map[*line]bool
}

// line is a connection between two nodes.
type line struct {
	*engine.Conn
	from, to volume.NodeID
	down     func(error)
}

// reach is the way of one node to the others.
type reach struct {
	trio *trio
	from volume.NodeID
}

// Dial implements engine.Peers.
func (r reach) Dial(ctx context.Context, node volume.NodeID, of volume.ID, id volume.ReplicaID, receive func(*replication.Message), down func(error)) (engine.Transport, error) {
	t := r.trio
	t.mu.Lock()
	n := t.nodes[node]
	t.mu.Unlock()
	if n == nil {
		return nil, volume.ErrUnavailable
	}
	c, err := n.Connect(ctx, of, id, receive, down)
	if err != nil {
		return nil, err
	}
	l := &line{Conn: c, from: r.from, to: node, down: down}
	t.mu.Lock()
	t.lines[l] = true
	t.mu.Unlock()
	return l, nil
}

func (l *line) Send(m *replication.Message) {
	c := *m
	c.Data = nil // of a read
	if m.Kind == replication.KindWrite {
		c.Data = append([]byte(nil), m.Data...)
	}
	l.Conn.Send(&c)
}

func trioTiming() replication.Timing {
	t := replication.DefaultTiming()
	ms := replication.Millisecond
	t.Lease, t.LeaseMargin, t.OpTimeout, t.Blip, t.AttachWait = 1500*ms, 100*ms, 2000*ms, 200*ms, 300*ms
	t.ResyncRetry, t.FlushEvery = 100*ms, 500*ms
	return t
}

func nodeName(i int) volume.NodeID { return volume.NodeID(fmt.Sprintf("n%d", i)) }

func newTrio(t *testing.T) *trio {
	return newTrioOf(t, nil)
}

func newTrioOf(t *testing.T, controllers Cluster) *trio {
	t.Parallel() // they mostly wait: for leases, and for each other
	c := &trio{controllers: controllers, t: t, dir: t.TempDir(), cluster: &fakeCluster{volumes: map[volume.ID]volume.Volume{}}, nodes: map[volume.NodeID]*Node{}, lines: map[*line]bool{}}
	t.Cleanup(func() {
		for i := range 3 {
			c.stop(nodeName(i + 1))
		}
	})
	for i := range 3 {
		c.start(nodeName(i + 1))
	}
	return c
}

func (c *trio) path(id volume.NodeID, parts ...string) string {
	return filepath.Join(append([]string{c.dir, string(id)}, parts...)...)
}

func (c *trio) pool(id volume.NodeID) volume.PoolID { return volume.PoolID("pool-" + string(id)) }

func (c *trio) start(id volume.NodeID) {
	c.t.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("BALLAST_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("node", id)
	}
	for _, d := range []string{"pool", "node", "run"} {
		if err := os.MkdirAll(c.path(id, d), 0o700); err != nil {
			c.t.Fatal(err)
		}
	}
	fe, err := fuseloop.New(context.Background(), fuseloop.Options{RunDir: c.path(id, "run"), Logger: log})
	if err != nil {
		c.t.Fatal(err)
	}
	store, err := extentstore.Open(context.Background(), c.path(id, "pool"), extentstore.Options{ID: c.pool(id), Capacity: 8 << 30, Reserve: 16 * mib, Logger: log})
	if err != nil {
		c.t.Fatal(err)
	}
	n, err := Open(Config{
		ID: id, DataDir: c.path(id, "node"), RunDir: c.path(id, "run"), Pools: []Pool{extentPool{store}}, Frontend: fe,
		Mounter: mount.New(kmount.NewWithoutSystemd(""), log), Logger: log, Remote: reach{c, id}, Timing: trioTiming(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	if c.controllers != nil {
		n.Start(c.controllers)
	} else {
		n.Start(c.cluster)
	}
	<-n.recovered
	c.mu.Lock()
	c.nodes[id] = n
	c.mu.Unlock()
}

// stop ends a node; its connections break, and nobody reaches it.
func (c *trio) stop(id volume.NodeID) {
	c.t.Helper()
	c.mu.Lock()
	n := c.nodes[id]
	delete(c.nodes, id)
	c.mu.Unlock()
	if n == nil {
		return
	}
	if err := n.Close(); err != nil {
		c.t.Error(err)
	}
}

func (c *trio) replica(i int) volume.Replica {
	id := nodeName(i)
	return volume.Replica{ID: volume.ReplicaID("rep-" + string(id)), Node: id, Pool: c.pool(id), Role: volume.InSync}
}

// create makes a volume with a replica on each of the nodes, assigned to owner.
func (c *trio) create(size int64, owner volume.NodeID, replicas ...int) {
	c.t.Helper()
	v := volume.Volume{
		ID: vol1, State: volume.Ready, Size: size, Parameters: volume.Parameters{BlockSize: 4096, MinInSync: 1, FSType: "ext4"},
		Attachment: &volume.Attachment{Node: owner},
		Protocol:   volume.Protocol{Epoch: 1, ConfigVersion: 1, Lineage: 1, Revision: 1, Owner: owner, Clean: true},
	}
	for _, i := range replicas {
		r := c.replica(i)
		v.Replicas = append(v.Replicas, r)
		if err := c.nodes[r.Node].CreateReplica(c.t.Context(), r.Node, control.ReplicaSpec{ID: r.ID, Volume: vol1, Pool: r.Pool, Size: size}); err != nil {
			c.t.Fatal(err)
		}
	}
	c.cluster.volumes[vol1] = v
}

// assign gives the volume to another node, as the controllers do.
func (c *trio) assign(node volume.NodeID) {
	c.t.Helper()
	if _, err := c.cluster.Commit(c.t.Context(), vol1, replication.Change{Attach: &replication.Attach{Node: node, Force: true, Assign: true}}); err != nil {
		c.t.Fatal(err)
	}
	c.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = &volume.Attachment{Node: node} })
}

func (c *trio) waitInSync(want int) {
	c.t.Helper()
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		v, err := c.cluster.Record(c.t.Context(), vol1)
		if err == nil && len(v.InSync()) == want {
			return
		}
		if time.Since(start) > 30*time.Second {
			for _, n := range c.nodes {
				if known, ok := n.known(vol1); ok && known.get().inst != nil {
					c.t.Logf("%+v", known.get().inst.e.Status())
				}
			}
			c.t.Fatalf("%d replicas are not in sync: %+v", want, v.Replicas)
		}
	}
}

func (c *trio) stage(node volume.NodeID) string {
	c.t.Helper()
	at := c.path(node, "staging")
	if err := c.nodes[node].Stage(c.t.Context(), Stage{Volume: vol1, Path: at, Capability: fsCap("ext4")}); err != nil {
		c.t.Fatal(err)
	}
	return at
}

func (c *trio) unstage(node volume.NodeID) {
	c.t.Helper()
	if err := c.nodes[node].Unstage(c.t.Context(), vol1, c.path(node, "staging")); err != nil {
		c.t.Fatal(err)
	}
}

// detach ends the attachment as the controllers do.
func (c *trio) detach(node volume.NodeID) (clean bool) {
	c.t.Helper()
	clean, err := c.nodes[node].Detach(c.t.Context(), node, vol1, c.cluster.epoch(vol1))
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.cluster.Commit(c.t.Context(), vol1, replication.Change{Detach: &replication.Detach{Clean: clean}}); err != nil {
		c.t.Fatal(err)
	}
	return clean
}

// TestReplicated: a mounted volume lives on while a node with a replica is away, which is brought up when it returns; then
// it moves to another node.
func TestReplicated(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2, 3)
	at := c.stage("n1")
	write(t, filepath.Join(at, "a"), "all of them")
	c.stop("n2")
	write(t, filepath.Join(at, "b"), "without n2")
	c.waitInSync(2)
	if got, err := c.nodes["n1"].Health(t.Context(), vol1); err != nil || !strings.Contains(reasons(got), "Degraded/") {
		t.Errorf("health while a replica is away: %v, %v", got, err)
	}
	c.start("n2")
	c.waitInSync(3)
	write(t, filepath.Join(at, "c"), "all again")
	if got := c.nodes["n1"].Engines(); len(got) != 1 || got[vol1].Phase != "live" {
		t.Errorf("engines of n1: %+v", got)
	}
	if got, err := c.nodes["n1"].Health(t.Context(), vol1); err != nil || len(got) > 0 {
		t.Errorf("health: %v, %v", got, err)
	}
	c.unstage("n1")
	if !c.detach("n1") {
		t.Error("the detach was not clean")
	}
	c.stop("n1")
	c.assign("n2")
	start := time.Now()
	at = c.stage("n2")
	t.Logf("attached elsewhere in %v", time.Since(start))
	for name, content := range map[string]string{"a": "all of them", "b": "without n2", "c": "all again"} {
		wantContent(t, filepath.Join(at, name), content)
	}
	c.unstage("n2")
	c.detach("n2")
}

// TestNodeLost: the node under a mounted volume is gone; elsewhere all that was synced is there, and when the node comes
// back its device and its replica are of the past.
func TestNodeLost(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2, 3)
	at := c.stage("n1")
	write(t, filepath.Join(at, "file"), "synced")
	c.stop("n1") // its filesystem is not unmounted, and its engine gone
	c.assign("n3")
	at = c.stage("n3")
	wantContent(t, filepath.Join(at, "file"), "synced")
	write(t, filepath.Join(at, "file"), "newer")
	c.waitInSync(2)
	c.start("n1")
	if v, known := c.nodes["n1"].known(vol1); known && v.get().inst != nil {
		t.Error("n1 runs an engine of a volume that was taken from it")
	}
	c.waitInSync(3)
	wantContent(t, filepath.Join(at, "file"), "newer")
	c.unstage("n3")
	if !c.detach("n3") {
		t.Error("the detach was not clean")
	}
}

// TestTakenByForce: the old node lives, and is fenced: its device fails for good.
func TestTakenByForce(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2, 3)
	old := c.stage("n1")
	write(t, filepath.Join(old, "file"), "synced")
	m, err := c.cluster.Commit(t.Context(), vol1, replication.Change{Detach: &replication.Detach{}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		lease, err := c.nodes["n2"].Fence(t.Context(), c.replica(2), vol1, m.Epoch)
		if err != nil {
			t.Fatal(err)
		}
		if lease > 0 {
			time.Sleep(lease)
		}
	}
	c.assign("n3")
	at := c.stage("n3")
	wantContent(t, filepath.Join(at, "file"), "synced")
	if f, err := os.OpenFile(filepath.Join(old, "file"), os.O_WRONLY, 0); err == nil {
		_, werr := f.WriteString("too late")
		if f.Sync() == nil && werr == nil {
			t.Error("the fenced device acknowledged a write")
		}
		f.Close()
	}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		got, err := c.nodes["n1"].Health(t.Context(), vol1)
		if err == nil && strings.Contains(reasons(got), "Inaccessible/Superseded") {
			break
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("health of the old node: %v, %v", got, err)
		}
	}
	wantContent(t, filepath.Join(at, "file"), "synced")
	if _, err := c.nodes["n1"].Detach(t.Context(), "n1", vol1, c.cluster.epoch(vol1)); err != nil {
		t.Error(err)
	}
	c.unstage("n3")
	c.detach("n3")
}

func (c *trio) snapshot(node volume.NodeID, id volume.SnapshotID, freeze bool) control.SnapshotSpec {
	c.t.Helper()
	m, err := c.cluster.Commit(c.t.Context(), vol1, replication.Change{Prepare: &replication.Prepare{Snapshot: id}})
	if err != nil {
		c.t.Fatal(err)
	}
	b := m.Barrier
	return control.SnapshotSpec{ID: id, Volume: vol1, Freeze: freeze, Barrier: volume.Barrier{Number: b.Number, Snapshot: id, Epoch: b.Epoch, ConfigVersion: b.ConfigVersion}}
}

func (c *trio) complete(s control.SnapshotSpec, holders []volume.ReplicaID) {
	c.t.Helper()
	change := replication.Change{Complete: &replication.Complete{Number: s.Barrier.Number, ConfigVersion: s.Barrier.ConfigVersion, Holders: holders}}
	if _, err := c.cluster.Commit(c.t.Context(), vol1, change); err != nil {
		c.t.Fatal(err)
	}
}

// TestSnapshotsOfReplicas: they are equal on all holders, cut alone or held with others.
func TestSnapshotsOfReplicas(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2, 3)
	at := c.stage("n1")
	n := c.nodes["n1"]
	write(t, filepath.Join(at, "file"), "one")
	s := c.snapshot("n1", "snap-1", true)
	holders, err := n.CutSnapshot(t.Context(), "n1", s)
	if err != nil || len(holders) != 3 {
		t.Fatal(holders, err)
	}
	c.complete(s, holders)

	write(t, filepath.Join(at, "file"), "two")
	s = c.snapshot("n1", "snap-2", true)
	if err := n.Drain(t.Context(), "n1", s); err != nil {
		t.Fatal(err)
	}
	if holders, err = n.CutSnapshot(t.Context(), "n1", s); err != nil || len(holders) != 3 {
		t.Fatal(holders, err)
	}
	for range 2 {
		if err := n.Release(t.Context(), "n1", s); err != nil {
			t.Fatal(err)
		}
	}
	c.complete(s, holders)
	write(t, filepath.Join(at, "file"), "three")

	// Nobody releases: the node lets go by itself.
	s = c.snapshot("n1", "snap-3", true)
	if err := n.Drain(t.Context(), "n1", s); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(at, "file"), "four")
	_, err = n.CutSnapshot(t.Context(), "n1", s)
	wantErr(t, "a cut after the writes went on", err, volume.ErrBusy)
	// The order comes after the controllers have given the snapshot up.
	if _, err := c.cluster.Commit(t.Context(), vol1, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: s.Barrier.Number}}); err != nil {
		t.Fatal(err)
	}
	s = c.snapshot("n1", "snap-4", false)
	if _, err := c.cluster.Commit(t.Context(), vol1, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: s.Barrier.Number}}); err != nil {
		t.Fatal(err)
	}
	_, err = n.CutSnapshot(t.Context(), "n1", s)
	wantErr(t, "a cut that was given up", err, volume.ErrBusy)
	wantErr(t, "a hold that was given up", n.Drain(t.Context(), "n1", s), volume.ErrBusy)
	c.unstage("n1")
	for _, id := range []volume.SnapshotID{"snap-1", "snap-2"} {
		var first string
		for i := range 3 {
			p := c.nodes[nodeName(i+1)].cfg.Pools[0]
			dev, err := p.OpenSnapshot(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 16*mib)
			for off := int64(0); off < 16*mib; off += mib {
				if err := dev.ReadAt(t.Context(), b[off:off+mib], off); err != nil {
					t.Fatal(err)
				}
			}
			if err := dev.Close(); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				first = string(b)
			} else if string(b) != first {
				t.Errorf("%s differs on n1 and %s", id, nodeName(i+1))
			}
		}
	}
	c.detach("n1")
}

// TestEngineWithoutDevice: an engine is run on a node for a volume that nobody uses, grows it, and evicts and brings up.
func TestEngineWithoutDevice(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2)
	c.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = nil })
	n := c.nodes["n1"]
	for range 2 {
		if err := n.OpenEngine(t.Context(), "n1", vol1, 1); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, "an engine on a node that it is not given to", c.nodes["n2"].OpenEngine(t.Context(), "n2", vol1, 1), volume.ErrBusy)
	if _, err := c.cluster.Commit(t.Context(), vol1, replication.Change{ExpandIntent: &replication.ExpandIntent{Target: 32 * mib}}); err != nil {
		t.Fatal(err)
	}
	if err := n.ExpandVolume(t.Context(), c.replica(1), vol1, c.cluster.epoch(vol1), 32*mib); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "delete of a replica in use", n.DeleteReplica(t.Context(), "n1", c.pool("n1"), c.replica(1).ID), volume.ErrInUse)
	s := c.snapshot("n1", "snap-1", false)
	holders, err := n.CutSnapshot(t.Context(), "n1", s)
	if err != nil {
		t.Fatal(err)
	}
	c.complete(s, holders)
	r := c.replica(3)
	if err := c.nodes["n3"].CreateReplica(t.Context(), "n3", control.ReplicaSpec{ID: r.ID, Volume: vol1, Pool: r.Pool, Size: 16 * mib}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.cluster.Commit(t.Context(), vol1, replication.Change{AddReplica: &replication.Member{ID: r.ID, Node: r.Node, Pool: r.Pool}}); err != nil {
		t.Fatal(err)
	}
	if err := n.OpenEngine(t.Context(), "n1", vol1, 1); err != nil { // reads the record anew
		t.Fatal(err)
	}
	c.waitInSync(3)
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		c.cluster.mu.Lock()
		filled := fmt.Sprint(c.cluster.filled)
		c.cluster.mu.Unlock()
		if filled == "[snap-1 on rep-n3]" {
			break
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("the controllers were told of %s", filled)
		}
	}
	if rep := n.Engines()[vol1]; rep.Phase != "live" {
		t.Errorf("%+v", rep)
	}
	if rep, err := c.nodes["n3"].Inspect(t.Context(), r, vol1); err != nil || !rep.Present || rep.Role != volume.InSync || rep.Size != 32*mib {
		t.Errorf("%+v, %v", rep, err)
	}
	if err := n.Evict(t.Context(), "n1", vol1, c.cluster.epoch(vol1), c.replica(2).ID); err != nil {
		t.Fatal(err)
	}
	if !c.detach("n1") {
		t.Error("not clean")
	}
	if err := n.DeleteReplica(t.Context(), "n1", c.pool("n1"), c.replica(1).ID); err != nil {
		t.Error(err)
	}
	if all := n.Engines(); len(all) > 0 {
		t.Errorf("an engine is left: %+v", all)
	}
}

// TestLeaseOfClosedReplica: a replica that was closed because nobody used it knows, when it is opened again in the same
// process, how long an engine may be served because of it.
func TestLeaseOfClosedReplica(t *testing.T) {
	c := newTrio(t)
	c.create(8*mib, "n1", 1, 2, 3)
	n := c.nodes["n2"]
	fence := func(epoch volume.Epoch) time.Duration {
		lease, err := n.Fence(t.Context(), c.replica(2), vol1, epoch)
		if err != nil {
			t.Fatal(err)
		}
		return lease
	}
	lease := fence(2)
	if lease <= 0 {
		t.Fatal("who was served before this process is not known, and no lease is assumed")
	}
	time.Sleep(lease)
	if err := n.host.alone(t.Context(), c.replica(2).ID, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if lease := fence(3); lease > 0 {
		t.Errorf("a lease of %v is assumed after the replica was closed and opened", lease)
	}
}
