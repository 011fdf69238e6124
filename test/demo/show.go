package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/test/harness"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	tenant = "shop"
	// tenantKey is how Kubernetes' provisioner passes the claim's namespace.
	tenantKey = "csi.storage.k8s.io/pvc/namespace"
)

// show is the play: the daemon, the orchestrator that calls it, and the screen.
type show struct {
	d    *harness.Daemon
	o    *harness.Orchestrator
	out  *screen
	bin  harness.Binaries
	fast bool

	scenes   int
	claims   []*harness.Claim
	snapshot string
	tree     tree // what was written before the snapshot
}

func (s *show) scene(ctx context.Context, title string, fn func(context.Context) error) error {
	s.scenes++
	s.out.scene(s.scenes, title)
	if err := fn(ctx); err != nil {
		return fmt.Errorf("%s: %w", strings.ToLower(title), err)
	}
	return s.pause(ctx)
}

// pause lets people read.
func (s *show) pause(ctx context.Context) error {
	if s.fast || !s.out.colours {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(1500 * time.Millisecond):
		return nil
	}
}

// step does one thing and tells how long it took.
func (s *show) step(what string, fn func() error) error {
	start := time.Now()
	if err := fn(); err != nil {
		return err
	}
	s.out.did(what, time.Since(start))
	return nil
}

