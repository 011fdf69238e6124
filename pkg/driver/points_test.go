package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// calls are those that change something, ready to be made and made again; each on things of its own.
func (w *world) calls() map[string]func(ctx context.Context) error {
	modified, grown, attached, cut := w.mustCreate("modified").VolumeId, w.mustCreate("grown").VolumeId, w.mustCreate("attached").VolumeId, w.mustCreate("cut").VolumeId
	return map[string]func(ctx context.Context) error{
		"CreateVolume": func(ctx context.Context) error { _, err := w.CreateVolume(ctx, create("made")); return err },
		"Attach": func(ctx context.Context) error {
			_, err := w.ControllerPublishVolume(ctx, w.publish(attached, "n1"))
			return err
		},
		"ExpandVolume": func(ctx context.Context) error {
			_, err := w.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: grown, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * gib}})
			return err
		},
		"ModifyVolume": func(ctx context.Context) error {
			_, err := w.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: modified, MutableParameters: map[string]string{"iopsLimit": "100"}})
			return err
		},
		"CreateSnapshot": func(ctx context.Context) error {
			_, err := w.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: cut})
			return err
		},
	}
}

// TestPoint05_UnforeseenFailureIsNotFinal: what fails in an unforeseen way may have left something, so the caller must
// not be told that nothing exists.
func TestPoint05_UnforeseenFailureIsNotFinal(t *testing.T) {
	for _, how := range []func() error{
		func() error { return errors.New("disk on fire") },
		func() error { panic("out of luck") },
	} {
		w := newWorld(t)
		for name, call := range w.calls() {
			struck := false
			w.gate.disturb(nil, func(_ context.Context, method string) error {
				if method == name && !struck {
					struck = true
					return how()
				}
				return nil
			})
			wantCode(t, call(w.ctx), codes.Unavailable)
			if !struck {
				t.Errorf("%s was not called", name)
			}
			wantCode(t, call(w.ctx), codes.OK)
		}
	}
}

func TestPanicInReadIsInternal(t *testing.T) {
	w := newWorld(t)
	w.gate.disturb(func(context.Context, string) error { panic("out of luck") }, nil)
	_, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{})
	wantCode(t, err, codes.Internal)
	if log := w.log.String(); !strings.Contains(log, "points_test.go") {
		t.Error("the stack of the panic is not in the log")
	}
}

func TestPoint06_IdenticalConcurrentCreates(t *testing.T) {
	w := newWorld(t)
	var wg sync.WaitGroup
	ids := make([]string, 100)
	for i := range ids {
		wg.Go(func() {
			resp, err := w.CreateVolume(w.ctx, create("same", func(r *csi.CreateVolumeRequest) {
				r.Parameters = map[string]string{"csi.storage.k8s.io/pv/name": fmt.Sprint(i)} // metadata does not count
			}))
			wantCode(t, err, codes.OK)
			ids[i] = resp.GetVolume().GetVolumeId()
		})
	}
	wg.Wait()
	slices.Sort(ids)
	if ids = slices.Compact(ids); len(ids) != 1 || ids[0] == "" {
		t.Errorf("volumes %q, want one", ids)
	}
	list, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("listed %v, %v", list, err)
	}
}

// TestPoint06_ConflictingConcurrentCall: a call that differs from one in flight on the same name gets ABORTED, an
// identical one joins, and nobody works twice.
func TestPoint06_ConflictingConcurrentCall(t *testing.T) {
	w := newWorld(t)
	entered, release := make(chan struct{}, 2), make(chan struct{})
	w.gate.disturb(func(context.Context, string) error { entered <- struct{}{}; <-release; return nil }, nil)
	results := make(chan error, 2)
	go func() { _, err := w.CreateVolume(w.ctx, create("v")); results <- err }()
	<-entered
	go func() { _, err := w.CreateVolume(w.ctx, create("v")); results <- err }()
	_, err := w.CreateVolume(w.ctx, create("v", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 * gib }))
	wantCode(t, err, codes.Aborted)
	close(release)
	for range 2 {
		wantCode(t, <-results, codes.OK)
	}
	if n := w.gate.count("CreateVolume"); n != 1 && n != 2 { // the second may come when the first has ended
		t.Errorf("%d runs", n)
	}
}

