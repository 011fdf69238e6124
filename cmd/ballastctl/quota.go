package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// shareCell shows use and limit, coloured as it gets near.
func shareCell(used, limit int64, text func(int64) string) cell {
	if limit == 0 {
		return plain(text(used) + " / ∞")
	}
	s := styleGood
	switch {
	case used >= limit:
		s = styleBad
	case float64(used) >= 0.8*float64(limit):
		s = styleWarn
	}
	return cell{text(used) + " / " + text(limit), s}
}

func completeTenants(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	r, err := a.ListQuotas(ctx, &adminpb.ListQuotasRequest{})
	var out []cobra.Completion
	for _, q := range r.GetQuotas() {
		out = append(out, safe(q.Tenant))
	}
	return out, err
}

func quotas() resource[quotaView] {
	return resource[quotaView]{
		kind: adminpb.Kind_QUOTA, one: "quota", many: "quotas", arg: "TENANT",
		columns: []column[quotaView]{
			{"TENANT", false, func(q quotaView, _ time.Time) cell { return plain(q.Tenant) }},
			{"LOGICAL", false, func(q quotaView, _ time.Time) cell {
				return shareCell(q.Used.LogicalBytes, q.Limit.LogicalBytes, sizeText)
			}},
			{"PHYSICAL", false, func(q quotaView, _ time.Time) cell {
				return shareCell(q.Used.PhysicalBytes, q.Limit.PhysicalBytes, sizeText)
			}},
			{"VOLUMES", false, func(q quotaView, _ time.Time) cell { return shareCell(q.Used.Volumes, q.Limit.Volumes, countText) }},
			{"SNAPSHOTS", false, func(q quotaView, _ time.Time) cell {
				return shareCell(q.Used.Snapshots, q.Limit.Snapshots, countText)
			}},
		},
		ref: func(q quotaView) string { return q.Tenant },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]quotaView, error) {
			r, err := a.ListQuotas(ctx, &adminpb.ListQuotasRequest{})
			if err != nil {
				return nil, err
			}
			return views(r.Quotas, viewQuota), nil
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (quotaView, error) {
			q, err := a.GetQuota(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return quotaView{}, err
			}
			return viewQuota(q), nil
		},
		describe: func(q quotaView, _ time.Time) []field {
			return []field{
				{"Tenant", plain(q.Tenant)},
				{"Logical", shareCell(q.Used.LogicalBytes, q.Limit.LogicalBytes, sizeText)},
				{"Physical", shareCell(q.Used.PhysicalBytes, q.Limit.PhysicalBytes, sizeText)},
				{"Volumes", shareCell(q.Used.Volumes, q.Limit.Volumes, countText)},
				{"Snapshots", shareCell(q.Used.Snapshots, q.Limit.Snapshots, countText)},
			}
		},
		event:        func(e *adminpb.Event) quotaView { return viewQuota(e.GetQuota()) },
		complete:     completeTenants,
		listExample:  "  ballastctl quota list",
		whyExample:   "  ballastctl quota why team-a",
		emptyMessage: "No tenant has a quota or a volume.",
	}
}

func quotaCommand(c *cli) *cobra.Command {
	r := quotas()
	cmd := group("quota", "Quotas of tenants: list, get, watch, why, set, delete", "quotas")
	cmd.AddCommand(r.commands(c)...)
	cmd.AddCommand(quotaSet(c, r), quotaDelete(c))
	return cmd
}

// noLimit is what removes a limit.
const noLimit = "none"

// parseLimit reads a limit. A limit of 0 is refused: in the API it stands for none, the opposite of what it looks like.
func parseLimit(text string, parse func(string) (int64, error)) (int64, error) {
	if text == noLimit {
		return 0, nil
	}
	n, err := parse(text)
	if err == nil && n <= 0 {
		err = usage(fmt.Errorf("a limit is at least 1; write %s to remove it", noLimit))
	}
	return n, err
}

func parseCount(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, usage(fmt.Errorf("%q is no number", s))
	}
	return n, nil
}

func quotaSet(c *cli, r resource[quotaView]) *cobra.Command {
	var logical, physical, volumes, snapshots string
	cmd := &cobra.Command{
		Use:   "set TENANT",
		Short: "Limit what a tenant may use",
		Long: `Limit what a tenant may use. What is not given stays as it is; none removes a limit.

  --logical    sum of the sizes of the tenant's volumes
  --physical   what its volumes and snapshots occupy on pools
  --volumes, --snapshots   how many

In Kubernetes the tenant is the claim's namespace, unless the StorageClass has a parameter tenant. A limit below what is
used already is allowed: nothing is taken away, and nothing new is given. A create, a clone, an expand or a snapshot that
would pass a limit is refused with RESOURCE_EXHAUSTED. The least limit is 1; a logical limit of 1 byte is below every
volume, so that a tenant can make or grow none.`,
		Example: "  ballastctl quota set team-a --logical 100Gi --volumes 20\n  ballastctl quota set team-a --snapshots none\n" +
			"  ballastctl quota set team-b --logical 1",
		Args: arguments("TENANT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &adminpb.SetQuotaRequest{Tenant: args[0]}
			for _, f := range []struct {
				name  string
				in    string
				out   **int64
				parse func(string) (int64, error)
			}{
				{"logical", logical, &req.LogicalBytes, parseSize}, {"physical", physical, &req.PhysicalBytes, parseSize},
				{"volumes", volumes, &req.Volumes, parseCount}, {"snapshots", snapshots, &req.Snapshots, parseCount},
			} {
				if !cmd.Flags().Changed(f.name) {
					continue
				}
				n, err := parseLimit(f.in, f.parse)
				if err != nil {
					return fmt.Errorf("--%s: %w", f.name, err)
				}
				*f.out = &n
			}
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				q, err := a.SetQuota(ctx, req)
				if err != nil {
					return err
				}
				return r.print(c, viewQuota(q))
			})
		},
		ValidArgsFunction: c.completeFirst(completeTenants),
	}
	f := cmd.Flags()
	f.StringVar(&logical, "logical", "", "`size`, like 100Gi, or none")
	f.StringVar(&physical, "physical", "", "`size`, like 100Gi, or none")
	f.StringVar(&volumes, "volumes", "", "`number` of volumes, or none")
	f.StringVar(&snapshots, "snapshots", "", "`number` of snapshots, or none")
	cmd.MarkFlagsOneRequired("logical", "physical", "volumes", "snapshots")
	return cmd
}

func quotaDelete(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "delete TENANT",
		Short:   "Remove all limits of a tenant",
		Long:    "Remove all limits of a tenant. Its volumes and snapshots are not affected.",
		Example: "  ballastctl quota delete team-a",
		Args:    arguments("TENANT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				if _, err := a.DeleteQuota(ctx, &adminpb.DeleteRequest{Ref: args[0]}); err != nil {
					return err
				}
				return c.deleted(args[0], "The quota of "+args[0])
			})
		},
		ValidArgsFunction: c.completeFirst(completeTenants),
	}
}
