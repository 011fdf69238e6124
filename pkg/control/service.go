package control

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Options of a Service. Zero values are the defaults.
type Options struct {
	Logger *slog.Logger
	// Audit gets every change; nil drops them.
	Audit Audit
	// Members are told who was removed; nil: there are no others.
	Members Members
	// Now is the clock.
	Now func() time.Time
	// NodeTimeout is the silence after which a node counts as down: 2 minutes.
	NodeTimeout time.Duration
	// UndoTimeout bounds what is undone after a refusal, and how long a delete waits for a node: 10 seconds.
	UndoTimeout time.Duration
	// FenceTimeout bounds the wait for one replica to be fenced, or for one engine that nobody uses to be ended: 2 seconds.
	FenceTimeout time.Duration
	// EndTimeout bounds the wait for a node to end the engine of a volume that is being detached, which writes out what its
	// workloads left: 10 seconds. Then it is fenced.
	EndTimeout time.Duration
}

// Service is the use cases. Every method may be called at once with every other; operations on one volume take turns.
// A call that is cut off leaves a state from which the same call, or the reconciler, goes on.
type Service struct {
	store   Store
	agents  Agents
	o       Options
	started time.Time
	flights flights

	mu sync.Mutex
	// staleQoS are attached volumes whose node may not have their limits; nil until all of them have been looked at.
	staleQoS map[volume.ID]bool
	// limits are those of attached volumes when State was last asked for.
	limits map[volume.ID]volume.QoS
	// looked is when State was last asked for, lookingSince since when without a long pause.
	looked, lookingSince time.Time
	// offline are pools without their disk, since when that was seen.
	offline  map[volume.PoolID]time.Time
	reported map[volume.NodeID]report
	unfit    map[Unfit]time.Time // since when
	// strays by node; suspects were seen in one report only and may be on their way out.
	strays, suspects map[volume.NodeID]map[string]Stray
}

// New returns the use cases over a state and the nodes.
func New(store Store, agents Agents, o Options) *Service {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NodeTimeout == 0 {
		o.NodeTimeout = 2 * time.Minute
	}
	if o.UndoTimeout == 0 {
		o.UndoTimeout = 10 * time.Second
	}
	if o.FenceTimeout == 0 {
		o.FenceTimeout = 2 * time.Second
	}
	if o.EndTimeout == 0 {
		o.EndTimeout = 10 * time.Second
	}
	return &Service{
		store: store, agents: agents, o: o, started: o.Now(), flights: flights{m: map[string]*flight{}},
		strays: map[volume.NodeID]map[string]Stray{}, suspects: map[volume.NodeID]map[string]Stray{},
		reported: map[volume.NodeID]report{}, unfit: map[Unfit]time.Time{},
	}
}

const (
	volumePrefix   = "vol-"
	snapshotPrefix = "snap-"
	groupPrefix    = "group-"
	clonePrefix    = "clone-"
	replicaPrefix  = "rep-"
	idBytes        = 10
)

