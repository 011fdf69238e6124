package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func findGroup(v *view, id volume.GroupID) (volume.Group, error) {
	rec, ok := load[volume.Group](v, groups+string(id))
	if !ok || rec.State == volume.Deleting {
		return rec, fmt.Errorf("group snapshot %s does not exist: %w", id, volume.ErrNotFound)
	}
	return rec, nil
}

func members(v *view, rec volume.Group) (list []volume.Snapshot) {
	for _, id := range rec.Snapshots {
		if x, ok := load[volume.Snapshot](v, snapshots+string(id)); ok {
			list = append(list, x)
		}
	}
	return list
}

func beginGroup(v *view, c command.BeginGroup) (command.Result, error) {
	if id := v.read(groupNames + c.Name); id != nil {
		old, ok := load[volume.Group](v, groups+string(id))
		if !ok {
			return nil, fmt.Errorf("name %q points to group snapshot %s, which has no record: %w", c.Name, id, volume.ErrDataLoss)
		}
		return command.Group{Group: old, Snapshots: members(v, old)}, nil
	}
	if v.read(groups+string(c.ID)) != nil {
		return nil, fmt.Errorf("group id %s is taken: %w", c.ID, volume.ErrBusy)
	}
	rec := volume.Group{
		ID: c.ID, Name: c.Name, State: volume.Creating, Freeze: c.Freeze, Volumes: c.Volumes, Snapshots: c.IDs, CreatedAt: c.Now,
	}
	var list []volume.Snapshot
	for i, id := range c.Volumes {
		x, err := announce(v, volume.Snapshot{ID: c.IDs[i], Name: string(c.IDs[i]), Volume: id, Freeze: c.Freeze, CreatedAt: c.Now, Group: rec.ID})
		if err != nil {
			return nil, err
		}
		list = append(list, x)
	}
	v.put(groupNames+rec.Name, []byte(rec.ID))
	save(v, groups+string(rec.ID), rec)
	return command.Group{Group: rec, Snapshots: list, Created: true}, nil
}

func finishGroup(v *view, c command.FinishGroup) (command.Result, error) {
	rec, err := findGroup(v, c.Group)
	if err != nil {
		return nil, err
	}
	if rec.State == volume.Ready {
		return command.Group{Group: rec, Snapshots: members(v, rec)}, nil
	}
	var list []volume.Snapshot
	for _, x := range members(v, rec) {
		i := slices.IndexFunc(c.Cuts, func(cut command.Cut) bool { return cut.Snapshot == x.ID })
		if i < 0 {
			return nil, fmt.Errorf("snapshot %s of group %s was not cut: %w", x.ID, rec.ID, volume.ErrInvalid)
		}
		if x, err = finishCut(v, x, c.Cuts[i]); err != nil {
			return nil, err
		}
		list = append(list, x)
	}
	rec.State = volume.Ready
	save(v, groups+string(rec.ID), rec)
	return command.Group{Group: rec, Snapshots: list}, nil
}

func beginDeleteGroup(v *view, c command.BeginDeleteGroup) (command.Result, error) {
	rec, ok := load[volume.Group](v, groups+string(c.Group))
	if !ok {
		return nil, fmt.Errorf("group snapshot %s does not exist: %w", c.Group, volume.ErrNotFound)
	}
	list := members(v, rec)
	if rec.State == volume.Deleting || c.Unfinished && rec.State == volume.Ready {
		return command.Group{Group: rec, Snapshots: list}, nil
	}
	for i, x := range list {
		var err error
		if list[i], err = bury(v, x); err != nil {
			return nil, err
		}
	}
	rec.State = volume.Deleting
	v.del(groupNames + rec.Name)
	save(v, groups+string(rec.ID), rec)
	return command.Group{Group: rec, Snapshots: list}, nil
}

// leaveGroup forgets a group with the last of its snapshots.
func leaveGroup(v *view, x volume.Snapshot) {
	rec, ok := load[volume.Group](v, groups+string(x.Group))
	if !ok {
		return
	}
	rec.Snapshots = slices.DeleteFunc(slices.Clone(rec.Snapshots), func(id volume.SnapshotID) bool { return id == x.ID })
	if len(rec.Snapshots) == 0 {
		v.del(groups + string(rec.ID))
		return
	}
	save(v, groups+string(rec.ID), rec)
}
