package placement

import (
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Blocker is a volume, or a snapshot, that needs a node to stay up, and why.
type Blocker struct {
	// Volume is also that of the snapshot, which may have been deleted.
	Volume   volume.ID
	Snapshot volume.SnapshotID // "" is the volume itself
	Reason   string
}

// Blockers lists the volumes that a node cannot be stopped for: those with a replica in sync there, and not enough of them
// in pools that stay to be read and written; then the snapshots of which the only sound copy that can be reached is there.
// Pools of nodes that are down, drained or being emptied do not stay, nor those that are offline or have stopped.
func Blockers(v View, volumes []volume.Volume, snapshots []volume.Snapshot, node volume.NodeID) []Blocker {
	stays := map[volume.PoolID]bool{}
	for _, n := range v.Nodes {
		for _, p := range n.Pools {
			stays[p.ID] = n.ID != node && n.State == volume.NodeActive && v.Down[n.ID] == "" && p.Works()
		}
	}
	var out []Blocker
	for _, x := range volumes {
		if x.State != volume.Ready || x.Kept != "" {
			continue
		}
		affected, left, behind, away := false, 0, 0, 0
		for _, r := range x.Replicas {
			switch {
			case r.Node == node:
				affected = affected || r.Role == volume.InSync
			case !stays[r.Pool]:
				away++
			case r.Role == volume.InSync:
				left++
			default:
				behind++
			}
		}
		if !affected || left >= x.Parameters.MinInSync {
			continue
		}
		why := fmt.Sprintf("%d of its replicas would be in sync, it needs %d", left, x.Parameters.MinInSync)
		if left == 0 {
			why = "the only replica in sync that can be reached is there"
		}
		switch {
		case behind > 0:
			why += fmt.Sprintf("; %d elsewhere still to be brought up", behind)
		case away > 0:
			why += fmt.Sprintf("; %d on nodes that are down or drained, or disks that are away", away)
		case len(x.Replicas) == 1:
			why += "; it has no other"
		}
		out = append(out, Blocker{Volume: x.ID, Reason: why})
	}
	for _, x := range snapshots {
		if x.State != volume.Ready || x.Hidden {
			continue
		}
		affected, left := false, 0
		for _, h := range x.Holders {
			switch {
			case h.Damaged:
			case h.Node == node:
				affected = true
			case stays[h.Pool]:
				left++
			}
		}
		if !affected || left > 0 {
			continue
		}
		why := "its only sound copy that can be reached is there"
		if len(x.Holders) == 1 {
			why = "its only copy is there"
		}
		out = append(out, Blocker{Volume: x.Volume, Snapshot: x.ID, Reason: why})
	}
	return out
}
