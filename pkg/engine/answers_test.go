package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// garbling has changes applied, and what is answered come back as something else.
type garbling struct {
	*world
	on atomic.Bool
}

func (g *garbling) Commit(ctx context.Context, id volume.ID, c replication.Change) (replication.Membership, error) {
	m, err := g.world.Commit(ctx, id, c)
	if g.on.Load() {
		return replication.Membership{}, errors.New("stream ended by the other side")
	}
	return m, err
}

// An answer without a record says nothing of whether the change was made.
func TestAnswerWithoutRecord(t *testing.T) {
	w := newWorld(t, 2, 8*mib)
	g := &garbling{world: w}
	w.cfg.Controllers = g
	e := w.attach("n1", false)
	if err := e.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	g.on.Store(true)
	w.partition("r2", true)
	waits := make(chan error, 1)
	go func() { waits <- e.WriteAt(t.Context(), make([]byte, 4096), 4096) }()
	w.waitISR("r1")
	select {
	case err := <-waits:
		t.Fatalf("a write was answered while it was not known who is in sync: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	g.on.Store(false)
	select {
	case err := <-waits:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("the write still waits: %+v", e.Status())
	}
}

// A record that is older than what the engine knows takes no replica from it.
func TestLearnOlder(t *testing.T) {
	w := newWorld(t, 1, 8*mib)
	e := w.attach("n1", false)
	older := w.members()
	a := member(2)
	w.host(a, 8*mib)
	m, err := w.Commit(t.Context(), volName, replication.Change{AddReplica: &a})
	if err != nil {
		t.Fatal(err)
	}
	w.partition("r2", true)
	e.Learn(m)
	e.Learn(older)
	w.partition("r2", false)
	w.waitISR("r1", "r2")
}

// A snapshot that cannot be cut now is no failed sync.
func TestSealRefused(t *testing.T) {
	for _, test := range []struct {
		err  error
		want replication.Status
	}{
		{volume.ErrBusy, replication.StatusRefused},
		{volume.ErrNoSpace, replication.StatusRefused},
		{volume.ErrExists, replication.StatusRefused},
		{errors.Join(volume.ErrUnavailable, volume.ErrNoSpace), replication.StatusIO}, // the store has failed
		{errors.New("i/o error"), replication.StatusIO},
		{block.ErrClosed, replication.StatusIO},
	} {
		if got := status(replication.StoreSeal, test.err); got != test.want {
			t.Errorf("%v: %v, not %v", test.err, got, test.want)
		}
	}
	if got := status(replication.StoreWrite, volume.ErrNoSpace); got != replication.StatusIO {
		t.Errorf("a write without space: %v", got)
	}
}
