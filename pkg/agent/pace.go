package agent

import (
	"context"
	"errors"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// lookEvery is how often an engine is looked at for resyncs that began or ended.
	lookEvery = time.Second
	// tellLimit bounds a look's calls to the controllers: who looks has to notice the engine's end.
	tellLimit = 3 * time.Second
)

var lookFrom = time.Now()

// untilLook is how long it is until all engines are looked at: at once, for what a process at rest costs is that it wakes up.
func untilLook() time.Duration { return lookEvery - time.Since(lookFrom)%lookEvery }

// look sees to what an engine's resyncs have come to: whether there are any, for the pacing, and which snapshots replicas
// have filled in, for the controllers.
func (n *Node) look(v *vol, i *instance) {
	c, err := n.connected()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(n.ctx, tellLimit)
	defer cancel()
	syncing := false
	for _, m := range i.e.Status().Members {
		syncing = syncing || m.Resync != nil
		if !m.InSync {
			i.late(m.ID)
			continue
		}
		if !i.wasLate(m.ID) {
			continue
		}
		told := true
		for _, s := range m.Snapshots {
			if err := c.AddHolder(ctx, s, m.ID); err != nil && !errors.Is(err, volume.ErrNotFound) {
				n.log.Warn("a replica has filled in a snapshot, which is not recorded yet", "volume", v.id, "replica", m.ID, "snapshot", s, "err", err)
				told = false
			}
		}
		if told {
			i.mu.Lock()
			delete(i.behind, m.ID)
			i.mu.Unlock()
		}
	}
	i.syncing.Store(syncing)
}

// late notes that a replica is not in sync.
func (i *instance) late(id volume.ReplicaID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.behind[id] = true
}

func (i *instance) wasLate(id volume.ReplicaID) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.behind[id]
}

// read notes which replicas of a record are not in sync.
func (i *instance) read(m replication.Membership) {
	for _, a := range m.Members {
		if a.Role != replication.RoleISR {
			i.late(a.ID)
		}
	}
}

// pace keeps what resyncs have in flight to what the workloads of this node hardly feel, until the node is closed.
func (n *Node) pace() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	p := replication.NewPacer()
	start := time.Now()
	done := map[*instance]map[volume.ReplicaID]int64{}
	var copied int64
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-timer.C:
		}
		s := replication.PaceSample{Now: replication.Now(time.Since(start))}
		ops, p99 := n.meter.Take()
		s.Ops, s.P99 = ops, replication.Now(p99)
		var syncing []*instance
		for _, v := range n.all() {
			if i := v.get().inst; i != nil && i.syncing.Load() {
				syncing = append(syncing, i)
			}
		}
		was := done
		done = map[*instance]map[volume.ReplicaID]int64{}
		for _, i := range syncing {
			done[i] = map[volume.ReplicaID]int64{}
			there := 0
			for _, m := range i.e.Status().Members {
				if m.InSync {
					there++
				}
				if m.Resync == nil {
					continue
				}
				s.Resyncing = true
				s.Left += m.Resync.Left
				now := m.Resync.Done + m.Resync.Compared
				if more := now - was[i][m.ID]; more > 0 {
					copied += more
				}
				done[i][m.ID] = now
			}
			s.Alone = s.Alone || there == 1
		}
		s.Copied = copied
		next := time.Duration(replication.PaceEvery)
		if !s.Resyncing && s.Ops == 0 {
			next = untilLook() // a node at rest is left alone
		}
		timer.Reset(next)
		p.Sample(s)
		n := int64(len(syncing))
		for _, i := range syncing {
			i.e.SetResyncPace(max(p.Window()/n, replication.MinWindow), p.Rate()/n)
		}
	}
}
