package control_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// errCrash is what everything answers after the simulated crash of the process.
var errCrash = errors.New("the process is dead")

// faults strikes at one side effect: a proposal or a call to an agent that changes something.
type faults struct {
	mu   sync.Mutex
	at   int // 0: never
	mode mode
	// cutOff ends the call that hangs, as its deadline would.
	cutOff func()
	n      int
	dead   error // what everything answers from now on
	// often strikes at many steps; nil is at one.
	often func() mode
}

type mode string

const (
	crashBefore mode = "crash before"
	crashAfter  mode = "crash after"
	failBefore  mode = "unavailable before" // once
	failAfter   mode = "unavailable after"  // once
	noSpace     mode = "no space"           // once, agents only
	notFound    mode = "not found"          // once, agents only
	inUse       mode = "in use"             // once, agents only
	hang        mode = "hang"               // once, until the call is cut off
)

var modes = []mode{crashBefore, crashAfter, failBefore, failAfter, noSpace, notFound, inUse, hang}

var refusals = map[mode]error{noSpace: volume.ErrNoSpace, notFound: volume.ErrNotFound, inUse: volume.ErrInUse}

func (f *faults) arm(at int, m mode, cutOff func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at, f.mode, f.cutOff, f.n, f.dead, f.often = at, m, cutOff, 0, nil, nil
}

// steps is how many there were.
func (f *faults) steps() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// step runs one side effect.
func (f *faults) step(ctx context.Context, agent bool, effect func() error) error {
	f.mu.Lock()
	if f.dead != nil {
		defer f.mu.Unlock()
		return f.dead
	}
	f.n++
	m, now := f.mode, f.at != 0 && f.n == f.at
	if f.often != nil {
		m = f.often()
		now = m != ""
	}
	now = now && (agent || refusals[m] == nil)
	if now && (m == crashBefore || m == crashAfter) {
		f.dead = errCrash
	}
	f.mu.Unlock()
	if !now {
		return effect()
	}
	switch m {
	case crashBefore:
		return errCrash
	case crashAfter:
		_ = effect()
		return errCrash
	case failAfter:
		_ = effect()
		return fmt.Errorf("no answer: %w", volume.ErrUnavailable)
	case hang:
		return f.hang(ctx)
	}
	if err := refusals[m]; err != nil {
		return fmt.Errorf("the node refuses: %w", err)
	}
	return fmt.Errorf("no answer: %w", volume.ErrUnavailable)
}

// hang is an effect that comes to nothing before its context ends. What is undone has a context of its own, which the
// caller's end does not end: its deadline passes here, and whatever else is tried under it fails too.
func (f *faults) hang(ctx context.Context) error {
	f.cutOff()
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dead = context.DeadlineExceeded
	return f.dead
}

// faultyStore strikes at proposals.
type faultyStore struct {
	control.Store
	f *faults
}

func (s faultyStore) Propose(ctx context.Context, c command.Command) (r command.Result, err error) {
	err = s.f.step(ctx, false, func() error {
		r, err = s.Store.Propose(ctx, c)
		return err
	})
	return r, err
}

// fakeAgents is every node's data plane, with the semantics of the store: a snapshot keeps its bytes when the replica
// that it was cut from is gone.
type fakeAgents struct {
	f *faults

	mu         sync.Mutex
	replicas   map[volume.ReplicaID]fakeReplica
	snapshots  map[volume.SnapshotID]fakeReplica
	attached   map[volume.ID]volume.NodeID // what is written there reaches the replicas
	engines    map[volume.ID]volume.NodeID // without a device
	epochs     map[volume.ReplicaID]volume.Epoch
	leases     map[volume.NodeID]time.Duration
	slow       map[volume.NodeID]time.Duration // to fence
	drained    map[volume.ID]bool
	calls      []string
	reports    map[volume.ReplicaID]control.ReplicaReport
	store      control.Store
	hangs      volume.NodeID // does not even refuse
	qos        map[volume.ID]volume.QoS
	down       map[volume.NodeID]bool
	conditions []volume.Condition
	troubled   volume.NodeID // the only one that has the conditions; "" is all
	flushed    map[volume.ReplicaID]volume.Timestamp
	atDevice   map[volume.NodeID][]volume.Condition
	running    *volume.EngineReport // on runner
	runner     volume.NodeID
	observed   int // calls of Observe
	// scripted is what the next call of a method answers, once; "device" is a resize after the replica has grown.
	scripted map[string]error
	// onFence and onDetach happen before those are answered.
	onFence, onDetach func()
	// onFreed happens when a replica has been deleted.
	onFreed func(volume.ReplicaID)
	// read are snapshots, with their pools, that are being read: they are not let go of.
	read map[volume.SnapshotID]bool
	// onDeleteSnapshot happens on the way to a pool.
	onDeleteSnapshot func(volume.PoolID)
	// digest answers Digest.
	digest func(ctx context.Context, h volume.Replica, offset int64, regions int) (control.Digest, error)
}

