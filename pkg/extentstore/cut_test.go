package extentstore

import (
	"bytes"
	"errors"
	"testing"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// A seal that takes longer than the barrier is given up while it is under way: nothing of it may be left, not even after a
// restart, and the name is free for a later barrier.
func TestGivenUpWhileItIsSealed(t *testing.T) {
	for name, seal := range map[string]func(p *Pool, r *Replica) error{
		"by a barrier": func(_ *Pool, r *Replica) error { return r.Seal(t.Context(), "s", 3) },
		"without one":  func(p *Pool, r *Replica) error { return p.Cut(t.Context(), "r", "s") },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
			ctx := t.Context()
			d := newReplica(t, p, "r", 64*mib, "")
			must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, layer.ExtentSize), 0))
			layers := len(p.layers)

			st := p.stripe(0)
			st.Lock() // the disk takes its time
			sealed := make(chan error, 1)
			go func() { sealed <- seal(p, d) }()
			eventually(t, "a seal under way", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return len(p.cuts.running) == 1
			})
			must(t, p.DeleteSnapshot(ctx, "s", "", 3))
			st.Unlock()
			if err := <-sealed; !errors.Is(err, volume.ErrBusy) {
				t.Errorf("the seal ended with %v", err)
			}
			if hasSnapshot(p, "s") || len(p.layers) != layers || len(p.cuts.running) != 0 {
				t.Error("something of the snapshot is left")
			}
			must(t, d.Seal(ctx, "s", 4))
			must(t, d.Close())
			must(t, p.Close())
			m = m.reopen()
			sound(t, m)
			p = openMem(t, m, Options{Capacity: 64 * mib, manual: true})
			defer p.Close()
			if s := p.snapshots["s"]; s == nil || s.number != 4 {
				t.Errorf("after a restart: %+v", s)
			}
		})
	}
}

// An order that was given up may come after the one to delete what it made.
func TestSealAfterItWasGivenUp(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	must(t, p.DeleteSnapshot(ctx, "s", "", 3))
	for number := uint64(2); number <= 3; number++ {
		if err := d.Seal(ctx, "s", number); !errors.Is(err, volume.ErrBusy) {
			t.Errorf("seal by barrier %d: %v", number, err)
		}
	}
	must(t, d.Seal(ctx, "other", 3))
	must(t, d.Seal(ctx, "s", 4))
	must(t, p.DeleteSnapshot(ctx, "s", "", 3)) // once more, and late
	if !hasSnapshot(p, "s") {
		t.Error("what a later barrier cut is gone")
	}
	// What a pool only lets go of may come back to it.
	must(t, p.DeleteSnapshot(ctx, "other", "", 0))
	must(t, d.Seal(ctx, "other", 3))
	for i := range 2 * maxOver {
		must(t, p.DeleteSnapshot(ctx, volume.SnapshotID(rune(i)), "", 1))
	}
	if len(p.cuts.over) > maxOver || len(p.cuts.order) > maxOver {
		t.Errorf("%d snapshots that were given up are remembered", len(p.cuts.over))
	}
}

// A crash between the seal and the order to give it up: the layer is there, and goes.
func TestGivenUpAfterARestart(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{1}, layer.ExtentSize), 0))
	must(t, d.Seal(ctx, "s", 3))
	must(t, d.WriteAt(ctx, bytes.Repeat([]byte{2}, layer.ExtentSize), 0))
	must(t, d.Flush(ctx))
	m = m.crash(1)
	p = openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	if !hasSnapshot(p, "s") {
		t.Fatal("the crash took the seal")
	}
	must(t, p.DeleteSnapshot(ctx, "s", "", 3))
	settle(t, p)
	if u := p.Usage(); len(p.layers) != 1 || u.Replicas["r"] != layer.ExtentSize {
		t.Errorf("%d layers, %+v", len(p.layers), u)
	}
	must(t, p.Close())
	m = m.crash(2)
	sound(t, m)
	p = openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	if hasSnapshot(p, "s") || len(p.layers) != 1 {
		t.Errorf("%d layers after another crash", len(p.layers))
	}
}

// A delete that names a replica leaves alone what another has sealed or is sealing.
func TestDeleteOfAReplicasSnapshot(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 64*mib, "")
	running := &cutting{replica: "r", snap: "s"}
	p.cuts.running = append(p.cuts.running, running)
	must(t, p.DeleteSnapshot(ctx, "s", "old", 0))
	if running.over {
		t.Error("another replica's seal was given up")
	}
	p.endCut(running)
	must(t, d.Seal(ctx, "s", 1))
	must(t, p.DeleteSnapshot(ctx, "s", "old", 0))
	if !hasSnapshot(p, "s") {
		t.Error("another replica's snapshot is gone")
	}
	must(t, p.DeleteSnapshot(ctx, "s", "r", 0))
	if hasSnapshot(p, "s") {
		t.Error("the snapshot is still there")
	}
}
