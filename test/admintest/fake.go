// Package admintest has an admin API over an in-memory cluster, for the tests of what speaks it.
package admintest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Now is the fake's clock.
var Now = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// Ago is a timestamp before Now.
func Ago(d time.Duration) volume.Timestamp { return volume.Timestamp(Now.Add(-d).UnixNano()) }

// Cluster is an admin.Control, and with a CA an admin.Cluster, in memory. It keeps the rules that callers
// rely on, and no more. Its fields are changed under Mu.
type Cluster struct {
	Mu        sync.Mutex
	Vols      []volume.Volume
	Snaps     []volume.Snapshot
	NodeList  []volume.Node
	Removed   []volume.NodeID
	QuotaList []volume.Quota
	StrayList []control.Stray
	Sick      map[volume.ID][]volume.Condition
	Flushed   map[volume.ReplicaID]volume.Timestamp
	NotReady  error
	// Refuse is what lists of volumes are refused with.
	Refuse error

	// CA is nil where the node is alone.
	CA             *pki.CA
	ControllerList []admin.Controller
	// OtherControllers are set where this node is none.
	OtherControllers []volume.Node
	Reports          map[volume.ID]volume.EngineReport
	CandidateList    map[volume.ID][]control.Candidate
	TokenList        []jointoken.Record
	GroupList        []control.Group
	// Trail gets changes, where it is set.
	Trail *admin.Trail
}

// Sample is a cluster with one of everything.
func Sample() *Cluster {
	mountable := volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, FSType: "xfs"}
	replica := func(i string) []volume.Replica {
		return []volume.Replica{{ID: volume.ReplicaID("rep-" + i), Node: "node-1", Pool: "pool-1", Role: volume.InSync}}
	}
	return &Cluster{
		Vols: []volume.Volume{
			{
				ID: "vol-00000000000000000001", Name: "orders", Tenant: "shop", State: volume.Ready, Size: 10 << 30, PhysicalBytes: 3 << 30,
				Parameters:   volume.Parameters{Replicas: 1, MinInSync: 1, DataLocality: volume.LocalityPreferred, FSType: "xfs", BlockSize: 512},
				QoS:          volume.QoS{IOPS: 2000, Bandwidth: 100 << 20},
				Capabilities: []volume.Capability{mountable}, Replicas: replica("1"), Protocol: volume.Protocol{Epoch: 3},
				Attachment: &volume.Attachment{Node: "node-1", Capability: mountable, Since: Ago(time.Hour)},
				Filesystem: volume.Filesystem{Phase: volume.Formatted, Type: "xfs"}, CreatedAt: Ago(26 * time.Hour),
			},
			{
				ID: "vol-00000000000000000002", Name: "orders-restored", Tenant: "shop", State: volume.Ready, Size: 20 << 30, Target: 40 << 30,
				Parameters: volume.Parameters{Replicas: 1, MinInSync: 1, BlockSize: 4096}, Source: &volume.Source{Snapshot: "snap-00000000000000000001"},
				Capabilities: []volume.Capability{mountable}, Replicas: replica("2"), CreatedAt: Ago(5 * time.Minute),
			},
			{
				ID: "vol-00000000000000000003", Name: "scratch", Tenant: "lab", State: volume.Deleting, Size: 1 << 30,
				Parameters: volume.Parameters{Replicas: 1, MinInSync: 1, BlockSize: 512}, Replicas: replica("3"), CreatedAt: Ago(30 * time.Second),
			},
		},
		Snaps: []volume.Snapshot{
			{ID: "snap-00000000000000000001", Name: "monday", Volume: "vol-00000000000000000001", Tenant: "shop", State: volume.Ready, Size: 10 << 30, PhysicalBytes: 2 << 30, CreatedAt: Ago(50 * time.Hour), Holders: replica("1")},
			{ID: "snap-00000000000000000002", Name: "orphan", Volume: "vol-00000000000000000009", Tenant: "shop", State: volume.Ready, Size: 1 << 30, CreatedAt: Ago(20 * time.Minute), Holders: replica("9")},
		},
		NodeList: []volume.Node{
			{ID: "node-1", LastSeen: Ago(3 * time.Second), Pools: []volume.Pool{
				{ID: "pool-1", Name: "default", Node: "node-1", Kind: volume.PoolDir, Path: "/var/lib/ballast/pools/default", Capacity: 100 << 30, Used: 42 << 30, OverProvision: 2, Provisioned: 150 << 30},
				{ID: "pool-2", Name: "fast", Node: "node-1", Kind: volume.PoolDisk, Path: "/mnt/fast", Capacity: 10 << 30, Used: 10 << 30, OverProvision: 1, Provisioned: 10 << 30},
			}},
			{ID: "node-2", LastSeen: Ago(time.Hour)},
		},
		QuotaList: []volume.Quota{
			{Tenant: "lab", Used: volume.Amounts{LogicalBytes: 1 << 30, Volumes: 1}},
			{Tenant: "shop", Limit: volume.Amounts{LogicalBytes: 30 << 30, Volumes: 20}, Used: volume.Amounts{LogicalBytes: 30 << 30, PhysicalBytes: 5 << 30, Volumes: 2, Snapshots: 2}},
		},
		Sick: map[volume.ID][]volume.Condition{"vol-00000000000000000001": {
			{Severity: volume.Degraded, Reason: "PoolFull", Message: "the pool has no space left, writes to new places wait: delete volumes or snapshots, or enlarge the pool"},
		}},
	}
}

