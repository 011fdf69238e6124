package meta

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// orphaned is a snapshot of a volume that is deleted, volume 2.
var orphaned = volume.SnapshotID(fmt.Sprintf("snap-%020x", 2))

// draw makes a command about few things, so that they meet, and mostly one that fits the state.
func draw(t *rapid.T, s *Store) command.Command {
	i := rapid.IntRange(0, 3).Draw(t, "i")
	vol := volume.ID(fmt.Sprintf("vol-%020x", i))
	snap := volume.SnapshotID(fmt.Sprintf("snap-%020x", i))
	size := int64(rapid.IntRange(1, 40).Draw(t, "GiB")) * gib
	now := volume.Timestamp(rapid.Int64Range(0, 1e12).Draw(t, "now"))
	version := volume.ConfigVersion(rapid.IntRange(1, 3).Draw(t, "version"))
	epoch := volume.Epoch(rapid.IntRange(1, 4).Draw(t, "epoch"))
	if rec, err := s.Volume(context.Background(), vol); err == nil && rapid.IntRange(0, 4).Draw(t, "fits") > 0 {
		epoch, version = rec.Epoch, rec.ConfigVersion
		if rec.Attachment != nil && rapid.Bool().Draw(t, "of the attachment") {
			epoch = rec.Attachment.Epoch
		}
	}
	rep := replica(i, rapid.IntRange(0, 2).Draw(t, "replica"))
	switch rapid.IntRange(0, 46).Draw(t, "kind") {
	case 0:
		n := volume.NodeID(fmt.Sprint("n", rapid.IntRange(1, 2).Draw(t, "node")))
		c := node(n)
		for p := range rapid.IntRange(0, 2).Draw(t, "pools") {
			c.Node.Pools = append(c.Node.Pools, node("x", volume.PoolID(fmt.Sprint("p", p+1))).Node.Pools[0])
		}
		c.Now = now
		return c
	case 1, 2:
		return command.ReportUsage{Now: now, Node: "n1",
			Pools:     []volume.Pool{{ID: "p1", Capacity: size * 2, Used: size / 2, OverProvision: 1.5}},
			Replicas:  map[volume.ReplicaID]int64{volume.ReplicaID(fmt.Sprintf("rep-%020x-0", i)): size},
			Snapshots: map[volume.SnapshotID]int64{snap: size / 3}}
	case 3, 4, 5, 6:
		v := newVolume(i, volume.PoolID(fmt.Sprint("p", rapid.IntRange(1, 2).Draw(t, "pool"))))
		v.Name = fmt.Sprint("name ", rapid.IntRange(0, 2).Draw(t, "name"))
		v.Size = size
		v.Tenant = fmt.Sprint("t", i%2)
		if other := volume.PoolID("p3"); rapid.Bool().Draw(t, "two replicas") {
			v.Parameters.Replicas = 2
			role := rapid.SampledFrom([]volume.ReplicaRole{volume.InSync, volume.InSync, volume.Filling}).Draw(t, "role")
			v.Replicas = append(v.Replicas, volume.Replica{ID: replica(i, 1), Node: "n3", Pool: other, Role: role})
		}
		switch rapid.IntRange(0, 3).Draw(t, "source") {
		case 0:
			v.Source = &volume.Source{Snapshot: volume.SnapshotID(fmt.Sprintf("snap-%020x", rapid.IntRange(0, 3).Draw(t, "s")))}
		case 1:
			v.Source = &volume.Source{Volume: volume.ID(fmt.Sprintf("vol-%020x", rapid.IntRange(0, 3).Draw(t, "v")))}
		}
		return command.CreateVolume{Volume: v}
	case 7, 8, 9:
		return command.FinishCreate{Volume: vol}
	case 10:
		return command.BeginDelete{Volume: vol, Unfinished: rapid.Bool().Draw(t, "unfinished")}
	case 11:
		return command.FinishDelete{Volume: vol}
	case 12:
		return command.Attach{Now: now, Volume: vol, Node: volume.NodeID(fmt.Sprint("n", rapid.IntRange(1, 2).Draw(t, "node"))),
			Capability: volume.Capability{Access: volume.AccessBlock, Mode: volume.SingleNodeWriter}}
	case 13:
		return command.BeginDetach{Volume: vol, Epoch: epoch}
	case 14:
		return command.FinishDetach{Volume: vol, Epoch: epoch, Clean: rapid.Bool().Draw(t, "clean")}
	case 15:
		return command.BeginExpand{Volume: vol, Target: size}
	case 16:
		return command.FinishExpand{Volume: vol, Size: size, ConfigVersion: version}
	case 17:
		return command.AbortExpand{Volume: vol, Target: size}
	case 18:
		return command.SetFilesystem{Volume: vol, Filesystem: volume.Filesystem{Phase: rapid.SampledFrom([]volume.FilesystemPhase{volume.Formatting, volume.Formatted}).Draw(t, "phase"), Type: "xfs"}}
	case 19:
		return command.BeginSnapshot{Now: now, ID: snap, Name: fmt.Sprint("snap ", rapid.IntRange(0, 2).Draw(t, "name")), Volume: vol}
	case 20:
		return command.FinishSnapshot{Cut: cut(t, s, snap)}
	case 21:
		if rapid.Bool().Draw(t, "begin") {
			return command.BeginDeleteSnapshot{Snapshot: snap}
		}
		return command.FinishDeleteSnapshot{Snapshot: snap}
	case 23, 24:
		return command.AddReplica{Volume: vol, Replica: volume.Replica{ID: replica(i, 2), Pool: rapid.SampledFrom([]volume.PoolID{"p1", "p3", "p4"}).Draw(t, "pool"), Role: volume.Filling}}
	case 25:
		return command.DropReplica{Volume: vol, Replica: rep}
	case 26:
		switch rapid.IntRange(0, 4).Draw(t, "how") {
		case 0:
			return command.LoseReplica{Volume: vol, Replica: rep}
		case 1:
			return command.ForgetPool{Pool: "p2"}
		}
		return command.FreeReplica{Volume: vol, Replica: rep}
	case 27, 28, 29:
		r := &replication.Reconfigure{Epoch: epoch, ConfigVersion: version}
		switch rapid.IntRange(0, 3).Draw(t, "change") {
		case 0:
			r.Remove = []volume.ReplicaID{rep}
		case 1:
			r.Add = []replication.Proof{{ID: rep, Incarnation: 1, BootID: 2}}
		case 2:
			r.Boots = []replication.Proof{{ID: rep, Incarnation: 3, BootID: 4}}
		}
		if r.Remove == nil && r.Add == nil && r.Boots == nil {
			return command.Commit{Volume: vol, Change: replication.Change{Attach: &replication.Attach{Node: "n1"}}}
		}
		return command.Commit{Volume: vol, Change: replication.Change{Reconfigure: r}}
	case 30:
		return command.Commit{Volume: vol, Change: replication.Change{ExpandCommit: &replication.ExpandCommit{Epoch: epoch, ConfigVersion: version, Size: size}}}
	case 31:
		return command.OpenEngine{Volume: vol, Node: "n1"}
	case 32:
		return command.CloseEngine{Volume: vol, Epoch: epoch, Clean: rapid.Bool().Draw(t, "clean")}
	case 33:
		return command.ForceDetach{Volume: vol, Epoch: epoch}
	case 34:
		return command.Salvage{Volume: vol, Replica: rep, Epoch: epoch, Seen: version, SeenEpoch: epoch}
	case 35:
		group := volume.GroupID(fmt.Sprint("group ", i))
		switch rapid.IntRange(0, 3).Draw(t, "step") {
		case 0, 1:
			return command.BeginGroup{Now: now, ID: group, Name: fmt.Sprint("group ", i%2), Volumes: []volume.ID{vol, "vol-00000000000000000000"}[:1+i%2],
				IDs: []volume.SnapshotID{volume.SnapshotID(fmt.Sprint("snap-a", i)), volume.SnapshotID(fmt.Sprint("snap-b", i))}[:1+i%2]}
		case 2:
			return command.FinishGroup{Group: group, Cuts: []command.Cut{cut(t, s, volume.SnapshotID(fmt.Sprint("snap-a", i))), cut(t, s, volume.SnapshotID(fmt.Sprint("snap-b", i)))}}
		}
		return command.BeginDeleteGroup{Group: group}
	case 36:
		return command.FinishDeleteSnapshot{Snapshot: volume.SnapshotID(fmt.Sprint("snap-", []string{"a", "b"}[i%2], i))}
	case 37:
		if rapid.Bool().Draw(t, "add") {
			return command.AddHolder{Snapshot: snap, Replica: rep}
		}
		if rapid.Bool().Draw(t, "compared") {
			return command.NoteDifference{Snapshot: snap, Differs: &volume.Difference{Offset: size, Alike: [][]volume.PoolID{{"p1"}, {"p2"}}}}
		}
		return command.DropHolder{Snapshot: snap, Pool: "p1", Lost: rapid.Bool().Draw(t, "lost")}
	case 38:
		return command.ModifyVolume{Volume: vol, Replicas: new(1 + i), MinInSync: new(1 + i/2)}
	case 39:
		return command.SetNodeState{Node: volume.NodeID(fmt.Sprint("n", i)), State: rapid.SampledFrom([]volume.NodeState{volume.NodeActive, volume.NodeDrained, volume.NodeEmptying}).Draw(t, "state"),
			Idle: []volume.NodeID{"n1"}}
	case 40:
		return command.RemoveNode{Node: volume.NodeID(fmt.Sprint("n", i))}
	case 41, 42, 43:
		if rapid.IntRange(0, 3).Draw(t, "orphan") > 0 {
			i, snap = 2, orphaned
		}
		any := rapid.SampledFrom([]volume.PoolID{"p1", "p2", "p3", "p4"})
		n := rapid.IntRange(3, 4).Draw(t, "copy")
		c := command.CopySnapshot{Now: now, Snapshot: snap, From: volume.Replica{ID: replica(i, n), Pool: any.Draw(t, "from"), Role: volume.InSync},
			To: volume.Replica{ID: replica(i, n+2), Pool: any.Draw(t, "to"), Role: volume.Filling}}
		if x, err := s.Snapshot(context.Background(), snap); err == nil && len(x.Holders) > 0 && rapid.IntRange(0, 4).Draw(t, "fits") > 0 {
			c.From.Pool = x.Holders[0].Pool
		}
		if c.To.Pool == c.From.Pool {
			c.To.Pool = "p9"
		}
		return c
	case 44, 45, 46: // what leads to a copy, and what is left of it
		i = 2
		if rec, err := s.Volume(context.Background(), volume.ID(fmt.Sprintf("vol-%020x", i))); err == nil {
			vol, epoch, version = rec.ID, rec.Epoch, rec.ConfigVersion
		}
		switch rep := replica(i, rapid.IntRange(3, 6).Draw(t, "of a copy")); rapid.IntRange(0, 7).Draw(t, "step") {
		case 0:
			return command.AddHolder{Snapshot: orphaned, Replica: rep}
		case 6:
			return command.DropHolder{Snapshot: orphaned, Pool: rapid.SampledFrom([]volume.PoolID{"p1", "p3"}).Draw(t, "pool")}
		case 7:
			return command.FreeHolder{Snapshot: orphaned, Pool: rapid.SampledFrom([]volume.PoolID{"p1", "p3"}).Draw(t, "pool")}
		case 1:
			return command.BeginDelete{Volume: vol}
		case 2, 3:
			return command.FreeReplica{Volume: vol, Replica: rep}
		case 4:
			return command.OpenEngine{Volume: vol, Node: "n1"}
		default:
			return command.Commit{Volume: vol, Change: replication.Change{Reconfigure: &replication.Reconfigure{Epoch: epoch, ConfigVersion: version,
				Add: []replication.Proof{{ID: rep, Incarnation: 1, BootID: 2}}}}}
		}
	default:
		if rapid.Bool().Draw(t, "lift") {
			return command.DeleteQuota{Tenant: fmt.Sprint("t", i%2)}
		}
		return command.SetQuota{Tenant: fmt.Sprint("t", i%2), Limit: volume.Amounts{LogicalBytes: size * 2, PhysicalBytes: size, Volumes: 2, Snapshots: 2}}
	}
}

