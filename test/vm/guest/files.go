package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// files is a stream of small files in a directory, each replaced in the way of careful programs: written beside, synced,
// renamed, and the directory synced. Generation n replaces the file of slot n modulo slots.
type files struct {
	seed uint64
	dir  string
}

const slots = 8

func (f files) slot(n int64) string { return filepath.Join(f.dir, fmt.Sprintf("slot-%d", n%slots)) }

// content is that of generation n; it begins with n.
func (f files) content(n int64) []byte {
	rnd := rand.New(rand.NewPCG(f.seed, uint64(n)))
	p := binary.LittleEndian.AppendUint64(nil, uint64(n))
	for range rnd.IntN(16 << 10) {
		p = binary.LittleEndian.AppendUint64(p, rnd.Uint64())
	}
	return p
}

// write makes generation n; when it returns nil, that one survives a power cut.
func (f files) write(n int64) error {
	tmp := filepath.Join(f.dir, "tmp")
	t, err := os.Create(tmp)
	if err != nil {
		return err
	}
	_, err = t.Write(f.content(n))
	if err = errors.Join(err, t.Sync(), t.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, f.slot(n)); err != nil {
		return err
	}
	d, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// check demands, in each slot, the last acknowledged generation or the one that was under way.
func (f files) check(acked int64) error {
	for n := max(acked-slots+1, 1); n <= acked; n++ {
		got, err := os.ReadFile(f.slot(n))
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %s is gone, generation %d was synced", errLost, f.slot(n), n)
		}
		if err != nil {
			return err
		}
		if len(got) < 8 {
			return fmt.Errorf("%w: %s has %d bytes, generation %d was synced", errLost, f.slot(n), len(got), n)
		}
		g := int64(binary.LittleEndian.Uint64(got))
		if g != n && g != n+slots || g > acked+1 {
			return fmt.Errorf("%w: %s is of generation %d, %d was synced", errLost, f.slot(n), g, n)
		}
		if string(got) != string(f.content(g)) {
			return fmt.Errorf("%w: %s, generation %d, has other bytes than were synced", errLost, f.slot(n), g)
		}
	}
	return nil
}
