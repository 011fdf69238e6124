package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// onPool is a replica of vol1 in an extent store of its own.
type onPool struct {
	t     *testing.T
	pool  extentPool
	store engine.Store
	at    volume.Replica
}

func newOnPool(t *testing.T, id volume.PoolID, size int64) *onPool {
	t.Helper()
	p, err := extentstore.Open(t.Context(), t.TempDir(), extentstore.Options{ID: id, Capacity: 1 << 30, Reserve: 16 * mib})
	if err != nil {
		t.Fatal(err)
	}
	o := &onPool{t: t, pool: extentPool{p}, at: volume.Replica{ID: volume.ReplicaID("rep-" + id), Node: nodeID, Pool: id}}
	o.must(o.pool.CreateReplica(t.Context(), control.ReplicaSpec{ID: o.at.ID, Volume: vol1, Pool: id, Size: size}))
	o.store, _, err = o.pool.OpenReplica(t.Context(), o.at.ID)
	o.must(err)
	return o
}

func (o *onPool) must(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

// digest is that of all of a snapshot, some regions at a time.
func (o *onPool) digest(n *Node, id volume.SnapshotID, size int64, regions int) (all []control.RegionDigest) {
	o.t.Helper()
	for off := int64(0); off < size; {
		d, err := n.Digest(o.t.Context(), o.at, id, off, regions)
		o.must(err)
		if d.Next <= off || d.Next > size || len(d.Regions) > regions {
			o.t.Fatalf("from %d on: %d regions up to %d", off, len(d.Regions), d.Next)
		}
		all, off = append(all, d.Regions...), d.Next
	}
	return all
}

// A digest is of the bytes: how they came to be, what was zeroed or is zero, and what is being merged meanwhile, is all the same.
func TestDigestIsOfTheBytes(t *testing.T) {
	const size, block = 36 << 20, 4 << 10 // four regions and a half
	a, b := newOnPool(t, "pool-a", size), newOnPool(t, "pool-b", size)
	n := openNode(t, a.pool, b.pool)
	defer func() { a.must(n.Close()) }()
	ctx := t.Context()
	r := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, size)
	for i := range 60 {
		k := block * (1 + r.IntN(16))
		off := r.IntN((size-k)/block) / 8 * 8 * block
		if off/control.DigestRegion == 1 { // nothing but zeros, written and punched
			off, k = control.DigestRegion, block
			a.must(a.store.WriteAt(ctx, make([]byte, 2*block), int64(off)))
		}
		if r.IntN(3) == 0 {
			a.must(a.store.Zero(ctx, int64(off), int64(k)))
			clear(model[off : off+k])
		} else if off != control.DigestRegion {
			data := bytes.Repeat([]byte{byte(r.IntN(3))}, k)
			a.must(a.store.WriteAt(ctx, data, int64(off)))
			copy(model[off:], data)
		}
		if i%6 == 0 {
			a.must(a.pool.Cut(ctx, a.at.ID, volume.SnapshotID("old-"+string(rune('a'+i/6)))))
		}
	}
	for off := 0; off < size; off += block {
		if x := model[off : off+block]; !bytes.Equal(x, make([]byte, block)) {
			b.must(b.store.WriteAt(ctx, x, int64(off)))
		}
	}
	for _, o := range []*onPool{a, b} {
		o.must(o.pool.Cut(ctx, o.at.ID, "snap-1"))
		o.must(o.store.WriteAt(ctx, bytes.Repeat([]byte{9}, block), 0)) // later
	}
	want := b.digest(n, "snap-1", size, control.MaxDigests)
	if len(want) != 4 || want[1].Offset != 2*control.DigestRegion {
		t.Fatalf("%d regions have bytes: %+v", len(want), want)
	}
	for i := range 10 {
		a.must(n.DeleteSnapshot(ctx, nodeID, "pool-a", volume.SnapshotID("old-"+string(rune('a'+i))), "", 0))
		if got := a.digest(n, "snap-1", size, 1+i); !reflect.DeepEqual(got, want) {
			t.Fatalf("after %d merges were begun: %+v, want %+v", i+1, got, want)
		}
	}
	// The same block at another place of a region is not the same.
	const region = control.DigestRegion
	for i, off := range []int64{region, region + block} {
		o := []*onPool{a, b}[i]
		o.must(o.store.WriteAt(ctx, model[:block], 0))
		o.must(o.store.WriteAt(ctx, bytes.Repeat([]byte{7}, block), off))
		o.must(o.pool.Cut(ctx, o.at.ID, "snap-2"))
	}
	x, y := a.digest(n, "snap-2", size, 16), b.digest(n, "snap-2", size, 16)
	for i := range x {
		if equal := bytes.Equal(x[i].Sum, y[i].Sum); equal != (x[i].Offset != region) {
			t.Errorf("region at %d is alike: %v", x[i].Offset, equal)
		}
	}
	for _, bad := range []struct {
		off     int64
		regions int
	}{{-1, 1}, {1, 1}, {0, 0}, {0, control.MaxDigests + 1}} {
		_, err := n.Digest(ctx, a.at, "snap-1", bad.off, bad.regions)
		wantErr(t, "digests out of bounds", err, volume.ErrInvalid)
	}
	_, err := n.Digest(ctx, a.at, "snap-none", 0, 1)
	wantErr(t, "digests of a snapshot that is not there", err, volume.ErrNotFound)
}

