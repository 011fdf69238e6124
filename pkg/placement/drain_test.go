package placement

import (
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestBlockers(t *testing.T) {
	vol := func(minInSync int, replicas ...string) volume.Volume {
		v := volume.Volume{ID: "v", State: volume.Ready, Parameters: volume.Parameters{MinInSync: minInSync}}
		for _, r := range replicas {
			node, role, _ := strings.Cut(r, ":")
			v.Replicas = append(v.Replicas, volume.Replica{Node: volume.NodeID(node), Pool: volume.PoolID("p" + node[1:]), Role: map[string]volume.ReplicaRole{"i": volume.InSync, "s": volume.Stale, "f": volume.Filling}[role]})
		}
		return v
	}
	deleting := vol(1, "n1:i")
	deleting.State = volume.Deleting
	for _, c := range []struct {
		name string
		v    volume.Volume
		set  func(v *View)
		says string // "" is no blocker
	}{
		{"a copy elsewhere", vol(1, "n1:i", "n2:i"), nil, ""},
		{"not affected", vol(1, "n2:i"), nil, ""},
		{"the only one", vol(1, "n1:i"), nil, "it has no other"},
		{"the other is behind", vol(1, "n1:i", "n2:s"), nil, "still to be brought up"},
		{"the other is being filled", vol(1, "n1:i", "n2:f"), nil, "still to be brought up"},
		{"its own copy is behind", vol(1, "n1:s", "n2:i"), nil, ""},
		{"the other is down", vol(1, "n1:i", "n2:i"), func(v *View) { v.Down = map[volume.NodeID]string{"n2": "it is silent"} }, "down or drained"},
		{"the other is drained", vol(1, "n1:i", "n2:i"), func(v *View) { v.Nodes[1].State = volume.NodeDrained }, "down or drained"},
		{"the other is being emptied", vol(1, "n1:i", "n2:i"), func(v *View) { v.Nodes[1].State = volume.NodeEmptying }, "down or drained"},
		{"the other's pool is offline", vol(1, "n1:i", "n2:i"), func(v *View) { v.Nodes[1].Pools[0].Capacity = 0 }, "disks that are away"},
		{"the other's pool has stopped", vol(1, "n1:i", "n2:i"), func(v *View) { v.Nodes[1].Pools[0].Failed = true }, "disks that are away"},
		{"the other is unknown", vol(1, "n1:i", "n9:i"), nil, "down or drained"},
		{"two are needed", vol(2, "n1:i", "n2:i"), nil, "1 of its replicas would be in sync, it needs 2"},
		{"two are left", vol(2, "n1:i", "n2:i", "n3:i"), nil, ""},
		{"being deleted", deleting, nil, ""},
	} {
		v := cluster(1, 1, 1)
		if c.set != nil {
			c.set(&v)
		}
		bs := Blockers(v, []volume.Volume{c.v}, nil, "n1")
		if (len(bs) > 0) != (c.says != "") || len(bs) > 0 && !strings.Contains(bs[0].Reason, c.says) {
			t.Errorf("%s: %v, want %q", c.name, bs, c.says)
		}
	}
}

func TestSnapshotsBlock(t *testing.T) {
	snap := func(state volume.State, holders ...string) volume.Snapshot {
		x := volume.Snapshot{ID: "s", Volume: "v", State: state}
		for _, h := range holders {
			node, damaged := strings.CutSuffix(h, "!")
			x.Holders = append(x.Holders, volume.Replica{Node: volume.NodeID(node), Pool: volume.PoolID("p" + node[1:]), Damaged: damaged})
		}
		return x
	}
	hidden := snap(volume.Ready, "n1")
	hidden.Hidden = true
	for _, c := range []struct {
		name string
		x    volume.Snapshot
		says string // "" is no blocker
	}{
		{"a copy elsewhere", snap(volume.Ready, "n1", "n2"), ""},
		{"not affected", snap(volume.Ready, "n2"), ""},
		{"the only one", snap(volume.Ready, "n1"), "its only copy is there"},
		{"the other is down", snap(volume.Ready, "n1", "n3"), "can be reached"},
		{"the other's pool has stopped", snap(volume.Ready, "n1", "n4"), "can be reached"},
		{"the other is damaged", snap(volume.Ready, "n1", "n2!"), "only sound copy"},
		{"its own copy is damaged", snap(volume.Ready, "n1!"), ""},
		{"not cut yet", snap(volume.Creating, "n1"), ""},
		{"being deleted", snap(volume.Deleting, "n1"), ""},
		{"a clone's", hidden, ""},
	} {
		v := cluster(1, 1, 1, 1)
		v.Nodes[3].Pools[0].Failed = true
		v.Down = map[volume.NodeID]string{"n3": "it is silent"}
		bs := Blockers(v, nil, []volume.Snapshot{c.x}, "n1")
		if (len(bs) > 0) != (c.says != "") || len(bs) > 0 && (!strings.Contains(bs[0].Reason, c.says) || bs[0].Snapshot != "s" || bs[0].Volume != "v") {
			t.Errorf("%s: %v, want %q", c.name, bs, c.says)
		}
	}
}
