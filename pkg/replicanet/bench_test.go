package replicanet

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// driver hands answers to those who wait for them.
type driver struct{ waiters []chan bool }

func (d *driver) Receive(_ *Link, m *replication.Message) {
	putBuffer(m.Data)
	d.waiters[m.Op] <- true
}

func (d *driver) Closed(_ *Link, err error) { panic(err) }

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
				d := new(driver)
				for range w.depth {
					d.waiters = append(d.waiters, make(chan bool, 1))
				}
				l, err := dial(b, secure).Dial(context.Background(), target(addr, 1), d)
				if err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				b.SetBytes(int64(w.size))
				b.ReportAllocs()
				reads, writes := systemCalls(b)
				cpu := cpuTime(b)
				var seq atomic.Int64
				var wg sync.WaitGroup
				b.ResetTimer()
				for i := range w.depth {
					m := replication.Message{Kind: w.kind, Epoch: 1, Session: 1, Len: int64(w.size), Op: uint64(i)}
					if w.kind == replication.KindWrite {
						m.Data = make([]byte, w.size)
					}
					wg.Go(func() {
						for {
							n := seq.Add(1)
							if n > int64(b.N) {
								return
							}
							m.Seq = uint64(n)
							l.Send(&m)
							l.Flush()
							<-d.waiters[i]
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64((cpuTime(b)-cpu).Nanoseconds())/float64(b.N), "cpu-ns/op")
				moreReads, moreWrites := systemCalls(b)
				b.ReportMetric(float64(moreReads-reads)/float64(b.N), "reads/op")
				b.ReportMetric(float64(moreWrites-writes)/float64(b.N), "writes/op")
			})
		}
	}
}

// cpuTime is what this process has used: unlike time, it does not depend much on what else the machine does.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// systemCalls is how many system calls of this process read and wrote something, proc(5).
func systemCalls(b *testing.B) (reads, writes int64) {
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		fmt.Sscanf(line, "syscr: %d", &reads)
		fmt.Sscanf(line, "syscw: %d", &writes)
	}
	return reads, writes
}
