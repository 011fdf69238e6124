package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// TestFioVerifyAcrossKill lets fio write and flush one file, kills the daemon while fio writes a second one, and has fio
// read the first one back from the filesystem, which must also be sound.
func TestFioVerifyAcrossKill(t *testing.T) {
	for i, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			r := random(t, 5+uint64(i))
			b := newBed(t, time.Minute)
			c := &harness.Claim{Name: "data", Size: 400 * mib, FSType: fsType}
			b.must(t, b.o.Up(b.ctx, c))
			dir := "--directory=" + b.o.TargetPath(c)
			flushed := func(name string) []string {
				return []string{dir, "--filename=" + name, "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=24M",
					"--verify=crc32c", "--verify_fatal=1", "--ioengine=psync"}
			}
			names := []string{}
			for lap := range 3 {
				name := fmt.Sprintf("flushed-%d", lap)
				if _, err := fio(b.ctx, append(flushed(name), "--do_verify=0", "--end_fsync=1")...); err != nil {
					t.Fatal(err)
				}
				syncDir(t, b.o.TargetPath(c))
				names = append(names, name)
				second := startFio(t, dir, "--filename=second", "--rw=randwrite", "--bs=4k", "--size=64M", "--fsync=16",
					"--ioengine=psync", "--time_based", "--runtime=60")
				time.Sleep(time.Duration(300+r.IntN(1500)) * time.Millisecond)
				b.must(t, b.Kill())
				select {
				case <-second.done: // its device is dead
				case <-time.After(20 * time.Second):
					second.stop() // it found its file again on a path that was restored, or it hangs: the next steps tell
				}
				b.must(t, b.Start(b.ctx))
				second.stop()
				<-second.done
				b.must(t, b.o.Again(b.ctx, c))
				for _, name := range names {
					if _, err := fio(b.ctx, append(flushed(name), "--verify_only")...); err != nil {
						t.Fatalf("after kill %d: %v", lap+1, err)
					}
				}
			}
			b.must(t, b.o.Down(b.ctx, c))
			b.fsck(t, c)
		})
	}
}

func syncDir(t *testing.T, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		t.Fatal(err)
	}
}

// fsck stops the daemon, exports the volume and checks its filesystem. It was unmounted cleanly, so nothing needs repair.
func (b *bed) fsck(t *testing.T, c *harness.Claim) {
	t.Helper()
	b.must(t, b.Stop())
	b.checkPool(t)
	image := filepath.Join(b.Dir(), c.Name+".img")
	if out, err := b.Ctl(b.ctx, "pool", "export", b.PoolDir(), c.ID(), image); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tool := map[string][]string{
		"ext4": {"e2fsck", "-f", "-n"}, "xfs": {"xfs_repair", "-n", "-f"}, "btrfs": {"btrfs", "check", "--readonly"},
	}[c.FSType]
	if out, err := exec.Command(tool[0], append(tool[1:], image)...).CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", tool[0], err, out)
	}
}

// TestRestartRevivesPaths stops the daemon properly, and by force, while volumes are in use: after the start their
// paths work again without any call of the orchestrator, with all that was flushed.
func TestRestartRevivesPaths(t *testing.T) {
	r := random(t, 8)
	b := newBed(t, time.Minute)
	kinds := []string{"ext4", "xfs", "btrfs", ""}
	claims, loads := make([]*harness.Claim, len(kinds)), make([]workload, len(kinds))
	var ids []string
	for i, fsType := range kinds {
		claims[i] = &harness.Claim{Name: "v" + fsType, Size: xfsSize, FSType: fsType}
		b.must(t, b.o.Up(b.ctx, claims[i]))
		loads[i] = newWorkload(fsType, xfsSize)
		ids = append(ids, claims[i].ID())
	}
	for lap, end := range []func() error{b.Stop, b.Kill, b.Stop} {
		for i, c := range claims {
			if err := loads[i].write(r, b.o.TargetPath(c)); err != nil {
				t.Fatalf("lap %d, %s: %v", lap, c.Name, err)
			}
		}
		b.must(t, end())
		b.must(t, b.Start(b.ctx))
		for i, c := range claims {
			eventually(t, 30*time.Second, func() error {
				err := loads[i].verify(b.o.TargetPath(c))
				if errors.Is(err, errLost) {
					t.Fatalf("lap %d, %s: %v", lap, c.Name, err)
				}
				if err != nil {
					err = fmt.Errorf("lap %d, %s is not back: %w", lap, c.Name, err)
				}
				return err
			})
		}
	}
	for i, c := range claims {
		b.must(t, b.o.Down(b.ctx, c))
		b.must(t, b.o.Attach(b.ctx, c))
		b.must(t, b.o.Stage(b.ctx, c))
		b.must(t, b.o.Publish(b.ctx, c))
		if err := loads[i].verify(b.o.TargetPath(c)); err != nil {
			t.Errorf("%s after it was staged again: %v", c.Name, err)
		}
		b.must(t, b.o.Down(b.ctx, c))
		b.must(t, b.o.Delete(b.ctx, c))
	}
	b.nothingLeft(t, ids...)
}

// TestManyIdleVolumes stages 50 volumes, stops and kills the daemon over them, and takes them down.
func TestManyIdleVolumes(t *testing.T) {
	const n = 50
	b := newBed(t, 2*time.Minute, "--over-provision=100")
	claims := make([]*harness.Claim, n)
	for i := range claims {
		claims[i] = &harness.Claim{Name: fmt.Sprintf("idle-%d", i), Size: extSize, FSType: []string{"ext4", ""}[i%2]}
	}
	b.must(t, b.each(claims, 4, b.o.Up))
	ids := make([]string, n)
	for i, c := range claims {
		ids[i] = c.ID()
	}
	b.must(t, b.Stop())
	b.must(t, b.Start(b.ctx))
	b.must(t, b.Kill())
	b.must(t, b.Start(b.ctx))
	b.must(t, b.each(claims, 4, b.o.Again))
	for _, c := range claims {
		if _, err := visible(c.FSType, b.o.TargetPath(c)); err != nil {
			t.Errorf("%s: %v", c.Name, err)
		}
	}
	b.must(t, b.each(claims, 4, b.o.Down))
	b.must(t, b.each(claims, 4, b.o.Delete))
	b.nothingLeft(t, ids...)
}
