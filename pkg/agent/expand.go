package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// use is how a volume is in use at a path.
type use struct {
	access volume.Access
	dead   bool
}

// use returns how the volume is staged or published at a path; volume.ErrNotFound where it is neither.
func (v *vol) use(path string) (use, error) {
	path = filepath.Clean(path)
	if t := v.rec.target(path); t != nil {
		return use{t.Capability.Access, t.Dead}, nil
	}
	if s := v.rec.stage(path); s != nil {
		return use{s.Capability.Access, s.Dead}, nil
	}
	return use{}, fmt.Errorf("volume %s is not staged or published at %q: %w", v.id, path, volume.ErrNotFound)
}

// inUse returns a volume, locked, that is alive at a path. It returns volume.ErrNotFound where it is not in use there,
// and volume.ErrUnavailable while its device is dead.
func (n *Node) inUse(ctx context.Context, id volume.ID, path string) (*vol, use, error) {
	v, err := n.acquire(ctx, id, false)
	if err != nil {
		return nil, use{}, err
	}
	if v == nil {
		return nil, use{}, fmt.Errorf("volume %s is not in use on node %s: %w", id, n.cfg.ID, volume.ErrNotFound)
	}
	u, err := v.use(path)
	switch {
	case err != nil:
	case u.dead:
		err = fmt.Errorf("volume %s was taken away from %s; unpublish it there and publish it again: %w", id, path, volume.ErrUnavailable)
	case v.eng == nil:
		err = fmt.Errorf("volume %s is being brought back on node %s: %w", id, n.cfg.ID, volume.ErrUnavailable)
	}
	if err != nil {
		n.release(v)
		return nil, use{}, err
	}
	return v, u, nil
}

// Expand makes what is at a path as large as the volume, and returns its size in bytes. A filesystem that the kernel does
// not let grow while it is mounted is grown when it is staged next, and a condition says so. It returns
// volume.ErrOutOfRange where the volume is smaller than required, or larger than the limit.
func (n *Node) Expand(ctx context.Context, q Expand) (int64, error) {
	v, u, err := n.inUse(ctx, q.Volume, q.Path)
	if err != nil {
		return 0, err
	}
	defer n.release(v)
	size := v.eng.dev.Size()
	switch {
	case size < q.RequiredBytes:
		return 0, fmt.Errorf("volume %s has %d bytes, %d are required; expand the volume first: %w", v.id, size, q.RequiredBytes, volume.ErrOutOfRange)
	case q.LimitBytes > 0 && size > q.LimitBytes:
		return 0, fmt.Errorf("volume %s has %d bytes, the limit is %d: %w", v.id, size, q.LimitBytes, volume.ErrOutOfRange)
	}
	if err := n.resizeDevice(ctx, v); err != nil {
		return 0, err
	}
	if u.access == volume.AccessBlock {
		return size, nil
	}
	at := n.anchor(v.id)
	e, mounted, err := mount.At(at)
	if err != nil {
		return 0, err
	}
	if !mounted || e.Source != v.eng.path {
		return 0, fmt.Errorf("filesystem of volume %s is not mounted; stage it again: %w", v.id, volume.ErrUnavailable)
	}
	if v.get().readOnly {
		return size, nil
	}
	err = n.cfg.Mounter.Grow(v.eng.path, e.Type, at)
	if errors.Is(err, mount.ErrMounted) {
		n.log.Warn("filesystem is not grown yet: it is when it is staged next", "volume", v.id, "err", err)
		v.set(func(s *state) { s.notGrown = err.Error() })
		return size, nil
	}
	if err != nil {
		return 0, fmt.Errorf("volume %s: %w", v.id, err)
	}
	v.set(func(s *state) { s.notGrown = "" })
	return size, nil
}

// resizeDevice makes the kernel see the replica's present size.
func (n *Node) resizeDevice(ctx context.Context, v *vol) error {
	names := []string{string(v.id)}
	if v.eng.readOnlyPath != "" {
		names = append(names, readOnlyName(v.id))
	}
	for _, name := range names {
		if err := n.cfg.Frontend.Resize(ctx, name); err != nil {
			return fmt.Errorf("resize device of volume %s: %w", v.id, busy(err))
		}
	}
	return nil
}

// Stats returns the usage of a volume at a path. It returns volume.ErrNotFound where it is not in use there, and
// volume.ErrUnavailable while its device is dead.
func (n *Node) Stats(ctx context.Context, id volume.ID, path string) (Usage, error) {
	v, u, err := n.inUse(ctx, id, path)
	if err != nil {
		return Usage{}, err
	}
	defer n.release(v)
	if u.access == volume.AccessBlock {
		return Usage{Access: volume.AccessBlock, Total: v.eng.dev.Size()}, nil
	}
	e, mounted, err := mount.At(path)
	if err != nil {
		return Usage{}, err
	}
	if !mounted || e.Source != v.eng.path {
		return Usage{}, fmt.Errorf("volume %s is not mounted at %s any more: %w", id, path, volume.ErrNotFound)
	}
	s, err := mount.Stat(path)
	if err != nil {
		return Usage{}, fmt.Errorf("volume %s: %w: %w", id, err, volume.ErrUnavailable)
	}
	return Usage{
		Access: volume.AccessMount,
		Total:  s.Total, Used: s.Used, Available: s.Available,
		TotalInodes: s.TotalInodes, UsedInodes: s.UsedInodes, AvailableInodes: s.AvailableInodes,
	}, nil
}
