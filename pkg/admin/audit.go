package admin

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxAudit bounds how many entries one request may ask for.
const maxAudit = 10000

// AuditLog keeps events; audit.Log is one.
type AuditLog interface {
	Record(ctx context.Context, action, object, detail string, outcome error)
	// Tail returns the last n events, the oldest first.
	Tail(n int) ([]audit.Event, error)
}

// Trail is an audit log that can be followed. Everything that is recorded goes through it. It implements control.Audit.
type Trail struct {
	log AuditLog

	mu      sync.Mutex
	count   int           // of events recorded here
	changed chan struct{} // closed by the next event
}

// NewTrail makes log one that can be followed.
func NewTrail(log AuditLog) *Trail {
	return &Trail{log: log, changed: make(chan struct{})}
}

// Record implements control.Audit.
func (t *Trail) Record(ctx context.Context, action, object, detail string, outcome error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.log.Record(ctx, action, object, detail, outcome)
	t.count++
	close(t.changed)
	t.changed = make(chan struct{})
}

// since returns the events after the first seen ones and how many there are now; with seen < 0 the last n. The channel
// is closed when there are more.
func (t *Trail) since(seen, n int) ([]audit.Event, int, <-chan struct{}, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if seen >= 0 {
		n = min(t.count-seen, maxAudit)
	}
	es, err := t.log.Tail(n)
	return es, t.count, t.changed, err
}

// Audit implements adminpb.AdminServer.
func (s *Service) Audit(r *adminpb.AuditRequest, stream grpc.ServerStreamingServer[adminpb.AuditEntry]) error {
	if r.Last < 0 || r.Last > maxAudit {
		return fmt.Errorf("last is %d, and must be between 0 and %d: %w", r.Last, maxAudit, volume.ErrInvalid)
	}
	for seen := -1; ; {
		es, now, changed, err := s.o.Audit.since(seen, int(r.Last))
		if err != nil {
			return err
		}
		for _, e := range es {
			if err := stream.Send(auditToProto(e)); err != nil {
				return err
			}
		}
		if !r.Follow {
			return nil
		}
		seen = now
		select {
		case <-changed:
		case <-s.stopping:
			return fmt.Errorf("the daemon is stopping: %w", volume.ErrUnavailable)
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func auditToProto(e audit.Event) *adminpb.AuditEntry {
	return &adminpb.AuditEntry{
		Time:    timestamppb.New(e.Time),
		Who:     e.Actor,
		What:    e.Action,
		Object:  e.Object,
		Detail:  e.Detail,
		Outcome: e.Outcome,
	}
}
