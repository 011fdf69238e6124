package command

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func ptr[T any](x T) *T { return &x }

func samples() []Command {
	c := volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, FSType: "xfs", MountFlags: []string{"noatime"}}
	p := volume.Pool{ID: "p", Name: "default", Node: "n", Kind: volume.PoolDir, Path: "/p", Capacity: 5, Used: 1, OverProvision: 1.5}
	token := jointoken.Record{ID: strings.Repeat("a", 16), Hash: strings.Repeat("b", 64), Roles: []string{"storage"}, Uses: 1, CreatedAt: 1, ExpiresAt: 2}
	cut := Cut{Snapshot: "s", Number: 2, ConfigVersion: 3, Holders: []volume.ReplicaID{"r"}}
	return []Command{
		RegisterNode{Now: 1, Node: volume.Node{ID: "n", Pools: []volume.Pool{p}, Zone: "z", Address: "h:1", DataAddress: "h:2",
			Roles: []volume.NodeRole{volume.RoleController, volume.RoleStorage}, BootID: 1 << 63}},
		ReportUsage{Now: 2, Node: "n", Pools: []volume.Pool{p}, Replicas: map[volume.ReplicaID]int64{"r": 1}, Snapshots: map[volume.SnapshotID]int64{"s": 2},
			DamagedReplicas: map[volume.ReplicaID]bool{"r": true}, DamagedSnapshots: map[volume.SnapshotID]bool{"s": false}},
		CreateVolume{Volume: volume.Volume{
			ID: "v", Name: "name", Tenant: "t", State: volume.Creating, Size: volume.MinSize, CreatedAt: 7,
			Parameters:   volume.Parameters{Replicas: 1, MinInSync: 1, DataLocality: volume.LocalityNone, Pool: "p", FSType: "xfs", BlockSize: 512},
			QoS:          volume.QoS{IOPS: 1, Bandwidth: 4096},
			Capabilities: []volume.Capability{c}, Source: &volume.Source{Snapshot: "s"}, Accessible: []volume.NodeID{"n"},
			Replicas: []volume.Replica{{ID: "r", Node: "n", Pool: "p", Role: volume.InSync}},
		}},
		FinishCreate{Volume: "v"}, BeginDelete{Volume: "v"}, FinishDelete{Volume: "v"},
		Attach{Now: 3, Volume: "v", Node: "n", ReadOnly: true, Capability: c},
		BeginDetach{Volume: "v", Epoch: 4}, FinishDetach{Volume: "v", Epoch: 4, Clean: true},
		ForceDetach{Volume: "v", Epoch: 4}, OpenEngine{Volume: "v", Node: "n"}, CloseEngine{Volume: "v", Epoch: 4, Clean: true},
		AddReplica{Volume: "v", Replica: volume.Replica{ID: "r", Node: "n", Pool: "p", Role: volume.Filling}},
		DropReplica{Volume: "v", Replica: "r"}, FreeReplica{Volume: "v", Replica: "r"}, Salvage{Volume: "v", Replica: "r", Seen: 9},
		LoseReplica{Volume: "v", Replica: "r"}, ForgetPool{Pool: "p"}, DropHolder{Snapshot: "s", Pool: "p", Lost: true},
		Commit{Volume: "v", Change: replication.Change{Reconfigure: &replication.Reconfigure{Epoch: 1, ConfigVersion: 2, Remove: []volume.ReplicaID{"r"},
			Add: []replication.Proof{{ID: "s", Incarnation: 1, BootID: 1<<64 - 1}}}}},
		Commit{Volume: "v", Change: replication.Change{ExpandCommit: &replication.ExpandCommit{Epoch: 1, ConfigVersion: 2, Size: 3}}},
		Commit{Volume: "v", Change: replication.Change{Attach: &replication.Attach{Node: "n"}}},
		SetNodeState{Node: "n", State: volume.NodeDrained, Idle: []volume.NodeID{"m"}}, RemoveNode{Node: "n"},
		CreateJoinToken{Record: token}, RevokeJoinToken{ID: token.ID},
		RedeemJoinToken{Now: 3, Claim: jointoken.Claim{Token: token.ID, Hash: token.Hash, Node: "n", Key: token.Hash}},
		BeginExpand{Volume: "v", Target: volume.MinSize}, FinishExpand{Volume: "v", Size: volume.MinSize, ConfigVersion: 3}, AbortExpand{Volume: "v", Target: volume.MinSize},
		ModifyVolume{Volume: "v", IOPS: ptr[int64](0), Bandwidth: ptr[int64](4096), Replicas: ptr(3), MinInSync: ptr(2), DataLocality: ptr(volume.LocalityNone)},
		ModifyVolume{Volume: "v"},
		SetFilesystem{Volume: "v", Filesystem: volume.Filesystem{Phase: volume.Formatting, Type: "xfs"}},
		BeginSnapshot{Now: 5, ID: "s", Name: "name", Volume: "v", Freeze: true}, FinishSnapshot{Cut: cut},
		AddHolder{Snapshot: "s", Replica: "r"}, DropHolder{Snapshot: "s", Pool: "p"}, FreeHolder{Snapshot: "s", Pool: "p"},
		CopySnapshot{Now: 6, Snapshot: "s", From: volume.Replica{ID: "r", Pool: "p", Role: volume.InSync}, To: volume.Replica{ID: "q", Pool: "o", Role: volume.Filling}},
		NoteDifference{Snapshot: "s"}, NoteDifference{Snapshot: "s", Differs: &volume.Difference{Offset: 1 << 23, Alike: [][]volume.PoolID{{"p", "q"}, {"o"}}}},
		BeginGroup{Now: 5, ID: "g", Name: "name", Volumes: []volume.ID{"v", "w"}, IDs: []volume.SnapshotID{"s", "t"}, Freeze: true},
		FinishGroup{Group: "g", Cuts: []Cut{cut}}, BeginDeleteGroup{Group: "g"},
		BeginDeleteSnapshot{Snapshot: "s"}, FinishDeleteSnapshot{Snapshot: "s"},
		SetQuota{Tenant: "t", Limit: volume.Amounts{LogicalBytes: 1, PhysicalBytes: 2, Volumes: 3, Snapshots: 4}}, DeleteQuota{Tenant: "t"},
	}
}