// Serve serves the cluster on a socket until the test ends, and returns the socket.
func Serve(t testing.TB, c *Cluster) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, c, l, (*admin.Service).Server)
	return socket
}

// Withdrawn is the name of an admin whom ServeTLS does not let in.
const Withdrawn = "withdrawn"

func notWithdrawn(p pki.Peer) error {
	if p.Name == Withdrawn {
		return pki.ErrRefused
	}
	return nil
}

// ServeTLS serves it, which has a CA, over mTLS and returns the address.
func ServeTLS(t testing.TB, c *Cluster) string {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := c.CA.Issue(csr, pki.Node("node-1", pki.RoleController, pki.RoleStorage), 0, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	creds, err := pki.NewCredentials(chain, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, c, l, func(s *admin.Service) *grpc.Server {
		return s.TLSServer(creds.Server(pki.All(admin.IsAdmin, notWithdrawn)))
	})
	return l.Addr().String()
}

func serve(t testing.TB, c *Cluster, l net.Listener, server func(*admin.Service) *grpc.Server) {
	t.Helper()
	if c.Trail == nil {
		log, err := audit.Open(filepath.Join(t.TempDir(), "audit.log"), audit.Options{Now: func() time.Time { return Now }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := log.Close(); err != nil {
				t.Error(err)
			}
		})
		c.Trail = admin.NewTrail(log)
	}
	o := admin.Options{
		Control: c, Exporter: c, Audit: c.Trail, Node: "node-1", Version: "v1.2.3", Poll: 10 * time.Millisecond, Now: func() time.Time { return Now },
	}
	if c.CA != nil {
		o.Cluster = c
	}
	s := admin.New(o)
	g := server(s)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		g.GracefulStop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
}

func (c *Cluster) record(ctx context.Context, action, object, detail string, err error) {
	if c.Trail != nil {
		c.Trail.Record(ctx, action, object, detail, err)
	}
}

func (c *Cluster) volume(id volume.ID) (*volume.Volume, error) {
	for i := range c.Vols {
		if c.Vols[i].ID == id {
			return &c.Vols[i], nil
		}
	}
	return nil, fmt.Errorf("volume %s does not exist: %w", id, volume.ErrNotFound)
}

// ExportVolume implements admin.Exporter: nobody listens at the URI.
func (c *Cluster) ExportVolume(ctx context.Context, id volume.ID, _ bool, started func(string) error) error {
	if err := started("nbd+unix:///?socket=/run/ballast/exports/" + string(id) + ".sock"); err != nil {
		return err
	}
	for ctx.Err() == nil {
		c.Mu.Lock()
		_, err := c.volume(id)
		c.Mu.Unlock()
		if err != nil {
			return fmt.Errorf("the export of volume %s has ended: the volume was deleted: %w", id, volume.ErrInUse)
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// ExportSnapshot implements admin.Exporter.
func (c *Cluster) ExportSnapshot(ctx context.Context, s volume.Snapshot, started func(string) error) error {
	if err := started("nbd+unix:///?socket=/run/ballast/exports/" + string(s.ID) + ".sock"); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// CreateVolume implements admin.Control.
func (c *Cluster) CreateVolume(ctx context.Context, r control.CreateVolume) (_ volume.Volume, err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() { c.record(ctx, "volume.create", r.Name, "", err) }()
	for _, v := range c.Vols {
		if v.Name == r.Name {
			if r.RequiredBytes > v.Size {
				return volume.Volume{}, fmt.Errorf("volume %s exists with %d bytes: %w", r.Name, v.Size, volume.ErrExists)
			}
			return v, nil
		}
	}
	if r.RequiredBytes > 1<<40 {
		return volume.Volume{}, fmt.Errorf("tenant %q may have 30 GiB, has 30 GiB and asks for %d bytes: %w", r.Tenant, r.RequiredBytes, volume.ErrQuota)
	}
	v := volume.Volume{
		ID: volume.ID(fmt.Sprintf("vol-%020d", len(c.Vols)+1)), Name: r.Name, Tenant: r.Tenant, State: volume.Ready, Size: max(r.RequiredBytes, volume.MinSize),
		Parameters: r.Parameters, QoS: r.QoS, Capabilities: r.Capabilities, Source: r.Source, CreatedAt: Ago(0),
	}
	c.Vols = append(c.Vols, v)
	return v, nil
}

// DeleteVolume implements admin.Control.
func (c *Cluster) DeleteVolume(ctx context.Context, id volume.ID) (err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() { c.record(ctx, "volume.delete", string(id), "", err) }()
	v, err := c.volume(id)
	if err != nil {
		return nil
	}
	if v.Attachment != nil {
		return fmt.Errorf("volume %s is attached to node %s; detach it there first: %w", id, v.Attachment.Node, volume.ErrInUse)
	}
	c.Vols = slices.DeleteFunc(c.Vols, func(v volume.Volume) bool { return v.ID == id })
	return nil
}

// Volume implements admin.Control.
func (c *Cluster) Volume(_ context.Context, id volume.ID) (volume.Volume, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	if err != nil {
		return volume.Volume{}, err
	}
	return *v, nil
}

// page cuts a list into pages of p.Max; a token is the index of the next entry.
func page[T any](all []T, p control.Page) ([]T, string, error) {
	at := 0
	if p.Token != "" {
		if _, err := fmt.Sscanf(p.Token, "at-%d", &at); err != nil || at > len(all) {
			return nil, "", fmt.Errorf("page token %q: %w", p.Token, volume.ErrStale)
		}
	}
	end := len(all)
	if p.Max > 0 {
		end = min(end, at+p.Max)
	}
	next := ""
	if end < len(all) {
		next = fmt.Sprintf("at-%d", end)
	}
	return slices.Clone(all[at:end]), next, nil
}

// Volumes implements admin.Control.
func (c *Cluster) Volumes(_ context.Context, p control.Page) ([]volume.Volume, string, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	if c.Refuse != nil {
		return nil, "", c.Refuse
	}
	return page(c.Vols, p)
}

// Detach implements admin.Control.
func (c *Cluster) Detach(ctx context.Context, id volume.ID, _ volume.NodeID) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	if err == nil {
		v.Attachment = nil
	}
	c.record(ctx, "volume.detach", string(id), "", err)
	return err
}

// ExpandVolume implements admin.Control.
func (c *Cluster) ExpandVolume(ctx context.Context, id volume.ID, required, _ int64) (volume.Volume, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	c.record(ctx, "volume.expand", string(id), "", err)
	if err != nil {
		return volume.Volume{}, err
	}
	v.Size, v.Target = max(v.Size, required), 0
	return *v, nil
}

// ModifyVolume implements admin.Control.
func (c *Cluster) ModifyVolume(ctx context.Context, id volume.ID, q control.Modify) (volume.Volume, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	c.record(ctx, "volume.modify", string(id), "", err)
	if err != nil {
		return volume.Volume{}, err
	}
	if q.IOPS != nil {
		v.QoS.IOPS = *q.IOPS
	}
	if q.Bandwidth != nil {
		v.QoS.Bandwidth = *q.Bandwidth
	}
	if q.Replicas != nil {
		v.Parameters.Replicas = *q.Replicas
	}
	if q.MinInSync != nil {
		v.Parameters.MinInSync = *q.MinInSync
	}
	if q.DataLocality != nil {
		v.Parameters.DataLocality = *q.DataLocality
	}
	return *v, nil
}

// CreateSnapshot implements admin.Control.
func (c *Cluster) CreateSnapshot(ctx context.Context, r control.CreateSnapshot) (volume.Snapshot, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(r.Volume)
	c.record(ctx, "snapshot.create", r.Name, "", err)
	if err != nil {
		return volume.Snapshot{}, err
	}
	s := volume.Snapshot{ID: volume.SnapshotID(fmt.Sprintf("snap-%020d", len(c.Snaps)+1)), Name: r.Name, Volume: v.ID, Tenant: v.Tenant, State: volume.Ready, Size: v.Size, Freeze: r.Freeze, CreatedAt: Ago(0)}
	c.Snaps = append(c.Snaps, s)
	return s, nil
}

// DeleteSnapshot implements admin.Control.
func (c *Cluster) DeleteSnapshot(ctx context.Context, id volume.SnapshotID) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.Snaps = slices.DeleteFunc(c.Snaps, func(s volume.Snapshot) bool { return s.ID == id })
	c.record(ctx, "snapshot.delete", string(id), "", nil)
	return nil
}

// Snapshot implements admin.Control.
func (c *Cluster) Snapshot(_ context.Context, id volume.SnapshotID) (volume.Snapshot, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	for _, s := range c.Snaps {
		if s.ID == id {
			return s, nil
		}
	}
	return volume.Snapshot{}, fmt.Errorf("snapshot %s does not exist: %w", id, volume.ErrNotFound)
}

// Snapshots implements admin.Control.
func (c *Cluster) Snapshots(_ context.Context, f control.SnapshotFilter, p control.Page) ([]volume.Snapshot, string, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	all := slices.DeleteFunc(slices.Clone(c.Snaps), func(s volume.Snapshot) bool { return f.Volume != "" && s.Volume != f.Volume })
	return page(all, p)
}

// Health implements admin.Control.
func (c *Cluster) Health(_ context.Context, id volume.ID) (control.Health, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	if err == nil && v.State == volume.Deleting {
		err = fmt.Errorf("volume %s does not exist: %w", id, volume.ErrNotFound)
	}
	return c.health(id), err
}

// Unhealthy implements admin.Control.
func (c *Cluster) Unhealthy(_ context.Context, p control.Page) ([]control.Health, string, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	var all []control.Health
	for _, v := range c.Vols {
		if len(c.Sick[v.ID]) > 0 {
			all = append(all, c.health(v.ID))
		}
	}
	return page(all, p)
}

// Healths implements admin.Control.
func (c *Cluster) Healths(_ context.Context, p control.Page) ([]control.Health, string, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	var all []control.Health
	for _, v := range c.Vols {
		all = append(all, c.health(v.ID))
	}
	return page(all, p)
}

// health is how a volume is. Mu is held.
func (c *Cluster) health(id volume.ID) control.Health {
	return control.Health{Volume: id, Conditions: c.Sick[id], Engine: c.engine(id), LastFlush: c.Flushed}
}

// Nodes implements admin.Control.
func (c *Cluster) Nodes(context.Context) ([]volume.Node, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.NodeList), nil
}

// ForgetPool implements admin.Control. A pool without capacity is offline.
func (c *Cluster) ForgetPool(ctx context.Context, id volume.PoolID, acceptDataLoss bool) (lost control.Forgotten, err error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	defer func() { c.record(ctx, "pool.forget", string(id), "", err) }()
	on := func(r volume.Replica) bool { return r.Pool == id }
	for _, v := range c.Vols {
		if len(v.Replicas) == 1 && on(v.Replicas[0]) {
			lost.Volumes = append(lost.Volumes, v.ID)
		}
	}
	for n := range c.NodeList {
		pools := c.NodeList[n].Pools
		i := slices.IndexFunc(pools, func(p volume.Pool) bool { return p.ID == id })
		switch {
		case i < 0:
			continue
		case pools[i].Capacity > 0:
			return control.Forgotten{}, fmt.Errorf("pool %s is open: %w", id, volume.ErrInUse)
		case len(lost.Volumes) > 0 && !acceptDataLoss:
			return control.Forgotten{}, fmt.Errorf("pool %s has the only copy of volumes %v: %w", id, lost.Volumes, volume.ErrInUse)
		}
		c.NodeList[n].Pools = slices.Delete(slices.Clone(pools), i, i+1)
		for v := range c.Vols {
			c.Vols[v].Replicas = slices.DeleteFunc(slices.Clone(c.Vols[v].Replicas), on)
		}
		return lost, nil
	}
	return control.Forgotten{}, fmt.Errorf("pool %s is not known: %w", id, volume.ErrNotFound)
}

// Strays implements admin.Control.
func (c *Cluster) Strays(context.Context) ([]control.Stray, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.StrayList), nil
}

// Quotas implements admin.Control.
func (c *Cluster) Quotas(context.Context) ([]volume.Quota, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.QuotaList), nil
}

