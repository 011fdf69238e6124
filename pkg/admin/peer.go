package admin

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/rpcerr"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// peerCredentials identifies callers by the process at the other end of a Unix socket, unix(7) SO_PEERCRED.
type peerCredentials struct{}

// callerInfo is what the kernel says of a caller.
type callerInfo struct {
	credentials.CommonAuthInfo
	uid uint32
	pid int32
}

// AuthType implements credentials.AuthInfo.
func (callerInfo) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("the admin API is served on Unix sockets only")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if credErr != nil {
		return nil, nil, fmt.Errorf("credentials of the caller: %w", credErr)
	}
	info := callerInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		uid:            cred.Uid,
		pid:            cred.Pid,
	}
	return c, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName implements credentials.TransportCredentials.
func (peerCredentials) OverrideServerName(string) error { return nil }

// caller names who called, for the audit log.
func caller(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(callerInfo); ok {
			return fmt.Sprintf("admin uid=%d pid=%d", c.uid, c.pid)
		}
		if who := tlsCaller(p); who != "" {
			return who
		}
	}
	return "admin"
}

// whoIsAway adds to an error that comes of it that the controllers have no majority, and what to do.
func (s *Service) whoIsAway(ctx context.Context, err error) error {
	if !errors.Is(err, volume.ErrUnavailable) || s.o.Cluster == nil {
		return err
	}
	if votes, asked := s.votes(ctx); asked == nil && !votes.majority() {
		return fmt.Errorf("%w; %s: %s", err, votes, votes.next())
	}
	return err
}

// unary lets in who may, names the caller to those who record changes, and maps errors.
func (s *Service) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := authorise(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	reply, err := handler(audit.WithActor(ctx, caller(ctx)), req)
	if err != nil {
		return nil, rpcerr.Error(s.whoIsAway(ctx, err))
	}
	return reply, nil
}

// stream lets in who may, and maps errors. The one stream that changes something, Export, names the caller itself.
func (s *Service) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := authorise(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return rpcerr.Error(s.whoIsAway(stream.Context(), handler(srv, stream)))
}
