package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// digestRate is how fast a snapshot is read to be compared, in bytes per second: half of what a scrub reads.
	digestRate = 32 << 20
	// digestTime is after how long no other region is begun: a disk may take a hundred times as long for small pieces, and who asks
	// waits for a minute.
	digestTime = 10 * time.Second
	// digestRead is what is read at once.
	digestRead = 256 << 10
	// digestBlock is what is left out where it is zero.
	digestBlock = 4 << 10
)

// digests are the calls of Digest that are under way, one for each pool.
type digests struct {
	mu sync.Mutex
	m  map[volume.PoolID]*digesting
	// deleting counts the deletes of a snapshot that are under way: it is not opened.
	deleting map[volume.SnapshotID]int
}

type digesting struct {
	of     volume.SnapshotID
	cancel context.CancelFunc
	done   chan struct{} // closed when the snapshot is not open any more
}

func (d *digests) begin(ctx context.Context, p volume.PoolID, of volume.SnapshotID) (context.Context, *digesting, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := d.m[p]; now != nil {
		return nil, nil, fmt.Errorf("pool %s reads snapshot %s for another comparison: %w", p, now.of, volume.ErrBusy)
	}
	if d.deleting[of] > 0 {
		return nil, nil, fmt.Errorf("snapshot %s is being deleted: %w", of, volume.ErrBusy)
	}
	ctx, cancel := context.WithCancel(ctx)
	x := &digesting{of: of, cancel: cancel, done: make(chan struct{})}
	if d.m == nil {
		d.m = map[volume.PoolID]*digesting{}
	}
	d.m[p] = x
	return ctx, x, nil
}

func (d *digests) over(p volume.PoolID, x *digesting) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x.cancel()
	delete(d.m, p)
	close(x.done)
}

// without does what needs a snapshot that is not being read.
func (d *digests) without(ctx context.Context, p volume.PoolID, of volume.SnapshotID, do func() error) error {
	d.mu.Lock()
	if d.deleting == nil {
		d.deleting = map[volume.SnapshotID]int{}
	}
	d.deleting[of]++
	x := d.m[p]
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.deleting[of]--; d.deleting[of] == 0 {
			delete(d.deleting, of)
		}
	}()
	if x != nil && x.of == of {
		x.cancel()
		select {
		case <-x.done:
		case <-ctx.Done():
			return fmt.Errorf("snapshot %s is being read, and the disk of pool %s does not answer: %w: %w", of, p, ctx.Err(), volume.ErrUnavailable)
		}
	}
	return do()
}

// Digest implements control.Agents. A disk that hangs holds up the reading, and the next, but not the caller.
func (n *Node) Digest(ctx context.Context, holder volume.Replica, id volume.SnapshotID, offset int64, regions int) (control.Digest, error) {
	if offset < 0 || offset%control.DigestRegion != 0 || regions < 1 || regions > control.MaxDigests {
		return control.Digest{}, fmt.Errorf("digests of %d regions from offset %d on: %w", regions, offset, volume.ErrInvalid)
	}
	p, err := n.pool(holder.Node, holder.Pool)
	if err != nil {
		return control.Digest{}, err
	}
	reading, x, err := n.digests.begin(ctx, holder.Pool, id)
	if err != nil {
		return control.Digest{}, err
	}
	ended := func(cause error) error {
		return fmt.Errorf("snapshot %s is not read to be compared any more: %w: %w", id, cause, volume.ErrUnavailable)
	}
	unhook := context.AfterFunc(n.ctx, x.cancel)
	type answer struct {
		control.Digest
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		defer unhook()
		d, err := readDigest(reading, p, id, offset, regions)
		if cause := reading.Err(); err != nil && cause != nil {
			err = ended(cause)
		}
		n.digests.over(holder.Pool, x)
		answers <- answer{d, err}
	}()
	select {
	case a := <-answers:
		return a.Digest, a.err
	case <-ctx.Done():
		return control.Digest{}, ended(ctx.Err())
	}
}

var zeroBlock [digestBlock]byte

// errEnough ends a walk over a snapshot's data.
var errEnough = errors.New("enough")

func readDigest(ctx context.Context, p Pool, id volume.SnapshotID, offset int64, regions int) (out control.Digest, err error) {
	s, err := p.OpenSnapshot(ctx, id)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	d := digester{
		ctx: ctx, s: s, left: regions, start: time.Now(), limit: digestTime, at: -1, h: sha256.New(), buf: disk.Aligned(digestRead), out: control.Digest{Next: s.Size()},
	}
	err = p.Extents(ctx, id, "", offset, d.add)
	if err != nil && !errors.Is(err, errEnough) {
		return out, err
	}
	d.finish()
	return d.out, nil
}

// digester hashes the blocks of a region that are not zero, each with its place: how they lie in layers and extents, and what was
// zeroed or never written, makes no difference.
type digester struct {
	ctx   context.Context
	s     Snapshot
	left  int // regions that may still be begun
	start time.Time
	limit time.Duration // for which regions are begun, at least one
	bytes int64         // read so far
	at    int64         // the region that is being read; -1 is none
	h     hash.Hash
	some  bool // h has a block
	buf   []byte
	out   control.Digest
}

func (d *digester) add(off, n int64) error {
	for n > 0 {
		region := off - off%control.DigestRegion
		if region != d.at {
			d.finish()
			if d.left == 0 || d.at >= 0 && time.Since(d.start) > d.limit {
				d.out.Next = region
				return errEnough
			}
			d.left--
			d.at = region
		}
		k := min(n, region+control.DigestRegion-off, digestRead)
		if err := d.read(off, d.buf[:k]); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (d *digester) read(off int64, b []byte) error {
	if err := d.s.ReadAt(d.ctx, b, off); err != nil {
		return err
	}
	for at := 0; at < len(b); at += digestBlock {
		block := b[at:min(at+digestBlock, len(b))]
		if bytes.Equal(block, zeroBlock[:len(block)]) {
			continue
		}
		var place [8]byte
		binary.LittleEndian.PutUint64(place[:], uint64(off-d.at)+uint64(at))
		d.h.Write(place[:])
		d.h.Write(block)
		d.some = true
	}
	d.bytes += int64(len(b))
	ahead := time.Duration(d.bytes*int64(time.Second)/digestRate) - time.Since(d.start)
	if ahead < time.Millisecond {
		return d.ctx.Err()
	}
	pause := time.NewTimer(ahead)
	defer pause.Stop()
	select {
	case <-d.ctx.Done():
		return d.ctx.Err()
	case <-pause.C:
		return nil
	}
}

func (d *digester) finish() {
	if d.some {
		d.out.Regions = append(d.out.Regions, control.RegionDigest{Offset: d.at, Sum: d.h.Sum(nil)})
	}
	d.h.Reset()
	d.some = false
}
