package driver

import (
	"fmt"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/volume"
)

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

// TestPoint32_Topology: a volume that must be local can be reached from x nodes, those of its replicas; n topologies are
// requisite. Any other can be reached from everywhere, as soon as enough of the requisite nodes are known.
func TestPoint32_Topology(t *testing.T) {
	w := newWorld(t)
	for i, tt := range []struct {
		replicas             string
		requisite, preferred []string
		want                 []string // one of several where x < n
		code                 codes.Code
		elsewhere            codes.Code // where it need not be local
	}{
		{"1", []string{"n1"}, nil, []string{"n1"}, codes.OK, codes.OK},
		{"1", []string{"n2"}, nil, []string{"n2"}, codes.OK, codes.OK},
		{"1", []string{"n1", "n2"}, []string{"n2"}, []string{"n2"}, codes.OK, codes.OK},
		{"1", []string{"n1", "n2", "n9"}, []string{"n9", "n2"}, []string{"n2"}, codes.OK, codes.OK},
		{"1", []string{"n1"}, []string{"n2"}, []string{"n1"}, codes.OK, codes.OK},
		{"1", nil, []string{"n2", "n1"}, []string{"n2"}, codes.OK, codes.OK},
		{"1", []string{"n3"}, []string{"n3"}, nil, codes.ResourceExhausted, codes.OK}, // it has no pool
		{"1", []string{"n9"}, nil, nil, codes.ResourceExhausted, codes.ResourceExhausted},
		{"2", []string{"n1", "n2"}, nil, []string{"n1", "n2"}, codes.OK, codes.OK},
		{"2", []string{"n1"}, nil, []string{"n1", "n2"}, codes.OK, codes.OK},
		{"2", []string{"n1", "n9"}, nil, nil, codes.ResourceExhausted, codes.ResourceExhausted},
		{"3", []string{"n1", "n2"}, nil, nil, codes.ResourceExhausted, codes.ResourceExhausted},
	} {
		for _, locality := range []string{"required", "preferred", "none"} {
			code := tt.code
			if locality != "required" {
				code, tt.want = tt.elsewhere, nil
			}
			req := create(fmt.Sprint("v", i, locality), func(r *csi.CreateVolumeRequest) {
				r.CapacityRange.RequiredBytes = mib
				r.Parameters = map[string]string{"replicas": tt.replicas, "dataLocality": locality}
				r.AccessibilityRequirements = requisite(tt.requisite...)
				r.AccessibilityRequirements.Preferred = requisite(tt.preferred...).Requisite
			})
			resp, err := w.CreateVolume(w.ctx, req)
			wantCode(t, err, code)
			var got []string
			for _, topology := range resp.GetVolume().GetAccessibleTopology() {
				got = append(got, topology.GetSegments()[volume.TopologyKey])
			}
			slices.Sort(got)
			if !slices.Equal(got, tt.want) {
				t.Errorf("%d %s: accessible from %v, want %v", i, locality, got, tt.want)
			}
			if again, err := w.CreateVolume(w.ctx, req); err == nil && again.GetVolume().GetVolumeId() != resp.GetVolume().GetVolumeId() {
				t.Errorf("%d %s: the same request made another volume", i, locality)
			}
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
		{"iopsLimit": "200", "replicas": "6"},
		{"iopsLimit": "200", "minInSync": "0"},
		{"iopsLimit": "200", "replicas": "2", "minInSync": "3"},
		{"iopsLimit": "200", "minInSync": "2"}, // of one replica
		{"iopsLimit": "200", "dataLocality": "near"},
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
