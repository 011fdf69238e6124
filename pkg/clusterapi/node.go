package clusterapi

import (
	"context"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const nodeService = "ballast.cluster.v1.Node"

// The requests of the node service. Each names the node it is for: an address may have become another's.
type (
	createReplica struct {
		Node volume.NodeID
		Spec control.ReplicaSpec
	}
	// atReplica is a replica in a pool of a node.
	atReplica struct {
		Node volume.NodeID
		Pool volume.PoolID
		ID   volume.ReplicaID
	}
	resizeReplica struct {
		Node volume.NodeID
		Pool volume.PoolID
		ID   volume.ReplicaID
		Size int64
	}
	// ofVolume is a replica of a volume, on the node that is asked, with what a method needs beside it.
	ofVolume struct {
		Node    volume.NodeID
		Replica volume.Replica
		Volume  volume.ID
		Size    int64        `json:",omitempty"`
		Epoch   volume.Epoch `json:",omitempty"`
	}
	observe struct {
		Node volume.NodeID
		Of   []control.Subject
	}
	onVolume struct {
		Node    volume.NodeID
		Volume  volume.ID
		Epoch   volume.Epoch     `json:",omitempty"`
		Replica volume.ReplicaID `json:",omitempty"`
	}
	snapshotSpec struct {
		Node volume.NodeID
		Spec control.SnapshotSpec
	}
	atSnapshot struct {
		Node volume.NodeID
		Pool volume.PoolID
		ID   volume.SnapshotID
		Of   volume.ReplicaID `json:",omitempty"`
		UpTo uint64           `json:",omitempty"`
	}
	setQoS struct {
		Node   volume.NodeID
		Volume volume.ID
		Epoch  volume.Epoch
		QoS    volume.QoS
	}
	digest struct {
		Holder   volume.Replica
		Snapshot volume.SnapshotID
		Offset   int64
		Regions  int
	}
	expel   struct{ Node, Removed volume.NodeID }
	extents struct {
		Holder   volume.Replica
		Snapshot volume.SnapshotID
		Base     volume.SnapshotID
		Offset   int64
	}
)

// batchExtents bounds the extents in one message.
const batchExtents = 4096

// Node is what a node answers to controllers.
type Node interface {
	control.Agents
	control.Members
}

// nodeMethods of the service, whose server is a Node.
var nodeMethods = []grpc.MethodDesc{
	unary(nodeService, "CreateReplica", func(a control.Agents, ctx context.Context, r *createReplica) (none, error) {
		return none{}, a.CreateReplica(ctx, r.Node, r.Spec)
	}),
	unary(nodeService, "DeleteReplica", func(a control.Agents, ctx context.Context, r *atReplica) (none, error) {
		return none{}, a.DeleteReplica(ctx, r.Node, r.Pool, r.ID)
	}),
	unary(nodeService, "HasReplica", func(a control.Agents, ctx context.Context, r *atReplica) (bool, error) {
		return a.HasReplica(ctx, r.Node, r.Pool, r.ID)
	}),
	unary(nodeService, "ResizeReplica", func(a control.Agents, ctx context.Context, r *resizeReplica) (none, error) {
		return none{}, a.ResizeReplica(ctx, r.Node, r.Pool, r.ID, r.Size)
	}),
	unary(nodeService, "ExpandVolume", func(a control.Agents, ctx context.Context, r *ofVolume) (none, error) {
		return none{}, a.ExpandVolume(ctx, r.Replica, r.Volume, r.Epoch, r.Size)
	}),
	unary(nodeService, "Fence", func(a control.Agents, ctx context.Context, r *ofVolume) (time.Duration, error) {
		return a.Fence(ctx, r.Replica, r.Volume, r.Epoch)
	}),
	unary(nodeService, "Inspect", func(a control.Agents, ctx context.Context, r *ofVolume) (control.ReplicaReport, error) {
		return a.Inspect(ctx, r.Replica, r.Volume)
	}),
	unary(nodeService, "OpenEngine", func(a control.Agents, ctx context.Context, r *onVolume) (none, error) {
		return none{}, a.OpenEngine(ctx, r.Node, r.Volume, r.Epoch)
	}),
	unary(nodeService, "Evict", func(a control.Agents, ctx context.Context, r *onVolume) (none, error) {
		return none{}, a.Evict(ctx, r.Node, r.Volume, r.Epoch, r.Replica)
	}),
	unary(nodeService, "CutSnapshot", func(a control.Agents, ctx context.Context, r *snapshotSpec) ([]volume.ReplicaID, error) {
		return a.CutSnapshot(ctx, r.Node, r.Spec)
	}),
	unary(nodeService, "Drain", func(a control.Agents, ctx context.Context, r *snapshotSpec) (none, error) {
		return none{}, a.Drain(ctx, r.Node, r.Spec)
	}),
	unary(nodeService, "Release", func(a control.Agents, ctx context.Context, r *snapshotSpec) (none, error) {
		return none{}, a.Release(ctx, r.Node, r.Spec)
	}),
	unary(nodeService, "DeleteSnapshot", func(a control.Agents, ctx context.Context, r *atSnapshot) (none, error) {
		return none{}, a.DeleteSnapshot(ctx, r.Node, r.Pool, r.ID, r.Of, r.UpTo)
	}),
	unary(nodeService, "Detach", func(a control.Agents, ctx context.Context, r *onVolume) (bool, error) {
		return a.Detach(ctx, r.Node, r.Volume, r.Epoch)
	}),
	unary(nodeService, "SetQoS", func(a control.Agents, ctx context.Context, r *setQoS) (none, error) {
		return none{}, a.SetQoS(ctx, r.Node, r.Volume, r.Epoch, r.QoS)
	}),
	unary(nodeService, "Observe", func(a control.Agents, ctx context.Context, r *observe) ([]control.Observation, error) {
		return a.Observe(ctx, r.Node, r.Of)
	}),
	unary(nodeService, "Digest", func(a control.Agents, ctx context.Context, r *digest) (control.Digest, error) {
		return a.Digest(ctx, r.Holder, r.Snapshot, r.Offset, r.Regions)
	}),
	unary(nodeService, "Expel", func(n Node, ctx context.Context, r *expel) (none, error) {
		return none{}, n.Expel(ctx, r.Node, r.Removed)
	}),
}

var nodeDesc = grpc.ServiceDesc{
	ServiceName: nodeService, HandlerType: (*Node)(nil), Methods: nodeMethods,
	Streams: []grpc.StreamDesc{{StreamName: "Extents", ServerStreams: true, Handler: serveExtents}},
}

func serveExtents(srv any, s grpc.ServerStream) error {
	var r extents
	if err := s.RecvMsg(&r); err != nil {
		return err
	}
	var batch []control.Extent
	send := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := s.SendMsg(&batch)
		batch = batch[:0]
		return err
	}
	err := srv.(control.Agents).Extents(s.Context(), r.Holder, r.Snapshot, r.Base, r.Offset, func(e control.Extent) error {
		if batch = append(batch, e); len(batch) < batchExtents {
			return nil
		}
		return send()
	})
	if err == nil {
		err = send()
	}
	if err != nil {
		return fail(func(md metadata.MD) { s.SetTrailer(md) }, err)
	}
	return nil
}

