// Package meta is the cluster's state: a deterministic state machine over Badger.
//
// Apply carries out one command of a log. What it changes and the index of the command are one Badger transaction, so an
// index that was applied changes nothing when it comes again. Propose is the log of a cluster of one: it gives commands
// their index and applies those that arrive together in one transaction, each of them whole or not at all.
package meta

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// FormatVersion of the database. Open refuses any other.
const FormatVersion = 1

const (
	maxBatch = 64 // commands in one transaction
	// A transaction takes no more commands once it has written enough: with the largest one as the last of them it stays
	// under what Badger allows, 15 % of the memtable.
	enough   = 256 << 10
	memTable = 8 << 20
	// tables of the database's first level are merged into the others when there are so many.
	tables = 4
)

// Options of a Store.
type Options struct {
	// InMemory keeps nothing on disk.
	InMemory bool
	// Logger gets what the database warns of; nil drops it.
	Logger *slog.Logger

	memTable int // bytes; 0 is memTable
}

// Store is the state machine and its database.
type Store struct {
	db        *badger.DB
	volumes   cache[volume.Volume]
	snapshots cache[volume.Snapshot]

	// reading is held by reads; Close waits for them, since it unmaps what they look at.
	reading sync.RWMutex

	mu      sync.Mutex // one writer at a time
	applied uint64
	fatal   error // set when a transaction failed, what is durable is unknown until the next Open; and by Close

	failed atomic.Pointer[error] // why a transaction failed

	memTable int
	written  int // bytes since compaction was last looked at
	compact  chan struct{}

	closing   chan struct{}
	once      sync.Once
	proposals chan *proposal
	done      chan struct{} // propose has ended
	compacted chan struct{} // compactions has ended
	log       logger
}

type proposal struct {
	command []byte
	result  chan outcome
}

type outcome struct {
	result command.Result
	err    error
}

// Open opens the state in dir, and makes it where there is none. It starts two goroutines, which Close ends.
func Open(dir string, o Options) (*Store, error) {
	if o.memTable == 0 {
		o.memTable = memTable
	}
	db, err := badger.Open(databaseOptions(dir, o))
	if err != nil {
		return nil, fmt.Errorf("open the cluster's state in %s: %w", dir, err)
	}
	s := &Store{
		db: db, memTable: o.memTable, log: logger{o.Logger}, compact: make(chan struct{}, 1), closing: make(chan struct{}),
		proposals: make(chan *proposal, maxBatch), done: make(chan struct{}), compacted: make(chan struct{}),
	}
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open the cluster's state in %s: %w", dir, err), db.Close())
	}
	s.compact <- struct{}{} // every restart leaves a table
	go s.propose()
	go s.compactions()
	return s, nil
}

// databaseOptions keep an idle database small: a few MiB, and no caches (tables are neither compressed nor encrypted, so
// reads come from the page cache).
func databaseOptions(dir string, o Options) badger.Options {
	if o.InMemory {
		dir = ""
	}
	return badger.DefaultOptions(dir).
		WithInMemory(o.InMemory).
		WithSyncWrites(!o.InMemory).
		WithLogger(logger{o.Logger}).
		WithMemTableSize(int64(o.memTable)).
		WithNumMemtables(2).
		WithValueThreshold(int64(o.memTable / 8)). // no record is as large
		WithValueLogFileSize(16 << 20).
		WithBaseTableSize(2 << 20).
		WithNumLevelZeroTables(tables).
		WithNumLevelZeroTablesStall(25 * tables). // compactions come long before
		WithNumCompactors(0).                     // they poll 20 times a second: most of what an idle node would use
		WithNumGoroutines(1).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithMetricsEnabled(false).
		WithDetectConflicts(false)
}

func (s *Store) load() error {
	txn := s.db.NewTransaction(true)
	defer txn.Discard()
	b := txnBase{txn}
	format, err := b.get(keyFormat)
	if err != nil {
		return err
	}
	if format == nil {
		if err := txn.Set([]byte(keyFormat), []byte{FormatVersion}); err != nil {
			return err
		}
		return txn.Commit()
	}
	if !bytes.Equal(format, []byte{FormatVersion}) {
		return fmt.Errorf("the format has version %v, this program knows %d", format, FormatVersion)
	}
	applied, err := b.get(keyApplied)
	if err != nil {
		return err
	}
	if applied != nil {
		if len(applied) != 8 {
			return fmt.Errorf("the applied index has %d bytes: %w", len(applied), volume.ErrDataLoss)
		}
		s.applied = binary.BigEndian.Uint64(applied)
	}
	return nil
}

// Close ends the goroutine and closes the database. Proposals under way get volume.ErrUnavailable.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() {
		close(s.closing)
		<-s.done
		<-s.compacted
		s.reading.Lock()
		defer s.reading.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.fatal = fmt.Errorf("the cluster's state is closed: %w", volume.ErrUnavailable)
		err = s.db.Close()
	})
	return err
}

// Failed says why nothing can be changed until the state is opened again, or is nil. It wraps no sentinel.
func (s *Store) Failed() error {
	if f := s.failed.Load(); f != nil {
		return *f
	}
	return nil
}