func TestEveryCommandSurvivesItsEncoding(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range samples() {
		b, err := Encode(c)
		if err != nil {
			t.Fatalf("%T: %v", c, err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatalf("%T: %v", c, err)
		}
		if d := cmp.Diff(c, got); d != "" {
			t.Errorf("%T: %s", c, d)
		}
		seen[kindOf(c)] = true
	}
	for k := range kinds {
		if !seen[k] {
			t.Errorf("no sample of %s", k)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, c := range []struct{ name, in string }{
		{"nothing", ``},
		{"no object", `[]`},
		{"another version", `{"v":2,"t":"delete-quota","c":{"tenant":"t"}}`},
		{"an unknown type", `{"v":1,"t":"format-disk","c":{}}`},
		{"an unknown field", `{"v":1,"t":"delete-quota","c":{"tenant":"t","force":true}}`},
		{"an unknown field around", `{"v":1,"t":"delete-quota","c":{"tenant":"t"},"x":1}`},
		{"no command", `{"v":1,"t":"delete-quota"}`},
		{"bytes behind", `{"v":1,"t":"delete-quota","c":{"tenant":"t"}} {}`},
		{"a value out of bounds", `{"v":1,"t":"delete-quota","c":{"tenant":""}}`},
		{"a size out of bounds", `{"v":1,"t":"begin-expand","c":{"volume":"v","target":1}}`},
		{"too much", `{"v":1,"t":"delete-quota","c":{"tenant":"` + strings.Repeat("x", MaxEncoded) + `"}}`},
	} {
		if got, err := Decode([]byte(c.in)); !errors.Is(err, volume.ErrInvalid) && !errors.Is(err, volume.ErrOutOfRange) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
}

// differ has a copy of its own on each pool.
func differ(off int64, pools ...string) Command {
	d := volume.Difference{Offset: off}
	for _, p := range pools {
		d.Alike = append(d.Alike, []volume.PoolID{volume.PoolID(p)})
	}
	return NoteDifference{Snapshot: "s", Differs: &d}
}

func TestCheckRefuses(t *testing.T) {
	good := func() volume.Volume { return samples()[2].(CreateVolume).Volume }
	many := map[volume.ReplicaID]int64{}
	for i := range MaxReported + 1 {
		many[volume.ReplicaID(strings.Repeat("r", i+1))] = 1
	}
	pools := func(change func(p *volume.Pool)) Command {
		c := samples()[0].(RegisterNode)
		change(&c.Node.Pools[0])
		return c
	}
	copies := func(change func(c *CopySnapshot)) Command {
		c := CopySnapshot{Snapshot: "s", From: volume.Replica{ID: "r", Pool: "p", Role: volume.InSync}, To: volume.Replica{ID: "q", Pool: "o", Role: volume.Filling}}
		change(&c)
		return c
	}
	vol := func(change func(v *volume.Volume)) Command {
		v := good()
		change(&v)
		return CreateVolume{Volume: v}
	}
	for i, c := range []Command{
		RegisterNode{}, RegisterNode{Node: volume.Node{ID: volume.NodeID(strings.Repeat("n", 257))}},
		pools(func(p *volume.Pool) { p.Capacity = -1 }), pools(func(p *volume.Pool) { p.OverProvision = 0.5 }),
		pools(func(p *volume.Pool) { p.ID = "" }), pools(func(p *volume.Pool) { p.Path = strings.Repeat("/", 4097) }),
		ReportUsage{Node: "n", Replicas: many}, ReportUsage{Node: "n", Replicas: map[volume.ReplicaID]int64{"r": -1}},
		vol(func(v *volume.Volume) { v.State = volume.Ready }), vol(func(v *volume.Volume) { v.Epoch = 3 }),
		vol(func(v *volume.Volume) { v.Replicas = nil }), vol(func(v *volume.Volume) { v.Size++ }),
		vol(func(v *volume.Volume) { v.Source = &volume.Source{} }), vol(func(v *volume.Volume) { v.Capabilities = nil }),
		vol(func(v *volume.Volume) { v.Parameters.Replicas = 9 }), vol(func(v *volume.Volume) { v.Parameters.MinInSync = 2 }),
		vol(func(v *volume.Volume) { v.Parameters.BlockSize = 1024 }), vol(func(v *volume.Volume) { v.QoS.Bandwidth = 1 }),
		vol(func(v *volume.Volume) {
			v.Capabilities = []volume.Capability{{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, MountFlags: []string{strings.Repeat("x", 5000)}}}
		}),
		vol(func(v *volume.Volume) {
			v.Parameters.Replicas, v.Replicas = 2, []volume.Replica{{ID: "a", Pool: "p", Role: volume.InSync}, {ID: "b", Pool: "p", Role: volume.InSync}}
		}),
		vol(func(v *volume.Volume) { v.Replicas[0].Role = volume.Filling }), vol(func(v *volume.Volume) { v.Replicas[0].Role = volume.Stale }),
		vol(func(v *volume.Volume) { v.Replicas[0].BootID = 1 }), vol(func(v *volume.Volume) { v.Leaving = v.Replicas }),
		ModifyVolume{Volume: "v", Replicas: ptr(0)}, ModifyVolume{Volume: "v", MinInSync: ptr(6)}, ModifyVolume{Volume: "v", Replicas: ptr(1), MinInSync: ptr(2)},
		ModifyVolume{Volume: "v", DataLocality: ptr(volume.DataLocality("near"))},
		AddReplica{Volume: "v", Replica: volume.Replica{ID: "r", Pool: "p", Role: volume.InSync}},
		vol(func(v *volume.Volume) { v.Kept = "s" }),
		copies(func(c *CopySnapshot) { c.Snapshot = "" }), copies(func(c *CopySnapshot) { c.To.ID = "" }), copies(func(c *CopySnapshot) { c.To.Pool = "p" }),
		copies(func(c *CopySnapshot) { c.To.ID = "r" }), copies(func(c *CopySnapshot) { c.From.Role = volume.Filling }),
		copies(func(c *CopySnapshot) { c.To.Role = volume.InSync }), copies(func(c *CopySnapshot) { c.From.Damaged = true }),
		Commit{Volume: "v"}, Commit{Volume: "v", Change: replication.Change{Attach: &replication.Attach{Node: "n", Force: true}}}, Commit{Volume: "v", Change: replication.Change{Tombstone: &replication.Tombstone{}}},
		Commit{Volume: "v", Change: replication.Change{Reconfigure: &replication.Reconfigure{}, Detach: &replication.Detach{}}},
		Commit{Volume: "v", Change: replication.Change{Reconfigure: &replication.Reconfigure{Remove: make([]volume.ReplicaID, 100)}}},
		Commit{Volume: "v", Change: replication.Change{Reconfigure: &replication.Reconfigure{Remove: []volume.ReplicaID{""}}}},
		FinishSnapshot{Cut{Snapshot: "s"}}, FinishSnapshot{Cut{Snapshot: "s", Holders: []volume.ReplicaID{"r", "r"}}},
		BeginGroup{ID: "g", Name: "n"}, BeginGroup{ID: "g", Name: "n", Volumes: []volume.ID{"v"}},
		BeginGroup{ID: "g", Name: "n", Volumes: []volume.ID{"v", "v"}, IDs: []volume.SnapshotID{"a", "b"}},
		FinishGroup{Group: "g"}, FinishGroup{Group: "g", Cuts: []Cut{{Snapshot: "s"}}},
		SetNodeState{Node: "n", State: "gone"}, RedeemJoinToken{}, CreateJoinToken{},
		RegisterNode{Node: volume.Node{ID: "n", Roles: []volume.NodeRole{"king"}}},
		SetFilesystem{Volume: "v"}, SetQuota{Tenant: "t", Limit: volume.Amounts{Volumes: -1}}, ModifyVolume{Volume: "v", IOPS: ptr[int64](-1)},
		Attach{Volume: "v", Node: "n"},
		differ(-1, "p", "q"), differ(volume.MaxSize+1, "p", "q"), differ(0), differ(0, "p"), differ(0, "p", "p"), differ(0, "p", ""), differ(0, strings.Split(strings.Repeat("p", MaxCopies+1), "")...),
		NoteDifference{Snapshot: "s", Differs: &volume.Difference{Alike: [][]volume.PoolID{{"p"}, {}}}},
	} {
		if _, err := Encode(c); !errors.Is(err, volume.ErrInvalid) && !errors.Is(err, volume.ErrOutOfRange) {
			t.Errorf("%d %+v: %v", i, c, err)
		}
	}
}

func TestRefusedKeepsSentinelAndMessage(t *testing.T) {
	for _, r := range reasons {
		want := errors.Join(errors.New("what and why"), r.sentinel)
		got := Refuse(want).Err()
		if !errors.Is(got, r.sentinel) || got.Error() != want.Error() {
			t.Errorf("%v became %v", want, got)
		}
	}
	if err := (Refused{Reason: "of a later version", Message: "m"}).Err(); err == nil {
		t.Error("an unknown reason is no error")
	}
}

func FuzzDecode(f *testing.F) {
	for _, c := range samples() {
		b, err := Encode(c)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Decode(b)
		if err != nil {
			return
		}
		b2, err := Encode(c)
		if err != nil {
			t.Fatalf("decoded and not encodable: %v", err)
		}
		c2, err := Decode(b2)
		if err != nil {
			t.Fatal(err)
		}
		b3, err := Encode(c2)
		if err != nil || string(b2) != string(b3) {
			t.Fatalf("%s\n%s\n%v", b2, b3, err)
		}
	})
}
