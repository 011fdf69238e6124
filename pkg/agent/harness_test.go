package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/frontend/fuseloop"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	nodeID = volume.NodeID("node-1")
	poolID = volume.PoolID("pool-1")
	mib    = int64(1) << 20
)

// fakeCluster keeps volumes in memory, with the state machine's rule for filesystems.
type fakeCluster struct {
	mu       sync.Mutex
	volumes  map[volume.ID]volume.Volume
	phases   []volume.Filesystem
	filled   []string
	down     error
	refuse   func() error // what SetFilesystem answers; may be nil
	reports  int
	register int
}

func (c *fakeCluster) Record(_ context.Context, id volume.ID) (volume.Volume, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return volume.Volume{}, c.down
	}
	v, ok := c.volumes[id]
	if !ok {
		return volume.Volume{}, fmt.Errorf("volume %s: %w", id, volume.ErrNotFound)
	}
	return v, nil
}

func (c *fakeCluster) SetFilesystem(_ context.Context, id volume.ID, fs volume.Filesystem) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return c.down
	}
	if c.refuse != nil {
		return c.refuse()
	}
	v := c.volumes[id]
	if v.Filesystem.Phase == volume.Formatted && v.Filesystem != fs {
		return volume.ErrInUse
	}
	v.Filesystem = fs
	c.volumes[id] = v
	c.phases = append(c.phases, fs)
	return nil
}

func (c *fakeCluster) RegisterNode(context.Context, volume.Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.register++
	return c.down
}

func (c *fakeCluster) ReportUsage(context.Context, volume.NodeID, control.Usage) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports++
	return c.down
}

// Commit implements engine.Controllers, as the state machine does.
func (c *fakeCluster) Commit(_ context.Context, id volume.ID, change replication.Change) (replication.Membership, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return replication.Membership{}, c.down
	}
	v, ok := c.volumes[id]
	if !ok {
		return replication.Membership{}, fmt.Errorf("volume %s: %w", id, volume.ErrNotFound)
	}
	n, err := command.Change(v, change)
	if err != nil {
		return command.Membership(v), err
	}
	c.volumes[id] = n
	return command.Membership(n), nil
}

func (c *fakeCluster) AddHolder(_ context.Context, id volume.SnapshotID, r volume.ReplicaID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.filled = append(c.filled, fmt.Sprintf("%s on %s", id, r))
	return nil
}

// Ended implements Cluster, as control does.
func (c *fakeCluster) Ended(_ context.Context, engines map[volume.ID]volume.Epoch) (ended []volume.ID, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, epoch := range engines {
		if v, ok := c.volumes[id]; !ok || v.State == volume.Deleting || v.Epoch > epoch {
			ended = append(ended, id)
		}
	}
	return ended, c.down
}

// Membership implements engine.Controllers.
func (c *fakeCluster) Membership(ctx context.Context, id volume.ID) (replication.Membership, error) {
	v, err := c.Record(ctx, id)
	return command.Membership(v), err
}

// epoch is the volume's, as whoever asks for an end of its engine knows it.
func (c *fakeCluster) epoch(id volume.ID) volume.Epoch {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.volumes[id].Epoch
}

func (c *fakeCluster) change(id volume.ID, fn func(*volume.Volume)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.volumes[id]
	fn(&v)
	c.volumes[id] = v
}

// filePool keeps each replica and snapshot in a sparse file.
type filePool struct {
	dir string

	mu     sync.Mutex
	open   map[volume.ReplicaID]*fileReplica
	faulty map[volume.ReplicaID]*blocktest.Faulty
	states map[volume.ReplicaID][]byte
	// conditions are what Conditions answers.
	conditions []volume.Condition
}

// fileReplica is the only replica of its volume: no write-intent log, and nobody is absent.
type fileReplica struct {
	*blocktest.Faulty
	engine.Store // not there: what only volumes of several replicas need
	pool         *filePool
	id           volume.ReplicaID
	file         *os.File
}

