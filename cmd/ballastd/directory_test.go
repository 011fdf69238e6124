package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// listed is members with a fixed answer; asked happens before it is given.
type listed struct {
	nodes   []volume.Node
	removed []volume.NodeID
	newest  map[volume.NodeID]uint64
	err     error
	asked   func()
}

func (l *listed) Nodes(context.Context) ([]volume.Node, error) { return l.nodes, l.err }

func (l *listed) RemovedNodes(context.Context) ([]volume.NodeID, error) {
	removed := l.removed
	if l.asked != nil {
		l.asked()
	}
	return removed, l.err
}

func (l *listed) Generations(context.Context) (map[volume.NodeID]uint64, error) {
	return l.newest, l.err
}

// TestWhoseNameItIs: a machine that joins under the name of another takes its place.
func TestWhoseNameItIs(t *testing.T) {
	l := &listed{nodes: []volume.Node{{ID: "n1"}, {ID: "n2"}}, newest: map[volume.NodeID]uint64{"n2": 1}}
	d := newDirectory(volume.Node{ID: "n1"}, nil, slog.New(slog.DiscardHandler))
	d.members = l
	peer := func(id volume.NodeID, generation uint64, cluster string) pki.Peer {
		p := pki.Peer{Identity: pki.Node(id, pki.RoleStorage), Cluster: cluster}
		p.Generation = generation
		return p
	}
	conns := map[string]pki.Peer{ // as they were when they were made; "" is no certificate
		"n1": peer("n1", 0, "c"), "old n2": peer("n2", 1, "c"), "new n2": peer("n2", 2, "c"), "plain n2": peer("n2", 0, ""), "n3": peer("n3", 0, "c"),
		"admin n2": {Identity: pki.Admin("n2", pki.RoleAdmin), Cluster: "c"},
	}
	var dropped []string
	d.dropBy(func(gone func(pki.Peer) bool) {
		dropped = nil
		for name, p := range conns {
			if gone(p) {
				dropped = append(dropped, name)
			}
		}
		slices.Sort(dropped)
	})
	look := func(generations map[volume.NodeID]uint64) {
		t.Helper()
		l.newest = generations
		if err := d.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	admitted := func(id volume.NodeID, generation uint64, want bool) {
		t.Helper()
		p := pki.Peer{Identity: pki.Node(id, pki.RoleStorage)}
		p.Generation = generation
		for what, verify := range map[string]pki.Verify{"admitted": d.admits, "called": d.current} {
			if err := verify(p); (err == nil) != want || err != nil && !errors.Is(err, pki.ErrRefused) {
				t.Errorf("%s, generation %d is %s: %v", id, generation, what, err)
			}
		}
	}
	look(map[volume.NodeID]uint64{"n2": 1})
	admitted("n2", 1, true)
	if len(d.replacing) > 0 {
		t.Error("it is looked who was replaced")
	}
	admitted("n2", 2, true) // not listed yet
	if len(d.replacing) == 0 {
		t.Error("a later machine was met, and it is not looked who was replaced")
	}
	admitted("n2", 0, false)
	admitted("n1", 0, true) // the founder
	if len(dropped) > 0 {
		t.Errorf("dropped %v", dropped)
	}
	look(map[volume.NodeID]uint64{"n1": 1, "n2": 2})
	admitted("n2", 1, false)
	admitted("n2", 2, true)
	admitted("n1", 0, false) // this one itself
	if !slices.Equal(dropped, []string{"n1", "old n2", "plain n2"}) {
		t.Errorf("dropped %v", dropped)
	}
	look(map[volume.NodeID]uint64{"n1": 1, "n2": 2})
	if !slices.Equal(dropped, []string{"n1", "old n2"}) { // their handshakes ended since
		t.Errorf("then dropped %v", dropped)
	}
	if err := d.current(pki.Peer{Identity: pki.Admin("n2", pki.RoleAdmin)}); err != nil {
		t.Errorf("an admin of that name: %v", err)
	}
}

// TestWhoIsAdmitted: a node that was removed is refused from the moment when a controller says so, whatever an older list says,
// and nobody is admitted while it is not known who was removed.
func TestWhoIsAdmitted(t *testing.T) {
	l := &listed{nodes: []volume.Node{{ID: "n1"}, {ID: "n2"}, {ID: "n3"}}, removed: []volume.NodeID{"n0"}, err: volume.ErrUnavailable}
	d := newDirectory(volume.Node{ID: "n1"}, nil, slog.New(slog.DiscardHandler))
	d.members = l
	var dropped []volume.NodeID
	d.dropBy(func(gone func(pki.Peer) bool) {
		for _, id := range []volume.NodeID{"n0", "n2", "n3"} {
			if gone(pki.Peer{Identity: pki.Node(id), Cluster: "c"}) {
				dropped = append(dropped, id)
			}
		}
	})
	admitted := func(when string, id volume.NodeID, want bool) {
		t.Helper()
		err := d.admits(pki.Peer{Identity: pki.Node(id, pki.RoleStorage)})
		if (err == nil) != want || err != nil && !errors.Is(err, pki.ErrRefused) {
			t.Errorf("%s: %s is admitted: %v", when, id, err)
		}
	}
	look := func() {
		t.Helper()
		if err := d.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	admitted("before anything is known", "n2", false)
	l.err = nil
	admitted("it is asked for", "n2", true)
	admitted("removed before this process began", "n0", false)
	admitted("not listed yet", "n9", true)

	l.asked = func() { d.expel("n2") } // after the list was made
	look()
	l.asked = nil
	admitted("told of while an older list was on its way", "n2", false)
	if !slices.Contains(dropped, "n2") || slices.Contains(dropped, "n3") {
		t.Errorf("dropped %v", dropped)
	}
	l.nodes, l.removed = []volume.Node{{ID: "n1"}, {ID: "n3"}}, []volume.NodeID{"n0", "n2"}
	look()
	admitted("by the list", "n2", false)
	l.err = errors.New("no answer")
	d.expel("n3")
	admitted("while no controller answers", "n3", false)
	l.err, l.removed = nil, []volume.NodeID{"n0"}
	d.mu.Lock()
	d.asked = time.Time{} // a while ago
	d.mu.Unlock()
	admitted("it has joined again", "n2", true)
}
