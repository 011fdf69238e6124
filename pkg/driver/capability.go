package driver

import (
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// modes are the access modes that are supported, by kind of access. A filesystem is on one node at a time: two nodes
// that write need a raw device, whose users keep order among themselves.
var modes = map[csi.VolumeCapability_AccessMode_Mode]struct {
	mode         volume.Mode
	mount, block bool
}{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:        {volume.SingleNodeWriter, true, true},
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:   {volume.SingleNodeReaderOnly, true, true},
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER: {volume.SingleNodeSingleWriter, true, true},
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:  {volume.SingleNodeMultiWriter, true, true},
	csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:    {volume.MultiNodeReaderOnly, true, true},
	csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER:  {volume.MultiNodeSingleWriter, false, true},
	csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:   {volume.MultiNodeMultiWriter, false, true},
}

// checkFSType returns volume.ErrInvalid for a filesystem that cannot be made. "" leaves the choice to the driver.
func checkFSType(fs string) error {
	switch fs {
	case "", "ext4", "xfs", "btrfs":
		return nil
	}
	return fmt.Errorf("filesystem %q is not supported, use ext4, xfs or btrfs: %w", fs, volume.ErrInvalid)
}

// capability translates one volume_capability. It returns volume.ErrInvalid where it is missing or unsupported.
func capability(c *csi.VolumeCapability) (volume.Capability, error) {
	if c == nil {
		return volume.Capability{}, fmt.Errorf("volume_capability is missing: %w", volume.ErrInvalid)
	}
	if c.GetAccessMode() == nil {
		return volume.Capability{}, fmt.Errorf("volume_capability has no access_mode: %w", volume.ErrInvalid)
	}
	m, ok := modes[c.GetAccessMode().GetMode()]
	if !ok {
		return volume.Capability{}, fmt.Errorf("access mode %s is not supported: %w", c.GetAccessMode().GetMode(), volume.ErrInvalid)
	}
	switch a := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		return volume.Capability{Access: volume.AccessBlock, Mode: m.mode}, nil
	case *csi.VolumeCapability_Mount:
		if !m.mount {
			return volume.Capability{}, fmt.Errorf("access mode %s needs a raw block volume (volumeMode: Block): a filesystem has one writing node: %w",
				m.mode, volume.ErrInvalid)
		}
		if a.Mount.GetVolumeMountGroup() != "" {
			return volume.Capability{}, fmt.Errorf("volume_mount_group is not supported: ext4, xfs and btrfs keep each file's group: %w", volume.ErrInvalid)
		}
		if err := checkFSType(a.Mount.GetFsType()); err != nil {
			return volume.Capability{}, err
		}
		return volume.Capability{
			Access:     volume.AccessMount,
			Mode:       m.mode,
			FSType:     a.Mount.GetFsType(),
			MountFlags: a.Mount.GetMountFlags(),
		}, nil
	}
	return volume.Capability{}, fmt.Errorf("volume_capability has neither block nor mount: %w", volume.ErrInvalid)
}

// capabilities translates a required list of them.
func capabilities(in []*csi.VolumeCapability) ([]volume.Capability, error) {
	if len(in) == 0 {
		return nil, fmt.Errorf("volume_capabilities are missing: %w", volume.ErrInvalid)
	}
	if len(in) > maxCapabilities {
		return nil, fmt.Errorf("%d volume_capabilities, the limit is %d: %w", len(in), maxCapabilities, volume.ErrInvalid)
	}
	out := make([]volume.Capability, 0, len(in))
	for _, c := range in {
		v, err := capability(c)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}
