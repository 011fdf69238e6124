package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin"
	"github.com/ballast-csi/ballast/pkg/meta/metaraft"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// clusterAdmin is admin.Cluster. Its parts are late: the gate lets no call through before they are set.
type clusterAdmin struct {
	store     *metaraft.Store // nil where the node is no controller
	ca        *pki.CA
	directory *directory
}

var _ admin.Cluster = (*clusterAdmin)(nil)

func (c *clusterAdmin) controller() error {
	if c.store == nil {
		return fmt.Errorf("this node is no controller of its cluster: %w", volume.ErrUnavailable)
	}
	return nil
}

// Controllers implements admin.Cluster, as those below do.
func (c *clusterAdmin) Controllers(ctx context.Context) ([]admin.Controller, error) {
	if err := c.controller(); err != nil {
		return nil, err
	}
	members, err := c.store.Members(ctx)
	if err != nil {
		return nil, err
	}
	var out []admin.Controller
	for _, m := range members {
		out = append(out, admin.Controller(m))
	}
	return out, nil
}

func (c *clusterAdmin) RemoveController(ctx context.Context, id volume.NodeID) error {
	if err := c.controller(); err != nil {
		return err
	}
	return c.store.Remove(ctx, id)
}

func (c *clusterAdmin) NewToken() (jointoken.Token, error) {
	if err := c.controller(); err != nil {
		return jointoken.Token{}, err
	}
	return jointoken.New(rand.Reader, c.ca.Pin())
}

func (c *clusterAdmin) Issue(csr []byte, id pki.Identity, lifetime time.Duration) ([]byte, error) {
	if err := c.controller(); err != nil {
		return nil, err
	}
	return c.ca.Issue(csr, id, lifetime, time.Now())
}

func (c *clusterAdmin) Elsewhere() []volume.Node {
	if c.store != nil || c.directory == nil {
		return nil
	}
	return c.directory.otherControllers()
}
