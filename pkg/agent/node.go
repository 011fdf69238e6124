package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Config of a node. The node owns, and closes, Pools, Frontend and Mounter; also when Open fails.
type Config struct {
	ID volume.NodeID
	// DataDir keeps the records. RunDir, which a reboot clears, holds the anchors.
	DataDir, RunDir string
	Pools           []Pool
	Frontend        Frontend
	Mounter         *mount.Mounter
	Logger          *slog.Logger
	// Address of the node's API and DataAddress of its replicas, host:port, and Zone and Roles, as others are told of them.
	Address, DataAddress, Zone string
	Roles                      []volume.NodeRole
	// Remote reaches the replicas of other nodes; nil where there are none.
	Remote engine.Peers
	// Timing of the replication protocol; the zero value is the default.
	Timing replication.Timing
	// ReportEvery is how often usage is reported when it changed; 0 is DefaultReportEvery.
	ReportEvery time.Duration
}

// DefaultReportEvery is how often a node reports its usage, where it changed.
const DefaultReportEvery = 5 * time.Second

// Node is this host's side of Ballast. Its methods may be called at once; those of one volume run one after another.
type Node struct {
	cfg     Config
	log     *slog.Logger
	records records
	pools   map[volume.PoolID]Pool

	cluster atomic.Pointer[Cluster]
	// recovered is closed once the restoring of every recorded volume has been attempted.
	recovered chan struct{}

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	vols   map[volume.ID]*vol
	past   map[volume.ID]past
	paths  map[string]volume.ID // whose they are by the records
	closed bool

	host  replicaHost
	meter engine.Meter // of the engines' reads and writes

	exports exports
	digests digests

	silent silent // pools and paths that do not answer

	rollbackLimit, closeLimit, detachPatience time.Duration // shorter in tests
}

// vol is a volume that is, was, or is about to be in use on this node.
type vol struct {
	id volume.ID
	// lock holds one token; who took it may use rec and eng.
	lock chan struct{}
	rec  record
	// eng is the kernel device; only where there is an engine.
	eng  *attached
	inst *instance
	// held is a snapshot that the volume's writes wait for.
	held *hold

	// refs counts who holds or waits for lock; guarded by Node.mu.
	refs int

	// mu guards state, which is read without waiting for a long operation.
	mu    sync.Mutex
	state state
}

// state is what Conditions tells of a volume.
type state struct {
	inst *instance
	// failed is why the engine ended; "" is fine.
	failed replication.Reason
	// device is "" when there is none.
	device string
	// anchor is "" when no filesystem is mounted.
	anchor   string
	readOnly bool
	// notGrown and notRestored say why; "" is fine.
	notGrown, notRestored string
	// dead is the number of paths whose device was taken away.
	dead int
}

func (v *vol) set(fn func(*state)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	fn(&v.state)
}

