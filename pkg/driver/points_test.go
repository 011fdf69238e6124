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
	entered, release := make(chan struct{}), make(chan struct{})
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
		"topology":       func(r *csi.CreateVolumeRequest) { r.AccessibilityRequirements = requisite("n2") },
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
	src := w.mustCreate("src")
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

// TestPoint02_AttachLimit: RESOURCE_EXHAUSTED from ControllerPublishVolume means that the node takes no more volumes.
func TestPoint02_AttachLimit(t *testing.T) {
	w := newWorld(t)
	var ids []string
	for i := range volume.MaxAttached + 1 {
		ids = append(ids, w.mustCreate(fmt.Sprint("v", i), func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = mib }).VolumeId)
	}
	last := ids[volume.MaxAttached]
	for _, id := range ids[:volume.MaxAttached] {
		w.mustPublish(id, "n1")
	}
	_, err := w.ControllerPublishVolume(w.ctx, w.publish(last, "n1"))
	wantCode(t, err, codes.ResourceExhausted)
	w.mustPublish(ids[0], "n1") // a repeat is none more
	w.mustPublish(last, "n2")
	for _, id := range []string{ids[0], last} {
		if _, err := w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id}); err != nil {
			t.Fatal(err)
		}
	}
	w.mustPublish(last, "n1")
}

func TestPoint30_Paging(t *testing.T) {
	w := newWorld(t)
	var ids, snaps []string
	for i := range 25 {
		v := w.mustCreate(fmt.Sprint("v", i), func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = mib }).VolumeId
		ids = append(ids, v)
		snaps = append(snaps, w.mustSnapshot(fmt.Sprint("s", i), v).SnapshotId)
	}
	slices.Sort(ids)
	slices.Sort(snaps)
	for _, size := range []int32{1, 7, 25, 26, 0} {
		var got []string
		for token := ""; ; {
			resp, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{MaxEntries: size, StartingToken: token})
			if err != nil {
				t.Fatal(err)
			}
			if size > 0 && len(resp.GetEntries()) > int(size) {
				t.Errorf("%d entries, the limit is %d", len(resp.GetEntries()), size)
			}
			for _, e := range resp.GetEntries() {
				got = append(got, e.GetVolume().GetVolumeId())
			}
			if token = resp.GetNextToken(); token == "" {
				break
			}
		}
		if !slices.Equal(got, ids) {
			t.Errorf("pages of %d: got %v, want %v", size, got, ids)
		}
		got = nil
		for token := ""; ; {
			resp, err := w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{MaxEntries: size, StartingToken: token})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range resp.GetEntries() {
				got = append(got, e.GetSnapshot().GetSnapshotId())
			}
			if token = resp.GetNextToken(); token == "" {
				break
			}
		}
		if !slices.Equal(got, snaps) {
			t.Errorf("pages of %d snapshots: got %v, want %v", size, got, snaps)
		}
	}
	// What goes or comes between two pages does not make others be left out.
	resp, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{MaxEntries: 10})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range resp.GetEntries() {
		if _, err := w.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: e.GetVolume().GetVolumeId()}); err != nil {
			t.Fatal(err)
		}
	}
	resp, err = w.ListVolumes(w.ctx, &csi.ListVolumesRequest{StartingToken: resp.GetNextToken()})
	if err != nil || len(resp.GetEntries()) != 15 {
		t.Errorf("second page has %d entries, %v", len(resp.GetEntries()), err)
	}
	one, err := w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{SnapshotId: snaps[3]})
	if err != nil || len(one.GetEntries()) != 1 || one.GetEntries()[0].GetSnapshot().GetSnapshotId() != snaps[3] {
		t.Errorf("got %v, %v", one, err)
	}
	one, err = w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{SourceVolumeId: ids[20]})
	if err != nil || len(one.GetEntries()) != 1 || one.GetEntries()[0].GetSnapshot().GetSourceVolumeId() != ids[20] {
		t.Errorf("got %v, %v", one, err)
	}
}

