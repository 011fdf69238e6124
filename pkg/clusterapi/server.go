package clusterapi

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// A peer that is silent for so long, when it should not be, is taken for dead.
const (
	pingAfter   = 5 * time.Second
	pingTimeout = 3 * time.Second
)

// Services of a server; what is nil is not served.
type Services struct {
	Node       Node
	Controller Controller
	// Admits is asked for each call: a connection outlives the caller's membership. Nil admits every caller of the cluster.
	Admits pki.Verify
}

// NewServer serves a member of the cluster to the others. tls is from pki.Credentials: ServerWithJoin where a Controller is
// served, for nodes that have no certificate yet may ask to join. Its connections are among conns.
func NewServer(s Services, tls *tls.Config, conns *Connections) *grpc.Server {
	server := grpc.NewServer(
		grpc.Creds(conns.over(tls)), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(1024),
		grpc.UnaryInterceptor(s.admit), grpc.StreamInterceptor(s.admitStream),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	if s.Node != nil {
		server.RegisterService(&nodeDesc, s.Node)
	}
	if s.Controller != nil {
		server.RegisterService(&controllerDesc, s.Controller)
	}
	return server
}

// Connect returns a connection to a member at an address, made when it is first used. It is among conns then.
func Connect(address string, tls *tls.Config, conns *Connections) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(conns.over(tls)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		}))
}

// admit lets through what the caller may ask: a node's services are for controllers, a controller's for nodes, and Join is
// for anybody.
func (s Services) admit(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.admits(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (s Services) admitStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := s.admits(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, stream)
}

const joinMethod = "/" + controllerService + "/Join"

func (s Services) admits(ctx context.Context, method string) error {
	if method == joinMethod {
		return nil
	}
	p, err := caller(ctx)
	switch {
	case err != nil:
		return status.Error(codes.Unauthenticated, err.Error())
	case p.Kind != pki.KindNode:
		return status.Errorf(codes.PermissionDenied, "%s is no node of the cluster", p.Identity)
	case strings.HasPrefix(method, "/"+nodeService+"/") && !p.Has(pki.RoleController):
		return status.Errorf(codes.PermissionDenied, "%s is no controller", p.Identity)
	case s.Admits != nil:
		if err := s.Admits(p); err != nil {
			return status.Error(codes.PermissionDenied, err.Error())
		}
	}
	return nil
}

// caller is who is at the other end.
func caller(ctx context.Context) (pki.Peer, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return pki.Peer{}, fmt.Errorf("the caller is not known")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return pki.Peer{}, fmt.Errorf("the caller is not known: no TLS")
	}
	return pki.PeerIn(info.State)
}

// callerNode is the node at the other end, by its certificate.
func callerNode(ctx context.Context) (volume.NodeID, error) {
	p, err := caller(ctx)
	if err != nil || p.Kind != pki.KindNode || p.Name == "" {
		return "", fmt.Errorf("the caller is no node of the cluster (%v): %w", err, volume.ErrDenied)
	}
	return volume.NodeID(p.Name), nil
}

// isCaller returns volume.ErrDenied unless the caller is that node: nobody speaks for another.
func isCaller(ctx context.Context, node volume.NodeID) error {
	switch is, err := callerNode(ctx); {
	case err != nil:
		return err
	case is != node:
		return fmt.Errorf("node %s may not speak for node %s: %w", is, node, volume.ErrDenied)
	}
	return nil
}

// mayBe returns volume.ErrDenied where the caller calls itself a controller and its certificate does not: it would get the
// role with its next certificate.
func mayBe(ctx context.Context, roles []volume.NodeRole) error {
	p, err := caller(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", err, volume.ErrDenied)
	}
	if slices.Contains(roles, volume.RoleController) && !p.Has(pki.RoleController) {
		return fmt.Errorf("%s is no controller; give it a join token of that role: %w", p.Identity, volume.ErrDenied)
	}
	return nil
}
