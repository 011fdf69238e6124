package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/disk"
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
	must(t, db.Compact(t.Context(), func() bool { return true }))
	write(2)
	eventually(t, "a backlog", behind)
	before := db.Backlog()
	if err := db.Compact(&countdown{Context: t.Context()}, func() bool { return true }); !errors.Is(err, context.Canceled) || db.Backlog() < before {
		t.Fatalf("compaction that was cancelled: %v, backlog %d of %d", err, db.Backlog(), before)
	}
	verify(2)
	for _, left := range []int{1, 3} {
		if err := db.Compact(&countdown{Context: t.Context(), left: left}, func() bool { return true }); !errors.Is(err, context.Canceled) {
			t.Fatalf("compaction of more than %d steps: %v", left, err)
		}
		verify(2)
	}
	must(t, db.Compact(t.Context(), func() bool { return true }))
	verify(2)
	if db.Backlog() != 0 {
		t.Errorf("backlog of %d bytes after a compaction", db.Backlog())
	}
}

// fillUp takes all that a filesystem has left.
func fillUp(t *testing.T, hog *os.File) {
	t.Helper()
	for size := mib; size > 0; {
		if _, err := hog.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	must(t, hog.Sync())
}

// TestCommitOnAFullFilesystem: what the database writes next is its own before others fill the filesystem: the rest of the log, the
// next log, and the table that the full one becomes. It stops before it would need more, and can be closed and opened.
func TestCommitOnAFullFilesystem(t *testing.T) {
	t.Parallel()
	for kind, flags := range map[string][]string{"ext4": {"-q", "-m", "0"}, "xfs": {"-q"}} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			device := loopDevice(t, 320*mib)
			must(t, run(t.Context(), "mkfs."+kind, append(flags, device)...))
			dir := t.TempDir()
			must(t, run(t.Context(), "mount", device, dir))
			t.Cleanup(func() { must(t, run(context.Background(), "umount", dir)) })
			db, err := openBadger(filepath.Join(dir, "db"))
			must(t, err)
			hog, err := os.Create(filepath.Join(dir, "hog"))
			must(t, err)
			n := uint64(0)
			key := func(i uint64) []byte { return binary.BigEndian.AppendUint64([]byte{keyPage}, i) }
			commit := func() {
				must(t, db.Commit([]op{{key(n), bytes.Repeat([]byte{byte(n)}, 64<<10)}}))
				n++
			}
			for range 40 {
				commit()
			}
			for round := range 2 {
				fillUp(t, hog)
				before, tables := n, db.db.Levels()[0].NumTables
				for quiet := time.Now(); time.Since(quiet) < 300*time.Millisecond; {
					if db.Room() {
						commit()
						quiet = time.Now()
					}
				}
				if round == 0 {
					eventually(t, "a table made on a full filesystem", func() bool { return db.db.Levels()[0].NumTables > tables })
				}
				if n == before && round == 0 {
					t.Error("no commit on a full filesystem")
				}
				must(t, os.Truncate(hog.Name(), 0))
				_, err := hog.Seek(0, 0)
				must(t, err)
				eventually(t, "room", db.Room)
				commit()
			}
			fillUp(t, hog)
			must(t, db.Close())
			fillUp(t, hog)
			if db, err := openBadger(filepath.Join(dir, "db")); err == nil {
				must(t, db.Close())
			} else if !errors.Is(err, disk.ErrNoSpace) {
				t.Error(err)
			}
			must(t, hog.Close())
			must(t, os.Remove(hog.Name()))
			db, err = openBadger(filepath.Join(dir, "db"))
			must(t, err)
			for i := range n {
				if val, err := db.Get(key(i)); err != nil || !bytes.Equal(val, bytes.Repeat([]byte{byte(i)}, 64<<10)) {
					t.Fatalf("record %d of %d has %d bytes: %v", i, n, len(val), err)
				}
			}
			must(t, db.Close())
		})
	}
}
