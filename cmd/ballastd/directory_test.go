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

// TestWhoIsAdmitted: a node that was removed is refused from the moment when a controller says so, whatever an older list says,
// and nobody is admitted while it is not known who was removed.
func TestWhoIsAdmitted(t *testing.T) {
	l := &listed{nodes: []volume.Node{{ID: "n1"}, {ID: "n2"}, {ID: "n3"}}, removed: []volume.NodeID{"n0"}, err: volume.ErrUnavailable}
	d := newDirectory(volume.Node{ID: "n1"}, nil, slog.New(slog.DiscardHandler))
	d.members = l
	var dropped []volume.NodeID
	d.dropBy(func(gone func(volume.NodeID) bool) {
		for _, id := range []volume.NodeID{"n0", "n2", "n3"} {
			if gone(id) {
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
