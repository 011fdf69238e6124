package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// The model of a pool: blocks in maps. A world runs the same random operations on a pool in memory and on the model,
// lets the power fail, and compares.

var zeros [layer.BlockSize]byte

const (
	modelSize  = layer.PageSpan + 4*layer.ExtentSize
	modelMax   = modelSize + 4*layer.ExtentSize
	hotExtents = 10
)

// hot are the extents that operations go to: few, so that they meet; on two pages.
var hot = [hotExtents]int64{0, 1, 2, 126, 127, 128, 129, 131, 132, 135}

type modelVolume struct {
	id     volume.ReplicaID
	sizes  []int64 // the last is the present one; more than one after a crash in a resize
	blocks map[int64][][]byte
	// touched since the layer below was sealed.
	touched map[int64]bool
	parent  *modelSnapshot
	dev     *Replica
	journal *modelJournal
}

// now is a block's present value: the last of those that it may have after a crash.
func (v *modelVolume) now(b int64) []byte {
	if h := v.blocks[b]; len(h) > 0 {
		return h[len(h)-1]
	}
	return zeros[:]
}

func (v *modelVolume) size() int64 { return v.sizes[len(v.sizes)-1] }

// settle makes the present values the only ones.
func (v *modelVolume) settle() {
	for b, h := range v.blocks {
		v.blocks[b] = h[len(h)-1:]
	}
	v.sizes = v.sizes[len(v.sizes)-1:]
}

type modelSnapshot struct {
	id      volume.SnapshotID
	replica volume.ReplicaID
	size    int64
	blocks  map[int64][]byte
	touched map[int64]bool
	parent  *modelSnapshot
}

type world struct {
	rng   *rand.Rand
	seed  uint64
	o     Options
	m     *machine
	power *power
	p     *Pool
	vols  map[volume.ReplicaID]*modelVolume
	snaps map[volume.SnapshotID]*modelSnapshot
	// maybe are what an operation that was cut off by the power was about.
	maybeVol  map[volume.ReplicaID]*modelVolume
	maybeSnap map[volume.SnapshotID]*modelSnapshot
	next      uint64
	log       []string
	tiny      bool // the pool fills up
}

func newWorld(seed uint64, broken rules) (*world, error) {
	rng := rand.New(rand.NewPCG(seed, 7))
	w := &world{
		rng: rng, seed: seed, m: newMachine(), vols: map[volume.ReplicaID]*modelVolume{}, snaps: map[volume.SnapshotID]*modelSnapshot{},
		tiny: rng.IntN(4) == 0,
		o:    Options{ID: "pool", Capacity: 400 * layer.ExtentSize, CacheBytes: 1, manual: true, broken: broken, maxMissed: 2},
	}
	if w.tiny {
		w.o.Capacity = 24 * layer.ExtentSize
	}
	if rng.IntN(2) == 0 {
		w.m.file.TearAt = disk.BlockSize
	}
	if rng.IntN(2) == 0 {
		// A preallocated file of somebody's old bytes.
		w.o.Kind, w.o.Device = volume.PoolDisk, "none"
		if err := w.m.file.Grow(w.o.Capacity + layer.ExtentSize); err != nil {
			return nil, err
		}
		junk := bytes.Repeat([]byte{0xdb}, layer.ExtentSize)
		for s := layer.Slot(1); s.Offset() <= w.o.Capacity; s++ {
			if err := w.m.file.WriteAt(junk, s.Offset()); err != nil {
				return nil, err
			}
		}
		if err := w.m.file.Sync(); err != nil {
			return nil, err
		}
	}
	return w, w.start(-1)
}