type fakeReplica struct {
	id    volume.ReplicaID // "" is any
	node  volume.NodeID
	pool  volume.PoolID
	size  int64
	bytes string
}

func newFakeAgents(f *faults) *fakeAgents {
	return &fakeAgents{
		f: f, replicas: map[volume.ReplicaID]fakeReplica{}, snapshots: map[volume.SnapshotID]fakeReplica{},
		attached: map[volume.ID]volume.NodeID{}, qos: map[volume.ID]volume.QoS{}, down: map[volume.NodeID]bool{},
		scripted: map[string]error{}, engines: map[volume.ID]volume.NodeID{}, epochs: map[volume.ReplicaID]volume.Epoch{},
		leases: map[volume.NodeID]time.Duration{}, slow: map[volume.NodeID]time.Duration{}, drained: map[volume.ID]bool{}, reports: map[volume.ReplicaID]control.ReplicaReport{},
	}
}

func (a *fakeAgents) script(method string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.scripted[method] = err
}

// said is the scripted answer to a method. The caller has mu.
func (a *fakeAgents) said(method string) error {
	err := a.scripted[method]
	delete(a.scripted, method)
	if err != nil {
		err = fmt.Errorf("%s is answered so: %w", method, err)
	}
	return err
}

func (a *fakeAgents) do(ctx context.Context, method string, node volume.NodeID, effect func() error) error {
	return a.f.step(ctx, true, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.down[node] {
			return fmt.Errorf("node %s is down: %w", node, volume.ErrUnavailable)
		}
		a.calls = append(a.calls, fmt.Sprintf("%s %s", method, node))
		if err := a.said(method); err != nil {
			return err
		}
		return effect()
	})
}

func (a *fakeAgents) CreateReplica(ctx context.Context, node volume.NodeID, r control.ReplicaSpec) error {
	return a.do(ctx, "CreateReplica", node, func() error {
		if _, ok := a.replicas[r.ID]; ok {
			return nil
		}
		x := fakeReplica{id: r.ID, node: node, pool: r.Pool, size: r.Size}
		if r.Parent != "" {
			p, ok := a.snapshots[volume.SnapshotID(fmt.Sprintf("%s@%s", r.Parent, r.Pool))]
			if !ok {
				return fmt.Errorf("parent %s: %w", r.Parent, volume.ErrNotFound)
			}
			if p.size > r.Size {
				return fmt.Errorf("size %d below the parent's %d: %w", r.Size, p.size, volume.ErrOutOfRange)
			}
			x.bytes = p.bytes
		}
		a.replicas[r.ID] = x
		return nil
	})
}

func (a *fakeAgents) DeleteReplica(ctx context.Context, node volume.NodeID, _ volume.PoolID, id volume.ReplicaID) error {
	err := a.do(ctx, "DeleteReplica", node, func() error {
		delete(a.replicas, id)
		return nil
	})
	a.mu.Lock()
	then := a.onFreed
	a.mu.Unlock()
	if err == nil && then != nil {
		then(id)
	}
	return err
}

func (a *fakeAgents) HasReplica(_ context.Context, node volume.NodeID, _ volume.PoolID, id volume.ReplicaID) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down[node] {
		return false, fmt.Errorf("node %s is down: %w", node, volume.ErrUnavailable)
	}
	_, ok := a.replicas[id]
	return ok, nil
}

func (a *fakeAgents) ResizeReplica(ctx context.Context, node volume.NodeID, _ volume.PoolID, id volume.ReplicaID, size int64) error {
	return a.do(ctx, "ResizeReplica", node, func() error {
		x, ok := a.replicas[id]
		if !ok {
			return fmt.Errorf("replica %s: %w", id, volume.ErrNotFound)
		}
		x.size = max(x.size, size)
		a.replicas[id] = x
		return a.said("device")
	})
}

