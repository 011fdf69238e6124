package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// disk is what a replica's store keeps while its node is down.
type disk struct {
	*blocktest.Faulty

	mu     sync.Mutex
	dev    *blocktest.Crashable
	state  []byte
	wil    region.Set
	tags   []replication.MissedTag
	missed map[volume.ReplicaID]*region.Set
	saved  map[volume.ReplicaID]*region.Set // durable
	snaps  []sealed
	open   bool
	writes int64 // bytes
	full   atomic.Bool
	broken atomic.Bool  // no state is taken
	states atomic.Int64 // that were refused
}

type sealed struct {
	replication.SealedSnapshot
	data []byte
}

func newDisk(size int64) *disk {
	d := &disk{dev: blocktest.NewCrashable(size), missed: map[volume.ReplicaID]*region.Set{}, saved: map[volume.ReplicaID]*region.Set{}}
	d.Faulty = blocktest.NewFaulty(d.dev)
	return d
}

// power loses what is not durable.
func (d *disk) power(rng *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dev = d.dev.Crash(blocktest.Tear, rng)
	d.Faulty = blocktest.NewFaulty(d.dev)
	d.missed = map[volume.ReplicaID]*region.Set{}
	for p, s := range d.saved {
		d.missed[p] = s.Clone()
	}
}

// content is what the head reads as.
func (d *disk) content() []byte {
	p := make([]byte, d.dev.Size())
	if err := d.dev.ReadAt(context.Background(), p, 0); err != nil {
		panic(err)
	}
	return p
}

// memStore is an open disk.
type memStore struct {
	*disk
	closed chan struct{}
}

var _ Store = (*memStore)(nil)

func (d *disk) openStore() *memStore {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open {
		panic("a store was opened twice")
	}
	d.open = true
	return &memStore{disk: d, closed: make(chan struct{})}
}

func (s *memStore) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.open {
		return errors.New("store was closed twice")
	}
	s.open = false
	close(s.closed)
	return nil
}

func (s *memStore) WriteAt(ctx context.Context, p []byte, off int64) error {
	s.mu.Lock()
	s.writes += int64(len(p))
	s.mu.Unlock()
	return s.Faulty.WriteAt(ctx, p, off)
}

func (s *memStore) Flush(ctx context.Context) error {
	if err := s.Faulty.Flush(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for p, set := range s.missed {
		s.saved[p] = set.Clone()
	}
	return nil
}

func (s *memStore) State() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.state)
}

func (s *memStore) SetState(_ context.Context, state []byte) error {
	if s.broken.Load() {
		s.states.Add(1)
		return errors.New("pool stopped writing")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = slices.Clone(state)
	return nil
}

func (s *memStore) WIL() []region.Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	runs, _, _ := s.wil.Runs(0, s.wil.Len())
	return runs
}

func (s *memStore) MarkWIL(_ context.Context, runs []region.Run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wil.AddRuns(runs)
	return nil
}

func (s *memStore) ClearWIL(_ context.Context, runs []region.Run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wil.RemoveRuns(runs)
	return nil
}

func (s *memStore) Missed() []replication.MissedTag {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.tags)
}

func (s *memStore) tag(t replication.MissedTag, replace bool) *region.Set {
	i := slices.IndexFunc(s.tags, func(o replication.MissedTag) bool { return o.Peer == t.Peer })
	switch {
	case i < 0:
		s.tags = append(s.tags, t)
	case replace:
		s.tags[i] = t
	}
	if s.missed[t.Peer] == nil {
		s.missed[t.Peer], s.saved[t.Peer] = &region.Set{}, &region.Set{}
	}
	return s.missed[t.Peer]
}

func (s *memStore) TrackMissed(_ context.Context, t replication.MissedTag) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tag(t, false)
	return nil
}

func (s *memStore) NoteMissed(peer volume.ReplicaID, off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set := s.missed[peer]; set != nil {
		set.AddRange(uint32(off>>16), uint32((off+n+65535)>>16))
	}
}

func (s *memStore) AddMissed(_ context.Context, t replication.MissedTag, extents []region.Run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.tag(t, true)
	set.AddRuns(extents)
	s.saved[t.Peer] = set.Clone()
	return nil
}

