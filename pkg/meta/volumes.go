package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// find returns a volume that is not being deleted. One that is Kept is none, but for its engine (findServed).
func find(v *view, id volume.ID) (volume.Volume, error) {
	rec, err := findServed(v, id)
	if err == nil && rec.Kept != "" {
		err = notFound(id)
	}
	return rec, err
}

// findServed returns what may have an engine: a volume that is not being deleted, or one that is Kept.
func findServed(v *view, id volume.ID) (volume.Volume, error) {
	rec, ok := load[volume.Volume](v, volumes+string(id))
	if !ok || rec.State == volume.Deleting {
		return rec, notFound(id)
	}
	return rec, nil
}

func notFound(id volume.ID) error {
	return fmt.Errorf("volume %s does not exist: %w", id, volume.ErrNotFound)
}

func findReady(v *view, id volume.ID) (volume.Volume, error) {
	rec, err := find(v, id)
	return rec, usable(rec, err)
}

// usable returns err, or why a volume that was found cannot be used.
func usable(rec volume.Volume, err error) error {
	id := rec.ID
	if err == nil && rec.State != volume.Ready {
		return fmt.Errorf("volume %s is still being created; try again: %w", id, volume.ErrBusy)
	}
	if err == nil && rec.Lost {
		return fmt.Errorf("volume %s is lost: every copy was on pools that were forgotten; delete it, or restore a snapshot of it as another: %w", id, volume.ErrDataLoss)
	}
	return err
}

func createVolume(v *view, c command.CreateVolume) (command.Result, error) {
	rec := c.Volume
	if id := v.read(volumeNames + rec.Name); id != nil {
		old, ok := load[volume.Volume](v, volumes+string(id))
		if !ok {
			return nil, fmt.Errorf("name %q points to volume %s, which has no record: %w", rec.Name, id, volume.ErrDataLoss)
		}
		return command.Volume{Volume: old}, nil
	}
	if v.read(volumes+string(rec.ID)) != nil || v.read(remains+string(rec.ID)) != nil {
		return nil, fmt.Errorf("volume id %s is taken: %w", rec.ID, volume.ErrBusy)
	}
	if rec.Source != nil {
		if err := takeSource(v, &rec); err != nil {
			return nil, err
		}
	}
	for i, r := range rec.Replicas {
		if v.read(replicas+string(r.ID)) != nil {
			return nil, fmt.Errorf("replica id %s is taken: %w", r.ID, volume.ErrBusy)
		}
		v.put(replicas+string(r.ID), []byte(rec.ID))
		if p, ok := load[volume.Pool](v, pools+string(r.Pool)); ok {
			rec.Replicas[i].Node = p.Node
		}
	}
	if err := reserve(v, rec.Tenant, volume.Amounts{LogicalBytes: rec.Size, Volumes: 1}); err != nil {
		return nil, err
	}
	if err := provision(v, rec.Replicas, rec.Size); err != nil {
		return nil, err
	}
	rec.Protocol = volume.Protocol{Epoch: 1, ConfigVersion: 1, Lineage: 1, Revision: 1, Clean: true}
	v.put(volumeNames+rec.Name, []byte(rec.ID))
	putVolume(v, rec)
	return command.Volume{Volume: rec, Created: true}, nil
}

