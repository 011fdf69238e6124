package meta

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func applyOne(t testing.TB, m *Machine, e Entry) command.Result {
	t.Helper()
	rs, err := m.Apply(e)
	if err != nil {
		t.Fatal(err)
	}
	return rs[0]
}

// A proposal that is in the log twice is applied once and answered alike; one that comes too late is refused.
func TestAProposalIsAppliedOnce(t *testing.T) {
	m := machine(t, "", Options{})
	applyOne(t, m, Entry{Index: 1, Kind: KindCommand, Body: must(command.Encode(node("n1", "p1")))})
	v := newVolume(1, "p1")
	create := Entry{Index: 2, Kind: KindCommand, ID: ProposalID{1}, Since: 1, Body: must(command.Encode(command.CreateVolume{Volume: v}))}
	first := applyOne(t, m, create)
	if x, ok := first.(command.Volume); !ok || !x.Created {
		t.Fatalf("%+v", first)
	}
	for i, c := range []command.Command{command.FinishCreate{Volume: v.ID}, command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID}} {
		applyOne(t, m, Entry{Index: uint64(3 + i), Kind: KindCommand, ID: ProposalID{2, byte(i)}, Since: 2, Body: must(command.Encode(c))})
	}
	create.Index = 10
	if d := cmp.Diff(first, applyOne(t, m, create)); d != "" {
		t.Errorf("the second time: %s", d)
	}
	if _, err := m.Volume(context.Background(), v.ID); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("a deleted volume came back: %v", err)
	}
	// It stays known while it may come, and after that it is refused.
	for i := range Remembered - 11 {
		e := Entry{Index: uint64(11 + i), Kind: KindCommand, Since: 10, Body: must(command.Encode(command.SetQuota{Tenant: "t"}))}
		binary.BigEndian.PutUint64(e.ID[4:], uint64(i))
		if r := applyOne(t, m, e); r != (command.Done{}) {
			t.Fatalf("%+v", r)
		}
	}
	create.Index = create.Since + Remembered - 1
	if r := applyOne(t, m, create); cmp.Diff(first, r) != "" {
		t.Errorf("the last time that it may come: %+v", r)
	}
	for i := range 2 * Remembered {
		e := Entry{Index: m.Applied() + 1, Kind: KindCommand, Since: m.Applied(), Body: must(command.Encode(command.DeleteQuota{Tenant: "t"}))}
		binary.BigEndian.PutUint64(e.ID[8:], uint64(i))
		applyOne(t, m, e)
	}
	create.Index = m.Applied() + 1
	if r, ok := applyOne(t, m, create).(command.Refused); !ok || !errors.Is(r.Err(), volume.ErrUnavailable) {
		t.Errorf("a proposal that is forgotten was answered %+v", r)
	}
	n := 0
	for k := range maps.Keys(dump(t, m)) {
		if strings.HasPrefix(k, proposals) {
			n++
		}
	}
	if n != Remembered {
		t.Errorf("%d proposals are remembered, not %d", n, Remembered)
	}
	verifyWith(t, m)
}

// What was refused changed nothing: the same proposal may be made again and succeed.
func TestARefusedProposalMayComeAgain(t *testing.T) {
	m := machine(t, "", Options{})
	v := newVolume(1, "p1")
	e := Entry{Index: 1, Kind: KindCommand, ID: ProposalID{1}, Body: must(command.Encode(command.CreateVolume{Volume: v}))}
	if _, ok := applyOne(t, m, e).(command.Refused); !ok {
		t.Fatal("made in a pool that does not exist")
	}
	applyOne(t, m, Entry{Index: 2, Kind: KindCommand, Body: must(command.Encode(node("n1", "p1")))})
	e.Index = 3
	if r, ok := applyOne(t, m, e).(command.Volume); !ok || !r.Created {
		t.Errorf("%+v", r)
	}
	e.Index, e.Since, e.ID = 4, 5, ProposalID{2}
	if _, ok := applyOne(t, m, e).(command.Refused); !ok {
		t.Error("a proposal older than its own past")
	}
}