func (s *memStore) DropMissed(_ context.Context, peer volume.ReplicaID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tags = slices.DeleteFunc(s.tags, func(t replication.MissedTag) bool {
		drop := peer == "" || t.Peer == peer
		if drop {
			delete(s.missed, t.Peer)
			delete(s.saved, t.Peer)
		}
		return drop
	})
	return nil
}

func (s *memStore) MissedRuns(_ context.Context, peer volume.ReplicaID, from uint32, limit int) (volume.ConfigVersion, []region.Run, uint32, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tags {
		if t.Peer == peer {
			runs, next, more := s.missed[peer].Runs(from, limit)
			return t.Since, runs, next, more, nil
		}
	}
	return 0, nil, 0, false, fmt.Errorf("peer %s: %w", peer, volume.ErrNotFound)
}

func (s *memStore) Snapshots() []replication.SealedSnapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []replication.SealedSnapshot
	for _, x := range s.snaps {
		out = append(out, x.SealedSnapshot)
	}
	return out
}

func (s *memStore) Seal(ctx context.Context, id volume.SnapshotID, number uint64) error {
	if err := s.Flush(ctx); err != nil {
		return err
	}
	data := s.content()
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.snaps, func(x sealed) bool { return x.ID == id })
	if i >= 0 && s.snaps[i].Number == number {
		return nil
	}
	if i >= 0 {
		s.snaps = slices.Delete(s.snaps, i, i+1)
	}
	s.snaps = append(s.snaps, sealed{replication.SealedSnapshot{ID: id, Number: number}, data})
	return nil
}

type snapReader []byte

func (r snapReader) ReadAt(_ context.Context, p []byte, off int64) error {
	clear(p)
	if off < int64(len(r)) {
		copy(p, r[off:])
	}
	return nil
}

func (r snapReader) Close() error { return nil }

func (s *memStore) layer(id volume.SnapshotID) ([]byte, error) {
	if id == "" {
		return s.content(), nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.snaps {
		if x.ID == id {
			return x.data, nil
		}
	}
	return nil, fmt.Errorf("snapshot %s: %w", id, volume.ErrNotFound)
}

func (s *memStore) Snapshot(_ context.Context, id volume.SnapshotID) (SnapshotReader, error) {
	data, err := s.layer(id)
	return snapReader(data), err
}

// Allocated compares bytes, as if every extent that is equal had not been written.
func (s *memStore) Allocated(_ context.Context, id, base volume.SnapshotID, from uint32, limit int) ([]region.Run, uint32, bool, error) {
	data, err := s.layer(id)
	if err != nil {
		return nil, 0, false, err
	}
	below := []byte{}
	if base != "" {
		if below, err = s.layer(base); err != nil {
			return nil, 0, false, err
		}
	}
	var set region.Set
	for off := 0; off < len(data); off += 64 << 10 {
		end := min(off+64<<10, len(data))
		p, q := make([]byte, end-off), make([]byte, end-off)
		_ = snapReader(data).ReadAt(context.Background(), p, int64(off))
		_ = snapReader(below).ReadAt(context.Background(), q, int64(off))
		if string(p) != string(q) {
			set.Add(uint32(off >> 16))
		}
	}
	runs, next, more := set.Runs(from, limit)
	return runs, next, more, nil
}

func (s *memStore) Resize(_ context.Context, size int64) error {
	if s.full.Load() {
		return fmt.Errorf("no room for %d bytes: %w", size, volume.ErrNoSpace)
	}
	s.dev.Grow(size)
	return nil
}

// quickStore is as fast as a store can be, for benchmarks.
type quickStore struct {
	block.Device
	memStore
}

func (s *quickStore) Size() int64 { return s.Device.Size() }
func (s *quickStore) ReadAt(ctx context.Context, p []byte, off int64) error {
	return s.Device.ReadAt(ctx, p, off)
}
func (s *quickStore) WriteAt(ctx context.Context, p []byte, off int64) error {
	return s.Device.WriteAt(ctx, p, off)
}
func (s *quickStore) Zero(ctx context.Context, off, n int64) error { return s.Device.Zero(ctx, off, n) }
func (s *quickStore) Flush(ctx context.Context) error              { return s.Device.Flush(ctx) }
