package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func completePools(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	r, err := a.ListPools(ctx, &adminpb.ListPoolsRequest{})
	var out []cobra.Completion
	for _, p := range r.GetPools() {
		out = append(out, nameAndID(p.Name, p.Id, "on "+p.Node+", "+sizeText(p.FreeBytes)+" free")...)
	}
	return out, err
}

func pools(node *string) resource[poolView] {
	return resource[poolView]{
		kind: adminpb.Kind_POOL, one: "pool", many: "pools", arg: "POOL",
		columns: []column[poolView]{
			{"NAME", false, func(p poolView, _ time.Time) cell { return plain(p.Name) }},
			{"ID", true, func(p poolView, _ time.Time) cell { return plain(p.ID) }},
			{"NODE", false, func(p poolView, _ time.Time) cell { return plain(p.Node) }},
			{"CAPACITY", false, func(p poolView, _ time.Time) cell { return sizeCell(p.CapacityBytes) }},
			{"USED", false, func(p poolView, _ time.Time) cell { return meter(p.UsedBytes, p.CapacityBytes) }},
			{"PROVISIONED", false, func(p poolView, _ time.Time) cell { return sizeCell(p.ProvisionedBytes) }},
			{"PLACEABLE", false, func(p poolView, _ time.Time) cell { return sizeCell(p.FreeBytes) }},
			{"RATIO", true, func(p poolView, _ time.Time) cell { return plain(fmt.Sprintf("%g", p.OverProvision)) }},
			{"KIND", true, func(p poolView, _ time.Time) cell { return plain(p.Kind) }},
			{"PATH", true, func(p poolView, _ time.Time) cell { return plain(p.Path) }},
		},
		ref: func(p poolView) string { return p.ID },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]poolView, error) {
			r, err := a.ListPools(ctx, &adminpb.ListPoolsRequest{Node: *node})
			if err != nil {
				return nil, err
			}
			return views(r.Pools, viewPool), nil
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (poolView, error) {
			p, err := a.GetPool(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return poolView{}, err
			}
			return viewPool(p), nil
		},
		describe: func(p poolView, _ time.Time) []field {
			return []field{
				{"Name", plain(p.Name)},
				{"Id", plain(p.ID)},
				{"Node", plain(p.Node)},
				{"Kind", plain(p.Kind)},
				{"Path", plain(p.Path)},
				{"Capacity", sizeCell(p.CapacityBytes)},
				{"Used", plain(sizeText(p.UsedBytes))},
				{"", meter(p.UsedBytes, p.CapacityBytes)},
				{"Provisioned", plain(fmt.Sprintf("%s, at most %g times the capacity", sizeText(p.ProvisionedBytes), p.OverProvision))},
				{"Placeable", sizeCell(p.FreeBytes)},
			}
		},
		event:        func(e *adminpb.Event) poolView { return viewPool(e.GetPool()) },
		complete:     completePools,
		listExample:  "  ballastctl pool list\n  ballastctl pool list --node node-1 -o wide",
		whyExample:   "  ballastctl pool why default",
		emptyMessage: "There are no pools.",
		listFlags: func(cmd *cobra.Command) {
			cmd.Flags().StringVar(node, "node", "", "only those of this `node`")
		},
	}
}

func poolCommand(c *cli) *cobra.Command {
	var node string
	r := pools(&node)
	cmd := group("pool", "Pools: list, get, watch, why, forget, strays; show, check and export offline", "pools")
	cmds := r.commands(c)
	must(cmds[0].RegisterFlagCompletionFunc("node", c.completeFlag(completeNodes)))
	cmd.AddCommand(cmds...)
	cmd.AddCommand(poolForget(c), poolStrays(c), poolShow(c), poolCheck(c), poolExport(c))
	return cmd
}

func poolForget(c *cli) *cobra.Command {
	var yes, acceptLoss bool
	cmd := &cobra.Command{
		Use:   "forget POOL",
		Short: "Forget a pool whose disk is gone for good",
		Long: `Forget a pool whose disk is gone for good, and every copy that was on it. What waits for those copies waits no more:
volumes with other replicas get new ones in their stead, and what is being deleted ends.

A pool that is open is refused: take its disk away and restart ballastd, or empty its node, first. The pools of a node that
has not reported for 2 minutes may be forgotten; before that it is said how long is left. Refused is also one with the only copy of a volume or a snapshot, unless --accept-data-loss is given;
these stay in the lists, without their data, until they are deleted. Where another replica is left that was not in sync, the
volume is to be salvaged from it first: see ` + "`salvage`" + `.

If the disk comes back after all, what is on it is listed by ` + "`pool strays`" + `, and ` + "`pool export`" + ` reads it.`,
		Example: "  ballastctl pool forget fast\n  ballastctl pool forget node-1/fast --accept-data-loss --yes",
		Args:    arguments("POOL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				p, err := a.GetPool(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if err := c.confirm(yes, "Forget pool %s (%s) of node %s and all copies on it for good?", p.Name, p.Id, p.Node); err != nil {
					return err
				}
				r, err := a.ForgetPool(ctx, &adminpb.ForgetPoolRequest{Ref: p.Id, AcceptDataLoss: acceptLoss})
				if err != nil {
					return err
				}
				if !c.forPeople() {
					return c.data(struct {
						ID            string   `json:"id"`
						Forgotten     bool     `json:"forgotten"`
						LostVolumes   []string `json:"lostVolumes"`
						LostSnapshots []string `json:"lostSnapshots"`
					}{r.Id, true, append([]string{}, r.LostVolumes...), append([]string{}, r.LostSnapshots...)})
				}
				if err := c.say("Pool %s is forgotten.", safe(p.Name)); err != nil {
					return err
				}
				for _, id := range append(r.LostVolumes, r.LostSnapshots...) {
					if err := c.say("%s has no copy any more; delete it.", safe(id)); err != nil {
						return err
					}
				}
				return nil
			})
		},
		ValidArgsFunction: c.completeFirst(completePools),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&acceptLoss, "accept-data-loss", false, "also where it has the only copy of something")
	return cmd
}

type strayView struct {
	Node          string `json:"node"`
	Replica       string `json:"replica,omitempty"`
	Snapshot      string `json:"snapshot,omitempty"`
	PhysicalBytes int64  `json:"physicalBytes"`
}

func poolStrays(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "strays",
		Short: "List what pools hold and no record knows",
		Long: `List what pools hold and no record knows: after the cluster's state was lost or an old copy of it was restored, for
instance. Nothing deletes it by itself, since the records may be what is wrong. ` + "`pool export`" + ` reads such data.`,
		Example: "  ballastctl pool strays",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.ListStrays(ctx, &adminpb.ListStraysRequest{})
				if err != nil {
					return err
				}
				xs := views(r.Strays, func(x *adminpb.Stray) strayView {
					return strayView{Node: x.Node, Replica: x.Replica, Snapshot: x.Snapshot, PhysicalBytes: x.PhysicalBytes}
				})
				if !c.forPeople() {
					return c.data(xs)
				}
				if len(xs) == 0 {
					_, err := fmt.Fprintln(c.err, "There are none: every byte on the pools belongs to a volume or a snapshot.")
					return err
				}
				t := &table{head: []string{"NODE", "REPLICA", "SNAPSHOT", "ON DISK"}}
				for _, x := range xs {
					t.add([]cell{plain(x.Node), orDash(x.Replica), orDash(x.Snapshot), sizeCell(x.PhysicalBytes)})
				}
				return t.print(c.out)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}
