package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/ballast-csi/ballast/test/harness"
)

// clusterShow is the play of three nodes. show's daemon is the one that ballastctl is asked through.
type clusterShow struct {
	show
	c      *harness.Cluster
	on     int // the node that has the volume
	ledger *ledger
	rates  []string
}

func (s *clusterShow) play(ctx context.Context) error {
	start := time.Now()
	s.out.title("Ballast: three nodes, and one of them dies", "three real daemons on this machine, a database-like writer, kill -9")
	for _, scene := range []struct {
		title string
		fn    func(context.Context) error
	}{
		{"Three nodes become a cluster", s.form},
		{"A volume that lives on all three", s.make},
		{"A database at work", s.work},
		{"The node under it is killed", s.kill},
		{"The node comes back", s.comeBack},
		{"A snapshot of all of it, and what an admin sees", s.look},
		{"Clean up", s.cleanUp},
	} {
		if err := s.scene(ctx, scene.title, scene.fn); err != nil {
			return err
		}
	}
	fmt.Fprintf(s.out.w, "\n  %s %s\n\n", s.out.paint("1;32", "Nothing was lost,"), fmt.Sprintf("in %s. Nothing of it is left on this machine.", short(time.Since(start))))
	return nil
}

// at is the orchestrator's hand on a node.
func (s *clusterShow) at(i int) *harness.Orchestrator {
	n := s.c.Nodes()[i]
	return &harness.Orchestrator{CSI: n.CSI(), NodeID: n.NodeID(), Dir: filepath.Join(filepath.Dir(n.Dir()), "pods", n.NodeID()),
		PerCall: 30 * time.Second, Patience: time.Minute}
}

func (s *clusterShow) name(i int) string { return s.c.Nodes()[i].NodeID() }

func (s *clusterShow) form(ctx context.Context) error {
	s.out.say("One binary, three times. The first begins a cluster; the others are let in with a token.")
	if err := s.step("n1 is started: a cluster of one", func() error { return s.c.Nodes()[0].Start(ctx) }); err != nil {
		return err
	}
	for i := 1; i < len(s.c.Nodes()); i++ {
		if err := s.step(s.name(i)+" joins", func() error { return s.c.Join(ctx, i) }); err != nil {
			return err
		}
	}
	if err := s.step("each of them has a vote", func() error { return s.c.WaitVoting(ctx, len(s.c.Nodes())) }); err != nil {
		return err
	}
	return s.ctl(ctx, "cluster", "status")
}

