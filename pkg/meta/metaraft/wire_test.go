package metaraft

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	bolt "go.etcd.io/bbolt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(nil, frame{id: 7, kind: 1, wait: time.Second, payload: []byte("payload")}))
	f.Add(appendFrame(nil, frame{}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readFrame(bytes.NewReader(b))
		if err != nil {
			return
		}
		if again := appendFrame(nil, got); len(got.payload) > maxPayload || !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

func FuzzDecodeLog(f *testing.F) {
	f.Add(uint64(3), encodeLog(&raft.Log{Index: 3, Term: 2, Type: raft.LogBarrier, Data: []byte("data"), Extensions: []byte("x"), AppendedAt: time.Unix(5, 6)}))
	f.Add(uint64(0), encodeLog(&raft.Log{}))
	f.Fuzz(func(t *testing.T, index uint64, b []byte) {
		var l raft.Log
		if decodeLog(index, b, &l) == nil && !bytes.Equal(encodeLog(&l), b) {
			t.Fatalf("%x became %x", b, encodeLog(&l))
		}
	})
}

func TestLogStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), logFile)
	w := &watch{limit: time.Hour, tell: func(bool) { t.Error("stalled") }}
	open := func() *logStore {
		s, err := openLogStore(path, w, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	edges := func(first, last uint64) {
		t.Helper()
		f, err1 := s.FirstIndex()
		l, err2 := s.LastIndex()
		if err := errors.Join(err1, err2); err != nil || f != first || l != last {
			t.Errorf("from %d to %d, %v; want %d to %d", f, l, err, first, last)
		}
	}
	edges(0, 0)
	var logs []*raft.Log
	for i := uint64(5); i < 1005; i++ {
		logs = append(logs, &raft.Log{Index: i, Term: i / 10, Type: raft.LogCommand, Data: bytes.Repeat([]byte{byte(i)}, 300), AppendedAt: time.Unix(0, int64(i)+1)})
	}
	if err := s.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	if _, err := openLogStore(path, w, nil); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	for _, step := range []struct{ from, to, first, last uint64 }{{5, 400, 401, 1004}, {900, 1004, 401, 899}, {401, 401, 402, 899}} {
		if err := s.DeleteRange(step.from, step.to); err != nil {
			t.Fatal(err)
		}
		edges(step.first, step.last)
	}
	if err := errors.Join(s.SetUint64(keyTerm, 9), s.Set(keyVotedFor, nobody), s.Close()); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	for i := uint64(1); i < 1010; i++ {
		var l raft.Log
		err := s.GetLog(i, &l)
		if i < 402 || i > 899 {
			if !errors.Is(err, raft.ErrLogNotFound) {
				t.Fatalf("entry %d: %v", i, err)
			}
			continue
		}
		if err != nil || !cmp.Equal(l, *logs[i-5]) {
			t.Fatalf("entry %d: %v %+v", i, err, l)
		}
	}
	if n, err := s.GetUint64(keyTerm); n != 9 || err != nil {
		t.Error(n, err)
	}
	if n, err := s.GetUint64([]byte("other")); n != 0 || err != nil {
		t.Error(n, err)
	}
	if err := s.DeleteRange(1, 2000); err != nil {
		t.Fatal(err)
	}
	edges(0, 0)
}

// A log that is damaged, or that cannot be written, ends raft and not the process; what it said before stays so.
func TestALogThatFails(t *testing.T) {
	var failures int
	s, err := openLogStore(filepath.Join(t.TempDir(), logFile), &watch{limit: time.Hour, tell: func(bool) {}}, func(error) { failures++ })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLog(&raft.Log{Index: 1, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketLog).Put(indexKey(1), []byte("damaged")) }); err != nil {
		t.Fatal(err)
	}
	ends := func(what string, f func()) {
		ended := make(chan bool)
		go func() {
			defer close(ended)
			f()
			t.Errorf("%s came back", what)
		}()
		<-ended
	}
	var l raft.Log
	if found, err := s.read(1, &l); !found || !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("read: %v, %v", found, err)
	}
	ends("reading", func() { _ = s.GetLog(1, &l) })
	ends("keeping a term", func() { _ = s.SetUint64(keyTerm, 3) })
	if err := s.StoreLog(&raft.Log{Index: 2}); err == nil {
		t.Error("written after a failure")
	}
	if failures != 1 {
		t.Errorf("told %d times", failures)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A controller whose log fails takes no part any more, the others go on, and it can be closed and started again.
func TestAControllerWhoseLogFails(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	leader := c.settled(3)
	leader.mustSet("t", 1)
	_ = leader.store.logs.fail(errors.New("input/output error"))
	other := c.follower(leader)
	other.mustSet("t", 2)
	if err := leader.store.Failed(); err == nil || errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("it says %v", err)
	}
	if err := leader.set(within(t), "t", 3); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("it answered %v", err)
	}
	leader.stop()
	leader.start()
	leader.mustSee("t", 2)
}

