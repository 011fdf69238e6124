package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// scene is a cluster of nodes n1 to n5 with a pool p1 to p5 each, in which a test changes what it is about.
type scene struct {
	control.State
}

func newScene() *scene {
	s := &scene{control.State{Away: map[volume.PoolID]time.Duration{}, View: placement.View{Down: map[volume.NodeID]string{}}}}
	for i := range 5 {
		n, p := volume.NodeID(fmt.Sprint("n", i+1)), volume.PoolID(fmt.Sprint("p", i+1))
		s.View.Nodes = append(s.View.Nodes, volume.Node{ID: n, Pools: []volume.Pool{{ID: p, Name: "default", Node: n, Capacity: int64(500-i*100) << 30, OverProvision: 1}}})
	}
	return s
}

// volume adds a volume that should have so many replicas; a replica is written node:role, with i, s or f, and ! if it is damaged.
func (s *scene) volume(id string, want int, replicas ...string) *volume.Volume {
	v := volume.Volume{ID: volume.ID(id), State: volume.Ready, Size: 1 << 30, Parameters: volume.Parameters{Replicas: want, MinInSync: 1, DataLocality: volume.LocalityPreferred}}
	for _, text := range replicas {
		node, role, _ := strings.Cut(text, ":")
		role, damaged := strings.CutSuffix(role, "!")
		v.Replicas = append(v.Replicas, volume.Replica{
			ID: volume.ReplicaID(id + "-" + node), Node: volume.NodeID("n" + node), Pool: volume.PoolID("p" + node),
			Role: map[string]volume.ReplicaRole{"i": volume.InSync, "s": volume.Stale, "f": volume.Filling}[role], Damaged: damaged,
		})
	}
	s.Volumes = append(s.Volumes, v)
	return &s.Volumes[len(s.Volumes)-1]
}

// snapshot adds one of a volume on nodes, written like replicas.
func (s *scene) snapshot(id, of string, holders ...string) {
	x := volume.Snapshot{ID: volume.SnapshotID(id), Volume: volume.ID(of), State: volume.Ready}
	for _, text := range holders {
		node, damaged := strings.CutSuffix(text, "!")
		x.Holders = append(x.Holders, volume.Replica{Node: volume.NodeID("n" + node), Pool: volume.PoolID("p" + node), Damaged: damaged})
	}
	s.Snapshots = append(s.Snapshots, x)
}

// leaves adds a copy of the last snapshot that is none any more and that a node has yet to free.
func (s *scene) leaves(node string) {
	x := &s.Snapshots[len(s.Snapshots)-1]
	x.Leaving = append(x.Leaving, volume.Replica{Node: volume.NodeID("n" + node), Pool: volume.PoolID("p" + node)})
}

// only leaves the first nodes.
func (s *scene) only(n int) { s.View.Nodes = s.View.Nodes[:n] }

func (s *scene) away(node string, d time.Duration) {
	s.Away[volume.PoolID("p"+node)] = d
	s.View.Down[volume.NodeID("n"+node)] = "it is silent"
}

func (s *scene) node(node string) *volume.Node {
	i := slices.IndexFunc(s.View.Nodes, func(n volume.Node) bool { return n.ID == volume.NodeID("n"+node) })
	return &s.View.Nodes[i]
}

func (s *scene) empty(node string) {
	s.node(node).State = volume.NodeEmptying
	s.View.Down[volume.NodeID("n"+node)] = "it is being emptied"
}

func attach(v *volume.Volume, node string) {
	v.Attachment, v.Owner = &volume.Attachment{Node: volume.NodeID("n" + node)}, volume.NodeID("n"+node)
}

