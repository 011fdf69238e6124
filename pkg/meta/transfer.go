package meta

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/dgraph-io/badger/v4"

	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// The state as a stream, all numbers big endian:
//
//	"BLSTMETA"  version u32  applied index u64  crc u32
//	blocks:     length u32 (1 to maxBlock)  payload  crc u32
//	end:        0 u32  number of records u64  crc u32
//
// A payload is whole records, in the order of their keys: length of the key (uvarint), key, length of the value (uvarint),
// value. Each crc (CRC-32C) covers everything before it in the stream, earlier checksums excepted, so that no block can be missing or
// in another place. Keys that begin with '!' belong to one machine and are not in it.
const (
	streamMagic   = "BLSTMETA"
	streamVersion = 1
	blockSize     = 128 << 10
	maxKey        = 1 << 10
	maxValue      = 1 << 20
	maxBlock      = blockSize + maxKey + maxValue + 2*binary.MaxVarintLen32
	localKeys     = "!"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checkpoint is the state at an index. It stays as it is while the machine goes on, but a Restore or the machine's Close
// ends it: neither may wait for whoever has it, who may himself be waiting for them.
type Checkpoint struct {
	m       *Machine
	txn     *badger.Txn // under mu; nil once it has ended
	applied uint64
}

// Checkpoint takes the state as it is; it costs nothing until it is written. It is to be closed.
func (m *Machine) Checkpoint() (*Checkpoint, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fatal != nil {
		return nil, m.fatal
	}
	c := &Checkpoint{m: m, txn: m.db.NewTransaction(false), applied: m.applied}
	m.checkpoints[c] = struct{}{}
	return c, nil
}

// Applied is the index of the last command in it.
func (c *Checkpoint) Applied() uint64 { return c.applied }

// Close lets the checkpoint go; it is not being written.
func (c *Checkpoint) Close() {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.end()
}

// end may be called again. The caller holds mu.
func (c *Checkpoint) end() {
	delete(c.m.checkpoints, c)
	if c.txn != nil {
		c.txn.Discard()
		c.txn = nil
	}
}

// Write streams the state. It returns volume.ErrStale after a Restore or the machine's Close, both of which wait for one
// that has begun.
func (c *Checkpoint) Write(w io.Writer) error {
	c.m.reading.RLock()
	defer c.m.reading.RUnlock()
	c.m.mu.Lock()
	txn := c.txn
	c.m.mu.Unlock()
	if txn == nil {
		return fmt.Errorf("the cluster's state was restored or closed since the checkpoint: %w", volume.ErrStale)
	}
	sum := uint32(0)
	var err error
	put := func(b []byte, covered int) {
		if err != nil {
			return
		}
		sum = crc32.Update(sum, castagnoli, b[:covered])
		_, err = w.Write(binary.BigEndian.AppendUint32(b, sum))
	}
	head := binary.BigEndian.AppendUint32([]byte(streamMagic), streamVersion)
	head = binary.BigEndian.AppendUint64(head, c.applied)
	put(head, len(head))

	records := uint64(0)
	block := make([]byte, 4, blockSize+64<<10)
	flush := func() {
		if len(block) > 4 {
			binary.BigEndian.PutUint32(block, uint32(len(block)-4))
			put(block, len(block))
			block = block[:4]
		}
	}
	it := txn.NewIterator(badger.DefaultIteratorOptions)
	defer it.Close()
	for it.Rewind(); it.Valid() && err == nil; it.Next() {
		item := it.Item()
		key := item.Key()
		if strings.HasPrefix(string(key), localKeys) {
			continue
		}
		if len(key) > maxKey || item.ValueSize() > maxValue {
			return fmt.Errorf("record %.64q has %d bytes, the limit is %d", key, item.ValueSize(), maxValue)
		}
		block = binary.AppendUvarint(block, uint64(len(key)))
		block = append(block, key...)
		if err := item.Value(func(b []byte) error {
			block = binary.AppendUvarint(block, uint64(len(b)))
			block = append(block, b...)
			return nil
		}); err != nil {
			return fmt.Errorf("record %q: %w", key, err)
		}
		if records++; len(block) >= blockSize {
			flush()
		}
	}
	flush()
	end := binary.BigEndian.AppendUint64(make([]byte, 4), records)
	put(end, len(end))
	return err
}

// readStream calls fn with each record of a stream and returns the applied index. Only when it returns nil was the stream
// whole. What is not a stream, or a damaged one, is volume.ErrDataLoss.
func readStream(r io.Reader, fn func(key, value []byte) error) (applied uint64, err error) {
	in := bufio.NewReaderSize(r, 64<<10)
	damaged := func(what string) error {
		return fmt.Errorf("checkpoint of the state: %s: %w", what, volume.ErrDataLoss)
	}
	sum := uint32(0)
	buf := make([]byte, 0, blockSize)
	read := func(n int) error { // appends n covered bytes to buf
		for n > 0 { // in pieces: a length that is wrong costs no more memory than the stream is long
			part := min(n, blockSize)
			at := len(buf)
			buf = append(buf, make([]byte, part)...)
			if _, err := io.ReadFull(in, buf[at:]); err != nil {
				if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
					return damaged("it is cut off")
				}
				return fmt.Errorf("checkpoint of the state: %w", err)
			}
			n -= part
		}
		return nil
	}
	check := func() error {
		at := len(buf)
		if err := read(4); err != nil {
			return err
		}
		if sum = crc32.Update(sum, castagnoli, buf[:at]); sum != binary.BigEndian.Uint32(buf[at:]) {
			return damaged("its checksum is wrong")
		}
		buf = buf[:at]
		return nil
	}
	if err := read(len(streamMagic) + 12); err != nil {
		return 0, err
	}
	if string(buf[:len(streamMagic)]) != streamMagic {
		return 0, damaged("it does not begin like one")
	}
	if v := binary.BigEndian.Uint32(buf[len(streamMagic):]); v != streamVersion {
		return 0, fmt.Errorf("checkpoint of the state has version %d, this program knows %d", v, streamVersion)
	}
	applied = binary.BigEndian.Uint64(buf[len(streamMagic)+4:])
	if err := check(); err != nil {
		return 0, err
	}
	last, records := "", uint64(0)
	for {
		buf = buf[:0]
		if err := read(4); err != nil {
			return 0, err
		}
		n := binary.BigEndian.Uint32(buf)
		if n == 0 {
			break
		}
		if n > maxBlock {
			return 0, damaged("a block is too long")
		}
		if err := read(int(n)); err != nil {
			return 0, err
		}
		if err := check(); err != nil {
			return 0, err
		}
		for rest := buf[4:]; len(rest) > 0; records++ {
			var key, value []byte
			var ok bool
			if key, rest, ok = cutField(rest, maxKey); !ok || string(key) <= last || strings.HasPrefix(string(key), localKeys) {
				return 0, damaged("a key is malformed or out of order")
			}
			if value, rest, ok = cutField(rest, maxValue); !ok {
				return 0, damaged("a value is malformed")
			}
			last = string(key)
			if err := fn(key, value); err != nil {
				return 0, err
			}
		}
	}
	if err := read(8); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(buf[4:]) != records {
		return 0, damaged("records are missing")
	}
	if err := check(); err != nil {
		return 0, err
	}
	if _, err := in.ReadByte(); err != io.EOF {
		return 0, damaged("it goes on after its end")
	}
	return applied, nil
}

