package meta

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/dgraph-io/badger/v4"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// reader is one consistent read of the state.
type reader struct {
	*view
	txn *badger.Txn
	// nodeOf is where pools are now: a record keeps where they were when it was written.
	nodeOf map[volume.PoolID]volume.NodeID
}

func (m *Machine) read(ctx context.Context, f func(r *reader) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.reading.RLock()
	defer m.reading.RUnlock()
	if m.db.IsClosed() {
		return fmt.Errorf("the cluster's state is closed: %w", volume.ErrUnavailable)
	}
	return m.db.View(func(txn *badger.Txn) error {
		r := &reader{view: newView(txnBase{txn}), txn: txn, nodeOf: map[volume.PoolID]volume.NodeID{}}
		if err := f(r); err != nil {
			return err
		}
		return r.err
	})
}

// maxCached bounds the decoded records that a Machine keeps, of each kind.
const maxCached = 20000

// cache keeps records as they were decoded, so that listing many again costs no decoding. An entry holds for one version
// of its key and cannot be outdated in one database.
type cache[T any] struct {
	mu sync.Mutex
	m  map[string]cached[T]
}

type cached[T any] struct {
	version uint64
	rec     T
}

func (c *cache[T]) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m = nil
}

func (c *cache[T]) decode(key string, item *badger.Item) (rec T, err error) {
	c.mu.Lock()
	x, ok := c.m[key]
	c.mu.Unlock()
	if ok && x.version == item.Version() {
		return x.rec, nil
	}
	err = item.Value(func(b []byte) error {
		rec, err = decode[T](b)
		return err
	})
	if err != nil {
		return rec, fmt.Errorf("record %q: %w", key, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || len(c.m) >= maxCached {
		c.m = map[string]cached[T]{}
	}
	c.m[key] = cached[T]{item.Version(), rec}
	return rec, nil
}

// list calls f with the records under prefix, those after a key, until f returns false. What f gets is shared.
func list[T any](r *reader, c *cache[T], prefix, after string, f func(rec T) bool) error {
	it := r.txn.NewIterator(badger.IteratorOptions{Prefix: []byte(prefix)})
	defer it.Close()
	for it.Seek([]byte(prefix + after)); it.Valid(); it.Next() {
		key := string(it.Item().Key())
		if after != "" && key == prefix+after {
			continue
		}
		rec, err := c.decode(key, it.Item())
		if err != nil {
			return err
		}
		if !f(rec) {
			return nil
		}
	}
	return nil
}

// scan calls f with the keys (less prefix) and values under prefix, those after a key, until f returns false.
func (r *reader) scan(prefix, after string, f func(key string, value []byte) (bool, error)) error {
	o := badger.DefaultIteratorOptions
	o.Prefix = []byte(prefix)
	it := r.txn.NewIterator(o)
	defer it.Close()
	for it.Seek([]byte(prefix + after)); it.Valid(); it.Next() {
		key := strings.TrimPrefix(string(it.Item().Key()), prefix)
		if after != "" && key == after {
			continue
		}
		more := true
		err := it.Item().Value(func(b []byte) (err error) {
			more, err = f(key, b)
			return err
		})
		if err != nil {
			return fmt.Errorf("record %q: %w", prefix+key, err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

// locate returns replicas with the nodes that their pools are on now.
func (r *reader) locate(rs []volume.Replica) []volume.Replica {
	rs = slices.Clone(rs)
	for i, x := range rs {
		n, ok := r.nodeOf[x.Pool]
		if !ok {
			n = place(r.view, x).Node
			r.nodeOf[x.Pool] = n
		}
		rs[i].Node = n
	}
	return rs
}

// finish makes a record that may be shared its reader's own.
func (r *reader) finish(v volume.Volume) volume.Volume {
	v.Replicas, v.Leaving = r.locate(v.Replicas), r.locate(v.Leaving)
	if v.Barrier != nil {
		v.Barrier = new(*v.Barrier)
	}
	v.Capabilities = slices.Clone(v.Capabilities)
	v.Accessible = slices.Clone(v.Accessible)
	if v.Source != nil {
		v.Source = new(*v.Source)
	}
	if v.Attachment != nil {
		v.Attachment = new(*v.Attachment)
	}
	return v
}

func (r *reader) volume(id volume.ID) (volume.Volume, error) {
	v, ok := load[volume.Volume](r.view, volumes+string(id))
	if !ok {
		return v, fmt.Errorf("volume %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	return r.finish(v), nil
}

func (r *reader) snapshot(id volume.SnapshotID) (volume.Snapshot, error) {
	s, ok := load[volume.Snapshot](r.view, snapshots+string(id))
	if !ok {
		return s, fmt.Errorf("snapshot %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	return r.located(s), nil
}

func (r *reader) located(s volume.Snapshot) volume.Snapshot {
	s.Holders, s.Leaving = r.locate(s.Holders), r.locate(s.Leaving)
	return s
}

// Volume returns a volume in any state.
func (m *Machine) Volume(ctx context.Context, id volume.ID) (v volume.Volume, err error) {
	if len(id) > volume.MaxNameLen {
		return v, fmt.Errorf("volume %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	err = m.read(ctx, func(r *reader) error {
		v, err = r.volume(id)
		return err
	})
	return v, err
}

// VolumeByName returns the volume that has the name: one that is not being deleted.
func (m *Machine) VolumeByName(ctx context.Context, name string) (v volume.Volume, err error) {
	err = m.read(ctx, func(r *reader) error {
		id := r.view.read(volumeNames + name)
		if id == nil {
			return fmt.Errorf("no volume has the name %.128q: %w", name, volume.ErrNotFound)
		}
		v, err = r.volume(volume.ID(id))
		return err
	})
	return v, err
}

// Volumes returns volumes in every state, in order of id, those after an id; limit 0 is no bound.
func (m *Machine) Volumes(ctx context.Context, after volume.ID, limit int) (all []volume.Volume, err error) {
	err = m.read(ctx, func(r *reader) error {
		return list(r, &m.volumes, volumes, string(after), func(v volume.Volume) bool {
			all = append(all, r.finish(v))
			return len(all) != limit
		})
	})
	return all, err
}

// Snapshot returns a snapshot in any state.
func (m *Machine) Snapshot(ctx context.Context, id volume.SnapshotID) (x volume.Snapshot, err error) {
	if len(id) > volume.MaxNameLen {
		return x, fmt.Errorf("snapshot %.128q does not exist: %w", id, volume.ErrNotFound)
	}
	err = m.read(ctx, func(r *reader) error {
		x, err = r.snapshot(id)
		return err
	})
	return x, err
}

// Snapshots returns snapshots in every state, in order of id, those after an id; of a volume, or "" of all. Limit 0 is no
// bound.
func (m *Machine) Snapshots(ctx context.Context, of volume.ID, after volume.SnapshotID, limit int) (all []volume.Snapshot, err error) {
	if len(of) > volume.MaxNameLen || strings.Contains(string(of), "/") {
		return nil, nil
	}
	err = m.read(ctx, func(r *reader) error {
		if of == "" {
			return list(r, &m.snapshots, snapshots, string(after), func(x volume.Snapshot) bool {
				all = append(all, r.located(x))
				return len(all) != limit
			})
		}
		return r.scan(snapshotsOf+string(of)+"/", string(after), func(id string, _ []byte) (bool, error) {
			x, err := r.snapshot(volume.SnapshotID(id))
			all = append(all, x)
			return len(all) != limit, err
		})
	})
	return all, err
}

// Remains returns what is kept of deleted volumes that have snapshots, in order of id.
func (m *Machine) Remains(ctx context.Context) (all []volume.Remains, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(remains, "", func(_ string, b []byte) (bool, error) {
			k, err := decode[volume.Remains](b)
			all = append(all, k)
			return true, err
		})
	})
	return all, err
}

// Unsettled returns what is in a state that must end: being created, deleted, expanded or detached, or with copies that leave.
func (m *Machine) Unsettled(ctx context.Context) (vs []volume.ID, ss []volume.SnapshotID, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(unsettled, "", func(key string, _ []byte) (bool, error) {
			if id, ok := strings.CutPrefix(key, "v/"); ok {
				vs = append(vs, volume.ID(id))
			} else if id, ok := strings.CutPrefix(key, "s/"); ok {
				ss = append(ss, volume.SnapshotID(id))
			}
			return true, nil
		})
	})
	return vs, ss, err
}

// Nodes returns the nodes with their pools, in order of id.
func (m *Machine) Nodes(ctx context.Context) (list []volume.Node, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(nodes, "", func(_ string, b []byte) (bool, error) {
			rec, err := decode[nodeRecord](b)
			n := rec.Node
			for _, id := range rec.Pools {
				if p, ok := load[volume.Pool](r.view, pools+string(id)); ok {
					n.Pools = append(n.Pools, p)
				}
			}
			list = append(list, n)
			return true, err
		})
	})
	return list, err
}

// Quotas returns the tenants that have limits or use anything, in order.
func (m *Machine) Quotas(ctx context.Context) (list []volume.Quota, err error) {
	err = m.read(ctx, func(r *reader) error {
		err := r.scan(limits, "", func(tenant string, b []byte) (bool, error) {
			limit, err := decode[volume.Amounts](b)
			used, _ := load[volume.Amounts](r.view, uses+tenant)
			list = append(list, volume.Quota{Tenant: tenant, Limit: limit, Used: used})
			return true, err
		})
		if err != nil {
			return err
		}
		return r.scan(uses, "", func(tenant string, b []byte) (bool, error) {
			if _, ok := load[volume.Amounts](r.view, limits+tenant); ok {
				return true, nil
			}
			used, err := decode[volume.Amounts](b)
			list = append(list, volume.Quota{Tenant: tenant, Used: used})
			return true, err
		})
	})
	slices.SortFunc(list, func(a, b volume.Quota) int { return strings.Compare(a.Tenant, b.Tenant) })
	return list, err
}