func (a *fakeAgents) ExpandVolume(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch, size int64) error {
	members := a.members(ctx, id)
	return a.do(ctx, "ExpandVolume", r.Node, func() error {
		if err := a.inEpoch(ctx, id, epoch); err != nil {
			return err
		}
		for _, m := range members {
			x, ok := a.replicas[m.ID]
			if !ok || a.down[m.Node] {
				return fmt.Errorf("replica %s: %w", m.ID, volume.ErrUnavailable)
			}
			x.size = max(x.size, size)
			a.replicas[m.ID] = x
		}
		return a.said("device")
	})
}

// inEpoch is volume.ErrBusy where a request is not of the volume's epoch.
func (a *fakeAgents) inEpoch(ctx context.Context, id volume.ID, epoch volume.Epoch) error {
	if v, err := a.store.Volume(ctx, id); err == nil && v.Epoch != epoch {
		return fmt.Errorf("volume %s is in epoch %d, not %d: %w", id, v.Epoch, epoch, volume.ErrBusy)
	}
	return nil
}

// members are what an engine knows to be in sync.
func (a *fakeAgents) members(ctx context.Context, id volume.ID) []volume.Replica {
	v, err := a.store.Volume(ctx, id)
	if err != nil {
		return nil
	}
	return v.InSync()
}

func (a *fakeAgents) Fence(ctx context.Context, r volume.Replica, id volume.ID, epoch volume.Epoch) (lease time.Duration, err error) {
	time.Sleep(a.slow[r.Node])
	err = a.do(ctx, "Fence", r.Node, func() error {
		if a.onFence != nil {
			a.onFence()
		}
		a.epochs[r.ID] = max(a.epochs[r.ID], epoch)
		lease = a.leases[r.Node]
		delete(a.attached, id) // what is written there is acknowledged no more
		delete(a.engines, id)
		return nil
	})
	return lease, err
}

func (a *fakeAgents) Inspect(_ context.Context, r volume.Replica, _ volume.ID) (control.ReplicaReport, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down[r.Node] {
		return control.ReplicaReport{}, fmt.Errorf("node %s is down: %w", r.Node, volume.ErrUnavailable)
	}
	report, told := a.reports[r.ID]
	if !told {
		_, report.Present = a.replicas[r.ID]
	}
	return report, nil
}

func (a *fakeAgents) OpenEngine(ctx context.Context, node volume.NodeID, id volume.ID, _ volume.Epoch) error {
	return a.do(ctx, "OpenEngine", node, func() error {
		if a.attached[id] != node {
			a.engines[id] = node
		}
		return nil
	})
}

func (a *fakeAgents) Evict(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, r volume.ReplicaID) error {
	v, err := a.store.Volume(ctx, id)
	if err != nil {
		return err
	}
	return a.do(ctx, "Evict", node, func() error {
		if err := a.inEpoch(ctx, id, epoch); err != nil {
			return err
		}
		_, err := a.store.Propose(ctx, command.Commit{Volume: id, Change: replication.Change{Reconfigure: &replication.Reconfigure{
			Epoch: v.Epoch, ConfigVersion: v.ConfigVersion, Remove: []volume.ReplicaID{r}}}})
		return err
	})
}

func (a *fakeAgents) Drain(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	return a.do(ctx, "Drain", node, func() error {
		a.drained[s.Volume] = true
		return nil
	})
}

func (a *fakeAgents) Release(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) error {
	return a.do(ctx, "Release", node, func() error {
		delete(a.drained, s.Volume)
		return nil
	})
}

func (a *fakeAgents) CutSnapshot(ctx context.Context, node volume.NodeID, s control.SnapshotSpec) (holders []volume.ReplicaID, err error) {
	cut := []volume.Replica{{ID: s.Replica}}
	if s.Barrier.Number != 0 {
		cut = a.members(ctx, s.Volume)
	}
	err = a.do(ctx, "CutSnapshot", node, func() error {
		for _, r := range cut {
			x, ok := a.replicas[r.ID]
			if !ok {
				return fmt.Errorf("replica %s: %w", r.ID, volume.ErrNotFound)
			}
			if a.down[x.node] {
				return fmt.Errorf("node %s is down: %w", x.node, volume.ErrBusy)
			}
			key := volume.SnapshotID(fmt.Sprintf("%s@%s", s.ID, x.pool))
			if _, ok := a.snapshots[key]; !ok {
				if v, err := a.store.Volume(ctx, s.Volume); err == nil {
					x.size = min(x.size, v.Size) // a replica that was grown for nothing has zeros at its end
				}
				a.snapshots[key] = x
			}
			holders = append(holders, r.ID)
		}
		return nil
	})
	return holders, err
}

