package meta

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Options{InMemory: dir == ""})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// dump is every key and value.
func dump(t testing.TB, s *Machine) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := s.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.DefaultIteratorOptions)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			b, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			m[string(it.Item().Key())] = string(b)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func propose(t testing.TB, s *Store, c command.Command) command.Result {
	t.Helper()
	r, err := s.Propose(context.Background(), c)
	if err != nil {
		t.Fatalf("%T: %v", c, err)
	}
	return r
}

func node(id volume.NodeID, ps ...volume.PoolID) command.RegisterNode {
	c := command.RegisterNode{Now: 1, Node: volume.Node{ID: id}}
	for _, p := range ps {
		c.Node.Pools = append(c.Node.Pools, volume.Pool{ID: p, Name: "default", Kind: volume.PoolDir, Path: "/p", Capacity: 100 * gib, OverProvision: 2})
	}
	return c
}

func newVolume(n int, pool volume.PoolID) volume.Volume {
	id := volume.ID(fmt.Sprintf("vol-%020x", n))
	return volume.Volume{
		ID: id, Name: fmt.Sprint("name ", n), Tenant: "t", State: volume.Creating, Size: gib, CreatedAt: 5,
		Parameters:   volume.Parameters{Replicas: 1, MinInSync: 1, DataLocality: volume.LocalityPreferred, BlockSize: 4096},
		Capabilities: []volume.Capability{{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, MountFlags: []string{"noatime"}}},
		Replicas:     []volume.Replica{{ID: volume.ReplicaID(fmt.Sprintf("rep-%020x-0", n)), Node: "n1", Pool: pool, Role: volume.InSync}},
	}
}

func TestStateSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	propose(t, s, node("n1", "p1"))
	v := newVolume(1, "p1")
	propose(t, s, command.CreateVolume{Volume: v})
	propose(t, s, command.FinishCreate{Volume: v.ID})
	before, applied := dump(t, s.Machine), s.Applied()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := s.Propose(context.Background(), command.FinishCreate{Volume: v.ID})
	if !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := s.Volume(context.Background(), v.ID); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("read after Close: %v", err)
	}
	s = open(t, dir)
	if d := cmp.Diff(before, dump(t, s.Machine)); d != "" {
		t.Error(d)
	}
	if s.Applied() != applied || applied != 3 {
		t.Errorf("applied %d, was %d", s.Applied(), applied)
	}
}

func TestRestartsDoNotPileUpTables(t *testing.T) {
	dir := t.TempDir()
	for i := range 3 * tables {
		s := open(t, dir)
		propose(t, s, command.SetQuota{Tenant: fmt.Sprint("t", i), Limit: volume.Amounts{Volumes: 1}})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir)
	for deadline := time.Now().Add(20 * time.Second); s.db.Levels()[0].NumTables >= tables; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d tables", s.db.Levels()[0].NumTables)
		}
	}
	if qs, err := s.Quotas(context.Background()); err != nil || len(qs) != 3*tables {
		t.Errorf("%d quotas, %v", len(qs), err)
	}
}

// Tables are merged while commands go on, and nothing of either is lost. The log in use has its space.
func TestCompactionUnderLoad(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{memTable: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	propose(t, s, node("n1", "p1"))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			v := newVolume(g, "p1")
			v.Capabilities[0].MountFlags = []string{strings.Repeat("x", 4000)}
			for range 60 {
				propose(t, s, command.CreateVolume{Volume: v})
				propose(t, s, command.FinishCreate{Volume: v.ID})
				propose(t, s, command.BeginDelete{Volume: v.ID})
				propose(t, s, command.FinishDelete{Volume: v.ID})
			}
			propose(t, s, command.CreateVolume{Volume: v})
		})
	}
	wg.Wait()
	verify(t, s)
	if vs, err := s.Volumes(context.Background(), "", 0); err != nil || len(vs) != 8 {
		t.Errorf("%d volumes, %v", len(vs), err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	if err != nil || len(logs) == 0 || filepath.Base(logs[len(logs)-1]) == "00001.mem" {
		t.Fatalf("logs %v: %v", logs, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(logs[len(logs)-1], &st); err != nil || st.Blocks*512 < 2<<20 {
		t.Errorf("the log occupies %d bytes: %v", st.Blocks*512, err)
	}
	merged := 0
	for _, l := range s.db.Levels()[1:] {
		merged += l.NumTables
	}
	if n := s.db.Levels()[0].NumTables; n > 4*tables || merged == 0 {
		t.Errorf("%d tables are left on the first level, %d were merged", n, merged)
	}
}

func TestAForeignFormatIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	err := s.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte(keyFormat), []byte{FormatVersion + 1}) })
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(dir, Options{}); err == nil {
		t.Error("a newer format was opened", s.Close())
	}
}

