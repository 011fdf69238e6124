// Package metaraft keeps the cluster's state on several controllers: meta's machine on each of them behind a raft log.
//
// Any controller may be asked. What changes the state goes to the leader, with a name that lets it be sent again without
// being applied twice. Reads are answered from the machine of the controller that is asked, once that has applied what the
// leader, confirmed by a majority after the read began, had committed. docs/adr/0007 says how, and what is done about
// disks that hang or are older than they were.
package metaraft

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/meta"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Options of a Store.
type Options struct {
	// ID is the controller's node id.
	ID volume.NodeID
	// Dir is the controller's directory.
	Dir string
	// State is the machine's directory; "" is Dir/state. That of a cluster of one that grows is taken over by Bootstrap.
	State string
	// Listener is where this controller is reached, by other controllers only; the store closes it.
	Listener net.Listener
	// Advertise is the listener's address as others see it, host:port. It may differ from that of the last start.
	Advertise string
	// Server and Client are the TLS of both directions. Both nil needs Plaintext.
	Server, Client *tls.Config
	Plaintext      bool
	// Identify names the node at the other end of a connection, so that a controller can only join as itself. nil: it may
	// name itself.
	Identify func(tls.ConnectionState) (volume.NodeID, error)
	// Bootstrap makes a cluster of this controller alone, unless its directories say that it is a member of one already.
	// Where both were emptied it makes a new cluster: it is for the first start of the first controller.
	Bootstrap bool
	// Join has addresses of controllers to ask for admission, unless it is a member already.
	Join []string
	// Logger gets what an admin should know; nil drops it.
	Logger *slog.Logger

	timing timing
	// network dials; tests put proxies in between.
	network func(ctx context.Context, network, address string) (net.Conn, error)
}

// timing is shorter in tests.
type timing struct {
	heartbeat time.Duration // a leader that is silent for so long, or somewhat longer, is replaced
	stall     time.Duration // a disk that takes so long does not lead
	patience  time.Duration // a call is tried again for so long, and for half of it where no controller leads
	pause     time.Duration // between tries of what has to be tried again
	snapshots uint64        // entries between two snapshots; as many are kept behind one
	hang      func()        // called before each write of the log
}

func (t timing) orDefaults() timing {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&t.heartbeat, time.Second)
	set(&t.stall, 2*time.Second)
	set(&t.patience, 10*time.Second)
	set(&t.pause, time.Second)
	if t.snapshots == 0 {
		t.snapshots = 4096
	}
	return t
}

// Store implements control.Store on several controllers.
type Store struct {
	o     Options
	log   *slog.Logger
	quiet raftLogger // for raft
	me    identity
	m     *meta.Machine
	logs  *logStore
	snaps *raft.FileSnapshotStore
	mux   *mux
	peers *callers
	fsm   *fsm
	watch *watch
	acks  *acks
	reads reads

	transport *transport // set before raft

	raft   atomic.Pointer[raft.Raft] // nil until this controller may take part
	why    atomic.Pointer[string]    // why it may not yet
	failed atomic.Pointer[error]
	dead   chan struct{} // closed when it has failed

	ctx      context.Context // ends with the store
	cancel   context.CancelFunc
	wg       sync.WaitGroup // the store's goroutines
	once     sync.Once
	closeErr error
	shutdown func() raft.Future // of raft; once

	proposing sync.Mutex
	closed    bool           // under proposing: nothing more is taken in
	inflight  sync.WaitGroup // what raft was asked and has not answered; Add under proposing

	leaders    changes
	leadership chan bool  // raft tells that it gained or lost it
	members    sync.Mutex // one change of the members at a time
}