func TestPoint07_RetryOfACancelledCallFinishes(t *testing.T) {
	w := newWorld(t)
	for name, call := range w.calls() {
		entered, release := make(chan struct{}, 2), make(chan struct{})
		w.gate.disturb(nil, func(ctx context.Context, method string) error {
			if method != name {
				return nil
			}
			entered <- struct{}{}
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		ctx, cancel := context.WithCancel(w.ctx)
		first := make(chan error, 1)
		go func() { first <- call(ctx) }()
		<-entered
		cancel()
		wantCode(t, <-first, codes.Canceled)

		short, cancel := context.WithTimeout(w.ctx, 20*time.Millisecond)
		wantCode(t, call(short), codes.DeadlineExceeded)
		cancel()

		retry := make(chan error, 1)
		go func() { retry <- call(w.ctx) }()
		close(release)
		wantCode(t, <-retry, codes.OK)
		w.gate.disturb(nil, nil)
		wantCode(t, call(w.ctx), codes.OK)
	}
	if n := strings.Count(w.state(), `"name":"made"`); n != 1 {
		t.Errorf("%d volumes named made", n)
	}
}

func TestPoint08_CreateConflicts(t *testing.T) {
	w := newWorld(t)
	other := w.mustCreate("source").VolumeId
	snap := w.mustSnapshot("snap", other).SnapshotId
	base := func(r *csi.CreateVolumeRequest) {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: 2 * gib, LimitBytes: 3 * gib}
		r.Parameters = map[string]string{"replicas": "1", "minInSync": "1", "dataLocality": "preferred", "pool": "default",
			"tenant": "a", "fsType": "ext4", "blockSize": "4096"}
		r.MutableParameters = map[string]string{"iopsLimit": "100", "bandwidthLimit": "1Mi"}
		r.VolumeContentSource = fromSnapshot(snap)
		r.AccessibilityRequirements = requisite("n1")
	}
	v := w.mustCreate("v", base)
	for name, change := range map[string]func(r *csi.CreateVolumeRequest){
		"required_bytes":    func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: 3 * gib} },
		"limit_bytes":       func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{LimitBytes: gib} },
		"other source":      func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = fromVolume(other) },
		"no source":         func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = nil },
		"capability access": func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = blockCap(1) },
		"capability mode":   func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = mountCap(7) },
		"capability more":   func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = append(r.VolumeCapabilities, blockCap(1)) },
		"mount flags": func(r *csi.CreateVolumeRequest) {
			c := mountCap(1)
			c.GetMount().MountFlags = []string{"noatime"}
			r.VolumeCapabilities[0] = c
		},
		"fs_type": func(r *csi.CreateVolumeRequest) {
			c := mountCap(1)
			c.GetMount().FsType = "ext4"
			r.VolumeCapabilities[0] = c
		},
		"dataLocality":   func(r *csi.CreateVolumeRequest) { r.Parameters["dataLocality"] = "required" },
		"no pool":        func(r *csi.CreateVolumeRequest) { delete(r.Parameters, "pool") },
		"tenant":         func(r *csi.CreateVolumeRequest) { r.Parameters["tenant"] = "b" },
		"fsType":         func(r *csi.CreateVolumeRequest) { r.Parameters["fsType"] = "xfs" },
		"blockSize":      func(r *csi.CreateVolumeRequest) { r.Parameters["blockSize"] = "512" },
		"iopsLimit":      func(r *csi.CreateVolumeRequest) { r.MutableParameters["iopsLimit"] = "101" },
		"bandwidthLimit": func(r *csi.CreateVolumeRequest) { delete(r.MutableParameters, "bandwidthLimit") },
		"replicas":       func(r *csi.CreateVolumeRequest) { r.Parameters["replicas"] = "2" },
		"topology":       func(r *csi.CreateVolumeRequest) { r.AccessibilityRequirements = requisite("n9") },
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.CreateVolume(w.ctx, create("v", base, change))
			wantCode(t, err, codes.AlreadyExists)
		})
	}
	if again := w.mustCreate("v", base); !proto.Equal(v, again) {
		t.Errorf("the same request got\n%v, then\n%v", v, again)
	}
}

func TestPoint09_MetadataIsNotCompared(t *testing.T) {
	w := newWorld(t)
	with := func(m map[string]string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.Parameters = m }
	}
	v := w.mustCreate("v", with(map[string]string{
		"csi.storage.k8s.io/pvc/name": "c", "csi.storage.k8s.io/pvc/namespace": "team-a", "csi.storage.k8s.io/pv/name": "p"}))
	record, err := w.gate.Volume(w.ctx, volume.ID(v.VolumeId))
	if err != nil || record.Tenant != "team-a" {
		t.Errorf("tenant %q, %v; want the claim's namespace", record.Tenant, err)
	}
	for _, m := range []map[string]string{
		nil,
		{"csi.storage.k8s.io/pvc/name": "other", "csi.storage.k8s.io/pvc/namespace": "other", "csi.storage.k8s.io/pv/name": "other"},
		{"csi.storage.k8s.io/provisioner-secret-name": "s"},
	} {
		if again := w.mustCreate("v", with(m)); again.VolumeId != v.VolumeId {
			t.Errorf("%v: got volume %s, want %s", m, again.VolumeId, v.VolumeId)
		}
	}
	_, err = w.CreateVolume(w.ctx, create("v", with(map[string]string{"tenant": "team-b"})))
	wantCode(t, err, codes.AlreadyExists)
	v = w.mustCreate("w", with(map[string]string{"tenant": "team-b", "csi.storage.k8s.io/pvc/namespace": "team-a"}))
	if record, err = w.gate.Volume(w.ctx, volume.ID(v.VolumeId)); err != nil || record.Tenant != "team-b" {
		t.Errorf("tenant %q, %v; want the parameter's", record.Tenant, err)
	}
}

