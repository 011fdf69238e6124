package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/block/throttle"
	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// attached is a volume's kernel device over its engine, with the limits on it.
type attached struct {
	dev     *throttle.Device
	options frontend.Options
	// path of the kernel device; readOnlyPath of a second one that refuses writes, "" when nobody needs it.
	path, readOnlyPath string
}

// readOnlyName is the frontend's name for the second, read-only device of a volume.
//
// A bind mount of a device node cannot be made to refuse writes, and the first device may have a writer. The second
// device has a page cache of its own, which lives as long as the device: a buffered reader goes on seeing what was read
// once, whatever a writer on the same node writes, also after it reopens. Readers with direct I/O see every write.
func readOnlyName(id volume.ID) string { return string(id) + ".ro" }

// used returns a volume that there is for those who use volumes: what is Kept is none.
func used(ctx context.Context, c Cluster, id volume.ID) (volume.Volume, error) {
	cv, err := c.Record(ctx, id)
	if err == nil && cv.Kept != "" {
		err = fmt.Errorf("volume %s is deleted: %w", id, volume.ErrNotFound)
	}
	return cv, err
}

// attachedHere returns volume.ErrInUse unless the controllers say that the volume is attached to this node.
func (n *Node) attachedHere(cv volume.Volume) error {
	switch a := cv.Attachment; {
	case cv.State == volume.Deleting || cv.Kept != "":
		return fmt.Errorf("volume %s is being deleted: %w", cv.ID, volume.ErrNotFound)
	case a == nil:
		return fmt.Errorf("volume %s is not attached to any node; attach it to %s first: %w", cv.ID, n.cfg.ID, volume.ErrInUse)
	case a.Node != n.cfg.ID:
		return fmt.Errorf("volume %s is attached to node %s; detach it there and attach it to %s first: %w", cv.ID, a.Node, n.cfg.ID, volume.ErrInUse)
	case a.Detaching:
		return fmt.Errorf("volume %s is being detached from node %s; attach it again first: %w", cv.ID, n.cfg.ID, volume.ErrInUse)
	}
	return nil
}

// attach runs the volume's engine and makes its kernel device, unless that is done already. A device that died meanwhile is
// replaced; its mounts are by whoever needs them.
func (n *Node) attach(ctx context.Context, c Cluster, v *vol, cv volume.Volume, access volume.Access) error {
	if v.inst == nil {
		if err := n.notExported(string(cv.ID)); err != nil {
			return err
		}
	}
	i, err := n.instance(ctx, c, v, cv)
	if err != nil {
		return err
	}
	if e := v.eng; e != nil {
		path, err := n.cfg.Frontend.Attach(ctx, string(v.id), e.dev, e.options)
		if err == nil {
			e.path = path
			v.set(func(s *state) { s.device = path })
			return nil
		}
		if !errors.Is(err, frontend.ErrBusy) {
			return fmt.Errorf("attach device of volume %s: %w", cv.ID, err)
		}
		// An abort was broken off.
		if err := n.abort(ctx, v); err != nil {
			return err
		}
		if i, err = n.instance(ctx, c, v, cv); err != nil {
			return err
		}
	}
	e := &attached{dev: throttle.New(i.e), options: frontend.Options{
		BlockSize: cv.Parameters.BlockSize,
		// A filesystem attached read-only is mounted so; its device must be writable, for the replay of the journal.
		ReadOnly: cv.Attachment.ReadOnly && access == volume.AccessBlock,
	}}
	e.dev.SetLimits(cv.QoS)
	if e.path, err = n.cfg.Frontend.Attach(ctx, string(v.id), e.dev, e.options); err != nil {
		n.endInstance(v)
		return fmt.Errorf("attach device of volume %s: %w", cv.ID, busy(err))
	}
	v.eng = e
	v.set(func(s *state) { s.device = e.path })
	n.log.Info("volume attached", "volume", v.id, "device", e.path, "epoch", i.epoch)
	return nil
}

// busy gives a frontend's error the sentinel of the outer layers. That a device is not there says nothing of its volume.
func busy(err error) error {
	switch {
	case errors.Is(err, frontend.ErrBusy):
		return fmt.Errorf("%w: %w", err, volume.ErrBusy)
	case errors.Is(err, volume.ErrNotFound):
		return fmt.Errorf("%w: %w", err, volume.ErrUnavailable)
	}
	return err
}

// readOnlyDevice makes the second device, and returns its name and path.
func (n *Node) readOnlyDevice(ctx context.Context, v *vol) (name, path string, err error) {
	name = readOnlyName(v.id)
	path, err = n.cfg.Frontend.Attach(ctx, name, v.eng.dev, frontend.Options{BlockSize: v.eng.options.BlockSize, ReadOnly: true})
	if err != nil {
		return "", "", fmt.Errorf("attach read-only device of volume %s: %w", v.id, busy(err))
	}
	v.eng.readOnlyPath = path
	return name, path, nil
}

