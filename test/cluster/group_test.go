package cluster

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/test/harness"
)

// ring is how many blocks of a volume a chain of dependent writes uses in turn.
const ring = 64

// chain writes numbers to two devices in turn, each only after the one before it was answered: a number is on the first
// device before it is sent to the second, and there before the next is sent to the first.
type chain struct {
	devices [2]*os.File
	base    int // block of the ring on both
	first   int // which device is the first
	written atomic.Uint64
}

func (c *chain) run(stop <-chan struct{}) error {
	buf := aligned()
	for k := uint64(1); ; k++ {
		for i := range 2 {
			select {
			case <-stop:
				return nil
			default:
			}
			binary.LittleEndian.PutUint64(buf, k)
			if _, err := c.devices[(c.first+i)%2].WriteAt(buf, c.at(k)); err != nil {
				return fmt.Errorf("number %d: %w", k, err)
			}
		}
		c.written.Store(k)
	}
}

func (c *chain) at(k uint64) int64 { return int64(c.base+int(k%ring)) * blockSize }

// newest reads the ring of a device: the newest number in it, with all before it that the ring still has.
func (c *chain) newest(path string) (uint64, error) {
	f, err := direct(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var has [ring]uint64
	var newest uint64
	buf := aligned()
	for i := range has {
		if _, err := f.ReadAt(buf, int64(c.base+i)*blockSize); err != nil {
			return 0, err
		}
		has[i] = binary.LittleEndian.Uint64(buf)
		newest = max(newest, has[i])
	}
	for k := newest; k > 0 && k+ring > newest; k-- {
		if got := has[k%ring]; got != k {
			return 0, fmt.Errorf("%s has number %d, but %d in the place of %d", path, newest, got, k)
		}
	}
	return newest, nil
}

func direct(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// ordered is an error where two devices are not of one instant.
func (c *chain) ordered(paths [2]string) error {
	a, err := c.newest(paths[c.first])
	if err != nil {
		return err
	}
	b, err := c.newest(paths[1-c.first])
	if err != nil {
		return err
	}
	if b > a || a > b+1 {
		return fmt.Errorf("the volume that is written first has number %d, the second %d", a, b)
	}
	return nil
}

// TestChain: the check of an order can fail.
func TestChain(t *testing.T) {
	for _, tc := range []struct {
		name          string
		first, second []uint64 // numbers in the order of their writing
		ok            bool
	}{
		{"nothing", nil, nil, true},
		{"equal", []uint64{1, 2, 3}, []uint64{1, 2, 3}, true},
		{"between the two", []uint64{1, 2, 3}, []uint64{1, 2}, true},
		{"the second without the first", []uint64{1, 2}, []uint64{1, 2, 3}, false},
		{"the first was cut later", []uint64{1, 2, 3}, []uint64{1}, false},
		{"one is missing in between", []uint64{1, 3}, []uint64{1, 2}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &chain{}
			var paths [2]string
			for i, numbers := range [][]uint64{tc.first, tc.second} {
				f, err := os.CreateTemp(t.TempDir(), "")
				must(t, err)
				must(t, f.Truncate(ring*blockSize))
				for _, k := range numbers {
					_, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, k), c.at(k))
					must(t, err)
				}
				must(t, f.Close())
				paths[i] = f.Name()
			}
			if err := c.ordered(paths); (err == nil) != tc.ok {
				t.Error(err)
			}
		})
	}
}

// pair is two volumes under writers whose writes depend on one another, in both directions.
type pair struct {
	w      *world
	claims [2]*harness.Claim
	nodes  [2]int
	chains [2]*chain
	stop   chan struct{}
	tasks  errgroup.Group
}

func (w *world) pair(name string, nodes [2]int) *pair {
	w.t.Helper()
	p := &pair{w: w, nodes: nodes, chains: [2]*chain{{}, {base: ring, first: 1}}}
	for i, n := range nodes {
		p.claims[i] = &harness.Claim{Name: fmt.Sprint(name, "-", i), Size: 16 * mib, Parameters: map[string]string{"replicas": "3"}}
		must(w.t, w.at(n).Up(w.t.Context(), p.claims[i]))
	}
	p.begin()
	return p
}

