package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/vm/cutdisk"
	"github.com/ballast-csi/ballast/test/vm/image"
	"github.com/ballast-csi/ballast/test/vm/report"
)

const (
	root     = "../.."
	diskSize = 8 << 30 // sparse
)

// tools of this machine that the guest's scenarios, ballastd and mount-utils call.
var tools = []string{
	"sh", "mount", "umount", "blkid", "blockdev", "losetup", "fsfreeze", "findmnt", "lsblk", "wipefs", "fsck",
	"mkfs.ext4", "e2fsck", "fsck.ext4", "resize2fs", "dumpe2fs", "tune2fs",
	"mkfs.xfs", "fsck.xfs", "xfs_growfs", "xfs_repair", "xfs_io", "xfs_admin", "xfs_db", "xfs_info",
	"mkfs.btrfs", "fsck.btrfs", "btrfs", "btrfstune", "fusermount3",
}

var modules = []string{"virtio_pci", "virtio_console", "virtio_blk", "crc32c-intel", "loop", "fuse", "xfs", "btrfs"}

// bootable is what every machine of this test run boots.
type bootable struct{ kernel, initramfs string }

var prepare = sync.OnceValues(func() (bootable, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	kernel, err := image.FindKernel(ctx)
	if err != nil {
		return bootable{}, err
	}
	b := bootable{kernel: kernel.Path, initramfs: filepath.Join(scratch, "initramfs")}
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", scratch+"/",
		"./test/vm/guest", "./cmd/ballastd", "./cmd/ballastctl")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return b, fmt.Errorf("%s: %w: %s", build, err, out)
	}
	return b, image.Initramfs{
		Init: filepath.Join(scratch, "guest"), Tools: tools, Modules: modules,
		Binaries: []string{filepath.Join(scratch, "ballastd"), filepath.Join(scratch, "ballastctl")},
	}.Write(ctx, b.initramfs, kernel)
})

// scratch is a directory for the whole run.
var scratch string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ballast-vm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	scratch = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func config(t *testing.T, disk *cutdisk.Disk, scenario ...string) Config {
	t.Helper()
	b, err := prepare()
	if err != nil {
		t.Fatalf("prepare the guest: %v", err)
	}
	return Config{Kernel: b.kernel, Initramfs: b.initramfs, Disk: disk, MemoryMiB: 1024, Scenario: scenario, Dir: t.TempDir()}
}

func newDisk(t *testing.T, atom int64, base string) *cutdisk.Disk {
	t.Helper()
	d, err := cutdisk.New(t.TempDir(), diskSize, atom, base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// run boots one scenario on a new disk and fails the test where the scenario does.
func run(t *testing.T, memoryMiB int, limit time.Duration, scenario ...string) {
	t.Helper()
	c := config(t, newDisk(t, 512, ""), scenario...)
	c.MemoryMiB = memoryMiB
	runConfig(t, c, limit)
}

func runConfig(t *testing.T, c Config, limit time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	events, err := Run(ctx, c)
	for _, e := range events {
		if e.Kind == report.Value {
			t.Logf("%s: %s", e.Name, e.Text)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// setting reads a number from the environment.
func setting(t *testing.T, name string, usual int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}
