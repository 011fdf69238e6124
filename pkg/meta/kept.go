package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// keep records what is to be known of a volume that is being deleted while it has snapshots.
func keep(v *view, rec volume.Volume) {
	if !v.some(snapshotsOf + string(rec.ID) + "/") {
		return
	}
	save(v, remains+string(rec.ID), volume.Remains{
		Volume: rec.ID, Size: reserved(rec), Replicas: rec.Parameters.Replicas, Pool: rec.Parameters.Pool, Accessible: rec.Accessible,
		Protocol: counts(rec.Protocol),
	})
}

// counts is what of the protocol's state goes on under the same id: who was fenced stays so, and what is older is known as such.
func counts(p volume.Protocol) volume.Protocol {
	return volume.Protocol{Epoch: p.Epoch, ConfigVersion: p.ConfigVersion, Lineage: p.Lineage, Revision: p.Revision, Barriers: p.Barriers}
}

// countOn notes where the counts of a volume that is forgotten have got to, if something of it is kept.
func countOn(v *view, rec volume.Volume) {
	if k, ok := load[volume.Remains](v, remains+string(rec.ID)); ok {
		k.Protocol = counts(rec.Protocol)
		save(v, remains+string(rec.ID), k)
	}
}

// dropRemains forgets what was kept for the snapshots of a volume, the last of which is gone.
func dropRemains(v *view, id volume.ID) {
	if v.read(remains+string(id)) != nil && !v.some(snapshotsOf+string(id)+"/") {
		v.del(remains + string(id))
	}
}

func copySnapshot(v *view, c command.CopySnapshot) (command.Result, error) {
	x, err := findSnapshot(v, c.Snapshot)
	if err != nil {
		return nil, err
	}
	old, there := load[volume.Volume](v, volumes+string(x.Volume))
	busy := func(format string, a ...any) (command.Result, error) {
		return nil, fmt.Errorf("snapshot %s: %s: %w", x.ID, fmt.Sprintf(format, a...), volume.ErrBusy)
	}
	k, ok := load[volume.Remains](v, remains+string(x.Volume))
	switch {
	case !ok:
		return busy("its volume %s is not deleted; a replica of that brings it along", x.Volume)
	case there && old.Kept == x.ID && old.State == volume.Ready && old.Replicas[0].ID == c.From.ID && old.Replicas[1].ID == c.To.ID:
		return command.Volume{Volume: old}, nil
	case there && old.State != volume.Deleting:
		return busy("snapshot %s of the same volume is being copied", old.Kept)
	case x.State != volume.Ready || x.Hidden:
		return busy("it is not one that is there to stay")
	}
	from, to := place(v, c.From), place(v, c.To)
	holds := func(p volume.PoolID) func(volume.Replica) bool {
		return func(h volume.Replica) bool { return h.Pool == p && !h.Damaged }
	}
	switch {
	case !slices.ContainsFunc(x.Holders, holds(from.Pool)):
		return nil, fmt.Errorf("pool %s has no sound copy of snapshot %s: %w", from.Pool, x.ID, volume.ErrInvalid)
	case slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return place(v, h).Node == to.Node }):
		return nil, fmt.Errorf("node %s holds snapshot %s already: %w", to.Node, x.ID, volume.ErrInvalid)
	}
	for _, r := range []volume.Replica{from, to} {
		if err := freed(v, x.Volume, r); err != nil {
			return nil, err
		}
	}
	left := slices.Concat(old.Replicas, old.Leaving)
	if len(left) > replication.MaxMembers {
		return busy("%d replicas of the volume are still to be freed; bring their nodes back, or forget their pools", len(left))
	}
	for _, r := range left {
		if r = place(v, r); r.Node == from.Node || r.Node == to.Node {
			return busy("replica %s of the volume is still to be freed on node %s", r.ID, r.Node)
		}
	}
	for _, r := range []volume.Replica{from, to} {
		if v.read(replicas+string(r.ID)) != nil {
			return busy("replica id %s is taken", r.ID)
		}
		v.put(replicas+string(r.ID), []byte(x.Volume))
	}
	if err := provision(v, []volume.Replica{to}, k.Size); err != nil {
		return nil, err
	}
	occupy(v, from.Pool, k.Size) // nothing is written there: a pool without room does as well
	p := k.Protocol
	if there {
		p = counts(old.Protocol)
	}
	p.Epoch, p.ConfigVersion, p.Revision, p.Clean = p.Epoch+1, p.ConfigVersion+1, p.Revision+1, true
	rec := volume.Volume{
		ID: x.Volume, Kept: x.ID, Tenant: x.Tenant, State: volume.Ready, Size: k.Size, CreatedAt: c.Now,
		Parameters: volume.Parameters{Replicas: 2, MinInSync: 1, DataLocality: volume.LocalityNone, BlockSize: x.BlockSize},
		Replicas:   []volume.Replica{from, to}, Leaving: left, PhysicalBytes: old.PhysicalBytes, Protocol: p,
	}
	putVolume(v, rec)
	return command.Volume{Volume: rec, Created: true}, nil
}
