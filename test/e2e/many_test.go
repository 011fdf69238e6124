package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/test/harness"
)

// together runs fn(0) to fn(n-1) at once and returns their errors in order.
func together(n int, fn func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = fn(i)
		})
	}
	close(start)
	wg.Wait()
	return errs
}

// TestManyCreates sends 100 creates at once, equal and different, with the provisioner's deadline.
func TestManyCreates(t *testing.T) {
	const n = 100
	b := newBed(t, time.Minute, "--over-provision=100")
	once := *b.o
	once.Patience = 0

	one := make([]*harness.Claim, n)
	for i, err := range together(n, func(i int) error {
		one[i] = &harness.Claim{Name: "same", Size: extSize, FSType: "ext4"}
		return once.Create(b.ctx, one[i])
	}) {
		if err != nil {
			t.Errorf("create %d of %d equal ones: %v", i, n, err)
		} else if one[i].ID() != one[0].ID() {
			t.Errorf("create %d made %s, the first one %s", i, one[i].ID(), one[0].ID())
		}
	}
	r, err := b.CSI().ListVolumes(b.ctx, &csi.ListVolumesRequest{})
	b.must(t, err)
	if len(r.GetEntries()) != 1 {
		t.Fatalf("equal creates made %d volumes", len(r.GetEntries()))
	}

	ids := make([]string, n)
	for i, err := range together(n, func(i int) error {
		c := &harness.Claim{Name: fmt.Sprintf("other-%d", i), Size: extSize, FSType: "ext4"}
		err := once.Create(b.ctx, c)
		ids[i] = c.ID()
		return err
	}) {
		if err != nil {
			t.Errorf("create %d of %d different ones: %v", i, n, err)
		}
	}
	for i, err := range together(n, func(i int) error { return once.Delete(b.ctx, &harness.Claim{Volume: &csi.Volume{VolumeId: ids[i]}}) }) {
		if err != nil {
			t.Errorf("delete %d of %d: %v", i, n, err)
		}
	}
	for i, err := range together(n, func(int) error { return once.Delete(b.ctx, one[0]) }) {
		if err != nil {
			t.Errorf("delete %d of %d equal ones: %v", i, n, err)
		}
	}
	b.nothingLeft(t)
}

// TestCancelledCallsGoOn cancels each call at a random moment; the same call then finishes the work.
func TestCancelledCallsGoOn(t *testing.T) {
	r := random(t, 3)
	b := newBed(t, time.Minute)
	hasty := *b.o
	hasty.Patience = 0
	var mu sync.Mutex
	var ids []string
	for i, err := range together(4, func(i int) error {
		fsType := []string{"ext4", ""}[i%2]
		for lap := range 6 {
			c := &harness.Claim{Name: fmt.Sprintf("c%d-%d", i, lap), Size: extSize, FSType: fsType}
			snap := ""
			snapshot := func(o *harness.Orchestrator) func(context.Context, *harness.Claim) error {
				return func(ctx context.Context, c *harness.Claim) error {
					id, err := o.Snapshot(ctx, c, c.Name)
					if err == nil {
						snap = id
					}
					return err
				}
			}
			deleteSnapshot := func(o *harness.Orchestrator) func(context.Context, *harness.Claim) error {
				return func(ctx context.Context, _ *harness.Claim) error { return o.DeleteSnapshot(ctx, snap) }
			}
			load := newWorkload(fsType, c.Size)
			write := func(context.Context, *harness.Claim) error { return load.verify(b.o.TargetPath(c)) }
			for _, step := range []struct {
				hasty, patient func(context.Context, *harness.Claim) error
			}{
				{hasty.Create, b.o.Create}, {hasty.Attach, b.o.Attach}, {hasty.Stage, b.o.Stage}, {hasty.Publish, b.o.Publish},
				{write, write}, {snapshot(&hasty), snapshot(b.o)}, {deleteSnapshot(&hasty), deleteSnapshot(b.o)},
				{hasty.Unpublish, b.o.Unpublish}, {hasty.Unstage, b.o.Unstage}, {hasty.Detach, b.o.Detach}, {hasty.Delete, b.o.Delete},
			} {
				mu.Lock()
				after := time.Duration(r.Int64N(int64(20 * time.Millisecond)))
				mu.Unlock()
				ctx, cancel := context.WithTimeout(b.ctx, after)
				_ = step.hasty(ctx, c) // may be done, may be cancelled
				cancel()
				if err := step.patient(b.ctx, c); err != nil {
					return err
				}
			}
			mu.Lock()
			ids = append(ids, c.ID())
			mu.Unlock()
		}
		return nil
	}) {
		if err != nil {
			t.Errorf("worker %d: %v", i, err)
		}
	}
	if !t.Failed() {
		// The orchestrator's directories are empty now: staging directories are its own to remove.
		b.nothingLeft(t, ids...)
	}
}