// until asks ballastctl, in JSON, until what it said will do.
func (s *clusterShow) until(ctx context.Context, args []string, into any, done func() bool) error {
	for begin := time.Now(); time.Since(begin) < 2*time.Minute; {
		out, err := s.d.Ctl(ctx, append(args, "-o", "json")...)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(out, into); err != nil {
			return fmt.Errorf("%w in %s", err, out)
		}
		if done() {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("ballastctl %s: it takes more than two minutes", strings.Join(args, " "))
}

func (s *clusterShow) make(ctx context.Context) error {
	s.out.say("replicas: 3. Every write is on three disks before it is acknowledged.")
	c := s.claim("accounts", 512*mib)
	c.Parameters["replicas"] = "3"
	s.o = s.at(s.on)
	if err := s.bring(ctx, c); err != nil {
		return err
	}
	return s.ctl(ctx, "replica", "list")
}

// rate shows what the writer does for some seconds.
func (s *clusterShow) rate(ctx context.Context, when string) error {
	const span = 2 * time.Second
	before := s.ledger.written.Load()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(span):
	}
	s.out.proof("%s", s.note(when, s.ledger.written.Load()-before, span))
	return s.ledger.failed()
}

// during measures the writer while fn runs.
func (s *clusterShow) during(when string, fn func() error) error {
	begin, before := time.Now(), s.ledger.written.Load()
	err := fn()
	s.note(when, s.ledger.written.Load()-before, time.Since(begin))
	return err
}

func (s *clusterShow) note(when string, n int64, span time.Duration) string {
	line := fmt.Sprintf("%-34s %6.0f synced transactions a second", when, float64(n)/span.Seconds())
	s.rates = append(s.rates, line)
	return line
}

func (s *clusterShow) work(ctx context.Context) (err error) {
	s.out.say("It appends a numbered record, syncs, and only then calls it committed.")
	if s.ledger, err = openLedger(s.path(s.claims[0])); err != nil {
		return err
	}
	return s.rate(ctx, "with three replicas:")
}

func (s *clusterShow) kill(ctx context.Context) error {
	c := s.claims[0]
	dead := s.c.Nodes()[s.on]
	s.out.say("kill -9 of %s, where the database runs. Its device dies with it, as a power failure would have it.", dead.NodeID())
	if err := s.step(dead.NodeID()+" is killed", dead.Kill); err != nil {
		return err
	}
	begin := time.Now()
	committed := s.ledger.end()
	s.on = 1
	s.d, s.o = s.c.Nodes()[s.on], s.at(s.on)
	s.out.say("The orchestrator moves the pod to %s. The dead node is fenced first: should it still", s.o.NodeID)
	s.out.say("write, nobody would hear it.")
	gone := *s.o
	gone.NodeID = dead.NodeID()
	for _, call := range []struct {
		what string
		fn   func() error
	}{
		{"ControllerUnpublishVolume from " + dead.NodeID(), func() error { return gone.Detach(ctx, c) }},
		{"ControllerPublishVolume to " + s.o.NodeID, func() error { return s.o.Attach(ctx, c) }},
		{"NodeStageVolume", func() error { return s.o.Stage(ctx, c) }},
		{"NodePublishVolume", func() error { return s.o.Publish(ctx, c) }},
	} {
		if err := s.step(call.what, call.fn); err != nil {
			return err
		}
	}
	s.out.proof("the volume is back %s after the node died", short(time.Since(begin)))
	found, err := readLedger(s.path(c))
	if err != nil {
		return err
	}
	if found < committed {
		return fmt.Errorf("%d transactions were committed, %d are left", committed, found)
	}
	s.out.proof("%s transactions were committed before it; all of them are there", humanize.Comma(committed))
	if s.ledger, err = openLedger(s.path(c)); err != nil {
		return err
	}
	if err := s.rate(ctx, "with one node dead:"); err != nil {
		return err
	}
	if err := s.step("a bulk load of 96 MiB, which "+dead.NodeID()+" misses", func() error { return s.load(96 * mib) }); err != nil {
		return err
	}
	return s.ctl(ctx, "volume", "why", c.Name)
}

func (s *clusterShow) comeBack(ctx context.Context) error {
	s.out.say("What %s missed is known, extent by extent: only that is copied, while the database goes on,", s.name(0))
	s.out.say("and no faster than the database can bear.")
	if err := s.c.Nodes()[0].Launch(); err != nil {
		return err
	}
	if err := s.step("all three replicas are in sync again", func() error {
		return s.during("while "+s.name(0)+" is brought up:", func() error { return s.inSync(ctx) })
	}); err != nil {
		return err
	}
	if err := s.rate(ctx, "with three replicas again:"); err != nil {
		return err
	}
	return s.ctl(ctx, "replica", "list")
}

// inSync draws a bar until every replica of the volume is in sync.
func (s *clusterShow) inSync(ctx context.Context) error {
	var v struct {
		Replicas []struct {
			Role   string
			Resync *struct{ DoneBytes, LeftBytes, BytesPerSecond int64 }
		}
	}
	var copied int64
	err := s.until(ctx, []string{"volume", "get", s.claims[0].Name}, &v, func() bool {
		good := 0
		for _, r := range v.Replicas {
			if r.Role == "in-sync" {
				good++
			}
			if x := r.Resync; x != nil {
				copied = max(copied, x.DoneBytes+x.LeftBytes)
				s.out.bar("resync", x.DoneBytes, x.DoneBytes+x.LeftBytes, x.BytesPerSecond)
			}
		}
		v.Replicas = nil
		return good == len(s.c.Nodes())
	})
	if err != nil {
		return err
	}
	s.out.barEnd("resync", copied)
	return s.ledger.failed()
}

// load writes a file of random bytes, as a bulk load beside the database does.
func (s *clusterShow) load(size int64) error {
	f, err := os.Create(filepath.Join(s.path(s.claims[0]), "bulk"))
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), size)
	return errors.Join(err, f.Sync(), f.Close())
}

