package command

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Bounds of what one command may carry.
const (
	// MaxPools bounds the pools of a node.
	MaxPools = 128
	// MaxReported bounds the replicas and the snapshots of one ReportUsage, each: it rewrites as many records.
	MaxReported = 16
	// MaxNodes bounds the nodes that one command names.
	MaxNodes = 1000
	// MaxCapabilities bounds the capabilities of a volume.
	MaxCapabilities = 32
	// MaxTopology bounds the nodes that a volume's record lists as asked for.
	MaxTopology = 32
	// MaxMountFlags bounds the mount flags of a capability, in bytes together; as in the CSI specification.
	MaxMountFlags = 4096
	// MaxIOPS and MaxBandwidth bound QoS limits, in operations and bytes per second.
	MaxIOPS      int64 = 1 << 30
	MaxBandwidth int64 = 1 << 40
	// MinBandwidth is the least limit that is not zero: one block a second.
	MinBandwidth int64 = 4096

	// What one record may take, encoded, so that a transaction has room for those of any command.
	maxVolume     = 16 << 10
	maxCapability = 8 << 10

	maxBytes   = int64(1) << 56
	maxAddress = 512
)

// Check implements Command.
func (c RegisterNode) Check() error {
	n := c.Node
	if err := checkNodeID(n.ID); err != nil {
		return err
	}
	if len(n.Zone) > volume.MaxNameLen || len(n.Address) > maxAddress || len(n.DataAddress) > maxAddress {
		return fmt.Errorf("node %s: its zone or an address is too long: %w", n.ID, volume.ErrInvalid)
	}
	for i, r := range n.Roles {
		if r != volume.RoleController && r != volume.RoleStorage || slices.Contains(n.Roles[:i], r) {
			return fmt.Errorf("node %s: role %.64q: %w", n.ID, r, volume.ErrInvalid)
		}
	}
	return checkPools(n.Pools)
}

// Check implements Command.
func (c ReportUsage) Check() error {
	if err := checkNodeID(c.Node); err != nil {
		return err
	}
	if r, s := len(c.Replicas)+len(c.DamagedReplicas), len(c.Snapshots)+len(c.DamagedSnapshots); r > MaxReported || s > MaxReported {
		return fmt.Errorf("report has %d replicas and %d snapshots, the limit is %d each: %w", r, s, MaxReported, volume.ErrInvalid)
	}
	for id, n := range c.Replicas {
		if err := checkBytes("replica "+string(id), n); err != nil {
			return err
		}
	}
	for id, n := range c.Snapshots {
		if err := checkBytes("snapshot "+string(id), n); err != nil {
			return err
		}
	}
	return checkPools(c.Pools)
}