func TestWatch(t *testing.T) {
	told := make(chan bool, 9)
	w := &watch{limit: time.Millisecond, tell: func(b bool) { told <- b }}
	a, b := w.begin(), w.begin()
	if !<-told || !w.stalled() {
		t.Error("not stalled")
	}
	for w.lateNow() < 2 {
		time.Sleep(time.Millisecond)
	}
	a()
	if !w.stalled() {
		t.Error("one is still waiting")
	}
	b()
	if <-told || w.stalled() {
		t.Error("still stalled")
	}
	w.limit = time.Hour
	w.begin()()
	if len(told) != 0 {
		t.Error("told of a quick one")
	}
}

func (w *watch) lateNow() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.late
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	first, err := openIdentity(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	second, err := openIdentity(dir, "a")
	if err != nil || second.Incarnation != first.Incarnation || second.Starts != first.Starts+1 || second.Session == first.Session {
		t.Errorf("%+v after %+v, %v", second, first, err)
	}
	if _, err := openIdentity(dir, "b"); err == nil {
		t.Error("another's directory")
	}
	for _, bad := range []string{"", "{", `{"version":9}`} {
		if err := os.WriteFile(filepath.Join(dir, identityFile), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openIdentity(dir, "a"); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, identityFile)), os.WriteFile(filepath.Join(dir, logFile), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := openIdentity(dir, "a"); !errors.Is(err, volume.ErrDataLoss) {
		t.Errorf("a log without an identity: %v", err)
	}
}

// Whoever sends what no controller sends is dropped, and nobody else is harmed.
func TestNoise(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	m := &mux{ln: listen(t, "127.0.0.1:0"), log: testLogger(""), network: new(net.Dialer).DialContext,
		handle: func(_ context.Context, _ volume.NodeID, kind callKind, b []byte) (uint8, []byte) {
			if kind == callPropose {
				return refusal(errNotLeader)
			}
			return answerOK, b
		}}
	m.start()
	defer func() {
		if err := m.shut(); err != nil {
			t.Error(err)
		}
		m.wait()
	}()
	for _, noise := range []string{"GET / HTTP/1.1\r\n\r\n", preface, preface + "x", preface + "c\xff\xff\xff\xff0123456789012"} {
		c, err := net.Dial("tcp", m.ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Write([]byte(noise))
		if err != nil {
			t.Error(err)
		}
		if noise != preface { // that one waits for the rest, for a while
			if n, _ := io.Copy(io.Discard, c); n != 0 {
				t.Errorf("%q was answered", noise)
			}
		}
		_ = c.Close()
	}
	peers := &callers{mux: m}
	if b, err := peers.call(ctx, m.ln.Addr().String(), callKnown, []byte("hello")); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := peers.call(ctx, m.ln.Addr().String(), callPropose, nil); !errors.Is(err, errNotLeader) {
		t.Error(err)
	}
	if _, err := peers.call(ctx, "127.0.0.1:1", callKnown, nil); !errors.Is(err, errUnsent) {
		t.Error(err)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := peers.call(short, m.ln.Addr().String(), callKnown, nil); err == nil {
		t.Error("a call after its end")
	}
}
