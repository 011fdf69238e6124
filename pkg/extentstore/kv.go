package extentstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/ballast-csi/ballast/pkg/disk"
)

// op is one change of a commit: val nil deletes.
type op struct{ key, val []byte }

func (o op) size() int { return len(o.key) + len(o.val) + 64 }

// maxCommit bounds the sum of op.size in one commit; a database must accept as much.
const maxCommit = 768 << 10

// kv is the pool's database.
type kv interface {
	// Get returns a copy of the value, nil where there is none.
	Get(key []byte) ([]byte, error)
	// Scan calls fn with every key of that prefix, ascending. The slices are valid until fn returns; fn may Get.
	Scan(prefix []byte, fn func(key, val []byte) error) error
	// Room tells whether the next commit has its space. Without it none is begun.
	Room() bool
	// Commit applies all or nothing; it is durable when it returns nil. After an error the outcome is unknown.
	Commit(ops []op) error
	// Backlog is how many bytes Compact has to merge, 0 where there is too little to be worth it.
	Backlog() int64
	// Compact merges what was written lately into what is there, beside all else. It takes about as much space as the
	// backlog while it runs, and seconds per GiB of the database; it stops soon after ctx is done, and another call goes
	// on from there. It waits while room says that there is none. It is called once at a time.
	Compact(ctx context.Context, room func() bool) error
	Close() error
}

type badgerKV struct {
	db    *badger.DB
	steps *steps
}

// steps ends a compaction between two of its steps, for which Badger has no other means: what it logs before each, in
// the goroutine of the caller and with no lock held, is where it is asked whether to go on. A step takes a second or two; what
// it logs before it writes each table is where it waits for room.
type steps struct {
	logs *disk.Logs
	ctx  context.Context
	room func() bool
}

const (
	compactStep  = "Attempting to compact with %+v\n"
	compactTable = "[%d] LOG Compact. Added %d keys. Skipped %d keys. Iteration took: %v"
)

var errStopped = errors.New("compaction was stopped")

func (s *steps) Infof(format string, _ ...any) {
	if format == compactStep && s.ctx.Err() != nil {
		panic(errStopped)
	}
}

func (*steps) Errorf(string, ...any)   {}
func (*steps) Warningf(string, ...any) {}

func (s *steps) Debugf(format string, _ ...any) {
	if s.logs.Heard(format); format != compactTable {
		return
	}
	for !s.room() {
		select {
		case <-s.ctx.Done():
			return // a step cannot be given up, and a daemon that stops does not wait for other people's files
		case <-time.After(100 * time.Millisecond):
		}
	}
}

const (
	memTable = 8 << 20
	logSize  = 2 * memTable // as Badger makes it
	// The database is compacted once new tables have compactShare of its size, within these numbers of full tables: what
	// is rewritten stays in proportion to what was written, and a lookup asks few tables. Small tables are from restarts.
	compactShare        = 8
	fewTables           = 4
	manyTables          = 32
	compactEvery  int64 = memTable / 2 // bytes after which to look
	compactMargin int64 = 32 << 20     // bytes that a compaction takes beside the backlog
)

// openBadger opens the database. It is small: a pool has a few MiB of pages that are hot, cached above it.
func openBadger(dir string) (*badgerKV, error) {
	logs, err := disk.OpenLogs(dir, logSize)
	if err != nil {
		return nil, fmt.Errorf("open the pool's database: %w", err)
	}
	s := &steps{logs: logs}
	o := badger.DefaultOptions(dir).
		WithLogger(s).
		WithSyncWrites(true).
		WithDetectConflicts(false).
		WithMetricsEnabled(false).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithMemTableSize(memTable).
		WithNumMemtables(2).
		WithNumCompactors(0). // they poll; Compact does it by need
		WithNumLevelZeroTables(fewTables).
		WithNumLevelZeroTablesStall(100 * manyTables).
		WithValueThreshold(128 << 10). // nothing goes to the value log
		WithValueLogFileSize(4 << 20).
		WithNumGoroutines(2)
	db, err := badger.Open(o)
	if err != nil {
		return nil, fmt.Errorf("open the pool's database: %w", err)
	}
	if err := logs.Opened(); err != nil {
		return nil, errors.Join(fmt.Errorf("open the pool's database: %w", err), db.Close())
	}
	return &badgerKV{db, s}, nil
}

