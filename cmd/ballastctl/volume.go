package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func stateCell(s string) cell {
	switch s {
	case "ready":
		return cell{s, styleGood}
	case "creating", "deleting":
		return cell{s, styleWarn}
	}
	return plain(s)
}

// healthCell names the worst condition.
func healthCell(cs []conditionView) cell {
	if len(cs) == 0 {
		return cell{"healthy", styleGood}
	}
	rank := map[string]int{"Degraded": 1, "Inaccessible": 2, "DataLoss": 3}
	worst := cs[0]
	for _, c := range cs {
		if rank[c.Severity] > rank[worst.Severity] {
			worst = c
		}
	}
	s := styleBad
	if worst.Severity == "Degraded" {
		s = styleWarn
	}
	return cell{strings.ToLower(worst.Severity) + ": " + worst.Reason, s}
}

func attachedCell(v volumeView) cell {
	if v.Attachment == nil {
		return cell{"-", styleDim}
	}
	if v.Attachment.Detaching {
		return cell{v.Attachment.Node + " (detaching)", styleWarn}
	}
	if v.Attachment.ReadOnly {
		return plain(v.Attachment.Node + " (ro)")
	}
	return plain(v.Attachment.Node)
}

func replicaPools(rs []replicaView) string {
	var out []string
	for _, r := range rs {
		out = append(out, r.Node+"/"+poolOf(r))
	}
	return strings.Join(out, ",")
}

func sourceText(v volumeView) string {
	switch {
	case v.SourceSnapshot != "":
		return v.SourceSnapshot
	case v.SourceVolume != "":
		return v.SourceVolume
	}
	return ""
}

func rateText(n int64) string { return sizeText(n) + "/s" }

func volumeSize(v volumeView) cell {
	if v.TargetBytes > v.SizeBytes {
		return cell{sizeText(v.SizeBytes) + " → " + sizeText(v.TargetBytes), styleWarn}
	}
	return sizeCell(v.SizeBytes)
}

func listVolumes(ctx context.Context, a adminpb.AdminClient, tenant string, withHealth bool) ([]volumeView, error) {
	out := []volumeView{}
	req := &adminpb.ListVolumesRequest{Max: 1000, Tenant: tenant, WithHealth: withHealth}
	for {
		r, err := a.ListVolumes(ctx, req)
		if err != nil {
			return nil, err
		}
		out = append(out, views(r.Volumes, viewVolume)...)
		if req.PageToken = r.NextPageToken; req.PageToken == "" {
			return out, nil
		}
	}
}

func completeVolumes(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	vs, err := listVolumes(ctx, a, "", false)
	var out []cobra.Completion
	for _, v := range vs {
		out = append(out, nameAndID(v.Name, v.ID, sizeText(v.SizeBytes)+", "+v.State)...)
	}
	return out, err
}

