package control_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestAttach(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.register("n2", pool("p2", "n2", gib))
	v := w.mustCreate(create("v"))
	first := w.mustAttach(v.ID, "n1")
	again := w.mustAttach(v.ID, "n1")
	if first.Epoch != v.Epoch+1 || again.Epoch != first.Epoch || again.Attachment.Since != first.Attachment.Since {
		t.Errorf("epochs %d, %d, %d", v.Epoch, first.Epoch, again.Epoch)
	}
	block := volume.Capability{Access: volume.AccessBlock, Mode: volume.MultiNodeReaderOnly}
	for _, c := range []struct {
		name string
		r    control.Attach
		err  error
		says string
	}{
		{"other readonly", control.Attach{Volume: v.ID, Node: "n1", ReadOnly: true, Capability: mount()[0]}, volume.ErrExists, "n1"},
		{"other capability", control.Attach{Volume: v.ID, Node: "n1", Capability: block}, volume.ErrExists, "n1"},
		{"other node", control.Attach{Volume: v.ID, Node: "n2", Capability: mount()[0]}, volume.ErrInUse, "n1"},
		{"other node, many readers", control.Attach{Volume: v.ID, Node: "n2", Capability: block}, volume.ErrInUse, "n1"},
		{"unknown node", control.Attach{Volume: v.ID, Node: "n9", Capability: mount()[0]}, volume.ErrNotFound, "n9"},
		{"no node", control.Attach{Volume: v.ID, Capability: mount()[0]}, volume.ErrNotFound, ""},
		{"unknown volume", control.Attach{Volume: "none-exist-id", Node: "n1", Capability: mount()[0]}, volume.ErrNotFound, "none-exist-id"},
		{"device of many writers", control.Attach{Volume: v.ID, Node: "n1", Capability: volume.Capability{Access: volume.AccessBlock, Mode: volume.MultiNodeMultiWriter}}, volume.ErrInvalid, "SINGLE_NODE"},
		{"filesystem of many writers", control.Attach{Volume: v.ID, Node: "n1", Capability: volume.Capability{Access: volume.AccessMount, Mode: volume.MultiNodeMultiWriter}}, volume.ErrInvalid, "block"},
	} {
		_, err := w.Attach(ctx, c.r)
		wantErr(t, err, c.err)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %q does not say %q", c.name, err, c.says)
		}
	}
	if err := w.DeleteVolume(ctx, v.ID); !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), "n1") {
		t.Errorf("delete while attached: %v", err)
	}
	for _, c := range []struct {
		id   volume.ID
		node volume.NodeID
	}{{v.ID, "n2"}, {v.ID, "n9"}, {"none-exist-id", "n1"}} {
		wantErr(t, w.Detach(ctx, c.id, c.node), nil)
	}
	if v, _ := w.Volume(ctx, v.ID); v.Attachment == nil {
		t.Fatal("detaching another node took the attachment")
	}
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	v = w.mustAttach(v.ID, "n2")
	if v.Epoch != first.Epoch+1 {
		t.Errorf("epoch %d after %d", v.Epoch, first.Epoch)
	}
	w.check()
}

func TestRequiredLocality(t *testing.T) {
	w := newWorld(t)
	w.register("n2", pool("p2", "n2", gib))
	r := create("v")
	r.Parameters.DataLocality = volume.LocalityRequired
	r.Requisite = []volume.NodeID{"n1"}
	v := w.mustCreate(r)
	_, err := w.Attach(context.Background(), control.Attach{Volume: v.ID, Node: "n2", Capability: mount()[0]})
	wantErr(t, err, volume.ErrInUse)
	w.mustAttach(v.ID, "n1")
}

// A node that cannot be fenced keeps the volume, and whoever asks next ends the detach first.
func TestDetachOfADeadNode(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.register("n2", pool("p2", "n2", gib))
	v := w.mustAttach(w.mustCreate(create("v")).ID, "n1")
	w.agents.setDown("n1", true)
	wantErr(t, w.Detach(ctx, v.ID, "n1"), volume.ErrUnavailable)
	_, err := w.Attach(ctx, control.Attach{Volume: v.ID, Node: "n2", Capability: mount()[0]})
	if !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), "n1") {
		t.Errorf("attach elsewhere while the first node may write: %v", err)
	}
	if why, _ := w.Why(ctx, v.ID); !strings.Contains(why, "being detached from node n1") {
		t.Errorf("why: %s", why)
	}
	w.agents.setDown("n1", false)
	if got := w.mustAttach(v.ID, "n1"); got.Epoch != v.Epoch+1 || got.Attachment.Detaching {
		t.Errorf("%+v", got)
	}
	w.check()
}

