package admin

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func volumeEvent(id, state string) *adminpb.Event {
	return &adminpb.Event{Object: &adminpb.Event_Volume{Volume: &adminpb.Volume{Id: id, State: state}}}
}

func nodeEvent(id string, seen int64, pools ...string) *adminpb.Event {
	n := &adminpb.Node{Id: id, LastSeen: timestamppb.New(time.Unix(seen, 0))}
	for _, p := range pools {
		n.Pools = append(n.Pools, &adminpb.Pool{Id: p})
	}
	return &adminpb.Event{Object: &adminpb.Event_Node{Node: n}}
}

func TestChanges(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after []*adminpb.Event
		want          []string
	}{
		{"nothing", nil, nil, nil},
		{"first look", nil, []*adminpb.Event{volumeEvent("a", "ready"), volumeEvent("b", "ready")}, []string{"ADDED a", "ADDED b"}},
		{"the same", []*adminpb.Event{volumeEvent("a", "ready")}, []*adminpb.Event{volumeEvent("a", "ready")}, nil},
		{
			"all at once", []*adminpb.Event{volumeEvent("a", "ready"), volumeEvent("b", "ready"), volumeEvent("d", "ready")},
			[]*adminpb.Event{volumeEvent("b", "deleting"), volumeEvent("c", "creating"), volumeEvent("d", "ready")},
			[]string{"DELETED a", "CHANGED b", "ADDED c"},
		},
		{"a heartbeat", []*adminpb.Event{nodeEvent("n", 1, "p")}, []*adminpb.Event{nodeEvent("n", 2, "p")}, nil},
		{"a node's pool", []*adminpb.Event{nodeEvent("n", 1, "p")}, []*adminpb.Event{nodeEvent("n", 2)}, []string{"CHANGED n"}},
	} {
		var got []string
		for _, e := range changes(c.before, c.after) {
			got = append(got, e.Type.String()+" "+eventKey(e))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

func TestAttention(t *testing.T) {
	up := Controller{ID: "a", Voter: true, Answers: true}
	leads, down, joins := up, Controller{ID: "b", Voter: true}, Controller{ID: "c", Answers: true}
	leads.Leader = true
	for _, c := range []struct {
		name string
		of   func(*attention)
		want []string // the beginnings of the lines
	}{
		{"nothing", func(a *attention) { a.controllers([]Controller{leads, up, up}) }, nil},
		{"one", func(a *attention) { a.controllers([]Controller{leads}) }, nil},
		{"two", func(a *attention) { a.controllers([]Controller{leads, up}) }, []string{"2 controllers do not survive"}},
		{"one of five is away", func(a *attention) { a.controllers([]Controller{leads, up, up, up, down}) }, []string{"1 controller not answering (b): 1 more may fail"}},
		{"one of three is away", func(a *attention) { a.controllers([]Controller{leads, up, down}) }, []string{"1 controller not answering (b): if one more"}},
		{"no majority", func(a *attention) { a.controllers([]Controller{up, down, down}) }, []string{"2 controllers not answering (b, b): without a majority", "the controllers have no leader"}},
		{"one joins", func(a *attention) { a.controllers([]Controller{leads, up, up, joins}) }, []string{"1 controller without a vote yet"}},
		{"nodes", func(a *attention) {
			full := &adminpb.Pool{Name: "p", CapacityBytes: 10, UsedBytes: 10}
			a.nodes([]*adminpb.Node{
				{Id: "a", State: nodeUp, Pools: []*adminpb.Pool{full, {Name: "gone"}, {Name: "bad", CapacityBytes: 10, Failed: true}}}, {Id: "b", State: nodeSilent, Pools: []*adminpb.Pool{full}},
				{Id: "c", State: "emptying", Replicas: 2}, {Id: "d", State: "emptying"}, {Id: "e", State: "drained"},
			})
		}, []string{"1 node not reporting: b", "1 pool without its disk: a/gone", "1 pool stopped after an error of its disk: a/bad", "1 pool full or nearly so: a/p (100 %)", "node c is being emptied: 2 replicas", "node d is empty", "node e is drained"}},
		{"the worst first", func(a *attention) {
			a.degraded, a.lost, a.inaccessible, a.strays = []string{"x"}, []string{"y"}, []string{"z", "zz"}, 3
		}, []string{"1 volume lost data: ballastctl volume why y", "2 volumes cannot be used, I/O waits: ballastctl volume why z", "1 volume degraded", "3 replicas or snapshots"}},
	} {
		var a attention
		c.of(&a)
		got := a.lines()
		ok := len(got) == len(c.want)
		for i := range got {
			ok = ok && strings.HasPrefix(got[i], c.want[i])
		}
		if !ok {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestOnlyUnixSocketsAreServed(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := (peerCredentials{}).ServerHandshake(a); err == nil {
		t.Error("a caller that nothing is known of was let in")
	}
}
