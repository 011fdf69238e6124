package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin"
	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/clusterapi"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/meta/metaraft"
	"github.com/ballast-csi/ballast/pkg/metrics"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/replicanet"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// openMember puts a node of a cluster together: a controller with its share of the state, or one that asks controllers.
func (d *daemon) openMember(ctx context.Context, parts *closers) error {
	cc := d.cfg.cluster
	d.gate.set("joining its cluster")
	id, err := openIdentity(ctx, d.cfg, d.log)
	if err != nil {
		return err
	}
	credentials := id.credentials
	cluster := credentials.Self().Cluster
	dir := newDirectory(volume.Node{ID: d.cfg.node, Address: cc.advertise.api}, credentials, d.log)
	dir.learned = func(addresses []string) {
		if err := id.setControllers(addresses); err != nil {
			d.log.Warn("the controllers' addresses cannot be kept for the next start", "error", err)
		}
	}
	parts.add(dir.close)
	d.member.directory, d.member.ca = dir, id.ca

	netConfig := replicanet.ClientConfig{Cluster: cluster, Node: d.cfg.node, Insecure: cc.plaintext, Log: d.log}
	if !cc.plaintext {
		netConfig.TLS = func(n volume.NodeID) *tls.Config { return credentials.Client(pki.All(pki.IsNode(n), dir.current)) }
	}
	client, err := replicanet.NewClient(netConfig)
	if err != nil {
		return err
	}
	parts.add(func() error { client.Close(); return nil })
	dir.dropBy(client.Drop)

	roles := []volume.NodeRole{volume.RoleStorage}
	if id.controller() {
		roles = append(roles, volume.RoleController)
	}
	node, err := d.openNode(ctx, agent.Config{
		Address: cc.advertise.api, DataAddress: cc.advertise.data, Zone: cc.zone, Roles: roles,
		Remote: remotePeers{client: client, directory: dir},
	})
	if err != nil {
		return err
	}
	parts.add(node.Close)
	if err := d.metrics.WatchEngines(node.Engines); err != nil {
		return err
	}

	services := clusterapi.Services{Node: member{node, dir}, Admits: dir.admits}
	// known are the controllers to ask until the directory has learned them.
	known := append(id.controllers(), cc.controllers...)
	asked := clusterapi.NewCluster(func() []grpc.ClientConnInterface { return dir.controllers(known) })
	renew := asked.Renew
	if id.controller() {
		service, err := d.openController(id, dir, known, parts)
		if err != nil {
			return err
		}
		services.Controller = admission{Service: service, ca: id.ca}
		renew = func(ctx context.Context, node volume.NodeID, csr []byte) ([]byte, error) {
			return services.Controller.Renew(ctx, node, credentials.Self().Generation, csr)
		}
		node.Start(nearest{own: service, others: asked, led: func() bool {
			leader, _ := d.member.store.Leader()
			return leader != ""
		}})
		if err := d.serveControl(node, service); err != nil {
			return err
		}
	} else {
		dir.members = asked
		node.Start(asked)
		d.node.Node = node
		d.gate.openNode(node.Ready)
	}

	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var tasks sync.WaitGroup
	tasks.Go(func() { dir.run(background) })
	parts.add(func() error {
		stop()
		tasks.Wait()
		return nil
	})
	if err := d.listenForMembers(services, credentials, cluster, node, parts); err != nil {
		return err
	}
	renewer := pki.OpenRenewer(pki.Renewal{
		Credentials: credentials, Save: id.save, Log: d.log,
		Issue: func(ctx context.Context, csr []byte) ([]byte, error) { return renew(ctx, d.cfg.node, csr) },
	})
	parts.add(func() error { renewer.Close(); return nil })
	return nil
}

