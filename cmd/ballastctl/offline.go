package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// bar shows work of unknown length on a terminal, and nothing elsewhere.
func (c *cli) bar(what string) *progressbar.ProgressBar {
	w := c.err
	if !isTerminal(w) {
		w = io.Discard
	}
	return progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what), progressbar.OptionShowBytes(true),
		// An interval would have the bar draw itself from a goroutine that nobody ends.
		progressbar.OptionSpinnerType(14), progressbar.OptionSetSpinnerChangeInterval(0), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
}

// checkView is what `pool check -o json` shows.
type checkView struct {
	Pool         string   `json:"pool"`
	Sound        bool     `json:"sound"`
	Replicas     int      `json:"replicas"`
	Snapshots    int      `json:"snapshots"`
	Layers       int      `json:"layers"`
	Extents      int64    `json:"extents"`
	Verified     int64    `json:"verifiedExtents"`
	Unverified   int64    `json:"extentsWithoutChecksum"`
	Unreferenced int      `json:"layersToBeFreed"`
	Problems     []string `json:"problems"`
	Truncated    bool     `json:"truncated,omitempty"`
}

// offline turns the refusal of a pool that is in use into what is to be done.
func offline(dir string, err error) error {
	if errors.Is(err, volume.ErrInUse) {
		return fmt.Errorf("pool %s is open in a running ballastd; stop it first (systemctl stop ballastd): %w", dir, err)
	}
	return err
}

func poolCheck(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "check DIRECTORY",
		Short: "Examine a pool offline; nothing is changed",
		Long: `Examine a pool of which no ballastd is running: its records, its maps, who owns which extent, and the checksums of
sealed data. It reads all data that has a checksum. Nothing is changed.

DIRECTORY is the pool's, by default /var/lib/ballast/pools/default. The exit code is 1 where the pool has problems.`,
		Example: "  systemctl stop ballastd\n  ballastctl pool check /var/lib/ballast/pools/default",
		Args:    arguments("DIRECTORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			bar := c.bar("examining the pool")
			stop := make(chan struct{})
			done := make(chan struct{})
			go func() {
				defer close(done)
				for tick := time.NewTicker(100 * time.Millisecond); ; {
					select {
					case <-stop:
						tick.Stop()
						return
					case <-tick.C:
						_ = bar.Add(0) // a bar that cannot be drawn is no reason to stop
					}
				}
			}()
			r, err := extentstore.Check(cmd.Context(), args[0])
			close(stop)
			<-done
			if err := errors.Join(offline(args[0], err), bar.Finish()); err != nil {
				return err
			}
			if err := c.showReport(r); err != nil {
				return err
			}
			if n := len(r.Problems); n > 0 {
				return fmt.Errorf("pool %s has %d problem(s); export what matters with `ballastctl pool export` before anything else is done to it", r.ID, n)
			}
			return nil
		},
		ValidArgsFunction: completeDirectory,
	}
}

func completeDirectory(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

func (c *cli) showReport(r extentstore.Report) error {
	v := checkView{
		Pool: string(r.ID), Sound: len(r.Problems) == 0, Replicas: r.Replicas, Snapshots: r.Snapshots, Layers: r.Layers, Extents: r.Extents,
		Verified: r.Verified, Unverified: r.Stale, Unreferenced: r.Unreferenced, Problems: append([]string{}, r.Problems...), Truncated: r.Truncated,
	}
	if !c.forPeople() {
		return c.data(v)
	}
	verdict := cell{"sound", styleGood}
	if !v.Sound {
		verdict = cell{"damaged", styleBad}
	}
	fs := []field{
		{"Pool", plain(v.Pool)},
		{"Verdict", verdict},
		{"Replicas", plain(countText(int64(v.Replicas)))},
		{"Snapshots", plain(countText(int64(v.Snapshots)))},
		{"Layers", plain(fmt.Sprintf("%d, %d of them to be freed in the background", v.Layers, v.Unreferenced))},
		{"Extents", plain(fmt.Sprintf("%s (%s), %s verified, %s without a checksum yet", countText(v.Extents), sizeText(v.Extents<<16), countText(v.Verified), countText(v.Unverified)))},
	}
	for _, p := range v.Problems {
		fs = append(fs, field{"Problem", cell{p, styleBad}})
	}
	if v.Truncated {
		fs = append(fs, field{"", cell{"and more", styleBad}})
	}
	return c.describe(fs)
}

// image is a file that counts what is written to it.
type image struct {
	*os.File
	bar     *progressbar.ProgressBar
	written int64
}

// WriteAt implements io.WriterAt.
func (i *image) WriteAt(p []byte, off int64) (int, error) {
	n, err := i.File.WriteAt(p, off)
	i.written += int64(n)
	_ = i.bar.Add(n) // a bar that cannot be drawn is no reason to stop
	return n, err
}

func poolExport(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "export DIRECTORY VOLUME[@SNAPSHOT] FILE",
		Short: "Write a volume or a snapshot from a pool to a raw image, offline",
		Long: `Write a volume, or one of its snapshots, from a pool of which no ballastd is running to a raw image: the last way to
data when nothing else works. It needs the pool's directory and nothing else. The image is sparse; mount it with
` + "`mount -o loop`" + `.

VOLUME and SNAPSHOT are ids (vol-..., snap-...): names are the cluster's, the pool does not have them. FILE must not exist.`,
		Example: `  systemctl stop ballastd
  ballastctl pool export /var/lib/ballast/pools/default vol-0123456789abcdef0123 /backup/db.img
  ballastctl pool export /mnt/rescued vol-0123456789abcdef0123@snap-89abcdef0123456789ab /backup/db-monday.img`,
		Args: arguments("DIRECTORY", "VOLUME[@SNAPSHOT]", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			vol, snap, at := strings.Cut(args[1], "@")
			if vol == "" || at && snap == "" {
				return usage(fmt.Errorf("%q is not VOLUME or VOLUME@SNAPSHOT", args[1]))
			}
			f, err := os.OpenFile(args[2], os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if errors.Is(err, os.ErrExist) {
				return fmt.Errorf("%s exists; an export does not overwrite", args[2])
			}
			if err != nil {
				return err
			}
			defer func() {
				if err != nil {
					err = errors.Join(err, os.Remove(args[2])) // half an image is worse than none
				}
			}()
			img := &image{File: f, bar: c.bar("exporting " + safe(args[1]))}
			err = offline(args[0], extentstore.Export(cmd.Context(), args[0], volume.ID(vol), volume.SnapshotID(snap), img))
			if err == nil {
				err = f.Sync()
			}
			if err = errors.Join(err, f.Close(), img.bar.Finish()); err != nil {
				return err
			}
			info, err := os.Stat(args[2])
			if err != nil {
				return err
			}
			if !c.forPeople() {
				return c.data(struct {
					File      string `json:"file"`
					SizeBytes int64  `json:"sizeBytes"`
					DataBytes int64  `json:"dataBytes"`
				}{args[2], info.Size(), img.written})
			}
			return c.say("%s: %s, %s of it data.", args[2], sizeText(info.Size()), sizeText(img.written))
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return nil, cobra.ShellCompDirectiveFilterDirs
			case 2:
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
}
