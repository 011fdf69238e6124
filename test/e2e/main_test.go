// Package e2e runs the real ballastd as a process with real devices and filesystems, and is unkind to it: SIGKILL at
// any moment, at each step of each call, full pools, many calls at once. What it demands is always the same: calls that
// are repeated end well, no flushed byte is lost, nothing is left behind.
//
// The default takes some minutes. BALLAST_E2E_MINUTES makes the randomised parts take that long each; BALLAST_E2E_SEED
// repeats a run's choices; BALLAST_E2E_RACE=1 builds the daemon with the race detector.
package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/test/harness"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	// xfsSize is the least that mkfs.xfs accepts, with some room; thin volumes make it cheap.
	xfsSize = 320 * mib
	extSize = 64 * mib
)

var (
	bin  harness.Binaries
	seed uint64
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	seed = uint64(time.Now().UnixNano())
	if s := os.Getenv("BALLAST_E2E_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			fmt.Fprintln(os.Stderr, "BALLAST_E2E_SEED:", err)
			return 2
		}
		seed = n
	}
	dir, err := os.MkdirTemp("", "ballast-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer os.RemoveAll(dir)
	bin, err = harness.Build(context.Background(), dir, os.Getenv("BALLAST_E2E_RACE") != "")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return m.Run()
}

// bounded is how long a randomised part goes on: usual, or what BALLAST_E2E_MINUTES says.
func bounded(t *testing.T, usual time.Duration) time.Duration {
	t.Helper()
	s := os.Getenv("BALLAST_E2E_MINUTES")
	if s == "" {
		return usual
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n <= 0 {
		t.Fatalf("BALLAST_E2E_MINUTES is not a number of minutes: %q", s)
	}
	return time.Duration(n * float64(time.Minute))
}

// random is a source of choices that BALLAST_E2E_SEED repeats; a failure prints the seed.
func random(t *testing.T, stream uint64) *rand.Rand {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat the choices with BALLAST_E2E_SEED=%d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, stream))
}

// bed is one daemon under test, with an orchestrator and its books.
type bed struct {
	*harness.Daemon
	o     *harness.Orchestrator
	tally harness.Tally
	ctx   context.Context
}

// newBed starts a daemon in a directory of its own. When the test ends the machine is cleaned, the log checked and, on
// failure, shown.
func newBed(t *testing.T, patience time.Duration, args ...string) *bed {
	t.Helper()
	dir, err := os.MkdirTemp("", "ballast-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(harness.Options{Dir: dir, Bin: bin, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &bed{Daemon: d, ctx: ctx}
	b.o = &harness.Orchestrator{
		CSI: d.CSI(), NodeID: d.NodeID(), Dir: d.Dir() + "/o", Patience: patience, Failed: b.tally.Note,
	}
	t.Cleanup(func() {
		cancel()
		if trouble := d.LogTrouble(); trouble != "" {
			t.Errorf("the daemon's log has a panic or a race:\n%s", trouble)
		}
		if t.Failed() {
			t.Logf("failed attempts:\n%sthe end of the daemon's log:\n%s", b.tally.String(), d.LogTail(80))
		}
		if err := d.Close(); err != nil {
			t.Errorf("cleaning up: %v", err)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bed) must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// used is what the pools say they hold, in bytes.
func (b *bed) used() (int64, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 10*time.Second)
	defer cancel()
	r, err := b.Admin().ListPools(ctx, &adminpb.ListPoolsRequest{})
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, p := range r.GetPools() {
		sum += p.GetUsedBytes()
	}
	return sum, nil
}

// eventually waits until ok returns nil.
func eventually(t *testing.T, within time.Duration, ok func() error) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %v", within, err)
		}
	}
}

// nothingLeft checks, once every volume and snapshot was deleted, that the cluster and the machine hold nothing: no
// record, byte, reservation, mount, device, connection or process; and that the pool is sound. It stops the daemon.
func (b *bed) nothingLeft(t *testing.T, ids ...string) {
	t.Helper()
	vols, err := b.CSI().ListVolumes(b.ctx, &csi.ListVolumesRequest{})
	b.must(t, err)
	for _, e := range vols.GetEntries() {
		t.Errorf("volume %s is left", e.GetVolume().GetVolumeId())
	}
	snaps, err := b.CSI().ListSnapshots(b.ctx, &csi.ListSnapshotsRequest{})
	b.must(t, err)
	for _, e := range snaps.GetEntries() {
		t.Errorf("snapshot %s is left", e.GetSnapshot().GetSnapshotId())
	}
	eventually(t, 90*time.Second, func() error {
		n, err := b.used()
		if err == nil && n != 0 {
			err = fmt.Errorf("the pool still holds %d bytes", n)
		}
		return err
	})
	eventually(t, 30*time.Second, func() error {
		r, err := b.Admin().ListPools(b.ctx, &adminpb.ListPoolsRequest{})
		if err != nil {
			return err
		}
		for _, p := range r.GetPools() {
			if p.GetProvisionedBytes() != 0 {
				return fmt.Errorf("pool %s still has %d bytes provisioned", p.GetName(), p.GetProvisionedBytes())
			}
		}
		return nil
	})
	eventually(t, 30*time.Second, func() error {
		r, err := b.Admin().ListQuotas(b.ctx, &adminpb.ListQuotasRequest{})
		if err != nil {
			return err
		}
		for _, q := range r.GetQuotas() {
			if u := q.GetUsed(); u.GetLogicalBytes()+u.GetPhysicalBytes()+u.GetVolumes()+u.GetSnapshots() != 0 {
				return fmt.Errorf("tenant %s still uses %v", q.GetTenant(), u)
			}
		}
		return nil
	})
	for _, l := range b.Leaks(ids...) {
		t.Errorf("left while running: %s", l)
	}
	b.must(t, b.Stop())
	for _, l := range b.Leaks(ids...) {
		t.Errorf("left after the end: %s", l)
	}
	b.checkPool(t)
}

// checkPool runs the offline check; the daemon is stopped.
func (b *bed) checkPool(t *testing.T) {
	t.Helper()
	out, err := b.Ctl(b.ctx, "pool", "check", b.PoolDir())
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// tail shortens a long text to its last lines.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
