package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// change applies a change of the replication protocol to a volume that is ready.
func change(v *view, id volume.ID, c replication.Change) (command.Result, error) {
	rec, err := findServed(v, id)
	if err = usable(rec, err); err != nil {
		return nil, err
	}
	if rec, err = command.Change(rec, c); err != nil {
		return nil, err
	}
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func commit(v *view, c command.Commit) (command.Result, error) {
	rec, err := findServed(v, c.Volume)
	if err = usable(rec, err); err != nil {
		return nil, err
	}
	if c.Change.Attach != nil {
		if a := rec.Attachment; rec.Owner != c.Change.Attach.Node || a != nil && a.Detaching {
			return nil, fmt.Errorf("volume %s is not for node %s to open: %w", rec.ID, c.Change.Attach.Node, replication.ErrAttached)
		}
	}
	// Who was the owner asks in an older epoch, and is told of the newer one rather.
	r, err := change(v, c.Volume, c.Change)
	if err == nil {
		err = isOwner(rec, c.Node)
	}
	return r, err
}

// isOwner returns volume.ErrDenied where a node speaks for the engine of a volume that it does not run.
func isOwner(rec volume.Volume, node volume.NodeID) error {
	if node != "" && node != rec.Owner {
		return fmt.Errorf("node %s does not run the engine of volume %s, node %q does: %w", node, rec.ID, rec.Owner, volume.ErrDenied)
	}
	return nil
}

func openEngine(v *view, c command.OpenEngine) (command.Result, error) {
	rec, err := findServed(v, c.Volume)
	if err = usable(rec, err); err != nil {
		return nil, err
	}
	if v.read(nodes+string(c.Node)) == nil {
		return nil, fmt.Errorf("node %s does not exist: %w", c.Node, volume.ErrNotFound)
	}
	if a := rec.Attachment; a != nil {
		return nil, fmt.Errorf("volume %s is attached to node %s: %w", rec.ID, a.Node, volume.ErrInUse)
	}
	return change(v, c.Volume, replication.Change{Attach: &replication.Attach{Node: c.Node, Assign: true}})
}

func closeEngine(v *view, c command.CloseEngine) (command.Result, error) {
	rec, err := findServed(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if rec.Attachment != nil || rec.Owner == "" || rec.Epoch != c.Epoch {
		return command.Volume{Volume: rec}, nil
	}
	return change(v, c.Volume, replication.Change{Detach: &replication.Detach{Epoch: c.Epoch, Clean: c.Clean}})
}

func addReplica(v *view, c command.AddReplica) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(rec.Replicas, func(r volume.Replica) bool { return r.ID == c.Replica.ID }) {
		return command.Volume{Volume: rec}, nil
	}
	if v.read(replicas+string(c.Replica.ID)) != nil {
		return nil, fmt.Errorf("replica id %s is taken: %w", c.Replica.ID, volume.ErrBusy)
	}
	c.Replica = place(v, c.Replica)
	for _, r := range slices.Concat(rec.Replicas, rec.Leaving) {
		if r = place(v, r); r.Node == c.Replica.Node || r.Pool == c.Replica.Pool {
			return nil, fmt.Errorf("volume %s has replica %s on node %s already: %w", rec.ID, r.ID, r.Node, volume.ErrBusy)
		}
	}
	if err := freed(v, rec.ID, c.Replica); err != nil {
		return nil, err
	}
	if err := provision(v, []volume.Replica{c.Replica}, reserved(rec)); err != nil {
		return nil, err
	}
	v.put(replicas+string(c.Replica.ID), []byte(rec.ID))
	m := command.Member(c.Replica)
	return change(v, c.Volume, replication.Change{AddReplica: &m})
}

func dropReplica(v *view, c command.DropReplica) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(rec.Replicas, func(r volume.Replica) bool { return r.ID == c.Replica }) {
		return command.Volume{Volume: rec}, nil
	}
	return change(v, c.Volume, replication.Change{DropReplica: &replication.DropReplica{ID: c.Replica}})
}

