package driver

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

type metadataMessage interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// receive reads a stream to its end and checks what holds for each.
func receive[M metadataMessage](t testing.TB, size, offset int64, limit int, recv func() (M, error)) ([]control.Extent, error) {
	t.Helper()
	var got []control.Extent
	end := int64(0)
	for n := 0; ; n++ {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				t.Error("the stream has no message")
			}
			return got, nil
		}
		if err != nil {
			return got, err
		}
		if m.GetBlockMetadataType() != csi.BlockMetadataType_VARIABLE_LENGTH || m.GetVolumeCapacityBytes() != size {
			t.Errorf("got type %v, capacity %d", m.GetBlockMetadataType(), m.GetVolumeCapacityBytes())
		}
		if limit > 0 && len(m.GetBlockMetadata()) > limit {
			t.Errorf("%d runs in a message, the limit is %d", len(m.GetBlockMetadata()), limit)
		}
		for _, b := range m.GetBlockMetadata() {
			if b.SizeBytes <= 0 || b.ByteOffset < end || b.ByteOffset+b.SizeBytes > size || b.ByteOffset+b.SizeBytes <= offset {
				t.Errorf("run %v after %d, from %d, size %d", b, end, offset, size)
			}
			end = b.ByteOffset + b.SizeBytes
			got = append(got, control.Extent{Offset: b.ByteOffset, Length: b.SizeBytes})
		}
	}
}

func (w *world) allocated(ctx context.Context, id string, size, offset int64, limit int32) ([]control.Extent, error) {
	w.t.Helper()
	s, err := w.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: id, StartingOffset: offset, MaxResults: limit})
	if err != nil {
		return nil, err
	}
	return receive(w.t, size, offset, int(limit), s.Recv)
}

func (w *world) delta(ctx context.Context, base, target string, size, offset int64, limit int32) ([]control.Extent, error) {
	w.t.Helper()
	s, err := w.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: offset, MaxResults: limit})
	if err != nil {
		return nil, err
	}
	return receive(w.t, size, offset, int(limit), s.Recv)
}

// TestPoint37_MetadataStreams: ordered, cut to the volume, and resumable from every end of a run and from within one.
func TestPoint37_MetadataStreams(t *testing.T) {
	w := newWorld(t)
	v := w.mustCreate("v").VolumeId
	base, target := w.mustSnapshot("base", v), w.mustSnapshot("target", v)
	const block = 65536
	var stored []control.Extent
	for i := range int64(3000) {
		stored = append(stored, control.Extent{Offset: 3 * i * block, Length: block})
	}
	stored = append(stored,
		control.Extent{Offset: 9001 * block, Length: block}, control.Extent{Offset: 9002 * block, Length: block}, // touch
		control.Extent{Offset: gib - 4096, Length: block}) // the store's last extent goes beyond the volume
	w.agents.snapshots[volume.SnapshotID(target.SnapshotId)] = stored
	want := append(append([]control.Extent{}, stored[:3000]...),
		control.Extent{Offset: 9001 * block, Length: 2 * block}, control.Extent{Offset: gib - 4096, Length: 4096})

	equal := func(name string, got []control.Extent, err error, want []control.Extent) {
		t.Helper()
		if err != nil || len(got) != len(want) {
			t.Fatalf("%s: %d runs, %v, want %d", name, len(got), err, len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%s: run %d is %v, want %v", name, i, got[i], want[i])
			}
		}
	}
	for _, limit := range []int32{0, 1, 7, 1 << 30} {
		got, err := w.allocated(w.ctx, target.SnapshotId, gib, 0, limit)
		equal("allocated", got, err, want)
		got, err = w.delta(w.ctx, base.SnapshotId, target.SnapshotId, gib, 0, limit)
		equal("delta", got, err, want)
	}
	for _, i := range []int{0, 1, 1500, 2999, 3000, 3001} {
		end := want[i].Offset + want[i].Length
		got, err := w.allocated(w.ctx, target.SnapshotId, gib, end, 0)
		equal("resumed", got, err, want[i+1:])
		within := append([]control.Extent{{Offset: end - 4096, Length: 4096}}, want[i+1:]...)
		got, err = w.delta(w.ctx, base.SnapshotId, target.SnapshotId, gib, end-4096, 0)
		equal("resumed within a run", got, err, within)
	}
	got, err := w.allocated(w.ctx, base.SnapshotId, gib, 0, 0)
	equal("empty snapshot", got, err, nil)
	got, err = w.delta(w.ctx, target.SnapshotId, target.SnapshotId, gib, gib, 0)
	equal("at the end", got, err, nil)
}