func newID() (string, error) {
	var b [idBytes]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("make an id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

// replicaID is derived, so that a create that is made again finds what it made.
func replicaID(id volume.ID, i int) volume.ReplicaID {
	return volume.ReplicaID(fmt.Sprintf("%s%s-%d", replicaPrefix, strings.TrimPrefix(string(id), volumePrefix), i))
}

// cloneCut is the hidden snapshot through which a clone of a volume is made.
func cloneCut(id volume.ID) volume.SnapshotID {
	return volume.SnapshotID(clonePrefix + strings.TrimPrefix(string(id), volumePrefix))
}

func (s *Service) now() volume.Timestamp { return volume.Timestamp(s.o.Now().UnixNano()) }

func (s *Service) record(ctx context.Context, action, object, detail string, err error) {
	if s.o.Audit != nil {
		s.o.Audit.Record(ctx, action, object, detail, err)
	}
}

func (s *Service) propose(ctx context.Context, c command.Command) error {
	_, err := s.store.Propose(ctx, c)
	return err
}

func (s *Service) proposeVolume(ctx context.Context, c command.Command) (command.Volume, error) {
	r, err := s.store.Propose(ctx, c)
	if err != nil {
		return command.Volume{}, err
	}
	v, ok := r.(command.Volume)
	if !ok {
		return command.Volume{}, fmt.Errorf("the state machine answered %T to %T", r, c)
	}
	return v, nil
}

func (s *Service) proposeSnapshot(ctx context.Context, c command.Command) (command.Snapshot, error) {
	r, err := s.store.Propose(ctx, c)
	if err != nil {
		return command.Snapshot{}, err
	}
	x, ok := r.(command.Snapshot)
	if !ok {
		return command.Snapshot{}, fmt.Errorf("the state machine answered %T to %T", r, c)
	}
	return x, nil
}

// live returns a volume that is not being deleted.
func (s *Service) live(ctx context.Context, id volume.ID) (volume.Volume, error) {
	v, err := s.Record(ctx, id)
	if err == nil && v.Kept != "" {
		err = noVolume(id)
	}
	return v, err
}

func noVolume(id volume.ID) error {
	return fmt.Errorf("volume %s does not exist: %w", id, volume.ErrNotFound)
}

// Record is for nodes, which run engines: it is Volume, and finds also what only serves to copy a snapshot of a volume that was
// deleted.
func (s *Service) Record(ctx context.Context, id volume.ID) (volume.Volume, error) {
	v, err := s.store.Volume(ctx, id)
	if err == nil && v.State == volume.Deleting {
		err = noVolume(id)
	}
	return v, err
}

// undoing is a context for what must be undone although the call may have been cut off.
func (s *Service) undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), s.o.UndoTimeout)
}

// definite tells whether an agent refused for good: its answer will not change by asking again.
func definite(err error) bool {
	for _, e := range []error{volume.ErrNoSpace, volume.ErrNotFound, volume.ErrInvalid, volume.ErrOutOfRange, volume.ErrExists, volume.ErrDataLoss} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// unfinished is the error of work that goes on after the call: never one that a caller could take for the end of it.
func unfinished(err error) error {
	for _, e := range []error{context.Canceled, context.DeadlineExceeded, volume.ErrUnavailable, volume.ErrBusy} {
		if err == nil || errors.Is(err, e) {
			return err
		}
	}
	return fmt.Errorf("%v: %w", err, volume.ErrUnavailable)
}

// cluster is the nodes, and why those that do not report cannot be used.
type cluster struct {
	nodes  []volume.Node
	silent map[volume.NodeID]string
}

func (s *Service) cluster(ctx context.Context) (cluster, error) {
	nodes, err := s.store.Nodes(ctx)
	return s.judge(nodes), err
}

func (s *Service) judge(nodes []volume.Node) cluster {
	c := cluster{nodes, map[volume.NodeID]string{}}
	for _, n := range nodes {
		if silent := s.silence(n); silent > s.o.NodeTimeout {
			c.silent[n.ID] = fmt.Sprintf("its node has not reported for %s", silent.Round(time.Second))
		}
	}
	return c
}

// view is the cluster for placement: nothing new goes to nodes that are silent, drained or being emptied.
func (c cluster) view() placement.View {
	v := placement.View{Nodes: c.nodes, Down: maps.Clone(c.silent)}
	for _, n := range c.nodes {
		if n.State != volume.NodeActive && v.Down[n.ID] == "" {
			v.Down[n.ID] = fmt.Sprintf("its node is %s", n.State)
		}
	}
	return v
}

// settling returns volume.ErrUnavailable while nodes that seem to be down, or are not known yet, may just not have
// reported since this process started: what has no room now may have some in a moment.
func (s *Service) settling(c cluster) error {
	if len(c.nodes) == 0 || len(c.silent) > 0 && s.o.Now().Sub(s.started) < s.o.NodeTimeout {
		return fmt.Errorf("%d of %d nodes have reported since the start: %w", len(c.nodes)-len(c.silent), len(c.nodes), volume.ErrUnavailable)
	}
	return nil
}

func (s *Service) silence(n volume.Node) time.Duration {
	return s.o.Now().Sub(time.Unix(0, int64(n.LastSeen)))
}

// Ready returns nil when requests can be served: the state can be read and written and a node has registered.
// volume.ErrUnavailable: not yet. Another error: not before a restart.
func (s *Service) Ready(ctx context.Context) error {
	if err := s.store.Failed(); err != nil {
		return err
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return err
	}
	if len(nodes) == 0 {
		return fmt.Errorf("no node has registered yet: %w", volume.ErrUnavailable)
	}
	return nil
}