// TestPoint32_Topology: a volume has replicas on x nodes; n topologies are requisite.
func TestPoint32_Topology(t *testing.T) {
	w := newWorld(t)
	for i, tt := range []struct {
		replicas             string
		requisite, preferred []string
		want                 []string // one of several where x < n
		code                 codes.Code
	}{
		{"1", []string{"n1"}, nil, []string{"n1"}, codes.OK},
		{"1", []string{"n2"}, nil, []string{"n2"}, codes.OK},
		{"1", []string{"n1", "n2"}, []string{"n2"}, []string{"n2"}, codes.OK},
		{"1", []string{"n1", "n2", "n9"}, []string{"n9", "n2"}, []string{"n2"}, codes.OK},
		{"1", []string{"n1"}, []string{"n2"}, []string{"n1"}, codes.OK},
		{"1", nil, []string{"n2", "n1"}, []string{"n2"}, codes.OK},
		{"1", []string{"n9"}, nil, nil, codes.ResourceExhausted},
		{"2", []string{"n1", "n2"}, nil, []string{"n1", "n2"}, codes.OK},
		{"2", []string{"n1"}, nil, []string{"n1", "n2"}, codes.OK},
		{"2", []string{"n1", "n9"}, nil, nil, codes.ResourceExhausted},
		{"3", []string{"n1", "n2"}, nil, nil, codes.ResourceExhausted},
	} {
		resp, err := w.CreateVolume(w.ctx, create(fmt.Sprint("v", i), func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"replicas": tt.replicas}
			r.AccessibilityRequirements = requisite(tt.requisite...)
			r.AccessibilityRequirements.Preferred = requisite(tt.preferred...).Requisite
		}))
		wantCode(t, err, tt.code)
		var got []string
		for _, topology := range resp.GetVolume().GetAccessibleTopology() {
			got = append(got, topology.GetSegments()[volume.TopologyKey])
		}
		slices.Sort(got)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%d: accessible from %v, want %v", i, got, tt.want)
		}
	}
}

func TestPoint33_Capacity(t *testing.T) {
	w := newWorld(t)
	get := func(r *csi.GetCapacityRequest) *csi.GetCapacityResponse {
		t.Helper()
		resp, err := w.GetCapacity(w.ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetAvailableCapacity() < 0 || resp.GetMaximumVolumeSize().GetValue() < 0 || resp.GetMinimumVolumeSize().GetValue() < 0 {
			t.Errorf("negative: %v", resp)
		}
		return resp
	}
	node := func(n string) *csi.Topology { return &csi.Topology{Segments: map[string]string{volume.TopologyKey: n}} }
	for name, tt := range map[string]struct {
		req  *csi.GetCapacityRequest
		want int64
	}{
		"cluster": {&csi.GetCapacityRequest{}, 110 * gib},
		"node":    {&csi.GetCapacityRequest{AccessibleTopology: node("n2")}, 10 * gib},
		"unstripped keys of Kubernetes, no capabilities": {&csi.GetCapacityRequest{AccessibleTopology: node("n2"), Parameters: map[string]string{
			"csi.storage.k8s.io/fstype": "xfs", "csi.storage.k8s.io/provisioner-secret-name": "s", "csi.storage.k8s.io/node-stage-secret-namespace": "n"}}, 10 * gib},
		"unknown node":           {&csi.GetCapacityRequest{AccessibleTopology: node("n9")}, 0},
		"foreign topology":       {&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{"zone": "a"}}}, 0},
		"unknown pool":           {&csi.GetCapacityRequest{Parameters: map[string]string{"pool": "nvme"}}, 0},
		"unsupported capability": {&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{mountCap(5)}}, 0},
		"capability":             {&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{writer}}, 110 * gib},
	} {
		if got := get(tt.req).GetAvailableCapacity(); got != tt.want {
			t.Errorf("%s: got %d, want %d", name, got, tt.want)
		}
	}
	xfs := mountCap(1)
	xfs.GetMount().FsType = "xfs"
	for name, tt := range map[string]struct {
		parameters map[string]string
		caps       []*csi.VolumeCapability
		want       int64
	}{
		"none":         {want: volume.MinSize},
		"xfs class":    {map[string]string{"fsType": "xfs"}, nil, 300 * mib},
		"xfs":          {nil, []*csi.VolumeCapability{xfs}, 300 * mib},
		"raw of class": {map[string]string{"fsType": "xfs"}, []*csi.VolumeCapability{blockCap(1)}, volume.MinSize},
	} {
		least := get(&csi.GetCapacityRequest{Parameters: tt.parameters, VolumeCapabilities: tt.caps}).GetMinimumVolumeSize().GetValue()
		if least != tt.want {
			t.Errorf("%s: the smallest volume has %d, want %d", name, least, tt.want)
		}
		if tt.caps == nil {
			tt.caps = []*csi.VolumeCapability{writer}
		}
		v := w.mustCreate("smallest "+name, func(r *csi.CreateVolumeRequest) {
			r.Parameters, r.VolumeCapabilities, r.CapacityRange = tt.parameters, tt.caps, &csi.CapacityRange{LimitBytes: least}
		})
		if v.CapacityBytes != least {
			t.Errorf("%s: got %d, want %d", name, v.CapacityBytes, least)
		}
	}
	for range 3 { // until everything is full
		largest := get(&csi.GetCapacityRequest{}).GetMaximumVolumeSize().GetValue()
		if largest == 0 {
			break
		}
		w.mustCreate(fmt.Sprint("largest", largest), func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = largest })
	}
	if c := get(&csi.GetCapacityRequest{}); c.GetAvailableCapacity() != 0 || c.GetMaximumVolumeSize().GetValue() != 0 {
		t.Errorf("full, yet %v", c)
	}
}

