package agent

import (
	"maps"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// answerLimit bounds how long is waited for what a pool says of itself, which may be changing its records on a disk that hangs,
// or what a mount does that is not ours.
const answerLimit = 2 * time.Second

// silent knows the pools, and the paths, that do not answer, and what pools said last.
type silent struct {
	mu sync.Mutex
	// late counts the questions to each that were given up and are not answered yet.
	late map[string]int
	last map[volume.PoolID]contents
}

// contents is what a pool says of its replicas and snapshots.
type contents struct {
	replicas     map[volume.ReplicaID]int64
	snapshots    map[volume.SnapshotID]int64
	badReplicas  map[volume.ReplicaID]bool
	badSnapshots map[volume.SnapshotID]bool
}

// ask asks a pool or a path; false where it does not answer in time. It is not asked again before it has answered.
func ask[T any](s *silent, whom string, question func() T) (answer T, ok bool) {
	s.mu.Lock()
	hangs := s.late[whom] > 0
	s.mu.Unlock()
	if hangs {
		return answer, false
	}
	answers := make(chan T, 1)
	go func() { answers <- question() }()
	limit := time.NewTimer(answerLimit)
	defer limit.Stop()
	select {
	case answer = <-answers:
		return answer, true
	case <-limit.C:
	}
	s.count(whom, 1)
	go func() {
		<-answers
		s.count(whom, -1)
	}()
	return answer, false
}

func (s *silent) count(whom string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.late == nil {
		s.late = map[string]int{}
	}
	if s.late[whom] += n; s.late[whom] == 0 {
		delete(s.late, whom)
	}
}

// usage is what the node's pools hold; of one that does not answer, what it held last.
func (n *Node) usage() control.Usage {
	u := control.Usage{
		Pools: n.poolInfos(), Replicas: map[volume.ReplicaID]int64{}, Snapshots: map[volume.SnapshotID]int64{},
		DamagedReplicas: map[volume.ReplicaID]bool{}, DamagedSnapshots: map[volume.SnapshotID]bool{},
	}
	for _, p := range n.cfg.Pools {
		id := p.Info().ID
		c, ok := ask(&n.silent, string(id), func() (c contents) {
			c.replicas, c.snapshots = p.Usage()
			c.badReplicas, c.badSnapshots = p.Damaged()
			return c
		})
		n.silent.mu.Lock()
		if n.silent.last == nil {
			n.silent.last = map[volume.PoolID]contents{}
		}
		if ok {
			n.silent.last[id] = c
		} else {
			c = n.silent.last[id]
		}
		n.silent.mu.Unlock()
		maps.Copy(u.Replicas, c.replicas)
		maps.Copy(u.Snapshots, c.snapshots)
		maps.Copy(u.DamagedReplicas, c.badReplicas)
		maps.Copy(u.DamagedSnapshots, c.badSnapshots)
	}
	return u
}
