// Package reconcile finishes what calls left unfinished: volumes half made, deleted, grown or detached, snapshots that
// nobody waits for, limits that did not reach their node. And it keeps as many replicas in sync as volumes should have, and has
// the copies of snapshots compared. What is to be done is planned by pure functions; the loop carries it out, with a pause after
// each failure that grows.
package reconcile

import (
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Kind of an action.
type Kind string

// Kinds of actions.
const (
	// Volume, Snapshot and QoS finish what was left unfinished.
	Volume   Kind = "volume"
	Snapshot Kind = "snapshot"
	QoS      Kind = "qos"
	// Add gives a volume a replica in Pool, Drop takes Replica from it, Sync has those that are behind brought up.
	Add  Kind = "add replica"
	Drop Kind = "drop replica"
	Sync Kind = "sync"
	// Move has Pool let go of a snapshot.
	Move Kind = "move snapshot"
	// Copy has a snapshot of a deleted volume copied from the pool From to Pool, End ends the copy into Replica of the volume ID.
	Copy Kind = "copy snapshot"
	End  Kind = "end copy"
	// Compare compares the copies of a snapshot.
	Compare Kind = "compare copies"
)

// Action is one thing to take up.
type Action struct {
	Kind Kind
	ID   string
	// From, Pool and Replica are set for the kinds that say so.
	From    volume.PoolID
	Pool    volume.PoolID
	Replica volume.ReplicaID
}

// Attempt is what is remembered of an action that is not done.
type Attempt struct {
	// Failures in a row.
	Failures int
	// Next is when it may be tried again.
	Next time.Time
}

// Plan returns what is unfinished, in the order of the state, so that two passes over the same state plan the same.
// Deleting comes with the volumes.
func Plan(p control.Pending) []Action {
	var out []Action
	for _, id := range p.Volumes {
		out = append(out, Action{Kind: Volume, ID: string(id)})
	}
	for _, id := range p.Snapshots {
		out = append(out, Action{Kind: Snapshot, ID: string(id)})
	}
	for _, id := range p.QoS {
		out = append(out, Action{Kind: QoS, ID: string(id)})
	}
	return out
}

// Due are the actions that need not pause any more after they failed, those that have waited longest first, and before them what
// was not tried yet: many that hang in turn, for one disk, are not to keep the others from their place.
func Due(planned []Action, tried map[Action]Attempt, now time.Time) []Action {
	var out []Action
	for _, a := range planned {
		if t, ok := tried[a]; !ok || !now.Before(t.Next) {
			out = append(out, a)
		}
	}
	slices.SortStableFunc(out, func(a, b Action) int { return tried[a].Next.Compare(tried[b].Next) })
	return out
}

// Settled returns the actions that were tried and are not planned any more: they can be forgotten.
func Settled(planned []Action, tried map[Action]Attempt) []Action {
	still := map[Action]bool{}
	for _, a := range planned {
		still[a] = true
	}
	var out []Action
	for a := range tried {
		if !still[a] {
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
