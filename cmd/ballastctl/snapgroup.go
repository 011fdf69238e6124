package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func completeGroups(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	r, err := a.ListGroups(ctx, &adminpb.ListGroupsRequest{})
	var out []cobra.Completion
	for _, g := range r.GetGroups() {
		out = append(out, nameAndID(g.Name, g.Id, fmt.Sprintf("%d snapshots", len(g.Snapshots)))...)
	}
	return out, err
}

func groupBytes(g groupView) (n int64) {
	for _, s := range g.Snapshots {
		n += s.PhysicalBytes
	}
	return n
}

func snapshotGroups() resource[groupView] {
	return resource[groupView]{
		kind: adminpb.Kind_GROUP, one: "group", many: "groups", arg: "GROUP",
		columns: []column[groupView]{
			{"NAME", false, func(g groupView, _ time.Time) cell { return plain(g.Name) }},
			{"ID", true, func(g groupView, _ time.Time) cell { return plain(g.ID) }},
			{"SNAPSHOTS", false, func(g groupView, _ time.Time) cell { return plain(fmt.Sprint(len(g.Snapshots))) }},
			{"ON DISK", false, func(g groupView, _ time.Time) cell { return sizeCell(groupBytes(g)) }},
			{"STATE", false, func(g groupView, _ time.Time) cell { return stateCell(g.State) }},
			{"AGE", false, func(g groupView, now time.Time) cell { return plain(ageText(g.CreatedAt, now)) }},
		},
		ref: func(g groupView) string { return g.ID },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]groupView, error) {
			r, err := a.ListGroups(ctx, &adminpb.ListGroupsRequest{})
			if err != nil {
				return nil, err
			}
			return views(r.Groups, viewGroup), nil
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (groupView, error) {
			g, err := a.GetGroup(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return groupView{}, err
			}
			return viewGroup(g), nil
		},
		describe: func(g groupView, now time.Time) []field {
			fs := []field{
				{"Name", plain(g.Name)}, {"Id", plain(g.ID)}, {"State", stateCell(g.State)}, {"Created", plain(ageText(g.CreatedAt, now) + " ago")},
			}
			for _, s := range g.Snapshots {
				fs = append(fs, field{"Snapshot", plain(fmt.Sprintf("%s of volume %s, %s, %s on disk", s.ID, snapshotOf(s).text, sizeText(s.SizeBytes), sizeText(s.PhysicalBytes)))})
			}
			return fs
		},
		event:        func(e *adminpb.Event) groupView { return viewGroup(e.GetGroup()) },
		complete:     completeGroups,
		listExample:  "  ballastctl snapshot group list",
		whyExample:   "  ballastctl snapshot group why nightly",
		emptyMessage: "There are no groups of snapshots.",
	}
}

func snapshotGroup(c *cli) *cobra.Command {
	r := snapshotGroups()
	cmd := group("group", "Snapshots of several volumes at one instant: list, get, watch, why, create, delete", "groups")
	cmd.AddCommand(r.commands(c)...)
	cmd.AddCommand(groupCreate(c, r), groupDelete(c))
	return cmd
}

func groupCreate(c *cli, r resource[groupView]) *cobra.Command {
	var freeze bool
	cmd := &cobra.Command{
		Use:   "create NAME VOLUME...",
		Short: "Cut snapshots of several volumes at one instant",
		Long: `Cut snapshots of several volumes at one instant: the writes of all of them are held, all are cut, all go on. What one
volume has that was written after something on another, has that too.

With --freeze mounted filesystems are frozen around the cut. A group is deleted as a whole.`,
		Example: "  ballastctl snapshot group create nightly db-data db-log",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage(fmt.Errorf("NAME or VOLUME is missing; usage: %s", cmd.UseLine()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				g, err := a.CreateGroup(ctx, &adminpb.CreateGroupRequest{Name: args[0], Volumes: args[1:], Freeze: freeze})
				if err != nil {
					return err
				}
				return r.done(c, viewGroup(g), "Group %s (%s) of %d snapshots is ready.", safe(g.Name), g.Id, len(g.Snapshots))
			})
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return c.completions(cmd, completeVolumes, prefix)
		},
	}
	cmd.Flags().BoolVar(&freeze, "freeze", false, "freeze mounted filesystems around the cut")
	return cmd
}

func groupDelete(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:     "delete GROUP",
		Short:   "Delete a group with all its snapshots",
		Long:    "Delete a group with all its snapshots. Volumes made from them are not affected. Their space is freed in the background.",
		Example: "  ballastctl snapshot group delete nightly",
		Args:    arguments("GROUP"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				g, err := a.GetGroup(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if err := c.confirm(yes, "Delete group %s (%s) with its %d snapshots for good?", g.Name, g.Id, len(g.Snapshots)); err != nil {
					return err
				}
				if _, err := a.DeleteGroup(ctx, &adminpb.DeleteRequest{Ref: g.Id}); err != nil {
					return err
				}
				return c.deleted(g.Id, "Group "+g.Name)
			})
		},
		ValidArgsFunction: c.completeFirst(completeGroups),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