func TestPoint34_ModifyIsAllOrNothing(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	modify := func(m map[string]string) error {
		_, err := w.ControllerModifyVolume(w.ctx, &csi.ControllerModifyVolumeRequest{VolumeId: v, MutableParameters: m})
		return err
	}
	limits := func(iops, bandwidth int64) {
		t.Helper()
		got, err := w.gate.Volume(w.ctx, volume.ID(v))
		if want := (volume.QoS{IOPS: iops, Bandwidth: bandwidth}); err != nil || got.QoS != want {
			t.Errorf("limits %+v, %v, want %+v", got.QoS, err, want)
		}
	}
	wantCode(t, modify(map[string]string{"iopsLimit": "100", "bandwidthLimit": "100Mi"}), codes.OK)
	limits(100, 100*mib)
	for _, bad := range []map[string]string{
		{"iopsLimit": "200", "bandwidthLimit": "fast"},
		{"iopsLimit": "200", "bandwidthLimit": "-1"},
		{"iopsLimit": "200", "color": "red"},
		{"iopsLimit": "200", "replicas": "3"},
		{"iopsLimit": "200", "minInSync": "0"},
		{"iopsLimit": "200", "dataLocality": "none"},
	} {
		wantCode(t, modify(bad), codes.InvalidArgument)
		limits(100, 100*mib)
	}
	wantCode(t, modify(map[string]string{"iopsLimit": "300"}), codes.OK) // absent keys are not touched
	limits(300, 100*mib)
	wantCode(t, modify(map[string]string{"iopsLimit": "300"}), codes.OK)
	wantCode(t, modify(map[string]string{}), codes.OK)
	limits(300, 100*mib)
	wantCode(t, modify(map[string]string{"iopsLimit": "0", "bandwidthLimit": "1.5Gi", "replicas": "1"}), codes.OK)
	limits(0, 3*gib/2)
	u := w.mustCreate("with class", func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{"iopsLimit": "2k"} })
	if got, err := w.gate.Volume(w.ctx, volume.ID(u.VolumeId)); err != nil || got.QoS.IOPS != 2000 {
		t.Errorf("a new volume has limits %+v, %v", got.QoS, err)
	}
}

func TestPoint38_Health(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	health := func() []*csi.VolumeHealth_VolumeHealthEntry {
		t.Helper()
		one, err := w.ControllerGetVolumeHealth(w.ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: v})
		if err != nil || one.GetVolumeHealth().GetVolumeId() != v {
			t.Fatalf("got %v, %v", one, err)
		}
		all, err := w.ControllerListVolumeHealth(w.ctx, &csi.ControllerListVolumeHealthRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(one.GetVolumeHealth().GetHealthStatuses()) == 0 {
			if len(all.GetEntries()) != 0 {
				t.Errorf("healthy, yet listed: %v", all)
			}
		} else if len(all.GetEntries()) != 1 || !proto.Equal(all.GetEntries()[0], one.GetVolumeHealth()) {
			t.Errorf("listed %v, want %v", all, one)
		}
		return one.GetVolumeHealth().GetHealthStatuses()
	}
	if got := health(); len(got) != 0 {
		t.Errorf("a healthy volume has %v", got)
	}
	w.agents.mu.Lock()
	w.agents.conditions = []volume.Condition{
		{Severity: volume.Degraded, Reason: "PoolFull", Message: "writes wait"},
		{Severity: volume.Degraded, Reason: "PoolFull", Message: "again"},
		{Severity: volume.Inaccessible, Reason: "PoolFull"},
		{Severity: volume.DataLoss, Reason: "ChecksumMismatch"},
	}
	w.agents.mu.Unlock()
	var got []string
	for _, s := range health() {
		got = append(got, s.GetStatus().String()+" "+s.GetReason())
	}
	if want := []string{"DEGRADED PoolFull", "INACCESSIBLE PoolFull", "DATA_LOSS ChecksumMismatch"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	w.agents.mu.Lock()
	w.agents.conditions = nil
	w.agents.mu.Unlock()
	if got := health(); len(got) != 0 {
		t.Errorf("cleared, yet %v", got)
	}
}