func (n *Node) dropReadOnlyDevice(ctx context.Context, v *vol) error {
	if v.eng == nil || v.eng.readOnlyPath == "" {
		return nil
	}
	if err := n.cfg.Frontend.Detach(ctx, readOnlyName(v.id)); err != nil {
		return fmt.Errorf("detach read-only device of volume %s; end the processes that have it open and try again: %w", v.id, busy(err))
	}
	v.eng.readOnlyPath = ""
	return nil
}

// detach unmounts the volume's filesystem and ends its device once all that was written has reached the replica. It
// returns volume.ErrBusy, and the device stays, while a process uses it.
func (n *Node) detach(ctx context.Context, v *vol) error {
	if v.eng == nil {
		return nil
	}
	if err := n.unmountAnchor(v); err != nil {
		return err
	}
	if err := n.dropReadOnlyDevice(ctx, v); err != nil {
		return err
	}
	err := n.cfg.Frontend.Detach(ctx, string(v.id))
	if errors.Is(err, frontend.ErrBusy) {
		return fmt.Errorf("detach device of volume %s; end the processes that have it open or mounted and try again: %w", v.id, busy(err))
	}
	if err != nil && ctx.Err() == nil {
		// The kernel tells once of writes that had failed before.
		err = n.cfg.Frontend.Detach(ctx, string(v.id))
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("detach device of volume %s: it is still being written out: %w: %w", v.id, err, volume.ErrBusy)
	}
	if err != nil {
		// The replica refuses writes, whose workload was told so. A device that stays would help nobody.
		n.log.Error("device does not take what was written to it; it is given up", "volume", v.id, "err", err)
		return n.abort(ctx, v)
	}
	return n.closeEngine(v)
}

// abort makes all I/O of the volume's devices fail for good. When it returns nil nothing more reaches the replica.
func (n *Node) abort(ctx context.Context, v *vol) error {
	if v.eng == nil {
		return nil
	}
	if err := n.abortDevices(ctx, v.id); err != nil {
		return err
	}
	at := n.anchor(v.id)
	if err := errors.Join(mount.Drop(at), mount.Remove(at)); err != nil {
		n.log.Warn("anchor of a dead filesystem stays", "volume", v.id, "err", err)
	}
	return n.closeEngine(v)
}

func (n *Node) abortDevices(ctx context.Context, id volume.ID) error {
	if err := errors.Join(n.cfg.Frontend.Abort(ctx, string(id)), n.cfg.Frontend.Abort(ctx, readOnlyName(id))); err != nil {
		return fmt.Errorf("abort devices of volume %s: %w", id, err)
	}
	return nil
}

// clean frees what dead devices held, after a dead mount went away.
func (n *Node) clean(ctx context.Context) {
	if err := n.cfg.Frontend.Clean(ctx); err != nil && !errors.Is(err, frontend.ErrBusy) {
		n.log.Warn("something is left of dead devices", "err", err)
	}
}

// closeEngine ends the engine of a device that is gone.
func (n *Node) closeEngine(v *vol) error {
	n.endVolumeExport(v.id)
	v.eng = nil
	v.set(func(s *state) { *s = state{inst: s.inst, failed: s.failed, notRestored: s.notRestored, dead: s.dead} })
	n.endInstance(v)
	n.clean(n.ctx)
	return nil
}

// setFilesystem records what is known of a volume's filesystem; volume.ErrInUse: the volume was taken from this node meanwhile.
func setFilesystem(ctx context.Context, c Cluster, id volume.ID, fs volume.Filesystem) error {
	err := c.SetFilesystem(ctx, id, fs)
	if errors.Is(err, volume.ErrDenied) {
		return fmt.Errorf("%v: %w", err, volume.ErrInUse)
	}
	return err
}

// filesystemID is the UUID of a volume's own filesystem. It follows from the volume's id, so that a clone's can be
// told from its source's without a record.
func filesystemID(id volume.ID) uuid.UUID {
	return uuid.NewSHA1(uuid.NameSpaceURL, []byte("ballast:"+string(id)))
}

