package mount

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// DefaultType is the filesystem of a volume for which none was asked.
const DefaultType = "ext4"

// Types are the filesystems that Ballast makes.
var Types = []string{"ext4", "xfs", "btrfs"}

// Plan is what is to be done with a device before it is mounted.
type Plan struct {
	// Type to mount.
	Type string
	// Format is whether mkfs must, and may, be run first.
	Format bool
}

// Decide returns what to do with a device on which a filesystem of type want ("" is any) is to be mounted, from the
// volume's durable record and from what was proved to be on the device. It allows mkfs only where the record says that
// no filesystem was ever completed and nothing else is there; whatever is in doubt is an error that names the way out.
func Decide(rec volume.Filesystem, want string, found Found, readOnly bool) (Plan, error) {
	if want != "" && !slices.Contains(Types, want) {
		return Plan{}, fmt.Errorf("filesystem %q is not supported: %w", want, volume.ErrInvalid)
	}
	if rec.Phase == volume.Formatted {
		want = orElse(want, rec.Type)
		switch {
		case found.Type == "":
			return Plan{}, fmt.Errorf("the volume had a %s filesystem and none is recognised now; it is not formatted again; "+
				"restore a snapshot, or attach it as a raw block device and repair it: %w", rec.Type, volume.ErrDataLoss)
		case found.Type == "damaged "+rec.Type:
			return Plan{}, fmt.Errorf("the volume's %s superblock is damaged; attach it as a raw block device and repair it, "+
				"or restore a snapshot: %w", rec.Type, volume.ErrDataLoss)
		}
		return existing(want, found)
	}
	if rec.Phase == volume.Formatting {
		// mkfs was cut off. Formatted is committed before the first mount, so nobody has stored anything yet.
		half := []string{"", rec.Type, "damaged " + rec.Type}
		if !slices.Contains(half, found.Type) {
			return existing(want, found)
		}
	} else if found.Type != "" {
		return existing(want, found)
	} else if !found.Blank {
		return Plan{}, fmt.Errorf("the volume carries data that is not a filesystem, and is not formatted over it; use it as a raw "+
			"block device, or discard all of it (blkdiscard) to have it formatted: %w", volume.ErrInUse)
	}
	want = orElse(want, orElse(rec.Type, DefaultType))
	if readOnly {
		return Plan{}, fmt.Errorf("the volume has no filesystem and is attached read-only; attach it for writing once: %w", volume.ErrInUse)
	}
	if least := minSize(want); found.DeviceSize < least {
		return Plan{}, fmt.Errorf("the volume has %d bytes and %s needs at least %d; make a larger one or use ext4: %w",
			found.DeviceSize, want, least, volume.ErrInUse)
	}
	return Plan{Type: want, Format: true}, nil
}

func existing(want string, found Found) (Plan, error) {
	switch {
	case !slices.Contains(Types, found.Type):
		return Plan{}, fmt.Errorf("the volume carries %s, which cannot be mounted; use it as a raw block device: %w", found.Type, volume.ErrInUse)
	case want != "" && want != found.Type:
		return Plan{}, fmt.Errorf("the volume carries %s, %s was asked for; ask for what it carries: %w", found.Type, want, volume.ErrInUse)
	}
	return Plan{Type: found.Type}, nil
}

func orElse(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

// minSize is the smallest device on which mkfs makes a filesystem, in bytes: mkfs.xfs refuses less than 300 MiB,
// mkfs.btrfs less than about 109 MiB with its defaults.
func minSize(fsType string) int64 {
	switch fsType {
	case "xfs":
		return 300 << 20
	case "btrfs":
		return 114 << 20
	}
	return volume.MinSize
}
