// Package reconcile finishes what calls left unfinished: volumes half made, deleted, grown or detached, snapshots that
// nobody waits for, limits that did not reach their node. What is to be done is planned by a pure function; the loop
// carries it out, with a pause after each failure that grows.
package reconcile

import (
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
)

// Kind of an action.
type Kind string

// Kinds of actions.
const (
	Volume   Kind = "volume"
	Snapshot Kind = "snapshot"
	QoS      Kind = "qos"
)

// Action is one thing to take up.
type Action struct {
	Kind Kind
	ID   string
}

// Attempt is what is remembered of an action that is not done.
type Attempt struct {
	// Failures in a row.
	Failures int
	// Next is when it may be tried again.
	Next time.Time
}

// Plan returns what is to be done now: all that is pending, less what failed and still has to pause. Deleting comes with
// the volumes, in the order of the state, so that two passes over the same state plan the same.
func Plan(p control.Pending, tried map[Action]Attempt, now time.Time) []Action {
	var out []Action
	add := func(a Action) {
		if t, ok := tried[a]; !ok || !now.Before(t.Next) {
			out = append(out, a)
		}
	}
	for _, id := range p.Volumes {
		add(Action{Volume, string(id)})
	}
	for _, id := range p.Snapshots {
		add(Action{Snapshot, string(id)})
	}
	for _, id := range p.QoS {
		add(Action{QoS, string(id)})
	}
	return out
}

// Settled returns the actions that were tried and are not pending any more: they can be forgotten.
func Settled(p control.Pending, tried map[Action]Attempt) []Action {
	pending := map[Action]bool{}
	for _, a := range Plan(p, nil, time.Time{}) {
		pending[a] = true
	}
	var out []Action
	for a := range tried {
		if !pending[a] {
			out = append(out, a)
		}
	}
	return out
}

// Pause after a number of failures in a row: it doubles from base and stops at most. Jitter is within [0, 1): it spreads
// the second half of the pause.
func Pause(failures int, base, most time.Duration, jitter float64) time.Duration {
	d := most
	if n := failures - 1; n < 20 {
		d = min(most, base<<max(0, n))
	}
	return d/2 + time.Duration(jitter*float64(d/2))
}
