package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxPath is the kernel's limit of a path, in bytes.
const maxPath = 4095

// maxPaths bounds how many staging paths, and how many targets, one volume has.
const maxPaths = 1024

func checkPath(what, path string) error {
	switch {
	case path == "":
		return fmt.Errorf("%s is missing: %w", what, volume.ErrInvalid)
	case len(path) > maxPath:
		return fmt.Errorf("%s has %d bytes, the limit is %d: %w", what, len(path), maxPath, volume.ErrInvalid)
	case !filepath.IsAbs(path):
		return fmt.Errorf("%s is not an absolute path: %w", what, volume.ErrInvalid)
	case filepath.Clean(path) == "/":
		return fmt.Errorf("%s is the root directory: %w", what, volume.ErrInvalid)
	}
	return nil
}

// readOnlyMode tells whether a mode allows nobody to write.
func readOnlyMode(m volume.Mode) bool {
	return m == volume.SingleNodeReaderOnly || m == volume.MultiNodeReaderOnly
}

// Stage makes a volume that is attached to this node ready at a directory: a filesystem is mounted there, of a raw block
// device nothing is. The same path and capability again is nil.
//
// It returns volume.ErrNotFound without the volume, volume.ErrInUse where it is not attached here or cannot be used as
// asked, volume.ErrExists where another capability is staged at the path, and volume.ErrDataLoss where its filesystem is
// damaged.
func (n *Node) Stage(ctx context.Context, q Stage) error {
	if err := checkPath("staging path", q.Path); err != nil {
		return err
	}
	q.Path = filepath.Clean(q.Path)
	if _, err := mount.ParseFlags(q.Capability.MountFlags); err != nil {
		return err
	}
	c, v, cv, err := n.open(ctx, q.Volume)
	if err != nil {
		return err
	}
	defer n.release(v)
	if err := n.attachedHere(cv); err != nil {
		return err
	}
	rec := v.rec.clone()
	known := rec.stage(q.Path)
	if known != nil && known.Dead {
		// Its device was taken away; the volume is attached anew and so is the path.
		if err := mount.Drop(q.Path); err != nil {
			return err
		}
		n.clean(ctx)
		rec.forgetStage(q.Path)
		known = nil
	}
	if known != nil {
		if !known.Capability.Equal(q.Capability) {
			return fmt.Errorf("volume %s is staged at %s with another capability: %w", v.id, q.Path, volume.ErrExists)
		}
		if err := n.attach(ctx, c, v, cv, q.Capability.Access); err != nil {
			return err
		}
		return n.bringUp(ctx, c, v, cv, *known)
	}
	for _, s := range rec.Stages {
		if !s.Dead && s.Capability.Access != q.Capability.Access {
			return fmt.Errorf("volume %s is staged at %s for %s access, and cannot be used in two ways at once: %w",
				v.id, s.Path, s.Capability.Access, volume.ErrInUse)
		}
	}
	if len(rec.Stages) >= maxPaths {
		return fmt.Errorf("volume %s is staged at %d paths: %w", v.id, len(rec.Stages), volume.ErrInUse)
	}
	if err := n.free(ctx, &rec, q.Path, true); err != nil {
		return err
	}
	_, err = os.Lstat(q.Path)
	s := stage{Path: q.Path, Capability: q.Capability, Created: errors.Is(err, fs.ErrNotExist)}
	rec.Stages = append(rec.Stages, s)
	if err := n.save(v, rec); err != nil {
		return err
	}
	if err = n.attach(ctx, c, v, cv, q.Capability.Access); err == nil {
		err = n.bringUp(ctx, c, v, cv, s)
	}
	if err != nil {
		// A failed call leaves nothing behind; what cannot be undone now stays in the record, for Unstage or the next Stage.
		return errors.Join(err, n.rollBack(ctx, v, func(ctx context.Context) error { return n.unstage(ctx, v, s) }))
	}
	return nil
}

// rollbackLimit bounds how long what a failed call began is written out.
const rollbackLimit = 10 * time.Second

// rollBack undoes what a call that failed has done, though its caller may be gone. The volume stays locked meanwhile: where that
// takes too long, and nobody else uses the device, the device fails, which ends whatever waits for it.
func (n *Node) rollBack(ctx context.Context, v *vol, undo func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.rollbackLimit)
	defer cancel()
	if v.rec.uses() > 1 {
		return undo(ctx)
	}
	aborted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { aborted <- n.abortDevices(n.ctx, v.id) })
	err := undo(ctx)
	if !stop() {
		n.log.Warn("what a failed call began was not written out in time; its I/O failed", "volume", v.id)
		err = errors.Join(err, <-aborted, n.abort(n.ctx, v))
	}
	return err
}

