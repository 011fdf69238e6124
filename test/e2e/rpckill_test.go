package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/harness"
)

// cut is a call that is to be cut off: prepare brings c to where the call can be made, call makes it once, and after
// checks, when it was made again until it was OK, that it is done. undo goes back to where nothing is prepared.
type cut struct {
	name                       string
	prepare, call, after, undo func(context.Context, *harness.Claim) error
}

// TestKillDuringEachCall cuts every call that changes something at many moments from its beginning to its end.
func TestKillDuringEachCall(t *testing.T) {
	b := newBed(t, time.Minute)
	once := *b.o
	once.Patience = 0
	k := &killer{bed: b, r: random(t, 2), once: &once}

	var ids []string
	for _, fsType := range []string{"ext4", ""} {
		for _, cut := range k.cuts() {
			name := cut.name + "/" + fsType
			if fsType == "" {
				name = cut.name + "/block"
			}
			if fsType == "" && cut.name == "CreateVolume" {
				continue // no different from ext4's
			}
			ok := t.Run(name, func(t *testing.T) { ids = append(ids, k.try(t, cut, fsType)...) })
			if !ok {
				t.FailNow()
			}
		}
	}
	b.nothingLeft(t, ids...)
}

type killer struct {
	*bed
	r    *rand.Rand
	once *harness.Orchestrator
	n    int
	load workload
	snap string
}

// try runs the call some times unhurt, to learn how long it takes, then cuts it off at moments spread over that time.
func (k *killer) try(t *testing.T, c cut, fsType string) (ids []string) {
	const unhurt, usual = 3, 8
	var longest time.Duration
	deadline := time.Now().Add(bounded(t, 0) / 20)
	for i := 0; i < unhurt+usual || time.Now().Before(deadline); i++ {
		k.n++
		claim := &harness.Claim{Name: fmt.Sprintf("k%d", k.n), Size: extSize, FSType: fsType}
		k.must(t, c.prepare(k.ctx, claim))
		if i < unhurt {
			from := time.Now()
			k.must(t, c.call(k.ctx, claim))
			longest = max(longest, time.Since(from))
		} else {
			after := time.Duration(k.r.Int64N(int64(longest + longest/4)))
			if !k.cutOff(t, c, claim, after) {
				t.Fatalf("cut off %v after it was sent (it takes up to %v)", after, longest)
			}
		}
		ids = append(ids, claim.ID())
		k.must(t, c.after(k.ctx, claim))
		k.must(t, c.undo(k.ctx, claim))
		if t.Failed() {
			return ids
		}
	}
	for _, l := range k.Leaks(ids...) {
		t.Errorf("left behind: %s", l)
	}
	return ids
}

// cutOff makes the call, kills the daemon a while later, starts it and repeats the call until it is OK.
func (k *killer) cutOff(t *testing.T, c cut, claim *harness.Claim, after time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	done := make(chan struct{})
	probe := *claim // the call that is cut off must not write to what the test reads
	go func() {
		defer close(done)
		_ = c.call(ctx, &probe) // whether it got through is chance
	}()
	for from := time.Now(); time.Since(from) < after; { // finer than timers
		if left := after - time.Since(from); left > 2*time.Millisecond {
			time.Sleep(left - time.Millisecond)
		}
	}
	if err := k.Kill(); err != nil {
		t.Error(err)
		return false
	}
	cancel()
	<-done
	if err := k.Start(k.ctx); err != nil {
		t.Error(err)
		return false
	}
	err := k.o.Call(k.ctx, c.name+" again", func(ctx context.Context) error { return c.call(ctx, claim) })
	if err != nil {
		t.Error(err)
		return false
	}
	return true
}

// to makes a step of several.
func to(steps ...func(context.Context, *harness.Claim) error) func(context.Context, *harness.Claim) error {
	return func(ctx context.Context, c *harness.Claim) error {
		for _, s := range steps {
			if err := s(ctx, c); err != nil {
				return err
			}
		}
		return nil
	}
}

func nothing(context.Context, *harness.Claim) error { return nil }