// The answer to a proposal is bounded; what is not remembered of it is not made up.
func TestALongAnswerIsNotRemembered(t *testing.T) {
	m := machine(t, "", Options{})
	applyOne(t, m, Entry{Index: 1, Kind: KindCommand, Body: must(command.Encode(node("n1", "p1")))})
	v := newVolume(1, "p1")
	flags := []string{strings.Repeat("<", 1200)} // six bytes each, encoded
	v.Capabilities[0].MountFlags = flags
	v.Capabilities = append(v.Capabilities, volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeSingleWriter, MountFlags: flags})
	attach := command.Attach{Volume: v.ID, Node: "n1", Capability: volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, MountFlags: flags}}
	for _, c := range []command.Command{command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID}} {
		applyOne(t, m, Entry{Index: m.Applied() + 1, Kind: KindCommand, Body: must(command.Encode(c))})
	}
	e := Entry{Index: 4, Kind: KindCommand, ID: ProposalID{1}, Since: 3, Body: must(command.Encode(attach))}
	if r, ok := applyOne(t, m, e).(command.Volume); !ok || !r.Created {
		t.Fatalf("%+v", r)
	}
	e.Index = 5
	if r, ok := applyOne(t, m, e).(command.Refused); !ok || !errors.Is(r.Err(), volume.ErrUnavailable) {
		t.Errorf("%+v", r)
	}
}

func TestControllersAreRemembered(t *testing.T) {
	m := machine(t, "", Options{})
	index := uint64(0)
	do := func(c ControllerChange) error {
		t.Helper()
		index++
		r := applyOne(t, m, Entry{Index: index, Kind: KindController, Body: must(EncodeControllerChange(c))})
		if r, ok := r.(command.Refused); ok {
			return r.Err()
		}
		return nil
	}
	for i, c := range []struct {
		change ControllerChange
		want   error
	}{
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "1", Starts: 1, Session: "x"}, volume.ErrNotFound},
		{ControllerChange{Kind: Admit, ID: "a", Incarnation: "1"}, nil},
		{ControllerChange{Kind: Admit, ID: "a", Incarnation: "1"}, nil},
		{ControllerChange{Kind: Admit, ID: "a", Incarnation: "2"}, volume.ErrExists},
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "2", Starts: 9, Session: "x"}, volume.ErrStale},
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "1", Starts: 3, Session: "x"}, nil},
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "1", Starts: 3, Session: "x"}, nil},
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "1", Starts: 3, Session: "y"}, volume.ErrStale},
		{ControllerChange{Kind: Started, ID: "a", Incarnation: "1", Starts: 2, Session: "z"}, volume.ErrStale},
		{ControllerChange{Kind: Forget, ID: "a", Incarnation: "2"}, nil},
		{ControllerChange{Kind: Admit, ID: "a", Incarnation: "2"}, volume.ErrExists},
		{ControllerChange{Kind: Forget, ID: "a", Incarnation: "1"}, nil},
		{ControllerChange{Kind: Admit, ID: "a", Incarnation: "2"}, nil},
		{ControllerChange{Kind: "other", ID: "a", Incarnation: "2"}, volume.ErrInvalid},
	} {
		if err := do(c.change); !errors.Is(err, c.want) || err != nil && c.want == nil {
			t.Errorf("%d %+v: %v, not %v", i, c.change, err, c.want)
		}
	}
	index++
	applyOne(t, m, Entry{Index: index, Kind: KindMarks, Marks: []Mark{{"a", 7}, {"b", 8}}})
	index++
	applyOne(t, m, Entry{Index: index, Kind: KindMarks, Marks: []Mark{{"a", 5}}})
	list, err := m.Controllers(context.Background())
	if d := cmp.Diff([]Controller{{ID: "a", Incarnation: "2", Acknowledged: 7}}, list); d != "" || err != nil {
		t.Error(d, err)
	}
	for _, c := range []ControllerChange{{Kind: Admit, Incarnation: "1"}, {Kind: Admit, ID: "a"}, {Kind: Admit, ID: "a", Incarnation: strings.Repeat("x", 65)}} {
		if _, err := EncodeControllerChange(c); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestWaitApplied(t *testing.T) {
	m := machine(t, "", Options{})
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 3)
	go func() { got <- m.WaitApplied(ctx, 5) }()
	applyOne(t, m, Entry{Index: 4, Kind: KindMarks})
	applyOne(t, m, Entry{Index: 6, Kind: KindMarks})
	if err := <-got; err != nil {
		t.Error(err)
	}
	go func() { got <- m.WaitApplied(ctx, 7) }()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go func() { got <- m.WaitApplied(context.Background(), 7) }()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; !errors.Is(err, volume.ErrUnavailable) {
		t.Error(err)
	}
}
