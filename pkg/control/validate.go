package control

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Least sizes at which mkfs makes a filesystem, in bytes.
const (
	minXFS   int64 = 300 << 20
	minBtrfs int64 = 128 << 20
)

// maxTopology bounds the nodes of a request; an orchestrator may name every node it has.
const maxTopology = 10000

// DefaultFSType is made where neither the parameters nor the capability name one.
const DefaultFSType = "ext4"

// CheckCapability returns volume.ErrInvalid for a capability that no volume has.
func CheckCapability(c volume.Capability) error {
	switch c.Access {
	case volume.AccessBlock:
		if c.FSType != "" || len(c.MountFlags) > 0 {
			return fmt.Errorf("block access has no filesystem and no mount flags: %w", volume.ErrInvalid)
		}
		if c.Mode == volume.MultiNodeMultiWriter || c.Mode == volume.MultiNodeSingleWriter {
			return fmt.Errorf("access mode %s is not supported: a volume is written through one node at a time, which alone keeps its replicas alike; ask for one of the SINGLE_NODE modes: %w",
				c.Mode, volume.ErrInvalid)
		}
	case volume.AccessMount:
		if c.Mode == volume.MultiNodeMultiWriter || c.Mode == volume.MultiNodeSingleWriter {
			return fmt.Errorf("access mode %s needs block access: a filesystem of one node cannot be written while others use it: %w", c.Mode, volume.ErrInvalid)
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
	return checkFSType(c.FSType)
}

func checkFSType(t string) error {
	switch t {
	case "", "ext4", "xfs", "btrfs":
		return nil
	}
	return fmt.Errorf("filesystem %.64q is none of ext4, xfs, btrfs: %w", t, volume.ErrInvalid)
}

// normalise checks a request as far as it goes without the cluster's state, and fills in defaults. With a source the
// block size and the filesystem type stay as given: they are the source's.
func normalise(r CreateVolume) (CreateVolume, error) {
	if err := volume.CheckName("volume name", r.Name); err != nil {
		return r, err
	}
	if r.Tenant == "" {
		r.Tenant = DefaultTenant
	}
	if err := volume.CheckName("tenant", r.Tenant); err != nil {
		return r, err
	}
	if len(r.Capabilities) == 0 || len(r.Capabilities) > command.MaxCapabilities {
		return r, fmt.Errorf("%d capabilities are asked for, 1 to %d are possible: %w", len(r.Capabilities), command.MaxCapabilities, volume.ErrInvalid)
	}
	for _, c := range r.Capabilities {
		if err := CheckCapability(c); err != nil {
			return r, err
		}
	}
	if s := r.Source; s != nil && (s.Volume == "") == (s.Snapshot == "") {
		return r, fmt.Errorf("a source is one volume or one snapshot: %w", volume.ErrInvalid)
	}
	if len(r.Requisite) > maxTopology || len(r.Preferred) > maxTopology {
		return r, fmt.Errorf("topology names more than %d nodes: %w", maxTopology, volume.ErrInvalid)
	}
	if err := command.CheckQoS(&r.QoS.IOPS, &r.QoS.Bandwidth); err != nil {
		return r, err
	}
	p, err := normaliseParameters(r.Parameters, r.Source != nil)
	r.Parameters = p
	return r, err
}

func normaliseParameters(p volume.Parameters, inherits bool) (volume.Parameters, error) {
	if p.Replicas == 0 {
		p.Replicas = 1
	}
	if p.MinInSync == 0 {
		p.MinInSync = 1
	}
	if p.DataLocality == "" {
		p.DataLocality = volume.LocalityPreferred
	}
	if p.BlockSize == 0 && !inherits {
		p.BlockSize = 4096
	}
	if p.Replicas < 1 || p.Replicas > volume.MaxReplicas {
		return p, fmt.Errorf("replicas %d is not within 1 to %d: %w", p.Replicas, volume.MaxReplicas, volume.ErrInvalid)
	}
	if p.MinInSync < 1 || p.MinInSync > p.Replicas {
		return p, fmt.Errorf("minInSync %d is not within 1 and the number of replicas, %d: %w", p.MinInSync, p.Replicas, volume.ErrInvalid)
	}
	switch p.DataLocality {
	case volume.LocalityPreferred, volume.LocalityRequired, volume.LocalityNone:
	default:
		return p, fmt.Errorf("dataLocality %.64q is none of preferred, required, none: %w", p.DataLocality, volume.ErrInvalid)
	}
	if p.BlockSize != 512 && p.BlockSize != 4096 && !(p.BlockSize == 0 && inherits) {
		return p, fmt.Errorf("blockSize %d is neither 512 nor 4096: %w", p.BlockSize, volume.ErrInvalid)
	}
	if p.Pool != "" {
		if err := volume.CheckName("pool", p.Pool); err != nil {
			return p, err
		}
	}
	return p, checkFSType(p.FSType)
}

// minimum is the least size at which every filesystem that may be made fits.
func minimum(p volume.Parameters, cs []volume.Capability) int64 {
	least := volume.MinSize
	for _, c := range cs {
		if c.Access != volume.AccessMount {
			continue
		}
		switch fsType(p, c) {
		case "xfs":
			least = max(least, minXFS)
		case "btrfs":
			least = max(least, minBtrfs)
		}
	}
	return least
}

func fsType(p volume.Parameters, c volume.Capability) string {
	switch {
	case c.FSType != "":
		return c.FSType
	case p.FSType != "":
		return p.FSType
	}
	return DefaultFSType
}

// chooseSize answers a capacity range, in bytes; 0 is not given. least is the smallest useful size, source that of the
// source or 0. It returns volume.ErrOutOfRange where no size fits.
func chooseSize(required, limit, least, source int64) (int64, error) {
	switch {
	case required < 0 || limit < 0:
		return 0, fmt.Errorf("a size is negative: %w", volume.ErrOutOfRange)
	case limit > 0 && limit < required:
		return 0, fmt.Errorf("the limit, %d bytes, is below the required size, %d: %w", limit, required, volume.ErrOutOfRange)
	case required > volume.MaxSize:
		return 0, fmt.Errorf("size %d is above the largest possible, %d: %w", required, volume.MaxSize, volume.ErrOutOfRange)
	case required > 0 && required < source:
		return 0, fmt.Errorf("size %d is below that of the source, %d: %w", required, source, volume.ErrOutOfRange)
	}
	size := required
	if size == 0 {
		size = volume.DefaultSize
		if source > 0 {
			size = source
		}
		if limit > 0 {
			size = min(size, limit-limit%volume.SizeQuantum)
		}
	}
	size = roundUp(max(size, least, source))
	if limit > 0 && size > limit {
		return 0, fmt.Errorf("the smallest volume for this request has %d bytes, the limit is %d: %w", size, limit, volume.ErrOutOfRange)
	}
	if size > volume.MaxSize {
		return 0, fmt.Errorf("size %d is above the largest possible, %d: %w", size, volume.MaxSize, volume.ErrOutOfRange)
	}
	return size, nil
}

func roundUp(n int64) int64 {
	return (n + volume.SizeQuantum - 1) / volume.SizeQuantum * volume.SizeQuantum
}

// inherit merges what the source fixes into the parameters. It returns volume.ErrInvalid where the request asks for
// something else.
func inherit(r CreateVolume, blockSize int, fs volume.Filesystem) (volume.Parameters, error) {
	p := r.Parameters
	if p.BlockSize != 0 && p.BlockSize != blockSize {
		return p, fmt.Errorf("blockSize %d is asked for, the source has %d: %w", p.BlockSize, blockSize, volume.ErrInvalid)
	}
	p.BlockSize = blockSize
	if fs.Phase != volume.Formatted {
		return p, nil
	}
	for _, c := range r.Capabilities {
		if c.Access != volume.AccessMount {
			continue
		}
		// What the parameters say is a class's default; what the capability says is meant for this volume.
		if asked := c.FSType; asked != "" && asked != fs.Type {
			return p, fmt.Errorf("filesystem %s is asked for, the source has %s: %w", asked, fs.Type, volume.ErrInvalid)
		}
		if c.FSType == "" && p.FSType != "" && p.FSType != fs.Type {
			return p, fmt.Errorf("filesystem %s is asked for, the source has %s: %w", p.FSType, fs.Type, volume.ErrInvalid)
		}
	}
	if p.FSType == "" && checkFSType(fs.Type) == nil {
		p.FSType = fs.Type
	}
	return p, nil
}

// compare returns volume.ErrExists naming the first field in which a volume that has the name is not what is asked for.
func compare(r CreateVolume, v volume.Volume, nodes []volume.Node) error {
	p, q := r.Parameters, v.Parameters
	if v.Source != nil {
		if p.BlockSize == 0 {
			p.BlockSize = q.BlockSize
		}
		if v.Filesystem.Phase != volume.Blank && p.FSType == "" {
			p.FSType = q.FSType
		}
	}
	conflicts := []struct {
		field string
		is    bool
	}{
		{"tenant", r.Tenant != v.Tenant && !r.TenantImplied},
		{"required_bytes", r.RequiredBytes > v.Size},
		{"limit_bytes", r.LimitBytes > 0 && v.Size > r.LimitBytes},
		{"content source", !sameSource(r.Source, v.Source)},
		{"parameter replicas", p.Replicas != q.Replicas},
		{"parameter minInSync", p.MinInSync != q.MinInSync},
		{"parameter dataLocality", p.DataLocality != q.DataLocality},
		{"parameter pool", p.Pool != q.Pool},
		{"parameter fsType", p.FSType != q.FSType},
		{"parameter blockSize", p.BlockSize != q.BlockSize},
		{"IOPS limit", r.QoS.IOPS != v.QoS.IOPS},
		{"bandwidth limit", r.QoS.Bandwidth != v.QoS.Bandwidth},
		{"capabilities", !sameCapabilities(r.Capabilities, v.Capabilities)},
		{"topology", !reachable(r, v, nodes)},
	}
	for _, c := range conflicts {
		if c.is {
			return fmt.Errorf("volume %s has the name %q and another %s: %w", v.ID, v.Name, c.field, volume.ErrExists)
		}
	}
	return nil
}

func sameSource(a, b *volume.Source) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// sameCapabilities compares them as sets.
func sameCapabilities(a, b []volume.Capability) bool {
	within := func(a, b []volume.Capability) bool {
		return !slices.ContainsFunc(a, func(c volume.Capability) bool { return !slices.ContainsFunc(b, c.Equal) })
	}
	return within(a, b) && within(b, a)
}

// reachable tells whether the nodes from which a volume can be reached satisfy the requisite topology, by the rule of
// placement.
func reachable(r CreateVolume, v volume.Volume, nodes []volume.Node) bool {
	if len(r.Requisite) == 0 {
		return true
	}
	from := map[volume.NodeID]bool{}
	for _, x := range v.Replicas {
		from[x.Node] = true
	}
	if v.Parameters.DataLocality != volume.LocalityRequired {
		for _, n := range nodes {
			from[n.ID] = true
		}
	}
	requisite := map[volume.NodeID]bool{}
	met := 0
	for _, n := range r.Requisite {
		if !requisite[n] && from[n] {
			met++
		}
		requisite[n] = true
	}
	return met >= min(len(requisite), v.Parameters.Replicas)
}

// wellFormed tells whether a token has the form of an id.
func wellFormed(token, prefix string) bool {
	rest, ok := strings.CutPrefix(token, prefix)
	if !ok || len(rest) != 2*idBytes {
		return false
	}
	return strings.Trim(rest, "0123456789abcdef") == ""
}
