package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// Initramfs is what the guest's root filesystem holds.
type Initramfs struct {
	// Init is the host's path of the first process, a static binary.
	Init string
	// Binaries are static binaries of the host; they go to /usr/bin.
	Binaries []string
	// Tools are programs of the host, found by name; they go where they are, with the libraries they need.
	Tools []string
	// Modules are loaded in this order, each after those that it needs.
	Modules []string
}

// ModuleList is the file in the guest that names the modules to load, one path in a line.
const ModuleList = "/etc/modules-to-load"

// Write makes the root filesystem at file, for kernel k.
func (i Initramfs) Write(ctx context.Context, file string, k *Kernel) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	a := newArchive(out)
	for _, d := range []string{"dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "var"} {
		if err := a.dir(d); err != nil {
			return err
		}
	}
	// Debian's layout since 12: the first four are links.
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := a.symlink(d, "usr/"+d); err != nil {
			return err
		}
	}
	if err := a.symlink("etc/mtab", "/proc/self/mounts"); err != nil {
		return err
	}
	if err := a.file("init", i.Init); err != nil {
		return err
	}
	for _, b := range i.Binaries {
		if err := a.file("usr/bin/"+filepath.Base(b), b); err != nil {
			return err
		}
	}
	for _, t := range i.Tools {
		if err := addTool(ctx, a, t); err != nil {
			return err
		}
	}
	modules, err := k.load(ctx, i.Modules...)
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, m := range modules {
		name := "usr/lib/modules/" + m.name + ".ko"
		if err := a.bytes(name, string(m.elf)); err != nil {
			return err
		}
		list.WriteString("/" + name + "\n")
	}
	if err := a.bytes(ModuleList, list.String()); err != nil {
		return err
	}
	if err := a.close(); err != nil {
		return err
	}
	return out.Close()
}

func addTool(ctx context.Context, a *archive, tool string) error {
	file, err := exec.LookPath(tool)
	if err != nil {
		return fmt.Errorf("the guest needs %s of this machine; run make deps: %w", tool, err)
	}
	if err := addReal(a, file); err != nil {
		return err
	}
	head := make([]byte, 2)
	if f, err := os.Open(file); err == nil {
		f.Read(head)
		f.Close()
	}
	if string(head) == "#!" {
		return nil // fsck.xfs and its like; the guest has /bin/sh
	}
	out, err := exec.CommandContext(ctx, "ldd", file).CombinedOutput()
	if err != nil {
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil
		}
		return fmt.Errorf("ldd %s: %w: %s", file, err, out)
	}
	for line := range strings.SplitSeq(string(out), "\n") {
		_, lib, found := strings.Cut(line, "=>")
		if !found {
			lib = line
		}
		lib, _, _ = strings.Cut(strings.TrimSpace(lib), " ")
		if !path.IsAbs(lib) {
			continue // the vdso
		}
		if err := addReal(a, lib); err != nil {
			return err
		}
	}
	return nil
}

// addReal adds a file under the name it has once the links in its directory's path are followed.
func addReal(a *archive, file string) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(file))
	if err != nil {
		return err
	}
	err = a.file(filepath.Join(dir, filepath.Base(file)), file)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("a library that ldd names is not there: %w", err)
	}
	return err
}