// Open opens the controller in o.Dir and makes it where there is none. It returns at once: until the controller is a
// member and has been let in by the others, calls return volume.ErrUnavailable with the reason.
func Open(o Options) (*Store, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.State == "" {
		o.State = filepath.Join(o.Dir, "state")
	}
	o.timing = o.timing.orDefaults()
	if o.network == nil {
		o.network = new(net.Dialer).DialContext
	}
	switch {
	case o.ID == "" || len(o.ID) > volume.MaxNodeIDLen:
		return nil, fmt.Errorf("controller id %.64q: it is empty or too long: %w", o.ID, volume.ErrInvalid)
	case (o.Server == nil) != (o.Client == nil) || (o.Server == nil) != o.Plaintext:
		return nil, fmt.Errorf("controllers talk over TLS both ways, or in plaintext where that is configured: %w", volume.ErrInvalid)
	case o.Listener == nil || o.Advertise == "":
		return nil, fmt.Errorf("a controller needs an address: %w", volume.ErrInvalid)
	}
	s := &Store{o: o, log: o.Logger, quiet: newRaftLogger(o.Logger), acks: &acks{}, leadership: make(chan bool, 16), dead: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.watch = &watch{limit: o.timing.stall, tell: s.tellStall}
	s.wait("it is being opened")
	if err := s.open(); err != nil {
		s.cancel()
		return nil, errors.Join(err, s.closeFiles(), o.Listener.Close())
	}
	s.mux = &mux{
		ln: o.Listener, server: o.Server, client: o.Client, advertise: o.Advertise, identify: o.Identify, handle: s.handle, network: o.network, log: o.Logger,
	}
	s.peers = &callers{mux: s.mux}
	s.mux.start()
	s.wg.Go(s.run)
	return s, nil
}

// open opens the files and makes sure that they fit together.
func (s *Store) open() (err error) {
	o := s.o
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	if s.me, err = openIdentity(o.Dir, o.ID); err != nil {
		return err
	}
	// The log comes first: its lock keeps a second process out.
	if s.logs, err = openLogStore(filepath.Join(o.Dir, logFile), s.watch, s.fail); err != nil {
		return err
	}
	s.logs.hang = o.timing.hang
	if s.snaps, err = raft.NewFileSnapshotStoreWithLogger(o.Dir, 2, s.quiet); err != nil {
		return err
	}
	if s.m, err = meta.OpenMachine(o.State, meta.Options{Logger: o.Logger}); err != nil {
		return err
	}
	s.fsm = &fsm{ctx: s.ctx, m: s.m, watch: s.watch}
	return s.prepare()
}

// Drop ends the connections, in both directions, of peers that gone finds by what they proved in the handshake.
func (s *Store) Drop(gone func(tls.ConnectionState) bool) { s.mux.drop(gone) }

// closeFiles closes what Open opened, as far as it came.
func (s *Store) closeFiles() error {
	var errs []error
	if s.m != nil {
		errs = append(errs, s.m.Close())
	}
	if s.logs != nil {
		errs = append(errs, s.logs.Close())
	}
	return errors.Join(errs...)
}

// Close ends the controller. Calls under way get volume.ErrUnavailable.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.cancel()
		s.proposing.Lock()
		s.closed = true
		s.proposing.Unlock()
		// Raft does not answer all that it has taken in when it ends, so that ends first: it is committed, or the leader
		// steps down. Of a raft that has failed nothing can be expected.
		answered := make(chan struct{})
		go func() {
			s.inflight.Wait()
			close(answered)
		}()
		select {
		case <-answered:
		case <-s.dead:
		}
		s.closeErr = s.mux.shut()
		s.wg.Wait()
		if s.raft.Load() != nil {
			s.closeErr = errors.Join(s.closeErr, s.shutdown().Error())
		}
		s.mux.wait()
		s.closeErr = errors.Join(s.closeErr, s.closeFiles())
	})
	return s.closeErr
}

// begin counts something that raft is asked; false is a store that is being closed.
func (s *Store) begin() bool {
	s.proposing.Lock()
	defer s.proposing.Unlock()
	if !s.closed {
		s.inflight.Add(1)
	}
	return !s.closed
}

// Failed implements control.Store.
func (s *Store) Failed() error {
	if f := s.failed.Load(); f != nil {
		return *f
	}
	return s.m.Failed()
}

// fail ends this controller's part in the cluster until the process is started again.
func (s *Store) fail(err error) {
	err = fmt.Errorf("this controller does not take part any more: %v", err)
	if !s.failed.CompareAndSwap(nil, &err) {
		return
	}
	s.log.Error("the controller has failed", "controller", s.o.ID, "error", err)
	if s.raft.Load() != nil {
		s.shutdown()
	}
	close(s.dead)
}

// wait sets why the controller does not take part yet.
func (s *Store) wait(why string) { s.why.Store(&why) }

func (s *Store) tellStall(stalled bool) {
	if stalled {
		s.log.Error("the controller's disk does not answer; another controller leads meanwhile", "limit", s.o.timing.stall)
	} else {
		s.log.Warn("the controller's disk answers again")
	}
}

// muted tells that nobody is to hear from this controller as a leader or candidate.
func (s *Store) muted() bool { return s.watch.stalled() || s.Failed() != nil }

// member is raft, where this controller takes part.
func (s *Store) member() (*raft.Raft, error) {
	if err := s.Failed(); err != nil {
		return nil, fmt.Errorf("%v: %w", err, volume.ErrUnavailable)
	}
	if r := s.raft.Load(); r != nil {
		return r, nil
	}
	return nil, fmt.Errorf("controller %s does not take part yet: %s: %w", s.o.ID, *s.why.Load(), volume.ErrUnavailable)
}

// Propose implements control.Store. An error that wraps volume.ErrUnavailable, or ctx's, leaves unknown whether the
// command was or will be applied, unless it says that it was not.
func (s *Store) Propose(ctx context.Context, c command.Command) (command.Result, error) {
	b, err := command.Encode(c)
	if err != nil {
		return nil, err
	}
	return s.propose(ctx, meta.KindCommand, b)
}

