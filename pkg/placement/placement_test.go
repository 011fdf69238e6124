package placement

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// cluster makes node n<i> with one pool p<i> per capacity.
func cluster(capacities ...int64) View {
	var v View
	for i, c := range capacities {
		n, p := volume.NodeID(fmt.Sprint("n", i+1)), volume.PoolID(fmt.Sprint("p", i+1))
		v.Nodes = append(v.Nodes, volume.Node{ID: n, Pools: []volume.Pool{{ID: p, Name: "default", Node: n, Capacity: c, OverProvision: 1}}})
	}
	return v
}

func TestChoose(t *testing.T) {
	ids := func(s ...volume.NodeID) []volume.NodeID { return s }
	two := cluster(100, 50)
	two.Nodes[0].Pools = append(two.Nodes[0].Pools, volume.Pool{ID: "p1b", Name: "fast", Node: "n1", Capacity: 200, OverProvision: 1})
	over := cluster(100)
	over.Nodes[0].Pools[0].OverProvision = 2.5
	full := cluster(100)
	full.Nodes[0].Pools[0].Used = 100
	stopped := cluster(100, 50)
	stopped.Nodes[0].Pools[0].Failed = true
	down := cluster(100, 50)
	down.Down = map[volume.NodeID]string{"n1": "it is silent"}
	zones := cluster(100, 90, 80, 10, 70)
	for i, z := range []string{"a", "a", "a", "b", "c"} {
		zones.Nodes[i].Zone = z
	}
	required, none := volume.LocalityRequired, volume.LocalityNone
	pools := func(s ...volume.PoolID) []volume.PoolID { return s }
	on := func(s ...volume.NodeID) (rs []volume.Replica) {
		for _, n := range s {
			rs = append(rs, volume.Replica{Node: n})
		}
		return rs
	}
	for _, c := range []struct {
		name string
		v    View
		r    Request
		want string // pools, or what the refusal says
		ok   bool
	}{
		{"the most room", cluster(10, 30, 20), Request{Size: 5, Replicas: 1}, "p2", true},
		{"spread over nodes", cluster(10, 30, 20), Request{Size: 5, Replicas: 3}, "p2 p3 p1", true},
		{"two pools of a node are one place", two, Request{Size: 5, Replicas: 2}, "p1b p2", true},
		{"exactly what is left", cluster(10), Request{Size: 10, Replicas: 1}, "p1", true},
		{"one byte more", cluster(10), Request{Size: 11, Replicas: 1}, "10 bytes may still be placed, 11 are asked for", false},
		{"over-provisioned", over, Request{Size: 250, Replicas: 1}, "p1", true},
		{"over-provisioned and more", over, Request{Size: 251, Replicas: 1}, "250 bytes", false},
		{"one that has stopped", stopped, Request{Size: 1, Replicas: 1}, "p2", true},
		{"nowhere but where it has stopped", stopped, Request{Size: 1, Replicas: 2}, "error of its disk", false},
		{"full of data", full, Request{Size: 1, Replicas: 1}, "full", false},
		{"a node that is down", down, Request{Size: 1, Replicas: 1}, "p2", true},
		{"too few nodes", down, Request{Size: 1, Replicas: 2}, "2 replicas need as many nodes, 1 can hold one (pool p1 on node n1: it is silent)", false},
		{"by pool name", two, Request{Size: 1, Replicas: 1, Pool: "fast"}, "p1b", true},
		{"no such pool", two, Request{Size: 1, Replicas: 1, Pool: "slow"}, `"slow" is asked for`, false},
		{"refused before", cluster(100, 10), Request{Size: 1, Replicas: 1, Refused: map[volume.PoolID]string{"p1": "disk is full"}}, "p2", true},
		{"no nodes", View{}, Request{Size: 1, Replicas: 1}, "no more nodes", false},

		{"spread over zones", zones, Request{Size: 1, Replicas: 3}, "p1 p5 p4", true},
		{"more replicas than zones", zones, Request{Size: 1, Replicas: 5}, "p1 p5 p4 p2 p3", true},
		{"the workload's node and then zones", zones, Request{Size: 1, Replicas: 2, Preferred: ids("n2", "n1", "n3")}, "p2 p5", true},
		{"zones of what stays", zones, Request{Size: 1, Replicas: 1, Beside: on("n2", "n5")}, "p4", true},
		{"not beside another", cluster(100, 50), Request{Size: 1, Replicas: 1, Beside: on("n1")}, "p2", true},
		{"nowhere but beside", cluster(100, 50), Request{Size: 1, Replicas: 1, Beside: on("n1", "n2")}, "has a replica already", false},

		{"a source", cluster(100, 10), Request{Size: 1, Replicas: 1, Sources: pools("p2")}, "p2", true},
		{"sources first, the rest is rebuilt", cluster(100, 10, 20), Request{Size: 1, Replicas: 2, Sources: pools("p2")}, "p2 p1", true},
		{"a source before the workload's node", cluster(100, 10, 20), Request{Size: 1, Replicas: 2, Sources: pools("p2"), Preferred: ids("n3")}, "p2 p3", true},
		{"no source", cluster(100), Request{Size: 1, Replicas: 1, Sources: []volume.PoolID{}}, "holds the source", false},
		{"no room at the source", cluster(100, 10), Request{Size: 20, Replicas: 1, Sources: pools("p2")}, "holds the source", false},
		{"the node's pool that holds the source", two, Request{Size: 1, Replicas: 1, Sources: pools("p1")}, "p1", true},
		{"required, without a source", cluster(100, 10), Request{Size: 1, Replicas: 1, Locality: required, Requisite: ids("n1"), Sources: pools("p2")}, "holds the source", false},
		{"required, and a source elsewhere", cluster(100, 10), Request{Size: 1, Replicas: 2, Locality: required, Requisite: ids("n1"), Sources: pools("p2")}, "p1 p2", true},

		{"preferred first", cluster(100, 50, 10), Request{Size: 1, Replicas: 2, Preferred: ids("n3", "n9")}, "p3 p1", true},
		{"preferred is one node", cluster(100, 50, 10), Request{Size: 1, Replicas: 2, Preferred: ids("n3", "n2")}, "p3 p1", true},
		{"preferred and full", cluster(100, 50, 10), Request{Size: 20, Replicas: 1, Preferred: ids("n3")}, "p1", true},
		{"preferred and not wanted", cluster(100, 50, 10), Request{Size: 1, Replicas: 1, Locality: none, Preferred: ids("n3")}, "p1", true},
		{"requisite first", cluster(100, 50, 60), Request{Size: 1, Replicas: 2, Requisite: ids("n2")}, "p2 p1", true},
		{"requisite and full", cluster(100, 5, 60), Request{Size: 20, Replicas: 1, Requisite: ids("n2")}, "p1", true},
		{"enough of the requisite are known", cluster(100, 50), Request{Size: 1, Replicas: 1, Requisite: ids("n2", "n9")}, "p2", true},
		{"requisite unknown", cluster(100), Request{Size: 1, Replicas: 1, Requisite: ids("n9")}, "node n9: unknown", false},

		{"x<n", cluster(100, 50, 60), Request{Locality: required, Size: 1, Replicas: 1, Requisite: ids("n2", "n3")}, "p3", true},
		{"x=n", cluster(100, 50, 60), Request{Locality: required, Size: 1, Replicas: 2, Requisite: ids("n2", "n3")}, "p3 p2", true},
		{"x>n", cluster(100, 50, 60), Request{Locality: required, Size: 1, Replicas: 2, Requisite: ids("n2")}, "p2 p1", true},
		{"x>n, one is full", cluster(100, 5, 60), Request{Locality: required, Size: 20, Replicas: 2, Requisite: ids("n2")}, "0 of the 1 nodes", false},
		{"x=n, one is full", cluster(100, 5, 60), Request{Locality: required, Size: 20, Replicas: 2, Requisite: ids("n2", "n3")}, "1 can hold one", false},
		{"requisite named twice", cluster(100, 50), Request{Locality: required, Size: 1, Replicas: 1, Requisite: ids("n2", "n2")}, "p2", true},
		{"required in order", cluster(100, 50, 10), Request{Locality: required, Size: 1, Replicas: 2, Preferred: ids("n3", "n2")}, "p3 p2", true},
		{"required, requisite and preferred", cluster(100, 50, 60), Request{Locality: required, Size: 1, Replicas: 1, Requisite: ids("n2", "n3"), Preferred: ids("n1", "n2")}, "p2", true},
		{"one must be there", cluster(100, 50), Request{Size: 1, Replicas: 1, Local: "n2"}, "p2", true},
		{"one must be there and cannot", cluster(100, 5), Request{Size: 20, Replicas: 1, Local: "n2"}, "node n2 cannot", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ps, err := Choose(c.v, c.r)
			if c.ok != (err == nil) {
				t.Fatalf("%v %v", ps, err)
			}
			if err != nil {
				if !errors.Is(err, volume.ErrNoSpace) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v does not say %q", err, c.want)
				}
				return
			}
			var got []string
			for _, p := range ps {
				got = append(got, string(p.ID))
			}
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("chose %s, want %s", s, c.want)
			}
		})
	}
}

