package driver

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// TestPoint02_CodeTable is every row of the code table for the Controller service, in one world with:
// volume "v" (1 GiB), "att" attached to n1, "src" with snapshot "snap".
func TestPoint02_CodeTable(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	att := w.mustCreate("att").VolumeId
	w.mustPublish(att, "n1")
	src := w.mustCreate("src").VolumeId
	snap := w.mustSnapshot("snap", src).SnapshotId
	long := strings.Repeat("x", 129)
	rwx := csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	ctx := w.ctx

	createVolume := func(change ...func(*csi.CreateVolumeRequest)) func() error {
		return func() error { _, err := w.CreateVolume(ctx, create("v", change...)); return err }
	}
	size := func(required, limit int64) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}
		}
	}
	name := func(n string) func(*csi.CreateVolumeRequest) { return func(r *csi.CreateVolumeRequest) { r.Name = n } }
	param := func(k, v string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{k: v} }
	}
	mutable := func(k, v string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{k: v} }
	}
	caps := func(c ...*csi.VolumeCapability) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = c }
	}
	from := func(s *csi.VolumeContentSource) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = s }
	}
	on := func(nodes ...string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.AccessibilityRequirements = requisite(nodes...) }
	}
	deleteVolume := func(id string) func() error {
		return func() error { _, err := w.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); return err }
	}
	publish := func(change func(*csi.ControllerPublishVolumeRequest)) func() error {
		return func() error {
			r := w.publish(att, "n1")
			change(r)
			_, err := w.ControllerPublishVolume(ctx, r)
			return err
		}
	}
	unpublish := func(id, node string) func() error {
		return func() error {
			_, err := w.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: node})
			return err
		}
	}
	validate := func(id string, c ...*csi.VolumeCapability) func() error {
		return func() error {
			_, err := w.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: c})
			return err
		}
	}
	modify := func(id string, m map[string]string) func() error {
		return func() error {
			_, err := w.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: m})
			return err
		}
	}
	expand := func(id string, required, limit int64) func() error {
		return func() error {
			_, err := w.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id,
				CapacityRange: &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}})
			return err
		}
	}
	snapshot := func(name, source string, parameters ...string) func() error {
		return func() error {
			r := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: source}
			if len(parameters) == 2 {
				r.Parameters = map[string]string{parameters[0]: parameters[1]}
			}
			_, err := w.CreateSnapshot(ctx, r)
			return err
		}
	}
	listVolumes := func(n int32, token string) func() error {
		return func() error {
			_, err := w.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: n, StartingToken: token})
			return err
		}
	}
	listSnapshots := func(r *csi.ListSnapshotsRequest) func() error {
		return func() error { _, err := w.ListSnapshots(ctx, r); return err }
	}

	for _, tt := range []struct {
		name string
		call func() error
		want codes.Code
	}{
		{"CreateVolume same", createVolume(), codes.OK},
		{"CreateVolume same name, compatible size", createVolume(size(gib/2, 2*gib)), codes.OK},
		{"CreateVolume no name", createVolume(name("")), codes.InvalidArgument},
		{"CreateVolume long name", createVolume(name(long)), codes.InvalidArgument},
		{"CreateVolume control character in name", createVolume(name("a\x00b")), codes.InvalidArgument},
		{"CreateVolume C1 control character in name", createVolume(name("a\u0085b")), codes.InvalidArgument},
		{"CreateVolume whitespace in name", createVolume(name("a\tb\nc\rd")), codes.OK},
		{"CreateVolume no capabilities", createVolume(caps()), codes.InvalidArgument},
		{"CreateVolume nil capability fields", createVolume(caps(&csi.VolumeCapability{})), codes.InvalidArgument},
		{"CreateVolume unknown mode", createVolume(caps(mountCap(0))), codes.InvalidArgument},
		{"CreateVolume mode of the future", createVolume(caps(mountCap(99))), codes.InvalidArgument},
		{"CreateVolume mount group", createVolume(caps(&csi.VolumeCapability{AccessMode: writer.AccessMode, AccessType: &csi.VolumeCapability_Mount{
			Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: "1000"}}})), codes.InvalidArgument},
		{"CreateVolume no access type", createVolume(caps(&csi.VolumeCapability{AccessMode: writer.AccessMode})), codes.InvalidArgument},
		{"Point21 CreateVolume RWX mount", createVolume(name("rwx"), caps(mountCap(rwx))), codes.InvalidArgument},
		{"Point21 CreateVolume RWX block", createVolume(name("rwx-block"), caps(blockCap(rwx))), codes.InvalidArgument},
		{"CreateVolume unsupported filesystem", createVolume(param("fsType", "ntfs")), codes.InvalidArgument},
		{"CreateVolume unknown parameter", createVolume(param("color", "red")), codes.InvalidArgument},
		{"CreateVolume mutable key in parameters", createVolume(param("iopsLimit", "1")), codes.InvalidArgument},
		{"CreateVolume bad replicas", createVolume(param("replicas", "6")), codes.InvalidArgument},
		{"CreateVolume minInSync above replicas", createVolume(param("minInSync", "2")), codes.InvalidArgument},
		{"CreateVolume bad block size", createVolume(param("blockSize", "1024")), codes.InvalidArgument},
		{"CreateVolume unknown mutable parameter", createVolume(mutable("color", "red")), codes.InvalidArgument},
		{"CreateVolume bad mutable parameter", createVolume(mutable("iopsLimit", "many")), codes.InvalidArgument},
		{"CreateVolume parameters too large", createVolume(param("pool", strings.Repeat("p", 4096))), codes.InvalidArgument},
		{"CreateVolume negative size", createVolume(size(-1, 0)), codes.InvalidArgument},
		{"CreateVolume limit below required", createVolume(size(2, 1)), codes.InvalidArgument},
		{"CreateVolume too large", createVolume(name("huge"), size(volume.MaxSize+1, 0)), codes.OutOfRange},
		{"CreateVolume limit too small", createVolume(name("tiny"), size(0, 1)), codes.OutOfRange},
		{"CreateVolume no exact size", createVolume(name("odd"), size(gib+1, gib+1)), codes.OutOfRange},
		{"CreateVolume no room", createVolume(name("full"), size(200*gib, 0)), codes.ResourceExhausted},
		{"CreateVolume unknown pool", createVolume(name("nopool"), param("pool", "nvme")), codes.ResourceExhausted},
		{"CreateVolume unknown node", createVolume(name("nonode"), on("n9")), codes.ResourceExhausted},
		{"CreateVolume foreign topology", createVolume(name("zone"), func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"zone": "a"}}}}
		}), codes.ResourceExhausted},
		{"CreateVolume empty topology", createVolume(func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{}}}
		}), codes.InvalidArgument},
		{"CreateVolume unknown source volume", createVolume(name("c1"), from(fromVolume("none-exist-id"))), codes.NotFound},
		{"CreateVolume unknown source snapshot", createVolume(name("c2"), from(fromSnapshot("none-exist-id"))), codes.NotFound},
		{"CreateVolume empty source", createVolume(name("c3"), from(&csi.VolumeContentSource{})), codes.InvalidArgument},
		{"CreateVolume empty source id", createVolume(name("c4"), from(fromSnapshot(""))), codes.InvalidArgument},
		{"CreateVolume smaller than its source", createVolume(name("c5"), from(fromSnapshot(snap)), size(mib, 0)), codes.OutOfRange},
		{"CreateVolume limit below its source", createVolume(name("c6"), from(fromVolume(src)), size(0, gib/2)), codes.OutOfRange},
		{"CreateVolume incompatible size", createVolume(size(2*gib, 0)), codes.AlreadyExists},

		{"DeleteVolume no id", deleteVolume(""), codes.InvalidArgument},
		{"DeleteVolume long id", deleteVolume(long), codes.InvalidArgument},
		{"Point03 DeleteVolume unknown", deleteVolume("vol-00000000000000000000"), codes.OK},
		{"Point03 DeleteVolume odd id", deleteVolume("../etc/\x01 \u202e"), codes.OK},
		{"DeleteVolume attached", deleteVolume(att), codes.FailedPrecondition},

		{"ControllerPublish again", publish(func(*csi.ControllerPublishVolumeRequest) {}), codes.OK},
		{"ControllerPublish no volume", publish(func(r *csi.ControllerPublishVolumeRequest) { r.VolumeId = "" }), codes.InvalidArgument},
		{"ControllerPublish no node", publish(func(r *csi.ControllerPublishVolumeRequest) { r.NodeId = "" }), codes.InvalidArgument},
		{"ControllerPublish long node", publish(func(r *csi.ControllerPublishVolumeRequest) { r.NodeId = strings.Repeat("n", 257) }), codes.InvalidArgument},
		{"ControllerPublish no capability", publish(func(r *csi.ControllerPublishVolumeRequest) { r.VolumeCapability = nil }), codes.InvalidArgument},
		{"ControllerPublish RWX mount", publish(func(r *csi.ControllerPublishVolumeRequest) { r.VolumeCapability = mountCap(rwx) }), codes.InvalidArgument},
		{"ControllerPublish unknown volume", publish(func(r *csi.ControllerPublishVolumeRequest) { r.VolumeId = "none-exist-id" }), codes.NotFound},
		{"ControllerPublish unknown node", publish(func(r *csi.ControllerPublishVolumeRequest) { r.VolumeId, r.NodeId = v, strings.Repeat("n", 256) }), codes.NotFound},
		{"ControllerPublish other readonly", publish(func(r *csi.ControllerPublishVolumeRequest) { r.Readonly = true }), codes.AlreadyExists},
		{"ControllerPublish other capability", publish(func(r *csi.ControllerPublishVolumeRequest) {
			r.VolumeCapability = blockCap(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
		}), codes.AlreadyExists},
		{"ControllerPublish other node", publish(func(r *csi.ControllerPublishVolumeRequest) { r.NodeId = "n2" }), codes.FailedPrecondition},

		{"ControllerUnpublish no id", unpublish("", "n1"), codes.InvalidArgument},
		{"ControllerUnpublish unknown volume", unpublish("none-exist-id", "n1"), codes.OK},
		{"ControllerUnpublish unknown node", unpublish(att, "n9"), codes.OK},
		{"ControllerUnpublish not attached", unpublish(v, "n1"), codes.OK},

		{"Validate no id", validate("", writer), codes.InvalidArgument},
		{"Validate no capabilities", validate(v), codes.InvalidArgument},
		{"Validate unknown", validate("none-exist-id", writer), codes.NotFound},
		{"Validate unsupported", validate(v, mountCap(rwx)), codes.OK},

		{"ListVolumes negative", listVolumes(-1, ""), codes.InvalidArgument},
		{"Point30 ListVolumes bad token", listVolumes(0, "invalid-token"), codes.Aborted},
		{"ListSnapshots negative", listSnapshots(&csi.ListSnapshotsRequest{MaxEntries: -1}), codes.InvalidArgument},
		{"Point30 ListSnapshots bad token", listSnapshots(&csi.ListSnapshotsRequest{StartingToken: "invalid-token"}), codes.Aborted},
		{"Point03 ListSnapshots odd filter", listSnapshots(&csi.ListSnapshotsRequest{SnapshotId: "?", SourceVolumeId: "!"}), codes.OK},

		{"GetVolume no id", func() error { _, err := w.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{}); return err }, codes.InvalidArgument},
		{"GetVolume unknown", func() error {
			_, err := w.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: "none-exist-id"})
			return err
		}, codes.NotFound},
		{"GetSnapshot no id", func() error { _, err := w.GetSnapshot(ctx, &csi.GetSnapshotRequest{}); return err }, codes.InvalidArgument},
		{"GetSnapshot unknown", func() error {
			_, err := w.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: "none-exist-id"})
			return err
		}, codes.NotFound},
		{"GetVolumeHealth no id", func() error {
			_, err := w.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{})
			return err
		}, codes.InvalidArgument},
		{"GetVolumeHealth unknown", func() error {
			_, err := w.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: "none-exist-id"})
			return err
		}, codes.NotFound},
		{"ListVolumeHealth bad token", func() error {
			_, err := w.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{StartingToken: "x"})
			return err
		}, codes.Aborted},

		{"Modify no id", modify("", nil), codes.InvalidArgument},
		{"Modify unknown volume", modify("none-exist-id", nil), codes.NotFound},
		{"Modify nothing", modify(v, nil), codes.OK},
		{"Modify unknown key", modify(v, map[string]string{"iopsLimit": "5", "color": "red"}), codes.InvalidArgument},
		{"Modify fixed parameter of a class", modify(v, map[string]string{"blockSize": "512"}), codes.InvalidArgument},
		{"Modify replicas to what they are", modify(v, map[string]string{"replicas": "1", "minInSync": "1", "dataLocality": "preferred"}), codes.OK},
		{"Modify replicas", modify(v, map[string]string{"replicas": "2"}), codes.OK},
		{"Modify replicas below minInSync", modify(v, map[string]string{"replicas": "1", "minInSync": "2"}), codes.InvalidArgument},
		{"Modify replicas to too many", modify(v, map[string]string{"replicas": "6"}), codes.InvalidArgument},
		{"Modify locality", modify(v, map[string]string{"dataLocality": "required"}), codes.OK},
		{"Modify limits", modify(v, map[string]string{"iopsLimit": "10k", "bandwidthLimit": "100Mi"}), codes.OK},
		{"Modify limit out of bounds", modify(v, map[string]string{"bandwidthLimit": "1"}), codes.InvalidArgument},

		{"CreateSnapshot no name", snapshot("", src), codes.InvalidArgument},
		{"CreateSnapshot no source", snapshot("s", ""), codes.InvalidArgument},
		{"CreateSnapshot unknown source", snapshot("s", "none-exist-id"), codes.NotFound},
		{"CreateSnapshot same", snapshot("snap", src), codes.OK},
		{"CreateSnapshot other source", snapshot("snap", v), codes.AlreadyExists},
		{"CreateSnapshot unknown parameter", snapshot("s", src, "color", "red"), codes.InvalidArgument},
		{"CreateSnapshot bad freeze", snapshot("s", src, "freezeFilesystem", "maybe"), codes.InvalidArgument},
		{"CreateSnapshot freeze", snapshot("frozen", src, "freezeFilesystem", "true"), codes.OK},
		{"CreateSnapshot metadata", snapshot("meta", src, "csi.storage.k8s.io/volumesnapshot/name", "x"), codes.OK},
		{"CreateSnapshot usable from elsewhere", func() error {
			_, err := w.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "e", SourceVolumeId: src, AccessibilityRequirements: requisite("n9")})
			return err
		}, codes.ResourceExhausted},

		{"DeleteSnapshot no id", func() error { _, err := w.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{}); return err }, codes.InvalidArgument},
		{"Point03 DeleteSnapshot unknown", func() error {
			_, err := w.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: "reallyfakesnapshotid"})
			return err
		}, codes.OK},

		{"Expand no id", expand("", gib, 0), codes.InvalidArgument},
		{"Expand no range", expand(v, 0, 0), codes.InvalidArgument},
		{"Expand unknown", expand("none-exist-id", gib, 0), codes.NotFound},
		{"Expand already as large", expand(v, mib, 0), codes.OK},
		{"Expand beyond the largest", expand(v, volume.MaxSize+1, 0), codes.OutOfRange},
		{"Expand limit below the size", expand(v, mib, 2*mib), codes.OutOfRange},
		{"Expand no room", expand(v, 500*gib, 0), codes.ResourceExhausted},
		{"Expand bad capability", func() error {
			_, err := w.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v,
				CapacityRange: &csi.CapacityRange{RequiredBytes: gib}, VolumeCapability: mountCap(rwx)})
			return err
		}, codes.InvalidArgument},

		{"GetCapacity", func() error { _, err := w.GetCapacity(ctx, &csi.GetCapacityRequest{}); return err }, codes.OK},
		{"GetCapacity unknown parameter", func() error {
			_, err := w.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: map[string]string{"color": "red"}})
			return err
		}, codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := w.state()
			err := tt.call()
			wantCode(t, err, tt.want)
			if after := w.state(); err != nil && after != before {
				t.Errorf("Point05: a failed call changed the state from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// unfenced is a cluster in which something that a call needs is not found.
type unfenced struct{ Cluster }

func (unfenced) Detach(context.Context, volume.ID, volume.NodeID) error { return volume.ErrNotFound }
func (unfenced) DeleteVolume(context.Context, volume.ID) error          { return volume.ErrNotFound }
func (unfenced) DeleteSnapshot(context.Context, volume.SnapshotID) error {
	return volume.ErrNotFound
}

// TestNotFoundIsNotGone: only the cluster knows what is gone; an error of it is never success.
func TestNotFoundIsNotGone(t *testing.T) {
	w := newWorld(t)
	locks := keylock.New(time.Minute)
	defer func() {
		if err := locks.Close(w.ctx); err != nil {
			t.Error(err)
		}
	}()
	c := NewController(unfenced{w.gate}, locks)
	_, detach := c.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: "v", NodeId: "n1"})
	_, remove := c.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: "v"})
	_, drop := c.DeleteSnapshot(w.ctx, &csi.DeleteSnapshotRequest{SnapshotId: "s"})
	for _, err := range []error{detach, remove, drop} {
		if !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	}
}

