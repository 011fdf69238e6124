package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func noteDifference(v *view, c command.NoteDifference) (command.Result, error) {
	rec, err := findSnapshot(v, c.Snapshot)
	if err != nil {
		return nil, err
	}
	if rec.State != volume.Ready {
		return nil, fmt.Errorf("snapshot %s is being cut: %w", rec.ID, volume.ErrBusy)
	}
	if c.Differs != nil {
		for _, p := range slices.Concat(c.Differs.Alike...) {
			if !slices.ContainsFunc(rec.Holders, func(h volume.Replica) bool { return h.Pool == p }) {
				return nil, fmt.Errorf("pool %s does not hold snapshot %s any more: %w", p, rec.ID, volume.ErrBusy)
			}
		}
	}
	rec.Differs = c.Differs
	putSnapshot(v, rec)
	return command.Snapshot{Snapshot: rec}, nil
}
