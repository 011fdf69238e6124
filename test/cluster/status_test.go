package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/ballast-csi/ballast/test/netlab"
)

// ctl runs ballastctl on a node and reads what it says.
func (w *world) ctl(ctx context.Context, node int, into any, args ...string) error {
	out, err := w.Nodes()[node].Ctl(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("ballastctl %v: %w: %s", args, err, out)
	}
	return nil
}

// clusterStatus is what ballastctl says of the controllers.
type clusterStatus struct {
	Controllers []struct {
		Node                   string
		Voter, Leader, Answers bool
	}
}

func (w *world) status(ctx context.Context, node int) (s clusterStatus, err error) {
	err = w.ctl(ctx, node, &s, "cluster", "status")
	return s, err
}

// leader is the node that leads the controllers.
func (w *world) leader(ctx context.Context) (int, error) {
	s, err := w.status(ctx, 0)
	if err != nil {
		return 0, err
	}
	for _, c := range s.Controllers {
		if c.Leader {
			return slices.IndexFunc(w.lab.Nodes(), func(n netlab.Node) bool { return n.Name == c.Node }), nil
		}
	}
	return 0, errors.New("nobody leads the controllers")
}

// voters is an error unless just these controllers have a vote, answer, and one of them leads.
func (w *world) voters(ctx context.Context, node int, want ...string) error {
	s, err := w.status(ctx, node)
	if err != nil {
		return err
	}
	var have []string
	leads := false
	for _, c := range s.Controllers {
		if !c.Voter || !c.Answers {
			return fmt.Errorf("controller %s: %+v", c.Node, c)
		}
		have = append(have, c.Node)
		leads = leads || c.Leader
	}
	slices.Sort(have)
	if !slices.Equal(have, want) || !leads {
		return fmt.Errorf("controllers %v (one leads: %v), want %v", have, leads, want)
	}
	return nil
}
