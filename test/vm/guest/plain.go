package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// The plain scenarios prove the harness itself, without Ballast: a writer that flushes keeps what it acknowledged, and
// one that acknowledges without flushing is found out.

const plainFile = "/mnt/plain"

// plainWrite writes until the power goes.
func plainWrite(_ context.Context, r *reporter, args []string) error {
	flags := flag.NewFlagSet("plain-write", flag.ContinueOnError)
	p := plainPattern(flags)
	honest := flags.Bool("flush", true, "flush before acknowledging")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := command("mkfs.ext4", "-q", "-E", "nodiscard", disk); err != nil {
		return err
	}
	if err := mountDisk("ext4", "/mnt"); err != nil {
		return err
	}
	f, err := os.OpenFile(plainFile, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(p.blocks * block); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	for n := int64(1); ; n++ {
		if err := p.write(f, n); err != nil {
			return err
		}
		if *honest {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		r.acked("plain", n)
	}
}

// plainVerify checks what plainWrite left.
func plainVerify(_ context.Context, _ *reporter, args []string) error {
	flags := flag.NewFlagSet("plain-verify", flag.ContinueOnError)
	p := plainPattern(flags)
	acked := flags.Int64("acked", 0, "last acknowledged batch")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := mountDisk("ext4", "/mnt"); err != nil {
		return err
	}
	f, err := os.Open(plainFile)
	if err != nil {
		return fmt.Errorf("%w: %w", errLost, err)
	}
	defer f.Close()
	return p.check(f, p.recall(*acked, *acked+1))
}

func plainPattern(flags *flag.FlagSet) *pattern {
	p := &pattern{blocks: 4096}
	flags.Uint64Var(&p.seed, "seed", 1, "of the writes")
	return p
}

func mountDisk(fstype, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(disk, target, fstype, 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", disk, err)
	}
	return nil
}

func command(name string, args ...string) error {
	_, err := output(name, args...)
	return err
}

func output(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %q: %w: %s", name, args, err, out)
	}
	return string(out), nil
}