// On a slow disk no region is begun after a time, and one always is.
func TestASlowDigestEndsEarly(t *testing.T) {
	const size = 64 * mib
	o := newOnPool(t, "pool-a", size)
	n := openNode(t, o.pool)
	defer func() { o.must(n.Close()) }()
	for off := int64(0); off < size; off += 4 * mib {
		o.must(o.store.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 8<<10), off))
	}
	o.must(o.pool.Cut(t.Context(), o.at.ID, "snap-1"))
	s, err := o.pool.OpenSnapshot(t.Context(), "snap-1")
	o.must(err)
	defer s.Close()
	for _, tt := range []struct {
		limit time.Duration
		want  int64
	}{{-1, control.DigestRegion}, {time.Hour, 5 * control.DigestRegion}} {
		d := digester{ctx: t.Context(), s: s, left: 5, start: time.Now(), limit: tt.limit, at: -1, h: sha256.New(), buf: make([]byte, digestRead)}
		if err := o.pool.Extents(t.Context(), "snap-1", "", 0, d.add); !errors.Is(err, errEnough) || d.out.Next != tt.want || int64(len(d.out.Regions))*control.DigestRegion != tt.want {
			t.Errorf("in %v: %d regions up to %d, %v", tt.limit, len(d.out.Regions), d.out.Next, err)
		}
	}
}

// stalling is a pool whose snapshots are not read while it stalls.
type stalling struct {
	extentPool
	hears  bool // the end of the context
	stalls atomic.Pointer[chan struct{}]
	once   sync.Once
	seen   chan struct{} // closed with the first that stalls
}

type stallingSnapshot struct {
	Snapshot
	p *stalling
}

func (p *stalling) OpenSnapshot(ctx context.Context, id volume.SnapshotID) (Snapshot, error) {
	s, err := p.extentPool.OpenSnapshot(ctx, id)
	return stallingSnapshot{s, p}, err
}

func (s stallingSnapshot) ReadAt(ctx context.Context, b []byte, off int64) error {
	if c := s.p.stalls.Load(); c != nil {
		s.p.once.Do(func() { close(s.p.seen) })
		if s.p.hears {
			select {
			case <-*c:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		<-*c
	}
	return s.Snapshot.ReadAt(ctx, b, off)
}

func stalled(t *testing.T, hears bool) (o *onPool, p *stalling, n *Node, resume func()) {
	o = newOnPool(t, "pool-a", 16*mib)
	o.must(o.store.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 1<<20), 0))
	o.must(o.pool.Cut(t.Context(), o.at.ID, "snap-1"))
	p = &stalling{extentPool: o.pool, hears: hears, seen: make(chan struct{})}
	c := make(chan struct{})
	p.stalls.Store(&c)
	n = openNode(t, p)
	t.Cleanup(func() { o.must(n.Close()) })
	return o, p, n, func() {
		p.stalls.Store(nil)
		close(c)
	}
}

// A snapshot that is being read for a comparison is deleted all the same.
func TestADeleteEndsADigest(t *testing.T) {
	o, p, n, resume := stalled(t, true)
	defer resume()
	ended := make(chan error, 1)
	go func() {
		_, err := n.Digest(context.Background(), o.at, "snap-1", 0, 1)
		ended <- err
	}()
	<-p.seen
	_, err := n.Digest(t.Context(), o.at, "snap-1", 0, 1)
	wantErr(t, "two at once", err, volume.ErrBusy)
	o.must(n.DeleteSnapshot(t.Context(), nodeID, "pool-a", "snap-1", "", 0))
	wantErr(t, "the digest of what is deleted", <-ended, volume.ErrUnavailable)
	if _, there := o.pool.Usage(); len(there) != 0 {
		t.Errorf("it is still there: %v", there)
	}
}

