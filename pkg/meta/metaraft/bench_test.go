package metaraft

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

type proposer interface {
	Propose(ctx context.Context, c command.Command) (command.Result, error)
	VolumeByName(ctx context.Context, name string) (volume.Volume, error)
}

// BenchmarkPropose compares a state that is changed alone with one behind a log of one and of three controllers, all of
// them on one disk: the leader is asked, a follower is asked, many ask at once.
func BenchmarkPropose(b *testing.B) {
	alone := func(b *testing.B) proposer {
		s, err := meta.Open(b.TempDir(), meta.Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = s.Close() })
		return s
	}
	of := func(n int, follower bool) func(b *testing.B) proposer {
		return func(b *testing.B) proposer {
			quick.heartbeat = time.Second
			defer func() { quick.heartbeat = 250 * time.Millisecond }()
			c := newCluster(b, n)
			leader := c.settled(n)
			if follower {
				return c.follower(leader).store
			}
			return leader.store
		}
	}
	for _, where := range []struct {
		name string
		open func(b *testing.B) proposer
	}{{"alone", alone}, {"one", of(1, false)}, {"three", of(3, false)}, {"three-follower", of(3, true)}} {
		for _, at := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/%d", where.name, at), func(b *testing.B) {
				s := where.open(b)
				var n atomic.Int64
				b.SetParallelism(at)
				b.ResetTimer()
				run := func() {
					if _, err := s.Propose(context.Background(), command.SetQuota{Tenant: fmt.Sprint("t", n.Add(1)%1000), Limit: volume.Amounts{Volumes: n.Load()}}); err != nil {
						b.Error(err)
					}
				}
				if at == 1 {
					for b.Loop() {
						run()
					}
					return
				}
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						run()
					}
				})
			})
		}
		b.Run(where.name+"/read", func(b *testing.B) {
			s := where.open(b)
			for b.Loop() {
				_, _ = s.VolumeByName(context.Background(), "none")
			}
		})
	}
}