func TestProposalsAtOnceShareTransactions(t *testing.T) {
	s := open(t, "")
	propose(t, s, node("n1", "p1"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	created := 0
	for i := range 300 {
		wg.Go(func() {
			v := newVolume(i, "p1")
			v.Name = fmt.Sprint("name ", i%100)
			v.Size = mib
			r, err := s.Propose(context.Background(), command.CreateVolume{Volume: v})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if r.(command.Volume).Created {
				created++
			}
		})
	}
	wg.Wait()
	if created != 100 || s.Applied() != 301 {
		t.Errorf("%d volumes made of 100 names, %d commands applied", created, s.Applied())
	}
	verify(t, s)
}

// Records as large as they may be, all of them touched at once, fit into transactions.
func TestTheLargestRecords(t *testing.T) {
	s := open(t, "")
	propose(t, s, node("n1", "p1"))
	report := command.ReportUsage{Node: "n1", Replicas: map[volume.ReplicaID]int64{}}
	flags := []string{strings.Repeat("<", 1<<20)}
	var wg sync.WaitGroup
	together := func(f func(i int)) {
		for i := range maxBatch {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	fit := func(c func(flags []string) command.Command) command.Command {
		n := sort.Search(command.MaxMountFlags, func(n int) bool { return c([]string{flags[0][:n]}).Check() != nil })
		return c([]string{flags[0][:n-1]})
	}
	together(func(i int) {
		v := newVolume(i, "p1")
		v.Size = mib
		propose(t, s, fit(func(flags []string) command.Command {
			v.Capabilities = []volume.Capability{{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, MountFlags: flags}}
			return command.CreateVolume{Volume: v}
		}))
		propose(t, s, command.FinishCreate{Volume: v.ID})
		propose(t, s, fit(func(flags []string) command.Command {
			return command.Attach{Volume: v.ID, Node: "n1", Capability: volume.Capability{Access: volume.AccessMount, Mode: volume.SingleNodeWriter, MountFlags: flags}}
		}))
	})
	for i := range command.MaxReported {
		report.Replicas[newVolume(i, "p1").Replicas[0].ID] = 1
	}
	together(func(i int) {
		propose(t, s, command.ModifyVolume{Volume: newVolume(i, "p1").ID, IOPS: new(int64(7))})
	})
	propose(t, s, report)
	verify(t, s)
}

func TestACancelledProposalIsNotLostTrackOf(t *testing.T) {
	s := open(t, "")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.Propose(ctx, node("n1", "p1")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if s.Applied() != 0 {
		t.Error("a proposal that was cancelled before it was made was applied")
	}
}

// After a failed transaction it is unknown what is durable: nothing more is applied until the next Open.
func TestAFailedTransactionStopsTheMachine(t *testing.T) {
	s := open(t, t.TempDir())
	propose(t, s, node("n1", "p1"))
	if err := s.Failed(); err != nil {
		t.Error(err)
	}
	err := s.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte(volumes+"vol-x"), []byte("damaged")) })
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []command.Command{command.FinishCreate{Volume: "vol-x"}, command.DeleteQuota{Tenant: "t"}} {
		if _, err := s.Propose(context.Background(), c); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("%T: %v", c, err)
		}
	}
	if err := s.Failed(); err == nil || errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a machine that needs a restart says %v", err)
	}
	if _, err := s.Volumes(context.Background(), "", 0); !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("list with a damaged record: %v", err)
	}
}

func BenchmarkApply(b *testing.B) {
	for _, where := range []string{"memory", "disk"} {
		b.Run(where, func(b *testing.B) {
			dir := ""
			if where == "disk" {
				dir = b.TempDir()
			}
			s := open(b, dir)
			propose(b, s, node("n1", "p1"))
			i := 0
			for b.Loop() {
				i++
				v := newVolume(i, "p1")
				v.Size = mib
				propose(b, s, command.CreateVolume{Volume: v})
				propose(b, s, command.FinishCreate{Volume: v.ID})
				propose(b, s, command.BeginDelete{Volume: v.ID})
				propose(b, s, command.FinishDelete{Volume: v.ID})
			}
		})
	}
}

func BenchmarkList10k(b *testing.B) {
	s := open(b, b.TempDir())
	propose(b, s, node("n1", "p1"))
	var wg sync.WaitGroup
	for i := range 10000 {
		wg.Go(func() {
			v := newVolume(i, "p1")
			v.Size = mib
			propose(b, s, command.CreateVolume{Volume: v})
			propose(b, s, command.FinishCreate{Volume: v.ID})
		})
	}
	wg.Wait()
	for b.Loop() {
		vs, err := s.Volumes(context.Background(), "", 0)
		if err != nil || len(vs) != 10000 {
			b.Fatal(len(vs), err)
		}
	}
}
