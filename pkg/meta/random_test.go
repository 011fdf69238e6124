package meta

import (
	"context"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// draw makes a command about few things, so that they meet.
func draw(t *rapid.T) command.Command {
	i := rapid.IntRange(0, 3).Draw(t, "i")
	vol := volume.ID(fmt.Sprintf("vol-%020x", i))
	snap := volume.SnapshotID(fmt.Sprintf("snap-%020x", i))
	size := int64(rapid.IntRange(1, 40).Draw(t, "GiB")) * gib
	now := volume.Timestamp(rapid.Int64Range(0, 1e12).Draw(t, "now"))
	switch rapid.IntRange(0, 22).Draw(t, "kind") {
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
		return command.BeginDelete{Volume: vol}
	case 11:
		return command.FinishDelete{Volume: vol}
	case 12:
		return command.Attach{Now: now, Volume: vol, Node: volume.NodeID(fmt.Sprint("n", rapid.IntRange(1, 2).Draw(t, "node"))),
			Capability: volume.Capability{Access: volume.AccessBlock, Mode: volume.SingleNodeWriter}}
	case 13:
		return command.BeginDetach{Volume: vol, Epoch: volume.Epoch(rapid.IntRange(0, 6).Draw(t, "epoch"))}
	case 14:
		return command.FinishDetach{Volume: vol, Epoch: volume.Epoch(rapid.IntRange(0, 6).Draw(t, "epoch"))}
	case 15:
		return command.BeginExpand{Volume: vol, Target: size}
	case 16:
		return command.FinishExpand{Volume: vol, Size: size}
	case 17:
		return command.AbortExpand{Volume: vol, Target: size}
	case 18:
		return command.SetFilesystem{Volume: vol, Filesystem: volume.Filesystem{Phase: rapid.SampledFrom([]volume.FilesystemPhase{volume.Formatting, volume.Formatted}).Draw(t, "phase"), Type: "xfs"}}
	case 19:
		return command.BeginSnapshot{Now: now, ID: snap, Name: fmt.Sprint("snap ", rapid.IntRange(0, 2).Draw(t, "name")), Volume: vol}
	case 20:
		return command.FinishSnapshot{Snapshot: snap}
	case 21:
		if rapid.Bool().Draw(t, "begin") {
			return command.BeginDeleteSnapshot{Snapshot: snap}
		}
		return command.FinishDeleteSnapshot{Snapshot: snap}
	default:
		if rapid.Bool().Draw(t, "lift") {
			return command.DeleteQuota{Tenant: fmt.Sprint("t", i%2)}
		}
		return command.SetQuota{Tenant: fmt.Sprint("t", i%2), Limit: volume.Amounts{LogicalBytes: size * 2, PhysicalBytes: size, Volumes: 2, Snapshots: 2}}
	}
}

// Any log leaves a sound state; the same log in another machine, with replays and other transactions, leaves the same
// bytes; a refusal changes nothing.
func TestAnyLog(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := open(t, ""), open(t, "")
		defer a.Close()
		defer b.Close()
		for _, s := range []*Store{a, b} {
			if _, err := s.Apply(Entry{Index: 1, Kind: KindCommand, Body: mustEncode(rt, node("n1", "p1", "p2"))}); err != nil {
				rt.Fatal(err)
			}
		}
		var batch []Entry
		index := uint64(1)
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
			c := draw(rt)
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
	for _, v := range vs {
		u := used[v.Tenant]
		u.PhysicalBytes += v.PhysicalBytes
		if v.State != volume.Deleting {
			u.LogicalBytes += reserved(v)
			u.Volumes++
			index[volumeNames+v.Name] = string(v.ID)
		}
		used[v.Tenant] = u
		for _, r := range v.Replicas {
			provisioned[r.Pool] += reserved(v)
			index[replicas+string(r.ID)] = string(v.ID)
		}
		if v.State == volume.Creating && v.Source != nil {
			pinned[pins+sourceID(v)]++
		}
		if v.Attachment != nil {
			pinned[attached+string(v.Attachment.Node)]++
		}
		if v.State != volume.Ready || v.Target != 0 || (v.Attachment != nil && v.Attachment.Detaching) {
			index[unsettled+"v/"+string(v.ID)] = "\x01"
		}
		if v.Attachment != nil && v.State != volume.Ready || v.Target != 0 && v.Target <= v.Size || v.Size < volume.MinSize {
			t.Fatalf("impossible volume %+v", v)
		}
	}
	for _, x := range ss {
		u := used[x.Tenant]
		u.PhysicalBytes += x.PhysicalBytes
		if x.State != volume.Deleting {
			u.Snapshots++
			index[snapshotNames+x.Name] = string(x.ID)
		}
		used[x.Tenant] = u
		index[snapshotsOf+string(x.Volume)+"/"+string(x.ID)] = "\x01"
		if x.State != volume.Ready {
			index[unsettled+"s/"+string(x.ID)] = "\x01"
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
		for _, prefix := range []string{volumeNames, replicas, unsettled, snapshotNames, snapshotsOf} {
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