func (s *Store) propose(ctx context.Context, kind meta.Kind, body []byte) (command.Result, error) {
	e := meta.Entry{Kind: kind, Since: s.m.Applied(), Body: body}
	if r := s.raft.Load(); r != nil {
		e.Since = max(e.Since, r.CommitIndex())
	}
	_, _ = rand.Read(e.ID[:]) // never fails
	var res command.Result
	sent, err := s.lead(ctx, func(ctx context.Context, leader raft.ServerAddress, self, again bool) (err error) {
		if self {
			res, err = s.append(ctx, e)
			return err
		}
		first := byte(0)
		if !again {
			first = 1
		}
		b, err := s.peers.call(ctx, string(leader), callPropose, append([]byte{first}, meta.EncodeEntry(e)...))
		if err != nil {
			return err
		}
		if res, err = command.DecodeResult(b); err != nil {
			err = fmt.Errorf("answer of the leader: %v: %w", err, errLost)
		}
		return err
	})
	if err != nil {
		if sent && s.ctx.Err() == nil {
			return nil, fmt.Errorf("the outcome is unknown: %w", err)
		}
		return nil, err
	}
	if r, ok := res.(command.Refused); ok {
		return nil, r.Err()
	}
	return res, nil
}

// lead has the leader do something, and has it done again, by the next leader if need be, until the outcome is known or
// patience ends. sent tells that it may have been done at least once.
func (s *Store) lead(ctx context.Context, do func(ctx context.Context, leader raft.ServerAddress, self, again bool) error) (sent bool, err error) {
	limited, cancel := context.WithTimeout(ctx, s.o.timing.patience)
	defer cancel()
	led := time.Now() // a leader was known last
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, s.o.timing.heartbeat/4) {
		changed := s.leaders.next()
		r, last := s.member()
		if s.Failed() != nil {
			return sent, last
		}
		if r != nil {
			leader, id := r.LeaderWithID()
			if id == "" {
				last = errors.New("no controller leads: a majority of them does not answer")
			} else {
				attempt, end := context.WithCancel(limited)
				go func() { // an answer of a leader that was replaced may never come
					defer end()
					select {
					case <-changed:
					case <-attempt.Done():
					}
				}()
				err := do(attempt, leader, id == raft.ServerID(s.o.ID), sent)
				end()
				led = time.Now()
				switch {
				case err == nil:
					return true, nil
				case errors.Is(err, errNotLeader) || errors.Is(err, errUnsent):
				case errors.Is(err, errLost) || errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
					sent = true
				default:
					return true, err
				}
				last = fmt.Errorf("leader %s: %w", id, err)
			}
		}
		select {
		case <-changed:
		case <-time.After(wait):
		case <-limited.Done():
		case <-s.ctx.Done():
			return sent, fmt.Errorf("the controller is being closed: %w", volume.ErrUnavailable)
		}
		if ctx.Err() != nil {
			return sent, fmt.Errorf("%w (%v)", ctx.Err(), last)
		}
		if limited.Err() != nil || time.Since(led) > s.o.timing.patience/2 {
			if !errors.Is(last, volume.ErrUnavailable) {
				last = fmt.Errorf("%v: %w", last, volume.ErrUnavailable)
			}
			return sent, last
		}
	}
}

// changes tells that another leader is known, or none.
type changes struct {
	mu sync.Mutex
	ch chan struct{}
}

// next is closed at the next change.
func (c *changes) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch == nil {
		c.ch = make(chan struct{})
	}
	return c.ch
}

func (c *changes) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch != nil {
		close(c.ch)
		c.ch = nil
	}
}

// append puts an entry into the log of this controller, which leads, and returns what the machine answered.
func (s *Store) append(ctx context.Context, e meta.Entry) (command.Result, error) {
	r, err := s.member()
	if err != nil {
		return nil, err
	}
	if r.State() != raft.Leader {
		return nil, errNotLeader
	}
	if s.watch.stalled() {
		return nil, errNotLeader
	}
	e.Marks = s.marks(r)
	type outcome struct {
		res command.Result
		err error
	}
	done := make(chan outcome, 1)
	if !s.begin() {
		return nil, errNotLeader
	}
	go func() { // Close waits for it
		defer s.inflight.Done()
		f := r.ApplyLog(raft.Log{Data: meta.EncodeEntry(e)}, s.o.timing.patience)
		if err := f.Error(); err != nil {
			done <- outcome{err: appendError(err)}
			return
		}
		res, err := result(f.Response())
		done <- outcome{res, err}
	}()
	select {
	case o := <-done:
		return o.res, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// appendError tells the errors of raft apart: was the entry taken in or not?
func appendError(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress), errors.Is(err, raft.ErrEnqueueTimeout):
		return errNotLeader
	}
	return fmt.Errorf("%w: %v", errLost, err)
}
