package admintest

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Several is a cluster of three nodes, of which one is away: a volume is being brought up, another waits, a third lost all
// that was in sync.
func Several(t interface{ Fatal(...any) }) *Cluster {
	ca, err := pki.NewCA("sample", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	block := volume.Capability{Access: volume.AccessBlock, Mode: volume.SingleNodeWriter}
	replica := func(id string, node int, role volume.ReplicaRole) volume.Replica {
		return volume.Replica{
			ID: volume.ReplicaID("rep-" + id), Node: volume.NodeID(fmt.Sprintf("node-%d", node)), Pool: volume.PoolID(fmt.Sprintf("pool-%d", node)),
			Role: role, PhysicalBytes: 3 << 30,
		}
	}
	three := volume.Parameters{Replicas: 3, MinInSync: 2, DataLocality: volume.LocalityPreferred, BlockSize: 512}
	vol := func(i int, name string, rs ...volume.Replica) volume.Volume {
		v := volume.Volume{
			ID: volume.ID(fmt.Sprintf("vol-%020d", i)), Name: name, Tenant: "shop", State: volume.Ready, Size: 10 << 30, Parameters: three,
			Capabilities: []volume.Capability{block}, Replicas: rs, CreatedAt: Ago(26 * time.Hour),
			Protocol: volume.Protocol{Epoch: 4, ConfigVersion: 9, Lineage: 1},
		}
		for _, r := range rs {
			v.PhysicalBytes += r.PhysicalBytes
		}
		return v
	}
	attached := func(v volume.Volume, node volume.NodeID) volume.Volume {
		v.Attachment = &volume.Attachment{Node: node, Capability: block, Since: Ago(time.Hour), Epoch: 4}
		v.Owner = node
		return v
	}
	node := func(i int, seen time.Duration, used int64, roles ...volume.NodeRole) volume.Node {
		id := volume.NodeID(fmt.Sprintf("node-%d", i))
		return volume.Node{
			ID: id, LastSeen: Ago(seen), Zone: fmt.Sprintf("rack-%d", (i+1)/2), Roles: roles,
			Address: fmt.Sprintf("10.0.0.%d:9820", i), DataAddress: fmt.Sprintf("10.0.0.%d:9822", i),
			Pools: []volume.Pool{{
				ID: volume.PoolID(fmt.Sprintf("pool-%d", i)), Name: "default", Node: id, Kind: volume.PoolDir, Path: "/var/lib/ballast/pools/default",
				Capacity: 100 << 30, Used: used << 30, OverProvision: 10, Provisioned: 30 << 30,
			}},
		}
	}
	lagging := replica("a3", 3, volume.Stale)
	lagging.RemovedAt = 8
	return &Cluster{
		CA: ca,
		Vols: []volume.Volume{
			attached(vol(1, "db", replica("a1", 1, volume.InSync), replica("a2", 2, volume.InSync), lagging), "node-1"),
			attached(vol(2, "queue", replica("b1", 1, volume.InSync), replica("b3", 3, volume.Stale)), "node-1"),
			vol(3, "archive", replica("c2", 2, volume.Stale), replica("c3", 3, volume.InSync)),
			vol(4, "web", replica("d1", 1, volume.InSync), replica("d2", 2, volume.InSync)),
		},
		NodeList: []volume.Node{
			node(1, 2*time.Second, 42, volume.RoleController, volume.RoleStorage), node(2, 4*time.Second, 95, volume.RoleController, volume.RoleStorage),
			node(3, 20*time.Minute, 12, volume.RoleController, volume.RoleStorage), {ID: "node-4", LastSeen: Ago(time.Second), State: volume.NodeDrained,
				Zone: "rack-2", Roles: []volume.NodeRole{volume.RoleStorage}, Address: "10.0.0.4:9820", DataAddress: "10.0.0.4:9822"},
		},
		ControllerList: []admin.Controller{
			{ID: "node-1", Address: "10.0.0.1:9821", Voter: true, Leader: true, Answers: true, Last: 5012},
			{ID: "node-2", Address: "10.0.0.2:9821", Voter: true, Answers: true, Last: 5012},
			{ID: "node-3", Address: "10.0.0.3:9821", Voter: true},
		},
		Reports: map[volume.ID]volume.EngineReport{
			"vol-00000000000000000001": {Phase: "live", Epoch: 4, Resyncs: []volume.Resync{{
				Replica: "rep-a3", Stage: "copying", Done: 3 << 30, Left: 1 << 30, Rate: 64 << 20, Since: Ago(48 * time.Second),
			}}},
			"vol-00000000000000000002": {Phase: "live", Epoch: 4, Waiting: 12},
		},
		Sick: map[volume.ID][]volume.Condition{
			"vol-00000000000000000001": {{Severity: volume.Degraded, Reason: "ReplicaMissing", Message: "1 of 3 replicas are not in sync"}},
			"vol-00000000000000000002": {{Severity: volume.Inaccessible, Reason: "BelowMinInSync", Message: "1 replicas are in sync, minInSync is 2: writes wait until another is, or minInSync is lowered"}},
			"vol-00000000000000000003": {{Severity: volume.Inaccessible, Reason: "NoReplicaReachable", Message: "no replica that was in sync can be reached: bring one of their nodes back"}},
		},
		Flushed: map[volume.ReplicaID]volume.Timestamp{"rep-a1": Ago(3 * time.Second), "rep-a2": Ago(4 * time.Second), "rep-b1": Ago(time.Second), "rep-d2": Ago(70 * time.Hour)},
		CandidateList: map[volume.ID][]control.Candidate{"vol-00000000000000000003": {
			{Replica: replica("c2", 2, volume.Stale), Report: &control.ReplicaReport{
				Present: true, Role: volume.Stale, Lineage: 1, Epoch: 4, ConfigVersion: 8, LastFlush: Ago(25 * time.Minute), Size: 10 << 30,
			}},
			{Replica: replica("c3", 3, volume.InSync), Against: "it cannot be asked: node node-3 does not answer"},
		}},
		TokenList: []jointoken.Record{{
			ID: "0123456789abcdef", Hash: "x", Roles: []string{"controller", "storage"}, Uses: 2, CreatedAt: Ago(time.Hour), ExpiresAt: Ago(-23 * time.Hour),
			CreatedBy: "admin uid=0 pid=1", Redeemed: []jointoken.Redemption{{Node: "node-4"}},
		}},
		GroupList: []control.Group{{
			Group: volume.Group{ID: "group-00000000000000000001", Name: "nightly", State: volume.Ready, CreatedAt: Ago(9 * time.Hour)},
			Members: []volume.Snapshot{
				{ID: "snap-00000000000000000001", Name: "nightly-1", Volume: "vol-00000000000000000001", State: volume.Ready, Size: 10 << 30, PhysicalBytes: 1 << 30, CreatedAt: Ago(9 * time.Hour)},
				{ID: "snap-00000000000000000002", Name: "nightly-2", Volume: "vol-00000000000000000002", State: volume.Ready, Size: 10 << 30, PhysicalBytes: 2 << 30, CreatedAt: Ago(9 * time.Hour)},
			},
		}},
	}
}

// Controllers implements admin.Cluster.
func (c *Cluster) Controllers(context.Context) ([]admin.Controller, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.ControllerList), nil
}

