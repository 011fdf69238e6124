package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func roleCell(role string) cell {
	switch role {
	case "":
		return cell{"-", styleDim}
	case "in-sync":
		return cell{role, styleGood}
	}
	return cell{role, styleWarn}
}

// inSyncCell says how many copies are in sync of those that are wanted.
func inSyncCell(v volumeView) cell {
	n := int32(0)
	for _, r := range v.Replicas {
		if r.Role == "in-sync" {
			n++
		}
	}
	s := styleGood
	switch {
	case n == 0 || n < v.MinInSync:
		s = styleBad
	case n < v.ReplicasWanted:
		s = styleWarn
	}
	return cell{fmt.Sprintf("%d/%d", n, v.ReplicasWanted), s}
}

// poolOf is the pool's name, or its id where nobody knows the name.
func poolOf(r replicaView) string {
	if r.PoolName != "" {
		return r.PoolName
	}
	return r.Pool
}

func replicaCell(r replicaView) cell {
	role := roleCell(r.Role)
	text := fmt.Sprintf("%s: %s on %s, pool %s, %s", r.ID, role.text, r.Node, poolOf(r), sizeText(r.PhysicalBytes))
	if r.NodeSilent {
		return cell{text + ", its node is silent", styleBad}
	}
	return cell{text, role.style}
}

// durationText is a time that is left, short.
func durationText(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
}

// progressCell draws a resync: how far, how fast, and how long it still takes at that rate.
func progressCell(r resyncView) cell {
	parts := []string{}
	if total := r.DoneBytes + r.LeftBytes; total > 0 {
		parts = append(parts, bar(r.DoneBytes, total), sizeText(r.LeftBytes)+" left")
	} else if r.Stage != "" {
		parts = append(parts, r.Stage)
	}
	if r.BytesPerSec > 0 {
		parts = append(parts, rateText(r.BytesPerSec))
		if r.LeftBytes > 0 && r.LeftBytes/r.BytesPerSec < 1e6 {
			parts = append(parts, durationText(time.Duration(max(1, r.LeftBytes/r.BytesPerSec))*time.Second))
		}
	}
	if r.SnapshotsLeft > 0 {
		parts = append(parts, fmt.Sprintf("%d snapshots to fill", r.SnapshotsLeft))
	}
	if r.Full {
		parts = append(parts, "full copy")
	}
	return cell{strings.Join(parts, "  "), styleWarn}
}

// volumeProgress sums the resyncs of a volume; empty where none is under way.
func volumeProgress(v volumeView) cell {
	var sum resyncView
	n := 0
	for _, r := range v.Replicas {
		if x := r.Resync; x != nil {
			sum.DoneBytes += x.DoneBytes
			sum.LeftBytes += x.LeftBytes
			sum.BytesPerSec += x.BytesPerSec
			sum.SnapshotsLeft += x.SnapshotsLeft
			sum.Full = sum.Full || x.Full
			sum.Stage = x.Stage
			n++
		}
	}
	if n == 0 {
		return cell{}
	}
	return progressCell(sum)
}

// behindCell says what is being done about a replica that is not in sync.
func behindCell(r replicaView) cell {
	switch {
	case r.Resync != nil:
		return progressCell(*r.Resync)
	case r.NodeSilent:
		return cell{"its node is silent", styleBad}
	case r.Role == "leaving":
		return cell{"its node is yet to free it", styleDim}
	case r.Role != "in-sync" && r.Role != "":
		return cell{"waits to be brought up", styleWarn}
	}
	return cell{"-", styleDim}
}

func replicaCommand(c *cli) *cobra.Command {
	cmd := group("replica", "Replicas, the copies of volumes: list", "replicas")
	cmd.AddCommand(replicaList(c))
	return cmd
}

func replicaList(c *cli) *cobra.Command {
	var req adminpb.ListReplicasRequest
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the copies of volumes, where they are and how far behind",
		Long: `List the copies of volumes, where they are and how far behind.

  in-sync   has every write that was answered
  stale     missed some while it was away, and is brought up when it can be reached
  filling   is new and not full yet
  leaving   belongs to the volume no more; its node is yet to free it

With -o wide, json and yaml: when what each had was made durable last, where its node answers.`,
		Example: "  ballastctl replica list --volume db-data\n  ballastctl replica list --node node-2 -o wide\n" +
			"  ballastctl replica list -o json | jq '.[] | select(.role != \"in-sync\")'",
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.ListReplicas(ctx, &req)
				if err != nil {
					return err
				}
				rs := views(r.Replicas, viewReplica)
				if !c.forPeople() {
					return c.data(rs)
				}
				if len(rs) == 0 {
					_, err := fmt.Fprintln(c.err, "There are no replicas.")
					return err
				}
				wide := c.output == "wide"
				t := &table{head: []string{"VOLUME", "ROLE", "NODE", "POOL", "ON DISK", "PROGRESS"}}
				if wide {
					t.head = append(t.head, "ID", "LEFT SYNC AT", "LAST FLUSH")
				}
				for _, x := range rs {
					row := []cell{plain(x.VolumeName), roleCell(x.Role), plain(x.Node), plain(poolOf(x)), sizeCell(x.PhysicalBytes), behindCell(x)}
					if wide {
						left := ""
						if x.RemovedAt > 0 {
							left = fmt.Sprintf("configuration %d", x.RemovedAt)
						}
						row = append(row, plain(x.ID), orDash(left), agoCell(x.LastFlush))
					}
					t.add(row)
				}
				return t.print(c.out)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&req.Volume, "volume", "", "only those of this `volume`")
	cmd.Flags().StringVar(&req.Node, "node", "", "only those on this `node`")
	must(cmd.RegisterFlagCompletionFunc("volume", c.completeFlag(completeVolumes)))
	must(cmd.RegisterFlagCompletionFunc("node", c.completeFlag(completeNodes)))
	return cmd
}
