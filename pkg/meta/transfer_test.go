package meta

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func machine(t testing.TB, dir string, o Options) *Machine {
	t.Helper()
	o.InMemory = dir == ""
	m, err := OpenMachine(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func checkpoint(t testing.TB, m *Machine) []byte {
	t.Helper()
	c, err := m.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b bytes.Buffer
	if err := c.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// shared is what two copies of one state have in common.
func shared(t testing.TB, m *Machine) map[string]string {
	d := dump(t, m)
	delete(d, keyShared)
	return d
}

func someLog(n int) []Entry {
	log := []Entry{{Index: 1, Kind: KindCommand, Body: must(command.Encode(node("n1", "p1")))}}
	for i := range n {
		v := newVolume(i, "p1")
		v.Size = mib
		for _, c := range []command.Command{command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID},
			command.BeginSnapshot{ID: volume.SnapshotID(fmt.Sprint("s", i)), Name: fmt.Sprint("s", i), Volume: v.ID}} {
			e := Entry{Index: uint64(2 + len(log)), Kind: KindCommand, Body: must(command.Encode(c))}
			e.ID[0], e.ID[1], e.Since = byte(len(log)), 1, e.Index-1
			log = append(log, e)
		}
	}
	return log
}

func must[T any](x T, err error) T {
	if err != nil {
		panic(err)
	}
	return x
}

// A machine that takes over another one's state and goes on with the log, from any index of it on, ends like the other.
func TestRestoreThenTheLog(t *testing.T) {
	log := someLog(40)
	for _, onDisk := range []bool{false, true} {
		dir, dir2 := "", ""
		if onDisk {
			dir, dir2 = t.TempDir()+"/meta", t.TempDir()+"/meta"
		}
		a, b := machine(t, dir, Options{}), machine(t, dir2, Options{})
		half := len(log) / 2
		must(a.Apply(log[:half]...))
		must(b.Apply(log[:3]...))
		if _, err := b.Volumes(context.Background(), "", 0); err != nil { // fills the cache
			t.Fatal(err)
		}
		if err := b.Restore(bytes.NewReader(checkpoint(t, a))); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(shared(t, a), shared(t, b)); d != "" {
			t.Fatal(d)
		}
		verifyWith(t, b)
		must(a.Apply(log...))
		must(b.Apply(log...)) // the first half of it again
		if d := cmp.Diff(shared(t, a), shared(t, b)); d != "" {
			t.Fatal(d)
		}
		verifyWith(t, b)
		before := dump(t, b)
		if err := b.Restore(bytes.NewReader(checkpoint(t, a))); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, dump(t, b)); d != "" {
			t.Errorf("a state that is not newer was restored: %s", d)
		}
		if !onDisk {
			continue
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b = machine(t, dir2, Options{})
		if d := cmp.Diff(before, dump(t, b)); d != "" {
			t.Error(d)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(dir2, Options{}); err == nil {
			t.Error("one copy of a shared state is changed alone", s.Close())
		}
	}
}

// A checkpoint is the state at its index, whatever is applied while it is written.
func TestACheckpointStaysAsItIs(t *testing.T) {
	log := someLog(40)
	a, b := machine(t, t.TempDir()+"/meta", Options{memTable: 1 << 20}), machine(t, "", Options{})
	must(a.Apply(log[:10]...))
	want := shared(t, a)
	c, err := a.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	must(a.Apply(log...))
	var buf bytes.Buffer
	if err := c.Write(&buf); err != nil {
		t.Fatal(err)
	}
	if err := b.Restore(&buf); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, shared(t, b)); d != "" || b.Applied() != c.Applied() {
		t.Errorf("%d of %d %s", b.Applied(), c.Applied(), d)
	}
}

// Whoever has a checkpoint keeps nobody from restoring or closing; it has ended then.
func TestARestoreDoesNotWaitForCheckpoints(t *testing.T) {
	log := someLog(5)
	a := machine(t, "", Options{})
	must(a.Apply(log...))
	for _, dir := range []string{"", t.TempDir() + "/meta"} {
		b := machine(t, dir, Options{})
		must(b.Apply(log[:3]...))
		c := must(b.Checkpoint())
		if err := b.Restore(bytes.NewReader(checkpoint(t, a))); err != nil {
			t.Fatal(err)
		}
		if err := c.Write(io.Discard); !errors.Is(err, volume.ErrStale) {
			t.Errorf("written after a restore: %v", err)
		}
		c.Close()
		c = must(b.Checkpoint())
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if err := c.Write(io.Discard); !errors.Is(err, volume.ErrStale) {
			t.Errorf("written after the end: %v", err)
		}
		c.Close()
		c.Close()
	}
}

// The files as they are at each step of a restore hold the old state or the new one.
func TestARestoreCutOffAnywhere(t *testing.T) {
	log := someLog(20)
	a := machine(t, "", Options{})
	must(a.Apply(log...))
	stream := checkpoint(t, a)
	var left []string
	root := t.TempDir()
	dir := filepath.Join(root, "meta")
	keep := func(step string) {
		to := filepath.Join(t.TempDir(), step)
		err := os.CopyFS(to, os.DirFS(root))
		for tries := 0; errors.Is(err, fs.ErrNotExist) && tries < 10; tries++ { // a file was renamed meanwhile
			to = filepath.Join(t.TempDir(), step)
			err = os.CopyFS(to, os.DirFS(root))
		}
		if err != nil {
			t.Error(err)
		}
		left = append(left, to)
	}
	b := machine(t, dir, Options{step: keep})
	must(b.Apply(log[:5]...))
	old, fresh := shared(t, b), shared(t, a)
	half := func() { // a stream that breaks off
		if err := b.Restore(io.MultiReader(bytes.NewReader(stream[:len(stream)/2]), stepReader(func() { keep("half") }))); !errors.Is(err, volume.ErrDataLoss) {
			t.Errorf("half a stream: %v", err)
		}
	}
	half()
	if d := cmp.Diff(old, shared(t, b)); d != "" {
		t.Error(d)
	}
	if err := b.Restore(bytes.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	keep("done")
	seen := map[string]int{}
	for _, path := range left {
		m, err := OpenMachine(filepath.Join(path, "meta"), Options{})
		if err != nil {
			t.Errorf("%s: %v", filepath.Base(path), err)
			continue
		}
		switch got := shared(t, m); {
		case cmp.Equal(got, old):
			seen["old"]++
			must(m.Apply(log...))
		case cmp.Equal(got, fresh):
			seen["new"]++
		default:
			t.Errorf("%s: neither the old nor the new state", filepath.Base(path))
		}
		if d := cmp.Diff(fresh, shared(t, m)); d != "" {
			t.Errorf("%s, and the log again: %s", filepath.Base(path), d)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if files, err := os.ReadDir(path); err != nil || len(files) != 1 {
			t.Errorf("%s: left behind: %v, %v", filepath.Base(path), files, err)
		}
	}
	if seen["old"] < 3 || seen["new"] < 2 {
		t.Errorf("states found: %v", seen)
	}
}

// A restore whose new state cannot be opened leaves the machine closed: it refuses everything, and is closed.
func TestARestoreThatCannotBeOpened(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "meta")
	a := machine(t, "", Options{})
	must(a.Apply(someLog(3)...))
	b := machine(t, dir, Options{step: func(step string) {
		if step == "old removed" {
			if err := os.WriteFile(filepath.Join(dir, "MANIFEST"), []byte("something else"), 0o600); err != nil {
				t.Error(err)
			}
		}
	}})
	if err := b.Restore(bytes.NewReader(checkpoint(t, a))); !errors.Is(err, volume.ErrUnavailable) {
		t.Fatalf("restored: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := b.WaitRoom(ctx, 100); err != nil {
		t.Errorf("it is waited for what never comes: %v", err)
	}
	if _, err := b.Volumes(t.Context(), "", 0); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("read: %v", err)
	}
	if _, err := b.Apply(someLog(3)...); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("applied: %v", err)
	}
	if _, err := b.Checkpoint(); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("checkpoint: %v", err)
	}
}

type stepReader func()

func (r stepReader) Read([]byte) (int, error) {
	r()
	return 0, io.EOF
}

func TestADamagedCheckpointIsRefused(t *testing.T) {
	a := machine(t, "", Options{})
	must(a.Apply(someLog(3)...))
	stream := checkpoint(t, a)
	nothing := func(key, value []byte) error { return nil }
	if n, err := readStream(bytes.NewReader(stream), nothing); err != nil || n != a.Applied() {
		t.Fatal(n, err)
	}
	for at := range stream {
		bad := bytes.Clone(stream)
		bad[at] ^= 4
		if _, err := readStream(bytes.NewReader(bad), nothing); err == nil {
			t.Fatalf("byte %d was changed", at)
		}
		if _, err := readStream(bytes.NewReader(stream[:at]), nothing); !errors.Is(err, volume.ErrDataLoss) {
			t.Fatalf("cut off at %d: %v", at, err)
		}
	}
	if _, err := readStream(bytes.NewReader(append(bytes.Clone(stream), 0)), nothing); !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("bytes behind: %v", err)
	}
	later := bytes.Clone(stream)
	binary.BigEndian.PutUint32(later[8:], streamVersion+1)
	if _, err := readStream(bytes.NewReader(later), nothing); err == nil || errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("a later version: %v", err)
	}
}

