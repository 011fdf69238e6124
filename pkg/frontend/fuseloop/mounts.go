package fuseloop

import (
	"fmt"

	"github.com/moby/sys/mountinfo"
)

const (
	fsType   = "fuse.ballast"
	fsSource = "ballast"
)

func mountPoints() ([]*mountinfo.Info, error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return all, nil
}

// number is that of a mount's device, as sysfs writes it.
func number(m *mountinfo.Info) string { return fmt.Sprintf("%d:%d", m.Major, m.Minor) }

// connection is the number in fusectl of a FUSE mount.
func connection(m *mountinfo.Info) uint32 { return uint32(m.Minor) }
