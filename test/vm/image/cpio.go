package image

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
)

// archive writes a cpio archive in the "newc" format, which the kernel unpacks as its first root filesystem.
type archive struct {
	w    *bufio.Writer
	ino  int
	off  int64
	have map[string]bool // names written
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), have: map[string]bool{}}
}

func (a *archive) has(name string) bool { return a.have[clean(name)] }

// dir adds a directory and those above it.
func (a *archive) dir(name string) error {
	name = clean(name)
	if name == "" || a.have[name] {
		return nil
	}
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	return a.entry(name, 0o040755, 0, nil)
}

func (a *archive) symlink(name, target string) error {
	if err := a.dir(path.Dir(clean(name))); err != nil {
		return err
	}
	return a.entry(name, 0o120777, int64(len(target)), strings.NewReader(target))
}

func (a *archive) bytes(name string, data string) error {
	if err := a.dir(path.Dir(clean(name))); err != nil {
		return err
	}
	return a.entry(name, 0o100644, int64(len(data)), strings.NewReader(data))
}

// file adds the file at from, which may be a symbolic link, under name.
func (a *archive) file(name, from string) error {
	if a.has(name) {
		return nil
	}
	if err := a.dir(path.Dir(clean(name))); err != nil {
		return err
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file: %w", from, fs.ErrInvalid)
	}
	return a.entry(name, 0o100755, info.Size(), f)
}

func (a *archive) entry(name string, mode uint32, size int64, data io.Reader) error {
	name = clean(name)
	if a.have[name] {
		return nil
	}
	a.have[name] = true
	a.ino++
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0)
	if err := a.write(strings.NewReader(head + name + "\x00")); err != nil {
		return err
	}
	if err := a.pad(); err != nil {
		return err
	}
	if data != nil {
		if err := a.write(io.LimitReader(data, size)); err != nil {
			return err
		}
	}
	return a.pad()
}

func (a *archive) write(r io.Reader) error {
	n, err := io.Copy(a.w, r)
	a.off += n
	return err
}

func (a *archive) pad() error {
	return a.write(strings.NewReader("\x00\x00\x00"[:(4-a.off%4)%4]))
}

func (a *archive) close() error {
	if err := a.entry("TRAILER!!!", 0, 0, nil); err != nil {
		return err
	}
	return a.w.Flush()
}

func clean(name string) string { return strings.Trim(path.Clean("/"+name), "/") }
