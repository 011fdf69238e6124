package meta

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/dgraph-io/badger/v4"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Keys. Every value is a record: a version byte and JSON, except the indexes, whose values are ids.
const (
	keyFormat  = "!format"
	keyApplied = "!applied"
	keyShared  = "!shared" // there while the state is one of several copies

	volumes       = "v/" // + volume id
	volumeNames   = "vn/"
	replicas      = "vr/" // + replica id -> volume id
	snapshots     = "s/"  // + snapshot id
	snapshotNames = "sn/"
	snapshotsOf   = "sv/" // + volume id / snapshot id
	remains       = "k/"  // + id of a volume that is deleted and has snapshots
	groups        = "g/"  // + group id
	groupNames    = "gn/"
	nodes         = "n/"
	idleNodes     = "ni"  // the nodes that are drained or emptying, in order
	removedNodes  = "nr/" // + node id
	generations   = "ng/" // + node id -> how many joined under it
	joinTokens    = "j/"  // + token id
	pools         = "p/"
	limits        = "ql/" // + tenant
	uses          = "qu/" // + tenant
	pins          = "x/"  // + id of a source -> how many volumes are being made from it
	attached      = "a/"  // + node id -> how many volumes are attached to it
	controllers   = "c/"  // + node id
	proposals     = "d/"  // + proposal id -> index, answer
	proposalRing  = "dr/" // + number of a proposal modulo remembered -> proposal id
	proposalCount = "dn"  // how many were ever remembered
	unsettled     = "w/"  // + v/volume id or s/snapshot id: the record is in a state that must end
)

// recordVersion is the first byte of every record.
const recordVersion = 1

// base is what a view reads through to: a Badger transaction or another view.
type base interface {
	get(key string) ([]byte, error)
	// keys calls f with the keys that have a prefix, in no order, until f returns false.
	keys(prefix string, f func(key string) bool) error
}

type txnBase struct{ txn *badger.Txn }

func (t txnBase) get(key string) ([]byte, error) {
	item, err := t.txn.Get([]byte(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return item.ValueCopy(nil)
}

func (t txnBase) keys(prefix string, f func(key string) bool) error {
	it := t.txn.NewIterator(badger.IteratorOptions{Prefix: []byte(prefix)})
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		if !f(string(it.Item().Key())) {
			break
		}
	}
	return nil
}

// view is a change under construction: writes stay in it until it is merged into its base or dropped. The first failure
// to read is kept in err; what a handler decided after that is void.
type view struct {
	base   base
	writes map[string][]byte // nil is a deletion
	size   int
	err    error
}

func newView(b base) *view { return &view{base: b, writes: map[string][]byte{}} }

func (v *view) get(key string) ([]byte, error) {
	if b, ok := v.writes[key]; ok {
		return b, nil
	}
	return v.base.get(key)
}

func (v *view) read(key string) []byte {
	b, err := v.get(key)
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("read %q: %w", key, err)
	}
	return b
}

func (v *view) keys(prefix string, f func(key string) bool) error {
	for k, b := range v.writes {
		if b != nil && strings.HasPrefix(k, prefix) && !f(k) {
			return nil
		}
	}
	return v.base.keys(prefix, func(k string) bool {
		_, over := v.writes[k]
		return over || f(k)
	})
}

// some tells whether any key has a prefix.
func (v *view) some(prefix string) (found bool) {
	err := v.keys(prefix, func(string) bool {
		found = true
		return false
	})
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("look for %q: %w", prefix, err)
	}
	return found
}

func (v *view) put(key string, b []byte) {
	v.writes[key] = b
	v.size += len(key) + len(b)
}

func (v *view) del(key string) { v.put(key, nil) }

// merge takes over what another view on top of this one wrote.
func (v *view) merge(o *view) {
	for k, b := range o.writes {
		v.put(k, b)
	}
}

func load[T any](v *view, key string) (rec T, ok bool) {
	b := v.read(key)
	if b == nil {
		return rec, false
	}
	rec, err := decode[T](b)
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("record %q: %w", key, err)
	}
	return rec, err == nil
}

func save(v *view, key string, rec any) {
	b, err := encode(rec)
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("record %q: %w", key, err)
	}
	v.put(key, b)
}

func encode(rec any) ([]byte, error) {
	b, err := json.Marshal(rec)
	return append([]byte{recordVersion}, b...), err
}

func decode[T any](b []byte) (rec T, err error) {
	if len(b) == 0 || b[0] != recordVersion {
		return rec, fmt.Errorf("record version is not %d: %w", recordVersion, volume.ErrDataLoss)
	}
	if err := json.Unmarshal(b[1:], &rec); err != nil {
		return rec, fmt.Errorf("%v: %w", err, volume.ErrDataLoss)
	}
	return rec, nil
}

// putVolume stores a volume and keeps the index of what is unsettled.
func putVolume(v *view, rec volume.Volume) {
	save(v, volumes+string(rec.ID), rec)
	settle(v, "v/"+string(rec.ID), unfinished(rec))
}

// unfinished tells whether something of a volume must end.
func unfinished(rec volume.Volume) bool {
	a := rec.Attachment
	return rec.State != volume.Ready || rec.Target != 0 || len(rec.Leaving) > 0 || a != nil && a.Detaching || a == nil && rec.Owner != ""
}

func putSnapshot(v *view, rec volume.Snapshot) {
	save(v, snapshots+string(rec.ID), rec)
	settle(v, "s/"+string(rec.ID), rec.State != volume.Ready || len(rec.Leaving) > 0)
}

func settle(v *view, what string, open bool) {
	key := unsettled + what
	switch marked := v.read(key) != nil; {
	case open && !marked:
		v.put(key, []byte{1})
	case !open && marked:
		v.del(key)
	}
}

// pin counts the volumes that are being made from a source.
func pin(v *view, source string, delta int) { count(v, pins+source, delta) }

// count adds to a counter; there is none at zero.
func count(v *view, key string, delta int) {
	n, _ := load[int](v, key)
	if n += delta; n > 0 {
		save(v, key, n)
	} else {
		v.del(key)
	}
}