func replica(i, n int) volume.ReplicaID { return volume.ReplicaID(fmt.Sprintf("rep-%020x-%d", i, n)) }

func cut(t *rapid.T, s *Store, id volume.SnapshotID) command.Cut {
	c := command.Cut{
		Snapshot: id, Number: uint64(rapid.IntRange(0, 2).Draw(t, "barrier")), ConfigVersion: volume.ConfigVersion(rapid.IntRange(1, 3).Draw(t, "version")),
		Holders: []volume.ReplicaID{replica(0, 0)},
	}
	x, err := s.Snapshot(context.Background(), id)
	if err != nil || rapid.IntRange(0, 4).Draw(t, "fits") == 0 {
		return c
	}
	if x.Cut != nil {
		c.Number, c.ConfigVersion = x.Cut.Number, x.Cut.ConfigVersion
	}
	for _, h := range x.Holders {
		if len(c.Holders) == 1 || rapid.Bool().Draw(t, "holder") {
			c.Holders = append(c.Holders, h.ID)
		}
	}
	c.Holders = slices.Compact(c.Holders[min(1, len(c.Holders)-1):])
	return c
}

// Any log leaves a sound state; the same log in another machine, with replays and other transactions, leaves the same
// bytes; a refusal changes nothing.
func TestAnyLog(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := open(t, ""), open(t, "")
		defer a.Close()
		defer b.Close()
		var index uint64
		withOrphan := rapid.Bool().Draw(rt, "a snapshot of a deleted volume")
		for _, s := range []*Store{a, b} {
			two := newVolume(1, "p1")
			two.Parameters.Replicas, two.Replicas = 2, append(two.Replicas, volume.Replica{ID: replica(1, 1), Pool: "p3", Role: volume.InSync})
			begin := []command.Command{
				node("n1", "p1", "p2"), node("n3", "p3", "p4"), command.CreateVolume{Volume: newVolume(0, "p1")}, command.FinishCreate{Volume: newVolume(0, "p1").ID},
				command.CreateVolume{Volume: two}, command.FinishCreate{Volume: two.ID},
			}
			if withOrphan {
				cut := 4 // commands
				begin = append(begin, slices.Insert(orphan(2, orphaned), cut, command.Command(command.AddHolder{Snapshot: orphaned, Replica: replica(2, 1)}))...)
			}
			index = uint64(len(begin))
			for i, c := range begin {
				if _, err := s.Apply(Entry{Index: uint64(i + 1), Kind: KindCommand, Body: mustEncode(rt, c)}); err != nil {
					rt.Fatal(err)
				}
			}
		}
		var batch []Entry
		flush := func() {
			if len(batch) == 0 {
				return
			}
			if rs, err := b.Apply(batch...); err != nil || len(rs) != len(batch) {
				rt.Fatal(len(rs), err)
			}
			batch = nil
		}
		for range rapid.IntRange(1, 40).Draw(rt, "commands") {
			c := draw(rt, a)
			before := dump(t, a.Machine)
			index++
			e := Entry{Index: index, Kind: KindCommand, Body: mustEncode(rt, c)}
			rs, err := a.Apply(e)
			if err != nil {
				rt.Fatalf("%T: %v", c, err)
			}
			r := rs[0]
			after := dump(t, a.Machine)
			if x, refused := r.(command.Refused); refused {
				delete(before, keyApplied)
				now := dump(t, a.Machine)
				delete(now, keyApplied)
				if d := cmp.Diff(before, now); d != "" {
					rt.Fatalf("%T was refused (%s) and changed\n%s", c, x.Message, d)
				}
			}
			verifyWith(rt, a.Machine)
			again, err := a.Apply(e)
			if err != nil || again[0] != (command.Done{}) {
				rt.Fatalf("replay of %T: %T %v", c, again, err)
			}
			if d := cmp.Diff(after, dump(t, a.Machine)); d != "" {
				rt.Fatalf("replay of %T changed\n%s", c, d)
			}
			if batch = append(batch, e); rapid.Bool().Draw(rt, "flush") {
				flush()
			}
		}
		flush()
		if d := cmp.Diff(dump(t, a.Machine), dump(t, b.Machine)); d != "" {
			rt.Fatalf("the same log, two states\n%s", d)
		}
	})
}