func (r *fileReplica) Size() int64 { return r.Faulty.Size() }
func (r *fileReplica) ReadAt(ctx context.Context, p []byte, off int64) error {
	return r.Faulty.ReadAt(ctx, p, off)
}
func (r *fileReplica) WriteAt(ctx context.Context, p []byte, off int64) error {
	return r.Faulty.WriteAt(ctx, p, off)
}
func (r *fileReplica) Zero(ctx context.Context, off, n int64) error {
	return r.Faulty.Zero(ctx, off, n)
}
func (r *fileReplica) Flush(ctx context.Context) error { return r.Faulty.Flush(ctx) }

func (r *fileReplica) State() []byte {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	return r.pool.states[r.id]
}

func (r *fileReplica) SetState(_ context.Context, state []byte) error {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	r.pool.states[r.id] = state
	return nil
}

func (r *fileReplica) WIL() []region.Run                            { return nil }
func (r *fileReplica) ClearWIL(context.Context, []region.Run) error { return nil }
func (r *fileReplica) MarkWIL(context.Context, []region.Run) error  { return nil }
func (r *fileReplica) Missed() []replication.MissedTag              { return nil }
func (r *fileReplica) Snapshots() []replication.SealedSnapshot      { return nil }
func (r *fileReplica) Resize(ctx context.Context, size int64) error {
	return r.pool.Resize(ctx, r.id, size)
}
func (r *fileReplica) Seal(ctx context.Context, s volume.SnapshotID, _ uint64) error {
	return r.pool.Cut(ctx, r.id, s)
}

func (r *fileReplica) Close() error {
	r.pool.mu.Lock()
	delete(r.pool.open, r.id)
	r.pool.mu.Unlock()
	return r.file.Close()
}

type fileDevice struct{ f *os.File }

func (d fileDevice) Size() int64 {
	info, err := d.f.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

func (d fileDevice) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d fileDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d fileDevice) Zero(_ context.Context, off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d fileDevice) Flush(context.Context) error { return nil }

var _ block.Device = fileDevice{}

func newFilePool(dir string) *filePool {
	return &filePool{dir: dir, open: map[volume.ReplicaID]*fileReplica{}, faulty: map[volume.ReplicaID]*blocktest.Faulty{}, states: map[volume.ReplicaID][]byte{}}
}

func (p *filePool) path(id string) string { return filepath.Join(p.dir, id) }

func (p *filePool) Info() volume.Pool {
	return volume.Pool{ID: poolID, Name: "default", Kind: volume.PoolDir, Path: p.dir, Capacity: 100 << 30, OverProvision: 1}
}

