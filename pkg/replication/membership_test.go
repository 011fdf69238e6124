package replication

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func testMembership(t testing.TB) Membership {
	t.Helper()
	m, err := NewMembership("vol", 1<<20, 1, []Member{{ID: "a", Incarnation: 1}, {ID: "b", Incarnation: 2}, {ID: "c", Incarnation: 3}})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustApply(t testing.TB, m Membership, cs ...Change) Membership {
	t.Helper()
	for _, c := range cs {
		n, err := m.Apply(c)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		m = n
	}
	return m
}

func attach(node volume.NodeID) Change { return Change{Attach: &Attach{Node: node, Force: true}} }

func remove(epoch volume.Epoch, version volume.ConfigVersion, ids ...volume.ReplicaID) Change {
	return Change{Reconfigure: &Reconfigure{Epoch: epoch, ConfigVersion: version, Remove: ids}}
}

func add(epoch volume.Epoch, version volume.ConfigVersion, id volume.ReplicaID) Change {
	return Change{Reconfigure: &Reconfigure{Epoch: epoch, ConfigVersion: version, Add: []Proof{{ID: id, Incarnation: 9, BootID: 9}}}}
}

func TestApplyRefuses(t *testing.T) {
	detached := testMembership(t)
	attached := mustApply(t, detached, attach("n1"))
	deleted := mustApply(t, detached, Change{Tombstone: &Tombstone{}})
	pending := mustApply(t, attached, Change{Prepare: &Prepare{Snapshot: "s"}})
	for name, c := range map[string]struct {
		from   Membership
		change Change
		want   error
	}{
		"two changes at once":              {attached, Change{Tombstone: &Tombstone{}, Prepare: &Prepare{Snapshot: "s"}}, volume.ErrInvalid},
		"no change":                        {attached, Change{}, volume.ErrInvalid},
		"attach elsewhere":                 {attached, Change{Attach: &Attach{Node: "n2"}}, ErrAttached},
		"attach of nobody":                 {detached, Change{Attach: &Attach{}}, volume.ErrInvalid},
		"attach of a deleted volume":       {deleted, attach("n1"), ErrDeleted},
		"an older epoch":                   {attached, remove(0, 1, "a"), ErrStaleEpoch},
		"no engine":                        {detached, remove(0, 1, "a"), ErrStaleEpoch},
		"an older version":                 {attached, remove(1, 0, "a"), ErrStaleVersion},
		"all removed":                      {attached, remove(1, 1, "a", "b", "c"), ErrLastMember},
		"a stranger removed":               {attached, remove(1, 1, "z"), ErrUnknownMember},
		"a stranger added":                 {attached, add(1, 1, "z"), ErrUnknownMember},
		"added without proof":              {attached, Change{Reconfigure: &Reconfigure{Epoch: 1, ConfigVersion: 1, Add: []Proof{{ID: "a"}}}}, volume.ErrInvalid},
		"a detach of an older epoch":       {mustApply(t, attached, attach("n1")), Change{Detach: &Detach{Epoch: 1, Clean: true}}, ErrStaleEpoch},
		"a member dropped while attached":  {attached, Change{DropReplica: &DropReplica{ID: "a"}}, ErrMemberInSync},
		"the last member dropped":          {mustApply(t, attached, remove(1, 1, "a", "b"), Change{Detach: &Detach{Clean: true}}), Change{DropReplica: &DropReplica{ID: "c"}}, ErrLastMember},
		"a replica twice":                  {detached, Change{AddReplica: &Member{ID: "a"}}, volume.ErrExists},
		"a replica of a deleted volume":    {deleted, Change{AddReplica: &Member{ID: "d"}}, ErrDeleted},
		"a snapshot while detached":        {detached, Change{Prepare: &Prepare{Snapshot: "s"}}, volume.ErrInUse},
		"two snapshots":                    {pending, Change{Prepare: &Prepare{Snapshot: "t"}}, ErrBarrierPending},
		"a snapshot of another number":     {pending, Change{Complete: &Complete{Number: 2, ConfigVersion: 1, Holders: []volume.ReplicaID{"a"}}}, ErrNoBarrier},
		"a snapshot of another version":    {pending, Change{Complete: &Complete{Number: 1, ConfigVersion: 2, Holders: []volume.ReplicaID{"a"}}}, ErrNoBarrier},
		"a snapshot without holders":       {pending, Change{Complete: &Complete{Number: 1, ConfigVersion: 1}}, volume.ErrInvalid},
		"a snapshot after the next attach": {mustApply(t, pending, attach("n2")), Change{Complete: &Complete{Number: 1, ConfigVersion: 1, Holders: []volume.ReplicaID{"a"}}}, ErrNoBarrier},
		"abort of nothing":                 {attached, Change{AbortBarrier: &AbortBarrier{Number: 1}}, ErrNoBarrier},
		"a size nobody asked for":          {attached, Change{ExpandCommit: &ExpandCommit{Epoch: 1, ConfigVersion: 1, Size: 2 << 20}}, volume.ErrInvalid},
		"a size of an older epoch":         {attached, Change{ExpandCommit: &ExpandCommit{Epoch: 0, ConfigVersion: 1, Size: 1 << 20}}, ErrStaleEpoch},
		"minInSync 0":                      {attached, Change{SetMinInSync: &SetMinInSync{}}, volume.ErrInvalid},
		"salvage while attached":           {attached, Change{Salvage: &Salvage{ID: "a"}}, ErrAttached},
		"salvage of a stranger":            {detached, Change{Salvage: &Salvage{ID: "z"}}, ErrUnknownMember},
	} {
		n, err := c.from.Apply(c.change)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err != nil && n.Volume != "" {
			t.Errorf("%s: a record came with the error", name)
		}
	}
}

func TestReconfigure(t *testing.T) {
	m := mustApply(t, testMembership(t), attach("n1"), remove(1, 1, "a"))
	a, _ := m.Member("a")
	if a.Role != RoleSTALE || a.RemovedAt != 2 || m.ConfigVersion != 2 {
		t.Fatalf("removed: %+v", m)
	}
	m = mustApply(t, m, add(1, 2, "a"))
	a, _ = m.Member("a")
	if a.Role != RoleISR || a.RemovedAt != 0 || a.Incarnation != 9 || a.BootID != 9 || m.ConfigVersion != 3 {
		t.Fatalf("added: %+v", m)
	}
}

func TestLeaseIsOwed(t *testing.T) {
	m := mustApply(t, testMembership(t), attach("n1"))
	if !m.SkipLease || m.Clean {
		t.Fatal("a new volume owes no lease")
	}
	for name, c := range map[string]struct {
		change Change
		skip   bool
	}{
		"taken over":      {attach("n2"), false},
		"forced detach":   {Change{Detach: &Detach{}}, false},
		"clean detach":    {Change{Detach: &Detach{Clean: true}}, true},
		"assigned anew":   {Change{Attach: &Attach{Node: "n2", Force: true, Assign: true}}, false},
		"salvage":         {Change{Detach: &Detach{}}, false},
		"an older detach": {Change{Detach: &Detach{Epoch: 1, Clean: true}}, true},
	} {
		n := mustApply(t, m, c.change)
		if name == "salvage" {
			n = mustApply(t, n, Change{Salvage: &Salvage{ID: "a"}})
		}
		if n = mustApply(t, n, attach("n3")); n.SkipLease != c.skip {
			t.Errorf("%s: the next attach skips the lease: %v", name, n.SkipLease)
		}
	}
	// Until the node attaches for an engine, the lease that was not owed stays so.
	n := mustApply(t, m, Change{Detach: &Detach{Clean: true}}, Change{Attach: &Attach{Node: "n2", Assign: true}})
	if _, err := NewEngine(EngineConfig{Node: "n2", Geometry: DefaultGeometry(), Timing: DefaultTiming()}, n, 0); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("an engine was made in an epoch that has none: %v", err)
	}
	if n = mustApply(t, n, attach("n2")); !n.SkipLease || n.Clean {
		t.Errorf("assigned, then attached: %+v", n)
	}
}

