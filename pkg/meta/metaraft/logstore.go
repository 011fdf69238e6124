package metaraft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const logFile = "log.db"

var (
	bucketLog    = []byte("log")    // index, 8 bytes big endian -> entry
	bucketStable = []byte("stable") // raft's term and vote
)

// logStore keeps raft's log, term and vote in one bbolt file. Everything is durable when a call returns.
//
// The first write that fails is the last: what a failed sync left is not known. Raft would panic where it cannot keep its
// term or read its log, and take volumes down that have nothing to do with it; instead, the goroutine that asked ends, and
// failed ends the rest of raft.
type logStore struct {
	db     *bolt.DB
	watch  *watch
	failed func(error) // told once
	hang   func()      // called before each write; nil is nothing

	mu    sync.Mutex
	fatal error
}

func openLogStore(path string, w *watch, failed func(error)) (*logStore, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use by another process: %w", path, volume.ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db.AllocSize = 4 << 20
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketLog)
		_, err2 := tx.CreateBucketIfNotExists(bucketStable)
		return errors.Join(err, err2)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), db.Close())
	}
	return &logStore{db: db, watch: w, failed: failed}, nil
}

// Close closes the file; nobody uses the store any more.
func (s *logStore) Close() error { return s.db.Close() }

func (s *logStore) update(fn func(tx *bolt.Tx) error) error {
	s.mu.Lock()
	fatal := s.fatal
	s.mu.Unlock()
	if fatal != nil {
		return fatal
	}
	defer s.watch.begin()()
	if s.hang != nil {
		s.hang()
	}
	err := s.db.Update(fn)
	if err != nil {
		err = s.fail(fmt.Errorf("the controller's log cannot be written: %w", err))
	}
	return err
}

func (s *logStore) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fatal == nil {
		s.fatal = err
		s.failed(err)
	}
	return s.fatal
}

func indexKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

func (s *logStore) edge(last bool) (index uint64, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketLog).Cursor()
		k, _ := c.First()
		if last {
			k, _ = c.Last()
		}
		if k != nil {
			index = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return index, err
}

// FirstIndex implements raft.LogStore.
func (s *logStore) FirstIndex() (uint64, error) { return s.edge(false) }

// LastIndex implements raft.LogStore.
func (s *logStore) LastIndex() (uint64, error) { return s.edge(true) }

// IsMonotonic tells raft that the log has no gaps.
func (s *logStore) IsMonotonic() bool { return true }

// GetLog implements raft.LogStore.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	found, err := s.read(index, l)
	if err != nil {
		_ = s.fail(err)
		runtime.Goexit()
	}
	if !found {
		return raft.ErrLogNotFound
	}
	return nil
}

func (s *logStore) read(index uint64, l *raft.Log) (found bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLog).Get(indexKey(index))
		if found = b != nil; !found {
			return nil
		}
		return decodeLog(index, b, l)
	})
	if err != nil {
		err = fmt.Errorf("the controller's log cannot be read: %w", err)
	}
	return found, err
}

// StoreLog implements raft.LogStore.
func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore: one transaction, whatever their number.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	return s.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLog)
		b.FillPercent = 0.9 // keys come in order
		for _, l := range logs {
			if err := b.Put(indexKey(l.Index), encodeLog(l)); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeleteRange implements raft.LogStore.
func (s *logStore) DeleteRange(first, last uint64) error {
	return s.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLog)
		var keys [][]byte // first all of them: a cursor that deletes may leave keys out
		c := b.Cursor()
		for k, _ := c.Seek(indexKey(first)); k != nil && binary.BigEndian.Uint64(k) <= last; k, _ = c.Next() {
			keys = append(keys, k)
		}
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
}

// Set implements raft.StableStore.
func (s *logStore) Set(key, value []byte) error {
	err := s.update(func(tx *bolt.Tx) error { return tx.Bucket(bucketStable).Put(key, value) })
	if err != nil {
		runtime.Goexit()
	}
	return nil
}

// Get implements raft.StableStore.
func (s *logStore) Get(key []byte) (value []byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		value = append(value, tx.Bucket(bucketStable).Get(key)...)
		return nil
	})
	return value, err
}

// SetUint64 implements raft.StableStore.
func (s *logStore) SetUint64(key []byte, value uint64) error { return s.Set(key, indexKey(value)) }

// GetUint64 implements raft.StableStore.
func (s *logStore) GetUint64(key []byte) (uint64, error) {
	b, err := s.Get(key)
	if err != nil || len(b) == 0 {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("the controller's %s has %d bytes: %w", key, len(b), volume.ErrDataLoss)
	}
	return binary.BigEndian.Uint64(b), nil
}

// An entry of the log: version u8, type u8, term u64, appended at i64 (Unix nanoseconds, 0 is unknown), length of the
// extensions u32, extensions, data, CRC-32C u32 of the index and all before it. Numbers are big endian.
const (
	logVersion  = 1
	logOverhead = 1 + 1 + 8 + 8 + 4 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeLog(l *raft.Log) []byte {
	b := make([]byte, 0, logOverhead+len(l.Extensions)+len(l.Data))
	b = append(b, logVersion, byte(l.Type))
	b = binary.BigEndian.AppendUint64(b, l.Term)
	at := int64(0)
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, uint32(len(l.Extensions)))
	b = append(b, l.Extensions...)
	b = append(b, l.Data...)
	return binary.BigEndian.AppendUint32(b, logSum(l.Index, b))
}

func logSum(index uint64, b []byte) uint32 {
	return crc32.Update(crc32.Checksum(indexKey(index), castagnoli), castagnoli, b)
}

func decodeLog(index uint64, b []byte, l *raft.Log) error {
	damaged := func(what string) error {
		return fmt.Errorf("entry %d: %s: %w", index, what, volume.ErrDataLoss)
	}
	if len(b) < logOverhead {
		return damaged("it is cut off")
	}
	body, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if logSum(index, body) != sum {
		return damaged("its checksum is wrong")
	}
	if b[0] != logVersion {
		return fmt.Errorf("entry %d has version %d, this program knows %d", index, b[0], logVersion)
	}
	n := binary.BigEndian.Uint32(b[18:])
	body = body[22:]
	if uint64(n) > uint64(len(body)) {
		return damaged("its extensions are cut off")
	}
	*l = raft.Log{Index: index, Term: binary.BigEndian.Uint64(b[2:]), Type: raft.LogType(b[1])}
	if at := int64(binary.BigEndian.Uint64(b[10:])); at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	if n > 0 {
		l.Extensions = append([]byte(nil), body[:n]...)
	}
	l.Data = append([]byte(nil), body[n:]...)
	return nil
}
