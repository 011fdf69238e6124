package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func auditLine(e auditView) []cell {
	outcome, detail := cell{"ok", styleGood}, e.Detail
	if e.Outcome != "ok" {
		outcome = cell{"failed", styleBad}
		detail = strings.TrimPrefix(detail+": "+e.Outcome, ": ")
	}
	at := "-"
	if e.Time != nil {
		at = e.Time.Local().Format(time.DateTime)
	}
	return []cell{{at, styleDim}, plain(e.Who), plain(e.What), orDash(e.Object), outcome, plain(detail)}
}

func auditCommand(c *cli) *cobra.Command {
	var last int32
	var follow bool
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Show who changed what, and what became of it",
		Long: `Show the newest entries of the audit log: who asked for which change, when, and what became of it.
In a cluster each controller has the log of what was asked of it.

With -o json each entry is one line.`,
		Example: "  ballastctl audit --last 50\n  ballastctl audit --follow -o json",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if !follow {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, c.timeout)
				defer cancel()
			}
			a, err := c.client(ctx)
			if err != nil {
				return err
			}
			stream, err := a.Audit(ctx, &adminpb.AuditRequest{Last: last, Follow: follow})
			if err != nil {
				return err
			}
			return c.showAudit(ctx, stream.Recv, follow)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().Int32VarP(&last, "last", "n", 20, "`number` of entries")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new entries until interrupted")
	return cmd
}

// showAudit prints entries as they come when following, and otherwise as one aligned table.
func (c *cli) showAudit(ctx context.Context, recv func() (*adminpb.AuditEntry, error), follow bool) error {
	t := &table{head: []string{"TIME", "WHO", "WHAT", "OBJECT", "OUTCOME", "DETAIL"}}
	if follow && c.forPeople() {
		t.fit([]cell{plain(time.DateTime), plain("admin uid=0 pid=100000"), plain("snapshot.create"), plain("snap-00000000000000000000"), plain("failed"), plain("")})
		if err := t.header(c.out); err != nil {
			return err
		}
	}
	for {
		e, err := recv()
		switch {
		case errors.Is(err, io.EOF), follow && ctx.Err() != nil:
			if !follow && c.forPeople() {
				return t.print(c.out)
			}
			return nil
		case err != nil:
			return err
		}
		v := viewAudit(e)
		switch {
		case c.output == "json":
			err = json.NewEncoder(c.out).Encode(v)
		case c.output == "yaml":
			if _, err = fmt.Fprintln(c.out, "---"); err == nil {
				err = c.data(v)
			}
		case follow:
			row := auditLine(v)
			for i := range row {
				row[i].text = safe(row[i].text)
			}
			t.fit(row)
			err = t.line(c.out, row)
		default:
			t.add(auditLine(v))
		}
		if err != nil {
			return err
		}
	}
}
