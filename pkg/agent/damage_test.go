package agent

import (
	"bytes"
	"io"
	"os"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// TestDamageIsReplaced: bytes of a snapshot rot on the disk of the node that the volume is used on. Once a scrub has found it,
// they are read from the other replica, and a third is filled from it, though the damaged one is the nearest.
func TestDamageIsReplaced(t *testing.T) {
	c := newTrio(t)
	c.create(16*mib, "n1", 1, 2)
	c.cluster.change(vol1, func(v *volume.Volume) { v.Attachment = nil })
	n := c.nodes["n1"]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(n.OpenEngine(t.Context(), "n1", vol1, 1))
	known, _ := n.known(vol1)
	e := known.get().inst.e
	want := bytes.Repeat([]byte("sixteen bytes.. "), 512<<10/16)
	must(e.WriteAt(t.Context(), want, 4*mib))
	s := c.snapshot("n1", "snap-1", false)
	holders, err := n.CutSnapshot(t.Context(), "n1", s)
	must(err)
	c.complete(s, holders)

	data, err := os.OpenFile(c.path("n1", "pool", "data"), os.O_RDWR, 0)
	must(err)
	defer data.Close()
	all := make([]byte, 64*mib) // the file is as large as the pool
	_, err = data.ReadAt(all, 0)
	if err != io.EOF {
		must(err)
	}
	at := bytes.Index(all, want[:256<<10])
	if at < 0 {
		t.Fatal("what was written is not in the pool's file")
	}
	store := n.cfg.Pools[0].(extentPool)
	rot := func(b byte) {
		_, err := data.WriteAt([]byte{b}, int64(at+100<<10))
		must(err)
		must(data.Sync())
	}
	good := all[at+100<<10]
	for start := time.Now(); ; rot(good) { // checksums are made in the background: of what is good
		time.Sleep(200 * time.Millisecond)
		rot(good ^ 1)
		must(store.Scrub(t.Context()))
		if u := n.usage(); u.DamagedReplicas[c.replica(1).ID] && u.DamagedSnapshots["snap-1"] {
			break
		}
		if time.Since(start) > 20*time.Second {
			t.Fatal("no scrub finds the damage")
		}
	}
	got := make([]byte, len(want))
	must(e.ReadAt(t.Context(), got, 4*mib))
	if !bytes.Equal(got, want) {
		t.Error("what is read is not what was written")
	}

	r := c.replica(3)
	must(c.nodes["n3"].CreateReplica(t.Context(), "n3", control.ReplicaSpec{ID: r.ID, Volume: vol1, Pool: r.Pool, Size: 16 * mib}))
	_, err = c.cluster.Commit(t.Context(), vol1, replication.Change{AddReplica: &replication.Member{ID: r.ID, Node: r.Node, Pool: r.Pool}})
	must(err)
	must(n.OpenEngine(t.Context(), "n1", vol1, 1)) // reads the record anew
	c.waitInSync(3)
	must(n.Evict(t.Context(), "n1", vol1, c.cluster.epoch(vol1), c.replica(1).ID))
	dev, err := c.nodes["n3"].cfg.Pools[0].OpenSnapshot(t.Context(), "snap-1")
	must(err)
	clear(got)
	must(dev.ReadAt(t.Context(), got, 4*mib))
	must(dev.Close())
	if !bytes.Equal(got, want) {
		t.Error("the snapshot on the new replica is not what was cut")
	}
	c.detach("n1")
}