func TestDeleteDoesNotWaitForADeadNode(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	x := w.mustSnapshot("s", v.ID)
	w.agents.setDown("n1", true)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	if vs, _, _ := w.Volumes(ctx, control.Page{}); len(vs) != 0 {
		t.Errorf("listed: %v", vs)
	}
	if vs, _, _ := w.Volumes(ctx, control.Page{All: true}); len(vs) != 1 {
		t.Errorf("listed with all: %v", vs)
	}
	if why, err := w.Why(ctx, v.ID); err != nil || !strings.Contains(why, "is deleted") {
		t.Errorf("why: %s %v", why, err)
	}
	w.agents.setDown("n1", false)
	second := w.mustCreate(create("v")) // the name is free
	if second.ID == v.ID {
		t.Error("the deleted volume came back")
	}
	w.reconcile()
	w.check()
}

func TestExpand(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	if err := w.SetQuota(ctx, "default", volume.Amounts{LogicalBytes: 10 * gib}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		required, limit int64
		want            int64
		err             error
	}{
		{gib, 0, gib, nil},
		{0, 0, gib, nil},
		{gib + 1, 0, gib + 4096, nil},
		{2 * gib, gib, 0, volume.ErrOutOfRange},
		{0, gib, 0, volume.ErrOutOfRange},
		{gib + 4097, gib + 4098, 0, volume.ErrOutOfRange},
		{-1, 0, 0, volume.ErrOutOfRange},
		{volume.MaxSize + 1, 0, 0, volume.ErrOutOfRange},
		{11 * gib, 0, 0, volume.ErrQuota},
		{10 * gib, 0, 10 * gib, nil},
		{gib, 0, 10 * gib, nil},
	} {
		got, err := w.ExpandVolume(ctx, v.ID, c.required, c.limit)
		wantErr(t, err, c.err)
		if got.Size != c.want {
			t.Errorf("expand to %d, limit %d: %d, want %d", c.required, c.limit, got.Size, c.want)
		}
		w.check()
	}
	_, err := w.ExpandVolume(ctx, "none-exist-id", gib, 0)
	wantErr(t, err, volume.ErrNotFound)
	if err := w.DeleteQuota(ctx, "default"); err != nil {
		t.Fatal(err)
	}
	_, err = w.ExpandVolume(ctx, v.ID, 101*gib, 0)
	wantErr(t, err, volume.ErrNoSpace)
	w.check()
}

func TestModify(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustAttach(w.mustCreate(create("v")).ID, "n1")
	n := func(i int64) *int64 { return &i }
	for _, c := range []struct {
		m    control.Modify
		want volume.QoS
		err  error
	}{
		{control.Modify{IOPS: n(5), Bandwidth: n(mib)}, volume.QoS{IOPS: 5, Bandwidth: mib}, nil},
		{control.Modify{}, volume.QoS{IOPS: 5, Bandwidth: mib}, nil},
		{control.Modify{IOPS: n(0)}, volume.QoS{Bandwidth: mib}, nil},
		{control.Modify{IOPS: n(7), Bandwidth: n(-1)}, volume.QoS{Bandwidth: mib}, volume.ErrInvalid},
	} {
		_, err := w.ModifyVolume(ctx, v.ID, c.m)
		wantErr(t, err, c.err)
		got, err := w.Volume(ctx, v.ID)
		if err != nil || got.QoS != c.want || w.agents.qos[v.ID] != c.want {
			t.Errorf("limits %+v, node %+v, want %+v (%v)", got.QoS, w.agents.qos[v.ID], c.want, err)
		}
	}
	_, err := w.ModifyVolume(ctx, "none-exist-id", control.Modify{IOPS: n(-1)})
	wantErr(t, err, volume.ErrNotFound)
	// A node that does not answer gets the limits later.
	w.agents.setDown("n1", true)
	_, err = w.ModifyVolume(ctx, v.ID, control.Modify{IOPS: n(9)})
	wantErr(t, err, nil)
	w.agents.setDown("n1", false)
	w.reconcile()
	if got := w.agents.qos[v.ID].IOPS; got != 9 {
		t.Errorf("the node has %d", got)
	}
}

