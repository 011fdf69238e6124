package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// maxRestores bounds how many volumes are brought back at once: each replays a journal.
	maxRestores   = 4
	restorePause  = time.Second
	restorePauses = 30 * time.Second
	// restoreLimit bounds one attempt's wait for the volume's lock and for the controllers.
	restoreLimit = time.Minute
)

// thawLeft ends a freeze that a crash left: its writers cannot even be killed before.
func (n *Node) thawLeft(v *vol) {
	if !v.rec.Frozen {
		return
	}
	for _, path := range append(v.rec.paths(), n.anchor(v.id)) {
		if _, mounted, err := mount.At(path); err != nil || !mounted {
			continue
		}
		if err := mount.Thaw(path); err != nil {
			n.log.Warn("thaw after a crash", "volume", v.id, "path", path, "err", err)
		}
	}
	rec := v.rec.clone()
	rec.Frozen = false
	if err := n.save(v, rec); err != nil {
		n.log.Warn("record of a freeze stays", "volume", v.id, "err", err)
	}
}

// restoreAll brings back every recorded volume, and tries again what fails.
func (n *Node) restoreAll(c Cluster) {
	slots := make(chan struct{}, maxRestores)
	var first, rest sync.WaitGroup
	for _, v := range n.all() {
		first.Add(1)
		rest.Go(func() {
			pause := restorePause
			for try := 0; ; try++ {
				slots <- struct{}{}
				err := n.restore(c, v.id)
				<-slots
				if try == 0 {
					first.Done()
				}
				if err == nil {
					return
				}
				if n.ctx.Err() != nil {
					return
				}
				n.log.Warn("volume is not brought back yet", "volume", v.id, "err", err)
				v.set(func(s *state) { s.notRestored = err.Error() })
				select {
				case <-time.After(pause):
				case <-n.ctx.Done():
					return
				}
				pause = min(2*pause, restorePauses)
			}
		})
	}
	first.Wait()
	close(n.recovered)
	rest.Wait()
}

// restore makes the paths of a volume live again where it is still attached to this node, and otherwise marks them as
// dead. Nil is that there is nothing more to do.
func (n *Node) restore(c Cluster, id volume.ID) error {
	ctx, cancel := context.WithTimeout(n.ctx, restoreLimit)
	defer cancel()
	v, err := n.acquire(ctx, id, false)
	if err != nil || v == nil {
		return err
	}
	defer n.release(v)
	if err := n.prune(v); err != nil || !v.rec.live() {
		return err
	}
	cv, err := used(ctx, c, id)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	if err != nil || n.attachedHere(cv) != nil {
		n.log.Info("volume was detached while the node was away", "volume", id)
		return n.bury(v)
	}
	for _, s := range v.rec.Stages {
		if s.Dead {
			continue
		}
		if err := n.attach(ctx, c, v, cv, s.Capability.Access); err != nil {
			return err
		}
		if err := n.bringUp(ctx, c, v, cv, s); err != nil {
			return err
		}
	}
	for _, t := range v.rec.Targets {
		if s := v.rec.stage(t.Staging); !t.Dead && s != nil {
			if err := n.show(ctx, c, v, cv, *s, t); err != nil {
				return err
			}
		}
	}
	n.clean(ctx)
	v.set(func(s *state) { s.notRestored = "" })
	n.log.Info("volume brought back", "volume", id, "stagings", len(v.rec.Stages), "targets", len(v.rec.Targets))
	return nil
}

// prune forgets the paths that do not exist any more: their workload was removed, or they were recorded and never made.
// Staging paths that a target needs are made again.
func (n *Node) prune(v *vol) error {
	gone := func(path string) bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	}
	rec := v.rec.clone()
	rec.Targets = slices.DeleteFunc(rec.Targets, func(t target) bool { return gone(t.Path) })
	rec.Stages = slices.DeleteFunc(rec.Stages, func(s stage) bool {
		needed := slices.ContainsFunc(rec.Targets, func(t target) bool { return !t.Dead && t.Staging == s.Path })
		return !needed && gone(s.Path)
	})
	if len(rec.Targets) == len(v.rec.Targets) && len(rec.Stages) == len(v.rec.Stages) {
		return nil
	}
	return n.save(v, rec)
}

// bury records that the volume's device is gone for good. Published paths keep their dead mounts until they are
// unpublished, so that no workload writes beneath them; a volume that is only staged is cleaned up.
func (n *Node) bury(v *vol) error {
	rec := v.rec.clone()
	if rec.published() {
		for i := range rec.Stages {
			rec.Stages[i].Dead = true
		}
		for i := range rec.Targets {
			rec.Targets[i].Dead = true
		}
		return n.save(v, rec)
	}
	for _, s := range v.rec.Stages {
		if err := mount.Drop(s.Path); err != nil {
			return err
		}
		if s.Created {
			if err := mount.Remove(s.Path); err != nil {
				n.log.Warn("staging directory stays", "path", s.Path, "err", err)
			}
		}
		rec.forgetStage(s.Path)
	}
	n.clean(n.ctx)
	return n.save(v, rec)
}