// Applied is the index of the last command that was applied.
func (s *Store) Applied() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.applied
}

// Apply carries out the command of an index, which is durable when Apply returns. Indexes rise; they may have gaps. One
// that was applied before changes nothing and is answered command.Done: whoever waited for its answer was in a process that
// is gone. An error means that the database failed and nothing more is applied; a refusal by the state is a
// command.Refused.
func (s *Store) Apply(index uint64, encoded []byte) (command.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fatal != nil {
		return nil, s.fatal
	}
	if index <= s.applied {
		return command.Done{}, nil
	}
	rs, err := s.commit(index, [][]byte{encoded})
	if err != nil {
		return nil, err
	}
	return rs[0], nil
}

// commit applies commands from an index on in one transaction: as many of them as it answers. The caller holds mu.
func (s *Store) commit(index uint64, commands [][]byte) ([]command.Result, error) {
	if s.fatal != nil {
		return nil, s.fatal
	}
	results, err := s.transact(index, commands)
	if err != nil {
		failed := fmt.Errorf("the cluster's state cannot be written, restart to recover: %v", err)
		s.failed.Store(&failed)
		s.fatal = fmt.Errorf("%v: %w", failed, volume.ErrUnavailable)
		return nil, s.fatal
	}
	s.applied = index + uint64(len(results)) - 1
	if s.written > s.memTable/2 {
		s.written = 0
		select {
		case s.compact <- struct{}{}:
		default:
		}
	}
	return results, nil
}

func (s *Store) transact(index uint64, commands [][]byte) ([]command.Result, error) {
	txn := s.db.NewTransaction(true)
	defer txn.Discard()
	all := newView(txnBase{txn})
	var results []command.Result
	for _, c := range commands {
		one := newView(all)
		r := apply(one, c)
		if one.err != nil {
			return nil, one.err
		}
		if _, refused := r.(command.Refused); !refused {
			all.merge(one)
		}
		if results = append(results, r); all.size > enough {
			break
		}
	}
	last := index + uint64(len(results)) - 1
	all.put(keyApplied, binary.BigEndian.AppendUint64(nil, last))
	for _, k := range slices.Sorted(maps.Keys(all.writes)) {
		var err error
		if b := all.writes[k]; b == nil {
			err = txn.Delete([]byte(k))
		} else {
			err = txn.Set([]byte(k), b)
		}
		if err != nil {
			return nil, fmt.Errorf("write %q: %w", k, err)
		}
	}
	s.written += all.size
	return results, txn.Commit()
}

// Propose implements control.Store for a cluster of one.
func (s *Store) Propose(ctx context.Context, c command.Command) (command.Result, error) {
	b, err := command.Encode(c)
	if err != nil {
		return nil, err
	}
	p := &proposal{command: b, result: make(chan outcome, 1)}
	closed := fmt.Errorf("the cluster's state is closed: %w", volume.ErrUnavailable)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case s.proposals <- p:
	case <-s.closing:
		return nil, closed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case o := <-p.result:
		if r, ok := o.result.(command.Refused); ok {
			return nil, r.Err()
		}
		return o.result, o.err
	case <-s.done:
		return nil, closed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// propose applies what is waiting, as much at once as fits.
func (s *Store) propose() {
	defer close(s.done)
	for {
		var batch []*proposal
		select {
		case <-s.closing:
			return
		case p := <-s.proposals:
			batch = append(batch, p)
		}
	gather:
		for len(batch) < maxBatch {
			select {
			case p := <-s.proposals:
				batch = append(batch, p)
			default:
				break gather
			}
		}
		for len(batch) > 0 {
			batch = batch[s.settleBatch(batch):]
		}
	}
}

// settleBatch applies and answers the first of a batch and returns how many.
func (s *Store) settleBatch(batch []*proposal) int {
	commands := make([][]byte, len(batch))
	for i, p := range batch {
		commands[i] = p.command
	}
	s.mu.Lock()
	results, err := s.commit(s.applied+1, commands)
	s.mu.Unlock()
	if err != nil {
		for _, p := range batch {
			p.result <- outcome{err: err}
		}
		return len(batch)
	}
	for i, r := range results {
		batch[i].result <- outcome{result: r}
	}
	return len(results)
}

// compactions merges the database's tables when enough has been written.
func (s *Store) compactions() {
	defer close(s.compacted)
	for {
		select {
		case <-s.closing:
			return
		case <-s.compact:
		}
		if s.db.Levels()[0].NumTables < tables {
			continue
		}
		if err := s.db.Flatten(1); err != nil {
			s.log.Warningf("tables are not merged now: %v", err)
		}
	}
}

type logger struct{ log *slog.Logger }

func (l logger) Errorf(f string, a ...any) {
	if l.log != nil {
		l.log.Error("database: " + fmt.Sprintf(f, a...))
	}
}

func (l logger) Warningf(f string, a ...any) {
	if l.log != nil {
		l.log.Warn("database: " + fmt.Sprintf(f, a...))
	}
}

func (logger) Infof(string, ...any)  {}
func (logger) Debugf(string, ...any) {}
