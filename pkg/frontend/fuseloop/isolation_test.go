package fuseloop

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// TestIsolation uses one device while another of the same process, and one of another process, hang with all the
// requests that the kernel sends.
func TestIsolation(t *testing.T) {
	p, other := startProcess(t, t.TempDir()), startProcess(t, t.TempDir())
	good := p.do(t, "attach good 512")
	var g errgroup.Group
	for _, c := range []struct {
		p    *process
		name string
	}{{p, "hung"}, {other, "hung"}} {
		path := c.p.do(t, "attach %s 256", c.name)
		c.p.do(t, "hang %s", c.name)
		for i := range 100 { // direct
			file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			g.Go(func() error {
				defer file.Close()
				mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				if err != nil {
					return err
				}
				defer unix.Munmap(mem)
				_, err = file.WriteAt(mem, int64(i)*4096)
				return err
			})
		}
		// buffered, with a sync
		g.Go(func() error {
			return exec.Command("dd", "if=/dev/zero", "of="+path, "bs=1M", "count=64", "seek=16", "conv=fsync,notrunc", "status=none").Run()
		})
	}
	time.Sleep(500 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, args := range [][]string{
		{"dd", "if=/dev/zero", "of=" + good, "bs=1M", "count=64", "conv=fsync,notrunc", "status=none"},
		{"mkfs.xfs", "-f", "-q", good},
		{"mkfs.ext4", "-F", "-q", good},
		{"e2fsck", "-fn", good},
	} {
		start := time.Now()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.WaitDelay = time.Second
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
			break
		}
		t.Logf("%s: %v", args[0], time.Since(start))
	}
	p.do(t, "go hung")
	other.do(t, "go hung")
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}