func TestPoint10_Sizes(t *testing.T) {
	w := newWorld(t)
	for i, tt := range []struct{ required, limit, want int64 }{
		{0, 0, volume.DefaultSize},
		{gib, 0, gib},
		{gib, gib, gib},
		{1, 0, volume.MinSize},
		{gib + 1, 0, gib + 4096},
		{gib + 1, gib + 4096, gib + 4096},
		{0, gib, gib},
		{0, gib + 1, gib},
		{0, 20 * gib, volume.DefaultSize},
	} {
		v := w.mustCreate(fmt.Sprint("v", i), func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: tt.required, LimitBytes: tt.limit}
		})
		if v.CapacityBytes != tt.want {
			t.Errorf("required %d limit %d: got %d, want %d", tt.required, tt.limit, v.CapacityBytes, tt.want)
		}
	}
	v := w.mustCreate("no range", func(r *csi.CreateVolumeRequest) { r.CapacityRange = nil })
	if v.CapacityBytes != volume.DefaultSize {
		t.Errorf("without a range: got %d", v.CapacityBytes)
	}
	for _, tt := range []struct{ required, limit, want int64 }{{11*gib + 1, 0, 11*gib + 4096}, {12 * gib, 12 * gib, 12 * gib}, {gib, 0, 12 * gib}} {
		for range 2 {
			resp, err := w.ControllerExpandVolume(w.ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.VolumeId,
				CapacityRange: &csi.CapacityRange{RequiredBytes: tt.required, LimitBytes: tt.limit}, VolumeCapability: writer})
			if err != nil || resp.GetCapacityBytes() != tt.want || !resp.GetNodeExpansionRequired() {
				t.Errorf("expand to %d: got %v, %v", tt.required, resp, err)
			}
		}
	}
	resp, err := w.ControllerExpandVolume(w.ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.VolumeId,
		CapacityRange: &csi.CapacityRange{RequiredBytes: 13 * gib}, VolumeCapability: blockCap(1)})
	if err != nil || resp.GetNodeExpansionRequired() {
		t.Errorf("a raw device needs no expansion on the node: %v, %v", resp, err)
	}
}

// TestPoint11_CloneAndRestore, the controller's part: sizes, and content_source in every answer.
func TestPoint11_CloneAndRestore(t *testing.T) {
	w := newWorld(t)
	src := w.mustCreate("src", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"blockSize": "512"} })
	snap := w.mustSnapshot("snap", src.VolumeId)
	for name, from := range map[string]*csi.VolumeContentSource{"clone": fromVolume(src.VolumeId), "restore": fromSnapshot(snap.SnapshotId)} {
		for _, size := range []int64{0, gib, 3 * gib} {
			change := func(r *csi.CreateVolumeRequest) {
				r.VolumeContentSource = from
				r.CapacityRange = &csi.CapacityRange{RequiredBytes: size}
			}
			id := fmt.Sprint(name, size)
			v := w.mustCreate(id, change)
			if v.CapacityBytes != max(size, gib) || !proto.Equal(v.ContentSource, from) {
				t.Errorf("%s: got %v", id, v)
			}
			got, err := w.ControllerGetVolume(w.ctx, &csi.ControllerGetVolumeRequest{VolumeId: v.VolumeId})
			if err != nil || !proto.Equal(got.GetVolume(), v) {
				t.Errorf("got %v, %v, want %v", got, err, v)
			}
			if again := w.mustCreate(id, change); !proto.Equal(again, v) {
				t.Errorf("again: %v, want %v", again, v)
			}
		}
	}
}

