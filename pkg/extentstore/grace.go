package extentstore

import (
	"sync"
	"sync/atomic"
	"time"
)

// grace lets the one who frees slots wait until nobody who may have looked them up is still reading. Readers never wait.
type grace struct {
	gen   atomic.Uint64
	in    [2]struct{ n, _ atomic.Int64 }
	drain sync.Mutex
}

// enter begins a section in which what was looked up stays what it is. It returns what exit needs.
func (g *grace) enter() uint64 {
	for {
		gen := g.gen.Load()
		g.in[gen&1].n.Add(1)
		if g.gen.Load() == gen {
			return gen
		}
		g.in[gen&1].n.Add(-1)
	}
}

func (g *grace) exit(gen uint64) { g.in[gen&1].n.Add(-1) }

// wait returns when every section that began before it was called has ended.
func (g *grace) wait() {
	g.drain.Lock()
	defer g.drain.Unlock()
	old := g.gen.Add(1) - 1
	for pause := 10 * time.Microsecond; g.in[old&1].n.Load() != 0; pause = min(2*pause, time.Millisecond) {
		time.Sleep(pause)
	}
}
