package sanity_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/test/harness"
)

// What csi-sanity does not look at, on the real daemon.

// TestPoint37_DeltaIsTheBytewiseDiff: with the streams of two snapshots a backup is as good as the volume.
func TestPoint37_DeltaIsTheBytewiseDiff(t *testing.T) {
	bin, err := harness.Build(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	d := start(t, bin, true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	o := &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: filepath.Join(d.Dir(), "o"), Patience: time.Minute}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const size, block = 64 << 20, 4096
	c := &harness.Claim{Name: "source", Size: size}
	must(o.Up(ctx, c))
	rng := rand.New(rand.NewPCG(1, 2))
	written := make([]bool, size/block) // since the base
	scribble := func() {
		f, err := os.OpenFile(o.TargetPath(c), os.O_RDWR, 0)
		must(err)
		for range 60 {
			n := block << rng.IntN(7)
			off := rng.Int64N(size-int64(n)) / 512 * 512
			p := make([]byte, n)
			if rng.IntN(5) > 0 { // else zeros are written
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
			}
			_, err := f.WriteAt(p, off)
			must(err)
			for i := off / block; i <= (off+int64(n)-1)/block; i++ {
				written[i] = true
			}
		}
		must(f.Sync())
		must(f.Close())
	}
	image := func(snapshot string) []byte {
		r := &harness.Claim{Name: "of-" + snapshot, Size: size, Source: harness.FromSnapshot(snapshot)}
		must(o.Up(ctx, r))
		b, err := os.ReadFile(o.TargetPath(r))
		must(err)
		must(o.Down(ctx, r))
		must(o.Delete(ctx, r))
		if len(b) != size {
			t.Fatalf("the device has %d bytes", len(b))
		}
		return b
	}
	scribble()
	base, err := o.Snapshot(ctx, c, "base")
	must(err)
	clear(written)
	scribble()
	target, err := o.Snapshot(ctx, c, "target")
	must(err)
	scribble() // what comes later is in neither
	before, after := image(base), image(target)
	if bytes.Equal(before, after) {
		t.Fatal("the snapshots do not differ")
	}

	allocated := func(id string, from int64) []*csi.BlockMetadata {
		s, err := d.CSI().Metadata.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: id, StartingOffset: from, MaxResults: 7})
		must(err)
		return collect(t, s.Recv)
	}
	delta := func(from int64) []*csi.BlockMetadata {
		s, err := d.CSI().Metadata.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: from, MaxResults: 7})
		must(err)
		return collect(t, s.Recv)
	}
	apply := func(to []byte, runs []*csi.BlockMetadata) []byte {
		out := bytes.Clone(to)
		for _, r := range runs {
			copy(out[r.ByteOffset:r.ByteOffset+r.SizeBytes], after[r.ByteOffset:])
		}
		return out
	}
	if !bytes.Equal(apply(make([]byte, size), allocated(target, 0)), after) {
		t.Error("zeros and the allocated runs are not the snapshot")
	}
	changed := delta(0)
	if !bytes.Equal(apply(before, changed), after) {
		t.Error("the base and the changed runs are not the target")
	}
	for _, r := range changed {
		for at := r.ByteOffset; at < r.ByteOffset+r.SizeBytes; at += block {
			if !written[at/block] {
				t.Fatalf("run %v: block %d was not written since the base", r, at/block)
			}
		}
	}
	middle := changed[len(changed)/2]
	rest := delta(middle.ByteOffset + middle.SizeBytes)
	if len(rest) != len(changed)-len(changed)/2-1 {
		t.Errorf("resumed: %d runs, want %d", len(rest), len(changed)-len(changed)/2-1)
	}
	must(o.Down(ctx, c))
	must(o.Delete(ctx, c))
	if !bytes.Equal(image(target), after) {
		t.Error("the snapshot has changed with the end of its source")
	}
	must(o.DeleteSnapshot(ctx, base))
	must(o.DeleteSnapshot(ctx, target))
	for _, leak := range d.Leaks() {
		t.Errorf("left behind: %s", leak)
	}
}

func collect[M interface{ GetBlockMetadata() []*csi.BlockMetadata }](t *testing.T, recv func() (M, error)) []*csi.BlockMetadata {
	t.Helper()
	var out []*csi.BlockMetadata
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, m.GetBlockMetadata()...)
	}
}

// TestPoint06_Point33_ManyCreatesAndTheLargest: a hundred identical calls at once make one volume; as large a volume as
// GetCapacity promises can be made, and then there is room for none.
func TestPoint06_Point33_ManyCreatesAndTheLargest(t *testing.T) {
	bin, err := harness.Build(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	d := start(t, bin, false)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	request := func(name string, size int64) *csi.CreateVolumeRequest {
		c := harness.Claim{Name: name, Size: size}
		return &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c.Capability()}}
	}
	ids := make(chan string, 100)
	var wg sync.WaitGroup
	for range cap(ids) {
		wg.Go(func() {
			resp, err := d.CSI().CreateVolume(ctx, request("same", gib))
			if err != nil {
				t.Error(err)
			}
			ids <- resp.GetVolume().GetVolumeId()
		})
	}
	wg.Wait()
	close(ids)
	seen := map[string]bool{}
	for id := range ids {
		seen[id] = true
	}
	if len(seen) != 1 {
		t.Errorf("%d volumes: %v", len(seen), seen)
	}
	for i := range 2 {
		got, err := d.CSI().GetCapacity(ctx, &csi.GetCapacityRequest{})
		if err != nil {
			t.Fatal(err)
		}
		largest := got.GetMaximumVolumeSize().GetValue()
		if largest == 0 && i > 0 {
			break
		}
		if _, err := d.CSI().CreateVolume(ctx, request(fmt.Sprint("largest", i), largest)); err != nil {
			t.Fatalf("a volume of the maximum size, %d: %v", largest, err)
		}
	}
}

// TestPoint39_SensitiveMountFlags: mount options may carry passwords, and come back in what mount(8) and the kernel say.
func TestPoint39_SensitiveMountFlags(t *testing.T) {
	bin, err := harness.Build(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	d := start(t, bin, true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	o := &harness.Orchestrator{CSI: d.CSI(), NodeID: d.NodeID(), Dir: filepath.Join(d.Dir(), "o")}
	c := &harness.Claim{Name: "v", Size: 64 << 20, FSType: "ext4", MountFlags: []string{"noatime", "password=" + secret}}
	err = o.Up(ctx, c)
	if err == nil {
		t.Error("ext4 took an option that it does not know")
	} else if strings.Contains(err.Error(), secret) {
		t.Errorf("a secret is in the error: %v", err)
	}
	log, err := os.ReadFile(d.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(log) {
		if bytes.Contains(line, []byte(secret)) {
			t.Errorf("a secret is in the log: %s", line)
		}
	}
	if err := o.Down(ctx, c); err != nil {
		t.Error(err)
	}
	if err := o.Delete(ctx, c); err != nil {
		t.Error(err)
	}
	for _, leak := range d.Leaks() {
		t.Errorf("left behind: %s", leak)
	}
}