// Check implements Command.
func (c CreateVolume) Check() error {
	v := c.Volume
	if err := volume.CheckName("volume id", string(v.ID)); err != nil {
		return err
	}
	if err := volume.CheckName("volume name", v.Name); err != nil {
		return err
	}
	if err := volume.CheckName("tenant", v.Tenant); err != nil {
		return err
	}
	if err := checkSize(v.Size); err != nil {
		return err
	}
	if err := CheckParameters(v.Parameters); err != nil {
		return err
	}
	if err := CheckQoS(&v.QoS.IOPS, &v.QoS.Bandwidth); err != nil {
		return err
	}
	if len(v.Capabilities) == 0 || len(v.Capabilities) > MaxCapabilities {
		return fmt.Errorf("volume has %d capabilities, 1 to %d are possible: %w", len(v.Capabilities), MaxCapabilities, volume.ErrInvalid)
	}
	for _, c := range v.Capabilities {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	if s := v.Source; s != nil && (s.Volume == "") == (s.Snapshot == "") {
		return fmt.Errorf("source names both a volume and a snapshot, or none: %w", volume.ErrInvalid)
	}
	if len(v.Accessible) > MaxTopology {
		return fmt.Errorf("topology names %d nodes, the limit is %d: %w", len(v.Accessible), MaxTopology, volume.ErrInvalid)
	}
	for _, n := range v.Accessible {
		if err := checkNodeID(n); err != nil {
			return err
		}
	}
	if err := checkReplicas(v); err != nil {
		return err
	}
	return checkEncoded("volume record", v, maxVolume)
}

func checkEncoded(what string, x any, most int) error {
	b, err := json.Marshal(x)
	if err != nil {
		return fmt.Errorf("%s: %v: %w", what, err, volume.ErrInvalid)
	}
	if len(b) > most {
		return fmt.Errorf("%s has %d bytes, the limit is %d; ask for fewer or shorter mount flags: %w", what, len(b), most, volume.ErrInvalid)
	}
	return nil
}

func checkReplicas(v volume.Volume) error {
	if len(v.Replicas) != v.Parameters.Replicas {
		return fmt.Errorf("volume has %d replicas placed, %d asked: %w", len(v.Replicas), v.Parameters.Replicas, volume.ErrInvalid)
	}
	pools := map[volume.PoolID]bool{}
	synced := 0
	for _, r := range v.Replicas {
		if err := checkNewReplica(r); err != nil {
			return err
		}
		if r.Role == volume.InSync {
			synced++
		}
		if pools[r.Pool] {
			return fmt.Errorf("two replicas in pool %s: %w", r.Pool, volume.ErrInvalid)
		}
		pools[r.Pool] = true
	}
	if synced == 0 {
		return fmt.Errorf("no replica is in sync: %w", volume.ErrInvalid)
	}
	if v.State != volume.Creating || v.Kept != "" || v.Target != 0 || v.Attachment != nil || v.PhysicalBytes != 0 || len(v.Leaving) != 0 || v.Lost || v.Protocol != (volume.Protocol{}) {
		return fmt.Errorf("a new volume's state is not that of a new volume: %w", volume.ErrInvalid)
	}
	return nil
}

func checkNewReplica(r volume.Replica) error {
	if err := volume.CheckName("replica id", string(r.ID)); err != nil {
		return err
	}
	if err := volume.CheckName("pool id", string(r.Pool)); err != nil {
		return err
	}
	if len(r.Node) > volume.MaxNodeIDLen {
		return checkNodeID(r.Node)
	}
	if r.Role != volume.InSync && r.Role != volume.Filling || r.Incarnation != 0 || r.BootID != 0 || r.RemovedAt != 0 || r.PhysicalBytes != 0 || r.Damaged {
		return fmt.Errorf("replica %s is not as a new one is: %w", r.ID, volume.ErrInvalid)
	}
	return nil
}

// Check implements Command.
func (c FinishCreate) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c BeginDelete) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c FinishDelete) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c Attach) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	if err := checkNodeID(c.Node); err != nil {
		return err
	}
	if err := checkCapability(c.Capability); err != nil {
		return err
	}
	return checkEncoded("capability", c.Capability, maxCapability)
}

// Check implements Command.
func (c BeginDetach) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c FinishDetach) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c BeginExpand) Check() error { return checkResize(c.Volume, c.Target) }

// Check implements Command.
func (c FinishExpand) Check() error { return checkResize(c.Volume, c.Size) }

// Check implements Command.
func (c AbortExpand) Check() error { return checkResize(c.Volume, c.Target) }

// Check implements Command.
func (c ModifyVolume) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	p := volume.Parameters{Replicas: 1, MinInSync: 1, DataLocality: volume.LocalityNone, BlockSize: 4096}
	if c.DataLocality != nil {
		p.DataLocality = *c.DataLocality
	}
	if c.MinInSync != nil {
		p.MinInSync, p.Replicas = *c.MinInSync, min(max(*c.MinInSync, 1), volume.MaxReplicas)
	}
	if c.Replicas != nil {
		p.Replicas = *c.Replicas
	}
	if err := CheckParameters(p); err != nil {
		return err
	}
	return CheckQoS(c.IOPS, c.Bandwidth)
}

// Check implements Command.
func (c FreeReplica) Check() error { return checkReplicaOf(c.Volume, c.Replica) }

// Check implements Command.
func (c Commit) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	return checkChange(c.Change)
}

// Check implements Command.
func (c ForceDetach) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c OpenEngine) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	return checkNodeID(c.Node)
}

// Check implements Command.
func (c CloseEngine) Check() error { return volume.CheckName("volume id", string(c.Volume)) }

// Check implements Command.
func (c AddReplica) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	if c.Replica.Role != volume.Filling {
		return fmt.Errorf("replica %s is added as %q: %w", c.Replica.ID, c.Replica.Role, volume.ErrInvalid)
	}
	return checkNewReplica(c.Replica)
}

// Check implements Command.
func (c DropReplica) Check() error { return checkReplicaOf(c.Volume, c.Replica) }

