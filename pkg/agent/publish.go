package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// shared tells whether a mode lets a volume be published at several paths of a node: the CSI specification's table of
// NodePublishVolume.
func shared(m volume.Mode) bool {
	switch m {
	case volume.SingleNodeMultiWriter, volume.MultiNodeReaderOnly, volume.MultiNodeSingleWriter, volume.MultiNodeMultiWriter:
		return true
	}
	return false
}

// Publish makes a staged volume appear at a path: a directory, or for a raw block device its node. The same path with the
// same arguments again is nil.
//
// It returns volume.ErrInUse where the volume is not staged, or is published elsewhere in a mode that allows one path,
// and volume.ErrExists where the path is published with other arguments.
func (n *Node) Publish(ctx context.Context, q Publish) error {
	if err := checkPath("target path", q.Path); err != nil {
		return err
	}
	if q.Staging == "" {
		return fmt.Errorf("no staging path was given; stage the volume first: %w", volume.ErrInUse)
	}
	if err := checkPath("staging path", q.Staging); err != nil {
		return err
	}
	q.Path, q.Staging = filepath.Clean(q.Path), filepath.Clean(q.Staging)
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
	s := v.rec.stage(q.Staging)
	switch {
	case s == nil || s.Dead:
		return fmt.Errorf("volume %s is not staged at %s; stage it first: %w", v.id, q.Staging, volume.ErrInUse)
	case s.Capability.Access != q.Capability.Access:
		return fmt.Errorf("volume %s is staged for %s access, %s was asked for: %w", v.id, s.Capability.Access, q.Capability.Access, volume.ErrInUse)
	case q.Capability.FSType != "" && s.Capability.FSType != "" && q.Capability.FSType != s.Capability.FSType:
		return fmt.Errorf("volume %s is staged as %s, %s was asked for: %w", v.id, s.Capability.FSType, q.Capability.FSType, volume.ErrInUse)
	}
	rec := v.rec.clone()
	t := target{Path: q.Path, Staging: q.Staging, Capability: q.Capability, ReadOnly: q.ReadOnly}
	known := rec.target(q.Path)
	if known != nil && known.Dead {
		if err := mount.Drop(q.Path); err != nil {
			return err
		}
		n.clean(ctx)
		rec.forgetTarget(q.Path)
		known = nil
	}
	if known != nil {
		if known.Staging != t.Staging || known.ReadOnly != t.ReadOnly || !known.Capability.Equal(t.Capability) {
			return fmt.Errorf("volume %s is published at %s with other arguments: %w", v.id, q.Path, volume.ErrExists)
		}
		return n.show(ctx, c, v, cv, *s, t)
	}
	for _, o := range rec.Targets {
		if !o.Dead && (!shared(q.Capability.Mode) || !shared(o.Capability.Mode)) {
			return fmt.Errorf("volume %s is published at %s, and access mode %s allows one path; unpublish it there first: %w",
				v.id, o.Path, q.Capability.Mode, volume.ErrInUse)
		}
	}
	if len(rec.Targets) >= maxPaths {
		return fmt.Errorf("volume %s is published at %d paths: %w", v.id, len(rec.Targets), volume.ErrInUse)
	}
	if err := n.free(ctx, &rec, q.Path, q.Capability.Access == volume.AccessMount); err != nil {
		return err
	}
	rec.Targets = append(rec.Targets, t)
	if err := n.save(v, rec); err != nil {
		return err
	}
	if err := n.show(ctx, c, v, cv, *s, t); err != nil {
		return errors.Join(err, n.rollBack(ctx, v, func(ctx context.Context) error { return n.unpublish(ctx, v, t) }))
	}
	return nil
}

// show makes a recorded target live, and its staging path where that is not.
func (n *Node) show(ctx context.Context, c Cluster, v *vol, cv volume.Volume, s stage, t target) error {
	if err := n.attach(ctx, c, v, cv, t.Capability.Access); err != nil {
		return err
	}
	if err := n.bringUp(ctx, c, v, cv, s); err != nil {
		return err
	}
	readOnly := t.ReadOnly || readOnlyMode(t.Capability.Mode) || cv.Attachment.ReadOnly
	if t.Capability.Access == volume.AccessMount {
		flags, err := mount.ParseFlags(t.Capability.MountFlags)
		if err != nil {
			return err
		}
		flags.ReadOnly = flags.ReadOnly || readOnly
		return n.bind(v, s.Path, t.Path, flags)
	}
	name, device := string(v.id), v.eng.path
	if readOnly && !v.eng.options.ReadOnly {
		var err error
		if name, device, err = n.readOnlyDevice(ctx, v); err != nil {
			return err
		}
	}
	if err := n.give(v, name, device); err != nil {
		return err
	}
	_, mounted, err := mount.At(t.Path)
	if err != nil {
		return err
	}
	if mounted && mount.IsDevice(t.Path, device) {
		return nil
	}
	return n.cfg.Mounter.Replace(device, t.Path, n.scratch(v.id), mount.Flags{})
}

// Unpublish undoes Publish and removes the path. A path at which the volume is not published is nil, and so is a volume
// that does not exist. It returns volume.ErrBusy while a process uses the path and its device lives.
func (n *Node) Unpublish(ctx context.Context, id volume.ID, path string) error {
	path = filepath.Clean(path)
	v, err := n.acquire(ctx, id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	t := v.rec.target(path)
	if t == nil {
		return nil
	}
	return n.unpublish(ctx, v, *t)
}

func (n *Node) unpublish(ctx context.Context, v *vol, t target) error {
	if t.Dead || v.eng == nil || t.Capability.Access == volume.AccessBlock {
		// Processes that have a block device open keep it, not the path; what they write still arrives.
		if err := mount.Drop(t.Path); err != nil {
			return err
		}
	} else if err := unmountOrDrop(t.Path); err != nil {
		return err
	}
	if t.Dead || v.eng == nil {
		n.clean(ctx)
	}
	if err := mount.Remove(t.Path); err != nil {
		return err
	}
	rec := v.rec.clone()
	rec.forgetTarget(t.Path)
	if v.eng != nil && !rec.readOnlyBlock() {
		if err := n.dropReadOnlyDevice(ctx, v); err != nil {
			return err
		}
	}
	if !rec.live() {
		if err := n.detach(ctx, v); err != nil {
			return err
		}
	}
	return n.save(v, rec)
}

// readOnlyBlock tells whether a live target needs the read-only device.
func (r *record) readOnlyBlock() bool {
	for _, t := range r.Targets {
		if !t.Dead && t.Capability.Access == volume.AccessBlock && (t.ReadOnly || readOnlyMode(t.Capability.Mode)) {
			return true
		}
	}
	return false
}
