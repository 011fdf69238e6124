package extentstore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestCallsAreIdempotentAndChecked(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	spec := ReplicaSpec{ID: "r", Volume: "v", Tenant: "t", Size: mib}
	must(t, p.CreateReplica(ctx, spec))
	must(t, p.CreateReplica(ctx, spec))
	must(t, p.Cut(ctx, "r", "blank"))
	r, err := p.OpenReplica(ctx, "r")
	must(t, err)
	must(t, r.WriteAt(ctx, make([]byte, 1), mib-1))
	must(t, r.Close())
	must(t, p.Cut(ctx, "r", "s"))
	must(t, p.Cut(ctx, "r", "s"))
	must(t, p.Resize(ctx, "r", 2*mib))
	must(t, p.Resize(ctx, "r", mib))
	must(t, p.CreateReplica(ctx, spec))
	must(t, p.CreateReplica(ctx, ReplicaSpec{ID: "c", Volume: "w", Size: mib, Parent: "s"}))
	must(t, p.DeleteReplica(ctx, "none"))
	must(t, p.DeleteSnapshot(ctx, "none", "", 0))
	open, err := p.OpenReplica(ctx, "r")
	must(t, err)
	snap, err := p.OpenSnapshot(ctx, "s")
	must(t, err)
	if !p.HasReplica("r") || p.HasReplica("x") || !hasSnapshot(p, "s") || hasSnapshot(p, "x") || len(p.Replicas()) != 2 {
		t.Error("what is there")
	}
	opened := func(_ Device, err error) error { return err }
	with := func(change func(*ReplicaSpec)) ReplicaSpec {
		s := ReplicaSpec{ID: "new", Volume: "v", Size: 2 * mib}
		change(&s)
		return s
	}
	none := func(int64, int64) error { return nil }
	for name, c := range map[string]struct{ got, want error }{
		"replica of another volume": {p.CreateReplica(ctx, ReplicaSpec{ID: "r", Volume: "w", Size: mib}), volume.ErrExists},
		"no id":                     {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.ID = "" })), volume.ErrInvalid},
		"long id":                   {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.ID = volume.ReplicaID(strings.Repeat("x", 129)) })), volume.ErrInvalid},
		"no volume":                 {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Volume = "" })), volume.ErrInvalid},
		"long tenant":               {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Tenant = strings.Repeat("x", 129) })), volume.ErrInvalid},
		"odd size":                  {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Size++ })), volume.ErrOutOfRange},
		"huge size":                 {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Size = volume.MaxSize * 2 })), volume.ErrOutOfRange},
		"no parent":                 {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Parent = "x" })), volume.ErrNotFound},
		"smaller, no data cut off":  {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.ID, s.Parent, s.Size = "half", "blank", mib/2 })), nil},
		"smaller than parent":       {p.CreateReplica(ctx, with(func(s *ReplicaSpec) { s.Parent, s.Size = "s", mib/2 })), volume.ErrOutOfRange},
		"cut of nothing":            {p.Cut(ctx, "x", "y"), volume.ErrNotFound},
		"cut without id":            {p.Cut(ctx, "r", ""), volume.ErrInvalid},
		"cut of another":            {p.Cut(ctx, "c", "s"), volume.ErrExists},
		"resize of nothing":         {p.Resize(ctx, "x", mib), volume.ErrNotFound},
		"resize to odd":             {p.Resize(ctx, "r", 3*mib+1), volume.ErrOutOfRange},
		"open of nothing":           {opened(p.OpenReplica(ctx, "x")), volume.ErrNotFound},
		"open twice":                {opened(p.OpenReplica(ctx, "r")), volume.ErrInUse},
		"open snapshot of nothing":  {opened(p.OpenSnapshot(ctx, "x")), volume.ErrNotFound},
		"delete open":               {p.DeleteReplica(ctx, "r"), volume.ErrInUse},
		"delete read":               {p.DeleteSnapshot(ctx, "s", "", 0), volume.ErrBusy},
		"write snapshot":            {snap.WriteAt(ctx, make([]byte, 512), 0), volume.ErrInvalid},
		"extents of nothing":        {p.Extents(ctx, "x", "", 0, none), volume.ErrNotFound},
		"extents since nothing":     {p.Extents(ctx, "s", "x", 0, none), volume.ErrNotFound},
		"extents before the start":  {p.Extents(ctx, "s", "", -1, none), volume.ErrOutOfRange},
		"extents after the end":     {p.Extents(ctx, "s", "", mib+1, none), nil},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
	must(t, snap.Close())
	must(t, snap.Close())
	must(t, p.DeleteSnapshot(ctx, "s", "", 0))
	must(t, open.Close())
	must(t, open.Close())
	must(t, p.Cut(ctx, "r", "a"))
	must(t, p.Cut(ctx, "c", "b"))
	if err := p.Extents(ctx, "a", "b", 0, none); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("extents between two branches: %v", err)
	}
}

