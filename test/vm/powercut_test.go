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
}

// writeUntilCut boots a scenario that writes, cuts the power a while after the first acknowledgement, and returns the
// acknowledgements.
func writeUntilCut(t *testing.T, c Config, work time.Duration) []ack {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	m, err := Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	var acks []ack
	var timer *time.Timer
	for e := range m.Events {
		switch e.Kind {
		case report.Acked:
			acks = append(acks, ack{c.Disk.Position(), e.Name, e.N})
			if timer == nil {
				timer = time.AfterFunc(work, func() {
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
	if timer == nil {
		t.Fatalf("nothing was acknowledged (%v):\n%s", m.Wait(), m.Console(60))
	}
	m.Wait() // it was killed
	if t.Failed() {
		t.Fatalf("the guest's console ends with:\n%s", m.Console(60))
	}
	return acks
}

// known returns, per stream, the last acknowledgement that came before the cut at position.
func known(acks []ack, position int) map[string]int64 {
	last := map[string]int64{}
	for _, a := range acks {
		if a.position <= position {
			last[a.stream] = a.n
		}
	}
	return last
}

// TestHarnessFindsLoss proves the power cut itself: what a plain file's writer flushed is always there, and a writer
// that acknowledges what it did not flush is caught.
func TestHarnessFindsLoss(t *testing.T) {
	for _, honest := range []bool{true, false} {
		t.Run(fmt.Sprintf("flush=%t", honest), func(t *testing.T) {
			disk := newDisk(t, 256<<20, "")
			acks := writeUntilCut(t, config(t, disk, "plain-write", fmt.Sprintf("-flush=%t", honest)), 3*time.Second)
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
			_, err = Run(ctx, config(t, newDisk(t, 256<<20, image), "plain-verify",
				fmt.Sprintf("-acked=%d", known(acks, position)["plain"])))
			if honest && err != nil {
				t.Errorf("flushed data is gone: %v", err)
			}
			if !honest && (err == nil || !strings.Contains(err.Error(), "acknowledged data lost")) {
				t.Errorf("a writer that does not flush was not caught: %v", err)
			}
		})
	}
}
