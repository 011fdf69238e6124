package extentstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
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
