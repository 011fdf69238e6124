package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/harness"
)

// TestPoint18_Point19_Point31: a writer that is cut off or stopped is blocked before another node is given the volume; when
// its node is back it cleans up, with the device dead; and what CSI says of who has a volume is what the nodes do.
func TestPoint18_Point19_Point31(t *testing.T) {
	r := newRun(t, options{})
	files := &mountedClaim{w: r.world, claim: &harness.Claim{
		Name: "files", Size: 64 * mib, FSType: "ext4", Parameters: map[string]string{"replicas": "3"}}}
	must(t, r.at(0).Up(t.Context(), files.claim))
	for _, way := range []struct {
		name       string
		hold, free func(i int) error
	}{
		{"cut off", r.lab.Isolate, r.join},
		{"stopped", func(i int) error { return r.Nodes()[i].Signal(syscall.SIGSTOP) }, func(i int) error { return r.Nodes()[i].Signal(syscall.SIGCONT) }},
	} {
		from := files.node
		to := (from + 1) % 3
		must(t, r.settle())
		must(t, files.write("before it was "+way.name))
		stale, err := os.OpenFile(filepath.Join(files.dir(), "open"), os.O_RDWR|os.O_CREATE|os.O_SYNC, 0o600)
		must(t, err)
		// Raw volumes have writers that go on for as long as they can: they find out by themselves. (takeFrom has the checks.)
		must(t, r.takeFrom(from, way.name, func() error { return way.hold(from) }, func() error {
			// The filesystem goes elsewhere too, while its old node cannot be asked.
			gone := *r.at(to)
			gone.NodeID = r.Nodes()[from].NodeID()
			if err := gone.Detach(t.Context(), files.claim); err != nil {
				return err
			}
			o := r.at(to)
			for _, step := range []func(context.Context, *harness.Claim) error{o.Attach, o.Stage, o.Publish} {
				if err := step(t.Context(), files.claim); err != nil {
					return err
				}
			}
			files.node = to
			if err := r.published(to, from, append(r.owned(0, 1, 2), &served{w: r.world, claim: files.claim, owner: to})); err != nil {
				return err
			}
			return errors.Join(files.verify(), files.write("after it was "+way.name), way.free(from))
		}))
		// What was open on the old node can be written no more, and is in nobody's way.
		failed := make(chan error, 1)
		go func() {
			_, err := stale.Write([]byte("late"))
			failed <- err
		}()
		select {
		case err := <-failed:
			if err == nil {
				t.Errorf("the filesystem of a node that was %s took a synchronous write after another had it", way.name)
			}
		case <-time.After(backWithin):
			t.Errorf("a write to the filesystem of a node that was %s hangs", way.name)
		}
		must(t, r.at(from).Unpublish(t.Context(), files.claim))
		must(t, r.at(from).Unstage(t.Context(), files.claim))
		stale.Close()
		for _, leak := range r.Nodes()[from].Leaks() {
			t.Errorf("left on a node that was %s: %s", way.name, leak)
		}
		must(t, files.verify())
		must(t, r.settle())
		must(t, r.published(to, to, r.served))
		must(t, r.each(r.served, (*served).check))
	}
	must(t, r.at(files.node).Down(t.Context(), files.claim))
	must(t, r.at(files.node).Delete(t.Context(), files.claim))
	must(t, r.each(r.served, (*served).end))
	r.nothingLeft()
}

// published compares what the controller on a node says of who has volumes with where they are used. Gone is a node that
// cannot be asked.
func (r *faultRun) published(at, gone int, all []*served) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	c := r.Nodes()[at].CSI()
	list, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	listed := map[string][]string{}
	for _, e := range list.GetEntries() {
		listed[e.GetVolume().GetVolumeId()] = e.GetStatus().GetPublishedNodeIds()
	}
	for _, s := range all {
		want := []string{r.Nodes()[s.owner].NodeID()}
		one, err := c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: s.claim.ID()})
		if err != nil {
			return err
		}
		if got := one.GetStatus().GetPublishedNodeIds(); !slices.Equal(got, want) {
			return fmt.Errorf("%s: ControllerGetVolume has published_node_ids %v", s, got)
		}
		if got := listed[s.claim.ID()]; !slices.Equal(got, want) {
			return fmt.Errorf("%s: ListVolumes has published_node_ids %v", s, got)
		}
		// The data plane: a device of the volume is on no other node.
		for i, n := range r.Nodes() {
			if i == gone && gone != at {
				continue
			}
			loops, err := harness.Loops(n.Dir())
			if err != nil {
				return err
			}
			has := slices.ContainsFunc(loops, func(l harness.Loop) bool { return strings.Contains(l.Backing, s.claim.ID()) })
			if has != (i == s.owner) {
				return fmt.Errorf("%s: node %s has a device of it: %v (%v)", s, n.NodeID(), has, loops)
			}
		}
	}
	return nil
}
