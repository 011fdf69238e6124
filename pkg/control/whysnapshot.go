package control

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// WhySnapshot says in one paragraph how a snapshot is: which of its copies can be read, whether another is being made, and the safe
// next step. It finds snapshots that are being deleted too.
func (s *Service) WhySnapshot(ctx context.Context, id volume.SnapshotID) (string, error) {
	x, err := s.store.Snapshot(ctx, id)
	if err != nil {
		return "", err
	}
	p := &paragraph{}
	switch x.State {
	case volume.Creating:
		p.says("Snapshot %s is being cut: its volume's writes are held for a second at most, and it becomes ready when every replica in sync has sealed it", x.Name)
		p.says("if the engine ends or the replicas in sync change meanwhile, it is given up and deleted by itself")
		p.means("Nothing needs to be done; the same request made again finishes it or begins anew")
	case volume.Deleting:
		p.says("Snapshot %s is being deleted", x.Name)
		p.means("Its space is freed in the background, on nodes that are away when they return; nothing needs to be done")
	default:
		err = s.whyCopies(ctx, p, x)
	}
	return p.String(), errors.Join(err, ctx.Err())
}

// whyCopies tells of the copies of a snapshot that is ready.
func (s *Service) whyCopies(ctx context.Context, p *paragraph, x volume.Snapshot) error {
	v, err := s.store.Volume(ctx, x.Volume)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	o, err := s.observer(ctx)
	if err != nil {
		return err
	}
	remains, err := s.store.Remains(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(remains, func(k volume.Remains) bool { return k.Volume == x.Volume })
	source := "its volume is deleted, which does not affect it"
	switch {
	case v.State == volume.Ready && v.Lost:
		source = fmt.Sprintf("its volume %s is lost", v.Name)
	case v.State == volume.Ready && v.Kept == "":
		source = fmt.Sprintf("its volume %s still exists", v.Name)
	}
	held := plural(len(x.Holders), "pool")
	if i >= 0 && len(x.Holders) != remains[i].Replicas {
		held += fmt.Sprintf(" where %d are wanted", remains[i].Replicas)
	}
	p.says("Snapshot %s is ready: %s, held by %s; %s", x.Name, bytesText(x.Size), held, source)
	sound, damaged, away := 0, 0, ""
	for _, h := range x.Holders {
		why, safe := s.unreachable(h, o.nodes)
		switch {
		case why != "":
			p.says("its copy in pool %s cannot be reached: %s", h.Pool, why)
			away = safe
		case h.Damaged:
			p.says("a scrub has found damage in its copy in pool %s on node %s", h.Pool, h.Node)
			damaged++
		default:
			sound++
		}
	}
	for _, h := range x.Leaving {
		p.says("its copy in pool %s on node %s is none any more, and is freed when the pool can free it", h.Pool, h.Node)
	}
	what, next := differing(x)
	if what != "" {
		p.says("%s", what)
		p.does("%s", next)
	}
	switch {
	case len(x.Holders) == 0:
		p.means("Its bytes are lost: every copy was on pools that were forgotten")
		p.does("delete it")
		return nil
	case sound > 0 && what != "":
		p.means("A volume that is made from it gets one of them")
	case sound > 0:
		p.means("Volumes can be made from it")
	case damaged > 0 && away == "":
		p.means("No copy is sound: reads of what is damaged fail, and it is not copied")
		p.does("make a volume from it and save what can be read, or delete it")
		return nil
	default:
		p.means("No sound copy can be reached, so it can neither be read nor copied; it comes back with the node or the disk that has one, and nothing is to be deleted")
		p.does("%s", away)
		return nil
	}
	switch {
	case i >= 0:
		s.whyCopied(ctx, p, x, v, remains[i], sound, o)
	case v.Lost:
		p.means("No other copy is made while the volume is there, which has no replica left to bring it along")
		if what == "" {
			p.does("delete the volume, its snapshots stay and are copied from then on")
		}
	case damaged > 0 || away != "":
		p.means("The replicas of its volume bring it along to other pools")
	}
	return nil
}

// whyCopied tells what becomes of the copies of a snapshot whose volume is deleted. It can be read, in sound pools.
func (s *Service) whyCopied(ctx context.Context, p *paragraph, x volume.Snapshot, v volume.Volume, k volume.Remains, sound int, o *observer) {
	running := v.Kept != "" && v.State == volume.Ready
	switch {
	case running && v.Kept == x.ID:
		text := fmt.Sprintf("it is being copied from node %s to pool %s on node %s", v.Replicas[0].Node, v.Replicas[1].Pool, v.Replicas[1].Node)
		if e := o.look(ctx, []volume.Volume{v})[0].engine(); e != nil && len(e.Resyncs) > 0 {
			text += progressOf(e.Resyncs[0])
		}
		p.says("%s", text)
	case sound >= k.Replicas:
	case running:
		p.says("it is copied to another pool once snapshot %s of the same volume is", v.Kept)
	default:
		p.says("another copy is made by itself: at once of one that is damaged or on a node that is being emptied, and of one that is away when it has been for longer than replicas are given to return")
		p.does("see that another node has room for %s in a pool that holds neither a later nor a damaged snapshot of the same volume (`ballastctl pool list`)", bytesText(k.Size))
	}
}
