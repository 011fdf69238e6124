package replicanet

import (
	"fmt"
	"testing"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// driver keeps a number of requests under way until all are answered.
type driver struct {
	msg       replication.Message
	left      int
	underway  int
	connected chan *Link
	done      chan struct{}
}

func (d *driver) Connected(l *Link) { d.connected <- l }

func (d *driver) Receive(l *Link, m *replication.Message) {
	l.Free(m.Data)
	if d.left > 0 {
		d.left--
		d.send(l)
		return
	}
	if d.underway--; d.underway == 0 {
		close(d.done)
	}
}

func (d *driver) send(l *Link) {
	d.msg.Seq++
	d.msg.Op++
	l.Send(&d.msg, nil)
}

func (d *driver) EndBatch(l *Link) { l.Flush() }

func (d *driver) Disconnected(_ *Link, err error) { panic(err) }

func BenchmarkLoopback(b *testing.B) {
	for _, secure := range []bool{false, true} {
		for _, w := range []struct {
			name  string
			kind  replication.Kind
			size  int
			depth int
		}{
			{"write4k", replication.KindWrite, 4 << 10, 1},
			{"write4k", replication.KindWrite, 4 << 10, 32},
			{"read4k", replication.KindRead, 4 << 10, 32},
			{"write1M", replication.KindWrite, 1 << 20, 1},
			{"write1M", replication.KindWrite, 1 << 20, 8},
			{"read1M", replication.KindRead, 1 << 20, 8},
		} {
			name := "plain"
			if secure {
				name = "tls"
			}
			b.Run(fmt.Sprintf("%s/%s/qd%d", name, w.name, w.depth), func(b *testing.B) {
				_, addr := serve(b, newReplica(b), secure)
				c := dial(b, secure)
				d := &driver{connected: make(chan *Link, 1), done: make(chan struct{})}
				d.msg = replication.Message{Kind: w.kind, Epoch: 1, Session: 1, Len: int64(w.size)}
				if w.kind == replication.KindWrite {
					d.msg.Data = make([]byte, w.size)
				}
				p := c.Open(target(addr, 1), d)
				defer p.Close()
				l := <-d.connected
				b.SetBytes(int64(w.size))
				b.ReportAllocs()
				reads, writes := calls.reads.Load(), calls.writes.Load()
				b.ResetTimer()
				n := min(w.depth, b.N)
				d.left, d.underway = b.N-n, n
				for range n {
					d.send(l)
				}
				l.Flush()
				<-d.done
				b.ReportMetric(float64(calls.reads.Load()-reads)/float64(b.N), "reads/op")
				b.ReportMetric(float64(calls.writes.Load()-writes)/float64(b.N), "writes/op")
			})
		}
	}
}
