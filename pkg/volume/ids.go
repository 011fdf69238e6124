package volume

import (
	"fmt"
	"unicode/utf8"
)

// Ids are opaque strings that Ballast chose. A caller's id that no record has is "not found", never malformed.
type (
	// ID names a volume, "vol-" and 20 hex digits.
	ID string
	// SnapshotID names a snapshot, "snap-" and 20 hex digits.
	SnapshotID string
	// GroupID names a group snapshot, "group-" and 20 hex digits.
	GroupID string
	// ReplicaID names one copy of a volume on one pool.
	ReplicaID string
	// NodeID is the CSI node_id and the value of TopologyKey.
	NodeID string
	// PoolID names a pool; it is unique in the cluster.
	PoolID string
	// Epoch counts the attaches of a volume. Replicas refuse I/O of a lower one.
	Epoch uint64
	// ConfigVersion counts the changes of a volume's in-sync set.
	ConfigVersion uint64
)

const (
	// DriverName is the CSI plugin name.
	DriverName = "csi.ballast.dev"
	// TopologyKey is the only topology segment of a volume: the node it is on.
	TopologyKey = DriverName + "/node"
)

// Bounds of what a caller may send. The CSI specification (size limits) bounds strings to 128 bytes, node ids to 256.
const (
	// MaxNameLen bounds names and ids, in bytes.
	MaxNameLen = 128
	// MaxNodeIDLen bounds node ids, in bytes.
	MaxNodeIDLen = 256
	// MinSize is the smallest volume, in bytes.
	MinSize int64 = 1 << 20
	// MaxSize is the largest volume, in bytes: 64 TiB.
	MaxSize int64 = 64 << 40
	// SizeQuantum is what every volume's size is a multiple of, in bytes.
	SizeQuantum int64 = 4096
	// DefaultSize is the size of a volume for which none was asked, in bytes.
	DefaultSize int64 = 10 << 30
	// MaxReplicas bounds the copies of a volume.
	MaxReplicas = 5
	// MaxGroup bounds the members of a group snapshot: all of them wait for the slowest to be cut.
	MaxGroup = 32
	// MaxAttached bounds the volumes attached to one node: each has a kernel device, a FUSE file and buffers there.
	MaxAttached = 256
)

// CheckName returns ErrInvalid where a name from outside is empty, longer than MaxNameLen, not UTF-8 or has a character
// that the CSI specification bans (CreateVolumeRequest.name): control characters other than tab, line feed and carriage
// return. What names the thing in the message.
func CheckName(what, name string) error {
	if name == "" {
		return fmt.Errorf("%s is missing: %w", what, ErrInvalid)
	}
	if len(name) > MaxNameLen {
		return fmt.Errorf("%s has %d bytes, the limit is %d: %w", what, len(name), MaxNameLen, ErrInvalid)
	}
	if !utf8.ValidString(name) {
		return fmt.Errorf("%s is not UTF-8: %w", what, ErrInvalid)
	}
	for _, r := range name {
		if r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f {
			return fmt.Errorf("%s has the control character %U: %w", what, r, ErrInvalid)
		}
	}
	return nil
}
