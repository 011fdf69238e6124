package extentstore

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	"github.com/ballast-csi/ballast/pkg/disk"
)

var errPower = errors.New("power is off")

// power fails all durable steps once a number of them have been made.
type power struct {
	mu    sync.Mutex
	left  int // negative: it never fails
	steps int
	off   bool
	rng   *rand.Rand
	// during, if set, is called before each step that is not part of such a call itself.
	during func(op string)
	nested bool
}

func (p *power) act(op string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.during == nil || p.nested || p.off {
		return
	}
	p.nested = true
	p.mu.Unlock()
	p.during(op)
	p.mu.Lock()
	p.nested = false
}

func (p *power) step(op string) error {
	p.act(op)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.off && p.left == 0 {
		p.off = true
	}
	if p.off {
		return errPower
	}
	p.left--
	p.steps++
	return nil
}

// memKV is a database in memory. A commit is all or nothing; one at which the power fails is either.
type memKV struct {
	mu     sync.Mutex
	m      map[string][]byte
	power  *power
	closed bool
	fail   error // of the next commit, which is not made
}

func (k *memKV) Get(key []byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.m[string(key)]), nil
}

func (k *memKV) Scan(prefix []byte, fn func(key, val []byte) error) error {
	k.mu.Lock()
	var keys []string
	for key := range k.m {
		if strings.HasPrefix(key, string(prefix)) {
			keys = append(keys, key)
		}
	}
	m := maps.Clone(k.m)
	k.mu.Unlock()
	slices.Sort(keys)
	for _, key := range keys {
		if err := fn([]byte(key), m[key]); err != nil {
			return err
		}
	}
	return nil
}

func (k *memKV) Commit(ops []op) error {
	wasOff := k.power != nil && k.power.off
	var err error
	if k.power != nil {
		err = k.power.step("commit")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return errPoolClosed
	}
	if k.fail != nil {
		err, k.fail = k.fail, nil
		return err
	}
	if err != nil && (wasOff || k.power.rng.IntN(2) == 0) {
		return err
	}
	n := 0
	for _, o := range ops {
		n += o.size()
		if o.val == nil {
			delete(k.m, string(o.key))
		} else {
			k.m[string(o.key)] = slices.Clone(o.val)
		}
	}
	if n > 2*maxCommit {
		return errors.New("transaction is too big")
	}
	return err
}

func (k *memKV) Room() bool                                 { return true }
func (k *memKV) Backlog() int64                             { return 0 }
func (k *memKV) Compact(context.Context, func() bool) error { return nil }

func (k *memKV) Close() error { k.mu.Lock(); k.closed = true; k.mu.Unlock(); return nil }

func (k *memKV) clone() *memKV {
	k.mu.Lock()
	defer k.mu.Unlock()
	return &memKV{m: maps.Clone(k.m)}
}

// memSpace is a filesystem with that many bytes free.
type memSpace struct {
	mu    sync.Mutex
	free  int64
	held  bool
	bytes int64
}

func newMemSpace() *memSpace { return &memSpace{free: 1 << 50} }

func (s *memSpace) Free() (int64, error)  { s.mu.Lock(); defer s.mu.Unlock(); return s.free, nil }
func (s *memSpace) Total() (int64, error) { return 1 << 50, nil }
func (s *memSpace) Held() bool            { s.mu.Lock(); defer s.mu.Unlock(); return s.held }

func (s *memSpace) Hold(margin int64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.held && s.free >= s.bytes+margin {
		s.held = true
		s.free -= s.bytes
	}
	return s.held, nil
}

func (s *memSpace) Release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held {
		s.held = false
		s.free += s.bytes
	}
	return nil
}

func (s *memSpace) set(free int64) { s.mu.Lock(); s.free = free; s.mu.Unlock() }

// machine is what survives of a pool in memory when its process does not.
type machine struct {
	file  *disk.Mem
	kv    *memKV
	space *memSpace
}

func newMachine() *machine {
	return &machine{file: &disk.Mem{}, kv: &memKV{m: map[string][]byte{}}, space: newMemSpace()}
}

func (m *machine) plug(p *power) {
	m.file.Step, m.kv.power = p.step, p
}

// afterSync lets a test act between a sync and what follows it.
type afterSync struct {
	*disk.Mem
	power func() *power
}

func (f afterSync) Sync() error {
	err := f.Mem.Sync()
	if p := f.power(); p != nil {
		p.act("synced")
	}
	return err
}

func (m *machine) open(o Options) (*Pool, error) {
	return start("/memory", deps{file: afterSync{m.file, func() *power { return m.kv.power }}, kv: m.kv, space: m.space}, o)
}

// crash is the machine after its power has failed.
func (m *machine) crash(seed uint64) *machine {
	return &machine{file: m.file.Crash(seed), kv: m.kv.clone(), space: newMemSpace()}
}

func (m *machine) reopen() *machine {
	return &machine{file: m.file.Reopen(), kv: m.kv.clone(), space: newMemSpace()}
}