func freeReplica(v *view, c command.FreeReplica) (command.Result, error) {
	rec, ok := load[volume.Volume](v, volumes+string(c.Volume))
	if !ok {
		return command.Done{}, nil
	}
	from := &rec.Leaving
	is := func(r volume.Replica) bool { return r.ID == c.Replica }
	if rec.State == volume.Deleting && !slices.ContainsFunc(rec.Leaving, is) {
		from = &rec.Replicas
	}
	i := slices.IndexFunc(*from, is)
	if i < 0 {
		if slices.ContainsFunc(rec.Replicas, is) {
			return nil, fmt.Errorf("replica %s is one of volume %s: %w", c.Replica, rec.ID, volume.ErrInUse)
		}
		return command.Done{}, nil
	}
	free(v, &rec, from, i)
	putVolume(v, rec)
	return command.Done{}, nil
}

// free forgets a replica of rec, the one at i of from, which is one of rec's lists.
func free(v *view, rec *volume.Volume, from *[]volume.Replica, i int) {
	r := (*from)[i]
	*from = slices.Delete(slices.Clone(*from), i, i+1)
	v.del(replicas + string(r.ID))
	unprovision(v, []volume.Replica{r}, reserved(*rec))
	measure(v, rec.Tenant, r.PhysicalBytes, 0)
	rec.PhysicalBytes = max(0, rec.PhysicalBytes-r.PhysicalBytes)
}

func loseReplica(v *view, c command.LoseReplica) (command.Result, error) {
	rec, ok := load[volume.Volume](v, volumes+string(c.Volume))
	if !ok {
		return nil, fmt.Errorf("volume %s does not exist: %w", c.Volume, volume.ErrNotFound)
	}
	is := func(r volume.Replica) bool { return r.ID == c.Replica }
	if i := slices.IndexFunc(rec.Leaving, is); i >= 0 {
		free(v, &rec, &rec.Leaving, i)
		putVolume(v, rec)
		return command.Volume{Volume: rec}, nil
	}
	i := slices.IndexFunc(rec.Replicas, is)
	switch {
	case i < 0:
		return command.Volume{Volume: rec}, nil
	case rec.State == volume.Creating:
		return nil, fmt.Errorf("volume %s is being made; delete it: %w", rec.ID, volume.ErrBusy)
	case rec.State == volume.Ready && rec.Kept != "":
		return nil, fmt.Errorf("replica %s serves to copy snapshot %s; end that first: %w", c.Replica, rec.Kept, volume.ErrBusy)
	case rec.State == volume.Deleting:
		free(v, &rec, &rec.Replicas, i)
	case len(rec.Replicas) == 1:
		if rec.Attachment != nil || rec.Owner != "" {
			return nil, fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", rec.ID, rec.Owner, volume.ErrInUse)
		}
		if n, _ := load[int](v, pins+string(rec.ID)); n > 0 {
			return nil, fmt.Errorf("volume %s is being cloned: %w", rec.ID, volume.ErrBusy)
		}
		rec.Lost = true
		rec.Epoch++
		rec.Revision++
		free(v, &rec, &rec.Replicas, i)
	default:
		var err error
		rec, err = command.Change(rec, replication.Change{DropReplica: &replication.DropReplica{ID: c.Replica}})
		if err != nil {
			return nil, err
		}
		free(v, &rec, &rec.Leaving, slices.IndexFunc(rec.Leaving, is))
	}
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func forgetLostPool(v *view, c command.ForgetPool) (command.Result, error) {
	p, ok := load[volume.Pool](v, pools+string(c.Pool))
	if !ok {
		return command.Done{}, nil
	}
	if p.Provisioned > 0 {
		return nil, fmt.Errorf("%d bytes are still placed in pool %s: %w", p.Provisioned, p.ID, volume.ErrBusy)
	}
	forgetPool(v, p)
	return command.Done{}, nil
}

func salvage(v *view, c command.Salvage) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if a := rec.Attachment; a != nil {
		return nil, fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", rec.ID, a.Node, volume.ErrInUse)
	}
	if rec.Epoch != c.Epoch {
		return nil, fmt.Errorf("volume %s was attached, or an engine of it opened, since its replicas were looked at; look again: %w", rec.ID, volume.ErrBusy)
	}
	return change(v, c.Volume, replication.Change{Salvage: &replication.Salvage{ID: c.Replica, Seen: c.Seen, SeenEpoch: c.SeenEpoch}})
}
