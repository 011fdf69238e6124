package engine

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// memPeers reaches replicas in this process.
type memPeers map[volume.ReplicaID]*Replica

func (p memPeers) Dial(_ context.Context, _ volume.NodeID, _ volume.ID, id volume.ReplicaID, receive func(*replication.Message), down func(error)) (Transport, error) {
	return p[id].Connect(receive, down)
}

type memControllers struct {
	mu sync.Mutex
	m  replication.Membership
}

func (c *memControllers) Commit(_ context.Context, _ volume.ID, change replication.Change) (replication.Membership, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m, err := c.m.Apply(change)
	if err == nil {
		c.m = m
	}
	return c.m, err
}

func (c *memControllers) Membership(context.Context, volume.ID) (replication.Membership, error) {
	return c.m, nil
}

const benchSize = 64 * mib

func benchDevice(b *testing.B, replicas int) block.Device {
	if replicas == 0 {
		return blocktest.NewMem(benchSize)
	}
	peers := memPeers{}
	var members []replication.Member
	for i := range replicas {
		a := member(i + 1)
		members = append(members, a)
		store := &quickStore{Device: blocktest.NewMem(benchSize), memStore: memStore{disk: newDisk(benchSize), closed: make(chan struct{})}}
		store.open = true
		r, err := NewReplica(replication.ReplicaConfig{
			Volume: volName, Replica: a.ID, Incarnation: 7, BootID: 7, Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming(),
		}, store, testLog())
		if err != nil {
			b.Fatal(err)
		}
		peers[a.ID] = r
		b.Cleanup(func() { _ = r.Close() })
	}
	m, err := replication.NewMembership(volName, benchSize, 1, members)
	if err != nil {
		b.Fatal(err)
	}
	ctl := &memControllers{m: m}
	if m, err = ctl.Commit(b.Context(), volName, replication.Change{Attach: &replication.Attach{Node: "n1"}}); err != nil {
		b.Fatal(err)
	}
	e, err := Open(Config{Node: "n1", Controllers: ctl, Peers: peers, Logger: testLog(), Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming()}, m)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = e.Close() })
	if err := e.Live(b.Context()); err != nil {
		b.Fatal(err)
	}
	return e
}

// BenchmarkDevice compares a device in memory (0 replicas) with engines over such.
func BenchmarkDevice(b *testing.B) {
	for _, replicas := range []int{0, 1, 3} {
		for _, depth := range []int{1, 32} {
			for _, op := range []string{"write", "read"} {
				for _, size := range []int{4 << 10, 1 << 20} {
					if size > 4<<10 && depth > 1 {
						continue
					}
					b.Run(fmt.Sprintf("replicas=%d/depth=%d/%s/%dK", replicas, depth, op, size>>10), func(b *testing.B) {
						dev := benchDevice(b, replicas)
						b.SetBytes(int64(size))
						b.ReportAllocs()
						var next atomic.Int64
						var wg sync.WaitGroup
						for range depth {
							wg.Go(func() {
								p := make([]byte, size)
								p[0] = 1
								for {
									i := next.Add(1)
									if i > int64(b.N) {
										return
									}
									off := i * 7919 * int64(size) % benchSize
									f := dev.ReadAt
									if op == "write" {
										f = dev.WriteAt
									}
									if err := f(context.Background(), p, off); err != nil {
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
}