func (v *vol) get() state {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

// Open reads the records and clears away what an earlier process left in the run directory. Start begins the work.
func Open(cfg Config) (n *Node, err error) {
	if cfg.ReportEvery == 0 {
		cfg.ReportEvery = DefaultReportEvery
	}
	n = &Node{
		cfg: cfg, log: cfg.Logger,
		pools: map[volume.PoolID]Pool{}, vols: map[volume.ID]*vol{}, paths: map[string]volume.ID{}, past: map[volume.ID]past{}, recovered: make(chan struct{}),
		rollbackLimit: rollbackLimit, closeLimit: closeLimit, detachPatience: detachPatience,
	}
	if n.cfg.Timing == (replication.Timing{}) {
		n.cfg.Timing = replication.DefaultTiming()
	}
	n.host.n, n.host.m = n, map[volume.ReplicaID]*hosted{}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	boot, err := randomID()
	if err != nil {
		return nil, err
	}
	n.host.boot = replication.BootID(boot)
	for _, p := range cfg.Pools {
		id := p.Info().ID
		if _, ok := n.pools[id]; ok {
			return nil, fmt.Errorf("two pools have the id %s: %w", id, volume.ErrInvalid)
		}
		n.pools[id] = p
	}
	store, recs, err := openRecords(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	n.records = store
	for _, r := range recs {
		v := newVol(r.Volume)
		v.rec = r
		n.vols[r.Volume] = v
		for _, p := range r.paths() {
			n.paths[p] = r.Volume
		}
		for _, d := range r.Devices {
			cfg.Frontend.Reserve(d.Name, d.Path)
		}
		if r.live() {
			v.set(func(s *state) { s.notRestored = "it is being brought back after a restart" })
		}
		n.thawLeft(v)
	}
	if err := n.clearAnchors(); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(n.exportDir()); err != nil {
		return nil, fmt.Errorf("clear run directory: %w", err)
	}
	return n, nil
}

func newVol(id volume.ID) *vol {
	v := &vol{id: id, lock: make(chan struct{}, 1), rec: record{Volume: id}}
	v.lock <- struct{}{}
	return v
}

// Start connects the node to its cluster, and in the background registers it, brings back what was staged and published
// before, and reports usage.
func (n *Node) Start(c Cluster) {
	n.cluster.Store(&c)
	n.wg.Go(func() { n.report(c) })
	n.wg.Go(func() { n.restoreAll(c) })
	n.wg.Go(func() { n.host.sweep(n.ctx) })
	n.wg.Go(n.pace)
	n.wg.Go(func() { n.endThePast(c) })
}

// Ready returns nil once Start was called and the restoring of what was in use before has been attempted; what could not
// be restored is tried again and shown by Conditions.
func (n *Node) Ready(context.Context) error {
	select {
	case <-n.recovered:
		return nil
	default:
		return fmt.Errorf("node %s is bringing back its volumes: %w", n.cfg.ID, volume.ErrUnavailable)
	}
}

// ID is the node's name.
func (n *Node) ID() volume.NodeID { return n.cfg.ID }

func (n *Node) connected() (Cluster, error) {
	c := n.cluster.Load()
	if c == nil {
		return nil, fmt.Errorf("node %s is starting: %w", n.cfg.ID, volume.ErrUnavailable)
	}
	return *c, nil
}

// acquire returns the volume, locked. With create it is also returned where nothing is known of it; otherwise nil is.
func (n *Node) acquire(ctx context.Context, id volume.ID, create bool) (*vol, error) {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil, n.stopping()
	}
	v, ok := n.vols[id]
	if !ok {
		if !create {
			n.mu.Unlock()
			return nil, nil
		}
		v = newVol(id)
		n.vols[id] = v
	}
	v.refs++
	n.mu.Unlock()
	select {
	case <-v.lock:
		if n.isClosed() {
			v.lock <- struct{}{}
			n.unref(v)
			return nil, n.stopping()
		}
		return v, nil
	case <-ctx.Done():
		n.unref(v)
		return nil, fmt.Errorf("another operation on volume %s is under way: %w: %w", id, ctx.Err(), volume.ErrBusy)
	}
}

func (n *Node) isClosed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// spawn runs fn in a goroutine that Close waits for; not at all once the node is being closed, which ends what fn would watch.
func (n *Node) spawn(fn func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.wg.Go(fn)
	}
}

func (n *Node) stopping() error {
	return fmt.Errorf("node %s is stopping: %w", n.cfg.ID, volume.ErrUnavailable)
}

func (n *Node) release(v *vol) {
	dead := 0
	for _, s := range v.rec.Stages {
		if s.Dead {
			dead++
		}
	}
	for _, t := range v.rec.Targets {
		if t.Dead {
			dead++
		}
	}
	v.set(func(s *state) {
		s.dead = dead
		if !v.rec.live() {
			s.notRestored = ""
		}
	})
	v.lock <- struct{}{}
	n.unref(v)
}

func (n *Node) unref(v *vol) {
	n.mu.Lock()
	defer n.mu.Unlock()
	v.refs--
	// With no references nobody holds the lock.
	if v.refs == 0 && v.rec.empty() && v.inst == nil {
		delete(n.vols, v.id)
	}
}

// all returns the volumes known here.
func (n *Node) all() []*vol {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]*vol, 0, len(n.vols))
	for _, v := range n.vols {
		out = append(out, v)
	}
	return out
}

// known returns a volume without locking it.
func (n *Node) known(id volume.ID) (*vol, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	v, ok := n.vols[id]
	return v, ok
}

// save makes changed the volume's record once it is durable. Devices are given back with the last target.
func (n *Node) save(v *vol, changed record) error {
	if len(changed.Targets) == 0 {
		changed.Devices = nil
	}
	// A path is one volume's: undoing what another has there would take this one's away.
	before, after := v.rec.paths(), changed.paths()
	if err := n.claim(v.id, before, after); err != nil {
		return err
	}
	if err := n.records.save(&changed); err != nil {
		n.disclaim(v.id, after, before)
		return err
	}
	n.disclaim(v.id, before, after)
	if len(changed.Devices) == 0 {
		for _, d := range v.rec.Devices {
			n.cfg.Frontend.Release(d.Name)
		}
	}
	v.rec = changed
	return nil
}

// claim makes the new paths of a volume its own; volume.ErrExists: one is another's.
func (n *Node) claim(id volume.ID, before, after []string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	added := slices.DeleteFunc(slices.Clone(after), func(p string) bool { return slices.Contains(before, p) })
	for _, p := range added {
		if of := n.paths[p]; of != "" && of != id {
			return takenBy(p, of)
		}
	}
	for _, p := range added {
		n.paths[p] = id
	}
	return nil
}