func FuzzReadStream(f *testing.F) {
	m := machine(f, "", Options{})
	f.Add(checkpoint(f, m))
	must(m.Apply(someLog(2)...))
	f.Add(checkpoint(f, m))
	f.Fuzz(func(t *testing.T, b []byte) {
		last := ""
		_, err := readStream(bytes.NewReader(b), func(key, value []byte) error {
			if string(key) <= last || len(key) > maxKey || len(value) > maxValue {
				t.Fatalf("key %q after %q", key, last)
			}
			last = string(key)
			return nil
		})
		_ = err
	})
}

func TestEntriesSurviveTheirEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := Entry{Kind: Kind(rapid.Byte().Draw(t, "kind")), Since: rapid.Uint64().Draw(t, "since"), Body: rapid.SliceOfN(rapid.Byte(), 0, 50).Draw(t, "body")}
		copy(e.ID[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
		for range rapid.IntRange(0, MaxMarks).Draw(t, "marks") {
			e.Marks = append(e.Marks, Mark{Controller: volume.NodeID(rapid.StringN(0, 20, 256).Draw(t, "c")), Index: rapid.Uint64().Draw(t, "i")})
		}
		got, err := DecodeEntry(EncodeEntry(e))
		if err != nil || !cmp.Equal(e, got) {
			t.Fatalf("%v\n%+v\n%+v", err, e, got)
		}
	})
}

func FuzzDecodeEntry(f *testing.F) {
	for _, e := range someLog(1) {
		e.Marks = []Mark{{"n1", 3}, {"n2", 4}}
		f.Add(EncodeEntry(e))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := DecodeEntry(b)
		if err != nil {
			if !errors.Is(err, volume.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(b, EncodeEntry(e)) {
			t.Fatalf("%x became %x", b, EncodeEntry(e))
		}
	})
}
