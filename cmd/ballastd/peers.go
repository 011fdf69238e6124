package main

import (
	"context"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/replicanet"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// remotePeers is engine.Peers for the replicas of other nodes.
type remotePeers struct {
	client    *replicanet.Client
	directory *directory
}

func (r remotePeers) Dial(ctx context.Context, node volume.NodeID, v volume.ID, replica volume.ReplicaID,
	receive func(*replication.Message), down func(error)) (engine.Transport, error) {
	n, err := r.directory.node(ctx, node)
	if err != nil {
		return nil, err
	}
	if n.DataAddress == "" {
		return nil, fmt.Errorf("node %s has no replicas for others: %w", node, volume.ErrUnavailable)
	}
	l, err := r.client.Dial(ctx, replicanet.Target{Node: node, Address: n.DataAddress, Volume: v, Replica: replica},
		answers{receive: receive, down: down})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// answers hands an engine what arrives on a link.
type answers struct {
	receive func(*replication.Message)
	down    func(error)
}

func (a answers) Receive(_ *replicanet.Link, m *replication.Message) { a.receive(m) }
func (a answers) Closed(_ *replicanet.Link, err error)               { a.down(err) }

// replicas is replicanet.Acceptor for the replicas of this node.
type replicas struct{ node *agent.Node }

func (r replicas) Open(ctx context.Context, l *replicanet.Link, v volume.ID, id volume.ReplicaID) (replicanet.Handler, error) {
	// When the replica is closed its links end, and the engine asks for it again.
	reply := func(m *replication.Message) {
		l.Send(m)
		l.Flush()
	}
	c, err := r.node.Connect(ctx, v, id, reply, func(error) { l.Close() })
	if err != nil {
		return nil, err
	}
	return served{c}, nil
}

// served hands a replica what arrives on a link.
type served struct{ conn *engine.Conn }

func (s served) Receive(_ *replicanet.Link, m *replication.Message) { s.conn.Send(m) }
func (s served) Closed(*replicanet.Link, error)                     { s.conn.Close() }