func TestUsage(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 16*mib, "")
	must(t, d.WriteAt(ctx, make([]byte, 3*layer.ExtentSize), 0))
	must(t, p.Cut(ctx, "r", "s1"))
	must(t, d.WriteAt(ctx, make([]byte, layer.BlockSize), 0))
	must(t, p.Cut(ctx, "r", "s2"))
	expect := func(r, s1, s2, c, deleted int64) {
		t.Helper()
		u := p.Usage()
		for name, x := range map[string][2]int64{
			"replica": {u.Replicas["r"], r}, "s1": {u.Snapshots["s1"], s1}, "s2": {u.Snapshots["s2"], s2},
			"clone": {u.Replicas["c"], c}, "deleted": {u.Deleted, deleted},
		} {
			if x[0] != x[1]*layer.ExtentSize {
				t.Errorf("%s has %d extents, want %d", name, x[0]/layer.ExtentSize, x[1])
			}
		}
	}
	expect(0, 3, 1, 0, 0)
	must(t, p.DeleteSnapshot(ctx, "s1", "", 0))
	expect(0, 0, 4, 0, 0)
	settle(t, p)
	expect(0, 0, 3, 0, 0)
	// What a clone and its source share is the source's, as long as there is one.
	c := newReplica(t, p, "c", 16*mib, "s2")
	must(t, p.DeleteSnapshot(ctx, "s2", "", 0))
	settle(t, p)
	expect(3, 0, 0, 0, 0)
	must(t, c.WriteAt(ctx, make([]byte, layer.BlockSize), 0))
	expect(3, 0, 0, 1, 0)
	must(t, d.Close())
	must(t, p.DeleteReplica(ctx, "r"))
	expect(0, 0, 0, 4, 0)
	settle(t, p)
	expect(0, 0, 0, 3, 0)
	must(t, c.Close())
	must(t, p.DeleteReplica(ctx, "c"))
	settle(t, p)
	expect(0, 0, 0, 0, 0)
	if used := p.Info().Used; used != 0 {
		t.Errorf("%d bytes used", used)
	}
}

func TestWritten(t *testing.T) {
	p := openMem(t, newMachine(), Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	ctx := t.Context()
	d := newReplica(t, p, "r", 32*mib, "")
	expect := func(id volume.ReplicaID, want bool) {
		t.Helper()
		if got, err := p.Written(ctx, id); got != want || err != nil {
			t.Errorf("%s written: %v, want %v: %v", id, got, want, err)
		}
	}
	expect("r", false)
	must(t, d.Zero(ctx, 0, 32*mib))
	must(t, p.Cut(ctx, "r", "blank"))
	newReplica(t, p, "of-blank", 32*mib, "blank")
	expect("of-blank", false)
	must(t, d.WriteAt(ctx, make([]byte, 1), 20*mib))
	expect("r", true)
	must(t, p.Cut(ctx, "r", "s"))
	c := newReplica(t, p, "c", 32*mib, "s")
	expect("r", true)
	expect("c", true)
	must(t, p.DeleteSnapshot(ctx, "s", "", 0))
	settle(t, p)
	expect("c", true)
	expect("of-blank", false)
	must(t, c.Zero(ctx, 0, 32*mib))
	expect("c", false) // the layers below still have it, hidden
	expect("r", true)
	if _, err := p.Written(ctx, "x"); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("no replica: %v", err)
	}
}

