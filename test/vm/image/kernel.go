// Package image makes what a guest boots: Debian's kernel, and a root filesystem in memory with the modules and tools
// that the tests need.
package image

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// metapackage depends on Debian's newest kernel for virtual machines, the smallest one with what the guest needs.
const metapackage = "linux-image-cloud-amd64"

// Kernel is an unpacked kernel package.
type Kernel struct {
	Path    string // of the bootable image
	modules map[string]string
}

// FindKernel returns Debian's kernel. It downloads the package with apt, without installing it, unless an earlier call
// did; the package is kept in the user's cache directory.
func FindKernel(ctx context.Context) (*Kernel, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("the guest is an amd64 machine, this is %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	name, err := kernelPackage(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "ballast", "vm", name)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := download(ctx, name, dir); err != nil {
			return nil, err
		}
	}
	return openKernel(dir)
}

func kernelPackage(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", metapackage).Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for %s (run apt-get update first): %w", metapackage, err)
	}
	found := regexp.MustCompile(`linux-image-\d\S+`).FindString(string(out))
	if found == "" {
		return "", fmt.Errorf("apt knows no kernel behind %s; run apt-get update: %w", metapackage, fs.ErrNotExist)
	}
	return found, nil
}

// download makes dir whole or not at all: it is renamed into place.
func download(ctx context.Context, name, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	get := exec.CommandContext(ctx, "apt-get", "download", "-q", name)
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download %s: %w: %s", name, err, out)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages: %w", name, len(debs), errors.Join(err, fs.ErrNotExist))
	}
	root := filepath.Join(tmp, "root")
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", debs[0], root).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg-deb -x %s: %w: %s", debs[0], err, out)
	}
	if err := os.Rename(root, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func openKernel(dir string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("%s holds %d kernels, not 1; remove it to download it again: %w", dir, len(images), fs.ErrNotExist)
	}
	k := &Kernel{Path: images[0], modules: map[string]string{}}
	for _, lib := range []string{"lib", "usr/lib"} {
		top := filepath.Join(dir, lib, "modules")
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && p == top {
				return nil
			}
			if err != nil {
				return err
			}
			if name, _, ok := strings.Cut(d.Name(), ".ko"); ok && d.Type().IsRegular() {
				k.modules[moduleName(name)] = p
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return k, nil
}

// moduleName makes the two spellings of a module's name one.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// module is a kernel module, not compressed.
type module struct {
	name string
	elf  []byte
}

// load returns the modules of those names and all that they depend on, in the order of loading. A name that is no
// module is built into the kernel or does not exist: the guest finds out.
func (k *Kernel) load(ctx context.Context, names ...string) ([]module, error) {
	var order []module
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		file, ok := k.modules[name]
		if !ok || seen[name] {
			return nil
		}
		seen[name] = true
		data, err := unpack(ctx, file)
		if err != nil {
			return err
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", file, err)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		order = append(order, module{name, data})
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func unpack(ctx context.Context, file string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[filepath.Ext(file)]
	if tool == "" {
		return os.ReadFile(file)
	}
	out, err := exec.CommandContext(ctx, tool, "-dc", file).Output()
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w", tool, file, err)
	}
	return out, nil
}

// dependencies reads what a module says of itself; depmod makes modules.dep from the same.
func dependencies(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for line := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(line, "depends="); ok && list != "" {
			needs = append(needs, strings.Split(list, ",")...)
		}
	}
	return needs, nil
}