// SetQuota implements admin.Control.
func (c *Cluster) SetQuota(ctx context.Context, tenant string, limit volume.Amounts) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.record(ctx, "quota.set", tenant, fmt.Sprintf("%+v", limit), nil)
	for i := range c.QuotaList {
		if c.QuotaList[i].Tenant == tenant {
			c.QuotaList[i].Limit = limit
			return nil
		}
	}
	c.QuotaList = append(c.QuotaList, volume.Quota{Tenant: tenant, Limit: limit})
	slices.SortFunc(c.QuotaList, func(a, b volume.Quota) int { return strings.Compare(a.Tenant, b.Tenant) })
	return nil
}

// DeleteQuota implements admin.Control.
func (c *Cluster) DeleteQuota(ctx context.Context, tenant string) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.record(ctx, "quota.delete", tenant, "", nil)
	c.QuotaList = slices.DeleteFunc(c.QuotaList, func(q volume.Quota) bool { return q.Tenant == tenant })
	return nil
}

// Why implements admin.Control.
func (c *Cluster) Why(_ context.Context, id volume.ID) (string, error) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	v, err := c.volume(id)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("Volume %s (%q) is %s, and here is a paragraph that is long enough to be wrapped into lines for people to read.", v.ID, v.Name, v.State), nil
}

// WhySnapshot implements admin.Control.
func (c *Cluster) WhySnapshot(ctx context.Context, id volume.SnapshotID) (string, error) {
	x, err := c.Snapshot(ctx, id)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("Snapshot %s is %s, and here is a paragraph that is long enough to be wrapped into lines for people to read.", x.Name, x.State), nil
}

// Ready implements admin.Control.
func (c *Cluster) Ready(context.Context) error {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return c.NotReady
}