func (p *pair) begin() {
	p.w.t.Helper()
	p.stop, p.tasks = make(chan struct{}), errgroup.Group{}
	for _, c := range p.chains {
		for i, n := range p.nodes {
			var err error
			c.devices[i], err = direct(p.w.at(n).TargetPath(p.claims[i]))
			must(p.w.t, err)
		}
		p.tasks.Go(func() error { return c.run(p.stop) })
	}
}

// rest ends the writers.
func (p *pair) rest() error {
	close(p.stop)
	err := p.tasks.Wait()
	for _, c := range p.chains {
		for _, f := range c.devices {
			f.Close()
		}
	}
	return err
}

// goesOn waits until both chains have grown.
func (p *pair) goesOn() {
	p.w.t.Helper()
	for _, c := range p.chains {
		from := c.written.Load()
		eventually(p.w.t, backWithin, func(context.Context) error {
			if c.written.Load() == from {
				return fmt.Errorf("the writers rest at number %d", from)
			}
			return nil
		})
	}
}

func (p *pair) ids() []string { return []string{p.claims[0].ID(), p.claims[1].ID()} }

// cut makes a group of snapshots.
func (p *pair) cut(ctx context.Context, at int, name string) (g *csi.VolumeGroupSnapshot, err error) {
	o := p.w.at(at)
	err = o.Call(ctx, "CreateVolumeGroupSnapshot "+name, func(ctx context.Context) error {
		r, err := o.CSI.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: p.ids()})
		g = r.GetGroupSnapshot()
		return err
	})
	return g, err
}

func (p *pair) delete(g *csi.VolumeGroupSnapshot) error {
	o := p.w.at(0)
	return o.Call(p.w.t.Context(), "DeleteVolumeGroupSnapshot", func(ctx context.Context) error {
		_, err := o.CSI.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{
			GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: members(g)})
		return err
	})
}

func members(g *csi.VolumeGroupSnapshot) (ids []string) {
	for _, s := range g.GetSnapshots() {
		ids = append(ids, s.GetSnapshotId())
	}
	return ids
}

// verify restores a group and looks at the order of what is in it.
func (p *pair) verify(g *csi.VolumeGroupSnapshot) {
	t := p.w.t
	t.Helper()
	if !g.GetReadyToUse() || len(g.GetSnapshots()) != 2 {
		t.Fatalf("the group is %v", g)
	}
	var paths [2]string
	var images [2]*harness.Claim
	o := p.w.at(p.w.rnd.IntN(3))
	for i, id := range p.ids() {
		for _, s := range g.GetSnapshots() {
			if s.GetSourceVolumeId() == id {
				images[i] = &harness.Claim{Name: fmt.Sprint("of-", s.GetSnapshotId()), Size: 16 * mib, Source: harness.FromSnapshot(s.GetSnapshotId())}
			}
		}
		must(t, o.Up(t.Context(), images[i]))
		paths[i] = o.TargetPath(images[i])
	}
	for _, c := range p.chains {
		if err := c.ordered(paths); err != nil {
			t.Errorf("group %s: %v", g.GetGroupSnapshotId(), err)
		}
	}
	for _, c := range images {
		must(t, o.Down(t.Context(), c))
		must(t, o.Delete(t.Context(), c))
	}
}

// count is how many groups and snapshots there are.
func (p *pair) count(ctx context.Context, at int) (groups, snapshots int, err error) {
	var views []struct{ State string }
	if err := p.w.ctl(ctx, at, &views, "snapshot", "group", "list"); err != nil {
		return 0, 0, err
	}
	list, err := p.w.Nodes()[at].CSI().ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	return len(views), len(list.GetEntries()), err
}

