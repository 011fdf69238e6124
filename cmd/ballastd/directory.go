package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/clusterapi"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// refreshEvery is how often the directory asks for the members, refreshSoon the least between two requests.
	refreshEvery = 10 * time.Second
	refreshSoon  = 500 * time.Millisecond
)

// directory knows where the nodes of the cluster are, and keeps connections to them.
type directory struct {
	self        volume.Node // its ID and Address
	credentials *pki.Credentials
	log         *slog.Logger
	// members is asked for the nodes and for those that were removed.
	members members
	// learned is told the addresses of the other controllers when they change.
	learned func(addresses []string)
	// drops end the connections of peers that are not to be spoken to any more.
	drops []func(gone func(pki.Peer) bool)
	// replacing has room for one: somebody showed that a node was replaced, of which the controllers have not told yet.
	replacing chan struct{}

	asking singleflight.Group // who asks while another does gets that one's answer

	mu      sync.Mutex
	nodes   map[volume.NodeID]volume.Node
	asked   time.Time
	gone    map[volume.NodeID]bool   // were members once
	refused map[volume.NodeID]bool   // were removed
	newest  map[volume.NodeID]uint64 // the generation that is admitted, at least
	// expelled are those of refused that a controller told of, numbered by told, so that an older list does not bring them back.
	expelled map[volume.NodeID]uint64
	told     uint64
	conns    map[connTo]*grpc.ClientConn
	open     clusterapi.Connections // of conns, and those that others made
	others   []string               // addresses of other controllers
	closing  bool
}

type connTo struct {
	node    volume.NodeID // "": any controller
	address string
}

// members is control.Service, or the way to one.
type members interface {
	Nodes(ctx context.Context) ([]volume.Node, error)
	RemovedNodes(ctx context.Context) ([]volume.NodeID, error)
	Generations(ctx context.Context) (map[volume.NodeID]uint64, error)
}

func newDirectory(self volume.Node, c *pki.Credentials, log *slog.Logger) *directory {
	d := &directory{
		self: self, credentials: c, log: log, nodes: map[volume.NodeID]volume.Node{}, gone: map[volume.NodeID]bool{},
		expelled: map[volume.NodeID]uint64{}, conns: map[connTo]*grpc.ClientConn{}, replacing: make(chan struct{}, 1),
	}
	d.dropBy(d.open.Drop)
	return d
}

// dropBy adds what ends connections of peers that are not to be spoken to any more: nodes that were removed, or replaced.
func (d *directory) dropBy(drop func(gone func(pki.Peer) bool)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drops = append(d.drops, drop)
}

// run keeps the directory up to date until ctx ends.
func (d *directory) run(ctx context.Context) {
	for {
		one, cancel := context.WithTimeout(ctx, refreshEvery)
		if err := d.refresh(one); err != nil && ctx.Err() == nil {
			d.log.Debug("the members of the cluster cannot be listed", "error", err)
		}
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(refreshEvery):
		case <-d.replacing:
		}
	}
}

func (d *directory) refresh(ctx context.Context) error {
	_, err, _ := d.asking.Do("", func() (any, error) { return nil, d.look(ctx) })
	return err
}

func (d *directory) look(ctx context.Context) error {
	d.mu.Lock()
	told := d.told
	d.mu.Unlock()
	nodes, err := d.members.Nodes(ctx)
	if err != nil {
		return err
	}
	removed, err := d.members.RemovedNodes(ctx)
	if err != nil {
		return err
	}
	// After the list of those removed: who has come back since is in it.
	newest, err := d.members.Generations(ctx)
	if err != nil {
		return err
	}
	var others []string
	replaced := map[volume.NodeID]bool{} // another machine has the name now
	d.mu.Lock()
	d.asked = time.Now()
	for id, g := range newest {
		replaced[id] = d.newest != nil && g > d.newest[id]
	}
	d.newest = newest
	for id := range d.nodes {
		d.gone[id] = true
	}
	clear(d.nodes)
	d.refused = map[volume.NodeID]bool{}
	for _, id := range removed {
		d.refused[id], d.gone[id] = true, true
	}
	for id, at := range d.expelled {
		if at > told {
			d.refused[id], d.gone[id] = true, true
		} else {
			delete(d.expelled, id)
		}
	}
	used := map[connTo]bool{}
	for _, n := range nodes {
		if d.refused[n.ID] {
			continue
		}
		d.nodes[n.ID] = n
		delete(d.gone, n.ID)
		if n.ID != d.self.ID && n.Address != "" && slices.Contains(n.Roles, volume.RoleController) {
			others = append(others, n.Address)
		}
		used[connTo{n.ID, n.Address}] = true
	}
	used[connTo{d.self.ID, d.self.Address}] = true
	slices.Sort(others)
	changed := len(others) > 0 && !slices.Equal(others, d.others)
	if changed {
		d.others = others
	}
	for to, c := range d.conns {
		if to.node != "" && (!used[to] || replaced[to.node]) {
			_ = c.Close() // of a node that has moved, gone, or been replaced
			delete(d.conns, to)
		}
	}
	drops, gone := d.drops, maps.Clone(d.gone)
	d.mu.Unlock()
	if changed {
		d.learned(others)
	}
	// Again with each look: a handshake that was admitted before may have ended just now.
	for _, drop := range drops {
		drop(func(p pki.Peer) bool {
			id := volume.NodeID(p.Name)
			outdated := p.Generation < newest[id]
			if p.Cluster == "" { // nothing is certified where there is no TLS
				outdated = replaced[id]
			}
			return p.Kind == pki.KindNode && (gone[id] || outdated)
		})
	}
	return nil
}

