package vm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/vm/cutdisk"
	"github.com/ballast-csi/ballast/test/vm/report"
)

// ack is an acknowledgement and how far the disk was when it came.
type ack struct {
	position int
	stream   string
	n        int64
	text     string
}

// writeUntilCut boots a scenario that writes, cuts the power at some moment after that many acknowledgements of each
// stream, and returns all acknowledgements.
func writeUntilCut(t *testing.T, c Config, enough map[string]int, rnd *rand.Rand) []ack {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m, err := Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	var acks []ack
	seen, missing := map[string]int{}, len(enough)
	for e := range m.Events {
		switch e.Kind {
		case report.Acked:
			acks = append(acks, ack{c.Disk.Position(), e.Name, e.N, e.Text})
			if seen[e.Name]++; seen[e.Name] != enough[e.Name] {
				break
			}
			if missing--; missing == 0 {
				time.AfterFunc(time.Duration(rnd.Int64N(int64(3*time.Second))), func() {
					c.Disk.Halt()
					m.Kill()
				})
			}
		case report.Value:
			t.Logf("%s: %s", e.Name, e.Text)
		case report.Failed, report.Done:
			t.Errorf("the writer ended before the power was cut: %s %s", e.Kind, e.Text)
		}
	}
	err = m.Wait()
	t.Logf("acknowledged: %v", seen)
	if missing > 0 || t.Failed() {
		t.Fatalf("%v were to be acknowledged; the machine ended: %v, %v\n%s", enough, err, ctx.Err(), m.Console(60))
	}
	return acks
}

// known returns, per stream, the last acknowledgement that came before the cut at position.
func known(acks []ack, position int) map[string]ack {
	last := map[string]ack{}
	for _, a := range acks {
		if a.position <= position {
			last[a.stream] = a
		}
	}
	return last
}