func TestSnapshots(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	a, b := w.mustCreate(create("a")), w.mustCreate(create("b"))
	x := w.mustSnapshot("s", a.ID)
	if again := w.mustSnapshot("s", a.ID); again.ID != x.ID {
		t.Errorf("the same request made %s", again.ID)
	}
	_, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: b.ID})
	wantErr(t, err, volume.ErrExists)
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "t", Volume: "none-exist-id"})
	wantErr(t, err, volume.ErrNotFound)
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "t"})
	wantErr(t, err, volume.ErrNotFound)
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Volume: a.ID})
	wantErr(t, err, volume.ErrInvalid)
	wantErr(t, w.DeleteSnapshot(ctx, "none-exist-id"), nil)
	w.mustSnapshot("s2", b.ID)
	for _, c := range []struct {
		f    control.SnapshotFilter
		want int
	}{
		{control.SnapshotFilter{}, 2},
		{control.SnapshotFilter{Volume: a.ID}, 1},
		{control.SnapshotFilter{Snapshot: x.ID}, 1},
		{control.SnapshotFilter{Snapshot: x.ID, Volume: b.ID}, 0},
		{control.SnapshotFilter{Volume: "none-exist-id"}, 0},
		{control.SnapshotFilter{Volume: "../" + a.ID}, 0},
		{control.SnapshotFilter{Snapshot: "none-exist-id"}, 0},
	} {
		got, _, err := w.Snapshots(ctx, c.f, control.Page{})
		if err != nil || len(got) != c.want {
			t.Errorf("%+v: %d snapshots, want %d (%v)", c.f, len(got), c.want, err)
		}
	}
	y := w.mustSnapshot("s3", a.ID)
	fn := func(control.Extent) error { return nil }
	for _, c := range []struct {
		snap, base volume.SnapshotID
		offset     int64
		err        error
	}{
		{x.ID, "", 0, nil}, {y.ID, x.ID, gib, nil}, {x.ID, "", gib + 1, volume.ErrOutOfRange}, {x.ID, "", -1, volume.ErrOutOfRange},
		{"none-exist-id", "", 0, volume.ErrNotFound}, {x.ID, "none-exist-id", 0, volume.ErrNotFound},
	} {
		wantErr(t, w.Extents(ctx, c.snap, c.base, c.offset, fn), c.err)
	}
	other := w.mustSnapshot("s4", b.ID)
	wantErr(t, w.Extents(ctx, y.ID, other.ID, 0, fn), volume.ErrInvalid)
	stop := errors.New("stop")
	wantErr(t, w.Extents(ctx, x.ID, "", 0, func(control.Extent) error { return stop }), stop)
	w.check()
}

func TestQuotas(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	set := func(a volume.Amounts) {
		t.Helper()
		if err := w.SetQuota(ctx, "default", a); err != nil {
			t.Fatal(err)
		}
	}
	v := w.mustCreate(create("v"))
	x := w.mustSnapshot("s", v.ID)
	all := func(want error, says string) {
		t.Helper()
		clone, restore := create("c"), create("r")
		clone.Source, restore.Source = &volume.Source{Volume: v.ID}, &volume.Source{Snapshot: x.ID}
		_, e1 := w.CreateVolume(ctx, create("v2"))
		_, e2 := w.CreateVolume(ctx, clone)
		_, e3 := w.CreateVolume(ctx, restore)
		for _, err := range []error{e1, e2, e3} {
			wantErr(t, err, want)
			if err != nil && !strings.Contains(err.Error(), says) {
				t.Errorf("%q does not say %q", err, says)
			}
		}
		w.check()
	}
	set(volume.Amounts{Volumes: 1})
	all(volume.ErrQuota, "quota of volumes is 1, 1 are in use and 1 are asked for")
	set(volume.Amounts{LogicalBytes: 2*gib - 1})
	all(volume.ErrQuota, "quota of logical bytes")
	_, err := w.ExpandVolume(ctx, v.ID, 2*gib, 0)
	wantErr(t, err, volume.ErrQuota)
	set(volume.Amounts{Snapshots: 1})
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s2", Volume: v.ID})
	wantErr(t, err, volume.ErrQuota)
	set(volume.Amounts{PhysicalBytes: gib})
	report := control.Usage{Pools: []volume.Pool{pool("p1", "n1", 100*gib)},
		Replicas: map[volume.ReplicaID]int64{v.Replicas[0].ID: gib / 2}, Snapshots: map[volume.SnapshotID]int64{x.ID: gib / 2}}
	if err := w.ReportUsage(ctx, "n1", report); err != nil {
		t.Fatal(err)
	}
	all(volume.ErrQuota, "quota of physical bytes is 1073741824, 1073741824 are in use")
	_, err = w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s2", Volume: v.ID})
	wantErr(t, err, volume.ErrQuota)
	_, err = w.ExpandVolume(ctx, v.ID, 2*gib, 0)
	wantErr(t, err, volume.ErrQuota)
	if why, err := w.Why(ctx, v.ID); err != nil || !strings.Contains(why, "on disk") {
		t.Errorf("why: %s %v", why, err)
	}
	wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
	w.check()
	_, err = w.CreateVolume(ctx, create("v2"))
	wantErr(t, err, nil)
	wantErr(t, w.SetQuota(ctx, "", volume.Amounts{}), volume.ErrInvalid)
	wantErr(t, w.SetQuota(ctx, "t", volume.Amounts{Volumes: -1}), volume.ErrInvalid)
	wantErr(t, w.ReportUsage(ctx, "n9", report), volume.ErrNotFound)
}

