package metaraft

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What clients do with one name: take it where it is free, look who has it, give it back.
type nameInput struct {
	op string // take, look or give
	id volume.ID
}

type nameOutput struct {
	unknown bool
	holder  volume.ID
}

var nameModel = porcupine.Model{
	Init: func() any { return volume.ID("") },
	Step: func(state, input, output any) (bool, any) {
		holder, in, out := state.(volume.ID), input.(nameInput), output.(nameOutput)
		switch in.op {
		case "take":
			if holder == "" {
				holder = in.id
			}
			return out.unknown || out.holder == holder, holder
		case "give":
			if holder == in.id {
				holder = ""
			}
			return true, holder
		}
		return out.unknown || out.holder == holder, holder
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
}

// Whatever happens to controllers and to the network between them, what clients of all of them see is one history.
func TestOneHistoryUnderFaults(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	if _, err := c.nodes[0].store.Propose(within(t), registerNode()); err != nil {
		t.Fatal(err)
	}
	const clients, lasting, enough = 6, 8 * time.Second, 60
	stores := make([]atomic.Pointer[Store], len(c.nodes))
	for i, x := range c.nodes {
		stores[i].Store(x.store)
	}
	began := time.Now()
	var mu sync.Mutex
	var history []porcupine.Operation
	var ids, known atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			var mine volume.ID
			for {
				select {
				case <-stop:
					return
				default:
				}
				s := stores[rand.IntN(len(stores))].Load()
				if s == nil {
					continue
				}
				in := nameInput{op: []string{"take", "look", "give"}[rand.IntN(3)], id: mine}
				if in.op == "take" || mine == "" && in.op == "give" {
					in = nameInput{op: "take", id: volume.ID(fmt.Sprint("vol-", ids.Add(1)))}
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(200+rand.IntN(4000))*time.Millisecond)
				op := porcupine.Operation{ClientId: client, Input: in, Call: int64(time.Since(began))}
				out := nameDo(ctx, t, s, in)
				cancel()
				op.Output, op.Return = out, int64(time.Since(began))
				if out.unknown {
					if op.Return = int64(time.Hour); in.op == "look" {
						continue
					}
				} else {
					known.Add(1)
				}
				if in.op == "take" {
					mine = in.id
				}
				mu.Lock()
				history = append(history, op)
				mu.Unlock()
			}
		})
	}
	faults := 0
	for time.Since(began) < lasting || known.Load() < enough && time.Since(began) < 6*lasting {
		time.Sleep(time.Duration(100+rand.IntN(300)) * time.Millisecond)
		n := rand.IntN(len(c.nodes))
		x := c.nodes[n]
		faults++
		switch rand.IntN(4) {
		case 0:
			c.isolate(n)
			time.Sleep(time.Duration(rand.IntN(1200)) * time.Millisecond)
			c.restore(n)
		case 1:
			to := (n + 1 + rand.IntN(2)) % 3
			c.cut(n, to)
			time.Sleep(time.Duration(rand.IntN(1200)) * time.Millisecond)
			c.heal(n, to)
		case 2:
			stores[n].Store(nil)
			x.stop()
			time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
			x.start()
			stores[n].Store(x.store)
		case 3:
			x.hang <- struct{}{}
			time.Sleep(time.Duration(rand.IntN(1200)) * time.Millisecond)
			<-x.hang
		}
	}
	close(stop)
	wg.Wait()
	c.settled(3)
	for _, x := range c.nodes {
		if err := x.store.Failed(); err != nil {
			t.Errorf("%s: %v", x.id, err)
		}
	}
	t.Logf("%d faults, %d operations, %d of known outcome", faults, len(history), known.Load())
	if known.Load() < enough {
		t.Error("hardly anything was done")
	}
	if r := porcupine.CheckOperationsTimeout(nameModel, history, time.Minute); r != porcupine.Ok {
		for _, op := range history {
			t.Logf("%d %8.1f-%8.1f ms %s", op.ClientId, float64(op.Call)/1e6, float64(op.Return)/1e6, nameModel.DescribeOperation(op.Input, op.Output))
		}
		t.Errorf("the history is %s", r)
	}
}

func nameDo(ctx context.Context, t *testing.T, s *Store, in nameInput) nameOutput {
	unknown := func(err error) bool {
		if errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
			return true
		}
		t.Errorf("%+v: %v", in, err)
		return true
	}
	switch in.op {
	case "take":
		v := testVolume()
		v.ID, v.Size = in.id, volume.MinSize
		v.Replicas[0].ID = volume.ReplicaID(in.id + "-r")
		r, err := s.Propose(ctx, command.CreateVolume{Volume: v})
		if err != nil {
			return nameOutput{unknown: unknown(err)}
		}
		x := r.(command.Volume)
		if x.Created != (x.Volume.ID == in.id) {
			t.Errorf("%+v: made %v, answered %s", in, x.Created, x.Volume.ID)
		}
		return nameOutput{holder: x.Volume.ID}
	case "give":
		if _, err := s.Propose(ctx, command.BeginDelete{Volume: in.id}); err != nil && !errors.Is(err, volume.ErrNotFound) {
			return nameOutput{unknown: unknown(err)}
		}
		return nameOutput{}
	}
	v, err := s.VolumeByName(ctx, "name")
	if errors.Is(err, volume.ErrNotFound) {
		return nameOutput{}
	}
	if err != nil {
		return nameOutput{unknown: unknown(err)}
	}
	return nameOutput{holder: v.ID}
}
