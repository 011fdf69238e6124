package reconcile

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// compareEvery is how often the copies of a snapshot are compared, as often as pools are scrubbed.
	compareEvery = 7 * 24 * time.Hour
	// compareBack is how far back a process that begins to lead looks for comparisons that another may not have ended.
	compareBack = 24 * time.Hour
	// compareRetry is how long after a comparison failed it begins anew.
	compareRetry = time.Hour
)

// Comparing is what is remembered of comparisons; a process that begins to lead knows of none.
type Comparing struct {
	// Since is when this process began to lead.
	Since time.Time
	// Last is when a snapshot's copies were compared, Retry when one whose comparison failed may be tried again.
	Last, Retry map[volume.SnapshotID]time.Time
	// Now is the one comparison of the cluster that is under way; of snapshot "" there is none.
	Now control.Comparison
}

// NewComparing is what a process knows that begins to lead.
func NewComparing(now time.Time) *Comparing {
	return &Comparing{Since: now, Last: map[volume.SnapshotID]time.Time{}, Retry: map[volume.SnapshotID]time.Time{}}
}

// Next returns the comparison to go on with, or to begin: of the snapshots that are due the one that was not compared for longest.
// Each has its time of the week, by its id, so that the work of a week is spread over it whoever leads. There is none where no
// snapshot is due whose copies can all be read.
func (c Comparing) Next(st control.State, now time.Time) (control.Comparison, bool) {
	type due struct {
		id         volume.SnapshotID
		last, when time.Time
	}
	var all []due
	known := map[volume.PoolID]bool{}
	for _, n := range st.View.Nodes {
		for _, p := range n.Pools {
			known[p.ID] = true
		}
	}
	unread := func(h volume.Replica) bool {
		_, away := st.Away[h.Pool]
		return away || !known[h.Pool] || h.Damaged
	}
	for _, x := range st.Snapshots {
		if x.State != volume.Ready || x.Hidden || len(x.Holders) < 2 || now.Before(c.Retry[x.ID]) || slices.ContainsFunc(x.Holders, unread) {
			continue
		}
		if x.ID == c.Now.Snapshot {
			return c.Now, true
		}
		last := c.Since.Add(-compareBack)
		if created := time.Unix(0, int64(x.CreatedAt)); created.After(last) {
			last = created
		}
		if done, ok := c.Last[x.ID]; ok {
			last = done
		}
		if when := turn(x.ID, now); when.After(last) {
			all = append(all, due{x.ID, last, when})
		}
	}
	if len(all) == 0 {
		return control.Comparison{}, false
	}
	next := slices.MinFunc(all, func(a, b due) int {
		return cmp.Or(a.last.Compare(b.last), a.when.Compare(b.when), cmp.Compare(a.id, b.id))
	})
	return control.Comparison{Snapshot: next.id}, true
}

// turn is the last time until now at which a snapshot's turn came.
func turn(id volume.SnapshotID, now time.Time) time.Time {
	h := sha256.Sum256([]byte(id))
	phase := time.Duration(binary.BigEndian.Uint64(h[:]) % uint64(compareEvery))
	since := time.Duration(now.UnixNano()) - phase
	return now.Add(-(since % compareEvery))
}

// Ended notes what came of a step: how far it got, or why it failed.
func (c *Comparing) Ended(now time.Time, x control.Comparison, err error) {
	switch {
	case err != nil:
		c.Retry[x.Snapshot] = now.Add(compareRetry)
		c.Now = control.Comparison{}
	case x.Done:
		c.Last[x.Snapshot] = now
		delete(c.Retry, x.Snapshot)
		c.Now = control.Comparison{}
	default:
		c.Now = x
	}
}

// Forget drops what is remembered of snapshots that are there no more.
func (c *Comparing) Forget(st control.State) {
	there := make(map[volume.SnapshotID]bool, len(st.Snapshots))
	for _, x := range st.Snapshots {
		there[x.ID] = true
	}
	for _, m := range []map[volume.SnapshotID]time.Time{c.Last, c.Retry} {
		for id := range m {
			if !there[id] {
				delete(m, id)
			}
		}
	}
}
