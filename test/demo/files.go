package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// tree is what a directory holds: names and contents in one checksum.
type tree struct {
	files int
	sum   [sha256.Size]byte
}

func (t tree) short() string { return hex.EncodeToString(t.sum[:8]) }

const (
	files    = 256
	fileSize = 192 << 10
	bigSize  = 16 << 20
)

// writeTree fills a directory with files of random bytes and syncs them.
func writeTree(ctx context.Context, dir string) (tree, error) {
	rnd := rand.NewChaCha8([32]byte{})
	write := func(name string, size int) error {
		b := make([]byte, size)
		if _, err := rnd.Read(b); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, name), b, 0o644)
	}
	for i := range files {
		if err := write(fmt.Sprintf("order-%03d", i), fileSize); err != nil {
			return tree{}, err
		}
	}
	if err := write("ledger", bigSize); err != nil {
		return tree{}, err
	}
	if err := syncFS(dir); err != nil {
		return tree{}, err
	}
	return readTree(ctx, dir)
}

// readTree reads it past the page cache, so that it comes from the volume.
func readTree(ctx context.Context, dir string) (tree, error) {
	var t tree
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := errors.Join(ctx.Err(), f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
			return err
		}
		fmt.Fprintf(h, "%s\x00", d.Name())
		t.files++
		_, err = io.Copy(h, f)
		return err
	})
	h.Sum(t.sum[:0])
	return t, err
}

// ruin overwrites every second file and deletes the others.
func ruin(ctx context.Context, dir string) error {
	for i := range files {
		name := filepath.Join(dir, fmt.Sprintf("order-%03d", i))
		var err error
		if i%2 == 0 {
			err = os.WriteFile(name, []byte(strings.Repeat("oops\n", fileSize/5)), 0o644)
		} else {
			err = os.Remove(name)
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
	return syncFS(dir)
}

func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

func fsSize(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return st.Blocks * uint64(st.Bsize), nil
}

// writer appends to a file and syncs, until its context ends.
type writer struct {
	done chan struct{}
	n    int
	err  error
}

func startWriter(ctx context.Context, path string) *writer {
	w := &writer{done: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.err = w.write(ctx, path)
	}()
	return w
}

func (w *writer) write(ctx context.Context, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for line := make([]byte, 4096); ; w.n++ {
		if _, err := f.Write(line); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// wait returns the number of writes, once the writer has ended.
func (w *writer) wait() (int, error) {
	<-w.done
	return w.n, w.err
}

func (s *show) volume(ctx context.Context, name string) (*adminpb.Volume, error) {
	return s.d.Admin().GetVolume(ctx, &adminpb.GetRequest{Ref: name})
}

// eventually waits a few seconds for what nodes report now and then, and shows it with ballastctl.
func (s *show) eventually(ctx context.Context, look func() (command []string, good bool, err error)) error {
	for end := time.Now().Add(15 * time.Second); ; {
		command, good, err := look()
		if err != nil {
			return err
		}
		if good {
			return s.ctl(ctx, command...)
		}
		if time.Now().After(end) {
			return fmt.Errorf("ballastctl %s does not show it in time", strings.Join(command, " "))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// wrap breaks a text into lines.
func wrap(text string, n int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > n {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