// takeSource checks the source of a new volume, copies from it what must be the same and pins it.
func takeSource(v *view, rec *volume.Volume) error {
	var size int64
	var holders []volume.Replica
	source := sourceID(*rec)
	if id := rec.Source.Snapshot; id != "" {
		s, ok := load[volume.Snapshot](v, snapshots+string(id))
		if !ok || s.State != volume.Ready {
			return fmt.Errorf("source snapshot %s does not exist or is not ready: %w", id, volume.ErrNotFound)
		}
		size, holders, rec.Filesystem, rec.Parameters.BlockSize = s.Size, s.Holders, s.Filesystem, s.BlockSize
	} else {
		s, ok := load[volume.Volume](v, volumes+string(rec.Source.Volume))
		if !ok || s.State != volume.Ready || s.Kept != "" {
			return fmt.Errorf("source volume %s does not exist or is not ready: %w", rec.Source.Volume, volume.ErrNotFound)
		}
		if s.Lost {
			return fmt.Errorf("source volume %s is lost: %w", s.ID, volume.ErrDataLoss)
		}
		if s.Target != 0 {
			return fmt.Errorf("source volume %s is being expanded; try again: %w", s.ID, volume.ErrBusy)
		}
		size, holders, rec.Filesystem, rec.Parameters.BlockSize = s.Size, s.InSync(), s.Filesystem, s.Parameters.BlockSize
	}
	if rec.Size < size {
		return fmt.Errorf("size %d is below that of the source, %d: %w", rec.Size, size, volume.ErrOutOfRange)
	}
	for _, r := range rec.InSync() { // the others are filled from these
		if !slices.ContainsFunc(holders, func(h volume.Replica) bool { return h.Pool == r.Pool }) {
			return fmt.Errorf("pool %s does not hold source %s: %w", r.Pool, source, volume.ErrNoSpace)
		}
	}
	pin(v, source, 1)
	return nil
}

func sourceID(rec volume.Volume) string {
	if rec.Source.Snapshot != "" {
		return string(rec.Source.Snapshot)
	}
	return string(rec.Source.Volume)
}

func finishCreate(v *view, c command.FinishCreate) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if rec.State == volume.Ready {
		return command.Volume{Volume: rec}, nil
	}
	if rec.Source != nil {
		if rec.Source.Volume != "" {
			// The copy was cut after the command was applied: what is recorded of its filesystem must still describe it.
			s, ok := load[volume.Volume](v, volumes+string(rec.Source.Volume))
			if ok && s.Filesystem != rec.Filesystem {
				return nil, fmt.Errorf("the filesystem of source volume %s was made while it was copied: %w", s.ID, volume.ErrBusy)
			}
		}
		pin(v, sourceID(rec), -1)
	}
	rec.State = volume.Ready
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func beginDelete(v *view, c command.BeginDelete) (command.Result, error) {
	rec, ok := load[volume.Volume](v, volumes+string(c.Volume))
	if !ok {
		return nil, fmt.Errorf("volume %s does not exist: %w", c.Volume, volume.ErrNotFound)
	}
	if rec.State == volume.Deleting || c.Unfinished && rec.State == volume.Ready {
		return command.Volume{Volume: rec}, nil
	}
	a := rec.Attachment
	if a != nil && !(a.Detaching && a.Epoch == c.Gone) {
		return nil, fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", rec.ID, a.Node, volume.ErrInUse)
	}
	if n, _ := load[int](v, pins+string(rec.ID)); n > 0 {
		return nil, fmt.Errorf("volume %s is being cloned; delete it when the clone is made: %w", rec.ID, volume.ErrInUse)
	}
	if a != nil {
		count(v, attached+string(a.Node), -1)
		rec.Attachment = nil
	}
	if rec.State == volume.Creating && rec.Source != nil {
		pin(v, sourceID(rec), -1)
	}
	if rec.Lost { // there is nothing to fence
		rec.State = volume.Deleting
	} else {
		var err error
		if rec, err = command.Change(rec, replication.Change{Tombstone: &replication.Tombstone{}}); err != nil {
			return nil, err
		}
	}
	if rec.Kept == "" {
		release(v, rec.Tenant, volume.Amounts{LogicalBytes: reserved(rec), Volumes: 1})
		v.del(volumeNames + rec.Name)
		keep(v, rec)
	}
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func finishDelete(v *view, c command.FinishDelete) (command.Result, error) {
	rec, ok := load[volume.Volume](v, volumes+string(c.Volume))
	if !ok || c.Epoch != 0 && c.Epoch != rec.Epoch {
		return command.Done{}, nil
	}
	if rec.State != volume.Deleting {
		return nil, fmt.Errorf("volume %s has no tombstone: %w", rec.ID, volume.ErrInUse)
	}
	for _, r := range slices.Concat(rec.Replicas, rec.Leaving) {
		v.del(replicas + string(r.ID))
		unprovision(v, []volume.Replica{r}, reserved(rec))
	}
	release(v, rec.Tenant, volume.Amounts{PhysicalBytes: rec.PhysicalBytes})
	v.del(volumes + string(rec.ID))
	countOn(v, rec)
	settle(v, "v/"+string(rec.ID), false)
	return command.Done{}, nil
}

func attach(v *view, c command.Attach) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if v.read(nodes+string(c.Node)) == nil {
		return nil, fmt.Errorf("node %s does not exist: %w", c.Node, volume.ErrNotFound)
	}
	if a := rec.Attachment; a != nil {
		switch {
		case a.Node != c.Node:
			return nil, fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", rec.ID, a.Node, volume.ErrInUse)
		case a.Detaching:
			return nil, fmt.Errorf("volume %s is being detached from node %s; try again: %w", rec.ID, a.Node, volume.ErrBusy)
		case a.ReadOnly != c.ReadOnly || !a.Capability.Equal(c.Capability):
			return nil, fmt.Errorf("volume %s is attached to node %s with another capability or readonly flag; detach it first: %w", rec.ID, a.Node, volume.ErrExists)
		}
		return command.Volume{Volume: rec}, nil
	}
	if rec.Parameters.DataLocality == volume.LocalityRequired && !slices.ContainsFunc(rec.Replicas, func(r volume.Replica) bool { return place(v, r).Node == c.Node }) {
		return nil, fmt.Errorf("volume %s has no replica on node %s and its data locality is required: %w", rec.ID, c.Node, volume.ErrInUse)
	}
	if n, _ := load[int](v, attached+string(c.Node)); n >= volume.MaxAttached {
		return nil, fmt.Errorf("node %s has %d volumes attached, more it does not take; detach one of them first: %w", c.Node, n, volume.ErrNoSpace)
	}
	// An engine that looked after the volume meanwhile is fenced by the one that comes.
	rec, err = command.Change(rec, replication.Change{Attach: &replication.Attach{Node: c.Node, Force: true, Assign: true}})
	if err != nil {
		return nil, err
	}
	count(v, attached+string(c.Node), 1)
	rec.Attachment = &volume.Attachment{Node: c.Node, ReadOnly: c.ReadOnly, Capability: c.Capability, Since: c.Now, Epoch: rec.Epoch}
	putVolume(v, rec)
	return command.Volume{Volume: rec, Created: true}, nil
}