func TestPaging(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	want := map[volume.ID]bool{}
	for i := range 7 {
		r := create(fmt.Sprint("v", i))
		r.RequiredBytes = mib
		want[w.mustCreate(r).ID] = true
	}
	for _, size := range []int{0, 1, 2, 3, 6, 7, 8} {
		got := map[volume.ID]bool{}
		token, pages := "", 0
		for {
			vs, next, err := w.Volumes(ctx, control.Page{Max: size, Token: token})
			if err != nil {
				t.Fatal(err)
			}
			if size > 0 && len(vs) > size {
				t.Errorf("page of %d has %d", size, len(vs))
			}
			for _, v := range vs {
				if got[v.ID] {
					t.Errorf("%s is listed twice", v.ID)
				}
				got[v.ID] = true
			}
			pages++
			if token = next; token == "" {
				break
			}
		}
		if len(got) != len(want) {
			t.Errorf("pages of %d: %d volumes, want %d", size, len(got), len(want))
		}
		if size > 0 && pages != (len(want)+size-1)/size {
			t.Errorf("pages of %d: %d pages", size, pages)
		}
	}
	for _, token := range []string{"invalid-token", "vol-", "vol-0123456789abcdef012g", "7"} {
		_, _, err := w.Volumes(ctx, control.Page{Token: token})
		wantErr(t, err, volume.ErrStale)
		_, _, err = w.Snapshots(ctx, control.SnapshotFilter{}, control.Page{Token: token})
		wantErr(t, err, volume.ErrStale)
	}
	_, _, err := w.Volumes(ctx, control.Page{Max: -1})
	wantErr(t, err, volume.ErrInvalid)
}

func TestCapacityIsWhatACreateAccepts(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.register("n2", pool("p2", "n2", 10*gib+1))
	required := volume.Parameters{DataLocality: volume.LocalityRequired}
	two := volume.Parameters{Replicas: 2, DataLocality: volume.LocalityRequired}
	anywhere := volume.Parameters{DataLocality: volume.LocalityNone}
	for _, q := range []control.CapacityQuery{
		{}, {Parameters: required, Node: "n1"}, {Parameters: required, Node: "n2"}, {Parameters: volume.Parameters{Replicas: 2}},
		{Node: "n2", Parameters: two}, {Node: "n2", Parameters: anywhere},
	} {
		c, err := w.Capacity(ctx, q)
		if err != nil || c.MaximumVolume <= 0 || c.Available < c.MaximumVolume {
			t.Fatalf("%+v: %+v %v", q, c, err)
		}
		r := create("v")
		r.Parameters, r.RequiredBytes = q.Parameters, c.MaximumVolume
		if q.Node != "" {
			r.Requisite = []volume.NodeID{q.Node}
		}
		v := w.mustCreate(r)
		after, err := w.Capacity(ctx, q)
		if err != nil || after.Available < 0 || after.MaximumVolume < 0 || after.MaximumVolume > c.MaximumVolume {
			t.Errorf("%+v: %+v after %+v, %v", q, after, c, err)
		}
		r.Name, r.RequiredBytes = "one more", c.MaximumVolume+4096
		wantErr(t, w.DeleteVolume(ctx, v.ID), nil)
		_, err = w.CreateVolume(ctx, r)
		wantErr(t, err, volume.ErrNoSpace)
	}
	w.register("n3")
	for node, want := range map[volume.NodeID]int64{"n1": 100 * gib, "n2": 10 * gib, "n3": 100 * gib} {
		c, err := w.Capacity(ctx, control.CapacityQuery{Node: node})
		if err != nil || c.MaximumVolume != want {
			t.Errorf("%s, where local is preferred: %+v %v", node, c, err)
		}
	}
	for _, q := range []control.CapacityQuery{{Node: "n9"}, {Parameters: volume.Parameters{Replicas: 3}}, {Parameters: volume.Parameters{Pool: "fast"}}} {
		c, err := w.Capacity(ctx, q)
		if err != nil || c.MaximumVolume != 0 {
			t.Errorf("%+v: %+v %v", q, c, err)
		}
	}
}