// mountAnchor brings the volume's filesystem up at its anchor: formatted if it never was, checked, of its own identity,
// and as large as the device.
func (n *Node) mountAnchor(ctx context.Context, c Cluster, v *vol, cv volume.Volume, capability volume.Capability) error {
	at := n.anchor(v.id)
	e, mounted, err := mount.At(at)
	if err != nil {
		return err
	}
	if mounted && e.Source == v.eng.path {
		if want := capability.FSType; want != "" && want != e.Type {
			return fmt.Errorf("volume %s carries %s, %s was asked for; ask for what it carries: %w", v.id, e.Type, want, volume.ErrInUse)
		}
		return nil
	}
	if mounted {
		if err := mount.Drop(at); err != nil {
			return err
		}
	}
	flags, err := mount.ParseFlags(capability.MountFlags)
	if err != nil {
		return err
	}
	m, device := n.cfg.Mounter, v.eng.path
	readOnly := cv.Attachment.ReadOnly
	found, err := m.Probe(device)
	if err != nil {
		return err
	}
	want := capability.FSType
	if want == "" && cv.Filesystem.Phase != volume.Formatted {
		want = cv.Parameters.FSType
	}
	if cv.Filesystem.Phase == volume.Blank && found.Type == "" && found.Blank {
		// Both ends read as zeros; something may have been written between them, also to what this was cloned from.
		written, err := n.written(ctx, v)
		if err != nil {
			return fmt.Errorf("volume %s: nothing is known of its contents: %w", v.id, err)
		}
		found.Blank = !written
	}
	plan, err := mount.Decide(cv.Filesystem, want, found, readOnly)
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.id, err)
	}
	if plan.Format {
		if err := n.format(ctx, c, v, plan.Type); err != nil {
			return err
		}
	} else {
		if cv.Filesystem.Phase != volume.Formatted {
			// Its user made it through the raw device.
			if err := setFilesystem(ctx, c, v.id, volume.Filesystem{Phase: volume.Formatted, Type: plan.Type}); err != nil {
				return err
			}
		}
		if err := m.Check(device, plan.Type); err != nil {
			return fmt.Errorf("volume %s: %w", v.id, err)
		}
		if cv.Source != nil {
			if err := m.Identify(device, found, filesystemID(v.id), at); err != nil {
				return fmt.Errorf("volume %s: %w", v.id, err)
			}
		}
	}
	fs := mount.Filesystem{Device: device, Type: plan.Type, Flags: flags, ReadOnly: readOnly}
	if err := m.Mount(at, fs); err != nil {
		return fmt.Errorf("volume %s: %w", v.id, err)
	}
	if found.CanGrow() && !readOnly {
		if err := n.growBeforeUse(at, fs); err != nil {
			return errors.Join(fmt.Errorf("volume %s: %w", v.id, err), mount.Unmount(at))
		}
	}
	v.set(func(s *state) { s.anchor, s.readOnly, s.notGrown = at, readOnly, "" })
	return nil
}

// written tells whether any block of an attached volume has data. Without a replica here all of it is read.
func (n *Node) written(ctx context.Context, v *vol) (bool, error) {
	if i := v.inst; i.pool != nil && i.inSync(i.local.ID) {
		return i.pool.Written(ctx, i.local.ID)
	}
	size := v.inst.e.Size()
	found := errors.New("found")
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for off := int64(0); off < size && ctx.Err() == nil; off += replication.MaxData {
		group.Go(func() error {
			p := make([]byte, min(replication.MaxData, size-off))
			if err := v.inst.e.ReadAt(ctx, p, off); err != nil {
				return err
			}
			if len(bytes.TrimLeft(p, "\x00")) > 0 {
				return found
			}
			return nil
		})
	}
	err := group.Wait()
	if errors.Is(err, found) {
		return true, nil
	}
	return false, err
}

// format makes the volume's first filesystem. The intent is durable before mkfs, the success before anybody may write:
// from then on nothing formats the volume again.
func (n *Node) format(ctx context.Context, c Cluster, v *vol, fsType string) error {
	// mkfs is not cut off when the caller gives up, nor is the record of its success.
	ctx = context.WithoutCancel(ctx)
	if err := setFilesystem(ctx, c, v.id, volume.Filesystem{Phase: volume.Formatting, Type: fsType}); err != nil {
		return err
	}
	n.log.Info("formatting", "volume", v.id, "device", v.eng.path, "filesystem", fsType)
	if err := n.cfg.Mounter.Format(v.eng.path, fsType, filesystemID(v.id)); err != nil {
		return fmt.Errorf("volume %s: %w", v.id, err)
	}
	return setFilesystem(ctx, c, v.id, volume.Filesystem{Phase: volume.Formatted, Type: fsType})
}

// growBeforeUse grows a filesystem that only the anchor mounts yet.
func (n *Node) growBeforeUse(at string, fs mount.Filesystem) error {
	m := n.cfg.Mounter
	err := m.Grow(fs.Device, fs.Type, at)
	if !errors.Is(err, mount.ErrMounted) {
		return err
	}
	if err := mount.Unmount(at); err != nil {
		return err
	}
	if err := m.GrowUnmounted(fs.Device); err != nil {
		return err
	}
	return m.Mount(at, fs)
}

func (n *Node) unmountAnchor(v *vol) error {
	at := n.anchor(v.id)
	if err := mount.Unmount(at); err != nil {
		return fmt.Errorf("volume %s: %w", v.id, err)
	}
	v.set(func(s *state) { s.anchor = "" })
	return mount.Remove(at)
}