// Agents is control.Agents and control.Members by calls to the nodes.
type Agents struct{ dial Dialer }

// Dialer finds the way to a node; volume.ErrUnavailable where none is known.
type Dialer interface {
	Node(ctx context.Context, id volume.NodeID) (grpc.ClientConnInterface, error)
}

var _ Node = (*Agents)(nil)

// NewAgents returns the nodes that d finds.
func NewAgents(d Dialer) *Agents { return &Agents{dial: d} }

func node[Resp, Req any](ctx context.Context, a *Agents, id volume.NodeID, name string, req *Req) (Resp, error) {
	cc, err := a.dial.Node(ctx, id)
	if err != nil {
		var zero Resp
		return zero, err
	}
	return invoke[Resp](ctx, cc, nodeService, name, req)
}

// do is node for a method without an answer.
func do[Req any](ctx context.Context, a *Agents, id volume.NodeID, name string, req *Req) error {
	_, err := node[none](ctx, a, id, name, req)
	return err
}

// CreateReplica implements control.Agents, as all below do.
func (a *Agents) CreateReplica(ctx context.Context, n volume.NodeID, r control.ReplicaSpec) error {
	return do(ctx, a, n, "CreateReplica", &createReplica{n, r})
}

func (a *Agents) DeleteReplica(ctx context.Context, n volume.NodeID, pool volume.PoolID, id volume.ReplicaID) error {
	return do(ctx, a, n, "DeleteReplica", &atReplica{n, pool, id})
}

func (a *Agents) HasReplica(ctx context.Context, n volume.NodeID, pool volume.PoolID, id volume.ReplicaID) (bool, error) {
	return node[bool](ctx, a, n, "HasReplica", &atReplica{n, pool, id})
}