func describeVolume(v volumeView, now time.Time) []field {
	fs := []field{
		{"Name", plain(v.Name)},
		{"Id", plain(v.ID)},
		{"Tenant", plain(v.Tenant)},
		{"State", stateCell(v.State)},
		{"Health", healthCell(v.Conditions)},
	}
	for _, c := range v.Conditions {
		fs = append(fs, field{"", plain(c.Message)})
	}
	fs = append(fs,
		field{"Size", volumeSize(v)},
		field{"On disk", sizeCell(v.PhysicalBytes)},
		field{"Created", plain(ageText(v.CreatedAt, now) + " ago")},
		field{"Attached to", attachedCell(v)},
	)
	for _, c := range v.Capabilities {
		fs = append(fs, field{"Usable as", plain(strings.TrimSpace(c.Access + " " + c.Mode + " " + c.FSType))})
	}
	fs = append(fs,
		field{"Filesystem", orDash(strings.TrimSpace(v.Filesystem + " " + v.FilesystemPhase))},
		field{"Block size", plain(fmt.Sprint(v.BlockSize))},
		field{"IOPS limit", limitCell(v.IOPSLimit, countText)},
		field{"Bandwidth limit", limitCell(v.BandwidthLimit, rateText)},
		field{"Made from", orDash(sourceText(v))},
	)
	fs = append(fs,
		field{"Replicas", plain(fmt.Sprintf("%d wanted, at least %d in sync to be written, near the workload: %s", v.ReplicasWanted, v.MinInSync, orDash(v.DataLocality).text))},
	)
	for _, r := range v.Replicas {
		fs = append(fs, field{"", replicaCell(r)})
		if r.Resync != nil {
			fs = append(fs, field{"", cell{"  " + progressCell(*r.Resync).text, styleWarn}})
		}
	}
	if e := v.Engine; e != nil {
		text := e.Phase + " on node " + v.Owner
		if e.Waiting > 0 {
			text += fmt.Sprintf(", %d requests are not answered", e.Waiting)
		}
		if e.DirtyBytes > 0 {
			text += fmt.Sprintf(", %s to reconcile", sizeText(e.DirtyBytes))
		}
		fs = append(fs, field{"Engine", plain(text)})
	}
	epoch := fmt.Sprintf("%d, configuration %d", v.Epoch, v.ConfigVersion)
	if v.Lineage > 1 {
		epoch += fmt.Sprintf(", salvaged %d times", v.Lineage-1)
	}
	return append(fs, field{"Epoch", plain(epoch)})
}

func volumes(tenant *string) resource[volumeView] {
	return resource[volumeView]{
		kind: adminpb.Kind_VOLUME, one: "volume", many: "volumes", arg: "VOLUME",
		columns: []column[volumeView]{
			{"NAME", false, func(v volumeView, _ time.Time) cell { return plain(v.Name) }},
			{"ID", true, func(v volumeView, _ time.Time) cell { return plain(v.ID) }},
			{"TENANT", true, func(v volumeView, _ time.Time) cell { return plain(v.Tenant) }},
			{"SIZE", false, func(v volumeView, _ time.Time) cell { return volumeSize(v) }},
			{"ON DISK", false, func(v volumeView, _ time.Time) cell { return sizeCell(v.PhysicalBytes) }},
			{"STATE", false, func(v volumeView, _ time.Time) cell { return stateCell(v.State) }},
			{"ATTACHED", false, func(v volumeView, _ time.Time) cell { return attachedCell(v) }},
			{"IN SYNC", false, func(v volumeView, _ time.Time) cell { return inSyncCell(v) }},
			{"HEALTH", false, func(v volumeView, _ time.Time) cell { return healthCell(v.Conditions) }},
			{"FS", true, func(v volumeView, _ time.Time) cell { return orDash(v.Filesystem) }},
			{"IOPS", true, func(v volumeView, _ time.Time) cell { return limitCell(v.IOPSLimit, countText) }},
			{"BANDWIDTH", true, func(v volumeView, _ time.Time) cell { return limitCell(v.BandwidthLimit, rateText) }},
			{"MADE FROM", true, func(v volumeView, _ time.Time) cell { return orDash(sourceText(v)) }},
			{"PLACED ON", true, func(v volumeView, _ time.Time) cell { return orDash(replicaPools(v.Replicas)) }},
			{"AGE", false, func(v volumeView, now time.Time) cell { return plain(ageText(v.CreatedAt, now)) }},
		},
		ref: func(v volumeView) string { return v.ID },
		list: func(ctx context.Context, a adminpb.AdminClient) ([]volumeView, error) {
			return listVolumes(ctx, a, *tenant, true)
		},
		get: func(ctx context.Context, a adminpb.AdminClient, ref string) (volumeView, error) {
			v, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: ref})
			if err != nil {
				return volumeView{}, err
			}
			return viewVolume(v), nil
		},
		describe:     describeVolume,
		progress:     volumeProgress,
		event:        func(e *adminpb.Event) volumeView { return viewVolume(e.GetVolume()) },
		complete:     completeVolumes,
		listExample:  "  ballastctl volume list\n  ballastctl volume list --tenant team-a -o wide\n  ballastctl volume list -o json | jq -r '.[] | select(.attachment == null) | .name'",
		whyExample:   "  ballastctl volume why db-data",
		emptyMessage: "There are no volumes.",
		listFlags: func(cmd *cobra.Command) {
			cmd.Flags().StringVar(tenant, "tenant", "", "only those of this `tenant`")
		},
	}
}