func TestHealth(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	health := func(want ...volume.Severity) {
		t.Helper()
		h, err := w.Health(ctx, v.ID)
		if err != nil {
			t.Fatal(err)
		}
		var got []volume.Severity
		for _, c := range h.Conditions {
			got = append(got, c.Severity)
			if c.Message == "" || c.Reason == "" {
				t.Errorf("%+v says too little", c)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("conditions %v, want %v", h.Conditions, want)
		}
		us, _, err := w.Unhealthy(ctx, control.Page{})
		if err != nil || len(us) != min(1, len(want)) {
			t.Errorf("unhealthy: %v %v", us, err)
		}
	}
	health()
	w.agents.setDown("n1", true)
	health(volume.Inaccessible)
	w.agents.setDown("n1", false)
	w.agents.conditions = []volume.Condition{{Severity: volume.DataLoss, Reason: "ChecksumMismatch", Message: "extent 7 is damaged; restore a snapshot"}}
	health(volume.DataLoss)
	w.agents.conditions = nil
	w.now = w.now.Add(time.Hour)
	health(volume.Inaccessible)
	if why, _ := w.Why(ctx, v.ID); !strings.Contains(why, "Node n1 has not reported for 1h0m0s") {
		t.Errorf("why: %s", why)
	}
	w.register("n1") // without its pool
	health(volume.Inaccessible)
	w.register("n1", pool("p1", "n1", 100*gib))
	health()
	_, err := w.Health(ctx, "none-exist-id")
	wantErr(t, err, volume.ErrNotFound)
	_, err = w.Why(ctx, "none-exist-id")
	wantErr(t, err, volume.ErrNotFound)
	w.check()
}

// A host that comes back with another name brings its pool, and what is on it, along.
func TestARenamedHostKeepsItsVolumes(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustAttach(w.mustCreate(create("v")).ID, "n1")
	p := pool("p1", "new-name", 100*gib)
	wantErr(t, w.RegisterNode(ctx, volume.Node{ID: "new-name", Pools: []volume.Pool{p}}), volume.ErrBusy)
	w.now = w.now.Add(3 * time.Minute)
	w.register("new-name", p)
	nodes, err := w.Nodes(ctx)
	if err != nil || len(nodes) != 1 || nodes[0].ID != "new-name" || nodes[0].Pools[0].Provisioned != gib {
		t.Fatalf("nodes %+v, %v", nodes, err)
	}
	got, err := w.Volume(ctx, v.ID)
	if err != nil || got.Replicas[0].Node != "new-name" {
		t.Errorf("%+v %v", got.Replicas, err)
	}
	wantErr(t, w.Detach(ctx, v.ID, ""), nil)
	w.mustAttach(v.ID, "new-name")
}

func TestStraysAreShownAndKept(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	u := control.Usage{Pools: []volume.Pool{pool("p1", "n1", 100*gib)},
		Replicas:  map[volume.ReplicaID]int64{v.Replicas[0].ID: 1, "rep-00000000000000000000-0": 2, "odd": 3},
		Snapshots: map[volume.SnapshotID]int64{"snap-00000000000000000000": 4, "clone-" + volume.SnapshotID(strings.TrimPrefix(string(v.ID), "vol-")): 5}}
	for pass, want := range []int{0, 4, 4} {
		xs, err := w.Strays(ctx)
		if err != nil || (pass > 0 && len(xs) != want*min(1, pass-1)) {
			t.Errorf("pass %d: %v %v", pass, xs, err)
		}
		if err := w.ReportUsage(ctx, "n1", u); err != nil {
			t.Fatal(err)
		}
	}
	w.reconcile()
	w.check()
}

// What a node sealed for a snapshot that was given up, and lets go of neither when it is asked nor when it is restarted, is found
// by its report; so is what an order cut that came after all. What was given up by nobody stays.
func TestSealsOfGivenUpSnapshotsAreFreed(t *testing.T) {
	for _, attached := range []bool{true, false} {
		t.Run(fmt.Sprint("attached ", attached), func(t *testing.T) { sealsOfGivenUpSnapshotsAreFreed(t, attached) })
	}
}

func sealsOfGivenUpSnapshotsAreFreed(t *testing.T, attached bool) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	if attached {
		w.mustAttach(v.ID, "n1")
	}
	w.agents.scripted["CutSnapshot"] = fmt.Errorf("it took too long: %w", volume.ErrBusy)
	w.mustSnapshot("s", v.ID)
	got := w.get(v.ID).GivenUp
	if len(got) != 1 || (got[0].Number == 1) != attached {
		t.Fatalf("given up: %+v", got)
	}
	late, other := got[0].Snapshot, volume.SnapshotID("snap-00000000000000000000")
	for _, id := range []volume.SnapshotID{late, other} {
		w.agents.snapshots[id+"@p1"] = fakeReplica{pool: "p1"}
	}
	for pass := range 4 {
		w.now = w.now.Add(time.Minute)
		u := control.Usage{Pools: []volume.Pool{pool("p1", "n1", 100*gib)}, Snapshots: map[volume.SnapshotID]int64{}}
		_, ss := w.agents.held()
		for _, id := range ss {
			u.Snapshots[volume.SnapshotID(strings.TrimSuffix(string(id), "@p1"))] = 1
		}
		wantErr(t, w.ReportUsage(ctx, "n1", u), nil)
		if _, there := w.agents.snapshots[late+"@p1"]; there != (pass == 0) {
			t.Errorf("pass %d: it is there: %t", pass, there)
		}
	}
	if xs, err := w.Strays(ctx); err != nil || len(xs) != 1 || xs[0].Snapshot != other {
		t.Errorf("strays %+v %v", xs, err)
	}
	delete(w.agents.snapshots, other+"@p1")
	for i := range 2 * volume.MaxGivenUp {
		w.agents.scripted["CutSnapshot"] = volume.ErrBusy
		w.mustSnapshot(fmt.Sprint("t", i), v.ID)
	}
	if got = w.get(v.ID).GivenUp; len(got) != volume.MaxGivenUp || got[0].Snapshot == late {
		t.Errorf("%d given up are remembered", len(got))
	}
	w.check()
}

