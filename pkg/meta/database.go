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
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/disk"
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

// Options of a Machine and a Store.
type Options struct {
	// InMemory keeps nothing on disk.
	InMemory bool
	// Logger gets what the database warns of; nil drops it.
	Logger *slog.Logger

	memTable int          // bytes; 0 is memTable
	step     func(string) // called before each step of a restore
}

// Machine is the state machine and its database. Its reads see what was applied here: whoever keeps several machines has
// to know that this one is not behind (WaitApplied).
type Machine struct {
	dir       string
	o         Options
	volumes   cache[volume.Volume]
	snapshots cache[volume.Snapshot]

	// reading is held by reads and while a checkpoint is written; Close and Restore wait for them, since they unmap what
	// those look at.
	reading sync.RWMutex
	db      *badger.DB // changed under reading and mu
	logs    *disk.Logs // of db; nil in memory

	mu      sync.Mutex // one writer at a time
	applied uint64
	shared  bool
	fatal   error         // set when a transaction failed, what is durable is unknown until the next Open; and by Close
	moved   chan struct{} // closed when applied or fatal change; nil when nobody waits
	// checkpoints are those that have not ended.
	checkpoints map[*Checkpoint]struct{}

	failed atomic.Pointer[error] // why a transaction failed

	written int // bytes since compaction was last looked at
	compact chan struct{}

	closing   chan struct{}
	once      sync.Once
	compacted chan struct{} // compactions has ended
	log       logger
}

// OpenMachine opens the state in dir, and makes it where there is none. It finishes or undoes a Restore that was cut off.
// It starts a goroutine, which Close ends.
func OpenMachine(dir string, o Options) (*Machine, error) {
	if o.memTable == 0 {
		o.memTable = memTable
	}
	if o.step == nil {
		o.step = func(string) {}
	}
	m := &Machine{
		dir: dir, o: o, log: logger{log: o.Logger}, checkpoints: map[*Checkpoint]struct{}{},
		compact: make(chan struct{}, 1), closing: make(chan struct{}), compacted: make(chan struct{}),
	}
	if !o.InMemory {
		if err := settleRestore(dir); err != nil {
			return nil, fmt.Errorf("open the cluster's state in %s: %w", dir, err)
		}
	}
	if err := m.openDatabase(); err != nil {
		return nil, err
	}
	m.compact <- struct{}{} // every restart leaves a table
	go m.compactions()
	return m, nil
}

// openDatabase sets db and what is kept in memory of it. The caller holds reading and mu, or nobody has m yet.
func (m *Machine) openDatabase() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open the cluster's state in %s: %w", m.dir, err)
		}
	}()
	m.logs = nil
	if !m.o.InMemory {
		if m.logs, err = disk.OpenLogs(m.dir, 2*int64(m.o.memTable)); err != nil {
			return err
		}
	}
	db, err := badger.Open(databaseOptions(m.dir, m.o, m.logs))
	if err != nil {
		return err // in a restore, the one that was closed before stays: reads and Close ask it
	}
	m.db = db
	if m.logs != nil {
		err = m.logs.Opened()
	}
	if err == nil {
		err = m.load()
	}
	if err != nil {
		return errors.Join(err, m.closeDatabase())
	}
	m.volumes.clear()
	m.snapshots.clear()
	return nil
}

// closeDatabase leaves the database as a crash would where the filesystem is too full for it to be closed.
func (m *Machine) closeDatabase() error {
	if err := m.logs.Close(); err != nil {
		return err
	}
	return m.db.Close()
}