// disclaim gives up the paths that are not needed any more.
func (n *Node) disclaim(id volume.ID, had, needed []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range had {
		if n.paths[p] == id && !slices.Contains(needed, p) {
			delete(n.paths, p)
		}
	}
}

func takenBy(path string, id volume.ID) error {
	return fmt.Errorf("%s is a path of volume %s; unpublish or unstage it there first: %w", path, id, volume.ErrExists)
}

// give records that a workload is about to be given a kernel device, and keeps it from becoming another volume's.
//
// The bind mount of a device's node holds a number and not the device, and so does the node that a container runtime
// makes of it.
func (n *Node) give(v *vol, name, path string) error {
	d := given{name, path}
	if slices.Contains(v.rec.Devices, d) {
		return nil
	}
	rec := v.rec.clone()
	rec.Devices = append(rec.Devices, d)
	if err := n.save(v, rec); err != nil {
		return err
	}
	n.cfg.Frontend.Reserve(name, path)
	return nil
}

func (n *Node) anchors() string { return filepath.Join(n.cfg.RunDir, "mounts") }

func (n *Node) anchor(id volume.ID) string { return filepath.Join(n.anchors(), string(id)) }

// scratch is a path for mounts that are being made.
func (n *Node) scratch(id volume.ID) string { return n.anchor(id) + ".new" }

func (n *Node) clearAnchors() error {
	if err := os.MkdirAll(n.anchors(), 0o700); err != nil {
		return fmt.Errorf("open run directory: %w", err)
	}
	entries, err := os.ReadDir(n.anchors())
	if err != nil {
		return fmt.Errorf("open run directory: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(n.anchors(), e.Name())
		if err := errors.Join(mount.Drop(path), mount.Remove(path)); err != nil {
			return fmt.Errorf("clear run directory: %w", err)
		}
	}
	return nil
}

const (
	// syncLimit bounds how long a clean stop waits for volumes to be written out, closeLimit how long it takes in all: what is on
	// a disk that hangs is left then, as in a crash.
	syncLimit  = 10 * time.Second
	closeLimit = 18 * time.Second
)

// Close stops the node cleanly: calls under way end, volumes are written out, as far as they can be within seconds,
// devices die, replicas and pools are closed. What is mounted stays mounted, dead. A disk that hangs keeps nothing else from being
// closed.
func (n *Node) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	n.mu.Unlock()
	n.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), n.closeLimit)
	defer cancel()
	calls, cancel := context.WithTimeout(ctx, n.closeLimit*2/3) // the rest is for the disks
	defer cancel()

	var syncs sync.WaitGroup
	for _, v := range n.all() {
		s := v.get()
		if s.device == "" {
			continue
		}
		syncs.Go(func() {
			var err error
			if s.anchor != "" {
				err = mount.Sync(s.anchor)
			} else {
				err = mount.SyncDevice(s.device)
			}
			if err != nil {
				n.log.Warn("volume not written out", "volume", v.id, "err", err)
			}
		})
	}
	synced := make(chan struct{})
	n.wg.Go(func() { syncs.Wait(); close(synced) })
	select {
	case <-synced:
	case <-time.After(syncLimit):
		n.log.Warn("volumes not written out in time; what was not synced by its workload may be lost")
	}
	// Whatever still waits for a device fails now.
	errs := []error{n.cfg.Frontend.Close()}
	errs = append(errs, inTime(calls, "what was under way", func() error { n.wg.Wait(); return nil }))
	errs = append(errs, atOnce(n.all(), func(v *vol) error { // each may wait for replicas on other nodes
		select {
		case <-v.lock:
		case <-calls.Done():
			return fmt.Errorf("an operation on volume %s does not end: %w", v.id, calls.Err())
		}
		v.eng = nil
		n.endInstance(v)
		v.lock <- struct{}{}
		return nil
	}))
	errs = append(errs, inTime(calls, "freezes", func() error { n.cfg.Mounter.Close(); return nil }))
	errs = append(errs, atOnce(n.cfg.Pools, func(p Pool) error {
		err := n.host.closeAll(ctx, p)
		return errors.Join(err, inTime(ctx, "pool "+p.Info().Name, p.Close))
	}))
	return errors.Join(errs...)
}

// inTime calls fn, and leaves it where it does not end before ctx does.
func inTime(ctx context.Context, what string, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: it does not end, and is left as in a crash: %w", what, ctx.Err())
	}
}

// atOnce calls fn with all of them.
func atOnce[T any](all []T, fn func(T) error) error {
	errs := make([]error, len(all))
	var calls sync.WaitGroup
	for i, x := range all {
		calls.Go(func() { errs[i] = fn(x) })
	}
	calls.Wait()
	return errors.Join(errs...)
}