func volumeCommand(c *cli) *cobra.Command {
	var tenant string
	r := volumes(&tenant)
	cmd := group("volume", "Volumes: list, get, watch, why, create, delete, expand, set, detach, export", "volumes", "vol")
	cmd.AddCommand(r.commands(c)...)
	cmd.AddCommand(volumeCreate(c, r), volumeDelete(c), volumeExpand(c, r), volumeSet(c, r), volumeDetach(c, r), volumeExport(c))
	return cmd
}

func volumeCreate(c *cli, r resource[volumeView]) *cobra.Command {
	var req adminpb.CreateVolumeRequest
	var size, bandwidth string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a volume, empty or from a snapshot or another volume",
		Long: `Make a volume, empty or from a snapshot or another volume.

Orchestrators make their volumes themselves; this is for tests, and for bringing a snapshot back by hand. The same
command given again returns the volume it made. A volume from a source is there at once, whatever its size: it shares
the source's data and stores only what is written to it.`,
		Example: `  ballastctl volume create scratch --size 10Gi
  ballastctl volume create raw --size 10Gi --access block
  ballastctl volume create db --size 100Gi --replicas 3 --min-in-sync 2
  ballastctl volume create db-restored --from-snapshot db-monday
  ballastctl volume create db-copy --from-volume db-data --size 200Gi`,
		Args: arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			var err error
			if size != "" {
				if req.SizeBytes, err = parseSize(size); err != nil {
					return err
				}
			}
			if bandwidth != "" {
				if req.BandwidthLimit, err = parseSize(bandwidth); err != nil {
					return err
				}
			}
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := a.CreateVolume(ctx, &req)
				if err != nil {
					return err
				}
				return r.done(c, viewVolume(v), "Volume %s (%s, %s) is ready.", v.Name, v.Id, sizeText(v.SizeBytes))
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&size, "size", "", "size, like 10Gi (default: the source's, or 10Gi)")
	f.StringVar(&req.Tenant, "tenant", "", "`tenant` that it counts for")
	f.StringVar(&req.Pool, "pool", "", "name of the `pool` to place it in (default: any)")
	f.Int32Var(&req.Replicas, "replicas", 0, "copies on different nodes, 1 to 5 (default: 1)")
	f.Int32Var(&req.MinInSync, "min-in-sync", 0, "copies that a write needs (default: 1)")
	f.StringVar(&req.DataLocality, "data-locality", "", "`whether` a copy is to be where the workload is: preferred, required or none (default: preferred)")
	f.StringVar(&req.FsType, "fs-type", "", "filesystem it is to carry: ext4, xfs or btrfs")
	f.Int32Var(&req.BlockSize, "block-size", 0, "logical block size, 512 or 4096 `bytes`")
	f.StringVar(&req.Access, "access", "mount", "`kind` of access: mount or block")
	f.Int64Var(&req.IopsLimit, "iops", 0, "limit of I/O operations per second (default: none)")
	f.StringVar(&bandwidth, "bandwidth", "", "limit of bytes per second, like 100Mi (default: none)")
	f.StringVar(&req.FromVolume, "from-volume", "", "`volume` to clone")
	f.StringVar(&req.FromSnapshot, "from-snapshot", "", "`snapshot` to restore")
	cmd.MarkFlagsMutuallyExclusive("from-volume", "from-snapshot")
	must(cmd.RegisterFlagCompletionFunc("from-volume", c.completeFlag(completeVolumes)))
	must(cmd.RegisterFlagCompletionFunc("from-snapshot", c.completeFlag(completeSnapshots)))
	must(cmd.RegisterFlagCompletionFunc("pool", c.completeFlag(completePools)))
	must(cmd.RegisterFlagCompletionFunc("data-locality", cobra.FixedCompletions(localities, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("fs-type", cobra.FixedCompletions([]string{"ext4", "xfs", "btrfs"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("access", cobra.FixedCompletions([]string{"mount", "block"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func volumeDelete(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete VOLUME",
		Short: "Delete a volume and its data",
		Long: `Delete a volume and its data for good. Its snapshots stay, and volumes can still be made from them.

A volume that is attached is refused. One that an orchestrator made is better deleted there: it does not learn of this.`,
		Example: "  ballastctl volume delete scratch\n  ballastctl volume delete scratch --yes",
		Args:    arguments("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if err := c.confirm(yes, "Delete volume %s (%s, %s) and its data for good?", v.Name, v.Id, sizeText(v.SizeBytes)); err != nil {
					return err
				}
				if _, err := a.DeleteVolume(ctx, &adminpb.DeleteRequest{Ref: v.Id}); err != nil {
					return err
				}
				return c.deleted(v.Id, "Volume "+v.Name)
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func volumeExpand(c *cli, r resource[volumeView]) *cobra.Command {
	return &cobra.Command{
		Use:   "expand VOLUME SIZE",
		Short: "Make a volume larger, also while it is in use",
		Long: `Make a volume larger, also while it is in use. SIZE is the new size; volumes never shrink.

The device grows at once. A filesystem on it is grown by the orchestrator's next call to the node; for a volume that an
orchestrator made, expand it there (in Kubernetes: the claim's request), which does both.`,
		Example: "  ballastctl volume expand db-data 200Gi",
		Args:    arguments("VOLUME", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(args[1])
			if err != nil {
				return err
			}
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := a.ExpandVolume(ctx, &adminpb.ExpandVolumeRequest{Ref: args[0], SizeBytes: n})
				if err != nil {
					return err
				}
				return r.done(c, viewVolume(v), "Volume %s has %s now.", v.Name, sizeText(v.SizeBytes))
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
}

func volumeDetach(c *cli, r resource[volumeView]) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "detach VOLUME",
		Short: "Take a volume from the node it is attached to",
		Long: `Take a volume from the node it is attached to. A workload that still uses it there gets I/O errors, and loses what it
has not flushed. It is for attachments that an orchestrator left behind.`,
		Example: "  ballastctl volume detach db-data",
		Args:    arguments("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if v.Attachment == nil {
					return r.done(c, viewVolume(v), "Volume %s is not attached.", v.Name)
				}
				if err := c.confirm(yes, "Detach volume %s from node %s? A workload that uses it there gets I/O errors.", v.Name, v.Attachment.Node); err != nil {
					return err
				}
				d, err := a.DetachVolume(ctx, &adminpb.DetachVolumeRequest{Ref: v.Id, Node: v.Attachment.Node})
				if err != nil {
					return err
				}
				return r.done(c, viewVolume(d), "Volume %s is detached from node %s.", d.Name, v.Attachment.Node)
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// confirm asks a person; a script says --yes.
func (c *cli) confirm(yes bool, format string, args ...any) error {
	if yes {
		return nil
	}
	if !isPerson(c.in) {
		return usage(errors.New("this destroys data and nobody is there to ask; say --yes"))
	}
	fmt.Fprintf(c.err, "%s [y/N] ", safe(fmt.Sprintf(format, args...)))
	var answer string
	if _, err := fmt.Fscanln(c.in, &answer); err != nil || (answer != "y" && answer != "Y" && answer != "yes") {
		return errNotConfirmed
	}
	return nil
}

func (c *cli) deleted(id, what string) error {
	if !c.forPeople() {
		return c.data(struct {
			ID      string `json:"id"`
			Deleted bool   `json:"deleted"`
		}{id, true})
	}
	return c.say("%s is deleted.", safe(what))
}
