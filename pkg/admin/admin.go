// Package admin is the admin API: what ballastctl asks of a running Ballast, as gRPC on a Unix socket, and over mTLS for
// admins with a certificate.
//
// It translates and nothing more: the use cases are control's, errors are mapped by rpcerr, and each change is
// recorded in the audit log with who asked for it and what became of it.
package admin

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxRequest bounds a request, in bytes. None of the API's carries more than names and numbers.
const maxRequest = 64 << 10

// Control is what the admin API needs of the use cases; control.Service has it. Errors wrap the sentinels of package
// volume.
type Control interface {
	CreateVolume(ctx context.Context, r control.CreateVolume) (volume.Volume, error)
	DeleteVolume(ctx context.Context, id volume.ID) error
	Volume(ctx context.Context, id volume.ID) (volume.Volume, error)
	Volumes(ctx context.Context, p control.Page) ([]volume.Volume, string, error)
	Detach(ctx context.Context, id volume.ID, node volume.NodeID) error
	ExpandVolume(ctx context.Context, id volume.ID, required, limit int64) (volume.Volume, error)
	ModifyVolume(ctx context.Context, id volume.ID, q control.Modify) (volume.Volume, error)

	CreateSnapshot(ctx context.Context, r control.CreateSnapshot) (volume.Snapshot, error)
	DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error
	Snapshot(ctx context.Context, id volume.SnapshotID) (volume.Snapshot, error)
	Snapshots(ctx context.Context, f control.SnapshotFilter, p control.Page) ([]volume.Snapshot, string, error)

	Health(ctx context.Context, id volume.ID) (control.Health, error)
	Unhealthy(ctx context.Context, p control.Page) ([]control.Health, string, error)
	Healths(ctx context.Context, p control.Page) ([]control.Health, string, error)
	Candidates(ctx context.Context, id volume.ID) ([]control.Candidate, error)
	Salvage(ctx context.Context, id volume.ID, replica volume.ReplicaID, force bool) (volume.Volume, error)

	CreateGroup(ctx context.Context, r control.CreateGroup) (control.Group, error)
	DeleteGroup(ctx context.Context, id volume.GroupID) error
	Groups(ctx context.Context) ([]control.Group, error)

	Nodes(ctx context.Context) ([]volume.Node, error)
	DrainNode(ctx context.Context, id volume.NodeID) error
	DrainBlockers(ctx context.Context, id volume.NodeID) ([]placement.Blocker, error)
	EmptyNode(ctx context.Context, id volume.NodeID) error
	UndrainNode(ctx context.Context, id volume.NodeID) error
	RemoveNode(ctx context.Context, id volume.NodeID) error
	RemovedNodes(ctx context.Context) ([]volume.NodeID, error)
	CreateJoinToken(ctx context.Context, r jointoken.Record) error
	RevokeJoinToken(ctx context.Context, id string) error
	JoinTokens(ctx context.Context) ([]jointoken.Record, error)
	ForgetPool(ctx context.Context, id volume.PoolID, acceptDataLoss bool) (control.Forgotten, error)
	Strays(ctx context.Context) ([]control.Stray, error)
	Quotas(ctx context.Context) ([]volume.Quota, error)
	SetQuota(ctx context.Context, tenant string, limit volume.Amounts) error
	DeleteQuota(ctx context.Context, tenant string) error
	Why(ctx context.Context, id volume.ID) (string, error)
	WhySnapshot(ctx context.Context, id volume.SnapshotID) (string, error)
	Ready(ctx context.Context) error
}

// Exporter is what the admin API needs of the node that serves it; agent.Node has it. Both serve over NBD until ctx ends,
// and call started, with what clients take, once they may connect; they return started's error. volume.ErrInUse: it is
// exported already or in use elsewhere, or the export ended because somebody took the volume away.
type Exporter interface {
	ExportVolume(ctx context.Context, id volume.ID, writable bool, started func(uri string) error) error
	ExportSnapshot(ctx context.Context, s volume.Snapshot, started func(uri string) error) error
}