// start opens the pool with power for that many steps.
func (w *world) start(steps int) (err error) {
	w.power = &power{left: steps, rng: w.rng}
	w.m.plug(w.power)
	w.maybeVol, w.maybeSnap = map[volume.ReplicaID]*modelVolume{}, map[volume.SnapshotID]*modelSnapshot{}
	if w.p, err = w.m.open(w.o); err != nil {
		return err
	}
	for _, v := range w.vols {
		if v.dev, err = w.p.OpenReplica(context.Background(), v.id); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) note(format string, a ...any) { w.log = append(w.log, fmt.Sprintf(format, a...)) }

// sorted keys make choices repeatable.
func pick[K ~string, V any](rng *rand.Rand, m map[K]V) (v V, ok bool) {
	keys := slices.Sorted(maps.Keys(m))
	if len(keys) == 0 {
		return v, false
	}
	return m[keys[rng.IntN(len(keys))]], true
}

// span chooses a range in the hot places.
func (w *world) span(size int64) (off, n int64) {
	off = hot[w.rng.IntN(hotExtents)] * layer.ExtentSize
	switch w.rng.IntN(4) {
	case 0: // bytes
		off += w.rng.Int64N(layer.ExtentSize)
		n = 1 + w.rng.Int64N(3*layer.BlockSize)
	case 1: // an extent and more
		n = layer.ExtentSize * (1 + w.rng.Int64N(2))
	default:
		off += w.rng.Int64N(layer.BlocksPerExtent) * layer.BlockSize
		n = layer.BlockSize * (1 + w.rng.Int64N(20))
	}
	if off >= size {
		off = 0
	}
	return off, min(n, size-off)
}

// change puts bytes into the model; done false: each block may as well have kept its old value.
func (w *world) change(v *modelVolume, off int64, p []byte, done bool) error {
	for n := int64(0); n < int64(len(p)); {
		b := (off + n) / layer.BlockSize
		at := (off + n) % layer.BlockSize
		val := slices.Clone(v.now(b))
		old := v.now(b)
		k := int64(copy(val[at:], p[n:]))
		if v.blocks[b] == nil {
			v.blocks[b] = [][]byte{zeros[:]}
		}
		v.blocks[b] = append(v.blocks[b], val)
		v.touched[b] = true
		if !done && !w.power.off {
			got := make([]byte, layer.BlockSize)
			if err := v.dev.ReadAt(context.Background(), got, b*layer.BlockSize); err != nil {
				return err
			}
			if !bytes.Equal(got, val) && !bytes.Equal(got, old) {
				return fmt.Errorf("block %d of %s is neither old nor new after a failed write", b, v.id)
			}
			v.blocks[b] = append(v.blocks[b], got)
		}
		n += k
	}
	return nil
}

func (w *world) write(v *modelVolume) error {
	off, n := w.span(v.size())
	p := make([]byte, n)
	w.next++
	for i := range p {
		p[i] = byte(w.next >> (8 * (i % 8)))
	}
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], w.next<<20|uint64(i)/512)
	}
	zero := w.rng.IntN(4) == 0
	if zero {
		if clear(p); w.rng.IntN(2) == 0 {
			off, n = off&^(layer.ExtentSize-1), min(4*layer.ExtentSize, v.size()-off&^(layer.ExtentSize-1))
			p = make([]byte, n)
		}
	}
	ctx := context.Background()
	if w.tiny {
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
	}
	var err error
	if zero {
		err = v.dev.Zero(ctx, off, n)
	} else {
		err = v.dev.WriteAt(ctx, p, off)
	}
	w.note("write %s %d+%d zero %v: %v", v.id, off, n, zero, err)
	if errors.Is(err, context.DeadlineExceeded) && !w.power.off {
		return w.change(v, off, p, false)
	}
	return errors.Join(err, w.change(v, off, p, err == nil))
}

func (w *world) flush(v *modelVolume) error {
	before := map[int64]int{}
	for b, h := range v.blocks {
		before[b] = len(h)
	}
	// What is written while the flush is under way is not in it.
	w.power.during = func(string) {
		if w.rng.IntN(3) == 0 {
			if u, ok := pick(w.rng, w.vols); ok {
				_ = w.write(u) // an error is the power's, which the flush gets too
			}
		}
	}
	err := v.dev.Flush(context.Background())
	w.power.during = nil
	w.note("flush %s: %v", v.id, err)
	if err != nil {
		return err
	}
	for b, n := range before {
		v.blocks[b] = v.blocks[b][n-1:]
	}
	v.journal.flushed()
	return nil
}