func cutField(b []byte, most uint64) (field, rest []byte, ok bool) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > most || n > uint64(len(b)-used) {
		return nil, nil, false
	}
	return b[used : used+int(n)], b[used+int(n):], true
}

// Directories beside the state's own, while it is being replaced.
const (
	incoming = ".incoming" // the new state, until it is complete
	outgoing = ".outgoing" // the old state, until the new one is in its place
)

// Restore replaces the state by what Checkpoint.Write made. A crash at any time leaves the old or the new state. One that
// is not newer than the state changes nothing. volume.ErrDataLoss is a damaged checkpoint; the state is then as it was.
func (m *Machine) Restore(r io.Reader) error {
	o := m.o
	path := m.dir + incoming
	if !o.InMemory {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("restore the cluster's state: %w", err)
		}
		defer os.RemoveAll(path) // what a failure leaves; after success there is none
	}
	m.o.step("fill")
	fresh, applied, err := fill(path, o, r)
	if err != nil {
		return fmt.Errorf("restore the cluster's state: %w", err)
	}
	m.reading.Lock()
	defer m.reading.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fatal != nil || applied <= m.applied {
		return errors.Join(m.fatal, fresh.Close())
	}
	m.endCheckpoints()
	if o.InMemory {
		old := m.db
		m.db = fresh
		if err := errors.Join(old.Close(), m.load()); err != nil {
			return m.fail(err)
		}
		m.volumes.clear()
		m.snapshots.clear()
		m.wake()
		return nil
	}
	if err := errors.Join(fresh.Close(), syncTree(path)); err != nil {
		return fmt.Errorf("restore the cluster's state: %w", err)
	}
	// From here on a failure leaves the machine closed: Open finds one of the two states.
	if err = m.closeDatabase(); err == nil {
		err = m.swap(path)
	}
	if err == nil {
		err = m.openDatabase()
	}
	if err != nil {
		return m.fail(fmt.Errorf("restore: %w", err))
	}
	m.wake()
	return nil
}