// damaged makes a pool in files, lets change damage its database, and returns its directory.
func damaged(t *testing.T, change func(t *testing.T, d *deps)) string {
	dir := t.TempDir()
	p := openDir(t, dir, Options{manual: true, Capacity: 64 * mib})
	d := newReplica(t, p, "r", 16*mib, "")
	for i := range int64(4) {
		must(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{byte(i + 1)}, layer.ExtentSize), i*layer.ExtentSize))
	}
	must(t, p.Cut(t.Context(), "r", "s"))
	must(t, d.WriteAt(t.Context(), make([]byte, layer.ExtentSize), 0))
	settle(t, p)
	must(t, p.Close())
	var ports deps
	must(t, ports.open(dir, true, true))
	change(t, &ports)
	must(t, ports.close())
	return dir
}

func TestDamageIsFound(t *testing.T) {
	rewrite := func(t *testing.T, d *deps, layerID uint64, change func(*layer.Page)) {
		key := pageKey(keyPage, layerID, 0)
		b, err := d.kv.Get(key)
		must(t, err)
		var pg layer.Page
		must(t, pg.Decode(b))
		change(&pg)
		must(t, d.kv.Commit([]op{{key, pg.Append(nil)}}))
	}
	for name, c := range map[string]struct {
		change  func(t *testing.T, d *deps)
		problem string
		opens   bool
		// exports tells what can be exported even so: "r" the replica, "s" the snapshot.
		exports string
	}{
		"nothing": {func(*testing.T, *deps) {}, "", true, "rs"},
		"two owners": {func(t *testing.T, d *deps) {
			rewrite(t, d, 1, func(pg *layer.Page) { pg[3].Slot = pg[1].Slot })
		}, "slot 2 is of layer 1", false, "rs"},
		"owners in two layers": {func(t *testing.T, d *deps) {
			rewrite(t, d, 2, func(pg *layer.Page) { pg[0].Slot = 3 })
		}, "and of layer 2", false, "rs"},
		"slot outside": {func(t *testing.T, d *deps) {
			rewrite(t, d, 1, func(pg *layer.Page) { pg[3].Slot = 1 << 30 })
		}, "beyond the data file", false, ""},
		"block outside": {func(t *testing.T, d *deps) {
			var pg layer.Page
			pg[5] = layer.Entry{Zero: 1}
			must(t, d.kv.Commit([]op{{pageKey(keyPage, 1, 2), pg.Append(nil)}}))
		}, "beyond the end", true, "rs"},
		"flipped bit": {func(t *testing.T, d *deps) {
			b := make([]byte, layer.BlockSize)
			off := 2*layer.ExtentSize + 5*int64(layer.BlockSize)
			must(t, d.file.ReadAt(b, off))
			b[17] ^= 4
			must(t, d.file.WriteAt(b, off))
		}, "the bytes in slot 2 have checksum", true, "rs"},
		"lost checksums": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{key: pageKey(keySums, 1, 0)}}))
		}, "lost its checksums", true, "rs"},
		"lost layer": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{key: layerKey(1)}}))
		}, "refers to layer 1", false, ""},
		"circle": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{layerKey(1), layerRecord{parent: 2}.encode()}}))
		}, "missing or younger", false, ""},
		"broken page": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{pageKey(keyPage, 1, 0), []byte{1, 2, 3}}}))
		}, "page 0 of layer 1", false, ""},
		"another pool's file": {func(t *testing.T, d *deps) {
			b := make([]byte, layer.BlockSize)
			copy(b, encodeSuper(poolRecord{formatVersion, "other", volume.PoolDir}))
			must(t, d.file.WriteAt(b, 0))
		}, "of pool other", false, ""},
		"lost database": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{key: []byte{keyPool}}}))
		}, "no record", false, "rs"},
		"lost protocol state": {func(t *testing.T, d *deps) {
			b := encodeState([]byte("opaque"))
			b[7] ^= 1
			must(t, d.kv.Commit([]op{{journalKey(keyState, 1), b}}))
		}, "protocol's state: corrupt", true, "rs"},
		"lost write-intent log": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{journalKey(keyWIL, 1, 0), []byte("?")}}))
		}, "write-intent log: corrupt", true, "rs"},
		"journal of nobody": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{journalKey(keyWIL, 77, 0), []byte("?")}}))
		}, "", true, "rs"},
		"future": {func(t *testing.T, d *deps) {
			must(t, d.kv.Commit([]op{{[]byte{keyPool}, poolRecord{9, "p", volume.PoolDir}.encode()}}))
		}, "format 9", false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := damaged(t, c.change)
			r, err := Check(t.Context(), dir, nil)
			must(t, err)
			all := strings.Join(r.Problems, "\n")
			if c.problem == "" && all != "" || !strings.Contains(all, c.problem) {
				t.Errorf("check says %q, want %q", all, c.problem)
			}
			if c.problem == "" && (r.Verified != 4 || r.Stale != 1) {
				t.Errorf("%+v", r)
			}
			for what, snap := range map[string]volume.SnapshotID{"r": "", "s": "s"} {
				f, err := os.Create(filepath.Join(t.TempDir(), "image"))
				must(t, err)
				err = Export(t.Context(), dir, "vol-r", snap, f, nil)
				if (err == nil) != strings.Contains(c.exports, what) {
					t.Errorf("export of %s: %v", what, err)
				}
				must(t, f.Close())
			}
			p, err := Open(t.Context(), dir, Options{Reserve: mib, Capacity: 64 * mib})
			if (err == nil) != c.opens {
				t.Errorf("open: %v", err)
			}
			if err == nil {
				must(t, p.Close())
			}
		})
	}
}

