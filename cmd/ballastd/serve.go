package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/driver"
	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/metrics"
)

// serve runs the daemon until ctx ends or something fails for good.
func serve(ctx context.Context, cfg config, log *slog.Logger) (err error) {
	disk.UseProcessors()
	if os.Getenv("GOGC") == "" {
		// The heap is small and mostly idle: a larger one would be resident for nothing.
		debug.SetGCPercent(50)
	}
	if err := os.MkdirAll(cfg.dataDir, 0o700); err != nil {
		return err
	}
	lock, err := lockDir(cfg.dataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := os.MkdirAll(cfg.runDir, 0o700); err != nil {
		return err
	}

	trail, err := audit.Open(filepath.Join(cfg.dataDir, "audit.log"), audit.Options{Logger: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trail.Close()) }()

	d := &daemon{
		cfg: cfg, log: log, gate: newGate(), metrics: metrics.New(version), locks: keylock.New(keylock.DefaultLinger),
		trail: admin.NewTrail(trail),
	}
	return d.run(ctx)
}

// daemon is what runs.
type daemon struct {
	cfg     config
	log     *slog.Logger
	gate    *gate
	metrics *metrics.Metrics
	locks   *keylock.Locks

	trail *admin.Trail

	cluster lateCluster
	node    lateNode
	member  clusterAdmin
	admin   *admin.Service
	servers []*driver.Server
	grpc    *grpc.Server
	http    *http.Server
}

func (d *daemon) run(ctx context.Context) error {
	listeners, err := d.listen()
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	if err := d.serveAll(group, listeners); err != nil {
		for _, l := range listeners {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	d.log.Info("ballastd is starting", "version", version, "node", d.cfg.node, "data", d.cfg.dataDir)

	start := time.Now()
	parts, err := d.open(ctx)
	switch {
	case err == nil:
		d.log.Info("ballastd serves", "took", time.Since(start).Round(time.Millisecond))
		<-ctx.Done() // a signal, or a server that failed
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		err = nil // stopped while starting
	}
	d.log.Info("ballastd is stopping")
	d.gate.shut()
	err = errors.Join(err, d.stopServers(context.WithoutCancel(ctx)), group.Wait(), d.closeInTime(parts))
	if err == nil {
		d.log.Info("ballastd has stopped")
	}
	return err
}

// listeners by what they serve; those that are not wanted are missing.
type listeners map[string]net.Listener

const (
	listenCSI        = "csi"
	listenController = "controller"
	listenNode       = "node"
	listenAdmin      = "admin"
	listenMetrics    = "metrics"
)

func (d *daemon) listen() (_ listeners, err error) {
	ls := listeners{}
	defer func() {
		if err != nil {
			for _, l := range ls {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for name, path := range map[string]string{
		listenCSI: d.cfg.csi, listenController: d.cfg.controller, listenNode: d.cfg.nodeSocket, listenAdmin: d.cfg.admin,
	} {
		if path == "" {
			continue
		}
		l, err := listenUnix(path)
		if err != nil {
			return nil, fmt.Errorf("%s socket: %w", name, err)
		}
		ls[name] = l
	}
	if d.cfg.metrics != "" {
		l, err := net.Listen("tcp", d.cfg.metrics)
		if err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
		ls[listenMetrics] = l
	}
	return ls, nil
}

// serveAll answers on every socket; what the gate does not admit yet is refused.
func (d *daemon) serveAll(group *errgroup.Group, ls listeners) error {
	identity := driver.NewIdentity(version, d.gate, d.locks)
	controller := driver.Services{
		Identity:         identity,
		Controller:       driver.NewController(&d.cluster, d.locks),
		GroupController:  driver.NewGroupController(&d.cluster, d.locks),
		SnapshotMetadata: driver.NewSnapshotMetadata(&d.cluster),
	}
	node := driver.Services{Identity: identity, Node: driver.NewNode(&d.node, d.locks)}
	all := controller
	all.Node = node.Node

	unary, stream := d.gate.unary(d.metrics.UnaryInterceptor()), d.gate.stream(d.metrics.StreamInterceptor())
	var starts []func() error
	for name, services := range map[string]driver.Services{listenCSI: all, listenController: controller, listenNode: node} {
		l, ok := ls[name]
		if !ok {
			continue
		}
		s, err := driver.NewServer(services, driver.ServerOptions{Logger: d.log, Unary: unary, Stream: stream})
		if err != nil {
			return err
		}
		d.servers = append(d.servers, s)
		starts = append(starts, func() error { return s.Serve(l) })
	}

	options := admin.Options{
		Control: lateAdmin{&d.cluster, d.gate}, Exporter: &d.node, Audit: d.trail, Node: d.cfg.node, Version: version, Unary: unary, Stream: stream,
	}
	if d.cfg.cluster != nil {
		options.Cluster = &d.member
	}
	d.admin = admin.New(options)
	d.grpc = d.admin.Server()
	starts = append(starts, func() error { return d.grpc.Serve(ls[listenAdmin]) })

	if l, ok := ls[listenMetrics]; ok {
		d.http = &http.Server{
			Handler:           d.metrics.Handler(metrics.Health{Alive: d.gate.alive, Ready: d.gate.Ready}),
			ReadHeaderTimeout: 5 * time.Second,
			IdleTimeout:       2 * time.Minute,
			ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
		}
		starts = append(starts, func() error {
			if err := d.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("metrics: %w", err)
			}
			return nil
		})
	}
	for _, start := range starts {
		group.Go(start)
	}
	return nil
}

// closeInTime closes what was opened. What hangs for longer than a stop may take is left: it ends with the process, like
// in a crash.
func (d *daemon) closeInTime(parts closers) error {
	closed := make(chan error, 1)
	go func() { closed <- parts.close() }()
	select {
	case err := <-closed:
		return err
	case <-time.After(d.cfg.stopTimeout):
		return fmt.Errorf("devices and pools are not closed after %s: what was not flushed is lost", d.cfg.stopTimeout)
	}
}

// stopServers refuses new calls and waits for those under way, for as long as a stop may take. Calls that are broken off
// then are made again by whoever made them.
func (d *daemon) stopServers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.stopTimeout)
	defer cancel()
	d.admin.Stop()
	var group errgroup.Group
	for _, s := range d.servers {
		group.Go(func() error {
			if err := s.Stop(ctx); err != nil {
				d.log.Warn("CSI", "error", err)
			}
			return nil
		})
	}
	group.Go(func() error {
		done := make(chan struct{})
		go func() {
			d.grpc.GracefulStop()
			close(done)
		}()
		select {
		case <-done:
		case <-ctx.Done():
			d.grpc.Stop()
			<-done
		}
		return nil
	})
	if d.http != nil {
		group.Go(func() error {
			if d.http.Shutdown(ctx) != nil {
				return d.http.Close()
			}
			return nil
		})
	}
	err := group.Wait()
	if lockErr := d.locks.Close(ctx); lockErr != nil {
		d.log.Warn("operations", "error", lockErr)
	}
	return err
}
