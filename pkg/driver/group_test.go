package driver

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func (w *world) group(name string, ids ...string) (*csi.VolumeGroupSnapshot, error) {
	resp, err := w.CreateVolumeGroupSnapshot(w.ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: ids})
	return resp.GetGroupSnapshot(), err
}

func snapshotIDs(g *csi.VolumeGroupSnapshot) (ids []string) {
	for _, s := range g.GetSnapshots() {
		ids = append(ids, s.SnapshotId)
	}
	return ids
}

// TestPoint02_CodeTable_Groups is every row of the code table for the GroupController service.
func TestPoint02_CodeTable_Groups(t *testing.T) {
	w := newWorld(t)
	v1, v2 := w.mustCreate("v1").VolumeId, w.mustCreate("v2").VolumeId
	limited := w.mustCreate("v3", func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"tenant": "small"} }).VolumeId
	if err := w.gate.SetQuota(w.ctx, "small", volume.Amounts{Snapshots: 1}); err != nil {
		t.Fatal(err)
	}
	w.mustSnapshot("one", limited)
	g, err := w.group("g", v1, v2)
	if err != nil {
		t.Fatal(err)
	}
	ids := snapshotIDs(g)
	many := slices.Repeat([]string{v1}, volume.MaxGroup+1)

	make := func(name string, ids ...string) func() error {
		return func() error { _, err := w.group(name, ids...); return err }
	}
	with := func(name, key, value string) func() error {
		return func() error {
			_, err := w.CreateVolumeGroupSnapshot(w.ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: []string{v1, v2}, Parameters: map[string]string{key: value}})
			return err
		}
	}
	get := func(id string, ids ...string) func() error {
		return func() error {
			_, err := w.GetVolumeGroupSnapshot(w.ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids})
			return err
		}
	}
	remove := func(id string, ids ...string) func() error {
		return func() error {
			_, err := w.DeleteVolumeGroupSnapshot(w.ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids})
			return err
		}
	}
	for _, tt := range []struct {
		name string
		call func() error
		want codes.Code
	}{
		{"Create same", make("g", v1, v2), codes.OK},
		{"Create same in another order", make("g", v2, v1, v2), codes.OK},
		{"Create metadata", with("g", "csi.storage.k8s.io/volumegroupsnapshot/name", "x"), codes.OK},
		{"Create other volumes", make("g", v1), codes.AlreadyExists},
		{"Create other parameters", with("g", "freezeFilesystem", "true"), codes.AlreadyExists},
		{"Create unknown parameter", with("h", "color", "red"), codes.InvalidArgument},
		{"Create no name", make("", v1), codes.InvalidArgument},
		{"Create long name", make(strings.Repeat("x", 129), v1), codes.InvalidArgument},
		{"Create no volumes", make("h"), codes.InvalidArgument},
		{"Create empty volume", make("h", ""), codes.InvalidArgument},
		{"Create too many volumes", make("h", many...), codes.InvalidArgument},
		{"Create unknown volume", make("h", v1, "none-exist-id"), codes.NotFound},
		{"Create beyond the quota", make("h", v1, limited), codes.ResourceExhausted},
		{"Get", get(g.GroupSnapshotId, ids[1], ids[0]), codes.OK},
		{"Get no id", get(""), codes.InvalidArgument},
		{"Get unknown", get("none-exist-id"), codes.NotFound},
		{"Get other snapshots", get(g.GroupSnapshotId, ids[0]), codes.InvalidArgument},
		{"Delete no id", remove(""), codes.InvalidArgument},
		{"Delete unknown", remove("none-exist-id"), codes.OK},
		{"Delete other snapshots", remove(g.GroupSnapshotId, ids[0], "snap-x"), codes.InvalidArgument},
		{"DeleteSnapshot of a member", func() error {
			_, err := w.DeleteSnapshot(w.ctx, &csi.DeleteSnapshotRequest{SnapshotId: ids[0]})
			return err
		}, codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := w.state()
			wantCode(t, tt.call(), tt.want)
			if after := w.state(); after != before {
				t.Errorf("the state changed from\n%s\nto\n%s", before, after)
			}
		})
	}
	wantCode(t, remove(g.GroupSnapshotId, ids...)(), codes.OK)
	wantCode(t, remove(g.GroupSnapshotId, ids...)(), codes.OK)
	wantCode(t, get(g.GroupSnapshotId, ids...)(), codes.NotFound)
	if left, err := w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{}); err != nil || len(left.Entries) != 1 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestGroupSnapshotsAreSnapshots(t *testing.T) {
	w := newWorld(t)
	v1, v2 := w.mustCreate("v1").VolumeId, w.mustCreate("v2").VolumeId
	w.mustPublish(v2, "n1")
	g, err := w.group("g", v1, v2)
	if err != nil || !g.ReadyToUse || len(g.Snapshots) != 2 || g.CreationTime.AsTime().IsZero() {
		t.Fatal(g, err)
	}
	for _, s := range g.Snapshots {
		got, err := w.GetSnapshot(w.ctx, &csi.GetSnapshotRequest{SnapshotId: s.SnapshotId})
		if err != nil || !proto.Equal(got.GetSnapshot(), s) || s.GroupSnapshotId != g.GroupSnapshotId || !s.ReadyToUse {
			t.Errorf("%v, %v, want %v", got, err, s)
		}
		w.mustCreate("from "+s.SnapshotId, func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = fromSnapshot(s.SnapshotId) })
	}
}

// TestPoint36_APartialGroupLeavesNothing: one of the volumes cannot be cut.
func TestPoint36_APartialGroupLeavesNothing(t *testing.T) {
	for code, cause := range map[codes.Code]error{codes.ResourceExhausted: volume.ErrNoSpace, codes.Unavailable: volume.ErrUnavailable, codes.Aborted: volume.ErrBusy} {
		t.Run(code.String(), func(t *testing.T) {
			w := newWorld(t)
			v1, v2 := w.mustCreate("v1").VolumeId, w.mustCreate("v2").VolumeId
			w.mustPublish(v2, "n1")
			before := w.state()
			w.agents.mu.Lock()
			w.agents.cutting = func(id volume.ID) error {
				if string(id) == v2 {
					return fmt.Errorf("it is refused: %w", cause)
				}
				return nil
			}
			w.agents.mu.Unlock()
			_, err := w.group("g", v1, v2)
			wantCode(t, err, code)
			if after := w.state(); code != codes.Unavailable && after != before {
				t.Errorf("the state changed from\n%s\nto\n%s", before, after)
			}
			if list, err := w.ListSnapshots(w.ctx, &csi.ListSnapshotsRequest{}); err != nil || len(list.Entries) > 0 {
				t.Errorf("somebody is told: %v %v", list, err)
			}
			w.agents.mu.Lock()
			w.agents.cutting = nil
			w.agents.mu.Unlock()
			g, err := w.group("g", v1, v2)
			if err != nil || len(g.Snapshots) != 2 {
				t.Errorf("the retry: %v %v", g, err)
			}
		})
	}
}
