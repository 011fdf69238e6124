package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// TestLateCallsOfAnOlderEpoch: what is asked for in one epoch and arrives in a later one neither ends an engine nor begins one.
func TestLateCallsOfAnOlderEpoch(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2)
	n := c.nodes["n1"]
	old := c.cluster.epoch(vol1)
	at := c.stage("n1")
	write(t, filepath.Join(at, "a"), "of the first")
	c.unstage("n1")
	c.detach("n1")
	c.assign("n1")
	wantErr(t, "an engine that was asked for before", n.OpenEngine(t.Context(), "n1", vol1, old), volume.ErrBusy)
	wantErr(t, "an eviction that was asked for before", n.Evict(t.Context(), "n1", vol1, old, c.replica(2).ID), volume.ErrBusy)
	if e, runs := n.Engines()[vol1]; runs {
		t.Errorf("an engine runs: %+v", e)
	}
	at = c.stage("n1")
	write(t, filepath.Join(at, "b"), "of the second")
	now := c.cluster.epoch(vol1)
	_, err := n.Detach(t.Context(), "n1", vol1, old)
	wantErr(t, "the end of one before", err, volume.ErrStale)
	write(t, filepath.Join(at, "c"), "goes on")
	// While another operation has the volume, too: it is what the end would be forced in.
	v, _ := n.known(vol1)
	<-v.lock
	_, err = n.Detach(t.Context(), "n1", vol1, old)
	v.lock <- struct{}{}
	wantErr(t, "the end of one before, while the volume is busy", err, volume.ErrStale)
	write(t, filepath.Join(at, "d"), "goes on")
	if got := c.cluster.epoch(vol1); got != now {
		t.Errorf("epoch %d, was %d", got, now)
	}
	if err := n.OpenEngine(t.Context(), "n1", vol1, old); err != nil { // it runs: nothing is begun
		t.Error(err)
	}
	wantErr(t, "an eviction of before", n.Evict(t.Context(), "n1", vol1, old, c.replica(2).ID), volume.ErrBusy)
	wantErr(t, "an expand of before", n.ExpandVolume(t.Context(), c.replica(1), vol1, old, 32*mib), volume.ErrBusy)
	wantErr(t, "limits of before", n.SetQoS(t.Context(), "n1", vol1, old, volume.QoS{IOPS: 1}), volume.ErrStale)
	c.waitInSync(2)
	wantErr(t, "limits of now", n.SetQoS(t.Context(), "n1", vol1, now, volume.QoS{IOPS: 1000}), nil)
	c.unstage("n1")
	c.detach("n1")
}

// TestEnginesOfThePastEnd: an engine that nobody refuses anything finds out that its volume is gone, or in another epoch.
func TestEnginesOfThePastEnd(t *testing.T) {
	for name, change := range map[string]func(c *fakeCluster){
		"deleted": func(c *fakeCluster) {
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.volumes, vol1)
		},
		"salvaged": func(c *fakeCluster) {
			c.change(vol1, func(v *volume.Volume) { v.Attachment, v.Owner, v.Epoch, v.Revision = nil, "", v.Epoch+2, v.Revision+2 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newTrio(t)
			c.create(16*mib, "n1", 1)
			at := c.stage("n1")
			write(t, filepath.Join(at, "a"), "of the past")
			change(c.cluster)
			for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
				if _, runs := c.nodes["n1"].Engines()[vol1]; !runs {
					break
				}
				if time.Since(start) > time.Minute {
					t.Fatal("the engine goes on")
				}
			}
			if f, err := os.Create(filepath.Join(at, "b")); err == nil {
				_, err = f.WriteString("lost")
				if errors.Join(err, f.Sync()) == nil {
					t.Error("its filesystem takes writes")
				}
				_ = f.Close()
			}
			c.unstage("n1")
		})
	}
}
