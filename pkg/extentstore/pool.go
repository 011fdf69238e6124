package extentstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// flushEvery and flushBytes bound what a crash can take that nobody asked to be flushed.
	flushEvery = 5 * time.Second
	flushBytes = 256 << 20
	// maxDirtyPages is how many map pages wait for a commit before one is made; at twice as many, writes wait for it. A
	// page is about 1.2 KiB.
	maxDirtyPages = 16 << 10
)

// Pool is an open pool. All methods may be called at once. Those with a context end with it, whatever the disk does, but for
// OpenReplica: what they have begun goes on then, and they return volume.ErrUnavailable.
type Pool struct {
	dir   string
	opts  Options
	log   *slog.Logger
	file  disk.File
	kv    kv
	space disk.Space
	id    volume.PoolID
	kind  volume.PoolKind
	thin  bool // freed slots are punched

	stripes    [stripeCount]stripe
	cachePages int64
	cached     atomic.Int64 // pages in memory
	victim     atomic.Uint32
	dirtyPages atomic.Int64
	gone       atomic.Uint64 // counts pages that layers had
	distrusted atomic.Int64  // layers that are damaged
	grace      grace
	alloc      allocator
	commits    committer
	wil        wilCommits
	// missedDirty and missedPages count pages of what peers missed: those to be stored, and those in memory.
	missedDirty, missedPages atomic.Int64
	freed                    struct {
		mu    sync.Mutex
		slots []layer.Slot
		some  chan struct{}
	}

	mu        sync.Mutex // topology; held while it is committed
	layers    map[uint64]*chain
	replicas  map[volume.ReplicaID]*replica
	present   sync.Map // the ids of replicas, for who must not wait for a commit
	snapshots map[volume.SnapshotID]*snapshot
	cuts      cuts
	nextLayer uint64
	purges    []purge
	closed    bool

	users   sync.RWMutex  // shared by what neither mu nor a handle keeps the pool open for
	awaited chan struct{} // holds a token of each await
	failed  atomic.Pointer[error]
	starved atomic.Int64 // writes that the filesystem has no room for
	job     *job         // of the worker
	urgent  bool         // the worker should look for something better to do
	worker  sync.Mutex
	copyBuf []byte        // of the worker
	kicked  chan struct{} // work for the worker
	flushMe chan struct{} // work for the flusher

	uncompacted atomic.Int64 // bytes committed since compactMe
	compactMe   chan struct{}

	ctx     context.Context
	cancel  context.CancelFunc
	group   errgroup.Group
	release []func() error // what Open took, in the order of giving back
}

// chain is a layer, with what hangs on it. Fields without a note are guarded by Pool.mu.
type chain struct {
	id     uint64
	parent atomic.Pointer[chain]
	// merging is the parent while its pages are moved into this layer.
	merging atomic.Pointer[chain]
	pages   presence
	slots   atomic.Int64 // owned, reserved ones included
	// damaged: a checksum is not that of what was read; durable, and changed with Pool.mu held. Reads verify such a layer.
	damaged atomic.Bool

	children int
	head     *replica
	snap     *snapshot
	summed   bool  // each page has its checksums
	bad      error // what keeps the worker from merging or summing it; where damaged, merging would hide it
	stuck    bool  // it cannot be freed either

	dirtyMu sync.Mutex
	dirty   []*page
}

func (l *chain) record() layerRecord {
	r := layerRecord{summed: l.summed, damaged: l.damaged.Load()}
	if parent := l.parent.Load(); parent != nil {
		r.parent = parent.id
	}
	return r
}

type snapshot struct {
	id      volume.SnapshotID
	layer   *chain
	number  uint64 // of the barrier that cut it; 0 is none
	size    int64
	volume  volume.ID
	tenant  string
	replica volume.ReplicaID
	readers atomic.Int32 // who raises it holds Pool.mu
}

// deps are a pool's ports.
type deps struct {
	file    disk.File
	kv      kv
	space   disk.Space
	release []func() error
}

