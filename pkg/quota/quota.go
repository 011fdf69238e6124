// Package quota is the arithmetic of tenants' limits: what may be reserved, and what use is left after a release. It
// never overflows and use is never negative.
package quota

import (
	"fmt"
	"math"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Reserve returns the use after ask is added, or volume.ErrQuota naming the first limit that forbids it, the use and the
// ask. A limit of zero is none. Physical bytes are measured, not asked for: any ask is refused once their use has reached
// the limit.
func Reserve(tenant string, limit, used, ask volume.Amounts) (volume.Amounts, error) {
	for _, x := range []struct {
		what             string
		limit, used, ask int64
	}{
		{"logical bytes", limit.LogicalBytes, used.LogicalBytes, ask.LogicalBytes},
		{"volumes", limit.Volumes, used.Volumes, ask.Volumes},
		{"snapshots", limit.Snapshots, used.Snapshots, ask.Snapshots},
	} {
		if x.ask < 0 {
			return used, fmt.Errorf("tenant %s: ask of %d %s: %w", tenant, x.ask, x.what, volume.ErrInvalid)
		}
		if x.limit > 0 && x.ask > 0 && x.ask > x.limit-x.used {
			return used, fmt.Errorf("tenant %s: quota of %s is %d, %d are in use and %d are asked for; delete something or raise the quota: %w",
				tenant, x.what, x.limit, x.used, x.ask, volume.ErrQuota)
		}
	}
	if limit.PhysicalBytes > 0 && used.PhysicalBytes >= limit.PhysicalBytes {
		return used, fmt.Errorf("tenant %s: quota of physical bytes is %d, %d are in use (snapshots included); delete data or snapshots, or raise the quota: %w",
			tenant, limit.PhysicalBytes, used.PhysicalBytes, volume.ErrQuota)
	}
	return Add(used, ask), nil
}

// Add returns the use after an amount is added without asking the limits; sums stop at the largest number.
func Add(used, more volume.Amounts) volume.Amounts {
	return volume.Amounts{
		LogicalBytes:  add(used.LogicalBytes, more.LogicalBytes),
		PhysicalBytes: add(used.PhysicalBytes, more.PhysicalBytes),
		Volumes:       add(used.Volumes, more.Volumes),
		Snapshots:     add(used.Snapshots, more.Snapshots),
	}
}

// Release returns the use after an amount is given back; it stops at zero.
func Release(used, less volume.Amounts) volume.Amounts {
	return volume.Amounts{
		LogicalBytes:  sub(used.LogicalBytes, less.LogicalBytes),
		PhysicalBytes: sub(used.PhysicalBytes, less.PhysicalBytes),
		Volumes:       sub(used.Volumes, less.Volumes),
		Snapshots:     sub(used.Snapshots, less.Snapshots),
	}
}

func add(a, b int64) int64 {
	if b > 0 && a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return max(0, a+b)
}

func sub(a, b int64) int64 {
	if b >= a {
		return 0
	}
	if b < 0 {
		return add(a, -max(b, -math.MaxInt64))
	}
	return a - b
}