// openController opens this controller's share of the cluster's state, and what works on it.
func (d *daemon) openController(id *identity, dir *directory, known []string, parts *closers) (*control.Service, error) {
	cc := d.cfg.cluster
	listener, err := net.Listen("tcp", cc.listen.raft)
	if err != nil {
		return nil, fmt.Errorf("controllers' log: %w", err)
	}
	var others []string
	for _, a := range known {
		if e, err := parseEndpoints(a); err == nil {
			others = append(others, e.raft)
		}
	}
	slices.Sort(others)
	onlyControllers := pki.All(pki.HasRole(pki.RoleController), dir.current)
	store, err := metaraft.Open(metaraft.Options{
		ID: d.cfg.node, Dir: filepath.Join(d.cfg.dataDir, "raft"), State: filepath.Join(d.cfg.dataDir, stateDir),
		Listener: listener, Advertise: cc.advertise.raft,
		Server: id.credentials.Server(onlyControllers), Client: id.credentials.Client(onlyControllers),
		Identify: func(s tls.ConnectionState) (volume.NodeID, error) {
			p, err := pki.PeerIn(s)
			return volume.NodeID(p.Name), err
		},
		Bootstrap: id.founded, Join: slices.Compact(others), Logger: d.log,
	})
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	parts.add(store.Close)
	d.member.store = store
	dir.dropBy(func(gone func(pki.Peer) bool) {
		store.Drop(func(s tls.ConnectionState) bool {
			p, err := pki.PeerIn(s)
			return err == nil && gone(p)
		})
	})
	if err := d.metrics.WatchRaft(func() metrics.Raft { return metrics.Raft(store.Stats()) }); err != nil {
		return nil, err
	}
	// This controller's own node is asked as all others are.
	agents := clusterapi.NewAgents(dir)
	service := control.New(store, agents, control.Options{Logger: d.log, Audit: d.trail, Members: agents})
	dir.members = service // before anybody looks for a node
	limits := reconcile.Limits{ReplicaTimeout: d.cfg.replicaTimeout}
	loop := reconcile.Start(service, reconcile.Options{Logger: d.log, Limits: limits, Leads: func() bool {
		_, self := store.Leader()
		return self
	}})
	parts.add(loop.Close)
	return service, nil
}

// member is clusterapi.Node: this node, and whom it speaks to.
type member struct {
	*agent.Node
	directory *directory
}

// Expel implements control.Members.
func (m member) Expel(_ context.Context, node, removed volume.NodeID) error {
	if node != m.ID() || removed == node {
		return fmt.Errorf("node %s is asked to refuse node %s: %w", m.ID(), removed, volume.ErrUnavailable)
	}
	m.directory.expel(removed)
	return nil
}

// listenForMembers serves the other nodes.
func (d *daemon) listenForMembers(s clusterapi.Services, c *pki.Credentials, cluster string, node *agent.Node, parts *closers) error {
	var members pki.Verify = d.member.directory.admits
	serve := func(what, address string, run func(net.Listener) error, stop func()) error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		var task sync.WaitGroup
		task.Go(func() {
			if err := run(l); err != nil {
				d.log.Error(what+" is not served any more", "error", err)
			}
		})
		parts.add(func() error {
			stop()
			task.Wait()
			return nil
		})
		return nil
	}
	tlsConfig := c.Server(members)
	if s.Controller != nil {
		tlsConfig = c.ServerWithJoin(members)
	}
	api := clusterapi.NewServer(s, tlsConfig, &d.member.directory.open)
	if err := serve("the cluster API", d.cfg.cluster.listen.api, api.Serve, api.Stop); err != nil {
		return err
	}
	if s.Controller != nil {
		people := d.admin.TLSServer(c.Server(admin.IsAdmin))
		if err := serve("the admin API", d.cfg.cluster.listen.admin, people.Serve, people.Stop); err != nil {
			return err
		}
	}
	config := replicanet.ServerConfig{Cluster: cluster, Node: d.cfg.node, Insecure: d.cfg.cluster.plaintext, Acceptor: replicas{node}, Log: d.log}
	if !config.Insecure {
		config.TLS = c.Server(pki.All(pki.HasRole(pki.RoleStorage), members))
	}
	data, err := replicanet.NewServer(config)
	if err != nil {
		return err
	}
	d.member.directory.dropBy(data.Drop)
	return serve("the replica protocol", d.cfg.cluster.listen.data, data.Serve, func() { _ = data.Close() })
}