// TestNamesInErrors: an error names what the caller has to look at.
func TestNamesInErrors(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	w.mustPublish(v, "n1")
	_, onOther := w.ControllerPublishVolume(w.ctx, w.publish(v, "n2"))
	_, inUse := w.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: v})
	_, unknown := w.CreateVolume(w.ctx, create("x", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"color": "red"} }))
	_, mutable := w.ControllerModifyVolume(w.ctx, &csi.ControllerModifyVolumeRequest{VolumeId: v, MutableParameters: map[string]string{"replicas": "9"}})
	for _, tt := range []struct {
		err  error
		want string
	}{{onOther, "n1"}, {inUse, "n1"}, {unknown, `"color"`}, {mutable, "replicas"}} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("got %v, want it to name %s", tt.err, tt.want)
		}
	}
}

func TestValidateVolumeCapabilities(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"fsType": "xfs"} }).VolumeId
	cap := mountCap(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)
	cap.GetMount().FsType = "xfs"
	cap.GetMount().MountFlags = []string{"noatime", `context="system_u:object_r:svirt_t:s0:c1,c2"`}
	req := &csi.ValidateVolumeCapabilitiesRequest{
		VolumeId:           v,
		VolumeContext:      map[string]string{"storage.kubernetes.io/csiProvisionerIdentity": "x"},
		VolumeCapabilities: []*csi.VolumeCapability{cap, blockCap(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)},
		Parameters:         map[string]string{"fsType": "xfs", "csi.storage.k8s.io/pvc/namespace": "n"},
		MutableParameters:  map[string]string{"iopsLimit": "1000"},
	}
	resp, err := w.ValidateVolumeCapabilities(w.ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	want := &csi.ValidateVolumeCapabilitiesResponse_Confirmed{VolumeContext: req.VolumeContext,
		VolumeCapabilities: req.VolumeCapabilities, Parameters: req.Parameters, MutableParameters: req.MutableParameters}
	if !proto.Equal(resp.GetConfirmed(), want) || resp.GetMessage() != "" {
		t.Errorf("got %v, want the request echoed", resp)
	}
	for name, change := range map[string]func(*csi.ValidateVolumeCapabilitiesRequest){
		"mode":      func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeCapabilities[0].AccessMode.Mode = 5 },
		"malformed": func(r *csi.ValidateVolumeCapabilitiesRequest) { r.VolumeCapabilities[0] = &csi.VolumeCapability{} },
		"parameter": func(r *csi.ValidateVolumeCapabilitiesRequest) { r.Parameters["replicas"] = "3" },
		"unknown":   func(r *csi.ValidateVolumeCapabilitiesRequest) { r.Parameters["color"] = "red" },
		"mutable":   func(r *csi.ValidateVolumeCapabilitiesRequest) { r.MutableParameters["color"] = "red" },
	} {
		bad := proto.Clone(req).(*csi.ValidateVolumeCapabilitiesRequest)
		change(bad)
		resp, err := w.ValidateVolumeCapabilities(w.ctx, bad)
		if err != nil || resp.GetConfirmed() != nil || resp.GetMessage() == "" {
			t.Errorf("%s: got %v, %v; want nothing confirmed and a message", name, resp, err)
		}
	}
}

func requisite(nodes ...string) *csi.TopologyRequirement {
	r := &csi.TopologyRequirement{}
	for _, n := range nodes {
		r.Requisite = append(r.Requisite, &csi.Topology{Segments: map[string]string{volume.TopologyKey: n}})
	}
	return r
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}