func (k *killer) cuts() []cut {
	o, once := k.o, k.once
	write := func(_ context.Context, c *harness.Claim) error {
		k.load = newWorkload(c.FSType, c.Size-soiled) // the end is for soil
		return k.load.write(k.r, o.TargetPath(c))
	}
	// again brings a volume that was cut off while it was staged back to its workload, and looks at what it wrote.
	again := func(ctx context.Context, c *harness.Claim) error {
		if err := o.Again(ctx, c); err != nil {
			return err
		}
		return k.load.verify(o.TargetPath(c))
	}
	snapshot := func(o *harness.Orchestrator) func(context.Context, *harness.Claim) error {
		return func(ctx context.Context, c *harness.Claim) (err error) {
			k.snap, err = o.Snapshot(ctx, c, c.Name+"-snap")
			return err
		}
	}
	deleteSnapshot := func(o *harness.Orchestrator) func(context.Context, *harness.Claim) error {
		return func(ctx context.Context, _ *harness.Claim) error { return o.DeleteSnapshot(ctx, k.snap) }
	}
	restore := func(ctx context.Context, c *harness.Claim) error {
		r := &harness.Claim{Name: c.Name + "-r", Size: c.Size, FSType: c.FSType, Source: harness.FromSnapshot(k.snap)}
		if err := o.Up(ctx, r); err != nil {
			return err
		}
		if err := k.load.fork().verify(o.TargetPath(r)); err != nil {
			return err
		}
		return to(o.Down, o.Delete)(ctx, r)
	}
	// dirty leaves bytes in the page cache for the call to carry along.
	dirty := func(_ context.Context, c *harness.Claim) error { return soil(k.r, c.FSType, o.TargetPath(c)) }
	expanded := func(_ context.Context, c *harness.Claim) error {
		n, err := visible(c.FSType, o.TargetPath(c))
		if err == nil && n < extSize+4*mib {
			err = fmt.Errorf("shows %d bytes after it was expanded", n)
		}
		return err
	}
	grow := func(o *harness.Orchestrator) func(context.Context, *harness.Claim) error {
		return func(ctx context.Context, c *harness.Claim) error { return o.Expand(ctx, c, extSize+16*mib, false) }
	}
	create, attach, stage, publish := o.Create, o.Attach, o.Stage, o.Publish
	up := to(create, attach, stage, publish)
	end := to(o.Down, o.Delete)
	return []cut{
		{"CreateVolume", nothing, once.Create, k.created, o.Delete},
		{"DeleteVolume", to(up, write, o.Down), once.Delete, k.deleted, nothing},
		{"ControllerPublishVolume", create, once.Attach, to(stage, publish, write, again), end},
		{"ControllerUnpublishVolume", to(up, write, o.Unpublish, o.Unstage), once.Detach, to(attach, stage, publish, again), end},
		{"NodeStageVolume", to(create, attach), once.Stage, to(publish, write, again), end},
		{"NodePublishVolume", to(create, attach, stage), once.Publish, to(o.Again, write, again), end},
		{"NodeUnpublishVolume", to(up, write, dirty), once.Unpublish, again, end},
		{"NodeUnstageVolume", to(up, write, dirty, o.Unpublish), once.Unstage, again, end},
		{"Detach of a staged volume", to(up, write, dirty, o.Unpublish), once.Detach, again, end},
		{"ControllerExpandVolume", to(up, write, o.Down), grow(once), to(again, expanded), end},
		{"ControllerExpandVolume in use", to(up, write), k.growInUse(once), to(o.Down, grow(o), again, expanded), end},
		{"NodeExpandVolume", to(up, write), k.nodeGrow(once), to(o.Down, grow(o), again, expanded), end},
		{"CreateSnapshot", to(up, write), snapshot(once), to(restore, again, deleteSnapshot(o)), end},
		{"DeleteSnapshot", to(up, write, snapshot(o)), deleteSnapshot(once), again, end},
	}
}

// growInUse expands a block volume that is published. An ext4 is taken down first: the kernel refuses to grow it in
// some containers.
func (k *killer) growInUse(once *harness.Orchestrator) func(context.Context, *harness.Claim) error {
	return func(ctx context.Context, c *harness.Claim) error {
		if c.FSType != "" {
			if err := k.o.Down(ctx, c); err != nil {
				return err
			}
		}
		return once.Expand(ctx, c, extSize+16*mib, false)
	}
}

// nodeGrow is NodeExpandVolume with its controller call before it. Where the device has died the call may be refused;
// staging again grows it.
func (k *killer) nodeGrow(once *harness.Orchestrator) func(context.Context, *harness.Claim) error {
	return func(ctx context.Context, c *harness.Claim) error {
		if err := k.o.Expand(ctx, c, extSize+16*mib, false); err != nil {
			return err
		}
		if c.FSType != "" {
			return nil
		}
		return once.NodeExpand(ctx, c, extSize+16*mib)
	}
}

// created checks that there is one volume of the claim's name: creating it again gives the same.
func (k *killer) created(ctx context.Context, c *harness.Claim) error {
	r, err := k.CSI().ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	if n := len(r.GetEntries()); n != 1 || r.GetEntries()[0].GetVolume().GetVolumeId() != c.ID() {
		return fmt.Errorf("there are %d volumes, not the one that was asked for: %v", n, r)
	}
	return nil
}

func (k *killer) deleted(ctx context.Context, _ *harness.Claim) error {
	r, err := k.CSI().ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err == nil && len(r.GetEntries()) != 0 {
		err = fmt.Errorf("volumes are left: %v", r)
	}
	return err
}

// soiled is how much soil writes, in bytes.
const soiled = 4 * mib

// soil writes without flushing.
func soil(r *rand.Rand, fsType, path string) error {
	name, at := path, int64(extSize-soiled)
	if fsType != "" {
		name, at = path+"/soil", 0
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	p := slices.Repeat([]byte{byte(r.IntN(256))}, soiled)
	if _, err = f.WriteAt(p, at); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