// RemoveController implements admin.Cluster.
func (c *Cluster) RemoveController(_ context.Context, id volume.NodeID) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	n := len(c.ControllerList)
	if n == 1 && c.ControllerList[0].ID == id {
		return fmt.Errorf("controller %s is the last one: %w", id, volume.ErrInUse)
	}
	c.ControllerList = slices.DeleteFunc(c.ControllerList, func(x admin.Controller) bool { return x.ID == id })
	if len(c.ControllerList) == n {
		return fmt.Errorf("controller %s is not a member: %w", id, volume.ErrNotFound)
	}
	return nil
}

// NewToken implements admin.Cluster.
func (c *Cluster) NewToken() (jointoken.Token, error) { return jointoken.New(rand.Reader, c.CA.Pin()) }

// Issue implements admin.Cluster.
func (c *Cluster) Issue(csr []byte, id pki.Identity, lifetime time.Duration) ([]byte, error) {
	return c.CA.Issue(csr, id, lifetime, time.Now())
}

// Elsewhere implements admin.Cluster.
func (c *Cluster) Elsewhere() []volume.Node {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.OtherControllers)
}

// engine is nil where none runs. Mu is held.
func (c *Cluster) engine(id volume.ID) *volume.EngineReport {
	r, ok := c.Reports[id]
	if !ok {
		return nil
	}
	r.Resyncs = slices.Clone(r.Resyncs)
	return &r
}

// DrainBlockers implements admin.Control, by the rule for volumes that are attached nowhere.
func (c *Cluster) DrainBlockers(_ context.Context, id volume.NodeID) ([]placement.Blocker, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return c.blockers(id), nil
}

func (c *Cluster) blockers(id volume.NodeID) []placement.Blocker {
	v := placement.View{Nodes: c.NodeList, Down: map[volume.NodeID]string{}}
	for _, n := range c.NodeList {
		if n.LastSeen < Ago(2*time.Minute) {
			v.Down[n.ID] = "silent"
		}
	}
	return placement.Blockers(v, c.Vols, c.Snaps, id)
}

func (c *Cluster) setNode(ctx context.Context, what string, id volume.NodeID, state volume.NodeState) (err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() { c.record(ctx, what, string(id), "", err) }()
	if bs := c.blockers(id); state == volume.NodeDrained && len(bs) > 0 {
		return fmt.Errorf("node %s must stay up (volume %s: %s): %w", id, bs[0].Volume, bs[0].Reason, volume.ErrInUse)
	}
	for i := range c.NodeList {
		if c.NodeList[i].ID == id {
			c.NodeList[i].State = state
		}
	}
	return nil
}