// place is the replica with the node that its pool is on now.
func place(v *view, r volume.Replica) volume.Replica {
	if p, ok := load[volume.Pool](v, pools+string(r.Pool)); ok {
		r.Node = p.Node
	}
	return r
}

func beginDetach(v *view, c command.BeginDetach) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if a := rec.Attachment; a != nil && a.Epoch == c.Epoch && !a.Detaching {
		a.Detaching = true
		putVolume(v, rec)
	}
	return command.Volume{Volume: rec}, nil
}

func forceDetach(v *view, c command.ForceDetach) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if a := rec.Attachment; a == nil || a.Epoch != c.Epoch || rec.Owner == "" {
		return command.Volume{Volume: rec}, nil
	} else if !a.Detaching {
		return nil, fmt.Errorf("volume %s is attached to node %s and not being detached: %w", rec.ID, a.Node, volume.ErrInUse)
	}
	rec, err = command.Change(rec, replication.Change{Detach: &replication.Detach{Silent: c.Silent}})
	if err != nil {
		return nil, err
	}
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func finishDetach(v *view, c command.FinishDetach) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	a := rec.Attachment
	if a == nil || a.Epoch != c.Epoch {
		return command.Volume{Volume: rec}, nil
	}
	if !a.Detaching {
		return nil, fmt.Errorf("volume %s is attached to node %s and not being detached: %w", rec.ID, a.Node, volume.ErrInUse)
	}
	if rec.Owner != "" { // else it was forced out
		rec, err = command.Change(rec, replication.Change{Detach: &replication.Detach{Clean: c.Clean}})
		if err != nil {
			return nil, err
		}
	}
	count(v, attached+string(a.Node), -1)
	rec.Attachment = nil
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}

