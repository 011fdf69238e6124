package control_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestCreateSizes(t *testing.T) {
	for _, c := range []struct {
		name            string
		required, limit int64
		fs              string
		want            int64
		err             error
	}{
		{"none asked", 0, 0, "", volume.DefaultSize, nil},
		{"exact", gib, gib, "", gib, nil},
		{"rounded up", gib + 1, 0, "", gib + 4096, nil},
		{"rounding beyond the limit", gib + 1, gib + 2, "", 0, volume.ErrOutOfRange},
		{"only a limit", 0, 5*gib + 7, "", 5 * gib, nil},
		{"limit above the default", 0, 50 * gib, "", volume.DefaultSize, nil},
		{"limit below the least", 0, 4095, "", 0, volume.ErrOutOfRange},
		{"limit below required", 2 * gib, gib, "", 0, volume.ErrOutOfRange},
		{"one byte", 1, 0, "", volume.MinSize, nil},
		{"negative", -1, 0, "", 0, volume.ErrOutOfRange},
		{"too large", volume.MaxSize + 1, 0, "", 0, volume.ErrOutOfRange},
		{"overflow", 1<<63 - 1, 1<<63 - 1, "", 0, volume.ErrOutOfRange},
		{"xfs is raised", mib, 0, "xfs", 300 * mib, nil},
		{"xfs within the limit", mib, 299 * mib, "xfs", 0, volume.ErrOutOfRange},
		{"btrfs is raised", mib, 0, "btrfs", 128 * mib, nil},
		{"more than there is", 101 * gib, 0, "", 0, volume.ErrNoSpace},
		{"all there is", 100 * gib, 0, "", 100 * gib, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			r := create("v")
			r.RequiredBytes, r.LimitBytes = c.required, c.limit
			r.Capabilities[0].FSType = c.fs
			v, err := w.CreateVolume(context.Background(), r)
			wantErr(t, err, c.err)
			if v.Size != c.want {
				t.Errorf("size %d, want %d", v.Size, c.want)
			}
			w.check()
		})
	}
}

func TestCreateConflicts(t *testing.T) {
	base := func() control.CreateVolume {
		r := create("v")
		r.LimitBytes = 2 * gib
		r.Capabilities = append(r.Capabilities, volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeReaderOnly, MountFlags: []string{"noatime"}})
		r.Parameters.FSType = "xfs"
		r.QoS.IOPS = 10
		r.Requisite = []volume.NodeID{"n1"}
		return r
	}
	for _, c := range []struct {
		field  string // "" is compatible
		change func(r *control.CreateVolume)
	}{
		{"", func(r *control.CreateVolume) {}},
		{"", func(r *control.CreateVolume) { r.RequiredBytes = 0 }},
		{"", func(r *control.CreateVolume) { r.RequiredBytes, r.LimitBytes = gib/2, 0 }},
		{"", func(r *control.CreateVolume) {
			r.Capabilities[0], r.Capabilities[1] = r.Capabilities[1], r.Capabilities[0]
		}},
		{"", func(r *control.CreateVolume) { r.Preferred = []volume.NodeID{"n1"} }},
		{"", func(r *control.CreateVolume) { r.Requisite = []volume.NodeID{"n1", "n9"} }},
		{"", func(r *control.CreateVolume) { r.Requisite = nil }},
		{"", func(r *control.CreateVolume) { r.Parameters.Replicas = 1 }},
		{"required_bytes", func(r *control.CreateVolume) { r.RequiredBytes = gib + 1 }},
		{"limit_bytes", func(r *control.CreateVolume) { r.RequiredBytes, r.LimitBytes = 0, gib-1 }},
		{"capabilities", func(r *control.CreateVolume) { r.Capabilities = r.Capabilities[:1] }},
		{"capabilities", func(r *control.CreateVolume) { r.Capabilities[1].MountFlags = nil }},
		{"capabilities", func(r *control.CreateVolume) { r.Capabilities[0].Access = volume.AccessBlock }},
		{"tenant", func(r *control.CreateVolume) { r.Tenant = "other" }},
		{"fsType", func(r *control.CreateVolume) { r.Parameters.FSType = "" }},
		{"blockSize", func(r *control.CreateVolume) { r.Parameters.BlockSize = 512 }},
		{"dataLocality", func(r *control.CreateVolume) { r.Parameters.DataLocality = volume.LocalityNone }},
		{"pool", func(r *control.CreateVolume) { r.Parameters.Pool = "default" }},
		{"replicas", func(r *control.CreateVolume) { r.Parameters.Replicas = 2 }},
		{"IOPS", func(r *control.CreateVolume) { r.QoS.IOPS = 11 }},
		{"bandwidth", func(r *control.CreateVolume) { r.QoS.Bandwidth = mib }},
		{"source", func(r *control.CreateVolume) { r.Source = &volume.Source{Snapshot: "snap-none"} }},
		{"topology", func(r *control.CreateVolume) { r.Requisite = []volume.NodeID{"n9"} }},
	} {
		t.Run(c.field, func(t *testing.T) {
			w := newWorld(t)
			v := w.mustCreate(base())
			r := base()
			c.change(&r)
			got, err := w.CreateVolume(context.Background(), r)
			if c.field == "" {
				if err != nil || got.ID != v.ID {
					t.Errorf("got %s, %v", got.ID, err)
				}
			} else if !errors.Is(err, volume.ErrExists) || !strings.Contains(err.Error(), c.field) {
				t.Errorf("got %v, want a conflict in %s", err, c.field)
			}
			w.check()
		})
	}
}

func TestCreateRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(w *world, r *control.CreateVolume)
		err    error
		says   string
	}{
		{"no name", func(_ *world, r *control.CreateVolume) { r.Name = "" }, volume.ErrInvalid, "name"},
		{"long name", func(_ *world, r *control.CreateVolume) { r.Name = strings.Repeat("x", 129) }, volume.ErrInvalid, "129"},
		{"control character", func(_ *world, r *control.CreateVolume) { r.Name = "a\x00b" }, volume.ErrInvalid, "control"},
		{"no capability", func(_ *world, r *control.CreateVolume) { r.Capabilities = nil }, volume.ErrInvalid, "capabilities"},
		{"filesystem of many writers", func(_ *world, r *control.CreateVolume) { r.Capabilities[0].Mode = volume.MultiNodeMultiWriter }, volume.ErrInvalid, "block"},
		{"block with filesystem", func(_ *world, r *control.CreateVolume) {
			r.Capabilities[0] = volume.Capability{Access: volume.AccessBlock, Mode: volume.SingleNodeWriter, FSType: "xfs"}
		}, volume.ErrInvalid, "block"},
		{"unknown filesystem", func(_ *world, r *control.CreateVolume) { r.Parameters.FSType = "ntfs" }, volume.ErrInvalid, "ntfs"},
		{"negative limit", func(_ *world, r *control.CreateVolume) { r.QoS.IOPS = -1 }, volume.ErrInvalid, "IOPS"},
		{"bandwidth of a byte", func(_ *world, r *control.CreateVolume) { r.QoS.Bandwidth = 1 }, volume.ErrInvalid, "bandwidth"},
		{"replicas", func(_ *world, r *control.CreateVolume) { r.Parameters.Replicas = 6 }, volume.ErrInvalid, "replicas"},
		{"more replicas than nodes", func(_ *world, r *control.CreateVolume) { r.Parameters.Replicas = 3 }, volume.ErrNoSpace, "3 replicas"},
		{"unknown pool", func(_ *world, r *control.CreateVolume) { r.Parameters.Pool = "fast" }, volume.ErrNoSpace, "fast"},
		{"unknown node", func(_ *world, r *control.CreateVolume) { r.Requisite = []volume.NodeID{"n9"} }, volume.ErrNoSpace, "n9"},
		{"silent node", func(w *world, _ *control.CreateVolume) { w.now = w.now.Add(time.Hour) }, volume.ErrNoSpace, "not reported"},
		{"two sources", func(_ *world, r *control.CreateVolume) { r.Source = &volume.Source{Volume: "a", Snapshot: "b"} }, volume.ErrInvalid, "source"},
		{"unknown snapshot", func(_ *world, r *control.CreateVolume) { r.Source = &volume.Source{Snapshot: "snap-x"} }, volume.ErrNotFound, "snap-x"},
		{"unknown volume", func(_ *world, r *control.CreateVolume) { r.Source = &volume.Source{Volume: "vol-x"} }, volume.ErrNotFound, "vol-x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			r := create("v")
			c.change(w, &r)
			_, err := w.CreateVolume(context.Background(), r)
			wantErr(t, err, c.err)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
			}
			w.check()
		})
	}
}

