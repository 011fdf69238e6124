package engine

import (
	"context"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Pauses between attempts to connect to a replica.
const (
	firstDialPause = 50 * time.Millisecond
	maxDialPause   = 2 * time.Second
	dialTimeout    = 3 * time.Second
)

// peer is one member, and the way to it. Its fields are guarded by the engine's mutex.
type peer struct {
	id   volume.ReplicaID
	node volume.NodeID

	stop      context.CancelFunc
	transport Transport // nil while there is none
	broken    chan struct{}
	// lent are the buffers of writes that were sent on transport and not answered, by their Seq.
	lent map[uint64]*buffer
}

// sending notes that a write's buffer is in use until it is answered.
func (p *peer) sending(m *replication.Message, b *buffer) {
	if b == nil {
		return
	}
	b.retain()
	p.lent[m.Seq] = b
}

func (p *peer) answered(seq uint64) {
	if b := p.lent[seq]; b != nil {
		delete(p.lent, seq)
		b.release()
	}
}

func (p *peer) reconnect() {
	if p.transport != nil {
		closeOnce(p.broken)
	}
}

// meet begins connections to members that are new, and ends those to members that are no more; the mutex is held. Records may
// come late: one that is older than the last is passed over.
func (e *Engine) meet(m replication.Membership) {
	if m.Revision < e.met {
		return
	}
	e.met = m.Revision
	for _, a := range m.Members {
		if p := e.peers[a.ID]; p != nil && p.node == a.Node || e.closed {
			continue
		} else if p != nil {
			p.stop()
			e.m.Disconnected(now(), a.ID)
		}
		ctx, cancel := context.WithCancel(e.ctx)
		p := &peer{id: a.ID, node: a.Node, stop: cancel}
		e.peers[a.ID] = p
		e.tasks.Go(func() { e.keepConnected(ctx, p) })
	}
	for id, p := range e.peers {
		if _, is := m.Member(id); !is {
			p.stop()
			delete(e.peers, id)
		}
	}
}

// keepConnected connects to a member again and again until ctx ends.
func (e *Engine) keepConnected(ctx context.Context, p *peer) {
	defer p.stop()
	pause := firstDialPause
	for ctx.Err() == nil {
		// One that ends at once is a failure too: a replica whose store is broken refuses each session.
		if begin := time.Now(); e.connect(ctx, p) && time.Since(begin) > maxDialPause {
			pause = firstDialPause
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, maxDialPause)
	}
}

// connect serves one transport from its beginning to its end; it tells whether there was one.
func (e *Engine) connect(ctx context.Context, p *peer) bool {
	broken := make(chan struct{})
	dialing, cancel := context.WithTimeout(ctx, dialTimeout)
	t, err := e.cfg.Peers.Dial(dialing, p.node, e.id, p.id,
		func(m *replication.Message) { e.receive(p, broken, m) },
		func(err error) {
			e.log.Info("connection to a replica broke", "replica", p.id, "node", p.node, "error", err)
			e.mu.Lock()
			defer e.mu.Unlock()
			closeOnce(broken)
		})
	cancel()
	if err != nil {
		e.log.Debug("replica cannot be reached", "replica", p.id, "node", p.node, "error", err)
		return false
	}
	e.step(func() {
		if e.peers[p.id] != p {
			closeOnce(broken) // it has moved meanwhile, and another goroutine connects to it
			return
		}
		p.transport, p.broken, p.lent = t, broken, map[uint64]*buffer{}
		e.m.Connected(now(), p.id)
	})
	select {
	case <-broken:
	case <-ctx.Done():
	}
	// What was lent to the transport and not answered is left to the garbage collector.
	e.step(func() {
		p.transport, p.lent = nil, nil
		if e.peers[p.id] == p {
			e.m.Disconnected(now(), p.id)
		}
	})
	t.Close()
	return true
}

func (e *Engine) receive(p *peer, transport chan struct{}, m *replication.Message) {
	e.mu.Lock()
	if e.closed || p.broken != transport || p.transport == nil {
		e.mu.Unlock()
		return
	}
	p.answered(m.Seq)
	e.m.Receive(now(), m)
	fx := e.take()
	e.mu.Unlock()
	e.carryOut(fx)
}