func loopDevice(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	out, err := exec.CommandContext(t.Context(), "losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { must(t, run(context.Background(), "losetup", "--detach", device)) })
	return device
}

func TestRawDisk(t *testing.T) {
	device := loopDevice(t, 512*mib)
	dir := t.TempDir()
	o := Options{Kind: volume.PoolDisk, Device: device, Reserve: 16 * mib}
	p, err := Open(t.Context(), dir, o)
	must(t, err)
	info := p.Info()
	if info.Kind != volume.PoolDisk || info.Capacity < 200*mib {
		t.Errorf("pool is %+v", info)
	}
	d := newReplica(t, p, "r", 64*mib, "")
	want := bytes.Repeat([]byte{9}, 5*mib)
	must(t, d.WriteAt(t.Context(), want, mib))
	must(t, d.Close())
	must(t, p.Close())

	// The disk brings its replicas along, wherever it is mounted, and is not wiped by accident.
	o.Wipe = true
	p, err = Open(t.Context(), t.TempDir(), o)
	must(t, err)
	if p.ID() != info.ID || p.Info().Capacity != info.Capacity {
		t.Errorf("after moving, the pool is %+v, was %+v", p.Info(), info)
	}
	d, err = p.OpenReplica(t.Context(), "r")
	must(t, err)
	got := make([]byte, len(want))
	must(t, d.ReadAt(t.Context(), got, mib))
	if !bytes.Equal(got, want) {
		t.Error("bytes are lost")
	}
	if _, err := Open(t.Context(), t.TempDir(), o); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, p.Close())
}

func put(t *testing.T, device string, b []byte, off int64) {
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(b, off)
	must(t, errors.Join(err, f.Sync(), f.Close()))
}

func TestRawDiskIsNotOverwritten(t *testing.T) {
	for name, fill := range map[string]func(t *testing.T, device string){
		"filesystem": func(t *testing.T, device string) { must(t, run(t.Context(), "mkfs.ext4", "-q", device)) },
		"partitions": func(t *testing.T, device string) {
			mbr := make([]byte, 512)
			mbr[446+4], mbr[446+9], mbr[446+13] = 0x83, 8, 64 // type, first sector, length
			mbr[510], mbr[511] = 0x55, 0xaa
			put(t, device, mbr, 0)
		},
		"something": func(t *testing.T, device string) {
			put(t, device, []byte("x"), 700_000)
		},
	} {
		t.Run(name, func(t *testing.T) {
			device := loopDevice(t, 300*mib)
			fill(t, device)
			o := Options{Kind: volume.PoolDisk, Device: device, Reserve: 16 * mib}
			if _, err := Open(t.Context(), t.TempDir(), o); !errors.Is(err, volume.ErrExists) {
				t.Fatalf("a disk that carries something: %v", err)
			}
			o.Wipe = true
			p, err := Open(t.Context(), t.TempDir(), o)
			must(t, err)
			must(t, p.Close())
		})
	}
	if _, err := Open(t.Context(), t.TempDir(), Options{Kind: volume.PoolDisk, Device: "/dev/none"}); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("no disk: %v", err)
	}
	if _, err := Open(t.Context(), t.TempDir(), Options{Kind: volume.PoolDisk, Device: "/etc/passwd"}); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("not a disk: %v", err)
	}
}