// databaseOptions keep an idle database small: a few MiB, and no caches (tables are neither compressed nor encrypted, so
// reads come from the page cache).
func databaseOptions(dir string, o Options, logs *disk.Logs) badger.Options {
	if o.InMemory {
		dir = ""
	}
	return badger.DefaultOptions(dir).
		WithInMemory(o.InMemory).
		WithSyncWrites(!o.InMemory).
		WithLogger(logger{o.Logger, logs}).
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

func (m *Machine) load() error {
	txn := m.db.NewTransaction(true)
	defer txn.Discard()
	b := txnBase{txn}
	format, err := b.get(keyFormat)
	if err != nil {
		return err
	}
	if format == nil {
		if err := m.full(); err != nil {
			return err
		}
		m.applied, m.shared = 0, false
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
	m.applied = 0
	if applied != nil {
		if len(applied) != 8 {
			return fmt.Errorf("the applied index has %d bytes: %w", len(applied), volume.ErrDataLoss)
		}
		m.applied = binary.BigEndian.Uint64(applied)
	}
	shared, err := b.get(keyShared)
	m.shared = shared != nil
	return err
}

// Close ends the goroutine and closes the database. It waits for reads.
func (m *Machine) Close() error {
	var err error
	m.once.Do(func() {
		close(m.closing)
		<-m.compacted
		m.reading.Lock()
		defer m.reading.Unlock()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.fatal == nil {
			m.fatal = fmt.Errorf("the cluster's state is closed: %w", volume.ErrUnavailable)
		}
		m.wake()
		m.endCheckpoints()
		if !m.db.IsClosed() { // a restore that failed leaves it closed
			err = m.closeDatabase()
		}
	})
	return err
}

// Failed says why nothing can be changed until the state is opened again, or is nil. It wraps no sentinel.
func (m *Machine) Failed() error {
	if f := m.failed.Load(); f != nil {
		return *f
	}
	return nil
}

// full says why nothing can be changed now; reads go on. The caller holds reading, or nobody has m yet.
func (m *Machine) full() error {
	if m.logs.Prepare() {
		return nil
	}
	return fmt.Errorf("the filesystem of %s is full: the cluster's state can be read and not changed; delete something else on it: %w", m.dir, volume.ErrUnavailable)
}

// Full returns volume.ErrUnavailable while the filesystem is too full for anything to be changed.
func (m *Machine) Full() error {
	if m.Failed() != nil {
		return nil // which Apply says, and no room would help
	}
	m.reading.RLock()
	defer m.reading.RUnlock()
	return m.full()
}

// WaitRoom waits while the filesystem is too full for an index to be applied. When ctx ends before, nothing is applied any more until
// the next Open: whoever hands entries over in order goes on with the next.
func (m *Machine) WaitRoom(ctx context.Context, index uint64) error {
	for first := true; index > m.Applied(); first = false {
		err := m.Full()
		if err == nil {
			return nil
		}
		if first {
			m.log.Errorf("%v", err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.fatal == nil {
				m.fatal = err
				m.wake()
			}
			return err
		}
	}
	return nil
}

// Applied is the index of the last command that was applied.
func (m *Machine) Applied() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.applied
}

// WaitApplied returns nil once the command of an index, or a later one, is applied here. It returns volume.ErrUnavailable
// when nothing is applied any more, or ctx's error.
func (m *Machine) WaitApplied(ctx context.Context, index uint64) error {
	for {
		m.mu.Lock()
		if m.applied >= index {
			m.mu.Unlock()
			return nil
		}
		if m.fatal != nil {
			defer m.mu.Unlock()
			return m.fatal
		}
		if m.moved == nil {
			m.moved = make(chan struct{})
		}
		moved := m.moved
		m.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wake lets those who wait for applied look again. The caller holds mu.
func (m *Machine) wake() {
	if m.moved != nil {
		close(m.moved)
		m.moved = nil
	}
}

// Share marks the state as one of several copies, durably: from then on only the log that they share may change it, and
// Open, which keeps no such log, refuses it.
func (m *Machine) Share() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fatal != nil || m.shared {
		return m.fatal
	}
	err := m.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte(keyShared), []byte{1}) })
	if err != nil {
		return m.fail(err)
	}
	m.shared = true
	return nil
}

// Shared tells whether Share was called, now or in an earlier run.
func (m *Machine) Shared() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.shared
}

