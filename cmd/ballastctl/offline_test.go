package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/extentstore"
)

func TestPoolOffline(t *testing.T) {
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "pool")
	p, err := extentstore.Open(ctx, dir, extentstore.Options{Capacity: 64 << 20, Reserve: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	open := true
	defer func() {
		if open {
			p.Close()
		}
	}()
	if err := p.CreateReplica(ctx, extentstore.ReplicaSpec{ID: "rep-1", Volume: "vol-1", Tenant: "t", Size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	dev, err := p.OpenReplica(ctx, "rep-1")
	if err != nil {
		t.Fatal(err)
	}
	monday, tuesday := bytes.Repeat([]byte("mon "), 4096), bytes.Repeat([]byte("tue "), 4096)
	if err := dev.WriteAt(ctx, monday, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := p.Cut(ctx, "rep-1", "snap-1"); err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(ctx, tuesday, 1<<20); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"pool", "check", dir}, {"pool", "show", dir}, {"pool", "export", dir, "vol-1", filepath.Join(t.TempDir(), "x")}} {
		if r := ctl("", args...); r.code != exitFailed || !strings.Contains(r.err, "stop it first") {
			t.Errorf("%v of a pool in use: exit %d: %s", args, r.code, r.err)
		}
	}
	open = false
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}

	r := ctl("", "pool", "check", dir, "-o", "json")
	var check checkView
	if err := json.Unmarshal([]byte(r.out), &check); err != nil || r.code != exitOK || !check.Sound || check.Replicas != 1 || check.Snapshots != 1 {
		t.Errorf("exit %d %v: %s%s", r.code, err, r.out, r.err)
	}
	if r := ctl("", "pool", "check", dir); r.code != exitOK || !strings.Contains(r.out, "sound") || r.err != "" {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
	r = ctl("", "pool", "show", dir, "-o", "json")
	var shown []contentView
	want := []contentView{{Volume: "vol-1", Replica: "rep-1", Tenant: "t", SizeBytes: 8 << 20, PhysicalBytes: 64 << 10}, {Volume: "vol-1", Snapshot: "snap-1", Tenant: "t", SizeBytes: 8 << 20, PhysicalBytes: 64 << 10}}
	if err := json.Unmarshal([]byte(r.out), &shown); err != nil || r.code != exitOK || !slices.Equal(shown, want) {
		t.Errorf("exit %d %v: %s%s", r.code, err, r.out, r.err)
	}
	if r := ctl("", "pool", "show", dir); r.code != exitOK || !strings.Contains(r.out, "vol-1@snap-1") || r.err != "" {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
	for ref, want := range map[string][]byte{"vol-1": tuesday, "vol-1@snap-1": monday} {
		file := filepath.Join(t.TempDir(), "image")
		if r := ctl("", "pool", "export", dir, ref, file); r.code != exitOK || !strings.Contains(r.out, "8.0 MiB") {
			t.Fatalf("%s: exit %d: %s%s", ref, r.code, r.out, r.err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) != 8<<20 || !bytes.Equal(b[1<<20:][:len(want)], want) || bytes.Count(b, []byte{0}) != len(b)-len(want) {
			t.Errorf("%s: the image differs", ref)
		}
		if r := ctl("", "pool", "export", dir, ref, file); r.code != exitFailed || !strings.Contains(r.err, "does not overwrite") {
			t.Errorf("over an image: exit %d: %s", r.code, r.err)
		}
	}
	missing := filepath.Join(t.TempDir(), "image")
	if r := ctl("", "pool", "export", dir, "vol-2", missing); r.code != exitNotFound || !strings.Contains(r.err, "vol-2") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	if _, err := os.Stat(missing); !os.IsNotExist(err) {
		t.Errorf("half an image is left: %v", err)
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{"4096": 4096, "10Gi": 10 << 30, "10GiB": 10 << 30, "1.5Ti": 3 << 39, "500M": 500e6, "1k": 1000, "64 MiB": 64 << 20} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%s is %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "10Qi", "99999999Ti", "1e400", "NaN"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q is %d", text, got)
		}
	}
}