func mustEncode(t *rapid.T, c command.Command) []byte {
	b, err := command.Encode(c)
	if err != nil {
		t.Fatalf("%T: %v", c, err)
	}
	return b
}

func verify(t *testing.T, s *Store) {
	t.Helper()
	verifyWith(t, s.Machine)
}

// verifyWith compares every sum and index with what the records say.
func verifyWith(t interface {
	Fatalf(string, ...any)
	Fatal(...any)
}, s *Machine) {
	ctx := context.Background()
	vs, err := s.Volumes(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	ss, err := s.Snapshots(ctx, "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	ns, err := s.Nodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	qs, err := s.Quotas(ctx)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]volume.Amounts{}
	provisioned := map[volume.PoolID]int64{}
	index := map[string]string{}
	pinned := map[string]int{}
	live := map[volume.ID]bool{}
	at := map[volume.ID][]volume.Replica{}
	for _, v := range vs {
		at[v.ID] = slices.Concat(v.Replicas, v.Leaving)
		u := used[v.Tenant]
		var physical int64
		for _, r := range slices.Concat(v.Replicas, v.Leaving) {
			physical += r.PhysicalBytes
			provisioned[r.Pool] += reserved(v)
			index[replicas+string(r.ID)] = string(v.ID)
		}
		if physical != v.PhysicalBytes {
			t.Fatalf("replicas occupy %d: %+v", physical, v)
		}
		u.PhysicalBytes += v.PhysicalBytes
		if m := command.Membership(v); v.Kept != "" && v.State == volume.Ready && m.Check() != nil {
			t.Fatalf("%v: %+v", m.Check(), v)
		}
		if v.State != volume.Deleting && v.Kept == "" {
			live[v.ID] = true
			u.LogicalBytes += reserved(v)
			u.Volumes++
			index[volumeNames+v.Name] = string(v.ID)
			if m := command.Membership(v); v.Lost && (len(v.Replicas) > 0 || v.Attachment != nil) || !v.Lost && m.Check() != nil {
				t.Fatalf("%v: %+v", m.Check(), v)
			}
		}
		used[v.Tenant] = u
		if v.State == volume.Creating && v.Source != nil {
			pinned[pins+sourceID(v)]++
		}
		if a := v.Attachment; a != nil {
			pinned[attached+string(a.Node)]++
			if v.Owner != a.Node && !(a.Detaching && v.Owner == "") {
				t.Fatalf("attached and not owned: %+v", v)
			}
		}
		if unfinished(v) {
			index[unsettled+"v/"+string(v.ID)] = "\x01"
		}
		if v.Attachment != nil && v.State != volume.Ready || v.Target != 0 && v.Target <= v.Size || v.Size < volume.MinSize {
			t.Fatalf("impossible volume %+v", v)
		}
	}
	kept := map[volume.ID]bool{}
	for _, x := range ss {
		u := used[x.Tenant]
		var physical int64
		pools := map[volume.PoolID]bool{}
		for _, h := range slices.Concat(x.Holders, x.Leaving) {
			physical += h.PhysicalBytes
			if pools[h.Pool] {
				t.Fatalf("pool %s has two copies: %+v", h.Pool, x)
			}
			pools[h.Pool] = true
		}
		for _, h := range x.Leaving {
			for _, r := range at[x.Volume] {
				if r.Pool == h.Pool && x.State == volume.Ready {
					t.Fatalf("pool %s has replica %s, and is to free snapshot %+v", h.Pool, r.ID, x)
				}
			}
		}
		if physical != x.PhysicalBytes || len(x.Holders) == 0 && x.State == volume.Creating || (x.Cut != nil) != (x.State == volume.Creating) && x.State != volume.Deleting {
			t.Fatalf("impossible snapshot %+v", x)
		}
		u.PhysicalBytes += x.PhysicalBytes
		if x.State != volume.Deleting {
			u.Snapshots++
			if x.Group == "" {
				index[snapshotNames+x.Name] = string(x.ID)
			}
		}
		used[x.Tenant] = u
		index[snapshotsOf+string(x.Volume)+"/"+string(x.ID)] = "\x01"
		kept[x.Volume] = !live[x.Volume]
		if x.State != volume.Ready || len(x.Leaving) > 0 {
			index[unsettled+"s/"+string(x.ID)] = "\x01"
		}
	}
	ks, err := s.Remains(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range ks {
		if !kept[k.Volume] || k.Size < volume.MinSize || k.Protocol.Epoch == 0 {
			t.Fatalf("%+v is kept for no snapshot", k)
		}
		delete(kept, k.Volume)
	}
	for id, needs := range kept {
		if needs {
			t.Fatalf("nothing is kept of volume %s, which has snapshots and is deleted", id)
		}
	}
	gs, err := s.Groups(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range gs {
		if g.State != volume.Deleting {
			index[groupNames+g.Name] = string(g.ID)
		}
		for _, id := range g.Snapshots {
			if x, err := s.Snapshot(ctx, id); err != nil || x.Group != g.ID || x.State != g.State {
				t.Fatalf("group %+v has %+v, %v", g, x, err)
			}
		}
	}
	for _, q := range qs {
		if q.Used != used[q.Tenant] {
			t.Fatalf("tenant %s: use is %+v, records say %+v", q.Tenant, q.Used, used[q.Tenant])
		}
		delete(used, q.Tenant)
	}
	for tenant, u := range used {
		if u != (volume.Amounts{}) {
			t.Fatalf("tenant %s uses %+v, no sum says so", tenant, u)
		}
	}
	seen := map[volume.PoolID]bool{}
	for _, n := range ns {
		for _, p := range n.Pools {
			if p.Provisioned != provisioned[p.ID] || p.Node != n.ID || seen[p.ID] {
				t.Fatalf("pool %+v on node %s: records say %d are provisioned", p, n.ID, provisioned[p.ID])
			}
			seen[p.ID] = true
		}
	}
	for p, n := range provisioned {
		if n > 0 && !seen[p] {
			t.Fatalf("pool %s has volumes and no record", p)
		}
	}
	got := map[string]string{}
	gotPins := map[string]int{}
	err = s.read(ctx, func(r *reader) error {
		for _, prefix := range []string{volumeNames, replicas, unsettled, snapshotNames, snapshotsOf, groupNames} {
			if err := r.scan(prefix, "", func(k string, b []byte) (bool, error) {
				got[prefix+k] = string(b)
				return true, nil
			}); err != nil {
				return err
			}
		}
		for _, prefix := range []string{pins, attached} {
			if err := r.scan(prefix, "", func(k string, b []byte) (bool, error) {
				n, err := decode[int](b)
				gotPins[prefix+k] = n
				return true, err
			}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(index, got); d != "" {
		t.Fatalf("indexes: records -, keys +\n%s", d)
	}
	if d := cmp.Diff(pinned, gotPins); d != "" {
		t.Fatalf("counters: records -, keys +\n%s", d)
	}
}