// open returns the volume, locked, with what the controllers know of it.
func (n *Node) open(ctx context.Context, id volume.ID) (Cluster, *vol, volume.Volume, error) {
	c, err := n.connected()
	if err != nil {
		return nil, nil, volume.Volume{}, err
	}
	// Asked before the lock is taken, so that ids from outside leave nothing behind, and again after it: a detach may
	// have come between.
	if _, err := c.Record(ctx, id); err != nil {
		return nil, nil, volume.Volume{}, err
	}
	v, err := n.acquire(ctx, id, true)
	if err != nil {
		return nil, nil, volume.Volume{}, err
	}
	cv, err := c.Record(ctx, id)
	if err != nil {
		n.release(v)
		return nil, nil, volume.Volume{}, err
	}
	return c, v, cv, nil
}

// free returns volume.ErrExists where something that is not the volume's is in the way of a directory, or else a file. A dead
// mount that no volume has here is no reason to refuse: the orchestrator gives the path to this volume, nobody is served by
// what is there, and it would be in the way for ever.
func (n *Node) free(ctx context.Context, rec *record, path string, dir bool) error {
	n.mu.Lock()
	of := n.paths[path]
	n.mu.Unlock()
	if of != "" && (of != rec.Volume || slices.Contains(rec.paths(), path)) {
		return takenBy(path, of)
	}
	const most = 64
	for range most {
		e, mounted, err := mount.At(path)
		if err != nil {
			return err
		}
		if !mounted {
			return mount.Fits(path, dir)
		}
		if dead, ok := ask(&n.silent, path, func() bool { return mount.Dead(path) }); !ok || !dead {
			return fmt.Errorf("%s is a mount of %s already; unmount that first: %w", path, e.Source, volume.ErrExists)
		}
		n.log.Warn("a dead mount is removed from a path that is given to a volume", "volume", rec.Volume, "path", path, "source", e.Source, "type", e.Type)
		if err := mount.DropTop(path); err != nil {
			return err
		}
		n.clean(ctx)
	}
	return fmt.Errorf("unmount %s: mounts keep appearing: %w", path, volume.ErrBusy)
}

// bringUp makes a recorded staging path live. The volume is attached.
func (n *Node) bringUp(ctx context.Context, c Cluster, v *vol, cv volume.Volume, s stage) error {
	if s.Capability.Access == volume.AccessBlock {
		if fs := cv.Filesystem; fs.Phase == volume.Formatting {
			// An mkfs was cut off and may be run again, which must not be once somebody has the raw device.
			if err := setFilesystem(ctx, c, v.id, volume.Filesystem{Phase: volume.Formatted, Type: fs.Type}); err != nil {
				return err
			}
		}
		return mount.MakeDir(s.Path)
	}
	if err := n.mountAnchor(ctx, c, v, cv, s.Capability); err != nil {
		return err
	}
	flags, err := mount.ParseFlags(s.Capability.MountFlags)
	if err != nil {
		return err
	}
	flags.ReadOnly = flags.ReadOnly || readOnlyMode(s.Capability.Mode)
	return n.bind(v, n.anchor(v.id), s.Path, flags)
}

// bind makes the volume's filesystem live at a path. A dead mount of it keeps a workload from writing to the directory
// beneath until the live one has its place.
func (n *Node) bind(v *vol, source, path string, flags mount.Flags) error {
	e, mounted, err := mount.At(path)
	if err != nil {
		return err
	}
	if mounted && e.Source == v.eng.path {
		return nil
	}
	if mounted {
		defer n.clean(n.ctx)
	}
	return n.cfg.Mounter.Replace(source, path, n.scratch(v.id), flags)
}

// Unstage undoes Stage. With the last staging path of a volume its device goes. A path at which the volume is not staged
// is nil, and so is a volume that does not exist. It returns volume.ErrInUse while the volume is published from there, and
// volume.ErrBusy while a process uses it.
func (n *Node) Unstage(ctx context.Context, id volume.ID, path string) error {
	path = filepath.Clean(path)
	v, err := n.acquire(ctx, id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	s := v.rec.stage(path)
	if s == nil {
		return nil
	}
	for _, t := range v.rec.Targets {
		if !t.Dead && t.Staging == path {
			return fmt.Errorf("volume %s is published at %s from the staging path %s; unpublish it first: %w", id, t.Path, path, volume.ErrInUse)
		}
	}
	return n.unstage(ctx, v, *s)
}

func (n *Node) unstage(ctx context.Context, v *vol, s stage) error {
	// Without a device whatever is mounted there is dead.
	if s.Dead || v.eng == nil {
		if err := mount.Drop(s.Path); err != nil {
			return err
		}
		n.clean(ctx)
	} else if err := unmountOrDrop(s.Path); err != nil {
		return err
	}
	rec := v.rec.clone()
	rec.forgetStage(s.Path)
	if !rec.live() {
		if err := n.detach(ctx, v); err != nil {
			return err
		}
	}
	if s.Created {
		if err := mount.Remove(s.Path); err != nil {
			n.log.Warn("staging directory stays", "path", s.Path, "err", err)
		}
	}
	return n.save(v, rec)
}

// unmountOrDrop unmounts a path, at once where its device fails anyway.
func unmountOrDrop(path string) error {
	if mount.Corrupted(path) {
		return mount.Drop(path)
	}
	return mount.Unmount(path)
}