func (a *fakeAgents) DeleteSnapshot(ctx context.Context, node volume.NodeID, pool volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, _ uint64) error {
	a.mu.Lock()
	on := a.onDeleteSnapshot
	a.mu.Unlock()
	if on != nil {
		on(pool)
	}
	return a.do(ctx, "DeleteSnapshot", node, func() error {
		key := volume.SnapshotID(fmt.Sprintf("%s@%s", id, pool))
		if x := a.snapshots[key]; x.id != "" && of != "" && x.id != of {
			return nil
		}
		if a.read[key] {
			return fmt.Errorf("snapshot %s is being read: %w", id, volume.ErrBusy)
		}
		delete(a.snapshots, key)
		return nil
	})
}

func (a *fakeAgents) Detach(ctx context.Context, node volume.NodeID, id volume.ID, _ volume.Epoch) (bool, error) {
	a.mu.Lock()
	hangs := a.hangs == node
	a.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return false, ctx.Err()
	}
	err := a.do(ctx, "Detach", node, func() error {
		if a.onDetach != nil {
			a.onDetach()
		}
		if a.attached[id] == node {
			delete(a.attached, id)
		}
		if a.engines[id] == node {
			delete(a.engines, id)
		}
		return nil
	})
	return err == nil, err
}

func (a *fakeAgents) SetQoS(ctx context.Context, node volume.NodeID, id volume.ID, epoch volume.Epoch, q volume.QoS) error {
	return a.do(ctx, "SetQoS", node, func() error {
		if err := a.inEpoch(ctx, id, epoch); err != nil {
			return err
		}
		if a.attached[id] == node {
			a.qos[id] = q
		}
		return nil
	})
}

func (a *fakeAgents) Observe(ctx context.Context, node volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.observed++
	if a.hangs == node {
		a.mu.Unlock()
		<-ctx.Done()
		a.mu.Lock()
		return nil, ctx.Err()
	}
	if a.down[node] {
		return nil, fmt.Errorf("node %s is down: %w", node, volume.ErrUnavailable)
	}
	out := make([]control.Observation, len(of))
	for i, s := range of {
		if s.Replica.ID != "" && (a.troubled == "" || a.troubled == node) {
			out[i].Replica = slices.Clone(a.conditions)
		}
		out[i].Device = slices.Clone(a.atDevice[node])
		out[i].LastFlush = a.flushed[s.Replica.ID]
		if a.running != nil && node == a.runner {
			out[i].Engine = a.running
		}
	}
	return out, nil
}

func (a *fakeAgents) Extents(_ context.Context, h volume.Replica, s, base volume.SnapshotID, offset int64, fn func(control.Extent) error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down[h.Node] {
		return volume.ErrUnavailable
	}
	if _, ok := a.snapshots[volume.SnapshotID(fmt.Sprintf("%s@%s", s, h.Pool))]; !ok {
		return volume.ErrNotFound
	}
	if err := fn(control.Extent{Offset: offset, Length: 4096}); err != nil {
		return err
	}
	return a.said("Extents")
}

func (a *fakeAgents) Digest(ctx context.Context, h volume.Replica, s volume.SnapshotID, offset int64, regions int) (control.Digest, error) {
	return a.digest(ctx, h, offset, regions)
}

// write is a workload's write.
func (a *fakeAgents) write(id volume.ReplicaID, bytes string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x := a.replicas[id]
	x.bytes = bytes
	a.replicas[id] = x
}

func (a *fakeAgents) contents(id volume.ReplicaID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.replicas[id].bytes
}

func (a *fakeAgents) setDown(node volume.NodeID, down bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.down[node] = down
}

func (a *fakeAgents) hanging(node volume.NodeID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hangs = node
}

func (a *fakeAgents) stage(id volume.ID, node volume.NodeID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.attached[id] = node
}

func (a *fakeAgents) held() (rs []volume.ReplicaID, ss []volume.SnapshotID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.replicas)), slices.Sorted(maps.Keys(a.snapshots))
}
