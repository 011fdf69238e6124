package extentstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Image is what Export writes to: an *os.File, new and empty.
type Image interface {
	io.WriterAt
	Truncate(size int64) error
}

// Progress is called now and then with how many bytes of all that are to be read have been.
type Progress func(done, total int64)

// openOffline opens a pool that no process has open, to be read. Damage to one thing does not keep others from being
// read: what cannot be decoded is left out, or found when it is read.
func openOffline(dir string) (*Pool, error) {
	var d deps
	if err := d.open(dir, true, true); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return start(dir, d, Options{manual: true, salvage: true})
}

// VolumeContents is a volume in a pool.
type VolumeContents struct {
	// ID is the volume's, and Replica that of what the pool holds of it: "" where only snapshots are left.
	ID      volume.ID
	Replica volume.ReplicaID
	Tenant  string
	// Size and Physical are in bytes: of the volume, and of the slots that it alone occupies.
	Size, Physical int64
	Snapshots      []SnapshotContents // the oldest first
}

// SnapshotContents is a snapshot in a pool; its fields are like those of VolumeContents.
type SnapshotContents struct {
	ID             volume.SnapshotID
	Size, Physical int64
}

// List tells what a pool that no process has open holds, by id. What cannot be read is left out: Check names it.
func List(ctx context.Context, dir string) (_ []VolumeContents, err error) {
	p, err := openOffline(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	u := p.Usage()
	byID := map[volume.ID]*VolumeContents{}
	for _, r := range p.replicas {
		byID[r.volume] = &VolumeContents{ID: r.volume, Replica: r.id, Tenant: r.tenant, Size: r.size.Load(), Physical: u.Replicas[r.id]}
	}
	snaps := slices.SortedFunc(maps.Values(p.snapshots), func(a, b *snapshot) int { return cmp.Compare(a.layer.id, b.layer.id) })
	for _, s := range snaps {
		v := byID[s.volume]
		if v == nil {
			v = &VolumeContents{ID: s.volume, Tenant: s.tenant}
			byID[s.volume] = v
		}
		v.Snapshots = append(v.Snapshots, SnapshotContents{ID: s.id, Size: s.size, Physical: u.Snapshots[s.id]})
	}
	out := make([]VolumeContents, 0, len(byID))
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		out = append(out, *byID[id])
	}
	return out, ctx.Err()
}

// Export writes a volume, or one of its snapshots where snap is not "", from a pool that no process has open. The image
// is sparse: what holds no data is not written. Progress may be nil.
func Export(ctx context.Context, dir string, vol volume.ID, snap volume.SnapshotID, out Image, progress Progress) (err error) {
	p, err := openOffline(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	head, size, err := p.find(vol, snap)
	if err != nil {
		return err
	}
	for l := head; l != nil; l = l.parent.Load() {
		if l.bad != nil {
			return fmt.Errorf("a part of the bytes is lost with the parent of layer %d: %w", l.id, l.bad)
		}
	}
	var done, total int64
	if progress != nil {
		err := p.walk(ctx, head, nil, size, 0, func(_, n int64) error { total += n; return nil })
		if err != nil {
			return err
		}
	}
	buf := disk.Aligned(1 << 20)
	err = p.walk(ctx, head, nil, size, 0, func(off, n int64) error {
		for n > 0 {
			b := buf[:min(n, int64(len(buf)))]
			if err := errors.Join(ctx.Err(), p.read(head, b, off)); err != nil {
				return err
			}
			if _, err := out.WriteAt(b, off); err != nil {
				return fmt.Errorf("write the image: %w", err)
			}
			off, n = off+int64(len(b)), n-int64(len(b))
			if done += int64(len(b)); progress != nil {
				progress(done, total)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return out.Truncate(size)
}

func (p *Pool) find(vol volume.ID, snap volume.SnapshotID) (*chain, int64, error) {
	if snap != "" {
		if s := p.snapshots[snap]; s != nil && s.volume == vol {
			return s.layer, s.size, nil
		}
		return nil, 0, fmt.Errorf("snapshot %s of volume %s is not in pool %s: %w", snap, vol, p.id, volume.ErrNotFound)
	}
	for _, r := range p.replicas {
		if r.volume == vol {
			return r.head.Load(), r.size.Load(), nil
		}
	}
	return nil, 0, fmt.Errorf("volume %s is not in pool %s: %w", vol, p.id, volume.ErrNotFound)
}