// Check implements Command.
func (c LoseReplica) Check() error { return checkReplicaOf(c.Volume, c.Replica) }

// Check implements Command.
func (c ForgetPool) Check() error { return volume.CheckName("pool id", string(c.Pool)) }

// Check implements Command.
func (c Salvage) Check() error { return checkReplicaOf(c.Volume, c.Replica) }

func checkReplicaOf(id volume.ID, r volume.ReplicaID) error {
	if err := volume.CheckName("volume id", string(id)); err != nil {
		return err
	}
	return volume.CheckName("replica id", string(r))
}

// Check implements Command.
func (c SetNodeState) Check() error {
	if err := checkNodeID(c.Node); err != nil {
		return err
	}
	switch c.State {
	case volume.NodeActive, volume.NodeDrained, volume.NodeEmptying:
	default:
		return fmt.Errorf("node state %.64q: %w", c.State, volume.ErrInvalid)
	}
	if len(c.Idle) > MaxNodes {
		return fmt.Errorf("%d nodes are named, the limit is %d: %w", len(c.Idle), MaxNodes, volume.ErrInvalid)
	}
	for _, n := range c.Idle {
		if err := checkNodeID(n); err != nil {
			return err
		}
	}
	return nil
}

// Check implements Command.
func (c RemoveNode) Check() error { return checkNodeID(c.Node) }

// Check implements Command.
func (c CreateJoinToken) Check() error { return c.Record.Check() }

// Check implements Command.
func (c RevokeJoinToken) Check() error { return volume.CheckName("join token", c.ID) }

// Check implements Command.
func (c RedeemJoinToken) Check() error { return c.Claim.Check() }

// Check implements Command.
func (c SetFilesystem) Check() error {
	if err := volume.CheckName("volume id", string(c.Volume)); err != nil {
		return err
	}
	switch c.Filesystem.Phase {
	case volume.Formatting, volume.Formatted:
	default:
		return fmt.Errorf("filesystem phase %q: %w", c.Filesystem.Phase, volume.ErrInvalid)
	}
	return volume.CheckName("filesystem type", c.Filesystem.Type)
}

// Check implements Command.
func (c BeginSnapshot) Check() error {
	if err := volume.CheckName("snapshot id", string(c.ID)); err != nil {
		return err
	}
	if err := volume.CheckName("snapshot name", c.Name); err != nil {
		return err
	}
	return volume.CheckName("volume id", string(c.Volume))
}

// Check implements Command.
func (c FinishSnapshot) Check() error { return c.Cut.check() }

func (c Cut) check() error {
	if len(c.Holders) == 0 || len(c.Holders) > replication.MaxMembers {
		return fmt.Errorf("snapshot has %d holders, 1 to %d are possible: %w", len(c.Holders), replication.MaxMembers, volume.ErrInvalid)
	}
	for i, id := range c.Holders {
		if err := volume.CheckName("replica id", string(id)); err != nil {
			return err
		}
		if slices.Contains(c.Holders[:i], id) {
			return fmt.Errorf("holder %s is named twice: %w", id, volume.ErrInvalid)
		}
	}
	return volume.CheckName("snapshot id", string(c.Snapshot))
}

// Check implements Command.
func (c AddHolder) Check() error {
	if err := volume.CheckName("replica id", string(c.Replica)); err != nil {
		return err
	}
	return volume.CheckName("snapshot id", string(c.Snapshot))
}

// Check implements Command.
func (c CopySnapshot) Check() error {
	if err := volume.CheckName("snapshot id", string(c.Snapshot)); err != nil {
		return err
	}
	for _, r := range []volume.Replica{c.From, c.To} {
		if err := checkNewReplica(r); err != nil {
			return err
		}
	}
	if c.From.Role != volume.InSync || c.To.Role != volume.Filling {
		return fmt.Errorf("snapshot %s is copied from what is %q to what is %q: %w", c.Snapshot, c.From.Role, c.To.Role, volume.ErrInvalid)
	}
	if c.From.ID == c.To.ID || c.From.Pool == c.To.Pool {
		return fmt.Errorf("snapshot %s is copied to where it is: %w", c.Snapshot, volume.ErrInvalid)
	}
	return nil
}

// Check implements Command.
func (c DropHolder) Check() error { return checkHolder(c.Snapshot, c.Pool) }

// Check implements Command.
func (c FreeHolder) Check() error { return checkHolder(c.Snapshot, c.Pool) }

