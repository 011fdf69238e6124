package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// BenchmarkLocal compares a replica's store with an engine over it: what a volume of one replica costs beyond its disk.
func BenchmarkLocal(b *testing.B) {
	const size = 256 * mib
	for _, through := range []string{"store", "engine"} {
		for _, op := range []string{"write", "read"} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("%s/%s/depth=%d", through, op, depth), func(b *testing.B) {
					log := slog.New(slog.DiscardHandler)
					store, err := extentstore.Open(b.Context(), b.TempDir(), extentstore.Options{ID: poolID, Capacity: 2 << 30, Reserve: 16 * mib, Logger: log})
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(func() { _ = store.Close() })
					p := extentPool{store}
					if err := p.CreateReplica(b.Context(), control.ReplicaSpec{ID: "r1", Volume: vol1, Pool: poolID, Size: size}); err != nil {
						b.Fatal(err)
					}
					n := &Node{cfg: Config{ID: nodeID, Pools: []Pool{p}, Logger: log, Timing: replication.DefaultTiming()}, log: log}
					n.host = replicaHost{n: n, boot: 1, m: map[volume.ReplicaID]*hosted{}}
					var dev block.Device
					if through == "store" {
						s, _, err := p.OpenReplica(b.Context(), "r1")
						if err != nil {
							b.Fatal(err)
						}
						b.Cleanup(func() { _ = s.Close() })
						dev = s
					} else {
						c := &fakeCluster{volumes: map[volume.ID]volume.Volume{vol1: {
							ID: vol1, Size: size, Parameters: volume.Parameters{MinInSync: 1}, Replicas: []volume.Replica{{ID: "r1", Node: nodeID, Pool: poolID, Role: volume.InSync}},
							Protocol: volume.Protocol{ConfigVersion: 1, Lineage: 1, Clean: true},
						}}}
						m, err := c.Commit(b.Context(), vol1, replication.Change{Attach: &replication.Attach{Node: nodeID}})
						if err != nil {
							b.Fatal(err)
						}
						e, err := engine.Open(engine.Config{
							Node: nodeID, Controllers: c, Peers: n, Logger: log, Geometry: replication.DefaultGeometry(), Timing: n.cfg.Timing, Meter: &n.meter,
						}, m)
						if err != nil {
							b.Fatal(err)
						}
						b.Cleanup(func() { _ = e.Close(); _ = n.host.closeAll(context.Background(), n.cfg.Pools[0]) })
						if err := e.Live(b.Context()); err != nil {
							b.Fatal(err)
						}
						dev = e
					}
					buf := make([]byte, mib)
					buf[0] = 1
					for off := int64(0); off < size; off += mib {
						if err := dev.WriteAt(b.Context(), buf, off); err != nil {
							b.Fatal(err)
						}
					}
					if err := dev.Flush(b.Context()); err != nil {
						b.Fatal(err)
					}
					var next atomic.Int64
					var wg sync.WaitGroup
					b.ReportAllocs()
					b.ResetTimer()
					for range depth {
						wg.Go(func() {
							buf := make([]byte, 4096)
							for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
								f := dev.ReadAt
								if op == "write" {
									f = dev.WriteAt
								}
								if err := f(context.Background(), buf, i*7919*4096%size); err != nil {
									b.Error(err)
									return
								}
							}
						})
					}
					wg.Wait()
				})
			}
		}
	}
}