func TestSources(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	r := create("src")
	r.Parameters.BlockSize = 512
	src := w.mustCreate(r)
	if err := w.SetFilesystem(ctx, src.ID, volume.Filesystem{Phase: volume.Formatting, Type: "xfs"}); err != nil {
		t.Fatal(err)
	}
	if err := w.SetFilesystem(ctx, src.ID, volume.Filesystem{Phase: volume.Formatted, Type: "xfs"}); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.SetFilesystem(ctx, src.ID, volume.Filesystem{Phase: volume.Formatting, Type: "xfs"}), volume.ErrInUse)
	w.agents.write(src.Replicas[0].ID, "bytes")
	x := w.mustSnapshot("s", src.ID)
	for i, from := range []volume.Source{{Volume: src.ID}, {Snapshot: x.ID}} {
		t.Run(fmt.Sprint(from), func(t *testing.T) {
			r := create(fmt.Sprint("v", i))
			r.Source = &from
			r.RequiredBytes = 2 * gib
			v := w.mustCreate(r)
			if v.Size != 2*gib || v.Parameters.BlockSize != 512 || v.Parameters.FSType != "xfs" || v.Filesystem.Phase != volume.Formatted {
				t.Errorf("%+v", v)
			}
			if got := w.agents.contents(v.Replicas[0].ID); got != "bytes" {
				t.Errorf("contents %q", got)
			}
			if again := w.mustCreate(r); again.ID != v.ID {
				t.Errorf("the same request made %s", again.ID)
			}
			for _, c := range []struct {
				change func(r *control.CreateVolume)
				err    error
			}{
				{func(r *control.CreateVolume) { r.RequiredBytes = gib / 2 }, volume.ErrOutOfRange},
				{func(r *control.CreateVolume) { r.RequiredBytes, r.LimitBytes = 0, gib/2 }, volume.ErrOutOfRange},
				{func(r *control.CreateVolume) { r.Capabilities[0].FSType = "ext4" }, volume.ErrInvalid},
				{func(r *control.CreateVolume) { r.Parameters.FSType = "ext4" }, volume.ErrInvalid},
				{func(r *control.CreateVolume) { r.Parameters.BlockSize = 4096 }, volume.ErrInvalid},
			} {
				r := create("other")
				r.Source = &from
				c.change(&r)
				_, err := w.CreateVolume(ctx, r)
				wantErr(t, err, c.err)
			}
			r = create(fmt.Sprint("default size ", i))
			r.Source, r.RequiredBytes = &from, 0
			if v := w.mustCreate(r); v.Size != gib {
				t.Errorf("size %d, the source has %d", v.Size, gib)
			}
		})
	}
	w.check()
	// The copy outlives what it was made from.
	if err := errors.Join(w.DeleteVolume(ctx, src.ID), w.DeleteSnapshot(ctx, x.ID)); err != nil {
		t.Fatal(err)
	}
	r = create("v1")
	r.Source, r.RequiredBytes = &volume.Source{Snapshot: x.ID}, 2*gib
	w.mustCreate(r)
	w.check()
}

func TestSourceIsPinnedWhileItIsCopied(t *testing.T) {
	ctx := context.Background()
	for _, kind := range []string{"snapshot", "volume"} {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t)
			src := w.mustCreate(create("src"))
			x := w.mustSnapshot("s", src.ID)
			from := &volume.Source{Snapshot: x.ID}
			if kind == "volume" {
				from = &volume.Source{Volume: src.ID}
			}
			r := create("v")
			r.Source = from
			w.f.arm(2, failBefore, nil)
			_, err := w.CreateVolume(ctx, r)
			wantErr(t, err, volume.ErrUnavailable)
			if kind == "snapshot" {
				wantErr(t, w.DeleteSnapshot(ctx, x.ID), volume.ErrInUse)
				wantErr(t, w.DeleteVolume(ctx, src.ID), nil)
			} else {
				wantErr(t, w.DeleteVolume(ctx, src.ID), volume.ErrInUse)
				wantErr(t, w.DeleteSnapshot(ctx, x.ID), nil)
			}
			w.mustCreate(r)
			wantErr(t, errors.Join(w.DeleteSnapshot(ctx, x.ID), w.DeleteVolume(ctx, src.ID)), nil)
			w.check()
		})
	}
}

// A filesystem made between the record and the cut must not be taken for a blank device: mkfs would be allowed on it.
func TestFormattedWhileItIsCopied(t *testing.T) {
	ctx := context.Background()
	for _, kind := range []string{"snapshot", "clone"} {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t)
			src := w.mustCreate(create("src"))
			r := create("v")
			r.Source = &volume.Source{Volume: src.ID}
			w.f.arm(2, failBefore, nil) // the record is there, the cut is not
			if kind == "clone" {
				_, err := w.CreateVolume(ctx, r)
				wantErr(t, err, volume.ErrUnavailable)
			} else {
				_, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s", Volume: src.ID})
				wantErr(t, err, volume.ErrUnavailable)
			}
			w.f.arm(0, "", nil)
			w.propose(command.SetFilesystem{Volume: src.ID, Filesystem: volume.Filesystem{Phase: volume.Formatted, Type: "ext4"}})
			var got volume.Filesystem
			if kind == "clone" {
				got = w.mustCreate(r).Filesystem
			} else {
				got = w.mustSnapshot("s", src.ID).Filesystem
			}
			if got.Phase != volume.Formatted {
				t.Errorf("the copy of a formatted volume says %+v", got)
			}
			w.check()
		})
	}
}