func TestSalvage(t *testing.T) {
	m := mustApply(t, testMembership(t), attach("n1"), remove(1, 1, "a", "b"), Change{Detach: &Detach{}}, Change{Salvage: &Salvage{ID: "a", Seen: 7, SeenEpoch: 5}})
	if m.Lineage != 2 || m.ConfigVersion != 8 || m.Epoch != 6 {
		t.Fatalf("%+v", m)
	}
	if diff := cmp.Diff([]volume.ReplicaID{"a"}, m.ISR()); diff != "" {
		t.Fatal(diff)
	}
	for _, r := range m.Members {
		if r.RemovedAt != 0 {
			t.Errorf("%s would be given only what it missed", r.ID)
		}
	}
}

// The record goes through JSON where it is stored.
func TestMembershipJSON(t *testing.T) {
	m := mustApply(t, testMembership(t), attach("n1"), remove(1, 1, "a"), Change{Prepare: &Prepare{Snapshot: "s"}}, Change{ExpandIntent: &ExpandIntent{Target: 2 << 20}})
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var n Membership
	if err := json.Unmarshal(b, &n); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, n); diff != "" {
		t.Fatal(diff)
	}
}

// Whatever is asked for, in whatever order: the invariants hold, nothing goes back, and the record before is left alone.
func TestApplyProperties(t *testing.T) {
	ids := []volume.ReplicaID{"a", "b", "c", "d", "e"}
	rapid.Check(t, func(r *rapid.T) {
		m := testMembership(t)
		for range 40 {
			id := rapid.SampledFrom(ids).Draw(r, "id")
			epoch := m.Epoch - min(m.Epoch, volume.Epoch(rapid.IntRange(0, 1).Draw(r, "epoch")))
			version := m.ConfigVersion - volume.ConfigVersion(rapid.IntRange(0, 1).Draw(r, "version"))
			c := []Change{
				{Attach: &Attach{Node: "n1", Force: rapid.Bool().Draw(r, "force")}}, {Detach: &Detach{Clean: rapid.Bool().Draw(r, "clean")}},
				remove(epoch, version, id), remove(epoch, version, ids...), add(epoch, version, id), {AddReplica: &Member{ID: id}},
				{DropReplica: &DropReplica{ID: id}}, {Prepare: &Prepare{Snapshot: "s"}}, {AbortBarrier: &AbortBarrier{Number: m.Barriers}},
				{Complete: &Complete{Number: m.Barriers, ConfigVersion: version, Holders: ids[:1]}}, {ExpandIntent: &ExpandIntent{Target: m.Size * 2}},
				{ExpandCommit: &ExpandCommit{Epoch: epoch, ConfigVersion: version, Size: m.Target}}, {Salvage: &Salvage{ID: id}},
			}[rapid.IntRange(0, 12).Draw(r, "change")]
			before := m.clone()
			n, err := m.Apply(c)
			if diff := cmp.Diff(before, m); diff != "" {
				r.Fatalf("%+v changed what it was applied to: %s", c, diff)
			}
			if err != nil {
				continue
			}
			if err := n.Check(); err != nil {
				r.Fatal(err)
			}
			if n.Epoch < m.Epoch || n.ConfigVersion < m.ConfigVersion || n.Lineage < m.Lineage || n.Size < m.Size || n.Revision != m.Revision+1 {
				r.Fatalf("%+v: went back from %+v to %+v", c, m, n)
			}
			if c.Reconfigure != nil && (epoch != m.Epoch || version != m.ConfigVersion) {
				r.Fatalf("%+v was taken by %+v", c, m)
			}
			m = n
		}
	})
}

func FuzzReadState(f *testing.F) {
	f.Add((&replicaState{Epoch: 1, Role: RoleISR, ISR: []volume.ReplicaID{"a"}}).encode())
	f.Add([]byte(`{"format":1,"role":99}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeState(b)
		if err != nil {
			if !errors.Is(err, volume.ErrDataLoss) {
				t.Fatal(err)
			}
			return
		}
		if again, err := decodeState(s.encode()); len(b) > 0 && (err != nil || !cmp.Equal(s, again)) {
			t.Fatalf("%+v became %+v: %v", s, again, err)
		}
	})
}
