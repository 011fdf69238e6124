package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// exportView is an export as it is printed.
type exportView struct {
	URI       string `json:"uri"`
	Name      string `json:"name"`
	ID        string `json:"id"`
	SizeBytes int64  `json:"sizeBytes"`
	ReadOnly  bool   `json:"readOnly"`
}

func volumeExport(c *cli) *cobra.Command {
	var writable bool
	cmd := &cobra.Command{
		Use:   "export VOLUME[@SNAPSHOT]",
		Short: "Serve a volume or a snapshot over NBD, to copy or to look at it",
		Long: `Serve a volume or a snapshot over NBD (Network Block Device) on a Unix socket of this host, until interrupted.

The URI that is printed is what nbdcopy, nbdinfo, qemu-img and nbd-client take. The bytes are those of the raw device,
holes included: of a snapshot only what it holds is read. @SNAPSHOT alone will do.

A volume that is in use is served beside its user, who is not disturbed; what it has not flushed may be missing, so a
copy of it is like the disk after a power cut. For a good copy export a snapshot. A volume that is not attached is served
where it has one replica, on its node, and cannot be staged by a workload until its export has ended. Taking the volume
away (unstaging, detaching, deleting) ends the export. A snapshot that is deleted meanwhile is freed afterwards.

With --writable clients may write. Beside a mounted filesystem that destroys it.`,
		Example: `  ballastctl volume export db-data@monday
  nbdcopy 'nbd+unix:///?socket=/run/ballast/exports/snap-….sock' monday.raw
  ballastctl volume export scratch --writable -o json`,
		Args: arguments("VOLUME[@SNAPSHOT]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &adminpb.ExportRequest{Writable: writable}
			req.Volume, req.Snapshot, _ = strings.Cut(args[0], "@")
			if strings.HasSuffix(args[0], "@") {
				return usage(errors.New("the name of the snapshot is missing after @"))
			}
			return c.export(cmd.Context(), req)
		},
		ValidArgsFunction: c.completeFirst(completeExports),
	}
	cmd.Flags().BoolVar(&writable, "writable", false, "let clients write to the volume")
	return cmd
}

// completeExports offers volumes, and snapshots with their volumes.
func completeExports(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	out, err := completeVolumes(ctx, a)
	if err != nil {
		return out, err
	}
	ss, err := listSnapshots(ctx, a, "")
	for _, s := range ss {
		of := s.VolumeName
		if of == "" {
			of = s.Volume
		}
		out = append(out, cobra.CompletionWithDesc(of+"@"+s.Name, sizeText(s.SizeBytes)+", snapshot"))
	}
	return out, err
}

// export waits until it is interrupted, which is how it ends well.
func (c *cli) export(ctx context.Context, req *adminpb.ExportRequest) error {
	a, err := c.client(ctx)
	if err != nil {
		return err
	}
	// Only the beginning is bounded by --timeout.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := a.Export(ctx, req)
	if err != nil {
		return err
	}
	late := time.AfterFunc(c.timeout, cancel)
	r, err := stream.Recv()
	if !late.Stop() && err != nil {
		return unreachableError{fmt.Errorf("no answer in %s; look at the daemon's log, or wait longer with --timeout", c.timeout)}
	}
	if err != nil {
		return err
	}
	if err := c.showExport(exportView{URI: r.Uri, Name: r.Name, ID: r.Id, SizeBytes: r.SizeBytes, ReadOnly: r.ReadOnly}); err != nil {
		return err
	}
	_, err = stream.Recv()
	if ctx.Err() != nil || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// showExport prints the URI and nothing else on stdout, for scripts.
func (c *cli) showExport(v exportView) error {
	if !c.forPeople() {
		return c.data(v)
	}
	how := "read-only"
	if !v.ReadOnly {
		how = "writable"
	}
	if _, err := fmt.Fprintf(c.err, "Serving %s (%s, %s), %s, until interrupted:\n", safe(v.Name), v.ID, sizeText(v.SizeBytes), how); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.out, v.URI)
	return err
}
