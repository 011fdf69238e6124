package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/test/harness"
)

// fio runs fio with the given options and returns its output. It ends with ctx.
func fio(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=job", "--output-format=terse", "--randrepeat=1", "--verify_state_save=0"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("fio %s: %w\n%s", strings.Join(args, " "), err, tail(out.String(), 20))
	}
	return out.String(), nil
}

// running is a fio in the background.
type running struct {
	done chan struct{}
	err  error
	stop context.CancelFunc
}

func startFio(t *testing.T, args ...string) *running {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	r := &running{done: make(chan struct{}), stop: stop}
	go func() {
		defer close(r.done)
		_, r.err = fio(ctx, args...)
	}()
	t.Cleanup(func() {
		stop()
		<-r.done
	})
	return r
}

func (r *running) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// TestFullPool fills a small over-provisioned pool under fio. Writes wait and nothing fails; what is wrong is to be
// read in health and why; deleting a volume or a snapshot lets the writes go on; what was written is right.
func TestFullPool(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs"} {
		t.Run(fsType, func(t *testing.T) { fullPool(t, fsType) })
	}
}

func fullPool(t *testing.T, fsType string) {
	b := newBed(t, 2*time.Minute, "--pool-capacity=400Mi", "--reserve=64Mi", "--over-provision=10")
	writer := &harness.Claim{Name: "writer", Size: 600 * mib, FSType: fsType}
	hog := &harness.Claim{Name: "hog", Size: 200 * mib}
	idle := &harness.Claim{Name: "idle", Size: 16 * mib}
	b.must(t, b.o.Create(b.ctx, idle))
	b.must(t, b.o.Up(b.ctx, hog))
	if out, err := fio(b.ctx, "--filename="+b.o.TargetPath(hog), "--rw=write", "--bs=1M", "--size=100M", "--direct=1", "--end_fsync=1"); err != nil {
		t.Fatal(err, out)
	}
	// The snapshot keeps the first 100 MiB, then the volume's own 60 MiB come on top.
	snap, err := b.o.Snapshot(b.ctx, hog, "hog-snap")
	b.must(t, err)
	if out, err := fio(b.ctx, "--filename="+b.o.TargetPath(hog), "--rw=write", "--bs=1M", "--size=60M", "--direct=1", "--end_fsync=1"); err != nil {
		t.Fatal(err, out)
	}
	b.must(t, b.o.Up(b.ctx, writer))

	target := b.o.TargetPath(writer)
	job := []string{"--directory=" + target, "--filename=data", "--rw=write", "--bs=128k", "--size=340M", "--direct=1", "--iodepth=4",
		"--ioengine=libaio", "--verify=crc32c", "--verify_fatal=1"}
	load := startFio(t, append(job, "--end_fsync=1")...)

	// It comes to a halt while there is more to write. First a snapshot is given up, then, at the next halt, a volume.
	free := []struct {
		what string
		fn   func() error
	}{
		{"the snapshot", func() error { return b.o.DeleteSnapshot(b.ctx, snap) }},
		{"the volume", func() error {
			if err := b.o.Down(b.ctx, hog); err != nil {
				return err
			}
			return b.o.Delete(b.ctx, hog)
		}},
	}
	for i, f := range free {
		if !b.halted(t, load, filepath.Join(target, "data")) {
			if i == 0 {
				t.Fatalf("fio never came to a halt: the pool does not fill up (%v)", load.err)
			}
			break
		}
		b.full(t, writer, idle, target)
		if err := f.fn(); err != nil {
			t.Fatalf("deleting %s while the pool is full: %v", f.what, err)
		}
	}
	select {
	case <-load.done:
	case <-time.After(2 * time.Minute):
		t.Fatal("fio does not go on although there is space again")
	}
	b.must(t, load.err)
	eventually(t, 30*time.Second, func() error {
		h, err := b.conditions(writer)
		if err == nil && len(h) > 0 {
			err = fmt.Errorf("conditions stay after there is space again: %v", h)
		}
		return err
	})
	// Read back from the device, not from the page cache.
	b.must(t, b.o.Again(b.ctx, writer))
	if _, err := fio(b.ctx, append(job, "--verify_only")...); err != nil {
		t.Fatal(err)
	}
	b.must(t, b.o.Down(b.ctx, writer))
	b.must(t, b.o.Delete(b.ctx, writer))
	b.must(t, b.o.Delete(b.ctx, idle))
	b.nothingLeft(t, writer.ID(), hog.ID(), idle.ID())
}

// halted waits until the load makes no progress for a while; false where it ended first.
func (b *bed) halted(t *testing.T, load *running, file string) bool {
	t.Helper()
	const still = 3 * time.Second
	var last int64
	since := time.Now()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if load.over() {
			return false
		}
		var n int64
		if st, err := os.Stat(file); err == nil {
			n = st.Size()
		}
		if used, err := b.used(); err == nil {
			n += used
		}
		if n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > still {
			return true
		}
	}
	t.Fatal("fio neither ended nor came to a halt")
	return false
}

// full checks what must be seen while writes wait for space.
func (b *bed) full(t *testing.T, c, idle *harness.Claim, target string) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		h, err := b.conditions(c)
		if err == nil && len(h) == 0 {
			err = fmt.Errorf("the volume's health says nothing of a full pool")
		}
		return err
	})
	r, err := b.Admin().Why(b.ctx, &adminpb.WhyRequest{Kind: adminpb.Kind_VOLUME, Ref: c.Name})
	b.must(t, err)
	if text := strings.ToLower(r.GetText()); !strings.Contains(text, "full") && !strings.Contains(text, "space") {
		t.Errorf("why does not speak of a full pool: %q", r.GetText())
	}
	mounts, err := harness.MountsUnder(target)
	b.must(t, err)
	if len(mounts) != 1 {
		t.Fatalf("mounts at the target: %v", mounts)
	}
	for _, opt := range strings.Split(mounts[0].Options, ",") {
		if opt == "ro" || opt == "shutdown" {
			t.Fatalf("the filesystem has given up writing: %s", mounts[0].Options)
		}
	}
	// Once the node has reported the pool as full nothing more is placed there.
	once := *b.o
	once.Patience = 0
	more := &harness.Claim{Name: "while-full", Size: 16 * mib}
	if err := once.Create(b.ctx, more); err == nil {
		b.must(t, b.o.Delete(b.ctx, more))
	} else if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "full") {
		t.Errorf("a create on a full pool: %v", err)
	}
	// What is there can be used as far as it takes no space.
	b.must(t, b.o.Up(b.ctx, idle))
	if _, err := visible("", b.o.TargetPath(idle)); err != nil {
		t.Error(err)
	}
	b.must(t, b.o.Down(b.ctx, idle))
}

// conditions are what CSI's health call says of a volume.
func (b *bed) conditions(c *harness.Claim) ([]string, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 10*time.Second)
	defer cancel()
	r, err := b.CSI().ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: c.ID()})
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range r.GetVolumeHealth().GetHealthStatuses() {
		all = append(all, e.String())
	}
	return all, nil
}

// each runs fn for all claims, at most so many at once, and returns the first error.
func (b *bed) each(claims []*harness.Claim, at int, fn func(context.Context, *harness.Claim) error) error {
	var mu sync.Mutex
	var first error
	slots := make(chan struct{}, at)
	var wg sync.WaitGroup
	for _, c := range claims {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := fn(b.ctx, c); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if first == nil {
					first = err
				}
			}
		})
	}
	wg.Wait()
	return first
}