func (w *world) cut(v *modelVolume) error {
	w.next++
	s := &modelSnapshot{id: volume.SnapshotID(fmt.Sprintf("s%d", w.next)), replica: v.id, size: v.size(), parent: v.parent,
		blocks: map[int64][]byte{}, touched: v.touched}
	w.maybeSnap[s.id] = s
	// What is written while the first flush is under way is before the barrier, and in the snapshot.
	w.power.during = func(op string) {
		if op == "sync" {
			w.power.during = nil
			_ = w.write(v) // an error is the power's, which the cut gets too
		}
	}
	err := w.p.Cut(context.Background(), v.id, s.id)
	w.power.during = nil
	for b := range v.blocks {
		s.blocks[b] = v.now(b)
	}
	w.note("cut %s %s: %v", v.id, s.id, err)
	if err != nil {
		return err
	}
	v.settle()
	v.journal.flushed()
	delete(w.maybeSnap, s.id)
	w.adoptSnap(s)
	return w.p.Cut(context.Background(), v.id, s.id) // again is nil
}

func (w *world) adoptSnap(s *modelSnapshot) {
	w.snaps[s.id] = s
	if v := w.vols[s.replica]; v != nil {
		v.parent, v.touched = s, map[int64]bool{}
	}
}

func (w *world) create() error {
	w.next++
	v := &modelVolume{id: volume.ReplicaID(fmt.Sprintf("r%d", w.next)), sizes: []int64{modelSize}, blocks: map[int64][][]byte{}, touched: map[int64]bool{},
		journal: newModelJournal()}
	spec := ReplicaSpec{ID: v.id, Volume: "v", Tenant: "t"}
	if s, ok := pick(w.rng, w.snaps); ok && w.rng.IntN(4) > 0 {
		spec.Parent, v.parent = s.id, s
		v.sizes[0] = min(modelMax, s.size+w.rng.Int64N(3)*layer.BlockSize)
		for b, p := range s.blocks {
			v.blocks[b] = [][]byte{p}
		}
	}
	spec.Size = v.size()
	w.maybeVol[v.id] = v
	err := w.p.CreateReplica(context.Background(), spec)
	w.note("create %s from %q: %v", v.id, spec.Parent, err)
	if err != nil {
		return err
	}
	delete(w.maybeVol, v.id)
	w.vols[v.id] = v
	v.dev, err = w.p.OpenReplica(context.Background(), v.id)
	return err
}

func (w *world) deleteVolume(v *modelVolume) error {
	if err := v.dev.Close(); err != nil {
		return err
	}
	delete(w.vols, v.id)
	v.settle()
	w.maybeVol[v.id] = v
	err := w.p.DeleteReplica(context.Background(), v.id)
	w.note("delete %s: %v", v.id, err)
	if err == nil {
		delete(w.maybeVol, v.id)
	}
	return err
}

func (w *world) deleteSnapshot(s *modelSnapshot) error {
	delete(w.snaps, s.id)
	w.maybeSnap[s.id] = s
	err := w.p.DeleteSnapshot(context.Background(), s.id, "", 0)
	w.note("delete %s: %v", s.id, err)
	if err == nil {
		delete(w.maybeSnap, s.id)
	}
	return err
}

func (w *world) resize(v *modelVolume) error {
	size := min(modelMax, v.size()+(1+w.rng.Int64N(20))*layer.BlockSize)
	v.sizes = append(v.sizes, size)
	err := w.p.Resize(context.Background(), v.id, size)
	w.note("resize %s to %d: %v", v.id, size, err)
	if err == nil {
		v.sizes = []int64{size}
	}
	return err
}

