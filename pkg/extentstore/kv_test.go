package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// countdown is done after its Err was asked that many times.
type countdown struct {
	context.Context
	left int
}

func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestCompactionStops ends a compaction before its first step and between others: nothing is lost, and the next goes on.
func TestCompactionStops(t *testing.T) {
	t.Parallel()
	db, err := openBadger(t.TempDir())
	must(t, err)
	defer func() { must(t, db.Close()) }()
	const keys = 4000
	val := make([]byte, 16<<10)
	write := func(round byte) {
		for from := uint32(0); from < keys; from += 40 {
			var ops []op
			for i := from; i < from+40; i++ {
				binary.LittleEndian.PutUint32(val, i)
				val[4] = round
				ops = append(ops, op{pageKey(keyPage, 1, i*7919%keys), bytes.Clone(val)})
			}
			must(t, db.Commit(ops))
		}
	}
	verify := func(round byte) {
		t.Helper()
		n := 0
		must(t, db.Scan([]byte{keyPage}, func(k, v []byte) error {
			_, idx, _ := parsePageKey(k)
			if binary.LittleEndian.Uint32(v)*7919%keys != idx || v[4] != round {
				t.Fatalf("page %d is %x", idx, v[:5])
			}
			n++
			return nil
		}))
		if n != keys {
			t.Fatalf("%d keys, want %d", n, keys)
		}
	}
	behind := func() bool { return db.Backlog() > 0 }
	write(1)
	eventually(t, "a backlog", behind)
	must(t, db.Compact(t.Context()))
	write(2)
	eventually(t, "a backlog", behind)
	before := db.Backlog()
	if err := db.Compact(&countdown{Context: t.Context()}); !errors.Is(err, context.Canceled) || db.Backlog() < before {
		t.Fatalf("compaction that was cancelled: %v, backlog %d of %d", err, db.Backlog(), before)
	}
	verify(2)
	for _, left := range []int{1, 3} {
		if err := db.Compact(&countdown{Context: t.Context(), left: left}); !errors.Is(err, context.Canceled) {
			t.Fatalf("compaction of more than %d steps: %v", left, err)
		}
		verify(2)
	}
	must(t, db.Compact(t.Context()))
	verify(2)
	if db.Backlog() != 0 {
		t.Errorf("backlog of %d bytes after a compaction", db.Backlog())
	}
}

// TestCommitOnAFullFilesystem: what the log takes is its own before others fill the filesystem.
func TestCommitOnAFullFilesystem(t *testing.T) {
	t.Parallel()
	device := loopDevice(t, 100*mib)
	must(t, run(t.Context(), "mkfs.ext4", "-q", "-m", "0", device))
	dir := t.TempDir()
	must(t, run(t.Context(), "mount", device, dir))
	t.Cleanup(func() { must(t, run(context.Background(), "umount", dir)) })
	db, err := openBadger(filepath.Join(dir, "db"))
	must(t, err)
	key := binary.BigEndian.AppendUint64([]byte{keyPage}, 1)
	commit := func(n int, size int) {
		for range n {
			must(t, db.Commit([]op{{key, bytes.Repeat([]byte{7}, size)}}))
		}
	}
	commit(160, 64<<10) // into the second log
	hog, err := os.Create(filepath.Join(dir, "hog"))
	must(t, err)
	for size := mib; size > 0; {
		if _, err := hog.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	must(t, hog.Sync())
	commit(16, 64<<10)
	must(t, hog.Close())
	must(t, os.Remove(hog.Name()))
	must(t, db.Close())
	db, err = openBadger(filepath.Join(dir, "db"))
	must(t, err)
	val, err := db.Get(key)
	if err != nil || len(val) != 64<<10 {
		t.Errorf("%d bytes: %v", len(val), err)
	}
	must(t, db.Close())
}
