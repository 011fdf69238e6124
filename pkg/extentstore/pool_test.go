package extentstore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const mib = 1 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openDir(t testing.TB, dir string, o Options) *Pool {
	t.Helper()
	if o.Reserve == 0 {
		o.Reserve = mib
	}
	p, err := Open(t.Context(), dir, o)
	must(t, err)
	return p
}

func newReplica(t testing.TB, p *Pool, id volume.ReplicaID, size int64, parent volume.SnapshotID) *Replica {
	t.Helper()
	must(t, p.CreateReplica(t.Context(), ReplicaSpec{ID: id, Volume: "vol-" + volume.ID(id), Tenant: "t", Size: size, Parent: parent}))
	d, err := p.OpenReplica(t.Context(), id)
	must(t, err)
	return d
}

func hasSnapshot(p *Pool, id volume.SnapshotID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.snapshots[id] != nil
}

// settle does all background work that there is.
func settle(t testing.TB, p *Pool) {
	t.Helper()
	for more := true; more; {
		var err error
		more, err = p.step()
		must(t, err)
	}
}

func TestDeviceConformance(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(t *testing.T) *Pool{
		"files": func(t *testing.T) *Pool { return openDir(t, t.TempDir(), Options{Capacity: 1 << 30}) },
		"memory": func(t *testing.T) *Pool {
			p, err := newMachine().open(Options{Capacity: 1 << 30})
			must(t, err)
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				p := open(t)
				t.Cleanup(func() { must(t, p.Close()) })
				return newReplica(t, p, "r", size, "")
			})
		})
		t.Run(name+" on a snapshot", func(t *testing.T) {
			t.Parallel()
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				p := open(t)
				t.Cleanup(func() { must(t, p.Close()) })
				d := newReplica(t, p, "r", size, "")
				must(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{7}, int(min(size, 3*mib))), 0))
				must(t, d.Zero(t.Context(), 0, size))
				must(t, p.Cut(t.Context(), "r", "s"))
				return newReplica(t, p, "c", size, "s")
			})
		})
	}
}

func TestReopen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := openDir(t, dir, Options{})
	id := p.ID()
	d := newReplica(t, p, "r", 64*mib, "")
	want := bytes.Repeat([]byte("ballast!"), 20000)
	must(t, d.WriteAt(t.Context(), want, 12345))
	must(t, p.Cut(t.Context(), "r", "s"))
	must(t, d.WriteAt(t.Context(), []byte("after"), 12345))
	must(t, p.Close())

	_, err := Open(t.Context(), dir, Options{ID: "another"})
	if !errors.Is(err, volume.ErrInvalid) {
		t.Fatalf("opened under another id: %v", err)
	}
	p = openDir(t, dir, Options{})
	if p.ID() != id {
		t.Fatalf("id is %s, was %s", p.ID(), id)
	}
	if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, volume.ErrInUse) {
		t.Fatalf("second opener: %v", err)
	}
	if _, err := Check(t.Context(), dir, nil); !errors.Is(err, volume.ErrInUse) {
		t.Fatalf("check of an open pool: %v", err)
	}
	s, err := p.OpenSnapshot(t.Context(), "s")
	must(t, err)
	got := make([]byte, len(want))
	must(t, s.ReadAt(t.Context(), got, 12345))
	if !bytes.Equal(got, want) {
		t.Fatal("snapshot changed")
	}
	must(t, s.Close())
	d, err = p.OpenReplica(t.Context(), "r")
	must(t, err)
	must(t, d.ReadAt(t.Context(), got, 12345))
	if !bytes.Equal(got, append([]byte("after"), want[5:]...)) {
		t.Fatal("volume changed")
	}
	must(t, p.Close())

	var progress []int64
	r, err := Check(t.Context(), dir, func(done, total int64) { progress = append(progress, done, total) })
	must(t, err)
	if n := len(progress); n == 0 || progress[n-2] != progress[n-1] {
		t.Errorf("progress of the check: %v", progress)
	}
	progress = nil
	list, err := List(t.Context(), dir)
	must(t, err)
	contents := []VolumeContents{{ID: "vol-r", Replica: "r", Tenant: "t", Size: 64 * mib, Physical: layer.ExtentSize,
		Snapshots: []SnapshotContents{{ID: "s", Size: 64 * mib, Physical: 3 * layer.ExtentSize}}}}
	if diff := cmp.Diff(contents, list); diff != "" {
		t.Errorf("list: %s", diff)
	}
	if len(r.Problems) > 0 || r.Replicas != 1 || r.Snapshots != 1 || r.Layers != 2 {
		t.Fatalf("check: %+v", r)
	}
	for snap, first := range map[volume.SnapshotID]string{"": "after", "s": "balla"} {
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		must(t, err)
		must(t, Export(context.Background(), dir, "vol-r", snap, f, func(done, total int64) { progress = append(progress, done, total) }))
		must(t, f.Close())
		b, err := os.ReadFile(f.Name())
		must(t, err)
		image := make([]byte, 64*mib)
		copy(image[12345:], want)
		copy(image[12345:], first)
		if !bytes.Equal(b, image) {
			t.Errorf("export of %q differs", snap)
		}
	}
	if n := len(progress); n == 0 || progress[n-2] != progress[n-1] {
		t.Errorf("progress of the export: %v", progress)
	}
	if err := Export(t.Context(), dir, "vol-x", "", nil, nil); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("export of an unknown volume: %v", err)
	}
	if _, err := Check(t.Context(), t.TempDir(), nil); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("check of nothing: %v", err)
	}
}
