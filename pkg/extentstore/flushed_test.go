package extentstore

import (
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// When a replica was flushed last is known in the process, and stored now and then: those who must choose a replica after a
// crash look at it.
func TestLastFlush(t *testing.T) {
	m := newMachine()
	p := openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	ctx := t.Context()
	start := volume.Timestamp(time.Now().UnixNano())
	r, quiet := newReplica(t, p, "r", 16*mib, ""), newReplica(t, p, "quiet", 16*mib, "")
	must(t, quiet.Flush(ctx)) // of nothing
	write := func() (at volume.Timestamp) {
		t.Helper()
		before := p.LastFlush("r")
		must(t, r.WriteAt(ctx, make([]byte, 4096), 0))
		if p.LastFlush("r") != before {
			t.Error("a write is no flush")
		}
		must(t, r.Flush(ctx))
		if at = p.LastFlush("r"); at <= before {
			t.Errorf("flushed at %d after %d", at, before)
		}
		return at
	}
	stored := write()
	p.saveFlushed()
	write()
	m = m.crash(1)
	p = openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	if got := p.LastFlush("r"); got != stored || got < start || p.LastFlush("quiet") != 0 || p.LastFlush("none") != 0 {
		t.Errorf("after a crash: %d, stored was %d; %d without data", got, stored, p.LastFlush("quiet"))
	}
	var err error
	r, err = p.OpenReplica(ctx, "r")
	must(t, err)
	last := write()
	must(t, p.Close()) // stores what is not
	m = m.reopen()
	sound(t, m)
	p = openMem(t, m, Options{Capacity: 64 * mib, manual: true})
	defer p.Close()
	if got := p.LastFlush("r"); got != last {
		t.Errorf("after a stop: %d, want %d", got, last)
	}
	must(t, p.DeleteReplica(ctx, "r"))
	must(t, p.CreateReplica(ctx, ReplicaSpec{ID: "r", Volume: "v", Size: 16 * mib}))
	settle(t, p)
	if p.LastFlush("r") != 0 {
		t.Error("a new replica has the time of an old one")
	}
	sound(t, m)
}