func TestCapacityAgreesWithChoose(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sizes []int64
		for range rapid.IntRange(0, 4).Draw(t, "nodes") {
			sizes = append(sizes, rapid.Int64Range(0, 64<<20).Draw(t, "size"))
		}
		v := cluster(sizes...)
		for i := range v.Nodes {
			p := &v.Nodes[i].Pools[0]
			p.Used = rapid.Int64Range(0, 64<<20).Draw(t, "used")
			p.Provisioned = rapid.Int64Range(0, 64<<20).Draw(t, "provisioned")
		}
		nodes := []volume.NodeID{"n1", "n2", "n9"}
		r := Request{
			Replicas:  rapid.IntRange(1, 3).Draw(t, "replicas"),
			Local:     rapid.SampledFrom(append(nodes, "", "", "")).Draw(t, "local"),
			Locality:  rapid.SampledFrom([]volume.DataLocality{volume.LocalityPreferred, volume.LocalityRequired, volume.LocalityNone}).Draw(t, "locality"),
			Requisite: rapid.SliceOfN(rapid.SampledFrom(nodes), 0, 2).Draw(t, "requisite"),
		}
		if rapid.Bool().Draw(t, "made of something") {
			r.Sources = []volume.PoolID{"p2"}
		}
		available, largest := Capacity(v, r)
		if available < 0 || largest < 0 {
			t.Fatalf("negative: %d %d", available, largest)
		}
		if r.Size = largest; largest > 0 {
			ps, err := Choose(v, r)
			if err != nil {
				t.Fatalf("capacity says %d: %v", largest, err)
			}
			nodes := map[volume.NodeID]bool{}
			for _, p := range ps {
				nodes[p.Node] = true
			}
			if len(ps) != r.Replicas || len(nodes) != r.Replicas {
				t.Fatalf("chose %v", ps)
			}
		}
		r.Size = max(largest+volume.SizeQuantum, volume.MinSize)
		if ps, err := Choose(v, r); err == nil {
			t.Fatalf("capacity says %d, %d is placed in %v", largest, r.Size, ps)
		}
	})
}

func TestTheChoiceDoesNotChangeTheView(t *testing.T) {
	v := cluster(10, 30, 20)
	before := fmt.Sprint(v)
	for _, r := range []Request{{Size: 1, Replicas: 3}, {Size: 1, Replicas: 1, Requisite: []volume.NodeID{"n3"}}} {
		if _, err := Choose(v, r); err != nil {
			t.Fatal(err)
		}
	}
	if fmt.Sprint(v) != before || !slices.IsSortedFunc(v.Nodes, func(a, b volume.Node) int { return strings.Compare(string(a.ID), string(b.ID)) }) {
		t.Error("the view was changed")
	}
}
