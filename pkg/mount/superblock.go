package mount

import (
	"bytes"
	"encoding/binary"

	"github.com/google/uuid"
)

// superblock is what the first MiB of a device says of a filesystem.
type superblock struct {
	fsType string
	uuid   uuid.UUID
	// size is the filesystem's, in bytes.
	size int64
	// dirty is a btrfs whose log must be replayed before its UUID may change.
	dirty bool
	// slack is by how much a filesystem may be smaller than its device without there being anything to gain.
	slack int64
}

// parseSuperblock reads the superblocks of the filesystems that Ballast makes. head is the first MiB of the device.
//
// Offsets: ext4 fs/ext4/ext4.h struct ext4_super_block at byte 1024; XFS fs/xfs/libxfs/xfs_format.h struct xfs_dsb at 0;
// btrfs include/uapi/linux/btrfs_tree.h struct btrfs_super_block at 64 KiB.
func parseSuperblock(head []byte) (superblock, bool) {
	if len(head) < 1<<20 {
		return superblock{}, false
	}
	le, be := binary.LittleEndian, binary.BigEndian
	if ext := head[1024:2048]; le.Uint16(ext[0x38:]) == 0xef53 {
		shift := le.Uint32(ext[0x18:])
		if shift > 6 {
			return superblock{}, false
		}
		block := int64(1024) << shift
		blocks := int64(le.Uint32(ext[0x4:]))
		const incompat64Bit = 0x80
		if le.Uint32(ext[0x60:])&incompat64Bit != 0 {
			blocks |= int64(le.Uint32(ext[0x150:])) << 32
		}
		s := superblock{fsType: "ext4", size: blocks * block}
		copy(s.uuid[:], ext[0x68:0x78])
		// A last group too small for its own tables is left out: about one inode table and the bitmaps.
		s.slack = 1024 * block
		return s, true
	}
	if bytes.Equal(head[:4], []byte("XFSB")) {
		block := int64(be.Uint32(head[4:]))
		s := superblock{fsType: "xfs", size: int64(be.Uint64(head[8:])) * block, slack: block}
		copy(s.uuid[:], head[32:48])
		return s, true
	}
	if b := head[64<<10 : 68<<10]; bytes.Equal(b[0x40:0x48], []byte("_BHRfS_M")) {
		s := superblock{
			fsType: "btrfs", size: int64(le.Uint64(b[0x70:])),
			dirty: le.Uint64(b[0x60:]) != 0,
			slack: int64(le.Uint32(b[0x90:])),
		}
		copy(s.uuid[:], b[0x20:0x30])
		return s, true
	}
	return superblock{}, false
}