// expel refuses a node that was removed from now on.
func (d *directory) expel(id volume.NodeID) {
	d.mu.Lock()
	d.told++
	d.expelled[id] = d.told
	if d.refused != nil { // else nobody is admitted yet
		d.refused[id] = true
	}
	d.gone[id] = true
	delete(d.nodes, id)
	for to, c := range d.conns {
		if to.node == id {
			_ = c.Close()
			delete(d.conns, to)
		}
	}
	drops := d.drops
	d.mu.Unlock()
	for _, drop := range drops {
		drop(func(p pki.Peer) bool { return p.Kind == pki.KindNode && p.Name == string(id) })
	}
}

// verifyLimit bounds how long a caller waits until it is known who was removed.
const verifyLimit = time.Second

// admits is pki.Verify: it refuses nodes that were removed, and all others too while it is not known which those are. One that
// was removed may have joined again just now.
func (d *directory) admits(p pki.Peer) error {
	id := volume.NodeID(p.Name)
	if p.Kind != pki.KindNode {
		return nil
	}
	if id == d.self.ID {
		return d.current(p)
	}
	look := func() (known, refused bool, age time.Duration) {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.refused != nil, d.refused[id], time.Since(d.asked)
	}
	known, refused, age := look()
	if !known || refused && age > refreshSoon {
		ctx, cancel := context.WithTimeout(context.Background(), verifyLimit)
		defer cancel()
		if err := d.refresh(ctx); err != nil && !known {
			return fmt.Errorf("which nodes were removed is not known yet (%v): %w", err, pki.ErrRefused)
		}
		known, refused, _ = look()
	}
	if !known || refused {
		return fmt.Errorf("%s was removed from the cluster: %w", p, pki.ErrRefused)
	}
	return d.current(p)
}

// current is pki.Verify: it refuses a node whose place another machine has taken by joining under its name, as far as is known.
func (d *directory) current(p pki.Peer) error {
	d.mu.Lock()
	newest, known := d.newest[volume.NodeID(p.Name)], d.newest != nil
	d.mu.Unlock()
	if p.Kind != pki.KindNode {
		return nil
	}
	if known && p.Generation > newest {
		select {
		case d.replacing <- struct{}{}: // whoever had the name before is to be let go of
		default:
		}
	}
	if p.Generation < newest {
		return fmt.Errorf("%s has the certificate of an earlier machine of that name: %w", p, pki.ErrRefused)
	}
	return nil
}

// node returns the record of a node. One that is not known may have come just now: it is asked for, not too often.
func (d *directory) node(ctx context.Context, id volume.NodeID) (volume.Node, error) {
	if id == d.self.ID {
		return d.self, nil
	}
	known := func() (n volume.Node, ok bool, age time.Duration) {
		d.mu.Lock()
		defer d.mu.Unlock()
		n, ok = d.nodes[id]
		return n, ok && n.Address != "", time.Since(d.asked)
	}
	n, ok, age := known()
	if ok {
		return n, nil
	}
	select {
	case <-time.After(refreshSoon - age): // at once where that has passed
	case <-ctx.Done():
		return volume.Node{}, fmt.Errorf("where node %s is: %w: %w", id, ctx.Err(), volume.ErrUnavailable)
	}
	if err := d.refresh(ctx); err != nil {
		return volume.Node{}, fmt.Errorf("where node %s is: %w: %w", id, err, volume.ErrUnavailable)
	}
	if n, ok, _ = known(); ok {
		return n, nil
	}
	return volume.Node{}, fmt.Errorf("node %s has not said where it can be reached: %w", id, volume.ErrUnavailable)
}

// Node implements clusterapi.Dialer.
func (d *directory) Node(ctx context.Context, id volume.NodeID) (grpc.ClientConnInterface, error) {
	n, err := d.node(ctx, id)
	if err != nil {
		return nil, err
	}
	return d.connect(connTo{id, n.Address}, pki.IsNode(id))
}

// controllers are connections to the controllers that are known: those that were learned, or else those that were given.
func (d *directory) controllers(given []string) []grpc.ClientConnInterface {
	d.mu.Lock()
	addresses := d.others
	d.mu.Unlock()
	if len(addresses) == 0 {
		addresses = given
	}
	var ccs []grpc.ClientConnInterface
	for _, a := range addresses {
		c, err := d.connect(connTo{"", a}, pki.HasRole(pki.RoleController))
		if err != nil {
			d.log.Warn("controller", "address", a, "error", err)
			continue
		}
		ccs = append(ccs, c)
	}
	return ccs
}

// otherControllers are the controllers that are known.
func (d *directory) otherControllers() []volume.Node {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []volume.Node
	for _, n := range d.nodes {
		if n.ID != d.self.ID && slices.Contains(n.Roles, volume.RoleController) {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b volume.Node) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out
}

func (d *directory) connect(to connTo, verify pki.Verify) (grpc.ClientConnInterface, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing {
		return nil, fmt.Errorf("ballastd is stopping: %w", volume.ErrUnavailable)
	}
	if c := d.conns[to]; c != nil {
		return c, nil
	}
	c, err := clusterapi.Connect(to.address, d.credentials.Client(pki.All(verify, d.current)), &d.open)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w: %w", to.address, err, volume.ErrUnavailable)
	}
	d.conns[to] = c
	return c, nil
}

func (d *directory) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closing = true
	for _, c := range d.conns {
		_ = c.Close() // nothing is lost with it
	}
	return nil
}
