package meta

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func inPool(id volume.PoolID) func(volume.Replica) bool {
	return func(r volume.Replica) bool { return r.Pool == id }
}

// someSnapshot tells whether is holds for any snapshot under a prefix of keys that end in the ids of snapshots.
func someSnapshot(v *view, prefix string, is func(volume.Snapshot) bool) (found bool) {
	err := v.keys(prefix, func(key string) bool {
		x, ok := load[volume.Snapshot](v, snapshots+strings.TrimPrefix(key, prefix))
		found = ok && is(x)
		return !found
	})
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("look for snapshots under %q: %w", prefix, err)
	}
	return found
}

// freed returns volume.ErrBusy where a replica's node has yet to free a copy of one of a volume's snapshots: a replica that came to
// that pool would meet it, or what it fills in be freed instead, and of another pool the node's reports would be taken for it. No copy
// leaves a pool with a replica either, so AddHolder finds none that leaves.
func freed(v *view, id volume.ID, r volume.Replica) error {
	node := place(v, r).Node
	here := func(h volume.Replica) bool { return place(v, h).Node == node }
	if someSnapshot(v, snapshotsOf+string(id)+"/", func(x volume.Snapshot) bool { return slices.ContainsFunc(x.Leaving, here) }) {
		return fmt.Errorf("node %s has yet to free a copy of a snapshot of volume %s: %w", node, id, volume.ErrBusy)
	}
	return nil
}

func addHolder(v *view, c command.AddHolder) (command.Result, error) {
	rec, err := findSnapshot(v, c.Snapshot)
	if err != nil {
		return nil, err
	}
	vol, ok := load[volume.Volume](v, volumes+string(rec.Volume))
	i := slices.IndexFunc(vol.Replicas, func(r volume.Replica) bool { return r.ID == c.Replica })
	if !ok || i < 0 || rec.State != volume.Ready || vol.State == volume.Deleting {
		return nil, fmt.Errorf("snapshot %s is not ready, or %s is no replica of its volume: %w", rec.ID, c.Replica, volume.ErrNotFound)
	}
	if err := isOwner(vol, c.Node); err != nil {
		return nil, err
	}
	if vol.Kept != "" && i == 0 { // it was made of what is there; what its pool lets go of meanwhile does not come back so
		return command.Snapshot{Snapshot: rec}, nil
	}
	r := vol.Replicas[i]
	if !slices.ContainsFunc(rec.Holders, inPool(r.Pool)) {
		rec.Holders = append(slices.Clone(rec.Holders), volume.Replica{ID: r.ID, Node: r.Node, Pool: r.Pool})
		putSnapshot(v, rec)
	}
	return command.Snapshot{Snapshot: rec}, nil
}

func dropHolder(v *view, c command.DropHolder) (command.Result, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(c.Snapshot))
	if !ok {
		return nil, fmt.Errorf("snapshot %s does not exist: %w", c.Snapshot, volume.ErrNotFound)
	}
	i := slices.IndexFunc(rec.Holders, inPool(c.Pool))
	if i < 0 {
		return command.Snapshot{Snapshot: rec}, nil
	}
	others := slices.Delete(slices.Clone(rec.Holders), i, i+1)
	if rec.State != volume.Deleting && !c.Lost { // whoever asks may have looked at the records long ago
		sound := func(h volume.Replica) bool { return !h.Damaged }
		vol, _ := load[volume.Volume](v, volumes+string(rec.Volume))
		switch {
		case !slices.ContainsFunc(others, sound):
			return nil, fmt.Errorf("no other pool than %s has a sound copy of snapshot %s: %w", c.Pool, rec.ID, volume.ErrInUse)
		case rec.CopiesDiffer() != nil:
			return nil, fmt.Errorf("the copies of snapshot %s differ, and that in pool %s may be the right one: %w", rec.ID, c.Pool, volume.ErrInUse)
		case slices.ContainsFunc(slices.Concat(vol.Replicas, vol.Leaving), inPool(c.Pool)):
			return nil, fmt.Errorf("pool %s has a replica of volume %s, which would fill snapshot %s in again: %w", c.Pool, rec.Volume, rec.ID, volume.ErrBusy)
		}
	}
	if rec.State == volume.Creating {
		return nil, fmt.Errorf("snapshot %s is being cut: %w", rec.ID, volume.ErrBusy)
	}
	h := rec.Holders[i]
	if rec.Holders = others; c.Lost {
		unmeasure(v, &rec, h)
	} else {
		rec.Leaving = append(slices.Clone(rec.Leaving), h)
	}
	putSnapshot(v, rec)
	return command.Snapshot{Snapshot: rec}, nil
}

func freeHolder(v *view, c command.FreeHolder) (command.Result, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(c.Snapshot))
	if i := slices.IndexFunc(rec.Leaving, inPool(c.Pool)); ok && i >= 0 {
		h := rec.Leaving[i]
		rec.Leaving = slices.Delete(slices.Clone(rec.Leaving), i, i+1)
		unmeasure(v, &rec, h)
		putSnapshot(v, rec)
	}
	return command.Done{}, nil
}

// unmeasure takes what a copy of a snapshot occupied from what is used.
func unmeasure(v *view, rec *volume.Snapshot, h volume.Replica) {
	measure(v, rec.Tenant, h.PhysicalBytes, 0)
	rec.PhysicalBytes = max(0, rec.PhysicalBytes-h.PhysicalBytes)
}
