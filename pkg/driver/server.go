package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/ballast-csi/ballast/pkg/repeat"
)

const (
	// maxRequest bounds a request, in bytes. The largest legitimate one carries some maps and capabilities of 4 KiB.
	maxRequest = 1 << 20
	// maxStreams bounds the calls in flight on one connection; more wait.
	maxStreams = 1000
	// DefaultTimeout bounds a call whose caller gave no deadline.
	DefaultTimeout = 5 * time.Minute
)

// Services are what one socket serves. Identity is required, any of the others may be nil.
type Services struct {
	Identity         csi.IdentityServer
	Controller       csi.ControllerServer
	GroupController  csi.GroupControllerServer
	SnapshotMetadata csi.SnapshotMetadataServer
	Node             csi.NodeServer
}

// ServerOptions of a Server. Zero values are the defaults.
type ServerOptions struct {
	Logger *slog.Logger
	// Timeout bounds a call without a deadline of its own; zero is DefaultTimeout.
	Timeout time.Duration
	// Unary and Stream are outermost: they see the code that the caller gets. For metrics.
	Unary  grpc.UnaryServerInterceptor
	Stream grpc.StreamServerInterceptor
}

// Server serves CSI on one listener.
type Server struct {
	grpc *grpc.Server
}

// NewServer makes a server of some services.
func NewServer(s Services, o ServerOptions) (*Server, error) {
	if s.Identity == nil {
		return nil, errors.New("every CSI socket serves Identity")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	i := interceptor{log: o.Logger, timeout: o.Timeout, unhealthy: &repeat.Trouble{}}
	unary, stream := []grpc.UnaryServerInterceptor{i.unary}, []grpc.StreamServerInterceptor{i.stream}
	if o.Unary != nil {
		unary = append([]grpc.UnaryServerInterceptor{o.Unary}, unary...)
	}
	if o.Stream != nil {
		stream = append([]grpc.StreamServerInterceptor{o.Stream}, stream...)
	}
	g := grpc.NewServer(
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxStreams),
		// Clients on the same host may ping as they like, also while idle.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	csi.RegisterIdentityServer(g, s.Identity)
	if s.Controller != nil {
		csi.RegisterControllerServer(g, s.Controller)
	}
	if s.GroupController != nil {
		csi.RegisterGroupControllerServer(g, s.GroupController)
	}
	if s.SnapshotMetadata != nil {
		csi.RegisterSnapshotMetadataServer(g, s.SnapshotMetadata)
	}
	if s.Node != nil {
		csi.RegisterNodeServer(g, s.Node)
	}
	return &Server{grpc: g}, nil
}

// Serve accepts connections until Stop. It closes l, and returns nil after Stop.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve CSI on %s: %w", l.Addr(), err)
	}
	return nil
}

// Stop refuses new calls, waits for those in flight until ctx ends, and then breaks them off.
func (s *Server) Stop(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.grpc.Stop() // makes GracefulStop return
		<-done
		return fmt.Errorf("calls were broken off: %w", ctx.Err())
	}
}
