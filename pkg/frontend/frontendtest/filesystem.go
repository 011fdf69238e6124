package frontendtest

import (
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/frontend"
)

// testFilesystem goes through a filesystem's life: mkfs, mount, write, trim, grow, unmount, detach, attach, fsck, read.
func testFilesystem(t *testing.T, f frontend.Frontend, fs string) {
	const size = 512 * mib
	ctx := t.Context()
	mem := blocktest.NewMem(size)
	dev := blocktest.NewFaulty(mem)
	o := frontend.Options{BlockSize: 4096}
	path := attach(t, f, "vol", dev, o)
	run(t, "mkfs."+fs, map[string]string{"ext4": "-q", "xfs": "-q", "btrfs": "-q"}[fs], path)
	dir := t.TempDir()
	mounted := func(flags uintptr) func() {
		noError(t, "mount", unix.Mount(path, dir, fs, flags, ""))
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // after a failure
		return func() { noError(t, "unmount", unix.Unmount(dir, 0)) }
	}

	unmount := mounted(0)
	if err := f.Detach(ctx, "vol"); !errors.Is(err, frontend.ErrBusy) {
		t.Errorf("Detach while mounted = %v, want ErrBusy", err)
	}
	want := map[string][32]byte{}
	write := func(name string, n int) {
		p := make([]byte, n)
		fill(p, uint64(n))
		noError(t, "write "+name, os.WriteFile(filepath.Join(dir, name), p, 0o600))
		want[name] = sha256.Sum256(p)
	}
	write("small", 1000)
	write("large", 100*mib)
	noError(t, "sync", syncFS(dir))
	full := mem.Allocated()
	noError(t, "remove", os.Remove(filepath.Join(dir, "large")))
	delete(want, "large")
	noError(t, "sync", syncFS(dir))
	waitFor(t, "space freed by fstrim", func() bool { // xfs and btrfs free the extents in the background
		if fs == "btrfs" {
			run(t, "btrfs", "filesystem", "sync", dir)
		}
		run(t, "fstrim", dir)
		return mem.Allocated() < full-90*mib
	})
	if _, zeroed := dev.Calls(blocktest.Zero); zeroed < 90*mib {
		t.Errorf("fstrim zeroed %d bytes", zeroed)
	}

	mem.Grow(2 * size)
	noError(t, "Resize", f.Resize(ctx, "vol"))
	switch fs {
	case "ext4":
		if mayGrowExt4() {
			run(t, "resize2fs", path)
			break
		}
		unmount()
		run(t, "e2fsck", "-fp", path)
		run(t, "resize2fs", path)
		unmount = mounted(0)
	case "xfs":
		run(t, "xfs_growfs", dir)
	case "btrfs":
		run(t, "btrfs", "filesystem", "resize", "max", dir)
	}
	var st unix.Statfs_t
	noError(t, "statfs", unix.Statfs(dir, &st))
	if got := int64(st.Blocks) * st.Bsize; got < 2*size*85/100 {
		t.Errorf("the filesystem has %d bytes after it grew", got)
	}
	write("after", 20*mib)
	unmount()
	noError(t, "Detach", f.Detach(ctx, "vol"))

	path = attach(t, f, "vol", dev, o)
	switch fs {
	case "ext4":
		run(t, "e2fsck", "-fn", path)
	case "xfs":
		run(t, "xfs_repair", "-n", path)
	case "btrfs":
		run(t, "btrfs", "check", "--readonly", path)
	}
	unmount = mounted(unix.MS_RDONLY)
	for name, sum := range want {
		p, err := os.ReadFile(filepath.Join(dir, name))
		noError(t, "read "+name, err)
		if sha256.Sum256(p) != sum {
			t.Errorf("%s has changed", name)
		}
	}
	unmount()
	noError(t, "Detach", f.Detach(ctx, "vol"))
}

// mayGrowExt4 tells whether this process may grow a mounted ext4: the kernel wants CAP_SYS_RESOURCE for it, which root
// lacks in some containers.
func mayGrowExt4() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&head, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}
