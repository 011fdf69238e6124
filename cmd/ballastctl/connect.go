package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxAnswer bounds an answer, in bytes: lists of a cluster come in pages, but for those of nodes and replicas.
const maxAnswer = 256 << 20

// client connects to the daemon.
func (c *cli) client(ctx context.Context) (adminpb.AdminClient, error) {
	if c.conn != nil {
		return adminpb.NewAdminClient(c.conn), nil
	}
	options := []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)), grpc.WithUnaryInterceptor(c.limit)}
	target := "passthrough:///" + c.socket
	if c.server != "" {
		creds, err := c.credentials(ctx)
		if err != nil {
			return nil, err
		}
		target = "passthrough:///" + c.server
		options = append(options, grpc.WithTransportCredentials(creds))
	} else {
		if err := probeSocket(ctx, c.socket); err != nil {
			return nil, err
		}
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dialUnix))
	}
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	c.conn = conn
	return adminpb.NewAdminClient(c.conn), nil
}

// limit bounds how long an answer is waited for.
func (c *cli) limit(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, o ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return invoke(ctx, method, req, reply, cc, o...)
}

// credentials reads the certificate, and says in plain words what is wrong with it or with the server.
func (c *cli) credentials(ctx context.Context) (credentials.TransportCredentials, error) {
	if c.cert == "" {
		return nil, usage(fmt.Errorf("--server needs the certificate that `ballastctl cluster admin-cert` made: --cert FILE or %s", certEnv))
	}
	if _, _, err := net.SplitHostPort(c.server); err != nil {
		return nil, usage(fmt.Errorf("--server %q is not host:port", c.server))
	}
	own, err := pki.Load(c.cert, nil)
	switch {
	case errors.Is(err, volume.ErrNotFound):
		return nil, usage(fmt.Errorf("there is no file %s", c.cert))
	case err != nil:
		return nil, usage(err)
	case own.Self().Kind != pki.KindAdmin:
		return nil, usage(fmt.Errorf("%s is the certificate of %s; `ballastctl cluster admin-cert` makes one for admins", c.cert, own.Self()))
	case own.Expired():
		return nil, usage(fmt.Errorf("the certificate in %s has expired; have another made with `ballastctl cluster admin-cert`", c.cert))
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	config := own.Client(pki.HasRole(pki.RoleController))
	if err := c.probeServer(ctx, config); err != nil {
		return nil, unreachableError{err}
	}
	return credentials.NewTLS(config), nil
}

// probeServer says in plain words why a server cannot be reached, or does not let this caller in.
func (c *cli) probeServer(ctx context.Context, config *tls.Config) error {
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.server)
	if err != nil {
		return fmt.Errorf("cannot connect to %s: %w; see that ballastd runs there and serves its admin API on that address", c.server, err)
	}
	config = config.Clone()
	config.NextProtos = []string{"h2"}
	conn := tls.Client(raw, config)
	defer conn.Close()
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("%s is no controller of the cluster that made %s: %w", c.server, c.cert, err)
	}
	// A server that lets the caller in speaks first; a refusal comes in the same place.
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetReadDeadline(deadline); err != nil {
			return err
		}
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("%s refuses the certificate in %s: %w", c.server, c.cert, err)
	}
	return nil
}

// elsewhere makes an error of a node that is no controller one that says who is.
func (c *cli) elsewhere(ctx context.Context, err error) error {
	if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	v, askErr := adminpb.NewAdminClient(c.conn).Version(ctx, &adminpb.VersionRequest{})
	if askErr != nil || len(v.Controllers) == 0 {
		return err
	}
	return notController(v)
}

// notController says who is, where a node is none.
func notController(v *adminpb.VersionReply) error {
	var who []string
	for _, e := range v.Controllers {
		text := e.Node
		if host, _, err := net.SplitHostPort(e.Address); err == nil {
			text += " (" + host + ")"
		}
		who = append(who, text)
	}
	return unreachableError{fmt.Errorf("node %s is no controller of its cluster; run this on one that is: %s", safe(v.Node), safe(strings.Join(who, ", ")))}
}
