package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	kmount "k8s.io/mount-utils"

	"github.com/ballast-csi/ballast/pkg/agent"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/frontend/fuseloop"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/metrics"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/reconcile"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// The late parts are what services are given before it is there: the sockets are open from the beginning. The gate lets
// no call through before they are set, and its atomic flag orders the two.
type (
	lateCluster struct{ *control.Service }
	lateNode    struct{ *agent.Node }
	lateAdmin   struct {
		*lateCluster
		gate *gate
	}
)

// Ready is answered while the gate is still closed, and where it never opens for the admin API.
func (l lateAdmin) Ready(ctx context.Context) error {
	if l.gate.nodeOnly.Load() {
		return l.gate.closed()
	}
	return l.gate.Ready(ctx)
}

// closers are closed in reverse order.
type closers []func() error

func (c *closers) add(fn func() error) { *c = append(*c, fn) }

func (c closers) close() error {
	var errs []error
	for i := len(c) - 1; i >= 0; i-- {
		errs = append(errs, c[i]())
	}
	return errors.Join(errs...)
}

// open opens what is kept on disk, puts the parts together and opens the gate.
func (d *daemon) open(ctx context.Context) (parts closers, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, parts.close())
			parts = nil
		}
	}()
	if d.cfg.cluster != nil {
		return parts, d.openMember(ctx, &parts)
	}
	store, err := meta.Open(filepath.Join(d.cfg.dataDir, stateDir), meta.Options{Logger: d.log})
	if err != nil {
		return parts, err
	}
	parts.add(store.Close)
	node, err := d.openNode(ctx, agent.Config{})
	if err != nil {
		return parts, err
	}
	parts.add(node.Close)
	if err := d.metrics.WatchEngines(node.Engines); err != nil {
		return parts, err
	}
	service := control.New(store, node, control.Options{Logger: d.log, Audit: d.trail})
	node.Start(service)
	loop := reconcile.Start(service, reconcile.Options{Logger: d.log})
	parts.add(loop.Close)
	return parts, d.serveControl(node, service)
}

// stateDir holds the state machine in the data directory.
const stateDir = "meta"

// serveControl opens the gate of a controller.
func (d *daemon) serveControl(node *agent.Node, service *control.Service) error {
	if err := d.metrics.Watch(func(ctx context.Context) (metrics.State, error) { return look(ctx, service) }); err != nil {
		return err
	}
	d.cluster.Service, d.node.Node = service, node
	d.gate.open(func(ctx context.Context) error {
		if err := node.Ready(ctx); err != nil {
			return err
		}
		return service.Ready(ctx)
	})
	return nil
}

// openNode opens the pools, at once since each of them reads its map, and what makes devices and mounts of them.
// c has what is particular to a cluster.
func (d *daemon) openNode(ctx context.Context, c agent.Config) (*agent.Node, error) {
	d.gate.set("opening its pools")
	pools := make([]agent.Pool, len(d.cfg.pools))
	closePools := func() (err error) {
		for _, p := range pools {
			if p != nil {
				err = errors.Join(err, p.Close())
			}
		}
		return err
	}
	var group errgroup.Group
	for i, c := range d.cfg.pools {
		group.Go(func() error {
			p, err := extentstore.Open(ctx, c.path, extentstore.Options{
				Name: c.name, Kind: c.kind(), Device: c.device, Wipe: c.wipe,
				Capacity: c.capacity, OverProvision: c.overProvision, Reserve: c.reserve, Logger: d.log,
			})
			if err != nil {
				return fmt.Errorf("pool %s: %w", c.name, err)
			}
			pools[i] = measuredPool{p, d.metrics}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, errors.Join(err, closePools())
	}
	d.gate.set("clearing away what an earlier process left")
	front, err := fuseloop.New(ctx, fuseloop.Options{RunDir: d.cfg.runDir, Logger: d.log})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("devices: %w", err), closePools())
	}
	c.ID, c.DataDir, c.RunDir, c.Logger = d.cfg.node, filepath.Join(d.cfg.dataDir, "node"), d.cfg.runDir, d.log
	c.Pools, c.Frontend, c.Mounter = pools, front, mount.New(kmount.NewWithoutSystemd(""), d.log)
	// The node closes what it is given, also where it cannot be opened.
	return agent.Open(c)
}

// look reads what the metrics show.
func look(ctx context.Context, c *control.Service) (metrics.State, error) {
	s := metrics.State{Conditions: map[volume.ID][]volume.Condition{}}
	if err := c.Ready(ctx); err != nil {
		return s, err
	}
	all := control.Page{All: true}
	var err error
	if s.Volumes, _, err = c.Volumes(ctx, all); err != nil {
		return s, err
	}
	if s.Snapshots, _, err = c.Snapshots(ctx, control.SnapshotFilter{}, all); err != nil {
		return s, err
	}
	unhealthy, _, err := c.Unhealthy(ctx, control.Page{})
	if err != nil {
		return s, err
	}
	for _, h := range unhealthy {
		s.Conditions[h.Volume] = h.Conditions
	}
	if s.Nodes, err = c.Nodes(ctx); err != nil {
		return s, err
	}
	s.Quotas, err = c.Quotas(ctx)
	return s, err
}