func beginExpand(v *view, c command.BeginExpand) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if more := c.Target - reserved(rec); c.Target > rec.Size && more > 0 {
		if err := reserve(v, rec.Tenant, volume.Amounts{LogicalBytes: more}); err != nil {
			return nil, err
		}
		if err := provision(v, rec.Replicas, more); err != nil {
			return nil, err
		}
		for _, r := range rec.Leaving { // what is placed there until it is freed; nothing grows there
			occupy(v, r.Pool, more)
		}
		fresh := rec.Target == 0
		rec, err = command.Change(rec, replication.Change{ExpandIntent: &replication.ExpandIntent{Target: c.Target}})
		if err != nil {
			return nil, err
		}
		putVolume(v, rec)
		return command.Volume{Volume: rec, Created: fresh}, nil
	}
	return command.Volume{Volume: rec}, nil
}

func finishExpand(v *view, c command.FinishExpand) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if c.Size > reserved(rec) {
		return nil, fmt.Errorf("volume %s: size %d was not reserved, %d is: %w", rec.ID, c.Size, reserved(rec), volume.ErrInvalid)
	}
	if c.Size > rec.Size {
		if c.ConfigVersion != rec.ConfigVersion {
			return nil, fmt.Errorf("volume %s: other replicas are in sync than those that were expanded; try again: %w", rec.ID, volume.ErrBusy)
		}
		rec.Size = c.Size
		rec.Revision++
		if rec.Target <= rec.Size {
			rec.Target = 0
		}
		putVolume(v, rec)
	}
	return command.Volume{Volume: rec}, nil
}

func abortExpand(v *view, c command.AbortExpand) (command.Result, error) {
	rec, err := find(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if rec.Target == c.Target && rec.Target > rec.Size {
		less := rec.Target - rec.Size
		release(v, rec.Tenant, volume.Amounts{LogicalBytes: less})
		unprovision(v, slices.Concat(rec.Replicas, rec.Leaving), less)
		rec.Target = 0
		rec.Revision++
		putVolume(v, rec)
	}
	return command.Volume{Volume: rec}, nil
}

func modifyVolume(v *view, c command.ModifyVolume) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	old := rec
	set(&rec.QoS.IOPS, c.IOPS)
	set(&rec.QoS.Bandwidth, c.Bandwidth)
	set(&rec.Parameters.Replicas, c.Replicas)
	set(&rec.Parameters.DataLocality, c.DataLocality)
	p := rec.Parameters
	set(&p.MinInSync, c.MinInSync)
	if err := command.CheckParameters(p); err != nil {
		return nil, fmt.Errorf("volume %s: %w", rec.ID, err)
	}
	if a := rec.Attachment; a != nil && p.DataLocality == volume.LocalityRequired && old.Parameters.DataLocality != p.DataLocality &&
		!slices.ContainsFunc(rec.Replicas, func(r volume.Replica) bool { return place(v, r).Node == a.Node }) {
		return nil, fmt.Errorf("volume %s is attached to node %s, which has no replica of it: data locality cannot become required now: %w",
			rec.ID, a.Node, volume.ErrInvalid)
	}
	if p.MinInSync != rec.Parameters.MinInSync {
		rec, err = command.Change(rec, replication.Change{SetMinInSync: &replication.SetMinInSync{MinInSync: p.MinInSync}})
		if err != nil {
			return nil, err
		}
	}
	if rec.QoS != old.QoS || rec.Parameters != old.Parameters {
		putVolume(v, rec)
	}
	return command.Volume{Volume: rec}, nil
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

func setFilesystem(v *view, c command.SetFilesystem) (command.Result, error) {
	rec, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if a := rec.Attachment; c.Node != "" && (a == nil || a.Node != c.Node) {
		return nil, fmt.Errorf("volume %s is not attached to node %s: %w", rec.ID, c.Node, volume.ErrDenied)
	}
	now := rec.Filesystem
	if now == c.Filesystem {
		return command.Volume{Volume: rec}, nil
	}
	if now.Phase == volume.Formatted {
		return nil, fmt.Errorf("volume %s carries %s already: %w", rec.ID, now.Type, volume.ErrInUse)
	}
	rec.Filesystem = c.Filesystem
	putVolume(v, rec)
	return command.Volume{Volume: rec}, nil
}