// TestHarnessFindsLoss proves the power cut itself: what a plain file's writer flushed is always there, and a writer
// that acknowledges what it did not flush is caught.
func TestHarnessFindsLoss(t *testing.T) {
	for _, honest := range []bool{true, false} {
		t.Run(fmt.Sprintf("flush=%t", honest), func(t *testing.T) {
			disk := newDisk(t, 512, "")
			acks := writeUntilCut(t, config(t, disk, "plain-write", fmt.Sprintf("-flush=%t", honest)),
				map[string]int{"plain": 100}, rand.New(rand.NewPCG(1, 1)))
			position := disk.Position()
			image := filepath.Join(t.TempDir(), "cut")
			rep, err := disk.Cut(image, position, cutdisk.Lose, rand.New(rand.NewPCG(1, 1)))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d batches acknowledged; %s", len(acks), rep)
			if rep.Lost == 0 && !honest {
				t.Fatal("the disk had nothing to lose: the test shows nothing")
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			_, err = Run(ctx, config(t, newDisk(t, 512, image), "plain-verify",
				fmt.Sprintf("-acked=%d", known(acks, position)["plain"].n)))
			if honest && err != nil {
				t.Errorf("flushed data is gone: %v", err)
			}
			if !honest && (err == nil || !strings.Contains(err.Error(), "acknowledged data lost")) {
				t.Errorf("a writer that does not flush was not caught: %v", err)
			}
		})
	}
}

// TestPowerCut cuts the power under a working Ballast and demands, of what is left, everything that was acknowledged.
//
// One run of the work gives as many cuts as are wanted: the disk makes from its log what a cut at any moment could have
// left. BALLAST_VM_CUTS sets how many per kind of pool; BALLAST_VM_SEED repeats a run's random choices, though not the
// guest's timing.
func TestPowerCut(t *testing.T) {
	cuts := setting(t, "BALLAST_VM_CUTS", 2)
	seed := uint64(setting(t, "BALLAST_VM_SEED", int(time.Now().UnixNano()>>10)))
	for pool, atom := range map[string]int64{
		"ext4": 512,
		// XFS trusts the sequence number at a metadata block's begin when it replays its log: a block torn by a second
		// power cut makes it unmountable, whatever runs on it.
		"xfs": 4096,
	} {
		t.Run(pool, func(t *testing.T) {
			t.Logf("BALLAST_VM_SEED=%d", seed)
			work := []string{"-pool=" + pool, "-fs=" + pool, fmt.Sprintf("-seed=%d", seed)}
			disk := newDisk(t, atom, "")
			rnd := rand.New(rand.NewPCG(seed, 0))
			acks := writeUntilCut(t, config(t, disk, append([]string{"cut-write"}, work...)...),
				map[string]int{"raw": 50, "files": 20, "snapshot": 4, "deleted": 2}, rnd)
			for i := range cuts {
				c := choose(i, acks, disk.Position(), rnd)
				t.Run(fmt.Sprintf("%d-%s", i, c.fate), func(t *testing.T) {
					c.verify(t, disk, work, known(acks, c.position), rand.New(rand.NewPCG(seed, uint64(i+1))))
				})
			}
		})
	}
}

// moment is when the power is cut, and how.
type moment struct {
	position int
	fate     cutdisk.Fate
	// again cuts the power a second time, during the recovery.
	again bool
}

// choose returns the i-th moment: first the real one, with a reordering disk; then right after an acknowledgement, with
// all lost that was not flushed; then any.
func choose(i int, acks []ack, end int, rnd *rand.Rand) moment {
	begin := start(acks)
	switch i % 3 {
	case 0:
		if i == 0 {
			return moment{end, cutdisk.Scatter, true}
		}
		return moment{begin + rnd.IntN(end-begin+1), cutdisk.Keep, true}
	case 1:
		for {
			if a := acks[rnd.IntN(len(acks))]; a.position >= begin {
				return moment{a.position, cutdisk.Lose, false}
			}
		}
	default:
		return moment{begin + rnd.IntN(end-begin+1), cutdisk.Scatter, rnd.IntN(2) == 0}
	}
}

// start is the position from which on both volumes are known to exist.
func start(acks []ack) int {
	seen := map[string]bool{}
	for _, a := range acks {
		if seen[a.stream] = true; seen["raw"] && seen["files"] {
			return a.position
		}
	}
	return acks[len(acks)-1].position
}

func (m moment) verify(t *testing.T, disk *cutdisk.Disk, work []string, last map[string]ack, rnd *rand.Rand) {
	image := filepath.Join(t.TempDir(), "cut")
	rep, err := disk.Cut(image, m.position, m.fate, rnd)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("cut at %d: %s", m.position, rep)
	args := append([]string{"cut-verify"}, work...)
	args = append(args, fmt.Sprintf("-raw=%d", last["raw"].n), fmt.Sprintf("-files=%d", last["files"].n))
	if s := strings.Fields(last["snapshot"].text); len(s) == 3 {
		// The last one: the guest deletes a snapshot only after it acknowledged newer ones.
		args = append(args, "-snapshot="+s[0], "-must="+s[1], "-may="+s[2])
	}
	if d := last["deleted"].text; d != "" {
		args = append(args, "-deleted="+d)
	}
	recovered := newDisk(t, disk.Atom(), image)
	runConfig(t, config(t, recovered, args...), 4*time.Minute)
	if !m.again {
		return
	}
	second := moment{position: 1 + rnd.IntN(recovered.Position()), fate: cutdisk.Scatter}
	image = filepath.Join(t.TempDir(), "cut")
	if rep, err = recovered.Cut(image, second.position, second.fate, rnd); err != nil {
		t.Fatal(err)
	}
	t.Logf("cut again, at %d of %d of the recovery: %s", second.position, recovered.Position(), rep)
	runConfig(t, config(t, newDisk(t, disk.Atom(), image), args...), 4*time.Minute)
}
