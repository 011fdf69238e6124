package driver

import (
	"math"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/control"
)

// FuzzController sends names, ids, sizes and parameters of any kind. Nothing may panic or be an internal error, and what
// is refused may not have changed anything.
func FuzzController(f *testing.F) {
	f.Add("v", "vol-00000000000000000000", "n1", int64(gib), int64(0), "replicas", "1", int32(1), int32(1))
	f.Add("", "", "", int64(-1), int64(-1), "", "", int32(0), int32(-1))
	f.Add("a\tb", "snap-00000000000000000000", "n2", int64(1)<<62, int64(math.MaxInt64), "csi.storage.k8s.io/pvc/namespace", "\u0085", int32(5), int32(100))
	f.Add("\x7f", "clone-1", "\x00", int64(4095), int64(4097), "iopsLimit", "1e9", int32(7), int32(2))
	f.Add("é\u009f", "../..", "n1/../n2", int64(1)<<20, int64(1)<<20, "tenant", "a/b\nc", int32(3), int32(3))
	f.Add("v", "vol-zzzzzzzzzzzzzzzzzzzz", "n1", int64(110*gib), int64(0), "bandwidthLimit", "99999999999999999999Ei", int32(6), int32(9))
	shared := newWorld(f)
	empty := shared.state()
	f.Fuzz(func(t *testing.T, name, id, node string, required, limit int64, key, value string, mode, max int32) {
		for _, s := range []*string{&name, &id, &node, &key, &value} {
			*s = strings.ToValidUTF8(*s, "?") // protobuf does not carry anything else
		}
		w := *shared
		w.t = t
		existing := w.mustCreate("existing").VolumeId
		snap := w.mustSnapshot("existing", existing).SnapshotId
		m := map[string]string{key: value}
		size := &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}
		use := []*csi.VolumeCapability{mountCap(csi.VolumeCapability_AccessMode_Mode(mode))}
		if mode%2 == 0 {
			use[0] = blockCap(csi.VolumeCapability_AccessMode_Mode(mode))
		} else {
			use[0].GetMount().FsType, use[0].GetMount().MountFlags = value, []string{key}
		}
		topology := &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{key: node}}, requisite(node).Requisite[0]}}
		metadata := func(s interface {
			Recv() (*csi.GetMetadataAllocatedResponse, error)
		}, err error) error {
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}
		for _, target := range []string{id, existing, snap} {
			for method, call := range map[string]func() error{
				"CreateVolume": func() error {
					_, err := w.CreateVolume(w.ctx, &csi.CreateVolumeRequest{Name: name, CapacityRange: size, VolumeCapabilities: use, Parameters: m})
					return err
				},
				"CreateVolume in place": func() error {
					_, err := w.CreateVolume(w.ctx, create(name, func(r *csi.CreateVolumeRequest) {
						r.MutableParameters, r.AccessibilityRequirements, r.VolumeContentSource = m, topology, fromVolume(target)
					}))
					return err
				},
				"CreateVolume restored": func() error {
					_, err := w.CreateVolume(w.ctx, create(name, func(r *csi.CreateVolumeRequest) { r.CapacityRange, r.VolumeContentSource = size, fromSnapshot(target) }))
					return err
				},
				"Publish": func() error {
					_, err := w.ControllerPublishVolume(w.ctx, &csi.ControllerPublishVolumeRequest{VolumeId: target, NodeId: node, VolumeCapability: use[0], VolumeContext: m})
					return err
				},
				"Unpublish": func() error {
					_, err := w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: target, NodeId: node})
					return err
				},
				"Validate": func() error {
					_, err := w.ValidateVolumeCapabilities(w.ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: target, VolumeCapabilities: use, Parameters: m, MutableParameters: m})
					return err
				},
				"Expand": func() error {
					_, err := w.ControllerExpandVolume(w.ctx, &csi.ControllerExpandVolumeRequest{VolumeId: target, CapacityRange: size})
					return err
				},
				"Modify": func() error {
					_, err := w.ControllerModifyVolume(w.ctx, &csi.ControllerModifyVolumeRequest{VolumeId: target, MutableParameters: m})
					return err
				},
				"GetCapacity": func() error {
					_, err := w.GetCapacity(w.ctx, &csi.GetCapacityRequest{Parameters: m, VolumeCapabilities: use, AccessibleTopology: topology.Requisite[0]})
					return err
				},
				"CreateSnapshot": func() error {
					_, err := w.CreateSnapshot(w.ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: target, Parameters: m, AccessibilityRequirements: topology})
					return err
				},
				"ListVolumes": func() error {
					_, err := w.ListVolumes(w.ctx, &csi.ListVolumesRequest{MaxEntries: max, StartingToken: id})
					return err
				},
				"ListSnapshots": func() error {
					_, err := w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{MaxEntries: max, StartingToken: value, SnapshotId: target, SourceVolumeId: id})
					return err
				},
				"ListVolumeHealth": func() error {
					_, err := w.ControllerListVolumeHealth(w.ctx, &csi.ControllerListVolumeHealthRequest{MaxEntries: max, StartingToken: id})
					return err
				},
				"GetMetadataAllocated": func() error {
					s, err := w.GetMetadataAllocated(w.ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: target, StartingOffset: required, MaxResults: max})
					return metadata(s, err)
				},
				"GetSnapshot": func() error { _, err := w.GetSnapshot(w.ctx, &csi.GetSnapshotRequest{SnapshotId: target}); return err },
				"GetVolume": func() error {
					_, err := w.ControllerGetVolume(w.ctx, &csi.ControllerGetVolumeRequest{VolumeId: target})
					return err
				},
			} {
				before := w.state()
				err := call()
				switch code := status.Code(err); code {
				case codes.OK:
				case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.OutOfRange, codes.ResourceExhausted, codes.FailedPrecondition, codes.Aborted:
					if after := w.state(); after != before {
						t.Errorf("%s was refused (%v), yet it changed\n%s\nto\n%s", method, err, before, after)
					}
				default:
					t.Errorf("%s: %v", method, err)
				}
			}
		}
		snaps, _, err := w.gate.Snapshots(w.ctx, control.SnapshotFilter{}, control.Page{All: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range snaps {
			if _, err := w.DeleteSnapshot(w.ctx, &csi.DeleteSnapshotRequest{SnapshotId: string(s.ID)}); err != nil {
				t.Errorf("delete %+v: %v", s, err)
			}
		}
		volumes, _, err := w.gate.Volumes(w.ctx, control.Page{All: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range volumes {
			if _, err := w.ControllerUnpublishVolume(w.ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: string(v.ID)}); err != nil {
				t.Errorf("unpublish %+v: %v", v, err)
			}
			if _, err := w.DeleteVolume(w.ctx, &csi.DeleteVolumeRequest{VolumeId: string(v.ID)}); err != nil {
				t.Errorf("delete %+v: %v", v, err)
			}
		}
		if left := w.state(); left != empty {
			t.Errorf("left after everything was deleted: %s", left)
		}
	})
}
