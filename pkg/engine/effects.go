package engine

import (
	"sync"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// sending is a message to be handed to a transport after the mutex is released.
type sending struct {
	to  Transport
	msg replication.Message
}

type effects struct{ sends []sending }

var effectLists = sync.Pool{New: func() any { return new(effects) }}

func (x *effects) done() {
	clear(x.sends)
	x.sends = x.sends[:0]
	effectLists.Put(x)
}

// take carries the machine's effects out, less the messages, which it returns: they are to be sent after the mutex, which is
// held, is released.
func (e *Engine) take() *effects {
	out := e.m.Effects()
	if next := e.m.NextWake(); next < e.alarm {
		e.alarm = next
		select {
		case e.wake <- struct{}{}:
		default:
		}
	}
	var x *effects
	for i := range out {
		f := &out[i]
		switch f.Kind {
		case replication.EffectSend:
			p := e.peers[f.Msg.Replica]
			if p == nil || p.transport == nil {
				break // Disconnected is on its way
			}
			p.sending(&f.Msg, e.requests.buffer(&f.Msg))
			if x == nil {
				x = effectLists.Get().(*effects)
			}
			x.sends = append(x.sends, sending{to: p.transport, msg: f.Msg})
		case replication.EffectAnswer:
			if q := e.requests.get(f.Tag); q != nil {
				e.end(q, f)
			}
		case replication.EffectReleased:
			e.requests.released(f.Tag)
		case replication.EffectReconnect:
			if p := e.peers[f.Replica]; p != nil {
				p.reconnect()
			}
		case replication.EffectCommit:
			number, change := f.Commit, f.Change
			e.tasks.Go(func() { e.commit(number, change) })
		case replication.EffectLive:
			closeOnce(e.live)
			e.log.Info("volume is served")
		case replication.EffectDetached:
			closeOnce(e.detached)
		case replication.EffectFailed:
			e.fail(f.Reason)
			e.log.Error("volume is not served any more", "reason", f.Reason)
		case replication.EffectResized:
			e.size.Store(f.Size)
		case replication.EffectDrained, replication.EffectSealed, replication.EffectBarrier:
			e.barrierReached(f)
		}
	}
	return x
}

func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// carryOut sends messages: remote replicas get theirs first, so that they work while the local one does.
func (e *Engine) carryOut(x *effects) {
	if x == nil {
		return
	}
	for i := range x.sends {
		s := &x.sends[i]
		if _, local := s.to.(*Conn); !local {
			s.to.Send(&s.msg)
		}
	}
	for i := range x.sends {
		s := &x.sends[i]
		if last := i == len(x.sends)-1 || x.sends[i+1].to != s.to; last {
			s.to.Flush()
		}
	}
	for i := range x.sends {
		if c, local := x.sends[i].to.(*Conn); local {
			c.Send(&x.sends[i].msg)
		}
	}
	x.done()
}
