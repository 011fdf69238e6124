package command

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// MaxCopies bounds the copies of a snapshot that one command names.
const MaxCopies = 64

// Check implements Command.
func (c NoteDifference) Check() error {
	if err := volume.CheckName("snapshot id", string(c.Snapshot)); err != nil {
		return err
	}
	d := c.Differs
	if d == nil {
		return nil
	}
	if d.Offset < 0 || d.Offset > volume.MaxSize {
		return fmt.Errorf("offset %d in snapshot %s: %w", d.Offset, c.Snapshot, volume.ErrOutOfRange)
	}
	seen := map[volume.PoolID]bool{}
	named := 0
	for _, pools := range d.Alike {
		for _, p := range pools {
			if err := volume.CheckName("pool id", string(p)); err != nil {
				return err
			}
			seen[p] = true
			named++
		}
		if len(pools) == 0 {
			return fmt.Errorf("nobody has one of the copies of snapshot %s: %w", c.Snapshot, volume.ErrInvalid)
		}
	}
	if len(d.Alike) < 2 || named > MaxCopies || len(seen) != named {
		return fmt.Errorf("snapshot %s has %d different copies on %d pools: %w", c.Snapshot, len(d.Alike), named, volume.ErrInvalid)
	}
	return nil
}
