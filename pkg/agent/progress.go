package agent

import (
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Engines tells how the engines that run here are.
func (n *Node) Engines() map[volume.ID]volume.EngineReport {
	out := map[volume.ID]volume.EngineReport{}
	for _, v := range n.all() {
		if r, runs := n.engine(v.id); runs {
			out[v.id] = r
		}
	}
	return out
}

// engine tells how the engine of a volume is, where one runs here.
func (n *Node) engine(id volume.ID) (_ volume.EngineReport, runs bool) {
	v, known := n.known(id)
	if !known {
		return volume.EngineReport{}, false
	}
	i := v.get().inst
	if i == nil {
		return volume.EngineReport{}, false
	}
	s := i.e.Status()
	r := volume.EngineReport{
		Phase: s.Phase, Epoch: s.Epoch, Waiting: s.Waiting, Dirty: int64(s.Dirty) * replication.DefaultGeometry().Region,
	}
	now := time.Now()
	for _, m := range s.Members {
		if m.Resync == nil {
			i.progress.forget(m.ID)
			continue
		}
		rate, since := i.progress.look(m.ID, m.Resync.Done, now)
		r.Resyncs = append(r.Resyncs, volume.Resync{
			Replica: m.ID, Stage: m.Resync.Stage, Full: m.Resync.Full, Done: m.Resync.Done, Left: m.Resync.Left,
			Rate: rate, Snapshots: m.Resync.Snapshots, Since: volume.Timestamp(since.UnixNano()),
		})
	}
	return r, true
}

// rateOver is the least time that a rate is measured over.
const rateOver = time.Second

// progress remembers what resyncs had done when somebody looked, to tell their rates.
type progress struct {
	mu sync.Mutex
	m  map[volume.ReplicaID]*looked
}

type looked struct {
	since time.Time // when the resync was seen first
	at    time.Time
	done  int64 // then
	rate  int64
}

func (p *progress) look(id volume.ReplicaID, done int64, now time.Time) (rate int64, since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.m[id]
	if l == nil || done < l.done { // it began anew
		if p.m == nil {
			p.m = map[volume.ReplicaID]*looked{}
		}
		l = &looked{since: now, at: now, done: done}
		p.m[id] = l
	}
	if span := now.Sub(l.at); span >= rateOver {
		l.rate = int64(float64(done-l.done) / span.Seconds())
		l.at, l.done = now, done
	}
	return l.rate, l.since
}

func (p *progress) forget(id volume.ReplicaID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.m, id)
}
