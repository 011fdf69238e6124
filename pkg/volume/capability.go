package volume

import "slices"

// Access is how the workload sees a volume.
type Access string

// The two kinds of access.
const (
	AccessMount Access = "mount"
	AccessBlock Access = "block"
)

// Mode is who may use a volume at once; the names and meanings are those of the CSI specification, VolumeCapability.
type Mode string

// Access modes.
const (
	SingleNodeWriter       Mode = "SINGLE_NODE_WRITER"
	SingleNodeReaderOnly   Mode = "SINGLE_NODE_READER_ONLY"
	SingleNodeSingleWriter Mode = "SINGLE_NODE_SINGLE_WRITER"
	SingleNodeMultiWriter  Mode = "SINGLE_NODE_MULTI_WRITER"
	MultiNodeReaderOnly    Mode = "MULTI_NODE_READER_ONLY"
	MultiNodeSingleWriter  Mode = "MULTI_NODE_SINGLE_WRITER"
	MultiNodeMultiWriter   Mode = "MULTI_NODE_MULTI_WRITER"
)

// Capability is one way in which a volume is to be used.
type Capability struct {
	Access Access `json:"access"`
	Mode   Mode   `json:"mode"`
	// FSType is "", "ext4", "xfs" or "btrfs"; always "" for block access.
	FSType string `json:"fsType,omitempty"`
	// MountFlags are passed to mount(8); they may be sensitive and are not logged.
	MountFlags []string `json:"mountFlags,omitempty"`
}

// Equal tells whether two capabilities are the same, flags in order included.
func (c Capability) Equal(o Capability) bool {
	return c.Access == o.Access && c.Mode == o.Mode && c.FSType == o.FSType && slices.Equal(c.MountFlags, o.MountFlags)
}
