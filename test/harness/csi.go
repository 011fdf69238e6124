package harness

import (
	"errors"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// CSI is a client of all CSI services of one node.
type CSI struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.NodeClient
	Metadata csi.SnapshotMetadataClient

	conns []*grpc.ClientConn
}

// Dial returns a connection to a Unix socket whose calls wait for the server to be there.
func Dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 100 * time.Millisecond},
			// A socket that a killed process left behind refuses at once.
			MinConnectTimeout: time.Second,
		}))
}

func dialCSI(controller, node string) (*CSI, error) {
	c, err := Dial(controller)
	if err != nil {
		return nil, err
	}
	n := c
	conns := []*grpc.ClientConn{c}
	if node != controller {
		if n, err = Dial(node); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		conns = append(conns, n)
	}
	return &CSI{
		IdentityClient:        csi.NewIdentityClient(c),
		ControllerClient:      csi.NewControllerClient(c),
		GroupControllerClient: csi.NewGroupControllerClient(c),
		NodeClient:            csi.NewNodeClient(n),
		Metadata:              csi.NewSnapshotMetadataClient(c),
		conns:                 conns,
	}, nil
}

func (c *CSI) close() error {
	var errs []error
	for _, conn := range c.conns {
		errs = append(errs, conn.Close())
	}
	return errors.Join(errs...)
}