// DrainNode implements admin.Control.
func (c *Cluster) DrainNode(ctx context.Context, id volume.NodeID) error {
	return c.setNode(ctx, "node.drain", id, volume.NodeDrained)
}

// EmptyNode implements admin.Control.
func (c *Cluster) EmptyNode(ctx context.Context, id volume.NodeID) error {
	return c.setNode(ctx, "node.empty", id, volume.NodeEmptying)
}

// UndrainNode implements admin.Control.
func (c *Cluster) UndrainNode(ctx context.Context, id volume.NodeID) error {
	return c.setNode(ctx, "node.undrain", id, volume.NodeActive)
}

// RemoveNode implements admin.Control.
func (c *Cluster) RemoveNode(ctx context.Context, id volume.NodeID) (err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() { c.record(ctx, "node.remove", string(id), "", err) }()
	for _, v := range c.Vols {
		if slices.ContainsFunc(v.Replicas, func(r volume.Replica) bool { return r.Node == id }) {
			return fmt.Errorf("node %s has replicas; empty it first: %w", id, volume.ErrInUse)
		}
	}
	c.NodeList = slices.DeleteFunc(c.NodeList, func(n volume.Node) bool { return n.ID == id })
	if !slices.Contains(c.Removed, id) {
		c.Removed = append(c.Removed, id)
	}
	return nil
}

// RemovedNodes implements admin.Control.
func (c *Cluster) RemovedNodes(context.Context) ([]volume.NodeID, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.Removed), nil
}

// Candidates implements admin.Control.
func (c *Cluster) Candidates(_ context.Context, id volume.ID) ([]control.Candidate, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.CandidateList[id]), nil
}

// Salvage implements admin.Control.
func (c *Cluster) Salvage(ctx context.Context, id volume.ID, r volume.ReplicaID, force bool) (_ volume.Volume, err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() {
		c.record(ctx, "volume.salvage", string(id), fmt.Sprintf("replica %s, force %t", r, force), err)
	}()
	v, err := c.volume(id)
	if err != nil {
		return volume.Volume{}, err
	}
	if v.Attachment != nil {
		return volume.Volume{}, fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", id, v.Attachment.Node, volume.ErrInUse)
	}
	found := false
	rs := slices.Clone(v.Replicas)
	for i := range rs {
		rs[i].Role = volume.Stale
		if rs[i].ID == r {
			rs[i].Role, found = volume.InSync, true
		}
	}
	if !found {
		return volume.Volume{}, fmt.Errorf("volume %s has no replica %q: %w", id, r, volume.ErrNotFound)
	}
	v.Replicas = rs
	v.Lineage++
	return *v, nil
}

// CreateGroup implements admin.Control.
func (c *Cluster) CreateGroup(ctx context.Context, r control.CreateGroup) (control.Group, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	g := control.Group{Group: volume.Group{ID: volume.GroupID(fmt.Sprintf("group-%020d", len(c.GroupList)+1)), Name: r.Name, State: volume.Ready, CreatedAt: Ago(0)}}
	for i, id := range r.Volumes {
		g.Members = append(g.Members, volume.Snapshot{ID: volume.SnapshotID(fmt.Sprintf("snap-%020d", 100+i)), Volume: id, State: volume.Ready, CreatedAt: Ago(0)})
	}
	c.GroupList = append(c.GroupList, g)
	c.record(ctx, "group.create", r.Name, "", nil)
	return g, nil
}

// DeleteGroup implements admin.Control.
func (c *Cluster) DeleteGroup(ctx context.Context, id volume.GroupID) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.GroupList = slices.DeleteFunc(c.GroupList, func(g control.Group) bool { return g.ID == id })
	c.record(ctx, "group.delete", string(id), "", nil)
	return nil
}

// Groups implements admin.Control.
func (c *Cluster) Groups(context.Context) ([]control.Group, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.GroupList), nil
}

// CreateJoinToken implements admin.Control.
func (c *Cluster) CreateJoinToken(ctx context.Context, r jointoken.Record) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.TokenList = append(c.TokenList, r)
	c.record(ctx, "token.create", r.ID, "", nil)
	return nil
}

// RevokeJoinToken implements admin.Control.
func (c *Cluster) RevokeJoinToken(ctx context.Context, id string) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.TokenList = slices.DeleteFunc(c.TokenList, func(r jointoken.Record) bool { return r.ID == id })
	c.record(ctx, "token.revoke", id, "", nil)
	return nil
}

// JoinTokens implements admin.Control.
func (c *Cluster) JoinTokens(context.Context) ([]jointoken.Record, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.TokenList), nil
}