func checkHolder(id volume.SnapshotID, p volume.PoolID) error {
	if err := volume.CheckName("pool id", string(p)); err != nil {
		return err
	}
	return volume.CheckName("snapshot id", string(id))
}

// Check implements Command.
func (c BeginGroup) Check() error {
	if err := volume.CheckName("group id", string(c.ID)); err != nil {
		return err
	}
	if err := volume.CheckName("group name", c.Name); err != nil {
		return err
	}
	if len(c.Volumes) == 0 || len(c.Volumes) > volume.MaxGroup || len(c.IDs) != len(c.Volumes) {
		return fmt.Errorf("group of %d volumes, 1 to %d are possible: %w", len(c.Volumes), volume.MaxGroup, volume.ErrInvalid)
	}
	for i := range c.Volumes {
		if err := volume.CheckName("volume id", string(c.Volumes[i])); err != nil {
			return err
		}
		if err := volume.CheckName("snapshot id", string(c.IDs[i])); err != nil {
			return err
		}
		if slices.Contains(c.Volumes[:i], c.Volumes[i]) || slices.Contains(c.IDs[:i], c.IDs[i]) {
			return fmt.Errorf("volume %s or its snapshot is named twice: %w", c.Volumes[i], volume.ErrInvalid)
		}
	}
	return nil
}

// Check implements Command.
func (c FinishGroup) Check() error {
	if len(c.Cuts) == 0 || len(c.Cuts) > volume.MaxGroup {
		return fmt.Errorf("group of %d snapshots, 1 to %d are possible: %w", len(c.Cuts), volume.MaxGroup, volume.ErrInvalid)
	}
	for i, x := range c.Cuts {
		if err := x.check(); err != nil {
			return err
		}
		if slices.ContainsFunc(c.Cuts[:i], func(o Cut) bool { return o.Snapshot == x.Snapshot }) {
			return fmt.Errorf("snapshot %s is named twice: %w", x.Snapshot, volume.ErrInvalid)
		}
	}
	return volume.CheckName("group id", string(c.Group))
}

// Check implements Command.
func (c BeginDeleteGroup) Check() error { return volume.CheckName("group id", string(c.Group)) }

// Check implements Command.
func (c BeginDeleteSnapshot) Check() error {
	return volume.CheckName("snapshot id", string(c.Snapshot))
}

// Check implements Command.
func (c FinishDeleteSnapshot) Check() error {
	return volume.CheckName("snapshot id", string(c.Snapshot))
}

// Check implements Command.
func (c SetQuota) Check() error {
	if err := volume.CheckName("tenant", c.Tenant); err != nil {
		return err
	}
	for _, n := range []int64{c.Limit.LogicalBytes, c.Limit.PhysicalBytes, c.Limit.Volumes, c.Limit.Snapshots} {
		if err := checkBytes("quota limit", n); err != nil {
			return err
		}
	}
	return nil
}

// Check implements Command.
func (c DeleteQuota) Check() error { return volume.CheckName("tenant", c.Tenant) }

// CheckQoS returns volume.ErrInvalid for a limit outside its bounds; nil and zero are fine.
func CheckQoS(iops, bandwidth *int64) error {
	if iops != nil && (*iops < 0 || *iops > MaxIOPS) {
		return fmt.Errorf("IOPS limit %d is not within 0 (none) to %d: %w", *iops, MaxIOPS, volume.ErrInvalid)
	}
	if bandwidth != nil && *bandwidth != 0 && (*bandwidth < MinBandwidth || *bandwidth > MaxBandwidth) {
		return fmt.Errorf("bandwidth limit %d is neither 0 (none) nor within %d to %d bytes per second: %w",
			*bandwidth, MinBandwidth, MaxBandwidth, volume.ErrInvalid)
	}
	return nil
}

func checkNodeID(id volume.NodeID) error {
	if id == "" || len(id) > volume.MaxNodeIDLen {
		return fmt.Errorf("node id has %d bytes, 1 to %d are possible: %w", len(id), volume.MaxNodeIDLen, volume.ErrInvalid)
	}
	return nil
}

func checkBytes(what string, n int64) error {
	if n < 0 || n > maxBytes {
		return fmt.Errorf("%s: %d is not within 0 to %d: %w", what, n, maxBytes, volume.ErrInvalid)
	}
	return nil
}

