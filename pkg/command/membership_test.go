package command

import (
	"reflect"
	"testing"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What the protocol decides is what the record keeps: nothing is lost between the two.
func TestChangeIsTheProtocols(t *testing.T) {
	v := volume.Volume{
		ID: "v1", State: volume.Ready, Size: 1 << 20, Parameters: volume.Parameters{Replicas: 3, MinInSync: 1},
		Protocol: volume.Protocol{Epoch: 1, ConfigVersion: 1, Lineage: 1, Revision: 1, Clean: true},
	}
	for _, id := range []volume.ReplicaID{"r1", "r2", "r3"} {
		v.Replicas = append(v.Replicas, volume.Replica{ID: id, Node: volume.NodeID("n" + id[1:]), Pool: volume.PoolID("p" + id[1:]), Role: volume.InSync})
	}
	proof := replication.Proof{ID: "r3", Incarnation: 7, BootID: 8}
	for _, c := range []replication.Change{
		{Attach: &replication.Attach{Node: "n1", Assign: true}},
		{Attach: &replication.Attach{Node: "n1"}},
		{Prepare: &replication.Prepare{Snapshot: "s1"}},
		{Complete: &replication.Complete{Number: 1, ConfigVersion: 1, Holders: []volume.ReplicaID{"r1", "r2", "r3"}}},
		{Reconfigure: &replication.Reconfigure{Epoch: 3, ConfigVersion: 1, Remove: []volume.ReplicaID{"r2", "r3"}}},
		{Prepare: &replication.Prepare{Snapshot: "s2"}},
		{AbortBarrier: &replication.AbortBarrier{Number: 2}},
		{Reconfigure: &replication.Reconfigure{Epoch: 3, ConfigVersion: 2, Add: []replication.Proof{proof}}},
		{AddReplica: &replication.Member{ID: "r4", Node: "n4", Pool: "p4"}},
		{ExpandIntent: &replication.ExpandIntent{Target: 2 << 20}},
		{SetMinInSync: &replication.SetMinInSync{MinInSync: 2}},
		{DropReplica: &replication.DropReplica{ID: "r4"}},
		{Detach: &replication.Detach{Silent: true}},
		{Salvage: &replication.Salvage{ID: "r2", Seen: 9, SeenEpoch: 8}},
		{Tombstone: &replication.Tombstone{}},
	} {
		before := Membership(v)
		want, err := before.Apply(c)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if v, err = Change(v, c); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if got := Membership(v); !reflect.DeepEqual(got, want) {
			t.Fatalf("after %+v the record has\n%+v, the protocol\n%+v", c, got, want)
		}
	}
}