func (s *clusterShow) look(ctx context.Context) error {
	var err error
	if err := s.step("CreateSnapshot, on all nodes at once", func() error {
		s.snapshot, err = s.o.Snapshot(ctx, s.claims[0], "accounts-monday")
		return err
	}); err != nil {
		return err
	}
	committed := s.ledger.end()
	if err := s.ledger.failed(); err != nil {
		return err
	}
	s.out.proof("%s transactions in all, no error", humanize.Comma(committed))
	s.out.say("What the database felt of it all:")
	for _, line := range s.rates {
		s.out.say("  %s", line)
	}
	for _, args := range [][]string{{"volume", "list"}, {"node", "list"}, {"audit", "--last", "6"}} {
		if err := s.ctl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

func (s *clusterShow) cleanUp(ctx context.Context) error {
	c := s.claims[0]
	if err := s.step("the volume unmounted, detached and deleted", func() error {
		old := s.at(0)
		if err := errors.Join(old.Unpublish(ctx, c), old.Unstage(ctx, c)); err != nil {
			return err
		}
		if err := s.o.Down(ctx, c); err != nil {
			return err
		}
		if err := s.o.DeleteSnapshot(ctx, s.snapshot); err != nil {
			return err
		}
		return s.o.Delete(ctx, c)
	}); err != nil {
		return err
	}
	if err := s.step("three daemons stopped", func() error {
		var errs []error
		for _, n := range s.c.Nodes() {
			errs = append(errs, n.Stop())
		}
		return errors.Join(errs...)
	}); err != nil {
		return err
	}
	for _, n := range s.c.Nodes() {
		if left := n.Leaks(c.ID()); len(left) > 0 {
			return fmt.Errorf("left behind by %s: %s", n.NodeID(), strings.Join(left, "; "))
		}
	}
	s.out.proof("no mount, no loop device, no FUSE connection, no process is left")
	return nil
}

// ledger is a file of numbered records, each synced before it counts.
type ledger struct {
	written atomic.Int64
	stop    chan struct{}
	done    chan struct{}
	err     error // after done
}

const record = 4096

// openLedger goes on writing after the records that are there.
func openLedger(dir string) (*ledger, error) {
	n, err := readLedger(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "ledger"), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	l := &ledger{stop: make(chan struct{}), done: make(chan struct{})}
	l.written.Store(n)
	go func() {
		defer close(l.done)
		l.err = errors.Join(l.write(f), f.Close())
	}()
	return l, nil
}

func (l *ledger) write(f *os.File) error {
	b := make([]byte, record)
	for {
		select {
		case <-l.stop:
			return nil
		default:
		}
		n := l.written.Load()
		for i := 0; i < record; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], uint64(n))
		}
		if _, err := f.WriteAt(b, n*record); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		l.written.Add(1)
	}
}

// end stops the writer, if its device has not, and returns how many records were committed.
func (l *ledger) end() int64 {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	<-l.done
	return l.written.Load()
}

// failed is the writer's error, if it has ended with one.
func (l *ledger) failed() error {
	select {
	case <-l.done:
		return l.err
	default:
		return nil
	}
}

// readLedger returns how many whole records there are, from the first on.
func readLedger(dir string) (int64, error) {
	f, err := os.Open(filepath.Join(dir, "ledger"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, record)
	for n := int64(0); ; n++ {
		switch _, err := io.ReadFull(f, b); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return n, nil
		case err != nil:
			return n, err
		}
		for i := 0; i < record; i += 8 {
			if binary.LittleEndian.Uint64(b[i:]) != uint64(n) {
				return n, nil
			}
		}
	}
}