func TestRepairs(t *testing.T) {
	const brief, long = time.Minute, time.Hour
	for _, c := range []struct {
		name string
		set  func(s *scene)
		want string
	}{
		{"nothing is wrong", func(s *scene) { s.volume("a", 2, "1:i", "2:i") }, ""},
		{"away for a short time", func(s *scene) { s.volume("a", 2, "1:i", "2:s"); s.away("2", brief) }, ""},
		{"away for too long", func(s *scene) { attach(s.volume("a", 2, "1:i", "2:s"), "1"); s.away("2", long) }, "add replica a p3"},
		{"nothing to copy from", func(s *scene) { s.volume("a", 2, "1:i", "2:s"); s.away("1", long) }, ""},
		{"all are away", func(s *scene) { s.volume("a", 2, "1:i", "2:i"); s.away("1", long); s.away("2", long) }, ""},
		{"the new one is being filled", func(s *scene) {
			attach(s.volume("a", 2, "1:i", "2:s", "3:f"), "1")
			s.away("2", long)
		}, "sync a"},
		{"the new one is there, the old one goes", func(s *scene) {
			attach(s.volume("a", 2, "1:i", "2:s", "3:i"), "1")
			s.away("2", long)
		}, "drop replica a a-2"},
		{"the old one came back before", func(s *scene) { attach(s.volume("a", 2, "1:i", "2:i", "3:f"), "1") }, "drop replica a a-3; sync a"},
		{"detached, one returned", func(s *scene) { s.volume("a", 2, "1:i", "2:s") }, "sync a"},
		{"detached, in sync by the record and away", func(s *scene) { s.volume("a", 2, "1:i", "2:i"); s.away("2", long) }, "add replica a p3"},
		{"detached, the old one goes", func(s *scene) { s.volume("a", 2, "1:i", "2:i", "3:i"); s.away("2", long) }, "drop replica a a-2"},
		{"attached, one returned: its engine sees to it", func(s *scene) { attach(s.volume("a", 2, "1:i", "2:s"), "1") }, ""},
		{"being detached", func(s *scene) {
			v := s.volume("a", 2, "1:i", "2:s")
			attach(v, "1")
			v.Attachment.Detaching = true
			s.away("2", long)
		}, ""},
		{"being made", func(s *scene) { s.volume("a", 2, "1:i").State = volume.Creating }, ""},

		{"one more is wanted", func(s *scene) { s.volume("a", 2, "1:i") }, "add replica a p2"},
		{"two more are wanted", func(s *scene) { s.volume("a", 3, "1:i") }, "add replica a p2; add replica a p3"},
		{"near the workload", func(s *scene) { attach(s.volume("a", 2, "1:i"), "5") }, "add replica a p5"},
		{"where it was asked for", func(s *scene) {
			s.volume("a", 2, "1:i").Accessible = []volume.NodeID{"n1", "n4", "n9"}
		}, "add replica a p4"},
		{"one that leaves holds its place", func(s *scene) {
			v := s.volume("a", 2, "1:i")
			v.Leaving = []volume.Replica{{Node: "n2", Pool: "p2"}}
		}, "add replica a p3"},
		{"no room anywhere", func(s *scene) {
			s.volume("a", 2, "1:i")
			for _, n := range []string{"2", "3", "4", "5"} {
				s.node(n).Pools[0].Capacity = 1
			}
		}, ""},
		{"one less is wanted", func(s *scene) { s.volume("a", 1, "1:i", "2:i") }, "drop replica a a-2"},
		{"one less, not the local one", func(s *scene) { attach(s.volume("a", 1, "1:i", "2:i"), "2") }, "drop replica a a-1"},
		{"one less, the stale one", func(s *scene) { s.volume("a", 1, "1:s", "2:i") }, "drop replica a a-1; sync a"},
		{"one less, the one that is away", func(s *scene) { s.volume("a", 2, "1:i", "2:i", "3:i"); s.away("1", brief) }, "drop replica a a-1"},
		{"one less, of the crowded zone", func(s *scene) {
			for i, z := range []string{"x", "y", "y"} {
				s.View.Nodes[i].Zone = z
			}
			s.volume("a", 2, "1:i", "2:i", "3:i")
		}, "drop replica a a-3"},
		{"one less, and only one in sync", func(s *scene) { s.volume("a", 2, "1:i", "2:s", "3:s") }, "sync a"},

		{"a node is emptied", func(s *scene) { s.volume("a", 1, "1:i"); s.empty("1") }, "add replica a p2"},
		{"a node is emptied, the new one is there", func(s *scene) { s.volume("a", 1, "1:i", "2:i"); s.empty("1") }, "drop replica a a-1"},
		{"a node is drained only", func(s *scene) { s.volume("a", 1, "1:i"); s.node("1").State = volume.NodeDrained }, ""},

		{"one is damaged", func(s *scene) { attach(s.volume("a", 2, "1:i!", "2:i"), "1") }, "add replica a p3"},
		{"one is damaged, detached", func(s *scene) { s.volume("a", 2, "1:i!", "2:i") }, "add replica a p3"},
		{"one is damaged, its replacement is being filled", func(s *scene) { attach(s.volume("a", 2, "1:i!", "2:i", "3:f"), "1") }, "sync a"},
		{"one is damaged, its replacement is there", func(s *scene) { attach(s.volume("a", 2, "1:i!", "2:i", "3:i"), "1") }, "drop replica a a-1"},
		{"one is damaged, its replacement is there, the sound one is away", func(s *scene) {
			attach(s.volume("a", 2, "1:i!", "2:i", "3:i"), "1")
			s.away("2", brief)
		}, ""},
		{"the only one is damaged", func(s *scene) { s.volume("a", 1, "1:i!") }, ""},
		{"all are damaged", func(s *scene) { s.volume("a", 2, "1:i!", "2:i!") }, ""},
		{"the sound one is away", func(s *scene) { s.volume("a", 2, "1:i!", "2:i"); s.away("2", brief) }, ""},
		{"the sound one is away for too long", func(s *scene) { s.volume("a", 2, "1:i!", "2:i"); s.away("2", long) }, "add replica a p3"},
		{"the sound one is behind", func(s *scene) { attach(s.volume("a", 2, "1:i!", "2:s"), "1") }, ""},
		{"a damaged one was sound after all", func(s *scene) { attach(s.volume("a", 2, "1:i", "2:i", "3:f"), "1") }, "drop replica a a-3; sync a"},
		{"one less is wanted, and one is damaged", func(s *scene) { s.volume("a", 1, "1:i", "2:i!") }, "drop replica a a-2"},
		{"three on three nodes, one is damaged", func(s *scene) { s.volume("a", 3, "1:i!", "2:i", "3:i"); s.only(3) }, "drop replica a a-1"},
		{"three on three nodes, one damaged and one behind", func(s *scene) {
			attach(s.volume("a", 3, "1:i!", "2:i", "3:s"), "2")
			s.only(3)
		}, ""},
		{"three on three nodes, one is damaged, all are needed", func(s *scene) {
			s.volume("a", 3, "1:i!", "2:i", "3:i").Parameters.MinInSync = 3
			s.only(3)
		}, ""},
		{"two on two nodes, one is damaged", func(s *scene) { s.volume("a", 2, "1:i!", "2:i"); s.only(2) }, ""},
		{"three on three nodes, one damaged with a snapshot", func(s *scene) {
			s.volume("a", 3, "1:i!", "2:i", "3:i")
			s.snapshot("s", "a", "1!", "2", "3")
			s.only(3)
		}, "drop replica a a-1"},
		{"three on three nodes, a snapshot has one other holder", func(s *scene) {
			s.volume("a", 3, "1:i!", "2:i", "3:i")
			s.snapshot("s", "a", "1!", "2")
			s.only(3)
		}, ""},
		{"the damaged snapshot goes before the new one comes", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i")
			s.snapshot("s", "a", "1!", "2", "3")
			s.only(3)
		}, "move snapshot s p1"},
		{"while the replica is being freed it stays", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i").Leaving = []volume.Replica{{ID: "a-1", Node: "n1", Pool: "p1"}}
			s.snapshot("s", "a", "1!", "2", "3")
			s.only(3)
		}, ""},
		{"while its pool is yet to free it the new one waits", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i")
			s.snapshot("s", "a", "2", "3")
			s.leaves("1")
			s.only(3)
		}, ""},
		{"or goes elsewhere", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i")
			s.snapshot("s", "a", "2", "3")
			s.leaves("1")
		}, "add replica a p4"},
		{"also one that its node has in another pool", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i")
			s.snapshot("s", "a", "2", "3")
			s.leaves("1")
			s.Snapshots[0].Leaving[0].Pool = "p1b"
		}, "add replica a p4"},
		{"what leaves is not counted", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.snapshot("s", "a", "1", "2")
			s.leaves("4")
			s.empty("1")
		}, ""},
		{"then the new one comes", func(s *scene) {
			s.volume("a", 3, "2:i", "3:i")
			s.snapshot("s", "a", "2", "3")
			s.only(3)
		}, "add replica a p1"},
		{"the only copy of a damaged snapshot stays", func(s *scene) {
			s.volume("a", 1, "2:i")
			s.snapshot("s", "a", "1!")
		}, ""},
		{"a disk with damage in many volumes, on three nodes", func(s *scene) {
			for _, id := range []string{"a", "b", "c", "d"} {
				s.volume(id, 3, "1:i!", "2:i", "3:i")
			}
			s.Volumes[3].Replicas = s.Volumes[3].Replicas[1:] // is one short since
			s.only(3)
		}, "add replica d p1; drop replica a a-1"},

		{"fewest copies first", func(s *scene) {
			s.volume("a", 3, "1:i", "4:i")
			s.volume("b", 3, "4:i")
			s.volume("c", 3, "1:i", "4:i", "5:i")
		}, "add replica b p1; add replica b p2; add replica a p2"},
		{"two rebuilds for a node", func(s *scene) {
			for _, id := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i"} {
				attach(s.volume(id, 2, "1:i"), "1")
			}
		}, "add replica a p2; add replica b p2; add replica c p3; add replica d p3; add replica e p4; add replica f p4; add replica g p5; add replica h p5"},
		{"those under way count", func(s *scene) {
			attach(s.volume("a", 2, "1:i", "2:f"), "1")
			attach(s.volume("b", 2, "1:i", "2:f"), "1")
			attach(s.volume("c", 2, "1:i"), "1")
		}, "add replica c p3; sync a; sync b"},
		{"two volumes at once that nobody has attached", func(s *scene) {
			for _, id := range []string{"a", "b", "c"} {
				s.volume(id, 2, "1:i", "2:s")
			}
			s.volume("d", 2, "2:i", "1:s")
		}, "sync a; sync b; sync d"},

		{"a snapshot leaves a node that is emptied", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.Snapshots = []volume.Snapshot{{ID: "s", Volume: "a", State: volume.Ready, Holders: []volume.Replica{{Node: "n1", Pool: "p1"}, {Node: "n2", Pool: "p2"}, {Node: "n3", Pool: "p3"}}}}
			s.empty("1")
		}, "move snapshot s p1"},
		{"also one that is in a pool that has stopped", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.snapshot("s", "a", "1", "2", "3")
			s.empty("1")
			s.Away["p1"] = long
		}, "move snapshot s p1"},
		{"a snapshot stays with its volume's replica on a node that is emptied", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i").Leaving = []volume.Replica{{ID: "a-1", Node: "n1", Pool: "p1"}}
			s.snapshot("s", "a", "1", "2", "3")
			s.empty("1")
		}, ""},
		{"copies that differ all stay", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.snapshot("s", "a", "1", "2", "3")
			s.Snapshots[0].Differs = &volume.Difference{Alike: [][]volume.PoolID{{"p2", "p3"}, {"p1"}}}
			s.empty("1")
		}, ""},
		{"but for one that is known to be damaged", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.snapshot("s", "a", "1!", "2", "3")
			s.Snapshots[0].Differs = &volume.Difference{Alike: [][]volume.PoolID{{"p2", "p3"}, {"p1"}}}
		}, "move snapshot s p1"},
		{"a snapshot that too few others hold stays", func(s *scene) {
			s.volume("a", 2, "2:i", "3:i")
			s.Snapshots = []volume.Snapshot{{ID: "s", Volume: "a", State: volume.Ready, Holders: []volume.Replica{{Node: "n1", Pool: "p1"}, {Node: "n2", Pool: "p2"}}},
				{ID: "t", Volume: "gone", State: volume.Ready, Holders: []volume.Replica{{Node: "n1", Pool: "p1"}, {Node: "n2", Pool: "p2"}}}}
			s.empty("1")
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene()
			c.set(s)
			var got []string
			for _, a := range Repairs(s.State, Limits{}) {
				got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s%s", a.Kind, a.ID, a.Pool, a.Replica)))
			}
			if have := strings.Join(got, "; "); have != c.want {
				t.Errorf("got  %s\nwant %s", have, c.want)
			}
		})
	}
}
