package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func snapshotOf(s snapshotView) cell {
	if s.VolumeName == "" {
		return cell{s.Volume + " (deleted)", styleDim}
	}
	return plain(s.VolumeName)
}

// copiesCell counts the holders, and those that do not report.
func copiesCell(holders []replicaView) cell {
	away := 0
	for _, h := range holders {
		if h.NodeSilent {
			away++
		}
	}
	if away == 0 {
		return plain(fmt.Sprint(len(holders)))
	}
	return cell{fmt.Sprintf("%d, %d away", len(holders), away), styleWarn}
}

// snapshotState is what is wrong with a snapshot, if anything is.
func snapshotState(s snapshotView) cell {
	if len(s.Conditions) > 0 {
		return healthCell(s.Conditions)
	}
	return stateCell(s.State)
}

func listSnapshots(ctx context.Context, a adminpb.AdminClient, of string) ([]snapshotView, error) {
	out := []snapshotView{}
	req := &adminpb.ListSnapshotsRequest{Max: 1000, Volume: of}
	for {
		r, err := a.ListSnapshots(ctx, req)
		if err != nil {
			return nil, err
		}
		out = append(out, views(r.Snapshots, viewSnapshot)...)
		if req.PageToken = r.NextPageToken; req.PageToken == "" {
			return out, nil
		}
	}
}

func completeSnapshots(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	ss, err := listSnapshots(ctx, a, "")
	var out []cobra.Completion
	for _, s := range ss {
		out = append(out, nameAndID(s.Name, s.ID, "of "+snapshotOf(s).text)...)
	}
	return out, err
}

func snapshots(of *string) resource[snapshotView] {
	return resource[snapshotView]{
		kind: adminpb.Kind_SNAPSHOT, one: "snapshot", many: "snapshots", arg: "SNAPSHOT",
		columns: []column[snapshotView]{
			{"NAME", false, func(s snapshotView, _ time.Time) cell { return plain(s.Name) }},
			{"ID", true, func(s snapshotView, _ time.Time) cell { return plain(s.ID) }},
			{"VOLUME", false, func(s snapshotView, _ time.Time) cell { return snapshotOf(s) }},
			{"TENANT", true, func(s snapshotView, _ time.Time) cell { return plain(s.Tenant) }},
			{"SIZE", false, func(s snapshotView, _ time.Time) cell { return sizeCell(s.SizeBytes) }},
			{"ON DISK", false, func(s snapshotView, _ time.Time) cell { return sizeCell(s.PhysicalBytes) }},
			{"STATE", false, func(s snapshotView, _ time.Time) cell { return snapshotState(s) }},
			{"COPIES", false, func(s snapshotView, _ time.Time) cell { return copiesCell(s.Holders) }},
			{"FS", true, func(s snapshotView, _ time.Time) cell { return orDash(s.Filesystem) }},
			{"HOLDERS", true, func(s snapshotView, _ time.Time) cell { return orDash(replicaPools(s.Holders)) }},
			{"AGE", false, func(s snapshotView, now time.Time) cell { return plain(ageText(s.CreatedAt, now)) }},
		},
		ref: func(s snapshotView) string { return s.ID },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]snapshotView, error) {
			return listSnapshots(ctx, a, *of)
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (snapshotView, error) {
			s, err := a.GetSnapshot(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return snapshotView{}, err
			}
			return viewSnapshot(s), nil
		},
		describe: func(s snapshotView, now time.Time) []field {
			fs := []field{
				{"Name", plain(s.Name)},
				{"Id", plain(s.ID)},
				{"Volume", snapshotOf(s)},
				{"Tenant", plain(s.Tenant)},
				{"State", snapshotState(s)},
				{"Size", sizeCell(s.SizeBytes)},
				{"On disk", sizeCell(s.PhysicalBytes)},
				{"Created", plain(ageText(s.CreatedAt, now) + " ago")},
				{"Filesystem", orDash(s.Filesystem)},
			}
			for _, c := range s.Conditions {
				fs = append(fs, field{"", plain(c.Message)})
			}
			at := func(h replicaView) cell {
				text := h.Node + ", pool " + poolOf(h)
				if h.NodeSilent {
					text += ", which does not report"
				}
				return plain(text)
			}
			for _, h := range s.Holders {
				fs = append(fs, field{"Held by", at(h)})
			}
			for _, h := range s.Leaving {
				fs = append(fs, field{"To be freed by", at(h)})
			}
			return fs
		},
		event:        func(e *adminpb.Event) snapshotView { return viewSnapshot(e.GetSnapshot()) },
		complete:     completeSnapshots,
		listExample:  "  ballastctl snapshot list\n  ballastctl snapshot list --volume db-data",
		whyExample:   "  ballastctl snapshot why db-monday",
		emptyMessage: "There are no snapshots.",
		listFlags: func(cmd *cobra.Command) {
			cmd.Flags().StringVar(of, "volume", "", "only those of this `volume`")
		},
	}
}

func snapshotCommand(c *cli) *cobra.Command {
	var of string
	r := snapshots(&of)
	cmd := group("snapshot", "Snapshots: list, get, watch, why, create, delete; groups of them", "snapshots", "snap")
	cmds := r.commands(c)
	must(cmds[0].RegisterFlagCompletionFunc("volume", c.completeFlag(completeVolumes)))
	cmd.AddCommand(cmds...)
	cmd.AddCommand(snapshotCreate(c, r), snapshotDelete(c), snapshotGroup(c))
	return cmd
}

func snapshotCreate(c *cli, r resource[snapshotView]) *cobra.Command {
	var freeze bool
	cmd := &cobra.Command{
		Use:   "create VOLUME NAME",
		Short: "Cut a snapshot of a volume, also while it is in use",
		Long: `Cut a snapshot of a volume, also while it is in use. It takes the same short time whatever the volume's size.

What was flushed before the command is in it. With --freeze a mounted filesystem is frozen around the cut, so that all
that was written to it is in the snapshot too.`,
		Example: "  ballastctl snapshot create db-data db-monday --freeze",
		Args:    arguments("VOLUME", "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				s, err := a.CreateSnapshot(ctx, &adminpb.CreateSnapshotRequest{Volume: args[0], Name: args[1], Freeze: freeze})
				if err != nil {
					return err
				}
				return r.done(c, viewSnapshot(s), "Snapshot %s (%s) of volume %s is ready.", s.Name, s.Id, s.VolumeName)
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
	cmd.Flags().BoolVar(&freeze, "freeze", false, "freeze the mounted filesystem around the cut")
	return cmd
}

func snapshotDelete(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete SNAPSHOT",
		Short: "Delete a snapshot",
		Long: `Delete a snapshot. Volumes made from it, and the volume it was cut from, are not affected. Its space is freed in the
background.`,
		Example: "  ballastctl snapshot delete db-monday",
		Args:    arguments("SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				s, err := a.GetSnapshot(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if err := c.confirm(yes, "Delete snapshot %s (%s) for good?", s.Name, s.Id); err != nil {
					return err
				}
				if _, err := a.DeleteSnapshot(ctx, &adminpb.DeleteRequest{Ref: s.Id}); err != nil {
					return err
				}
				return c.deleted(s.Id, "Snapshot "+s.Name)
			})
		},
		ValidArgsFunction: c.completeFirst(completeSnapshots),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