// start opens a pool over its ports. It owns them from now on, also when it fails.
func start(dir string, d deps, o Options) (_ *Pool, err error) {
	o = o.withDefaults()
	p := &Pool{
		dir: dir, opts: o, log: o.Logger, file: d.file, kv: d.kv, space: d.space, release: d.release,
		thin:   o.Kind == volume.PoolDir,
		layers: map[uint64]*chain{}, replicas: map[volume.ReplicaID]*replica{}, snapshots: map[volume.SnapshotID]*snapshot{},
		awaited: make(chan struct{}, maxAwaited),
		kicked:  make(chan struct{}, 1), flushMe: make(chan struct{}, 1), compactMe: make(chan struct{}, 1),
	}
	p.freed.some = make(chan struct{}, 1)
	p.cuts.over = map[volume.SnapshotID]uint64{}
	p.copyBuf = disk.Aligned(layer.ExtentSize)
	p.cachePages = max(8, o.CacheBytes/1200)
	for i := range p.stripes {
		p.stripes[i].pages = map[pageID]*page{}
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if err := p.recover(); err != nil {
		return nil, errors.Join(err, p.closePorts())
	}
	p.log = p.log.With("pool", p.id)
	if _, err := p.space.Hold(growFloor); err != nil {
		return nil, errors.Join(err, p.closePorts())
	}
	if !o.manual {
		p.group.Go(p.runWorker)
		p.group.Go(p.runFlusher)
		p.group.Go(p.runRecycler)
		p.group.Go(p.runCompactor)
		p.group.Go(p.runScrubber)
		p.kick()
		p.compactSoon()
	}
	return p, nil
}

// ID names the pool.
func (p *Pool) ID() volume.PoolID { return p.id }

// Info reports the pool. Node and Provisioned are left to the caller.
func (p *Pool) Info() volume.Pool {
	p.alloc.mu.Lock()
	defer p.alloc.mu.Unlock()
	return volume.Pool{
		ID: p.id, Name: p.opts.Name, Kind: p.kind, Path: p.dir,
		Capacity: int64(p.alloc.limit) * layer.ExtentSize, Used: int64(p.alloc.used) * layer.ExtentSize,
		OverProvision: p.opts.OverProvision, Failed: p.failure() != nil,
	}
}

// fail ends all writing until the pool is reopened, and returns the error that every write gets from now on.
func (p *Pool) fail(cause error) error {
	err := fmt.Errorf("pool %s stopped writing after an error; restart the node's daemon once its disk is sound, the last flushed data is kept: %w (%w)",
		p.id, cause, volume.ErrUnavailable)
	if p.failed.CompareAndSwap(nil, &err) {
		p.log.Error("pool stopped writing", "error", cause)
		p.cancelWaits()
	}
	return *p.failed.Load()
}

func (p *Pool) failure() error {
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// cancelWaits makes those who wait for space look again.
func (p *Pool) cancelWaits() {
	p.alloc.mu.Lock()
	defer p.alloc.mu.Unlock()
	for _, w := range p.alloc.waiters {
		close(w.slot)
	}
	p.alloc.waiters = nil
}

// Conditions reports what is wrong with a replica here, or with the whole pool for "". None is healthy.
func (p *Pool) Conditions(id volume.ReplicaID) []volume.Condition {
	var c []volume.Condition
	if err := p.failure(); err != nil {
		c = append(c, volume.Condition{Severity: volume.Inaccessible, Reason: "PoolFailed", Message: err.Error()})
	}
	if p.full() {
		c = append(c, volume.Condition{Severity: volume.Degraded, Reason: "PoolFull", Message: fmt.Sprintf(
			"pool %s has no space left, writes to new places wait: delete volumes or snapshots, or enlarge the pool", p.id)})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.layersOf(id) {
		if l.bad == nil {
			continue
		}
		reason := "ExtentUnreadable"
		if errors.Is(l.bad, layer.ErrCorrupt) {
			reason = "ExtentCorrupt"
		}
		c = append(c, volume.Condition{Severity: volume.DataLoss, Reason: reason, Message: fmt.Sprintf(
			"pool %s has damage in a layer of %s: %v; run \"ballastctl pool check\" and restore what it names", p.id, l.owner(), l.bad)})
	}
	return c
}

// layersOf are the layers that a replica's bytes are in, or all for "". Pool.mu is held.
func (p *Pool) layersOf(id volume.ReplicaID) iter.Seq[*chain] {
	if id == "" {
		return maps.Values(p.layers)
	}
	return func(yield func(*chain) bool) {
		r := p.replicas[id]
		if r == nil {
			return
		}
		for l := r.head.Load(); l != nil && yield(l); l = l.parent.Load() {
		}
	}
}

// owner says whose bytes a layer holds. Pool.mu is held.
func (l *chain) owner() string {
	switch {
	case l.head != nil:
		return "replica " + string(l.head.id)
	case l.snap != nil:
		return "snapshot " + string(l.snap.id)
	}
	return fmt.Sprintf("a deleted snapshot (layer %d)", l.id)
}

// Close flushes and closes everything, open devices included. It is called once.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	var open []*Replica
	for _, r := range p.replicas {
		if r.open != nil {
			open = append(open, r.open)
		}
	}
	p.mu.Unlock()
	p.cancel()
	var errs []error
	for _, h := range open {
		errs = append(errs, h.Close())
	}
	errs = append(errs, p.group.Wait())
	for range maxAwaited {
		p.awaited <- struct{}{} // nothing is awaited any more, from now on
	}
	if p.failure() == nil && !p.opts.salvage {
		p.mu.Lock()
		all := make([]*chain, 0, len(p.layers))
		for _, l := range p.layers {
			all = append(all, l)
		}
		p.mu.Unlock()
		errs = append(errs, p.flush(all...))
		p.reuse(p.freed.slots) // the filesystem gets the space back: the recycler has ended
	}
	p.users.Lock()
	defer p.users.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(append(errs, p.closePorts())...)
}

func (p *Pool) closePorts() error {
	p.cancel()
	errs := []error{p.kv.Close(), p.file.Close()}
	for _, f := range p.release {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// kick tells the worker that there may be work.
func (p *Pool) kick() {
	select {
	case p.kicked <- struct{}{}:
	default:
	}
}

// runFlusher bounds what is not durable, and takes the reserve back once there is room.
func (p *Pool) runFlusher() error {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return nil
		case <-tick.C:
			if !p.space.Held() {
				if held, err := p.space.Hold(growFloor); err != nil {
					p.log.Warn("cannot take the reserve back", "error", err)
				} else if held {
					p.log.Info("the pool's reserve is back")
				}
			}
			p.keepRoom() // also while nobody commits: the database compacts by itself
			p.settleWIL()
			p.saveFlushed()
		case <-p.flushMe:
		}
		p.selfFlush()
	}
}

// flushSoon wakes the flusher.
func (p *Pool) flushSoon() {
	select {
	case p.flushMe <- struct{}{}:
	default:
	}
}

func (p *Pool) selfFlush() {
	var layers []*chain
	var journals []*journal
	var seen []func()
	at := time.Now().UnixNano()
	p.mu.Lock()
	for _, r := range p.replicas {
		if w := r.writes.Load(); w > r.flushed.Load() {
			layers = append(layers, r.head.Load())
			seen = append(seen, func() { raise(&r.flushed, w); r.flushedAt.Store(at) })
		}
		if l := r.log; l != nil {
			if n := l.noted.Load(); n > l.saved.Load() {
				journals = append(journals, l)
				seen = append(seen, func() { raise(&l.saved, n) })
			}
		}
	}
	p.mu.Unlock()
	if len(seen) == 0 || p.flushAll(layers, journals) != nil {
		return
	}
	for _, f := range seen {
		f()
	}
}

// saveFlushed stores when replicas were flushed last: now and then, for people who must choose one, and not with each flush.
func (p *Pool) saveFlushed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failure() != nil || !p.keepRoom() {
		return
	}
	var ops []op
	for _, r := range p.replicas {
		if at := r.flushedAt.Load(); at != r.savedAt && len(ops) < purgeStep {
			ops = append(ops, op{journalKey(keyFlushed, r.journal), encodeFlushed(at)})
			r.savedAt = at
		}
	}
	if len(ops) > 0 {
		_ = p.commitOps(ops) // an error has stopped the pool
	}
}

// LastFlush is when what a replica had was made durable last; 0 is not known. After a crash it may be some seconds less.
func (p *Pool) LastFlush(id volume.ReplicaID) volume.Timestamp {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.replicas[id]; r != nil {
		return volume.Timestamp(r.flushedAt.Load())
	}
	return 0
}

func (p *Pool) runRecycler() error {
	for {
		select {
		case <-p.ctx.Done():
			return nil
		case <-p.freed.some:
		}
		p.freed.mu.Lock()
		slots := p.freed.slots
		p.freed.slots = nil
		p.freed.mu.Unlock()
		p.reuse(slots)
	}
}
