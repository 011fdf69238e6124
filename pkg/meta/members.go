package meta

import (
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func setNodeState(v *view, c command.SetNodeState) (command.Result, error) {
	n, ok := load[nodeRecord](v, nodes+string(c.Node))
	if !ok {
		return nil, fmt.Errorf("node %s does not exist: %w", c.Node, volume.ErrNotFound)
	}
	idle, _ := load[[]volume.NodeID](v, idleNodes)
	if c.State != volume.NodeActive {
		for _, id := range idle {
			if id != c.Node && !slices.Contains(c.Idle, id) {
				return nil, fmt.Errorf("node %s was drained meanwhile; try again: %w", id, volume.ErrBusy)
			}
		}
	}
	idle = slices.DeleteFunc(idle, func(id volume.NodeID) bool { return id == c.Node })
	if c.State != volume.NodeActive {
		idle = append(idle, c.Node)
		slices.Sort(idle)
	}
	setIdle(v, idle)
	n.State = c.State
	save(v, nodes+string(n.ID), n)
	return command.Done{}, nil
}

func setIdle(v *view, idle []volume.NodeID) {
	if len(idle) == 0 {
		v.del(idleNodes)
		return
	}
	save(v, idleNodes, idle)
}

func removeNode(v *view, c command.RemoveNode) (command.Result, error) {
	n, ok := load[nodeRecord](v, nodes+string(c.Node))
	if !ok {
		v.put(removedNodes+string(c.Node), []byte{1})
		return command.Done{}, nil
	}
	if a, _ := load[int](v, attached+string(n.ID)); a > 0 {
		return nil, fmt.Errorf("node %s has %d volumes attached; detach them first: %w", n.ID, a, volume.ErrInUse)
	}
	for _, id := range n.Pools {
		if p, ok := load[volume.Pool](v, pools+string(id)); ok && p.Node == n.ID {
			if p.Provisioned > 0 {
				return nil, fmt.Errorf("pool %s of node %s holds replicas of %d bytes; empty the node first: %w", p.ID, n.ID, p.Provisioned, volume.ErrInUse)
			}
			if someSnapshot(v, snapshots, func(x volume.Snapshot) bool { return slices.ContainsFunc(x.Holders, inPool(p.ID)) }) {
				return nil, fmt.Errorf("pool %s of node %s holds snapshots; empty the node first: %w", p.ID, n.ID, volume.ErrInUse)
			}
			v.del(pools + string(id))
		}
	}
	forgetNode(v, n.ID)
	v.put(removedNodes+string(c.Node), []byte{1})
	return command.Done{}, nil
}

func forgetNode(v *view, id volume.NodeID) {
	v.del(nodes + string(id))
	idle, _ := load[[]volume.NodeID](v, idleNodes)
	setIdle(v, slices.DeleteFunc(idle, func(o volume.NodeID) bool { return o == id }))
}

func createJoinToken(v *view, c command.CreateJoinToken) (command.Result, error) {
	if v.read(joinTokens+c.Record.ID) != nil {
		return nil, fmt.Errorf("join token %s is there already: %w", c.Record.ID, volume.ErrExists)
	}
	save(v, joinTokens+c.Record.ID, c.Record)
	return command.JoinToken(c), nil
}

func redeemJoinToken(v *view, c command.RedeemJoinToken) (command.Result, error) {
	rec, ok := load[jointoken.Record](v, joinTokens+c.Claim.Token)
	if !ok {
		return nil, jointoken.Unknown(c.Claim.Token)
	}
	before := len(rec.Redeemed)
	rec, err := rec.Redeem(c.Now, c.Claim, v.read(nodes+string(c.Claim.Node)) != nil)
	if err != nil {
		return nil, err
	}
	if len(rec.Redeemed) == before && v.read(removedNodes+string(c.Claim.Node)) != nil { // what it was let in with is no way back
		return nil, fmt.Errorf("node %s was removed after it had joined with token %s; make another: %w", c.Claim.Node, rec.ID, volume.ErrInUse)
	}
	if n := len(rec.Redeemed); n > before {
		g, _ := load[uint64](v, generations+string(c.Claim.Node))
		save(v, generations+string(c.Claim.Node), g+1)
		rec.Redeemed[n-1].Generation = g + 1
	}
	v.del(removedNodes + string(c.Claim.Node))
	save(v, joinTokens+rec.ID, rec)
	return command.JoinToken{Record: rec}, nil
}