// Options of a Service.
type Options struct {
	Control  Control
	Exporter Exporter
	Audit    *Trail
	// Cluster is nil on a node that is alone.
	Cluster Cluster
	// Node is the name of the node that serves the API.
	Node volume.NodeID
	// Version is that of the build.
	Version string
	// Unary and Stream are outermost: they see the code that the caller gets. For metrics.
	Unary  grpc.UnaryServerInterceptor
	Stream grpc.StreamServerInterceptor
	// Poll is how often a watch looks for changes; 0 is a second.
	Poll time.Duration
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Service implements adminpb.AdminServer.
type Service struct {
	adminpb.UnimplementedAdminServer
	o        Options
	started  time.Time
	stopping chan struct{}
}

// New returns the service for o.
func New(o Options) *Service {
	if o.Poll == 0 {
		o.Poll = time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Service{o: o, started: o.Now(), stopping: make(chan struct{})}
}

// Server returns a gRPC server with the service on it for Unix sockets: callers are known by the credentials of their
// process, and whoever may open the socket is an admin.
func (s *Service) Server() *grpc.Server { return s.server(peerCredentials{}) }

func (s *Service) server(c credentials.TransportCredentials) *grpc.Server {
	unary, stream := []grpc.UnaryServerInterceptor{s.unary}, []grpc.StreamServerInterceptor{s.stream}
	if s.o.Unary != nil {
		unary = append([]grpc.UnaryServerInterceptor{s.o.Unary}, unary...)
	}
	if s.o.Stream != nil {
		stream = append([]grpc.StreamServerInterceptor{s.o.Stream}, stream...)
	}
	g := grpc.NewServer(
		grpc.Creds(c),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
	)
	adminpb.RegisterAdminServer(g, s)
	return g
}

// Stop ends the streams that would go on for ever. It is called once, before the server is stopped.
func (s *Service) Stop() { close(s.stopping) }

// Version implements adminpb.AdminServer.
func (s *Service) Version(context.Context, *adminpb.VersionRequest) (*adminpb.VersionReply, error) {
	r := &adminpb.VersionReply{
		Version:   s.o.Version,
		GoVersion: runtime.Version(),
		Node:      string(s.o.Node),
		StartedAt: timestamppb.New(s.started),
	}
	if s.o.Cluster != nil {
		for _, n := range s.o.Cluster.Elsewhere() {
			r.Controllers = append(r.Controllers, &adminpb.Endpoint{Node: string(n.ID), Address: n.Address})
		}
	}
	return r, nil
}

// readyWait bounds how long is waited for readiness: longer than it takes to say that the controllers have no majority.
const readyWait = 7 * time.Second

// Health implements adminpb.AdminServer.
func (s *Service) Health(ctx context.Context, _ *adminpb.HealthRequest) (*adminpb.HealthReply, error) {
	brief, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	if err := s.o.Control.Ready(brief); err != nil {
		return &adminpb.HealthReply{Message: err.Error()}, ctx.Err()
	}
	r := &adminpb.HealthReply{Ready: true}
	for token := ""; ; {
		hs, next, err := s.o.Control.Unhealthy(ctx, control.Page{Max: pageSize, Token: token, All: true})
		if err != nil {
			return nil, err
		}
		for _, h := range hs {
			r.Volumes = append(r.Volumes, &adminpb.VolumeHealth{Volume: string(h.Volume), Conditions: conditionsToProto(h.Conditions)})
		}
		if token = next; token == "" {
			return r, nil
		}
	}
}

// pageSize is how many things are read at once where all are needed.
const pageSize = 1000

// everyVolume calls fn with each volume, in the order of ids, until fn returns false.
func (s *Service) everyVolume(ctx context.Context, fn func(volume.Volume) bool) error {
	for token := ""; ; {
		vs, next, err := s.o.Control.Volumes(ctx, control.Page{Max: pageSize, Token: token, All: true})
		if err != nil {
			return err
		}
		for _, v := range vs {
			if !fn(v) {
				return nil
			}
		}
		if token = next; token == "" {
			return nil
		}
	}
}

// everySnapshot is everyVolume for the snapshots that match f.
func (s *Service) everySnapshot(ctx context.Context, f control.SnapshotFilter, fn func(volume.Snapshot) bool) error {
	for token := ""; ; {
		ss, next, err := s.o.Control.Snapshots(ctx, f, control.Page{Max: pageSize, Token: token, All: true})
		if err != nil {
			return err
		}
		for _, sn := range ss {
			if !fn(sn) {
				return nil
			}
		}
		if token = next; token == "" {
			return nil
		}
	}
}

// resolveVolume finds a volume by id or name. An id wins over another volume's name that looks like it.
func (s *Service) resolveVolume(ctx context.Context, ref string) (volume.Volume, error) {
	if err := volume.CheckName("volume", ref); err != nil {
		return volume.Volume{}, err
	}
	v, err := s.o.Control.Volume(ctx, volume.ID(ref))
	if !errors.Is(err, volume.ErrNotFound) {
		return v, err
	}
	var found *volume.Volume
	err = s.everyVolume(ctx, func(v volume.Volume) bool {
		if v.Name == ref {
			found = &v
		}
		// A volume that is being deleted has given its name away.
		return found == nil || found.State == volume.Deleting
	})
	switch {
	case err != nil:
		return volume.Volume{}, err
	case found == nil:
		return volume.Volume{}, fmt.Errorf("no volume has the id or the name %q: %w", ref, volume.ErrNotFound)
	}
	return *found, nil
}

// resolveSnapshot finds a snapshot by id or name.
func (s *Service) resolveSnapshot(ctx context.Context, ref string) (volume.Snapshot, error) {
	if err := volume.CheckName("snapshot", ref); err != nil {
		return volume.Snapshot{}, err
	}
	sn, err := s.o.Control.Snapshot(ctx, volume.SnapshotID(ref))
	if !errors.Is(err, volume.ErrNotFound) {
		return sn, err
	}
	var found *volume.Snapshot
	err = s.everySnapshot(ctx, control.SnapshotFilter{}, func(sn volume.Snapshot) bool {
		if sn.Name == ref {
			found = &sn
		}
		return found == nil || found.State == volume.Deleting
	})
	switch {
	case err != nil:
		return volume.Snapshot{}, err
	case found == nil:
		return volume.Snapshot{}, fmt.Errorf("no snapshot has the id or the name %q: %w", ref, volume.ErrNotFound)
	}
	return *found, nil
}
