package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// mountedClaim is a volume with a filesystem, and files in it that were synced.
type mountedClaim struct {
	w     *world
	claim *harness.Claim
	node  int
	files map[string][]byte
}

func (m *mountedClaim) dir() string { return m.w.at(m.node).TargetPath(m.claim) }

// write makes a file, and returns when it is durable with its name.
func (m *mountedClaim) write(name string) error {
	b := make([]byte, 3*mib/2)
	for i := range b {
		b[i] = byte(m.w.rnd.Uint32())
	}
	f, err := os.Create(filepath.Join(m.dir(), name))
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	d, err := os.Open(m.dir())
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return err
	}
	if m.files == nil {
		m.files = map[string][]byte{}
	}
	m.files[name] = b
	return nil
}

// verify reads every file.
func (m *mountedClaim) verify() error {
	for name, want := range m.files {
		b, err := os.ReadFile(filepath.Join(m.dir(), name))
		if err != nil {
			return err
		}
		if !bytes.Equal(b, want) {
			return fmt.Errorf("%s of %s is not what was synced", name, m.claim.Name)
		}
	}
	return nil
}

// back waits until the path works again by itself. Files can be read from a mount with a dead device too, as long as they
// are in memory; written they cannot.
func (m *mountedClaim) back() {
	m.w.t.Helper()
	eventually(m.w.t, backWithin, func(context.Context) error { return m.write("back") })
	must(m.w.t, m.verify())
}

// TestFilesystemFailover lets fio write and sync files to filesystems whose node dies, is cut off or hands over, again and
// again. After each failover the filesystem is one that a power cut could have left, and all that was synced is there.
func TestFilesystemFailover(t *testing.T) {
	w := newWorld(t, options{})
	ways := []struct {
		name string
		from func(i int) error // what becomes of the node
		back func(i int) error // the end of it
	}{
		{"killed", func(i int) error { return w.Nodes()[i].Kill() }, func(i int) error {
			return errors.Join(w.Nodes()[i].Launch(), w.Nodes()[i].WaitReady(t.Context()))
		}},
		{"cut off", func(i int) error { return w.lab.Isolate(i) }, func(int) error { return w.lab.HealAll() }},
	}
	for fsType, laps := range map[string]int{"ext4": 2, "xfs": 1} {
		m := &mountedClaim{w: w, claim: &harness.Claim{
			Name: "data-" + fsType, Size: 320 * mib, FSType: fsType, Parameters: map[string]string{"replicas": "3"}}}
		must(t, w.at(0).Up(t.Context(), m.claim))
		var jobs [][]string
		for lap, way := range ways[:laps] {
			from, to := m.node, (m.node+1)%3
			t.Logf("%s, lap %d: n%d is %s", fsType, lap+1, from+1, way.name)
			must(t, m.write(fmt.Sprint("file-", lap)))
			job := []string{fmt.Sprint("--filename=synced-", lap), "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=16M",
				"--verify=crc32c", "--verify_fatal=1", "--ioengine=psync", fmt.Sprint("--randseed=", 1+w.rnd.IntN(1000))}
			must(t, fio(t.Context(), m.dir(), append(job, "--do_verify=0", "--end_fsync=1")...))
			jobs = append(jobs, job)
			must(t, m.write(fmt.Sprint("after-", lap))) // and the directory

			ctx, stop := context.WithCancel(t.Context())
			load := make(chan error, 1)
			dir := m.dir()
			go func() {
				load <- fio(ctx, dir, "--filename=torn", "--rw=randwrite", "--bs=4k", "--size=32M", "--fsync=16", "--ioengine=psync",
					"--time_based", "--runtime=60")
			}()
			time.Sleep(500*time.Millisecond + time.Duration(w.rnd.IntN(1500))*time.Millisecond)
			must(t, way.from(from))
			gone := *w.at(to)
			gone.NodeID = w.Nodes()[from].NodeID()
			must(t, gone.Detach(t.Context(), m.claim))
			w.fsckCrashed(to, m.claim, fmt.Sprint("crashed-", fsType, lap))
			o := w.at(to)
			for _, step := range []func(context.Context, *harness.Claim) error{o.Attach, o.Stage, o.Publish} {
				must(t, step(t.Context(), m.claim))
			}
			m.node = to
			must(t, m.verify())
			for _, job := range jobs {
				must(t, fio(t.Context(), m.dir(), append(job, "--verify_only")...))
			}
			must(t, m.write(fmt.Sprint("new-", lap)))
			must(t, way.back(from))
			select {
			case <-load: // its device is dead
			case <-time.After(20 * time.Second):
			}
			stop()
			// The old node's paths are cleared away as kubelet would, with a dead device beneath.
			must(t, w.at(from).Unpublish(t.Context(), m.claim))
			must(t, w.at(from).Unstage(t.Context(), m.claim))
		}
		must(t, m.verify())
		o := w.at(m.node)
		must(t, o.Down(t.Context(), m.claim))
		w.fsckClean(m.node, m.claim)
		must(t, o.Delete(t.Context(), m.claim))
	}
	w.nothingLeft()
}

