package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func nodeTotals(n nodeView) (used, capacity int64) {
	for _, p := range n.Pools {
		used += p.UsedBytes
		capacity += p.CapacityBytes
	}
	return used, capacity
}

func seenCell(n nodeView, now time.Time) cell {
	s := styleGood
	if n.State == "silent" {
		s = styleBad
	}
	return cell{ageText(n.LastSeen, now), s}
}

func nodeStateCell(n nodeView) cell {
	switch n.State {
	case "up":
		return cell{n.State, styleGood}
	case "silent":
		return cell{n.State, styleBad}
	}
	return cell{n.State, styleWarn}
}

func completeNodes(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	r, err := a.ListNodes(ctx, &adminpb.ListNodesRequest{})
	var out []cobra.Completion
	for _, n := range r.GetNodes() {
		out = append(out, safe(n.Id))
	}
	return out, err
}

func nodes() resource[nodeView] {
	return resource[nodeView]{
		kind: adminpb.Kind_NODE, one: "node", many: "nodes", arg: "NODE",
		columns: []column[nodeView]{
			{"NAME", false, func(n nodeView, _ time.Time) cell { return plain(n.ID) }},
			{"STATE", false, func(n nodeView, _ time.Time) cell { return nodeStateCell(n) }},
			{"ROLES", false, func(n nodeView, _ time.Time) cell { return orDash(strings.Join(n.Roles, ",")) }},
			{"ZONE", false, func(n nodeView, _ time.Time) cell { return orDash(n.Zone) }},
			{"REPLICAS", false, func(n nodeView, _ time.Time) cell { return plain(countText(n.Replicas)) }},
			{"SNAPSHOTS", true, func(n nodeView, _ time.Time) cell { return plain(countText(n.Snapshots)) }},
			{"ATTACHED", true, func(n nodeView, _ time.Time) cell { return plain(countText(n.Attached)) }},
			{"POOLS", false, func(n nodeView, _ time.Time) cell { return plain(fmt.Sprint(len(n.Pools))) }},
			{"CAPACITY", false, func(n nodeView, _ time.Time) cell { _, c := nodeTotals(n); return sizeCell(c) }},
			{"USED", false, func(n nodeView, _ time.Time) cell { u, c := nodeTotals(n); return meter(u, c) }},
			{"ADDRESS", true, func(n nodeView, _ time.Time) cell { return orDash(n.Address) }},
			{"LAST SEEN", false, seenCell},
		},
		ref: func(n nodeView) string { return n.ID },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]nodeView, error) {
			r, err := a.ListNodes(ctx, &adminpb.ListNodesRequest{})
			if err != nil {
				return nil, err
			}
			return views(r.Nodes, viewNode), nil
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (nodeView, error) {
			n, err := a.GetNode(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return nodeView{}, err
			}
			return viewNode(n), nil
		},
		describe: func(n nodeView, now time.Time) []field {
			used, capacity := nodeTotals(n)
			fs := []field{
				{"Name", plain(n.ID)},
				{"State", nodeStateCell(n)},
				{"Last seen", seenCell(n, now)},
				{"Roles", orDash(strings.Join(n.Roles, ", "))},
				{"Zone", orDash(n.Zone)},
				{"Address", orDash(n.Address)},
				{"Holds", plain(fmt.Sprintf("%d replicas, %d snapshots; %d volumes are attached", n.Replicas, n.Snapshots, n.Attached))},
				{"Capacity", sizeCell(capacity)},
				{"Used", meter(used, capacity)},
			}
			for _, p := range n.Pools {
				fs = append(fs, field{"Pool", plain(fmt.Sprintf("%s, %s of %s used, %s", p.Name, sizeText(p.UsedBytes), sizeText(p.CapacityBytes), p.Path))})
			}
			return fs
		},
		event:        func(e *adminpb.Event) nodeView { return viewNode(e.GetNode()) },
		complete:     completeNodes,
		listExample:  "  ballastctl node list",
		whyExample:   "  ballastctl node why node-1",
		emptyMessage: "No node has reported yet.",
	}
}

func nodeCommand(c *cli) *cobra.Command {
	cmd := group("node", "Nodes: list, get, watch, why, drain, undrain, empty, remove", "nodes")
	r := nodes()
	cmd.AddCommand(r.commands(c)...)
	cmd.AddCommand(nodeDrain(c, r), nodeUndrain(c, r), nodeEmpty(c, r), nodeRemove(c))
	return cmd
}