// ctl runs ballastctl as a person would, and shows it.
func (s *show) ctl(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, s.bin.Ballastctl, args...)
	cmd.Env = append(os.Environ(), "BALLAST_ADMIN_SOCKET="+s.d.AdminSocket())
	if s.out.colours {
		cmd.Env = append(cmd.Env, "CLICOLOR_FORCE=1")
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("ballastctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	s.out.command("ballastctl "+strings.Join(args, " "), out)
	return nil
}

func (s *show) play(ctx context.Context) error {
	start := time.Now()
	s.out.title("Ballast: one node, end to end", "a real daemon, real filesystems, real block devices, in "+s.d.Dir())
	for _, scene := range []struct {
		title string
		fn    func(context.Context) error
	}{
		{"Start without any configuration", s.start},
		{"A volume, the way an orchestrator asks for one", s.up},
		{"A workload writes", s.write},
		{"A snapshot, and then a disaster", s.disaster},
		{"Restore, and prove it", s.restore},
		{"A clone to try things on", s.clone},
		{"Expand while it is in use", s.expand},
		{"A quota says no", s.quota},
		{"The daemon is killed", s.kill},
		{"What an admin sees", s.look},
		{"Clean up", s.cleanUp},
	} {
		if err := s.scene(ctx, scene.title, scene.fn); err != nil {
			return err
		}
	}
	fmt.Fprintf(s.out.w, "\n  %s %s\n\n", s.out.paint("1;32", "All of it worked,"), fmt.Sprintf("in %s. Nothing of it is left on this machine.", short(time.Since(start))))
	return nil
}

func (s *show) start(ctx context.Context) error {
	s.out.say("No cluster to set up, no database, no kernel module: one static binary.")
	if err := s.step("ballastd is started and ready", func() error { return s.d.Start(ctx) }); err != nil {
		return err
	}
	return s.ctl(ctx, "status")
}

func (s *show) claim(name string, size int64) *harness.Claim {
	c := &harness.Claim{Name: name, Size: size, FSType: "xfs", Parameters: map[string]string{tenantKey: tenant}}
	s.claims = append(s.claims, c)
	return c
}

// bring takes a claim from its creation to its workload, call by call.
func (s *show) bring(ctx context.Context, c *harness.Claim) error {
	for _, call := range []struct {
		what string
		fn   func(context.Context, *harness.Claim) error
	}{
		{"CreateVolume", s.o.Create},
		{"ControllerPublishVolume", s.o.Attach},
		{"NodeStageVolume", s.o.Stage},
		{"NodePublishVolume", s.o.Publish},
	} {
		if err := s.step(call.what, func() error { return call.fn(ctx, c) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *show) path(c *harness.Claim) string { return s.o.TargetPath(c) }

func (s *show) up(ctx context.Context) error {
	s.out.say("Four calls on the CSI socket: create, attach, make a filesystem and mount it,")
	s.out.say("and bring it to the workload's path.")
	if err := s.bring(ctx, s.claim("orders", 512*mib)); err != nil {
		return err
	}
	return s.ctl(ctx, "volume", "list")
}

func (s *show) write(ctx context.Context) error {
	c := s.claims[0]
	var err error
	if err := s.step("64 MiB in 257 files written and synced", func() error {
		s.tree, err = writeTree(ctx, s.path(c))
		return err
	}); err != nil {
		return err
	}
	s.out.say("Their checksum: %s", s.tree.short())
	s.out.say("The volume is thin: it takes only the space that was written.")
	return s.eventually(ctx, func() ([]string, bool, error) {
		v, err := s.volume(ctx, c.Name)
		return []string{"volume", "get", c.Name}, v.GetPhysicalBytes() >= 64*mib, err
	})
}

func (s *show) disaster(ctx context.Context) error {
	c := s.claims[0]
	s.out.say("A snapshot is one small transaction, whatever the size. The workload goes on.")
	if err := s.step("CreateSnapshot", func() (err error) {
		s.snapshot, err = s.o.Snapshot(ctx, c, "orders-monday")
		return err
	}); err != nil {
		return err
	}
	if err := s.step("half the files overwritten, the other half deleted", func() error { return ruin(ctx, s.path(c)) }); err != nil {
		return err
	}
	now, err := readTree(ctx, s.path(c))
	if err != nil {
		return err
	}
	if now.sum == s.tree.sum {
		return errors.New("the checksum is still the same")
	}
	s.out.say("The volume's checksum now: %s", now.short())
	return s.ctl(ctx, "snapshot", "list")
}

func (s *show) same(ctx context.Context, c *harness.Claim) error {
	got, err := readTree(ctx, s.path(c))
	if err != nil {
		return err
	}
	if got.sum != s.tree.sum {
		return fmt.Errorf("volume %s has checksum %s in %d files, not %s in %d", c.Name, got.short(), got.files, s.tree.short(), s.tree.files)
	}
	s.out.proof("%s: %d files, checksum %s, as before the disaster", c.Name, got.files, got.short())
	return nil
}

func (s *show) restore(ctx context.Context) error {
	s.out.say("A new volume from the snapshot: it shares its data, so there is nothing to copy.")
	c := s.claim("orders-restored", 512*mib)
	c.Source = harness.FromSnapshot(s.snapshot)
	if err := s.bring(ctx, c); err != nil {
		return err
	}
	return s.same(ctx, c)
}

func (s *show) clone(ctx context.Context) error {
	s.out.say("A clone of the restored volume, mounted beside it. What is written to it stays its own.")
	src := s.claims[1]
	c := s.claim("orders-staging", 512*mib)
	c.Source = harness.FromVolume(src.ID())
	if err := s.bring(ctx, c); err != nil {
		return err
	}
	if err := s.same(ctx, c); err != nil {
		return err
	}
	if err := s.step("the clone's files overwritten and deleted", func() error { return ruin(ctx, s.path(c)) }); err != nil {
		return err
	}
	return s.same(ctx, src)
}

func (s *show) expand(ctx context.Context) error {
	c := s.claims[1]
	before, err := fsSize(s.path(c))
	if err != nil {
		return err
	}
	s.out.say("The filesystem stays mounted, and a writer goes on while it grows.")
	writing, cancel := context.WithCancel(ctx)
	defer cancel()
	w := startWriter(writing, filepath.Join(s.path(c), "journal"))
	err = s.step("512 MiB → 1 GiB", func() error { return s.o.Expand(ctx, c, gib, true) })
	cancel()
	n, writeErr := w.wait()
	if err := errors.Join(err, writeErr); err != nil {
		return err
	}
	after, err := fsSize(s.path(c))
	if err != nil {
		return err
	}
	if after < before*3/2 {
		return fmt.Errorf("the filesystem had %d bytes and has %d", before, after)
	}
	s.out.proof("the filesystem had %s and has %s; %d synced writes meanwhile, none failed", humanize.IBytes(before), humanize.IBytes(after), n)
	if err := os.Remove(filepath.Join(s.path(c), "journal")); err != nil {
		return err
	}
	return syncFS(s.path(c))
}

func (s *show) quota(ctx context.Context) error {
	s.out.say("The tenant %s (in Kubernetes: the namespace) may have 3 GiB and no more.", tenant)
	if err := s.ctl(ctx, "quota", "set", tenant, "--logical", "3Gi"); err != nil {
		return err
	}
	c := &harness.Claim{Name: "too-much", Size: 2 * gib, FSType: "xfs", Parameters: map[string]string{tenantKey: tenant}}
	_, err := s.d.CSI().CreateVolume(ctx, s.o.CreateRequest(c))
	if status.Code(err) != codes.ResourceExhausted {
		return fmt.Errorf("a create beyond the quota ended with: %v", err)
	}
	s.out.say("CreateVolume of 2 GiB is refused, with a reason:")
	for _, line := range wrap(status.Convert(err).Message(), width-6) {
		s.out.say("  %s", s.out.paint("31", line))
	}
	return nil
}

func (s *show) kill(ctx context.Context) error {
	s.out.say("kill -9, as a crash would. What was synced is there after the restart, and what was")
	s.out.say("mounted is mounted again.")
	if err := s.step("killed", s.d.Kill); err != nil {
		return err
	}
	if err := s.step("started again and ready", func() error { return s.d.Start(ctx) }); err != nil {
		return err
	}
	return s.same(ctx, s.claims[1])
}

func (s *show) look(ctx context.Context) error {
	for _, args := range [][]string{
		{"volume", "list"},
		{"volume", "why", "orders"},
		{"pool", "list"},
		{"quota", "list"},
		{"audit", "--last", "6"},
	} {
		if err := s.ctl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

func (s *show) cleanUp(ctx context.Context) error {
	var ids []string
	if err := s.step("every volume unmounted, detached and deleted", func() error {
		for _, c := range s.claims {
			ids = append(ids, c.ID())
			if err := s.o.Down(ctx, c); err != nil {
				return err
			}
			if err := s.o.Delete(ctx, c); err != nil {
				return err
			}
		}
		return s.o.DeleteSnapshot(ctx, s.snapshot)
	}); err != nil {
		return err
	}
	if err := s.step("the daemon stopped", s.d.Stop); err != nil {
		return err
	}
	if left := s.d.Leaks(ids...); len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	s.out.proof("no mount, no loop device, no FUSE connection, no process is left")
	return nil
}
