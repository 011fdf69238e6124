package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func findSnapshot(v *view, id volume.SnapshotID) (volume.Snapshot, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(id))
	if !ok || rec.State == volume.Deleting {
		return rec, fmt.Errorf("snapshot %s does not exist: %w", id, volume.ErrNotFound)
	}
	return rec, nil
}

func beginSnapshot(v *view, c command.BeginSnapshot) (command.Result, error) {
	if id := v.read(snapshotNames + c.Name); id != nil {
		old, ok := load[volume.Snapshot](v, snapshots+string(id))
		if !ok {
			return nil, fmt.Errorf("name %q points to snapshot %s, which has no record: %w", c.Name, id, volume.ErrDataLoss)
		}
		return command.Snapshot{Snapshot: old}, nil
	}
	rec, err := announce(v, volume.Snapshot{ID: c.ID, Name: c.Name, Volume: c.Volume, Freeze: c.Freeze, Hidden: c.Hidden, CreatedAt: c.Now})
	if err != nil {
		return nil, err
	}
	v.put(snapshotNames+rec.Name, []byte(rec.ID))
	return command.Snapshot{Snapshot: rec, Created: true}, nil
}

// announce records a snapshot that is to be cut.
func announce(v *view, rec volume.Snapshot) (volume.Snapshot, error) {
	if v.read(snapshots+string(rec.ID)) != nil {
		return rec, fmt.Errorf("snapshot id %s is taken: %w", rec.ID, volume.ErrBusy)
	}
	vol, err := findReady(v, rec.Volume)
	if err != nil {
		return rec, err
	}
	if vol.Target != 0 {
		return rec, fmt.Errorf("volume %s is being expanded; try again: %w", vol.ID, volume.ErrBusy)
	}
	if !rec.Hidden {
		if err := reserve(v, vol.Tenant, volume.Amounts{Snapshots: 1}); err != nil {
			return rec, err
		}
	}
	rec.Cut = &volume.Barrier{Snapshot: rec.ID, Epoch: vol.Epoch, ConfigVersion: vol.ConfigVersion}
	if vol.Owner != "" {
		if vol, err = command.Change(vol, replication.Change{Prepare: &replication.Prepare{Snapshot: rec.ID}}); err != nil {
			return rec, err
		}
		*rec.Cut = *vol.Barrier
		putVolume(v, vol)
	} else if n := len(vol.InSync()); n > 1 {
		return rec, fmt.Errorf("volume %s has %d replicas in sync and no engine that cuts them together: %w", vol.ID, n, volume.ErrBusy)
	}
	rec.Tenant, rec.State, rec.Size = vol.Tenant, volume.Creating, vol.Size
	rec.Filesystem, rec.BlockSize, rec.DataLocality = vol.Filesystem, vol.Parameters.BlockSize, vol.Parameters.DataLocality
	for _, r := range vol.InSync() {
		rec.Holders = append(rec.Holders, volume.Replica{ID: r.ID, Node: r.Node, Pool: r.Pool})
	}
	v.put(snapshotsOf+string(rec.Volume)+"/"+string(rec.ID), []byte{1})
	putSnapshot(v, rec)
	return rec, nil
}

func finishSnapshot(v *view, c command.FinishSnapshot) (command.Result, error) {
	rec, err := findSnapshot(v, c.Snapshot)
	if err != nil {
		return nil, err
	}
	if rec.Group != "" {
		return nil, fmt.Errorf("snapshot %s is a member of group %s: %w", rec.ID, rec.Group, volume.ErrInvalid)
	}
	if rec.State != volume.Ready {
		if rec, err = finishCut(v, rec, c.Cut); err != nil {
			return nil, err
		}
	}
	return command.Snapshot{Snapshot: rec}, nil
}

