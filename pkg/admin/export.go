package admin

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Export implements adminpb.AdminServer.
func (s *Service) Export(r *adminpb.ExportRequest, stream grpc.ServerStreamingServer[adminpb.ExportReply]) error {
	ctx, cancel := context.WithCancelCause(audit.WithActor(stream.Context(), caller(stream.Context())))
	defer cancel(nil)
	go func() {
		select {
		case <-s.stopping:
			cancel(fmt.Errorf("the daemon is stopping: %w", volume.ErrUnavailable))
		case <-ctx.Done():
		}
	}()
	err := s.export(ctx, r, stream.Send)
	if err == nil {
		err = context.Cause(ctx) // the end of the call, or of the daemon
	}
	return err
}

func (s *Service) export(ctx context.Context, r *adminpb.ExportRequest, send func(*adminpb.ExportReply) error) error {
	if r.Snapshot == "" {
		v, err := s.resolveVolume(ctx, r.Volume)
		if err != nil {
			return err
		}
		reply := &adminpb.ExportReply{SizeBytes: v.Size, ReadOnly: !r.Writable, Name: v.Name, Id: string(v.ID)}
		return s.recorded(ctx, "volume.export", reply, send, func(started func(string) error) error {
			return s.o.Exporter.ExportVolume(ctx, v.ID, r.Writable, started)
		})
	}
	if r.Writable {
		return fmt.Errorf("a snapshot cannot be written: %w", volume.ErrInvalid)
	}
	sn, err := s.resolveSnapshot(ctx, r.Snapshot)
	if err != nil {
		return err
	}
	if err := s.checkVolumeOf(ctx, sn, r.Volume); err != nil {
		return err
	}
	if sn.State != volume.Ready {
		return fmt.Errorf("snapshot %s is %s: %w", sn.Name, sn.State, volume.ErrInUse)
	}
	reply := &adminpb.ExportReply{SizeBytes: sn.Size, ReadOnly: true, Name: sn.Name, Id: string(sn.ID)}
	return s.recorded(ctx, "snapshot.export", reply, send, func(started func(string) error) error {
		return s.o.Exporter.ExportSnapshot(ctx, sn, started)
	})
}

// recorded serves, and keeps in the audit log that it began, or why it could not.
func (s *Service) recorded(ctx context.Context, what string, reply *adminpb.ExportReply, send func(*adminpb.ExportReply) error, serve func(func(string) error) error) error {
	detail := fmt.Sprintf("name %q, writable %t", reply.Name, !reply.ReadOnly)
	begun := false
	err := serve(func(uri string) error {
		begun = true
		s.o.Audit.Record(ctx, what, reply.Id, detail, nil)
		reply.Uri = uri
		return send(reply)
	})
	if !begun {
		s.o.Audit.Record(ctx, what, reply.Id, detail, err)
	}
	return err
}

// checkVolumeOf returns volume.ErrNotFound where the snapshot is of another volume than ref says; "" says nothing. A
// snapshot's volume may have been deleted: its id is known still.
func (s *Service) checkVolumeOf(ctx context.Context, sn volume.Snapshot, ref string) error {
	if ref == "" || ref == string(sn.Volume) {
		return nil
	}
	v, err := s.resolveVolume(ctx, ref)
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	if err != nil || v.ID != sn.Volume {
		return fmt.Errorf("snapshot %s is of volume %s, not of %s: %w", sn.Name, sn.Volume, ref, volume.ErrNotFound)
	}
	return nil
}