// endCheckpoints is called before the database is closed. The caller holds reading and mu.
func (m *Machine) endCheckpoints() {
	for c := range m.checkpoints {
		c.end()
	}
}

// What fill writes goes through a memory map, where a full filesystem is fatal: after every so many bytes it looks whether so many are
// free.
const (
	fillCheck = 1 << 20
	fillFloor = 64 << 20
)

// fill makes a database of a checkpoint. Nothing of it is durable yet.
func fill(path string, o Options, r io.Reader) (*badger.DB, uint64, error) {
	room := func() error {
		if o.InMemory {
			return nil
		}
		free, err := disk.NewDirSpace(filepath.Dir(path), 0).Free()
		if err == nil && free < fillFloor {
			err = fmt.Errorf("%d bytes are free for %s; delete something else on its filesystem: %w", free, path, volume.ErrNoSpace)
		}
		return err
	}
	if err := room(); err != nil {
		return nil, 0, err
	}
	db, err := badger.Open(databaseOptions(path, o, nil).WithSyncWrites(false))
	if err != nil {
		return nil, 0, err
	}
	batch := db.NewWriteBatch()
	unchecked := 0
	applied, err := readStream(r, func(key, value []byte) error {
		if unchecked += len(key) + len(value); unchecked >= fillCheck {
			unchecked = 0
			if err := room(); err != nil {
				return err
			}
		}
		return batch.Set([]byte(string(key)), []byte(string(value)))
	})
	set := func(key string, value []byte) {
		if err == nil {
			err = batch.Set([]byte(key), value)
		}
	}
	set(keyFormat, []byte{FormatVersion})
	set(keyApplied, binary.BigEndian.AppendUint64(nil, applied))
	set(keyShared, []byte{1})
	if err != nil {
		batch.Cancel()
		return nil, 0, errors.Join(err, db.Close())
	}
	if err := batch.Flush(); err != nil {
		return nil, 0, errors.Join(err, db.Close())
	}
	return db, applied, nil
}

// swap puts the database of a path in the place of the present one. Both are closed.
func (m *Machine) swap(path string) error {
	parent := filepath.Dir(m.dir)
	m.o.step("old away")
	if err := os.Rename(m.dir, m.dir+outgoing); err != nil {
		return err
	}
	m.o.step("new in place")
	if err := os.Rename(path, m.dir); err != nil {
		return err
	}
	m.o.step("sync")
	if err := syncPath(parent); err != nil {
		return err
	}
	m.o.step("old removed")
	return os.RemoveAll(m.dir + outgoing)
}

// settleRestore ends a restore that was cut off: with the new state, where that is in its place, otherwise with the old.
func settleRestore(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := os.Rename(dir+outgoing, dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	} else if err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Dir(dir)); err == nil {
		if err := syncPath(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(dir+outgoing), os.RemoveAll(dir+incoming))
}

// syncTree makes a directory and the files in it durable.
func syncTree(dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := syncPath(filepath.Join(dir, f.Name())); err != nil {
			return err
		}
	}
	return syncPath(dir)
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