// Apply carries out entries in the order of their indexes and answers each. What they change is durable when Apply
// returns. The caller has asked Full or WaitRoom. Indexes rise; they may have gaps. An entry that was applied before changes nothing and is answered
// command.Done: whoever waited for its answer was in a process that is gone. An error means that the database failed and
// nothing more is applied; a refusal by the state is a command.Refused.
func (m *Machine) Apply(entries ...Entry) ([]command.Result, error) {
	results := make([]command.Result, 0, len(entries))
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(results) < len(entries) {
		if m.fatal != nil {
			return nil, m.fatal
		}
		rest := entries[len(results):]
		if rest[0].Index <= m.applied {
			results = append(results, command.Done{})
			continue
		}
		some, err := m.commit(rest)
		if err != nil {
			return nil, err
		}
		results = append(results, some...)
	}
	return results, nil
}

// commit applies entries in one transaction: as many of them as it answers. The caller holds mu.
func (m *Machine) commit(entries []Entry) ([]command.Result, error) {
	if m.fatal != nil {
		return nil, m.fatal
	}
	results, err := m.transact(entries)
	if err != nil {
		return nil, m.fail(err)
	}
	m.applied = entries[len(results)-1].Index
	m.wake()
	if m.written > m.o.memTable/2 {
		m.written = 0
		select {
		case m.compact <- struct{}{}:
		default:
		}
	}
	return results, nil
}

// fail stops the machine: what is durable is not known. The caller holds mu.
func (m *Machine) fail(err error) error {
	failed := fmt.Errorf("the cluster's state cannot be written, restart to recover: %v", err)
	m.failed.Store(&failed)
	m.fatal = fmt.Errorf("%v: %w", failed, volume.ErrUnavailable)
	m.wake()
	return m.fatal
}

func (m *Machine) transact(entries []Entry) ([]command.Result, error) {
	txn := m.db.NewTransaction(true)
	defer txn.Discard()
	all := newView(txnBase{txn})
	var results []command.Result
	for _, e := range entries[:min(len(entries), maxBatch)] {
		one := newView(all)
		r := applyEntry(one, e)
		if one.err != nil {
			return nil, one.err
		}
		if _, refused := r.(command.Refused); !refused {
			all.merge(one)
		}
		raise(all, e.Marks)
		if all.err != nil {
			return nil, all.err
		}
		if results = append(results, r); all.size > enough {
			break
		}
	}
	all.put(keyApplied, binary.BigEndian.AppendUint64(nil, entries[len(results)-1].Index))
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
	m.written += all.size
	err := txn.Commit()
	m.logs.Wrote(all.size + 64*len(all.writes))
	return results, err
}

// compactions merges the database's tables when enough has been written.
func (m *Machine) compactions() {
	defer close(m.compacted)
	for {
		select {
		case <-m.closing:
			return
		case <-m.compact:
		}
		m.flatten()
	}
}

// roomToMerge tells whether all of the database fits once more into the filesystem, with something to spare: tables are written
// through a memory map, where a full one is fatal.
func (m *Machine) roomToMerge(levels []badger.LevelInfo) bool {
	if m.o.InMemory {
		return true
	}
	need := int64(64 << 20)
	for _, l := range levels {
		need += l.Size
	}
	free, err := disk.NewDirSpace(m.dir, 0).Free()
	return err == nil && free >= need
}

func (m *Machine) flatten() {
	m.reading.RLock()
	defer m.reading.RUnlock()
	if m.db.IsClosed() {
		return
	}
	if levels := m.db.Levels(); levels[0].NumTables < tables || !m.roomToMerge(levels) {
		return
	}
	if err := m.db.Flatten(1); err != nil {
		m.log.Warningf("tables are not merged now: %v", err)
	}
}

type logger struct {
	log  *slog.Logger
	logs *disk.Logs
}

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

func (logger) Infof(string, ...any) {}

func (l logger) Debugf(f string, _ ...any) { l.logs.Heard(f) }