func checkPools(pools []volume.Pool) error {
	if len(pools) > MaxPools {
		return fmt.Errorf("node has %d pools, the limit is %d: %w", len(pools), MaxPools, volume.ErrInvalid)
	}
	seen := map[volume.PoolID]bool{}
	for _, p := range pools {
		if err := volume.CheckName("pool id", string(p.ID)); err != nil {
			return err
		}
		if seen[p.ID] {
			return fmt.Errorf("pool %s is named twice: %w", p.ID, volume.ErrInvalid)
		}
		seen[p.ID] = true
		if len(p.Name) > volume.MaxNameLen || len(p.Path) > 4096 || len(p.Kind) > volume.MaxNameLen {
			return fmt.Errorf("pool %s: its name, kind or path is too long: %w", p.ID, volume.ErrInvalid)
		}
		if err := checkBytes("capacity of pool "+string(p.ID), p.Capacity); err != nil {
			return err
		}
		if err := checkBytes("use of pool "+string(p.ID), p.Used); err != nil {
			return err
		}
		if !(p.OverProvision >= 1 && p.OverProvision <= 100) {
			return fmt.Errorf("pool %s: over-provisioning ratio %v is not within 1 to 100: %w", p.ID, p.OverProvision, volume.ErrInvalid)
		}
	}
	return nil
}

func checkSize(n int64) error {
	if n < volume.MinSize || n > volume.MaxSize || n%volume.SizeQuantum != 0 {
		return fmt.Errorf("size %d is not a multiple of %d within %d to %d bytes: %w",
			n, volume.SizeQuantum, volume.MinSize, volume.MaxSize, volume.ErrOutOfRange)
	}
	return nil
}

func checkResize(id volume.ID, size int64) error {
	if err := volume.CheckName("volume id", string(id)); err != nil {
		return err
	}
	return checkSize(size)
}

// CheckParameters returns volume.ErrInvalid for parameters that no volume has.
func CheckParameters(p volume.Parameters) error {
	if p.Replicas < 1 || p.Replicas > volume.MaxReplicas {
		return fmt.Errorf("replicas %d is not within 1 to %d: %w", p.Replicas, volume.MaxReplicas, volume.ErrInvalid)
	}
	if p.MinInSync < 1 || p.MinInSync > p.Replicas {
		return fmt.Errorf("minInSync %d is not within 1 and the number of replicas, %d: %w", p.MinInSync, p.Replicas, volume.ErrInvalid)
	}
	switch p.DataLocality {
	case volume.LocalityPreferred, volume.LocalityRequired, volume.LocalityNone:
	default:
		return fmt.Errorf("dataLocality %q is none of preferred, required, none: %w", p.DataLocality, volume.ErrInvalid)
	}
	if p.BlockSize != 512 && p.BlockSize != 4096 {
		return fmt.Errorf("blockSize %d is neither 512 nor 4096: %w", p.BlockSize, volume.ErrInvalid)
	}
	if p.Pool != "" {
		if err := volume.CheckName("pool", p.Pool); err != nil {
			return err
		}
	}
	return checkFSType(p.FSType)
}

func checkFSType(t string) error {
	switch t {
	case "", "ext4", "xfs", "btrfs":
		return nil
	}
	return fmt.Errorf("filesystem %q is none of ext4, xfs, btrfs: %w", t, volume.ErrInvalid)
}

func checkCapability(c volume.Capability) error {
	switch c.Access {
	case volume.AccessMount:
	case volume.AccessBlock:
		if c.FSType != "" || len(c.MountFlags) > 0 {
			return fmt.Errorf("block access has no filesystem and no mount flags: %w", volume.ErrInvalid)
		}
	default:
		return fmt.Errorf("access %q is neither mount nor block: %w", c.Access, volume.ErrInvalid)
	}
	switch c.Mode {
	case volume.SingleNodeWriter, volume.SingleNodeReaderOnly, volume.SingleNodeSingleWriter, volume.SingleNodeMultiWriter,
		volume.MultiNodeReaderOnly, volume.MultiNodeSingleWriter, volume.MultiNodeMultiWriter:
	default:
		return fmt.Errorf("access mode %q is unknown: %w", c.Mode, volume.ErrInvalid)
	}
	n := 0
	for _, f := range c.MountFlags {
		n += len(f)
	}
	if n > MaxMountFlags {
		return fmt.Errorf("mount flags have %d bytes, the limit is %d: %w", n, MaxMountFlags, volume.ErrInvalid)
	}
	return checkFSType(c.FSType)
}
