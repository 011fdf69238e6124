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

// bar shows on a terminal how far work has come, and nothing elsewhere. Finish is called when it has ended.
func (c *cli) bar(what string) (progress extentstore.Progress, finish func() error) {
	w := c.err
	if !isTerminal(w) {
		w = io.Discard
	}
	bar := progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what), progressbar.OptionShowBytes(true),
		// An interval would have the bar draw itself from a goroutine that nobody ends.
		progressbar.OptionSpinnerType(14), progressbar.OptionSetSpinnerChangeInterval(0), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	return func(done, total int64) {
		if bar.GetMax64() != total {
			bar.ChangeMax64(total)
		}
		_ = bar.Set64(done) // a bar that cannot be drawn is no reason to stop
	}, bar.Finish
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
			progress, finish := c.bar("examining the pool")
			r, err := extentstore.Check(cmd.Context(), args[0], progress)
			if err := errors.Join(offline(args[0], err), finish()); err != nil {
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

// contentView is a line of what `pool show` shows: a volume, or one of its snapshots.
type contentView struct {
	Volume        string `json:"volume"`
	Snapshot      string `json:"snapshot,omitempty"`
	Replica       string `json:"replica,omitempty"`
	Tenant        string `json:"tenant,omitempty"`
	SizeBytes     int64  `json:"sizeBytes"`
	PhysicalBytes int64  `json:"physicalBytes"`
}

// ref is what `pool export` takes.
func (v contentView) ref() string {
	if v.Snapshot != "" {
		return v.Volume + "@" + v.Snapshot
	}
	return v.Volume
}

func poolShow(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "show DIRECTORY",
		Short: "List the volumes and snapshots in a pool offline",
		Long: `List what a pool holds of which no ballastd is running, by the ids that ` + "`pool export`" + ` takes. Of a damaged pool it
lists what can be read. A line is a volume (VOLUME), or one of its snapshots (VOLUME@SNAPSHOT); only those are listed of a
volume that was deleted. ON DISK is what each alone occupies.

DIRECTORY is the pool's, by default /var/lib/ballast/pools/default.`,
		Example: "  systemctl stop ballastd\n  ballastctl pool show /var/lib/ballast/pools/default",
		Args:    arguments("DIRECTORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := extentstore.List(cmd.Context(), args[0])
			if err != nil {
				return offline(args[0], err)
			}
			views := []contentView{}
			for _, v := range list {
				if v.Replica != "" {
					views = append(views, contentView{string(v.ID), "", string(v.Replica), v.Tenant, v.Size, v.Physical})
				}
				for _, s := range v.Snapshots {
					views = append(views, contentView{string(v.ID), string(s.ID), "", v.Tenant, s.Size, s.Physical})
				}
			}
			if !c.forPeople() {
				return c.data(views)
			}
			if len(views) == 0 {
				_, err := fmt.Fprintln(c.err, "The pool holds nothing.")
				return err
			}
			t := &table{head: []string{"VOLUME[@SNAPSHOT]", "TENANT", "SIZE", "ON DISK"}}
			for _, v := range views {
				t.add([]cell{plain(v.ref()), orDash(v.Tenant), sizeCell(v.SizeBytes), sizeCell(v.PhysicalBytes)})
			}
			return t.print(c.out)
		},
		ValidArgsFunction: completeDirectory,
	}
}

func poolExport(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "export DIRECTORY VOLUME[@SNAPSHOT] FILE",
		Short: "Write a volume or a snapshot from a pool to a raw image, offline",
		Long: `Write a volume, or one of its snapshots, from a pool of which no ballastd is running to a raw image: the last way to
data when nothing else works. It needs the pool's directory and nothing else. The image is sparse; mount it with
` + "`mount -o loop`" + `.

VOLUME and SNAPSHOT are ids (vol-..., snap-...), as ` + "`pool show`" + ` lists them: names are the cluster's, the pool does not
have them. FILE must not exist.`,
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
			draw, finish := c.bar("exporting " + safe(args[1]))
			var written int64
			progress := func(done, total int64) { written = done; draw(done, total) }
			err = offline(args[0], extentstore.Export(cmd.Context(), args[0], volume.ID(vol), volume.SnapshotID(snap), f, progress))
			if err == nil {
				err = f.Sync()
			}
			if err = errors.Join(err, f.Close(), finish()); err != nil {
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
				}{args[2], info.Size(), written})
			}
			return c.say("%s: %s, %s of it data.", args[2], sizeText(info.Size()), sizeText(written))
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