// A disk that refuses to let go of what was given up does not make its node one that is away.
func TestANodeIsThereWhateverItsDisksDo(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	w.mustAttach(v.ID, "n1")
	w.agents.scripted["CutSnapshot"] = volume.ErrBusy
	w.mustSnapshot("s", v.ID)
	late := w.get(v.ID).GivenUp[0].Snapshot
	u := control.Usage{Pools: []volume.Pool{pool("p1", "n1", 100*gib)}, Snapshots: map[volume.SnapshotID]int64{late: 1}}
	for range 3 {
		w.now = w.now.Add(time.Minute)
		w.agents.script("DeleteSnapshot", volume.ErrUnavailable)
		wantErr(t, w.ReportUsage(ctx, "n1", u), nil)
		if n, err := w.Node(ctx, "n1"); err != nil || int64(n.LastSeen) != w.now.UnixNano() {
			t.Errorf("the node was seen at %d, it is %d (%v)", n.LastSeen, w.now.UnixNano(), err)
		}
	}
}

func TestUsageReportOfAnySize(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	u := control.Usage{Replicas: map[volume.ReplicaID]int64{v.Replicas[0].ID: 77}, Snapshots: map[volume.SnapshotID]int64{}}
	for i := range 1000 {
		u.Replicas[volume.ReplicaID(fmt.Sprint("a", i))] = 1
		u.Snapshots[volume.SnapshotID(fmt.Sprint("a", i))] = 1
	}
	for i := range 70 {
		r := create(fmt.Sprint("many ", i))
		r.RequiredBytes = mib
		u.Replicas[w.mustCreate(r).Replicas[0].ID] = 5
	}
	if err := w.ReportUsage(ctx, "n1", u); err != nil {
		t.Fatal(err)
	}
	if v, _ := w.Volume(ctx, v.ID); v.PhysicalBytes != 77 {
		t.Errorf("physical bytes %d", v.PhysicalBytes)
	}
	if qs, _ := w.Quotas(ctx); len(qs) != 1 || qs[0].Used.PhysicalBytes != 77+70*5 {
		t.Errorf("quotas %+v", qs)
	}
	w.check()
}