func TestPoint02_CodeTable_SnapshotMetadata(t *testing.T) {
	w := newWorld(t)
	s := w.mustSnapshot("s", w.mustCreate("v").VolumeId).SnapshotId
	other := w.mustSnapshot("o", w.mustCreate("w").VolumeId).SnapshotId
	for _, tt := range []struct {
		name         string
		base, target string // base "-": allocated
		offset       int64
		limit        int32
		want         codes.Code
	}{
		{"no id", "-", "", 0, 0, codes.InvalidArgument},
		{"no base", "", s, 0, 0, codes.InvalidArgument},
		{"no target", s, "", 0, 0, codes.InvalidArgument},
		{"unknown", "-", "none-exist-id", 0, 0, codes.NotFound},
		{"unknown base", "none-exist-id", s, 0, 0, codes.NotFound},
		{"unknown target", s, "none-exist-id", 0, 0, codes.NotFound},
		{"of another volume", other, s, 0, 0, codes.InvalidArgument},
		{"negative offset", "-", s, -1, 0, codes.OutOfRange},
		{"offset beyond the end", "-", s, gib + 1, 0, codes.OutOfRange},
		{"delta offset beyond the end", s, s, gib + 1, 0, codes.OutOfRange},
		{"negative limit", "-", s, 0, -1, codes.InvalidArgument},
		{"allocated", "-", s, 0, 0, codes.OK},
		{"delta", s, s, 0, 0, codes.OK},
	} {
		var err error
		if tt.base == "-" {
			_, err = w.allocated(w.ctx, tt.target, gib, tt.offset, tt.limit)
		} else {
			_, err = w.delta(w.ctx, tt.base, tt.target, gib, tt.offset, tt.limit)
		}
		t.Run(tt.name, func(t *testing.T) { wantCode(t, err, tt.want) })
	}
}

// endless is a snapshot without end, whose reader goes away.
type endless struct{ stopped chan error }

func (endless) Snapshot(context.Context, volume.SnapshotID) (volume.Snapshot, error) {
	return volume.Snapshot{ID: "s", State: volume.Ready, Size: 1 << 62}, nil
}

func (e endless) Extents(_ context.Context, _, _ volume.SnapshotID, _ int64, fn func(control.Extent) error) error {
	for off := int64(0); ; off += 8192 {
		if err := fn(control.Extent{Offset: off, Length: 4096}); err != nil {
			e.stopped <- err
			return err
		}
	}
}

func TestCancelledStreamStops(t *testing.T) {
	e := endless{stopped: make(chan error, 1)}
	client := csi.NewSnapshotMetadataClient(serve(t, Services{Identity: &Identity{}, SnapshotMetadata: NewSnapshotMetadata(e)}, ServerOptions{}))
	ctx, cancel := context.WithCancel(t.Context())
	s, err := client.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: "s"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case <-e.stopped:
	case <-time.After(10 * time.Second):
		t.Fatal("the stream goes on after its reader has gone")
	}
}

// disordered breaks its promise of order.
type disordered struct{ endless }

func (disordered) Extents(_ context.Context, _, _ volume.SnapshotID, _ int64, fn func(control.Extent) error) error {
	return errors.Join(fn(control.Extent{Offset: 8192, Length: 4096}), fn(control.Extent{Offset: 0, Length: 4096}))
}

func TestDisorderIsNotPassedOn(t *testing.T) {
	client := csi.NewSnapshotMetadataClient(serve(t, Services{Identity: &Identity{}, SnapshotMetadata: NewSnapshotMetadata(disordered{})}, ServerOptions{}))
	s, err := client.GetMetadataAllocated(t.Context(), &csi.GetMetadataAllocatedRequest{SnapshotId: "s"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = receive(t, 1<<62, 0, 0, s.Recv)
	wantCode(t, err, codes.Internal)
}