// finishCut makes a snapshot Ready that has been cut.
func finishCut(v *view, rec volume.Snapshot, c command.Cut) (volume.Snapshot, error) {
	again := func(why string) (volume.Snapshot, error) {
		return rec, fmt.Errorf("volume %s %s while snapshot %s was cut; try again: %w", rec.Volume, why, rec.ID, volume.ErrBusy)
	}
	vol, ok := load[volume.Volume](v, volumes+string(rec.Volume))
	switch cut := rec.Cut; {
	case !ok || vol.State != volume.Ready || vol.Epoch != cut.Epoch:
		return again("was attached, detached or deleted")
	case vol.Size != rec.Size || vol.Target != 0 || vol.Filesystem != rec.Filesystem:
		return again("grew or was formatted")
	case c.Number != cut.Number || c.ConfigVersion != cut.ConfigVersion:
		return again("got another barrier")
	case cut.Number == 0 && vol.ConfigVersion != cut.ConfigVersion:
		return again("got other replicas")
	}
	if rec.Cut.Number != 0 {
		done := replication.Complete{Number: c.Number, ConfigVersion: c.ConfigVersion, Holders: c.Holders}
		vol, err := command.Change(vol, replication.Change{Complete: &done})
		if err != nil {
			return again(fmt.Sprintf("refused the barrier (%v)", err))
		}
		putVolume(v, vol)
	}
	holders := rec.Holders
	rec.Holders = nil
	for _, h := range holders {
		if slices.Contains(c.Holders, h.ID) {
			rec.Holders = append(rec.Holders, h)
		}
	}
	if len(rec.Holders) != len(c.Holders) {
		return rec, fmt.Errorf("snapshot %s was cut by replicas that were not asked to: %w", rec.ID, volume.ErrInvalid)
	}
	rec.State, rec.Cut = volume.Ready, nil
	putSnapshot(v, rec)
	return rec, nil
}

// withdraw gives up the barrier of a snapshot that is not to be cut any more.
func withdraw(v *view, rec volume.Snapshot) error {
	vol, ok := load[volume.Volume](v, volumes+string(rec.Volume))
	if !ok || vol.Barrier == nil || vol.Barrier.Snapshot != rec.ID {
		return nil
	}
	vol, err := command.Change(vol, replication.Change{AbortBarrier: &replication.AbortBarrier{Number: vol.Barrier.Number}})
	if err == nil {
		putVolume(v, vol)
	}
	return err
}

func beginDeleteSnapshot(v *view, c command.BeginDeleteSnapshot) (command.Result, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(c.Snapshot))
	if !ok {
		return nil, fmt.Errorf("snapshot %s does not exist: %w", c.Snapshot, volume.ErrNotFound)
	}
	if rec.State == volume.Deleting || c.Unfinished && rec.State == volume.Ready {
		return command.Snapshot{Snapshot: rec}, nil
	}
	if rec.Group != "" {
		return nil, fmt.Errorf("snapshot %s is a member of group snapshot %s; delete that: %w", rec.ID, rec.Group, volume.ErrInvalid)
	}
	rec, err := bury(v, rec)
	if err != nil {
		return nil, err
	}
	v.del(snapshotNames + rec.Name)
	return command.Snapshot{Snapshot: rec}, nil
}

// bury gives a snapshot its tombstone.
func bury(v *view, rec volume.Snapshot) (volume.Snapshot, error) {
	if n, _ := load[int](v, pins+string(rec.ID)); n > 0 {
		return rec, fmt.Errorf("snapshot %s is being restored; delete it when the volume is made: %w", rec.ID, volume.ErrInUse)
	}
	if err := withdraw(v, rec); err != nil {
		return rec, err
	}
	if !rec.Hidden {
		release(v, rec.Tenant, volume.Amounts{Snapshots: 1})
	}
	rec.State = volume.Deleting
	putSnapshot(v, rec)
	return rec, nil
}

func finishDeleteSnapshot(v *view, c command.FinishDeleteSnapshot) (command.Result, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(c.Snapshot))
	if !ok {
		return command.Done{}, nil
	}
	if rec.State != volume.Deleting {
		return nil, fmt.Errorf("snapshot %s has no tombstone: %w", rec.ID, volume.ErrInUse)
	}
	release(v, rec.Tenant, volume.Amounts{PhysicalBytes: rec.PhysicalBytes})
	v.del(snapshots + string(rec.ID))
	v.del(snapshotsOf + string(rec.Volume) + "/" + string(rec.ID))
	settle(v, "s/"+string(rec.ID), false)
	dropRemains(v, rec.Volume)
	if rec.Group != "" {
		leaveGroup(v, rec)
	}
	if vol, ok := load[volume.Volume](v, volumes+string(rec.Volume)); ok && rec.Cut != nil {
		vol.GivenUp = append(slices.Clone(vol.GivenUp), *rec.Cut)
		vol.GivenUp = vol.GivenUp[max(0, len(vol.GivenUp)-volume.MaxGivenUp):]
		putVolume(v, vol)
	}
	return command.Done{}, nil
}
