package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/clusterapi"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// The files of a member, in cluster/ of the data directory.
const (
	clusterDir = "cluster"
	nodeFile   = "node.pem" // certificate and key of the node
	caFile     = "ca.pem"   // the cluster's authority with its key: controllers only
	joinFile   = "join.key" // of a join that is not finished
	peersFile  = "controllers"
)

// identity is who this node is in its cluster.
type identity struct {
	dir         string
	credentials *pki.Credentials
	// ca is nil where the node is no controller.
	ca *pki.CA
	// founded says that the cluster was made just now, or its making was cut off.
	founded bool
}

func (i *identity) controller() bool { return i.ca != nil }

// pause between attempts to join.
const joinPause = 2 * time.Second

// openIdentity reads the node's certificate. Where there is none the node joins with the token that it was given, for as
// long as that takes, or founds a cluster.
func openIdentity(ctx context.Context, cfg config, log *slog.Logger) (*identity, error) {
	i := &identity{dir: filepath.Join(cfg.dataDir, clusterDir)}
	if err := os.MkdirAll(i.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if i.ca, err = pki.LoadCA(filepath.Join(i.dir, caFile)); err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	i.credentials, err = pki.Load(filepath.Join(i.dir, nodeFile), nil)
	switch {
	case err == nil:
		if self := i.credentials.Self(); self.Name != string(cfg.node) {
			return nil, fmt.Errorf("%s is node %s of its cluster, not %s; give it that --node-id, or another --data-dir", i.dir, self.Name, cfg.node)
		}
		joined, err := i.joined()
		i.founded = i.ca != nil && !joined
		return i, err
	case !errors.Is(err, volume.ErrNotFound):
		return nil, err
	case cfg.cluster.join != "":
		return i, i.join(ctx, cfg, log)
	}
	// A node of another cluster that has lost what it knew of it must not become a cluster of its own.
	switch joined, err := i.joined(); {
	case err != nil:
		return nil, err
	case joined:
		return nil, fmt.Errorf("%s is of a node whose join was cut off, or which lost its certificate: join with --join, or begin a new cluster with another --data-dir", i.dir)
	case len(cfg.cluster.controllers) > 0:
		return nil, fmt.Errorf("--controllers names a cluster, and %s has no certificate of it: join with --join, or leave --controllers out to begin a new cluster", i.dir)
	}
	return i, i.found(cfg, log)
}

// joined tells whether other controllers were known once. Who knew any makes no cluster: there is one.
func (i *identity) joined() (bool, error) {
	_, err := os.Lstat(filepath.Join(i.dir, peersFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return true, err
}

// found makes a cluster of this node. Cut off anywhere, it goes on.
func (i *identity) found(cfg config, log *slog.Logger) error {
	i.founded = true
	if i.ca == nil {
		ca, err := pki.NewCA(pki.NewClusterID(), time.Now())
		if err != nil {
			return err
		}
		if err := pki.SaveCA(filepath.Join(i.dir, caFile), ca); err != nil {
			return err
		}
		i.ca = ca
	}
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	csr, err := key.Request()
	if err != nil {
		return err
	}
	chain, err := i.ca.Issue(csr, pki.Node(cfg.node, pki.RoleController, pki.RoleStorage), 0, time.Now())
	if err != nil {
		return err
	}
	if err := i.save(chain, key); err != nil {
		return err
	}
	log.Info("a new cluster has begun", "cluster", i.ca.Cluster(), "node", cfg.node)
	return i.load()
}

func (i *identity) save(chain []byte, key pki.Key) error {
	return pki.Save(filepath.Join(i.dir, nodeFile), chain, key)
}

func (i *identity) load() (err error) {
	i.credentials, err = pki.Load(filepath.Join(i.dir, nodeFile), nil)
	return err
}

// join asks controllers, one after another and again, until one lets the node in or says that it never will.
func (i *identity) join(ctx context.Context, cfg config, log *slog.Logger) error {
	token, err := jointoken.Parse(cfg.cluster.join)
	if err != nil {
		return fmt.Errorf("--join: %w", err)
	}
	key, err := pki.JoinKey(filepath.Join(i.dir, joinFile))
	if err != nil {
		return err
	}
	csr, err := key.Request()
	if err != nil {
		return err
	}
	hash, err := pki.KeyHash(csr)
	if err != nil {
		return err
	}
	conns, closeAll, err := connectAll(cfg.cluster.controllers, func(address string) (*grpc.ClientConn, error) {
		return clusterapi.Connect(address, pki.JoinClient(token.CA, nil), new(clusterapi.Connections))
	})
	if err != nil {
		return err
	}
	defer closeAll()
	cluster := clusterapi.NewCluster(func() []grpc.ClientConnInterface { return conns })
	ask := clusterapi.Join{
		Claim: jointoken.Claim{Token: token.ID(), Hash: token.Hash(), Node: cfg.node, Key: fmt.Sprintf("%x", hash)}, CSR: csr,
	}
	var silent repeat.Trouble
	for {
		one, cancel := context.WithTimeout(ctx, 10*time.Second)
		answer, err := cluster.Join(one, ask)
		cancel()
		switch {
		case err == nil:
			return i.take(answer, key, cfg, log)
		case !errors.Is(err, volume.ErrUnavailable):
			return fmt.Errorf("the cluster does not let node %s in; make another token with `ballastctl cluster join-token`: %w", cfg.node, err)
		}
		if silent.Again() {
			log.Warn("no controller answers; the node cannot join yet", "controllers", strings.Join(cfg.cluster.controllers, ","), "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(joinPause):
		}
	}
}

// take keeps what a controller gave: the certificate last, for it is what says that the node has joined.
func (i *identity) take(a clusterapi.Joined, key pki.Key, cfg config, log *slog.Logger) error {
	if err := i.setControllers(cfg.cluster.controllers); err != nil {
		return err
	}
	if len(a.CA) > 0 {
		ca, err := pki.ParseCA(a.CA)
		if err != nil {
			return err
		}
		if err := pki.SaveCA(filepath.Join(i.dir, caFile), ca); err != nil {
			return err
		}
		i.ca = ca
	}
	if err := i.save(a.Chain, key); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(i.dir, joinFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log.Info("the node has joined the cluster", "node", cfg.node, "controller", i.controller())
	return i.load()
}

// controllers are the addresses at which other controllers were last known.
func (i *identity) controllers() []string {
	data, err := os.ReadFile(filepath.Join(i.dir, peersFile))
	if err != nil {
		return nil
	}
	return strings.Fields(string(data))
}

// setControllers keeps them for the next start, durably: see joined.
func (i *identity) setControllers(addresses []string) error {
	file := filepath.Join(i.dir, peersFile)
	f, err := os.OpenFile(file+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.Join(addresses, "\n") + "\n")
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(file+".new", file); err != nil {
		return err
	}
	d, err := os.Open(i.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// connectAll prepares connections to addresses.
func connectAll(addresses []string, connect func(string) (*grpc.ClientConn, error)) (ccs []grpc.ClientConnInterface, closeAll func(), err error) {
	var open []*grpc.ClientConn
	closeAll = func() {
		for _, c := range open {
			_ = c.Close() // nothing is lost with it
		}
	}
	for _, a := range addresses {
		c, err := connect(a)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("address %q: %w", a, err)
		}
		open = append(open, c)
		ccs = append(ccs, c)
	}
	return ccs, closeAll, nil
}
