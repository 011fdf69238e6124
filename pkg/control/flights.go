package control

import (
	"context"
	"fmt"
	"sync"
)

// flights are the operations under way, by the key of what they work on: one at a time for each.
type flights struct {
	mu sync.Mutex
	m  map[string]*flight
}

type flight struct {
	turn chan struct{} // holds one token while nobody works
	n    int           // who works and who waits
}

// lock waits for its turn. It returns ctx's error when that ends first.
func (f *flights) lock(ctx context.Context, key string) (unlock func(), err error) {
	x := f.join(key)
	select {
	case <-x.turn:
		return func() { x.turn <- struct{}{}; f.leave(key, x) }, nil
	case <-ctx.Done():
		f.leave(key, x)
		return nil, fmt.Errorf("%s: waiting for another operation on it: %w", key, ctx.Err())
	}
}

// tryLock does not wait.
func (f *flights) tryLock(key string) (unlock func(), ok bool) {
	x := f.join(key)
	select {
	case <-x.turn:
		return func() { x.turn <- struct{}{}; f.leave(key, x) }, true
	default:
		f.leave(key, x)
		return nil, false
	}
}

func (f *flights) join(key string) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.m[key]
	if x == nil {
		x = &flight{turn: make(chan struct{}, 1)}
		x.turn <- struct{}{}
		f.m[key] = x
	}
	x.n++
	return x
}

func (f *flights) leave(key string, x *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.n--; x.n == 0 {
		delete(f.m, key)
	}
}

func volumeKey(id string) string      { return "volume " + id }
func volumeNameKey(n string) string   { return "volume named " + n }
func cutKey(id string) string         { return "cut of volume " + id }
func groupNameKey(n string) string    { return "group named " + n }
func groupKey(id string) string       { return "group " + id }
func snapshotKey(id string) string    { return "snapshot " + id }
func snapshotNameKey(n string) string { return "snapshot named " + n }