// A disk that hangs holds up who reads for a comparison no longer than he will wait, and once only.
func TestADigestHangs(t *testing.T) {
	o, _, n, resume := stalled(t, false)
	_, err := n.Digest(soon(t), o.at, "snap-1", 0, 1)
	wantErr(t, "a digest on a disk that hangs", err, volume.ErrUnavailable)
	_, err = n.Digest(t.Context(), o.at, "snap-1", 0, 1)
	wantErr(t, "another", err, volume.ErrBusy)
	wantErr(t, "a delete", n.DeleteSnapshot(soon(t), nodeID, "pool-a", "snap-1", "", 0), volume.ErrUnavailable)
	resume()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		_, err := n.Digest(t.Context(), o.at, "snap-1", 0, 1)
		if err == nil {
			break
		}
		if !errors.Is(err, volume.ErrBusy) || time.Since(start) > 10*time.Second {
			t.Fatal(err)
		}
	}
	o.must(n.DeleteSnapshot(t.Context(), nodeID, "pool-a", "snap-1", "", 0))
}

// compare compares all copies of a snapshot, and returns what is recorded then.
func (p *parts) compare(id volume.SnapshotID) *volume.Difference {
	p.t.Helper()
	var err error
	for c := (control.Comparison{Snapshot: id}); !c.Done; {
		if c, err = p.service.Compare(p.t.Context(), c); err != nil {
			p.t.Fatal(err)
		}
	}
	x, err := p.service.Snapshot(p.t.Context(), id)
	if err != nil {
		p.t.Fatal(err)
	}
	return x.Differs
}

// TestSilentDifference: a write did not reach one disk, which nobody noticed. The checksums, made of what is there, are right, and
// only a comparison tells.
func TestSilentDifference(t *testing.T) {
	p := newParts(t)
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	v, err := p.service.CreateVolume(ctx, control.CreateVolume{Name: "v", RequiredBytes: 24 * mib, Parameters: volume.Parameters{Replicas: 3},
		Capabilities: []volume.Capability{blockCap(volume.SingleNodeWriter)}})
	must(err)
	e := p.engine(v)
	cut := func(name string) volume.Snapshot {
		t.Helper()
		x, err := p.service.CreateSnapshot(ctx, control.CreateSnapshot{Name: name, Volume: v.ID})
		if err != nil || len(x.Holders) != 3 {
			t.Fatalf("%+v %v", x, err)
		}
		return x
	}
	must(e.WriteAt(ctx, pattern("first..."), 0))
	before := cut("before")
	secret := pattern("second..")
	must(e.WriteAt(ctx, secret, 17*mib))
	must(e.(interface{ Flush(context.Context) error }).Flush(ctx))

	bad := v.Replicas[1].Node
	data, err := os.OpenFile(p.path(bad, "pool", "data"), os.O_RDWR, 0)
	must(err)
	defer data.Close()
	all := make([]byte, 64*mib)
	if _, err := data.ReadAt(all, 0); err != io.EOF {
		must(err)
	}
	at := bytes.Index(all, secret[:64<<10])
	if at < 0 {
		t.Fatal("what was written is not in the pool's file")
	}
	_, err = data.WriteAt(bytes.Repeat([]byte("x"), 4<<10), int64(at))
	must(err)
	must(data.Sync())
	x := cut("after")

	for id, n := range p.nodes {
		for range 20 { // also once the checksums are there
			must(n.cfg.Pools[0].(extentPool).Scrub(ctx))
			time.Sleep(10 * time.Millisecond)
		}
		if u := n.usage(); len(u.DamagedReplicas)+len(u.DamagedSnapshots) != 0 {
			t.Errorf("a scrub on %s tells the difference: %+v", id, u)
		}
	}
	if d := p.compare(before.ID); d != nil {
		t.Errorf("what was cut before differs: %+v", d)
	}
	var want volume.Difference
	want.Offset, want.Alike = 16*mib, make([][]volume.PoolID, 2)
	for _, h := range x.Holders {
		i := 0
		if h.Node == bad {
			i = 1
		}
		want.Alike[i] = append(want.Alike[i], h.Pool)
	}
	if d := p.compare(x.ID); !reflect.DeepEqual(d, &want) {
		t.Errorf("found %+v, want %+v", d, want)
	}
	// One holder merges, the others do not yet.
	must(p.nodes[v.Replicas[2].Node].DeleteSnapshot(ctx, v.Replicas[2].Node, v.Replicas[2].Pool, before.ID, "", 0))
	for range 5 {
		if d := p.compare(x.ID); !reflect.DeepEqual(d, &want) {
			t.Errorf("while one merges: found %+v, want %+v", d, want)
		}
	}
	// The checksums were there: a scrub tells what changes after them.
	_, err = data.WriteAt([]byte("y"), int64(at))
	must(err)
	must(data.Sync())
	for start := time.Now(); !p.nodes[bad].usage().DamagedSnapshots[x.ID]; time.Sleep(10 * time.Millisecond) {
		must(p.nodes[bad].cfg.Pools[0].(extentPool).Scrub(ctx))
		if time.Since(start) > 10*time.Second {
			t.Fatal("there were no checksums")
		}
	}
	must(p.service.DeleteVolume(ctx, v.ID))
}