func (a *Agents) ResizeReplica(ctx context.Context, n volume.NodeID, pool volume.PoolID, id volume.ReplicaID, size int64) error {
	return do(ctx, a, n, "ResizeReplica", &resizeReplica{n, pool, id, size})
}

func (a *Agents) ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch, size int64) error {
	return do(ctx, a, r.Node, "ExpandVolume", &ofVolume{Node: r.Node, Replica: r, Volume: id, Epoch: epoch, Size: size})
}

func (a *Agents) Fence(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch) (time.Duration, error) {
	return node[time.Duration](ctx, a, r.Node, "Fence", &ofVolume{Node: r.Node, Replica: r, Volume: id, Epoch: epoch})
}

func (a *Agents) Inspect(ctx context.Context, r volume.Replica, id volume.ID) (control.ReplicaReport, error) {
	return node[control.ReplicaReport](ctx, a, r.Node, "Inspect", &ofVolume{Node: r.Node, Replica: r, Volume: id})
}

func (a *Agents) OpenEngine(ctx context.Context, n volume.NodeID, id volume.ID, epoch volume.Epoch) error {
	return do(ctx, a, n, "OpenEngine", &onVolume{Node: n, Volume: id, Epoch: epoch})
}

func (a *Agents) Evict(ctx context.Context, n volume.NodeID, id volume.ID, epoch volume.Epoch, r volume.ReplicaID) error {
	return do(ctx, a, n, "Evict", &onVolume{Node: n, Volume: id, Epoch: epoch, Replica: r})
}

func (a *Agents) CutSnapshot(ctx context.Context, n volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	return node[[]volume.ReplicaID](ctx, a, n, "CutSnapshot", &snapshotSpec{n, s})
}

func (a *Agents) Drain(ctx context.Context, n volume.NodeID, s control.SnapshotSpec) error {
	return do(ctx, a, n, "Drain", &snapshotSpec{n, s})
}

func (a *Agents) Release(ctx context.Context, n volume.NodeID, s control.SnapshotSpec) error {
	return do(ctx, a, n, "Release", &snapshotSpec{n, s})
}

func (a *Agents) DeleteSnapshot(ctx context.Context, n volume.NodeID, pool volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	return do(ctx, a, n, "DeleteSnapshot", &atSnapshot{n, pool, id, of, upTo})
}

func (a *Agents) Detach(ctx context.Context, n volume.NodeID, id volume.ID, epoch volume.Epoch) (clean bool, err error) {
	return node[bool](ctx, a, n, "Detach", &onVolume{Node: n, Volume: id, Epoch: epoch})
}

func (a *Agents) SetQoS(ctx context.Context, n volume.NodeID, id volume.ID, epoch volume.Epoch, q volume.QoS) error {
	return do(ctx, a, n, "SetQoS", &setQoS{n, id, epoch, q})
}

func (a *Agents) Observe(ctx context.Context, n volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	return node[[]control.Observation](ctx, a, n, "Observe", &observe{n, of})
}

func (a *Agents) Expel(ctx context.Context, n, removed volume.NodeID) error {
	return do(ctx, a, n, "Expel", &expel{n, removed})
}

func (a *Agents) Digest(ctx context.Context, holder volume.Replica, s volume.SnapshotID, offset int64, regions int) (control.Digest, error) {
	return node[control.Digest](ctx, a, holder.Node, "Digest", &digest{holder, s, offset, regions})
}

func (a *Agents) Extents(ctx context.Context, holder volume.Replica, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error {
	cc, err := a.dial.Node(ctx, holder.Node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // leaving early ends the stream
	defer cancel()
	stream, err := cc.NewStream(ctx, &nodeDesc.Streams[0], "/"+nodeService+"/Extents", grpc.CallContentSubtype(codecName))
	if err != nil {
		return received(ctx, nil, err)
	}
	if err := stream.SendMsg(&extents{holder, s, base, offset}); err != nil && err != io.EOF {
		return received(ctx, nil, err)
	}
	if err := stream.CloseSend(); err != nil {
		return received(ctx, nil, err)
	}
	for {
		var batch []control.Extent
		switch err := stream.RecvMsg(&batch); {
		case err == io.EOF:
			return nil
		case err != nil:
			return received(ctx, stream.Trailer(), err)
		}
		for _, e := range batch {
			if err := fn(e); err != nil {
				return err
			}
		}
	}
}