// A source that grows between the record and the cut gives a clone of its new size, or an honest refusal.
func TestGrownWhileItIsCopied(t *testing.T) {
	for _, c := range []struct {
		required int64
		err      error
	}{{0, nil}, {3 * gib, nil}, {gib, volume.ErrOutOfRange}} {
		w := newWorld(t)
		src := w.mustCreate(create("src"))
		r := create("v")
		r.Source, r.RequiredBytes = &volume.Source{Volume: src.ID}, c.required
		w.f.arm(2, failBefore, nil)
		_, err := w.CreateVolume(context.Background(), r)
		wantErr(t, err, volume.ErrUnavailable)
		if _, err := w.ExpandVolume(context.Background(), src.ID, 2*gib, 0); err != nil {
			t.Fatal(err)
		}
		v, err := w.CreateVolume(context.Background(), r)
		wantErr(t, err, c.err)
		if err == nil && v.Size != max(2*gib, c.required) {
			t.Errorf("size %d", v.Size)
		}
		w.check()
	}
}

func TestHundredIdenticalCreates(t *testing.T) {
	w := newWorld(t)
	ids := make([]volume.ID, 100)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			v, err := w.CreateVolume(context.Background(), create("v"))
			if err != nil {
				t.Error(err)
			}
			ids[i] = v.ID
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("two volumes: %s and %s", id, ids[0])
		}
	}
	w.check()
}

func TestParallelCreatesCannotPassTheQuotaOrThePool(t *testing.T) {
	for _, limit := range []string{"quota", "pool"} {
		t.Run(limit, func(t *testing.T) {
			w := newWorld(t)
			want := volume.ErrQuota
			n, size := 10, gib
			if limit == "quota" {
				if err := w.SetQuota(context.Background(), "default", volume.Amounts{LogicalBytes: 3 * gib}); err != nil {
					t.Fatal(err)
				}
			} else {
				want, size = volume.ErrNoSpace, 30*gib
			}
			var mu sync.Mutex
			made := 0
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					r := create(fmt.Sprint("v", i))
					r.RequiredBytes = size
					_, err := w.CreateVolume(context.Background(), r)
					if err == nil {
						mu.Lock()
						made++
						mu.Unlock()
					} else if !errors.Is(err, want) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if made != 3 {
				t.Errorf("%d volumes were made, 3 fit", made)
			}
			w.check()
		})
	}
}

// Calls of every kind at once on few names: whatever each of them answers, the state stays sound.
func TestEverythingAtOnce(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 40 {
				name := fmt.Sprint("v", (g+i)%3)
				r := create(name)
				v, err := w.CreateVolume(ctx, r)
				if err != nil {
					continue
				}
				switch (g + i) % 7 {
				case 0:
					_ = w.DeleteVolume(ctx, v.ID)
				case 1:
					_, _ = w.Attach(ctx, control.Attach{Volume: v.ID, Node: "n1", Capability: mount()[0]})
				case 2:
					_ = w.Detach(ctx, v.ID, "")
				case 3:
					_, _ = w.ExpandVolume(ctx, v.ID, v.Size+4096, 0)
				case 4:
					if x, err := w.CreateSnapshot(ctx, control.CreateSnapshot{Name: "s" + name, Volume: v.ID}); err == nil && i%2 == 0 {
						_ = w.DeleteSnapshot(ctx, x.ID)
					}
				case 5:
					r := create("clone of " + name)
					r.Source = &volume.Source{Volume: v.ID}
					if c, err := w.CreateVolume(ctx, r); err == nil {
						_ = w.DeleteVolume(ctx, c.ID)
					}
				case 6:
					if p, err := w.Pending(ctx); err == nil {
						for _, id := range p.Volumes {
							_ = w.ResumeVolume(ctx, id)
						}
						for _, id := range p.Snapshots {
							_ = w.ResumeSnapshot(ctx, id)
						}
					}
				}
			}
		})
	}
	wg.Wait()
	w.reconcile()
	w.check()
}
