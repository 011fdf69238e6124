package meta

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/command"
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
	if v.read(snapshots+string(c.ID)) != nil {
		return nil, fmt.Errorf("snapshot id %s is taken: %w", c.ID, volume.ErrBusy)
	}
	vol, err := findReady(v, c.Volume)
	if err != nil {
		return nil, err
	}
	if vol.Target != 0 {
		return nil, fmt.Errorf("volume %s is being expanded; try again: %w", vol.ID, volume.ErrBusy)
	}
	if err := reserve(v, vol.Tenant, volume.Amounts{Snapshots: 1}); err != nil {
		return nil, err
	}
	rec := volume.Snapshot{
		ID: c.ID, Name: c.Name, Volume: vol.ID, Tenant: vol.Tenant, State: volume.Creating, Size: vol.Size, Freeze: c.Freeze,
		Filesystem: vol.Filesystem, BlockSize: vol.Parameters.BlockSize, DataLocality: vol.Parameters.DataLocality,
		CreatedAt: c.Now, Holders: vol.Replicas,
	}
	v.put(snapshotNames+rec.Name, []byte(rec.ID))
	v.put(snapshotsOf+string(rec.Volume)+"/"+string(rec.ID), []byte{1})
	putSnapshot(v, rec)
	return command.Snapshot{Snapshot: rec, Created: true}, nil
}

func finishSnapshot(v *view, c command.FinishSnapshot) (command.Result, error) {
	rec, err := findSnapshot(v, c.Snapshot)
	if err != nil {
		return nil, err
	}
	if rec.State == volume.Ready {
		return command.Snapshot{Snapshot: rec}, nil
	}
	vol, ok := load[volume.Volume](v, volumes+string(rec.Volume))
	if ok && (vol.Size != rec.Size || vol.Target != 0 || vol.Filesystem != rec.Filesystem) {
		return nil, fmt.Errorf("volume %s grew or was formatted while snapshot %s was cut; try again: %w", vol.ID, rec.ID, volume.ErrBusy)
	}
	rec.State = volume.Ready
	putSnapshot(v, rec)
	return command.Snapshot{Snapshot: rec}, nil
}

func beginDeleteSnapshot(v *view, c command.BeginDeleteSnapshot) (command.Result, error) {
	rec, ok := load[volume.Snapshot](v, snapshots+string(c.Snapshot))
	if !ok {
		return nil, fmt.Errorf("snapshot %s does not exist: %w", c.Snapshot, volume.ErrNotFound)
	}
	if rec.State == volume.Deleting {
		return command.Snapshot{Snapshot: rec}, nil
	}
	if n, _ := load[int](v, pins+string(rec.ID)); n > 0 {
		return nil, fmt.Errorf("snapshot %s is being restored; delete it when the volume is made: %w", rec.ID, volume.ErrInUse)
	}
	release(v, rec.Tenant, volume.Amounts{Snapshots: 1})
	rec.State = volume.Deleting
	v.del(snapshotNames + rec.Name)
	putSnapshot(v, rec)
	return command.Snapshot{Snapshot: rec}, nil
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
	return command.Done{}, nil
}