func TestReady(t *testing.T) {
	w := newWorld(t)
	wantErr(t, w.Ready(context.Background()), nil)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.Ready(context.Background()), volume.ErrUnavailable)
	_, err := w.CreateVolume(context.Background(), create("v"))
	wantErr(t, err, volume.ErrUnavailable)
}

type auditLog []string

func (a *auditLog) Record(_ context.Context, action, object, detail string, outcome error) {
	*a = append(*a, fmt.Sprintf("%s %v", action, outcome == nil))
}

type auditDetails []string

func (a *auditDetails) Record(_ context.Context, action, _, detail string, outcome error) {
	*a = append(*a, fmt.Sprintf("%s %v: %s", action, outcome == nil, detail))
}

// The audit log has of a change what was asked for, also where it was refused.
func TestAuditOfAModify(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.mustCreate(create("v"))
	var log auditDetails
	w.Service = control.New(w.store, w.agents, control.Options{Audit: &log})
	iops, nine, odd := int64(200), 9, volume.DataLocality("odd")
	if _, err := w.ModifyVolume(ctx, v.ID, control.Modify{IOPS: &iops}); err != nil {
		t.Fatal(err)
	}
	for _, m := range []control.Modify{{Replicas: &nine}, {DataLocality: &odd}} {
		_, err := w.ModifyVolume(ctx, v.ID, m)
		wantErr(t, err, volume.ErrInvalid)
	}
	want := `volume.modify true: IOPS 0 to 200
volume.modify false: replicas 1 to 9
volume.modify false: dataLocality preferred to odd`
	if got := strings.Join(log, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestEveryChangeIsAudited(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	var log auditLog
	w.Service = control.New(w.store, w.agents, control.Options{Audit: &log, Now: func() time.Time { return w.now }})
	v := w.mustCreate(create("v"))
	w.mustCreate(create("v")) // nothing changes
	_, _ = w.CreateVolume(ctx, control.CreateVolume{Name: "w", Capabilities: mount(), RequiredBytes: 1000 * gib})
	w.mustAttach(v.ID, "n1")
	w.mustAttach(v.ID, "n1")
	_ = w.DeleteVolume(ctx, v.ID)
	_ = w.Detach(ctx, v.ID, "")
	_, _ = w.ExpandVolume(ctx, v.ID, 2*gib, 0)
	x := w.mustSnapshot("s", v.ID)
	_ = w.DeleteSnapshot(ctx, x.ID)
	_ = w.SetQuota(ctx, "t", volume.Amounts{Volumes: 1})
	_ = w.DeleteQuota(ctx, "t")
	_ = w.DeleteVolume(ctx, v.ID)
	want := "volume.create true, volume.create false, volume.attach true, volume.delete false, volume.detach true, volume.expand true, " +
		"snapshot.create true, snapshot.delete true, quota.set true, quota.delete true, volume.delete true"
	if got := strings.Join(log, ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	log = nil
	v = w.mustCreate(create("v"))
	w.agents.script("DeleteReplica", volume.ErrUnavailable)
	_ = w.DeleteVolume(ctx, v.ID)
	for range 3 {
		w.agents.script("DeleteReplica", volume.ErrUnavailable)
		_ = w.ResumeVolume(ctx, v.ID)
	}
	w.reconcile()
	w.agents.script("CreateReplica", volume.ErrUnavailable)
	_, _ = w.CreateVolume(ctx, create("w"))
	w.agents.script("CreateReplica", volume.ErrNoSpace)
	w.reconcile() // undoes it
	want = "volume.create true, volume.delete true, volume.free true, volume.create false, volume.create false"
	if got := strings.Join(log, ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
