package extentstore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Image is what Export writes to: an *os.File, new and empty.
type Image interface {
	io.WriterAt
	Truncate(size int64) error
}

// Export writes a volume, or one of its snapshots where snap is not "", from a pool that no process has open. The image
// is sparse: what holds no data is not written.
func Export(ctx context.Context, dir string, vol volume.ID, snap volume.SnapshotID, out Image) (err error) {
	var d deps
	if err := d.open(dir, true, true); err != nil {
		return errors.Join(err, d.close())
	}
	b, err := d.kv.Get([]byte{keyPool})
	if err != nil {
		return errors.Join(err, d.close())
	}
	rec, err := decodePool(b)
	if err != nil {
		return errors.Join(err, d.close())
	}
	p, err := start(dir, d, Options{Kind: rec.kind, Capacity: max(layer.ExtentSize, d.file.Size()-layer.ExtentSize), manual: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	head, size, err := p.find(vol, snap)
	if err != nil {
		return err
	}
	buf := disk.Aligned(1 << 20)
	err = p.walk(ctx, head, nil, size, 0, func(off, n int64) error {
		for n > 0 {
			b := buf[:min(n, int64(len(buf)))]
			if err := p.read(head, b, off); err != nil {
				return err
			}
			if _, err := out.WriteAt(b, off); err != nil {
				return fmt.Errorf("write the image: %w", err)
			}
			off, n = off+int64(len(b)), n-int64(len(b))
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
