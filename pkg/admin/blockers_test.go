package admin

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// crowded has so many snapshots that keep a node up, one of a deleted volume, and counts what is asked of one at a time.
type crowded struct {
	Control
	n, asked int
}

func (c *crowded) snapshot(i int) volume.Snapshot {
	return volume.Snapshot{ID: volume.SnapshotID(fmt.Sprint("snap-", i)), Name: fmt.Sprint("name-", i), Volume: "vol", State: volume.Ready}
}

func (c *crowded) Nodes(context.Context) ([]volume.Node, error) {
	return []volume.Node{{ID: "n1"}}, nil
}

func (c *crowded) DrainBlockers(context.Context, volume.NodeID) (bs []placement.Blocker, err error) {
	for i := range c.n {
		bs = append(bs, placement.Blocker{Volume: "vol", Snapshot: c.snapshot(i).ID, Reason: "its only copy is there"})
	}
	return append(bs, placement.Blocker{Volume: "vol", Snapshot: "snap-gone"}, placement.Blocker{Volume: "vol-gone"}), nil
}

func (c *crowded) Unhealthy(context.Context, control.Page) ([]control.Health, string, error) {
	return nil, "", nil
}

func (c *crowded) Volumes(context.Context, control.Page) ([]volume.Volume, string, error) {
	return []volume.Volume{{ID: "vol", Name: "data", State: volume.Ready}, {ID: "vol-gone", State: volume.Deleting}}, "", nil
}

func (c *crowded) Snapshots(context.Context, control.SnapshotFilter, control.Page) (xs []volume.Snapshot, _ string, _ error) {
	for i := range c.n {
		xs = append(xs, c.snapshot(i))
	}
	return append(xs, volume.Snapshot{ID: "snap-gone", State: volume.Deleting}), "", nil
}

func (c *crowded) Snapshot(context.Context, volume.SnapshotID) (volume.Snapshot, error) {
	c.asked++
	return c.snapshot(0), nil
}

func (c *crowded) Volume(context.Context, volume.ID) (volume.Volume, error) {
	c.asked++
	return volume.Volume{}, volume.ErrNotFound
}

// What keeps a node up is told by a few reads, however much it is.
func TestManyBlockers(t *testing.T) {
	c := &crowded{n: 3000}
	s := New(Options{Control: c})
	r, err := s.ListDrainBlockers(t.Context(), &adminpb.GetRequest{Ref: "n1"})
	if err != nil || len(r.Blockers) != c.n || c.asked != 0 {
		t.Fatalf("%d blockers, %d asked for, %v", len(r.GetBlockers()), c.asked, err)
	}
	if b := r.Blockers[7]; b.SnapshotName != "name-7" || b.VolumeName != "data" || b.Volume != "vol" {
		t.Errorf("%+v", b)
	}
	bs, _ := c.DrainBlockers(t.Context(), "n1")
	if text := s.blocking(t.Context(), bs); !strings.Contains(text, "3001 snapshots (name-0, ") || c.asked > aFew+1 {
		t.Errorf("%d asked for: %s", c.asked, text)
	}
}
