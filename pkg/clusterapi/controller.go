package clusterapi

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/rpcerr"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const controllerService = "ballast.cluster.v1.Controller"

// Controller is what a controller answers to nodes.
type Controller interface {
	Record(ctx context.Context, id volume.ID) (volume.Volume, error)
	// The methods that end in By are asked by a node, and volume.ErrDenied where it is not the one that may.
	SetFilesystemBy(ctx context.Context, node volume.NodeID, id volume.ID, fs volume.Filesystem) error
	RegisterNode(ctx context.Context, n volume.Node) error
	ReportUsage(ctx context.Context, node volume.NodeID, u control.Usage) error
	// CommitBy and Membership as package engine asks of its Controllers.
	CommitBy(ctx context.Context, node volume.NodeID, id volume.ID, c replication.Change) (replication.Membership, error)
	Membership(ctx context.Context, id volume.ID) (replication.Membership, error)
	// AddHolderBy records that a replica has filled in a snapshot.
	AddHolderBy(ctx context.Context, node volume.NodeID, id volume.SnapshotID, replica volume.ReplicaID) error
	// Ended tells which engines are of the past.
	Ended(ctx context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error)
	// Nodes are those of the cluster: where they are, and which of them are controllers.
	Nodes(ctx context.Context) ([]volume.Node, error)
	// RemovedNodes are those that nobody is to speak to.
	RemovedNodes(ctx context.Context) ([]volume.NodeID, error)
	// Generations are how many joined under each name: nobody is to speak to those before the last.
	Generations(ctx context.Context) (map[volume.NodeID]uint64, error)
	// Join lets a node in. Anybody may ask; the claim says whether they may.
	Join(ctx context.Context, r Join) (Joined, error)
	// Renew certifies a new key of a node of the cluster, in the generation that it has. The answer is as in Joined.
	Renew(ctx context.Context, node volume.NodeID, generation uint64, csr []byte) (chain []byte, err error)
}

// Join is a node's request to become a member.
type Join struct {
	Claim jointoken.Claim
	// CSR is the signing request for the node's key (PKCS #10, DER).
	CSR []byte
}

// Joined is the answer.
type Joined struct {
	// Chain is the node's certificate and the CA's, PEM.
	Chain []byte
	// CA is the authority with its key, for a node that becomes a controller; else empty.
	CA []byte `json:",omitempty"`
}

type (
	volumeID      struct{ ID volume.ID }
	setFilesystem struct {
		ID         volume.ID
		Filesystem volume.Filesystem
	}
	reportUsage struct {
		Node  volume.NodeID
		Usage control.Usage
	}
	commit struct {
		ID     volume.ID
		Change replication.Change
	}
	// committed has the record after the change, or the current one and why the change was refused.
	committed struct {
		Membership replication.Membership
		Refused    string `json:",omitempty"`
		Kind       string `json:",omitempty"`
	}
	addHolder struct {
		ID      volume.SnapshotID
		Replica volume.ReplicaID
	}
	ended struct{ Engines map[volume.ID]volume.Epoch }
	renew struct {
		Node volume.NodeID
		CSR  []byte
	}
)

var controllerDesc = grpc.ServiceDesc{
	ServiceName: controllerService, HandlerType: (*Controller)(nil),
	Methods: []grpc.MethodDesc{
		unary(controllerService, "Volume", func(c Controller, ctx context.Context, r *volumeID) (volume.Volume, error) {
			return c.Record(ctx, r.ID)
		}),
		unary(controllerService, "SetFilesystem", func(c Controller, ctx context.Context, r *setFilesystem) (none, error) {
			node, err := callerNode(ctx)
			if err != nil {
				return none{}, err
			}
			return none{}, c.SetFilesystemBy(ctx, node, r.ID, r.Filesystem)
		}),
		unary(controllerService, "RegisterNode", func(c Controller, ctx context.Context, r *volume.Node) (none, error) {
			if err := isCaller(ctx, r.ID); err != nil {
				return none{}, err
			}
			if err := mayBe(ctx, r.Roles); err != nil {
				return none{}, err
			}
			return none{}, c.RegisterNode(ctx, *r)
		}),
		unary(controllerService, "ReportUsage", func(c Controller, ctx context.Context, r *reportUsage) (none, error) {
			if err := isCaller(ctx, r.Node); err != nil {
				return none{}, err
			}
			return none{}, c.ReportUsage(ctx, r.Node, r.Usage)
		}),
		unary(controllerService, "Commit", func(c Controller, ctx context.Context, r *commit) (committed, error) {
			node, err := callerNode(ctx)
			if err != nil {
				return committed{}, err
			}
			if a := r.Change.Attach; a != nil {
				if err := isCaller(ctx, a.Node); err != nil {
					return committed{}, err
				}
			}
			m, err := c.CommitBy(ctx, node, r.ID, r.Change)
			if err == nil || unknown(err) {
				return committed{Membership: m}, err
			}
			return committed{Membership: m, Refused: err.Error(), Kind: rpcerr.Name(err)}, nil
		}),
		unary(controllerService, "Membership", func(c Controller, ctx context.Context, r *volumeID) (replication.Membership, error) {
			return c.Membership(ctx, r.ID)
		}),
		unary(controllerService, "AddHolder", func(c Controller, ctx context.Context, r *addHolder) (none, error) {
			node, err := callerNode(ctx)
			if err != nil {
				return none{}, err
			}
			return none{}, c.AddHolderBy(ctx, node, r.ID, r.Replica)
		}),
		unary(controllerService, "Ended", func(c Controller, ctx context.Context, r *ended) ([]volume.ID, error) {
			return c.Ended(ctx, r.Engines)
		}),
		unary(controllerService, "Nodes", func(c Controller, ctx context.Context, _ *none) ([]volume.Node, error) {
			return c.Nodes(ctx)
		}),
		unary(controllerService, "RemovedNodes", func(c Controller, ctx context.Context, _ *none) ([]volume.NodeID, error) {
			return c.RemovedNodes(ctx)
		}),
		unary(controllerService, "Generations", func(c Controller, ctx context.Context, _ *none) (map[volume.NodeID]uint64, error) {
			return c.Generations(ctx)
		}),
		unary(controllerService, "Join", func(c Controller, ctx context.Context, r *Join) (Joined, error) {
			return c.Join(ctx, *r)
		}),
		unary(controllerService, "Renew", func(c Controller, ctx context.Context, r *renew) ([]byte, error) {
			if err := isCaller(ctx, r.Node); err != nil {
				return nil, err
			}
			p, err := caller(ctx)
			if err != nil {
				return nil, err
			}
			return c.Renew(ctx, r.Node, p.Generation, r.CSR)
		}),
	},
}

