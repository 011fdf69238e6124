package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/cluster/history"
	"github.com/ballast-csi/ballast/test/harness"
)

const (
	// backWithin bounds how long I/O may rest once a fault is over. The design's figure is 10 s; the machine may be busy.
	backWithin = 45 * time.Second
	// settledWithin bounds how long a volume may take until all replicas are in sync.
	settledWithin = 2 * time.Minute
)

// served is a raw volume with three replicas whose every block operation is told to a history.
type served struct {
	w     *world
	claim *harness.Claim
	owner int
	use   *client

	h          *history.History
	last       atomic.Uint64
	clients    uint64 // how many there were, from a random number on
	operations int    // of histories that were checked
}

// serve makes a volume, attaches it to a node, and begins to use it.
func (w *world) serve(name string, owner int) (*served, error) {
	s := &served{w: w, owner: owner, h: history.New(blocks), clients: w.rnd.Uint64(),
		claim: &harness.Claim{Name: name, Size: 64 * mib, Parameters: map[string]string{"replicas": "3"}}}
	if err := w.at(owner).Up(w.t.Context(), s.claim); err != nil {
		return nil, err
	}
	return s, s.begin()
}

func (s *served) String() string {
	return fmt.Sprintf("%s (on %s)", s.claim.Name, s.w.Nodes()[s.owner].NodeID())
}

// begin uses the volume on its owner.
func (s *served) begin() (err error) {
	s.clients++
	s.use, err = use(s.w.at(s.owner).TargetPath(s.claim), s.h, &s.last, s.clients)
	return err
}

// working waits until the client is answered again, and returns for how long it was not.
func (s *served) working() (time.Duration, error) {
	begin := time.Now()
	for s.use.answered.Load() < begin.UnixNano() {
		if err := s.use.trouble(); err != nil {
			return 0, fmt.Errorf("%s: %w", s, err)
		}
		if time.Since(begin) > backWithin {
			return 0, fmt.Errorf("%s: no I/O for %s; why: %s", s, time.Since(begin), s.why())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := s.use.trouble(); err != nil {
		return 0, fmt.Errorf("%s: %w", s, err)
	}
	return time.Since(begin), nil
}

func (s *served) why() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := s.w.Nodes()[s.owner].Ctl(ctx, "volume", "why", s.claim.ID())
	return fmt.Sprintf("%s %v", out, err)
}

// healthy is an error where something is wrong with the volume.
func (s *served) healthy() error {
	ctx, cancel := context.WithTimeout(s.w.t.Context(), 5*time.Second)
	defer cancel()
	g, err := s.w.Nodes()[s.owner].CSI().ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: s.claim.ID()})
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range g.GetVolumeHealth().GetHealthStatuses() {
		errs = append(errs, errors.New(h.String()))
	}
	return errors.Join(errs...)
}

// settle waits until every replica is in sync and nothing is wrong with the volume.
func (s *served) settle() error {
	end := time.Now().Add(settledWithin)
	for {
		err := s.healthy()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not recover: %w; why: %s", s, err, s.why())
		}
		if err := s.use.trouble(); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// spared waits until a replica that is in sync is on none of the nodes: they may then be lost without a loss.
func (s *served) spared(nodes ...int) error {
	for end := time.Now().Add(settledWithin); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(s.w.t.Context(), 10*time.Second)
		var v struct{ Replicas []struct{ Node, Role string } }
		err := s.w.ctl(ctx, s.owner, &v, "volume", "get", s.claim.ID())
		cancel()
		for _, r := range v.Replicas {
			lost := slices.ContainsFunc(nodes, func(i int) bool { return s.w.Nodes()[i].NodeID() == r.Node })
			if r.Role == "in-sync" && !lost {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s has no other replica in sync: %+v %w; why: %s", s, v.Replicas, err, s.why())
		}
	}
}

// bring attaches the volume to a node and makes it appear there.
func (s *served) bring(to int) error {
	s.owner = to
	o := s.w.at(to)
	for _, step := range []func(context.Context, *harness.Claim) error{o.Attach, o.Stage, o.Publish} {
		if err := step(s.w.t.Context(), s.claim); err != nil {
			return err
		}
	}
	return nil
}

// take gives the volume to another node, which the old one cannot be asked about, and uses it there.
func (s *served) take(to int) error {
	gone := *s.w.at(to)
	gone.NodeID = s.w.Nodes()[s.owner].NodeID()
	if err := gone.Detach(s.w.t.Context(), s.claim); err != nil {
		return err
	}
	if err := s.bring(to); err != nil {
		return err
	}
	s.h.Crash()
	return s.begin()
}

// clear takes off a node what its workload had of the volume.
func (s *served) clear(i int) error {
	o := s.w.at(i)
	if err := o.Unpublish(s.w.t.Context(), s.claim); err != nil {
		return err
	}
	return o.Unstage(s.w.t.Context(), s.claim)
}

// again brings the volume back on the node that it was on, after that has crashed.
func (s *served) again() error {
	if err := s.clear(s.owner); err != nil {
		return err
	}
	if err := s.bring(s.owner); err != nil {
		return err
	}
	s.h.Crash()
	return s.begin()
}

// move gives the volume to another node the proper way.
func (s *served) move(to int) error {
	s.use.end()
	if err := s.use.trouble(); err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	if err := s.w.at(s.owner).Down(s.w.t.Context(), s.claim); err != nil {
		return err
	}
	if err := s.bring(to); err != nil {
		return err
	}
	return s.begin()
}

// lose tells the client that its device dies.
func (s *served) lose() { s.use.dying.Store(true) }

// lost waits for a client whose device has died.
func (s *served) lost(c *client) error {
	c.end()
	if err := c.trouble(); err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	return nil
}

// check looks at all that was seen so far, and begins a history of what comes.
func (s *served) check() error {
	values, err := s.use.section()
	if err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	s.use.end()
	if err := s.h.Check(); err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	s.operations += s.h.Operations()
	s.h = history.From(values)
	return s.begin()
}

// end takes the volume down and deletes it.
func (s *served) end() error {
	if err := s.check(); err != nil {
		return err
	}
	s.use.end()
	o := s.w.at(s.owner)
	return errors.Join(o.Down(s.w.t.Context(), s.claim), o.Delete(s.w.t.Context(), s.claim))
}
