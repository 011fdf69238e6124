package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// deleted adds a volume that is deleted and should have had so many replicas.
func (s *scene) deleted(id string, want int) {
	if s.Remains == nil {
		s.Remains = map[volume.ID]volume.Remains{}
	}
	s.Remains[volume.ID(id)] = volume.Remains{Volume: volume.ID(id), Size: 1 << 30, Replicas: want}
}

// copying adds a copy of a snapshot of a deleted volume that is under way, its second replica written like a volume's.
func (s *scene) copying(of, snapshot, from, to string) *volume.Volume {
	v := s.volume(of, 2, from+":i", to)
	v.Kept = volume.SnapshotID(snapshot)
	return v
}

// tombstone adds what is left of a deleted volume.
func (s *scene) tombstone(id string, replicas ...string) {
	s.volume(id, 2, replicas...).State = volume.Deleting
}

func TestCopies(t *testing.T) {
	const brief, long = time.Minute, time.Hour
	for _, c := range []struct {
		name string
		set  func(s *scene)
		want string
	}{
		{"enough", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1", "2") }, ""},
		{"away for a short time", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1", "2"); s.away("2", brief) }, ""},
		{"away for too long", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1", "2"); s.away("2", long) }, "copy snapshot s p1>p3"},
		{"its volume exists", func(s *scene) {
			s.volume("a", 2, "1:i", "3:i")
			s.snapshot("s", "a", "1", "2")
			s.away("2", long)
		}, ""},
		{"nothing is known of its volume", func(s *scene) { s.snapshot("s", "a", "1", "2"); s.away("2", long) }, ""},
		{"the last holder is away", func(s *scene) { s.deleted("a", 1); s.snapshot("s", "a", "1"); s.away("1", long) }, ""},
		{"all holders are away", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1", "2")
			s.away("1", long)
			s.away("2", brief)
		}, ""},
		{"forgotten", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a") }, ""},
		{"its pool was forgotten", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1") }, "copy snapshot s p1>p2"},
		{"being deleted", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.Snapshots[0].State = volume.Deleting
		}, ""},
		{"one that serves a clone", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1"); s.Snapshots[0].Hidden = true }, ""},
		{"two are lost", func(s *scene) {
			s.deleted("a", 3)
			s.snapshot("s", "a", "1", "2", "3")
			s.away("2", long)
			s.away("3", long)
		}, "copy snapshot s p1>p4"},
		{"no room", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1", "2"); s.only(2); s.away("2", long) }, ""},
		{"where it was asked for", func(s *scene) {
			s.deleted("a", 2)
			k := s.Remains["a"]
			k.Accessible = []volume.NodeID{"n1", "n4", "n9"}
			s.Remains["a"] = k
			s.snapshot("s", "a", "1")
		}, "copy snapshot s p1>p4"},
		{"no pool of its name", func(s *scene) {
			s.deleted("a", 2)
			k := s.Remains["a"]
			k.Pool = "fast"
			s.Remains["a"] = k
			s.snapshot("s", "a", "1")
		}, ""},

		{"fewest copies first", func(s *scene) {
			for _, id := range []string{"a", "b"} {
				s.deleted(id, 3)
			}
			s.snapshot("s", "a", "1", "2")
			s.snapshot("t", "b", "1")
		}, "copy snapshot t p1>p2; copy snapshot s p2>p3"},
		{"one of a volume at a time, the oldest first", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1")
			s.Snapshots[0].CreatedAt = 2
		}, "copy snapshot t p1>p2"},
		{"two for a node that is copied from", func(s *scene) {
			for _, id := range []string{"a", "b", "c"} {
				s.deleted(id, 2)
				s.snapshot("s"+id, id, "1")
			}
		}, "copy snapshot sa p1>p2; copy snapshot sb p1>p2"},
		{"two for a node that is copied to", func(s *scene) {
			for i, id := range []string{"a", "b", "c", "d"} {
				s.deleted(id, 2)
				s.snapshot("s"+id, id, fmt.Sprint(1+2*(i%2)))
			}
			s.only(3)
			s.node("1").Pools[0].Capacity, s.node("3").Pools[0].Capacity = 1, 1
		}, "copy snapshot sa p1>p2; copy snapshot sb p3>p2"},
		{"rebuilds under way count", func(s *scene) {
			for _, id := range []string{"x", "y"} {
				attach(s.volume(id, 2, "1:i", "2:f"), "1")
			}
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
		}, "sync x; sync y; copy snapshot s p1>p3"},

		{"a copy is yet to be freed there", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1"); s.leaves("2") }, "copy snapshot s p1>p3"},
		{"a copy of another is yet to be freed there", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1", "4")
			s.leaves("2")
		}, "copy snapshot s p1>p3"},
		{"a copy is yet to be freed in another pool of a node", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.leaves("2")
			s.Snapshots[0].Leaving[0].Pool = "p2b"
		}, "copy snapshot s p1>p3"},
		{"a copy of another is yet to be freed at the source", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "3", "4")
			s.leaves("1")
		}, ""},
		{"one of another volume is", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.deleted("b", 2)
			s.snapshot("t", "b", "1", "4")
			s.leaves("2")
		}, "copy snapshot s p1>p2"},
		{"what leaves is no copy", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a"); s.leaves("1") }, ""},
		{"a later one is there", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1", "2")
			s.Snapshots[1].CreatedAt = 1
		}, "copy snapshot s p1>p3"},
		{"an earlier one is there", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1", "2")
			s.snapshot("t", "a", "1")
			s.Snapshots[1].CreatedAt = 1
		}, "copy snapshot t p1>p2"},
		{"where one finds no place, the next is copied", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1", "2")
			s.snapshot("u", "a", "2")
			s.Snapshots[1].CreatedAt, s.Snapshots[2].CreatedAt = 1, 2
			s.only(2)
		}, "copy snapshot u p2>p1"},

		{"something is there that no record knows", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1")
			s.Snapshots[1].CreatedAt = 1
			s.Unfit = map[control.Unfit]bool{{Snapshot: "s", Pool: "p2"}: true, {Snapshot: "t", Pool: "p3"}: true}
		}, "copy snapshot s p1>p3"},
		{"where it was read from in vain", func(s *scene) {
			s.deleted("a", 3)
			s.snapshot("s", "a", "1", "2")
			s.Unfit = map[control.Unfit]bool{{Snapshot: "s", Pool: "p1"}: true}
		}, "copy snapshot s p2>p3"},
		{"where it was read from in vain, and nowhere else", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.Unfit = map[control.Unfit]bool{{Snapshot: "s", Pool: "p1"}: true}
		}, "copy snapshot s p1>p2"},
		{"a damaged copy is none", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1!", "2") }, "copy snapshot s p2>p3"},
		{"a damaged copy, and the sound one is away", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1!", "2"); s.away("2", brief) }, ""},
		{"a damaged copy, and the sound one is lost", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1!", "2"); s.away("2", long) }, ""},
		{"all are damaged", func(s *scene) { s.deleted("a", 3); s.snapshot("s", "a", "1!", "2!") }, ""},
		{"a damaged copy goes when two are sound", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1!", "2", "3") }, "move snapshot s p1"},
		{"no copy to where one is damaged", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "2!")
			s.snapshot("t", "a", "1")
			s.Snapshots[1].CreatedAt = 1
		}, "copy snapshot t p1>p3"},

		{"a node is emptied", func(s *scene) { s.deleted("a", 1); s.snapshot("s", "a", "1"); s.empty("1") }, "copy snapshot s p1>p2"},
		{"a node is emptied, the copy is there", func(s *scene) { s.deleted("a", 1); s.snapshot("s", "a", "1", "2"); s.empty("1") }, "move snapshot s p1"},
		{"a node is emptied, one copy is there, the other is not", func(s *scene) {
			s.deleted("a", 1)
			s.snapshot("s", "a", "1", "2")
			s.snapshot("t", "a", "1")
			s.Snapshots[1].CreatedAt = 1
			s.empty("1")
		}, "copy snapshot t p1>p2"},
		{"a node is drained only", func(s *scene) {
			s.deleted("a", 1)
			s.snapshot("s", "a", "1")
			s.node("1").State = volume.NodeDrained
		}, ""},

		{"under way", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1"); s.copying("a", "s", "1", "3:f") }, "sync a"},
		{"under way, another waits", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.snapshot("t", "a", "1")
			s.copying("a", "s", "1", "3:f")
		}, "sync a"},
		{"filled, and not recorded yet", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1"); s.copying("a", "s", "1", "3:i") }, "sync a"},
		{"done", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1", "3"); s.copying("a", "s", "1", "3:i") }, "end copy a a-3"},
		{"done, the emptied node waits for its end", func(s *scene) {
			s.deleted("a", 1)
			s.snapshot("s", "a", "1", "3")
			s.copying("a", "s", "1", "3:i")
			s.empty("1")
		}, "end copy a a-3"},
		{"its holder came back", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1", "2")
			s.copying("a", "s", "1", "3:f")
		}, "end copy a a-3"},
		{"the pool that is filled is full", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.copying("a", "s", "1", "3:f")
			s.node("3").Pools[0].Used = s.node("3").Pools[0].Capacity
		}, "end copy a a-3"},
		{"the pool that was filled is full", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.copying("a", "s", "1", "3:i")
			s.node("3").Pools[0].Used = s.node("3").Pools[0].Capacity
		}, "sync a"},
		{"the snapshot is deleted", func(s *scene) { s.deleted("a", 2); s.copying("a", "s", "1", "3:f") }, "end copy a a-3"},
		{"the snapshot is being deleted", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.Snapshots[0].State = volume.Deleting
			s.copying("a", "s", "1", "3:f")
		}, "end copy a a-3"},
		{"the source is away", func(s *scene) {
			s.deleted("a", 3)
			s.snapshot("s", "a", "1", "2")
			s.copying("a", "s", "1", "3:f")
			s.away("1", brief)
		}, "end copy a a-3"},
		{"the last source is away", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.copying("a", "s", "1", "3:f").Owner = "n1"
			s.away("1", long)
		}, ""},
		{"under way, and for how long a holder was away is not known", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1", "2")
			s.copying("a", "s", "1", "3:f")
			s.away("2", brief)
		}, "sync a"},
		{"the target is away", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.copying("a", "s", "1", "3:f")
			s.away("3", brief)
		}, "end copy a a-3"},
		{"the target is to be emptied", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.copying("a", "s", "1", "3:f")
			s.empty("3")
		}, "end copy a a-3"},
		{"the source is damaged", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1!", "2"); s.copying("a", "s", "1", "3:f") }, "end copy a a-3"},
		{"the target is damaged", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "1"); s.copying("a", "s", "1", "3:f!") }, "end copy a a-3"},
		{"the source was moved", func(s *scene) { s.deleted("a", 2); s.snapshot("s", "a", "2"); s.copying("a", "s", "1", "3:f") }, "end copy a a-3"},

		{"what is left waits for a node that is away", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1", "2")
			s.tombstone("a", "2:i")
			s.away("2", long)
		}, "copy snapshot s p1>p3"},
		{"what is left holds its place", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.tombstone("a", "2:f")
		}, "copy snapshot s p1>p3"},
		{"the source is still to be freed", func(s *scene) {
			s.deleted("a", 2)
			s.snapshot("s", "a", "1")
			s.tombstone("a", "1:i")
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene()
			c.set(s)
			var got []string
			for _, a := range Repairs(s.State, Limits{}) {
				pool := string(a.Pool)
				if a.From != "" {
					pool = string(a.From) + ">" + pool
				}
				got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s%s", a.Kind, a.ID, pool, a.Replica)))
			}
			if have := strings.Join(got, "; "); have != c.want {
				t.Errorf("got  %s\nwant %s", have, c.want)
			}
		})
	}
}

// Whatever a node holds, no more is begun there than it may do at once.
func TestCopiesAreFew(t *testing.T) {
	s := newScene()
	for i := range 50 {
		id := fmt.Sprint("v", i)
		s.deleted(id, 3)
		s.snapshot("s"+id, id, fmt.Sprint(i%5+1))
	}
	from, to := map[volume.PoolID]int{}, map[volume.PoolID]int{}
	for _, a := range Repairs(s.State, Limits{}) {
		if a.Kind != Copy || a.From == a.Pool {
			t.Fatalf("%+v", a)
		}
		from[a.From]++
		to[a.Pool]++
	}
	for _, m := range []map[volume.PoolID]int{from, to} {
		for p, n := range m {
			if n > 2 {
				t.Errorf("%d copies at once for pool %s", n, p)
			}
		}
		if len(m) != 5 {
			t.Errorf("only %d nodes have anything to do", len(m))
		}
	}
	if i := slices.IndexFunc(Repairs(s.State, Limits{Rebuilds: 1}), func(a Action) bool { return a.Kind != Copy }); i >= 0 {
		t.Error("something else is planned")
	}
}