// act does one random operation.
func (w *world) act() error {
	v, ok := pick(w.rng, w.vols)
	if !ok {
		return w.create()
	}
	switch k := w.rng.IntN(100); {
	case k < 10:
		return w.useJournal(v)
	case k < 45:
		return w.write(v)
	case k < 57:
		return w.flush(v)
	case k < 65:
		if len(w.snaps) < 6 {
			return w.cut(v)
		}
	case k < 69:
		if len(w.vols) < 4 {
			return w.create()
		}
	case k < 72:
		return w.deleteVolume(v)
	case k < 77:
		if s, ok := pick(w.rng, w.snaps); ok {
			return w.deleteSnapshot(s)
		}
	case k < 79:
		return w.resize(v)
	case k < 95:
		_, err := w.p.step()
		w.note("step: %v", err)
		return err
	case k < 98:
		return w.compareVolume(v, false)
	default:
		return w.diff()
	}
	return nil
}

// crash takes the power away, if it is not gone already, and starts again with power for that many steps.
func (w *world) crash(steps int) error {
	w.note("crash")
	_ = w.p.Close() // the power is off: whatever it says
	return w.restart(w.m.crash(w.rng.Uint64()), steps)
}

func (w *world) restart(m *machine, steps int) error {
	w.m = m
	maybeVol, maybeSnap := w.maybeVol, w.maybeSnap
	if r, err := check(context.Background(), w.m.file, w.m.kv, nil); w.m.kv.m[string(rune(keyPool))] != nil && (err != nil || len(r.Problems) > 0) {
		return fmt.Errorf("check after the crash: %v %v", r.Problems, err)
	}
	// What was under way happened or did not.
	for id, v := range maybeVol {
		if w.m.kv.m[string(replicaKey(id))] != nil {
			w.vols[id] = v
		}
	}
	for id, s := range maybeSnap {
		rec, err := decodeSnapshot(w.m.kv.m[string(snapshotKey(id))])
		if err != nil {
			continue
		}
		w.snaps[id] = s
		v := w.vols[s.replica]
		if v == nil || v.parent != s.parent {
			continue
		}
		// A cut: it was the last thing that happened to the volume.
		r, err := decodeReplica(w.m.kv.m[string(replicaKey(v.id))])
		if err != nil {
			return err
		}
		head, err := decodeLayer(w.m.kv.m[string(layerKey(r.head))])
		if err != nil {
			return err
		}
		if head.parent == rec.layer {
			v.settle()
			w.adoptSnap(s)
		}
	}
	if err := w.start(-1); err != nil {
		return err
	}
	if err := w.verify(true); err != nil {
		return err
	}
	w.power.left = steps
	return nil
}

// run makes n operations with a crash after about that many steps, and starts over some times.
func (w *world) run(rounds, ops, steps int) error {
	for range rounds {
		w.power.left = -1
		if steps > 0 {
			w.power.left = w.rng.IntN(steps)
		}
		var err error
		for i := 0; i < ops && err == nil && !w.power.off; i++ {
			err = w.act()
		}
		if err != nil && !w.power.off {
			return err
		}
		if w.power.off || w.rng.IntN(3) > 0 {
			w.power.mu.Lock()
			w.power.off = true
			w.power.mu.Unlock()
			if err := w.crash(-1); err != nil {
				return err
			}
			continue
		}
		w.power.left = -1
		if err := w.p.Close(); err != nil {
			return err
		} else {
			for _, v := range w.vols {
				v.settle()
				v.journal.flushed()
			}
			w.note("reopen")
			if err := w.restart(w.m.reopen(), -1); err != nil {
				return err
			}
		}
	}
	w.power.left = -1
	if err := w.quiet(); err != nil {
		return err
	}
	if err := w.verify(false); err != nil {
		return err
	}
	return w.p.Close()
}

// report is an error with what led to it.
func (w *world) report(err error) string {
	from := max(0, len(w.log)-60)
	out := fmt.Sprintf("seed %d: %v\nwhat led to it:\n", w.seed, err)
	for _, l := range w.log[from:] {
		out += "  " + l + "\n"
	}
	return out
}