// TestQuotaHoldsAgainstParallelCreates: creates, clones and expands at once never pass a tenant's limits together, and
// what refuses says which limit it was.
func TestQuotaHoldsAgainstParallelCreates(t *testing.T) {
	const tenant, limit = "team-a", 10
	b := newBed(t, time.Minute, "--over-provision=100")
	once := *b.o
	once.Patience = 0
	set := func(r *adminpb.SetQuotaRequest) {
		t.Helper()
		r.Tenant = tenant
		_, err := b.Admin().SetQuota(b.ctx, r)
		b.must(t, err)
	}
	used := func() *adminpb.Amounts {
		t.Helper()
		r, err := b.Admin().ListQuotas(b.ctx, &adminpb.ListQuotasRequest{})
		b.must(t, err)
		for _, q := range r.GetQuotas() {
			if q.GetTenant() == tenant {
				return q.GetUsed()
			}
		}
		return nil
	}
	claim := func(name string) *harness.Claim {
		return &harness.Claim{Name: name, Size: extSize, Parameters: map[string]string{"tenant": tenant}}
	}
	// race sends n calls at once of which no more than the limit may be OK; it returns those that were.
	race := func(what, names string, n int, call func(i int) error, alsoFine ...codes.Code) int {
		t.Helper()
		var good atomic.Int64
		for i, err := range together(n, call) {
			switch {
			case err == nil:
				good.Add(1)
			case slices.Contains(alsoFine, status.Code(err)):
			case status.Code(err) != codes.ResourceExhausted:
				t.Errorf("%s %d: %v", what, i, err)
			case !strings.Contains(err.Error(), names) || !strings.Contains(err.Error(), tenant):
				t.Errorf("%s %d: the error does not name the limit (%q) and the tenant: %v", what, i, names, err)
			}
		}
		return int(good.Load())
	}

	set(&adminpb.SetQuotaRequest{Volumes: proto.Int64(limit)})
	claims := make([]*harness.Claim, 4*limit)
	create := func(prefix string) func(i int) error {
		return func(i int) error {
			claims[i] = claim(fmt.Sprintf("%s-%d", prefix, i))
			return once.Create(b.ctx, claims[i])
		}
	}
	remove := func() {
		t.Helper()
		for _, c := range claims {
			if c.ID() != "" {
				b.must(t, b.o.Delete(b.ctx, c))
			}
		}
	}
	if n := race("create", "volumes", len(claims), create("v")); n != limit {
		t.Errorf("%d volumes were made under a limit of %d", n, limit)
	}
	if u := used(); u.GetVolumes() != limit || u.GetLogicalBytes() != limit*extSize {
		t.Errorf("used is %v", u)
	}
	remove()

	set(&adminpb.SetQuotaRequest{Volumes: proto.Int64(0), LogicalBytes: proto.Int64(limit * extSize)})
	if n := race("create", "logical", len(claims), create("w")); n != limit {
		t.Errorf("%d volumes of 64 MiB were made under a limit of %d times that", n, limit)
	}
	first := -1
	for i, c := range claims {
		if c.ID() != "" && first < 0 {
			first = i
		} else if c.ID() != "" {
			b.must(t, b.o.Delete(b.ctx, c))
		}
	}
	source := claims[first]

	// One is left. Clones of it and its own growth race for the other nine.
	clones := make([]*harness.Claim, 2*limit)
	if n := race("clone or expand", "logical", len(clones)+1, func(i int) error {
		if i == len(clones) {
			return once.Expand(b.ctx, source, limit*extSize/2, false)
		}
		clones[i] = claim(fmt.Sprintf("clone-%d", i))
		clones[i].Source = harness.FromVolume(source.ID())
		return once.Create(b.ctx, clones[i])
	}, codes.OutOfRange, codes.Aborted); n == 0 { // the source had grown before, or was growing
		t.Error("nothing was allowed")
	}
	if u := used(); u.GetLogicalBytes() > limit*extSize || u.GetLogicalBytes() <= extSize {
		t.Errorf("used is %v of %d logical bytes", u, limit*extSize)
	}

	set(&adminpb.SetQuotaRequest{LogicalBytes: proto.Int64(0), Snapshots: proto.Int64(3)})
	snaps := make([]string, limit)
	if n := race("snapshot", "snapshots", len(snaps), func(i int) error {
		id, err := once.Snapshot(b.ctx, source, fmt.Sprintf("s-%d", i))
		if err == nil {
			snaps[i] = id
		}
		return err
	}); n != 3 {
		t.Errorf("%d snapshots were made under a limit of 3", n)
	}
	for _, id := range snaps {
		if id != "" {
			b.must(t, b.o.DeleteSnapshot(b.ctx, id))
		}
	}
	for _, c := range append(clones, source) {
		if c.ID() != "" {
			b.must(t, b.o.Delete(b.ctx, c))
		}
	}
	b.nothingLeft(t)
}
