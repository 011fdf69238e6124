package agent

import (
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// heartbeat is how often a node reports though nothing changed, so that it is seen to be alive.
const heartbeat = time.Minute

func (n *Node) poolInfos() []volume.Pool {
	out := make([]volume.Pool, 0, len(n.cfg.Pools))
	for _, p := range n.cfg.Pools {
		i := p.Info()
		i.Node = n.cfg.ID
		out = append(out, i)
	}
	return out
}

func equalUsage(a, b control.Usage) bool {
	return slices.Equal(a.Pools, b.Pools) && a.Equal(b)
}

// report registers the node, and then reports what it uses, until the node is closed.
func (n *Node) report(c Cluster) {
	tick := time.NewTicker(n.cfg.ReportEvery)
	defer tick.Stop()
	registered := false
	var unregistered, unreported repeat.Trouble
	var last control.Usage
	var at time.Time
	for {
		if !registered {
			now := time.Now()
			err := c.RegisterNode(n.ctx, volume.Node{
				ID: n.cfg.ID, LastSeen: volume.Timestamp(now.UnixNano()), Address: n.cfg.Address, DataAddress: n.cfg.DataAddress,
				Zone: n.cfg.Zone, Roles: n.cfg.Roles, BootID: uint64(n.host.boot), Pools: n.poolInfos(),
			})
			registered = err == nil
			if registered && unregistered.Over() {
				n.log.Info("node is registered")
			}
			if !registered && n.ctx.Err() == nil && unregistered.Again() {
				n.log.Warn("node is not registered yet", "err", err)
			}
		}
		if registered {
			u := n.usage()
			if !equalUsage(u, last) || time.Since(at) >= heartbeat {
				if err := c.ReportUsage(n.ctx, n.cfg.ID, u); err == nil {
					last, at = u, time.Now()
					if unreported.Over() {
						n.log.Info("usage is reported again")
					}
				} else if n.ctx.Err() == nil && unreported.Again() {
					n.log.Warn("usage is not reported", "err", err)
				}
			}
		}
		select {
		case <-tick.C:
		case <-n.ctx.Done():
			return
		}
	}
}
