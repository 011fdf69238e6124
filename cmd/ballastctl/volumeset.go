package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

var localities = []string{"preferred", "required", "none"}

func volumeSet(c *cli, r resource[volumeView]) *cobra.Command {
	var iops int64
	var replicas, minInSync int32
	var bandwidth, locality string
	cmd := &cobra.Command{
		Use:   "set VOLUME",
		Short: "Change a volume's limits and copies, while it is in use",
		Long: `Change a volume's limits and copies, while it is in use. What is not given stays.

  --iops, --bandwidth   limits, in force at once where the volume is attached; 0 removes one
  --replicas            how many copies there are to be. More are filled, and surplus ones given up, in the background:
                        ` + "`volume watch`" + ` shows how far that is. The volume can be used meanwhile
  --min-in-sync         how many copies must have a write before it is answered. With less in sync I/O waits
  --data-locality       whether one copy is to be on the node of the workload: preferred, required or none`,
		Example: "  ballastctl volume set db-data --iops 2000 --bandwidth 100Mi\n  ballastctl volume set db-data --iops 0\n" +
			"  ballastctl volume set db-data --replicas 3 --min-in-sync 2 && ballastctl volume watch db-data",
		Args: arguments("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &adminpb.SetVolumeRequest{Ref: args[0]}
			given := cmd.Flags().Changed
			if !slices.ContainsFunc([]string{"iops", "bandwidth", "replicas", "min-in-sync", "data-locality"}, given) {
				return usage(errors.New("say what is to change: --iops, --bandwidth, --replicas, --min-in-sync or --data-locality"))
			}
			if given("iops") {
				req.IopsLimit = &iops
			}
			if given("bandwidth") {
				n, err := parseSize(bandwidth)
				if err != nil {
					return err
				}
				req.BandwidthLimit = &n
			}
			if given("replicas") {
				req.Replicas = &replicas
			}
			if given("min-in-sync") {
				req.MinInSync = &minInSync
			}
			if given("data-locality") {
				req.DataLocality = &locality
			}
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := a.SetVolume(ctx, req)
				if err != nil {
					return err
				}
				return r.done(c, viewVolume(v), "Volume %s: %s.", safe(v.Name), settings(v))
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
	f := cmd.Flags()
	f.Int64Var(&iops, "iops", 0, "I/O operations per second; 0 is no limit")
	f.StringVar(&bandwidth, "bandwidth", "", "`bytes` per second, like 100Mi; 0 is no limit")
	f.Int32Var(&replicas, "replicas", 0, "copies on different nodes, 1 to 5")
	f.Int32Var(&minInSync, "min-in-sync", 0, "copies that a write needs")
	f.StringVar(&locality, "data-locality", "", "`whether` a copy is to be where the workload is: preferred, required or none")
	must(cmd.RegisterFlagCompletionFunc("data-locality", cobra.FixedCompletions(localities, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func settings(v *adminpb.Volume) string {
	all := []string{
		"IOPS " + limitCell(v.IopsLimit, countText).text, "bandwidth " + limitCell(v.BandwidthLimit, rateText).text,
		fmt.Sprintf("replicas %d", v.ReplicasWanted), fmt.Sprintf("min-in-sync %d", v.MinInSync),
	}
	if v.DataLocality != "" {
		all = append(all, "data-locality "+v.DataLocality)
	}
	return strings.Join(all, ", ")
}