func unknown(err error) bool {
	return errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// Cluster is what a node needs of the controllers, by calls to any of them.
type Cluster struct {
	controllers func() []grpc.ClientConnInterface
	// good is the index of the one that answered last.
	good atomic.Int32
}

// NewCluster asks one of the controllers that the function returns, and the next where one does not answer.
func NewCluster(controllers func() []grpc.ClientConnInterface) *Cluster {
	return &Cluster{controllers: controllers}
}

func ask[Resp, Req any](ctx context.Context, c *Cluster, name string, req *Req) (Resp, error) {
	ccs := c.controllers()
	var zero Resp
	err := fmt.Errorf("no controller is known: %w", volume.ErrUnavailable)
	first := int(c.good.Load())
	for i := range ccs {
		at := (first + i) % len(ccs)
		var resp Resp
		resp, err = invoke[Resp](ctx, ccs[at], controllerService, name, req)
		switch {
		case !errors.Is(err, volume.ErrUnavailable):
			c.good.Store(int32(at))
			return resp, err
		case ctx.Err() != nil: // it did not answer in time: the next call goes elsewhere
			c.good.CompareAndSwap(int32(first), int32(at+1))
			return resp, err
		}
	}
	return zero, err
}

// Record implements agent's Cluster, as those below do.
func (c *Cluster) Record(ctx context.Context, id volume.ID) (volume.Volume, error) {
	return ask[volume.Volume](ctx, c, "Volume", &volumeID{id})
}

func (c *Cluster) SetFilesystem(ctx context.Context, id volume.ID, fs volume.Filesystem) error {
	_, err := ask[none](ctx, c, "SetFilesystem", &setFilesystem{id, fs})
	return err
}

func (c *Cluster) RegisterNode(ctx context.Context, n volume.Node) error {
	_, err := ask[none](ctx, c, "RegisterNode", &n)
	return err
}

func (c *Cluster) ReportUsage(ctx context.Context, node volume.NodeID, u control.Usage) error {
	_, err := ask[none](ctx, c, "ReportUsage", &reportUsage{node, u})
	return err
}

// Commit asks for a change of a volume's record. It asks one controller only: an attempt of unknown outcome must not be
// made again under the caller's eyes.
func (c *Cluster) Commit(ctx context.Context, id volume.ID, change replication.Change) (replication.Membership, error) {
	ccs := c.controllers()
	if len(ccs) == 0 {
		return replication.Membership{}, fmt.Errorf("no controller is known: %w", volume.ErrUnavailable)
	}
	at := int(c.good.Load()) % len(ccs)
	r, err := invoke[committed](ctx, ccs[at], controllerService, "Commit", &commit{id, change})
	if err == nil && r.Refused != "" {
		err = rpcerr.Named(r.Kind, r.Refused)
	}
	if errors.Is(err, volume.ErrUnavailable) {
		c.good.CompareAndSwap(int32(at), int32(at+1)) // the next attempt goes elsewhere
	}
	return r.Membership, err
}

func (c *Cluster) Membership(ctx context.Context, id volume.ID) (replication.Membership, error) {
	return ask[replication.Membership](ctx, c, "Membership", &volumeID{id})
}

func (c *Cluster) AddHolder(ctx context.Context, id volume.SnapshotID, replica volume.ReplicaID) error {
	_, err := ask[none](ctx, c, "AddHolder", &addHolder{id, replica})
	return err
}

// Ended tells which engines are of the past.
func (c *Cluster) Ended(ctx context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error) {
	return ask[[]volume.ID](ctx, c, "Ended", &ended{engines})
}

// Nodes are those of the cluster.
func (c *Cluster) Nodes(ctx context.Context) ([]volume.Node, error) {
	return ask[[]volume.Node](ctx, c, "Nodes", &none{})
}

// RemovedNodes are those that were removed and did not join again.
func (c *Cluster) RemovedNodes(ctx context.Context) ([]volume.NodeID, error) {
	return ask[[]volume.NodeID](ctx, c, "RemovedNodes", &none{})
}

// Generations are how many joined under each name.
func (c *Cluster) Generations(ctx context.Context) (map[volume.NodeID]uint64, error) {
	return ask[map[volume.NodeID]uint64](ctx, c, "Generations", &none{})
}

// Join asks to become a member.
func (c *Cluster) Join(ctx context.Context, r Join) (Joined, error) {
	return ask[Joined](ctx, c, "Join", &r)
}

// Renew asks for a certificate of a new key.
func (c *Cluster) Renew(ctx context.Context, node volume.NodeID, csr []byte) ([]byte, error) {
	return ask[[]byte](ctx, c, "Renew", &renew{node, csr})
}