func (p *filePool) CreateReplica(_ context.Context, r control.ReplicaSpec) error {
	name := p.path(string(r.ID))
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	if r.Parent != "" {
		if err := copyFile(p.path(string(r.Parent)), name); err != nil {
			return err
		}
	} else if err := os.WriteFile(name, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(name, r.Size)
}

func copyFile(from, to string) error {
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	return nil
}

func (p *filePool) DeleteReplica(_ context.Context, id volume.ReplicaID) error {
	return os.RemoveAll(p.path(string(id)))
}

func (p *filePool) HasReplica(id volume.ReplicaID) bool {
	_, err := os.Stat(p.path(string(id)))
	return err == nil
}

func (p *filePool) OpenReplica(_ context.Context, id volume.ReplicaID) (engine.Store, volume.ID, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[id] != nil {
		return nil, "", fmt.Errorf("replica %s is open: %w", id, volume.ErrInUse)
	}
	f, err := os.OpenFile(p.path(string(id)), os.O_RDWR, 0)
	if err != nil {
		return nil, "", err
	}
	r := &fileReplica{Faulty: blocktest.NewFaulty(fileDevice{f}), pool: p, id: id, file: f}
	if p.faulty[id] != nil {
		r.Faulty = blocktest.NewFaulty(p.faulty[id])
	}
	p.open[id] = r
	return r, volume.ID(strings.TrimPrefix(string(id), "rep-")), nil
}

func (p *filePool) Resize(_ context.Context, id volume.ReplicaID, size int64) error {
	return os.Truncate(p.path(string(id)), size)
}

func (p *filePool) Cut(_ context.Context, id volume.ReplicaID, s volume.SnapshotID) error {
	if _, err := os.Stat(p.path(string(s))); err == nil {
		return nil
	}
	return copyFile(p.path(string(id)), p.path(string(s)))
}

func (p *filePool) DeleteSnapshot(_ context.Context, id volume.SnapshotID, _ volume.ReplicaID, _ uint64) error {
	return os.RemoveAll(p.path(string(id)))
}

func (p *filePool) OpenSnapshot(context.Context, volume.SnapshotID) (Snapshot, error) {
	return nil, fmt.Errorf("this pool opens no snapshots: %w", volume.ErrUnavailable)
}

func (p *filePool) Extents(context.Context, volume.SnapshotID, volume.SnapshotID, int64, func(int64, int64) error) error {
	return nil
}

func (p *filePool) Written(_ context.Context, id volume.ReplicaID) (bool, error) {
	var st unix.Stat_t
	err := unix.Stat(p.path(string(id)), &st)
	return st.Blocks > 0, err
}

func (p *filePool) Usage() (map[volume.ReplicaID]int64, map[volume.SnapshotID]int64) {
	return map[volume.ReplicaID]int64{}, map[volume.SnapshotID]int64{}
}

func (p *filePool) Damaged() (map[volume.ReplicaID]bool, map[volume.SnapshotID]bool) { return nil, nil }

// LastFlush is another for each replica.
func (p *filePool) LastFlush(id volume.ReplicaID) volume.Timestamp { return volume.Timestamp(len(id)) }

func (p *filePool) Conditions(volume.ReplicaID) []volume.Condition { return p.conditions }

func (p *filePool) Close() error { return nil }

// host is a machine: what survives a restart of the node's process.
type host struct {
	t       *testing.T
	dir     string
	cluster *fakeCluster
	// pool is nil on a host with the real store.
	pool *filePool
	// snaps keeps what the filesystems were when a snapshot was cut.
	snaps   map[volume.SnapshotID]volume.Filesystem
	fe      *fuseloop.Frontend
	mounter *recordingMounter
	node    *Node
}

// recordingMounter keeps the arguments of mounts.
type recordingMounter struct {
	kmount.Interface
	mu   sync.Mutex
	args []string
	// drop removes options that this kernel does not know, as context without SELinux.
	drop string
}

func (m *recordingMounter) MountSensitive(source, target, fsType string, options, sensitive []string) error {
	m.mu.Lock()
	args, _ := kmount.MakeMountArgsSensitive(source, target, fsType, options, sensitive)
	m.args = append(m.args, strings.Join(args, " "))
	kept := []string{}
	for _, o := range sensitive {
		if m.drop == "" || !strings.HasPrefix(o, m.drop) {
			kept = append(kept, o)
		}
	}
	m.mu.Unlock()
	return m.Interface.MountSensitive(source, target, fsType, options, kept)
}

// newHost returns a host with the real store, newFaultyHost one whose replicas can be made to fail.
func newHost(t *testing.T) *host {
	t.Helper()
	return makeHost(t, nil)
}

func newFaultyHost(t *testing.T) *host {
	t.Helper()
	return makeHost(t, &filePool{})
}

func makeHost(t *testing.T, pool *filePool) *host {
	t.Helper()
	h := &host{
		t: t, dir: t.TempDir(), pool: pool, snaps: map[volume.SnapshotID]volume.Filesystem{},
		cluster: &fakeCluster{volumes: map[volume.ID]volume.Volume{}},
	}
	for _, d := range []string{"pool", "node", "run", "w"} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.start()
	t.Cleanup(h.checkLeaks)
	return h
}

func (h *host) start() {
	h.t.Helper()
	h.boot()
	h.node.Start(h.cluster)
	<-h.node.recovered
}

// boot opens the node without starting it.
func (h *host) boot() {
	h.t.Helper()
	if err := h.open(context.Background()); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) open(ctx context.Context) error {
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("BALLAST_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	fe, err := fuseloop.New(ctx, fuseloop.Options{RunDir: filepath.Join(h.dir, "run"), Logger: log})
	if err != nil {
		return err
	}
	h.fe = fe
	var pool Pool
	dir := filepath.Join(h.dir, "pool")
	if h.pool != nil {
		h.pool = newFilePool(dir)
		pool = h.pool
	} else {
		store, err := extentstore.Open(ctx, dir, extentstore.Options{ID: poolID, Capacity: 8 << 30, Reserve: 16 * mib, Logger: log})
		if err != nil {
			return err
		}
		pool = extentPool{store}
	}
	h.mounter = &recordingMounter{Interface: kmount.NewWithoutSystemd("")}
	h.node, err = Open(Config{
		ID: nodeID, DataDir: filepath.Join(h.dir, "node"), RunDir: filepath.Join(h.dir, "run"), Pools: []Pool{pool},
		Frontend: fe, Mounter: mount.New(h.mounter, log), Logger: log,
	})
	return err
}

// crash ends the devices at once, as the death of the process does.
func (h *host) crash() {
	h.t.Helper()
	if err := h.fe.Close(); err != nil {
		h.t.Fatal(err)
	}
	if err := h.node.Close(); err != nil {
		h.t.Log(err)
	}
}

func (h *host) restart() {
	h.t.Helper()
	h.crash()
	h.start()
}

// w is a path for workloads.
func (h *host) w(parts ...string) string {
	return filepath.Join(append([]string{h.dir, "w"}, parts...)...)
}

func (h *host) create(id volume.ID, size int64) {
	h.t.Helper()
	h.createFrom(id, size, "")
}

func (h *host) createFrom(id volume.ID, size int64, from volume.SnapshotID) {
	h.t.Helper()
	if err := h.createVolume(h.t.Context(), id, size, from); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) volume(id volume.ID, size int64, from volume.SnapshotID) volume.Volume {
	v := volume.Volume{
		ID: id, State: volume.Ready, Size: size, Parameters: volume.Parameters{BlockSize: 4096, MinInSync: 1},
		Replicas: []volume.Replica{h.replica(id)}, Attachment: &volume.Attachment{Node: nodeID},
		Protocol: volume.Protocol{Epoch: 1, ConfigVersion: 1, Lineage: 1, Revision: 1, Owner: nodeID, Clean: true},
	}
	if from != "" {
		v.Source = &volume.Source{Snapshot: from}
		v.Filesystem = h.snaps[from]
	}
	return v
}

func (h *host) createVolume(ctx context.Context, id volume.ID, size int64, from volume.SnapshotID) error {
	spec := control.ReplicaSpec{ID: h.replica(id).ID, Volume: id, Pool: poolID, Size: size, Parent: from}
	if err := h.node.CreateReplica(ctx, nodeID, spec); err != nil {
		return err
	}
	h.cluster.change(id, func(v *volume.Volume) { *v = h.volume(id, size, from) })
	return nil
}

func (h *host) cut(id volume.ID, s volume.SnapshotID, freeze bool) {
	h.t.Helper()
	spec := control.SnapshotSpec{ID: s, Volume: id, Replica: h.replica(id).ID, Pool: poolID, Freeze: freeze}
	spec.Barrier = h.announce(id, s)
	for range 2 {
		if _, err := h.node.CutSnapshot(h.t.Context(), nodeID, spec); err != nil {
			h.t.Fatal(err)
		}
	}
	v, err := h.cluster.Record(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	h.snaps[s] = v.Filesystem
}

// announce records a snapshot that the volume's engine is to cut; without one its number is 0.
func (h *host) announce(id volume.ID, s volume.SnapshotID) volume.Barrier {
	h.t.Helper()
	v, known := h.node.known(id)
	if !known || v.get().inst == nil {
		return volume.Barrier{}
	}
	m, err := h.cluster.Commit(h.t.Context(), id, replication.Change{Prepare: &replication.Prepare{Snapshot: s}})
	if errors.Is(err, volume.ErrBusy) {
		// The last one is not over, as far as the controllers know.
		if m, err = h.cluster.Commit(h.t.Context(), id, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: m.Barrier.Number}}); err == nil {
			return h.announce(id, s)
		}
	}
	if err != nil {
		h.t.Fatal(err)
	}
	b := m.Barrier
	return volume.Barrier{Number: b.Number, Snapshot: b.Snapshot, Epoch: b.Epoch, ConfigVersion: b.ConfigVersion}
}

func (h *host) replica(id volume.ID) volume.Replica {
	return volume.Replica{ID: volume.ReplicaID("rep-" + id), Node: nodeID, Pool: poolID, Role: volume.InSync}
}

func fsCap(fsType string, flags ...string) volume.Capability {
	return volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, FSType: fsType, MountFlags: flags}
}