// TestPoint13_SnapshotSurvivesItsSource, the controller's part.
func TestPoint13_SnapshotSurvivesItsSource(t *testing.T) {
	w := newWorld(t)
	src := w.mustCreate("src", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"dataLocality": "required"} })
	snap := w.mustSnapshot("snap", src.VolumeId)
	if !snap.ReadyToUse || snap.SizeBytes != gib || snap.SourceVolumeId != src.VolumeId || snap.CreationTime.AsTime().IsZero() ||
		!proto.Equal(snap.AccessibleTopology[0], src.AccessibleTopology[0]) {
		t.Errorf("got %v", snap)
	}
	if _, err := w.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: src.VolumeId}); err != nil {
		t.Fatal(err)
	}
	again, err := w.CreateSnapshot(w.ctx, &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: src.VolumeId, AccessibilityRequirements: requisite("n1", "n2")})
	if err != nil || !proto.Equal(again.GetSnapshot(), snap) {
		t.Errorf("repeat: %v, %v", again, err)
	}
	got, err := w.GetSnapshot(w.ctx, &csi.GetSnapshotRequest{SnapshotId: snap.SnapshotId})
	if err != nil || !proto.Equal(got.GetSnapshot(), snap) {
		t.Errorf("get: %v, %v", got, err)
	}
	w.mustCreate("restored", func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = fromSnapshot(snap.SnapshotId) })
}

func TestPoint16_RepeatedPublishReturnsTheSameContext(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	first := w.mustPublish(v, "n1")
	for range 10 {
		if again := w.mustPublish(v, "n1"); !proto.Equal(first, again) {
			t.Fatalf("got %v, then %v", first, again)
		}
	}
}

func TestPoint15_Point17_Point31_AttachmentMovesAndIsListed(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	listed := func(want ...string) {
		t.Helper()
		list, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := w.ControllerGetVolume(w.ctx, &csi.ControllerGetVolumeRequest{VolumeId: v})
		if err != nil {
			t.Fatal(err)
		}
		if a, b := list.GetEntries()[0].GetStatus().GetPublishedNodeIds(), got.GetStatus().GetPublishedNodeIds(); !slices.Equal(a, want) || !slices.Equal(b, want) {
			t.Errorf("published on %v and %v, want %v", a, b, want)
		}
	}
	unpublish := func(node string) {
		t.Helper()
		if _, err := w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v, NodeId: node}); err != nil {
			t.Fatal(err)
		}
	}
	listed()
	w.mustPublish(v, "n1")
	listed("n1")
	_, err := w.ControllerPublishVolume(w.ctx, w.publish(v, "n2"))
	wantCode(t, err, codes.FailedPrecondition)
	if !strings.Contains(err.Error(), "n1") {
		t.Errorf("%v does not name the node", err)
	}
	unpublish("n2") // it is not there: nothing happens
	listed("n1")
	unpublish("n1")
	listed()
	w.mustPublish(v, "n2")
	listed("n2")
	unpublish("")
	listed()
	unpublish("")
	if want := []string{v + " from n1", v + " from n2"}; !slices.Equal(w.agents.detached, want) {
		t.Errorf("fenced %v, want %v", w.agents.detached, want)
	}
}

// TestPoint18_Point31_APartitionedWriterIsFencedFirst: its node does not answer, a replica elsewhere does.
func TestPoint18_Point31_APartitionedWriterIsFencedFirst(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"replicas": "2"} }).VolumeId
	alone := w.mustCreate("alone", func(r *csi.CreateVolumeRequest) { r.AccessibilityRequirements = requisite("n1") }).VolumeId
	w.mustPublish(v, "n1")
	w.mustPublish(alone, "n1")
	published := func(id string) []string {
		t.Helper()
		list, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Entries {
			if e.Volume.VolumeId == id {
				return e.Status.PublishedNodeIds
			}
		}
		return nil
	}
	w.agents.mu.Lock()
	w.agents.down = "n1"
	w.agents.mu.Unlock()
	unpublish := func(id string) error {
		_, err := w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: "n1"})
		return err
	}
	// The only replica is with its writer: nothing can stop that one.
	wantCode(t, unpublish(alone), codes.Unavailable)
	if got := published(alone); !slices.Equal(got, []string{"n1"}) {
		t.Errorf("published on %v", got)
	}
	_, err := w.ControllerPublishVolume(w.ctx, w.publish(v, "n2"))
	wantCode(t, err, codes.FailedPrecondition)
	begin := time.Now()
	wantCode(t, unpublish(v), codes.OK)
	if d := time.Since(begin); d < 20*time.Millisecond {
		t.Errorf("the lease was not waited for: %s", d)
	}
	rec, err := w.gate.Volume(w.ctx, volume.ID(v))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rec.Replicas {
		if got := w.agents.fenced[r.ID]; r.Node == "n2" && got != rec.Epoch {
			t.Errorf("replica on n2 is fenced with epoch %d, the volume has %d", got, rec.Epoch)
		}
	}
	if got := published(v); len(got) != 0 {
		t.Errorf("published on %v", got)
	}
	w.mustPublish(v, "n2")
	if got := published(v); !slices.Equal(got, []string{"n2"}) {
		t.Errorf("published on %v", got)
	}
}