func fio(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=job", "--directory=" + dir, "--output-format=terse", "--randrepeat=1", "--verify_state_save=0"}, args...)...)
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("fio %s: %w\n%.2000s", strings.Join(args, " "), err, out)
	}
	return nil
}

// raw runs fn with a device that holds what a snapshot of the volume has.
func (w *world) raw(node int, c *harness.Claim, name string, fn func(device string) error) {
	w.t.Helper()
	o := w.at(node)
	id, err := o.Snapshot(w.t.Context(), c, name)
	must(w.t, err)
	image := &harness.Claim{Name: name, Size: c.Size, Parameters: map[string]string{"replicas": "1"}, Source: harness.FromSnapshot(id)}
	must(w.t, o.Up(w.t.Context(), image))
	if err := fn(o.TargetPath(image)); err != nil {
		w.t.Errorf("%s: %v", name, err)
	}
	must(w.t, o.Down(w.t.Context(), image))
	must(w.t, o.Delete(w.t.Context(), image))
	must(w.t, o.DeleteSnapshot(w.t.Context(), id))
}

// fsckCrashed checks the filesystem of a volume whose node was lost: its log is replayed, and nothing else needs repair.
func (w *world) fsckCrashed(node int, c *harness.Claim, name string) {
	w.t.Helper()
	w.raw(node, c, name, func(device string) error {
		if c.FSType == "ext4" {
			// Exit 1 is the replay. What e2fsck would have to ask about ends it with 4.
			out, err := exec.Command("e2fsck", "-f", "-p", device).CombinedOutput()
			if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 1 {
				err = nil
			}
			if err != nil {
				return fmt.Errorf("e2fsck -p: %w\n%s", err, out)
			}
		} else if err := w.replay(device); err != nil {
			return err
		}
		return fsck(c.FSType, device)
	})
}

// replay mounts a device, by which xfs replays its log, and unmounts it.
func (w *world) replay(device string) error {
	dir, err := os.MkdirTemp(w.dir, "replay")
	if err != nil {
		return err
	}
	for _, cmd := range [][]string{{"mount", "-o", "nouuid", device, dir}, {"umount", dir}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", cmd, err, out)
		}
	}
	return os.Remove(dir)
}

// fsckClean checks a filesystem that was unmounted: nothing needs repair.
func (w *world) fsckClean(node int, c *harness.Claim) {
	w.t.Helper()
	w.raw(node, c, "clean-"+c.Name, func(device string) error { return fsck(c.FSType, device) })
}

func fsck(fsType, device string) error {
	tool := map[string][]string{"ext4": {"e2fsck", "-f", "-n"}, "xfs": {"xfs_repair", "-n"}}[fsType]
	if out, err := exec.Command(tool[0], append(tool[1:], device)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", tool, err, out)
	}
	return nil
}