func blockCap(m volume.Mode) volume.Capability {
	return volume.Capability{Access: volume.AccessBlock, Mode: m}
}

func (h *host) stage(id volume.ID, path string, c volume.Capability) {
	h.t.Helper()
	if err := h.node.Stage(h.t.Context(), Stage{Volume: id, Path: path, Capability: c}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) publish(id volume.ID, staging, path string, c volume.Capability) {
	h.t.Helper()
	if err := h.node.Publish(h.t.Context(), Publish{Volume: id, Staging: staging, Path: path, Capability: c}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) unpublish(id volume.ID, path string) {
	h.t.Helper()
	for range 2 {
		if err := h.node.Unpublish(h.t.Context(), id, path); err != nil {
			h.t.Fatal(err)
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		h.t.Fatalf("target %s is still there: %v", path, err)
	}
}

func (h *host) unstage(id volume.ID, path string) {
	h.t.Helper()
	for range 2 {
		if err := h.node.Unstage(h.t.Context(), id, path); err != nil {
			h.t.Fatal(err)
		}
	}
}

// checkLeaks stops the node and looks for what should be gone: every test undoes what it did.
func (h *host) checkLeaks() {
	h.t.Helper()
	for _, v := range h.node.all() {
		if v.eng != nil || v.inst != nil || !v.rec.empty() {
			h.t.Errorf("volume %s is still in use: %+v", v.id, v.rec)
		}
	}
	stale, err := h.fe.Stale(context.Background())
	if err == nil && len(stale) > 0 {
		h.t.Errorf("devices left: %+v", stale)
	}
	if err := h.node.Close(); err != nil {
		h.t.Errorf("close: %v", err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(h.dir))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, m := range mounts {
		h.t.Errorf("mount left: %s (%s from %s)", m.Mountpoint, m.FSType, m.Source)
		_ = mount.Drop(m.Mountpoint)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, name := range backing {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), h.dir) {
			h.t.Errorf("loop device left: %s %s", name, b)
		}
	}
	for _, d := range []string{"node", "run/mounts"} {
		if left, err := os.ReadDir(filepath.Join(h.dir, d)); err != nil || len(left) > 0 {
			h.t.Errorf("left in %s: %v %v", d, left, err)
		}
	}
}

func write(t *testing.T, name, content string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func wantContent(t *testing.T, name, content string) {
	t.Helper()
	got, err := os.ReadFile(name)
	if err != nil || string(got) != content {
		t.Fatalf("%s: %q, %v; want %q", name, got, err, content)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// conditions are all that the controllers are told of.
func (h *host) conditions(r volume.Replica, id volume.ID) ([]volume.Condition, error) {
	h.t.Helper()
	o, err := h.node.Observe(h.t.Context(), nodeID, []control.Subject{{Volume: id, Replica: r}})
	if err != nil {
		return nil, err
	}
	return slices.Concat(o[0].Replica, o[0].Device), nil
}

func reasons(cs []volume.Condition) string {
	m := map[string]bool{}
	for _, c := range cs {
		m[string(c.Severity)+"/"+c.Reason] = true
	}
	var out []string
	for k := range maps.Keys(m) {
		out = append(out, k)
	}
	return strings.Join(out, " ")
}