// TestPoint35_GroupOrder cuts groups of volumes on different nodes, and on one, while writers go from one volume to the
// other: what is in a group is of one instant.
func TestPoint35_GroupOrder(t *testing.T) {
	w := newWorld(t, options{})
	for _, nodes := range [][2]int{{0, 1}, {2, 2}} {
		p := w.pair(fmt.Sprint("on", nodes[0]+1, nodes[1]+1), nodes)
		p.goesOn()
		var groups []*csi.VolumeGroupSnapshot
		for i := range 5 {
			time.Sleep(time.Duration(w.rnd.IntN(100)) * time.Millisecond)
			g, err := p.cut(t.Context(), w.rnd.IntN(3), fmt.Sprint("group", nodes[0], i))
			must(t, err)
			groups = append(groups, g)
			p.goesOn()
		}
		must(t, p.rest())
		for _, g := range groups {
			p.verify(g)
			must(t, p.delete(g))
		}
		p.end()
	}
	w.nothingLeft()
}

func (p *pair) end() {
	t := p.w.t
	t.Helper()
	for i, n := range p.nodes {
		must(t, p.w.at(n).Down(t.Context(), p.claims[i]))
		must(t, p.w.at(n).Delete(t.Context(), p.claims[i]))
	}
}

// TestPoint36_PartialGroup: the node of one member is killed or cut off while a group is cut. The call says so, or the group
// is whole; nothing in between stays, whoever asks, and the other volume goes on.
func TestPoint36_PartialGroup(t *testing.T) {
	w := newWorld(t, options{})
	p := w.pair("pair", [2]int{0, 1})
	leader, err := w.leader(t.Context())
	must(t, err)
	t.Logf("n%d leads", leader+1)
	for lap := range 2 { // killed, cut off
		name := fmt.Sprint("group-", lap)
		p.goesOn()
		kill := lap%2 == 0
		type result struct {
			g   *csi.VolumeGroupSnapshot
			err error
		}
		done := make(chan result, 1)
		go func() {
			once := p.w.at(0)
			once.Patience = 0
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var r result
			r.err = once.Call(ctx, "CreateVolumeGroupSnapshot "+name, func(ctx context.Context) error {
				resp, err := once.CSI.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: p.ids()})
				r.g = resp.GetGroupSnapshot()
				return err
			})
			done <- r
		}()
		time.Sleep(time.Duration(w.rnd.IntN(40)) * time.Millisecond)
		if kill {
			must(t, w.Nodes()[1].Kill())
		} else {
			must(t, w.lab.Isolate(1))
		}
		r := <-done
		t.Logf("%s, kill %v: %v", name, kill, r.err)
		if kill {
			_ = p.rest() // one of its devices is dead
			time.Sleep(time.Duration(w.rnd.IntN(3)) * time.Second)
			must(t, w.Nodes()[1].Launch())
			must(t, w.Nodes()[1].WaitReady(t.Context()))
			s := &served{w: w, claim: p.claims[1], owner: 1, h: nil}
			must(t, s.clear(1))
			must(t, s.bring(1))
		} else {
			time.Sleep(time.Duration(w.rnd.IntN(3)) * time.Second)
			must(t, w.lab.HealAll())
			p.goesOn()
			must(t, p.rest())
		}
		if r.err == nil {
			p.verify(r.g)
			must(t, p.delete(r.g))
		}
		for i := range w.Nodes() {
			eventually(t, backWithin, func(ctx context.Context) error {
				groups, snapshots, err := p.count(ctx, i)
				if err == nil && groups+snapshots > 0 {
					err = fmt.Errorf("%d groups and %d snapshots stay after %s", groups, snapshots, name)
				}
				return err
			})
		}
		// The chains of the restored device begin anew: numbers of a chain that a crash cut short need not be there.
		for i, n := range p.nodes {
			must(t, w.blank(n, p.claims[i]))
		}
		p.begin()
		p.goesOn()
		// The same call goes through now.
		g, err := p.cut(t.Context(), 2, name)
		must(t, err)
		must(t, p.rest())
		p.verify(g)
		must(t, p.delete(g))
		p.begin()
	}
	must(t, p.rest())
	p.end()
	w.nothingLeft()
}

// blank zeroes the rings of a device.
func (w *world) blank(node int, c *harness.Claim) error {
	f, err := direct(w.at(node).TargetPath(c))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := aligned()
	for i := range int64(2 * ring) {
		if _, err := f.WriteAt(buf, i*blockSize); err != nil {
			return err
		}
	}
	return nil
}