func (b *badgerKV) Get(key []byte) (val []byte, err error) {
	err = b.db.View(func(tx *badger.Txn) error {
		it, err := tx.Get(key)
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		val, err = it.ValueCopy(nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the pool's database: %w", err)
	}
	return val, nil
}

func (b *badgerKV) Scan(prefix []byte, fn func(key, val []byte) error) error {
	return b.db.View(func(tx *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix = prefix
		it := tx.NewIterator(o)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			if err := it.Item().Value(func(v []byte) error { return fn(it.Item().Key(), v) }); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *badgerKV) Commit(ops []op) error {
	n := 0
	err := b.db.Update(func(tx *badger.Txn) error {
		for _, o := range ops {
			n += o.size()
			var err error
			if o.val == nil {
				err = tx.Delete(o.key)
			} else {
				err = tx.Set(o.key, o.val)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("commit to the pool's database: %w", err)
	}
	b.steps.logs.Wrote(n)
	return nil
}

func (b *badgerKV) Backlog() int64 {
	levels := b.db.Levels()
	var total int64
	for _, l := range levels {
		total += l.Size
	}
	tables, size := levels[0].NumTables, levels[0].Size
	worth := min(max(total/compactShare, fewTables*memTable/2), manyTables*memTable)
	if tables <= fewTables || size < worth && tables < 2*manyTables {
		return 0
	}
	return size
}

func (b *badgerKV) Compact(ctx context.Context, room func() bool) (err error) {
	b.steps.ctx, b.steps.room = ctx, room
	defer func() {
		if x := recover(); x != nil {
			if x != errStopped {
				panic(x)
			}
			err = ctx.Err()
		}
	}()
	if err := b.db.Flatten(1); err != nil {
		return fmt.Errorf("compact the pool's database: %w", err)
	}
	return nil
}

func (b *badgerKV) Room() bool { return b.steps.logs.Prepare() }

func (b *badgerKV) Close() error {
	if err := b.steps.logs.Close(); err != nil {
		return err
	}
	return b.db.Close()
}

// store commits ops, units together: one unit is never split. The order of units is kept.
func (p *Pool) store(units [][]op) error {
	var batch []op
	size := 0
	if p.opts.broken.splitPairs {
		units = split(units)
	}
	for _, u := range units {
		n := 0
		for _, o := range u {
			n += o.size()
		}
		if (size+n > maxCommit || p.opts.broken.splitPairs) && len(batch) > 0 {
			if err := p.commitOps(batch); err != nil {
				return err
			}
			if err := p.waitRoom(p.ctx); err != nil {
				return p.fail(err) // a part is stored
			}
			batch, size = batch[:0], 0
		}
		batch, size = append(batch, u...), size+n
	}
	if len(batch) == 0 {
		return nil
	}
	return p.commitOps(batch)
}

func split(units [][]op) (single [][]op) {
	for _, u := range units {
		for _, o := range u {
			single = append(single, []op{o})
		}
	}
	return single
}

// commitOps is the only way to the database. An outcome that is unknown is the end of the pool until it is reopened:
// what is in memory and what is stored may differ.
func (p *Pool) commitOps(ops []op) error {
	if err := p.failure(); err != nil {
		return err
	}
	// Not even a full filesystem is a reason to try again: what the kernel could not write back it takes for written, and
	// what comes after such a gap in the database's log is not found after a crash.
	if err := p.kv.Commit(ops); err != nil {
		return p.fail(err)
	}
	n := 0
	for _, o := range ops {
		n += o.size()
	}
	if p.uncompacted.Add(int64(n)) >= compactEvery {
		p.uncompacted.Store(0)
		p.compactSoon()
	}
	return nil
}

func (p *Pool) compactSoon() {
	select {
	case p.compactMe <- struct{}{}:
	default:
	}
}

// runCompactor compacts the database when enough was written. It is not begun without room: the database writes through
// a memory map, where a full filesystem is fatal.
func (p *Pool) runCompactor() error {
	for {
		select {
		case <-p.ctx.Done():
			return nil
		case <-p.compactMe:
		}
		n := p.kv.Backlog()
		if n == 0 {
			continue
		}
		if !p.makeRoom(n + compactMargin + commitFloor) {
			p.log.Warn("the filesystem of the pool has no room to compact its database", "bytes", n)
			continue
		}
		if err := p.kv.Compact(p.ctx, func() bool { return p.makeRoom(commitFloor) }); err != nil && p.ctx.Err() == nil {
			p.log.Warn("compaction", "error", err)
		}
	}
}
