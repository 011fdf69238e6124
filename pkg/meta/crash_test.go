package meta

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// What the files hold while the process runs is what a kill leaves: all that was acknowledged, each command whole, and
// the log goes on from there.
func TestKilledAtAnyTime(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	propose(t, s, node("n1", "p1"))
	propose(t, s, node("n2", "p2"))
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			v := newVolume(i, "p1")
			v.Size = mib
			x := volume.SnapshotID(fmt.Sprint("s", i))
			to := copyOf(i, x, 1, "p1", "p2")
			for _, c := range []command.Command{command.CreateVolume{Volume: v}, command.FinishCreate{Volume: v.ID},
				command.BeginSnapshot{ID: x, Name: string(x), Volume: v.ID},
				command.FinishSnapshot{Cut: command.Cut{Snapshot: x, ConfigVersion: 1, Holders: []volume.ReplicaID{replica(i, 0)}}},
				command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID}, to, command.AddHolder{Snapshot: x, Replica: to.To.ID},
				command.BeginDelete{Volume: v.ID}, command.FinishDelete{Volume: v.ID}} {
				if _, err := s.Propose(context.Background(), c); err != nil {
					t.Errorf("%T: %v", c, err)
					return
				}
			}
		}
	}()
	for round := range 5 {
		for at := s.Applied(); s.Applied() < at+7; {
			time.Sleep(time.Millisecond)
		}
		acknowledged := s.Applied()
		left := t.TempDir()
		if err := os.CopyFS(left, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		after := open(t, left)
		if after.Applied() < acknowledged {
			t.Errorf("round %d: %d commands are left of %d", round, after.Applied(), acknowledged)
		}
		verify(t, after)
		next := after.Applied() + 1
		propose(t, after, command.SetQuota{Tenant: "t", Limit: volume.Amounts{Volumes: 1}})
		if after.Applied() != next {
			t.Errorf("index %d after %d", after.Applied(), next-1)
		}
		if err := after.Close(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-done
	verify(t, s)
}
