package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

type candidateView struct {
	Replica       replicaView `json:"replica"`
	Answers       bool        `json:"answers"`
	Against       string      `json:"against,omitempty"`
	Role          string      `json:"role,omitempty"`
	ConfigVersion uint64      `json:"configVersion"`
	Epoch         uint64      `json:"epoch"`
	Lineage       uint64      `json:"lineage"`
	LastFlush     *time.Time  `json:"lastFlush,omitempty"`
	SizeBytes     int64       `json:"sizeBytes"`
	Poisoned      bool        `json:"poisoned"`
}

func viewCandidate(c *adminpb.Candidate) candidateView {
	return candidateView{
		Replica: viewReplica(c.Replica), Answers: c.Answers, Against: c.Against, Role: c.Role, ConfigVersion: c.ConfigVersion, Epoch: c.Epoch,
		Lineage: c.Lineage, LastFlush: timeView(c.LastFlush), SizeBytes: c.SizeBytes, Poisoned: c.Poisoned,
	}
}

func salvageCommand(c *cli) *cobra.Command {
	var req adminpb.SalvageVolumeRequest
	var yes bool
	cmd := &cobra.Command{
		Use:   "salvage VOLUME",
		Short: "Last resort: make what one replica has the volume",
		Long: `List what each replica of a volume knows, the best to salvage first; with --replica make what that one has the volume.

It is for a volume that nothing else brings back: every replica that was in sync is lost, or its disk failed. What others
had and the chosen one has not is lost for good. Where a replica that was in sync can still come back, bring it back
instead: no write is lost then. See ` + "`volume why`" + `.

The columns: CONFIG counts the changes of who is in sync, so the highest one saw the most; of the same CONFIG the higher
EPOCH, then the later LAST FLUSH. The replica that is chosen begins a new lineage. The others keep their bytes until they
are compared with it in full and overwritten where they differ: to look at them first, use ` + "`pool export`" + `.

A volume that is attached is detached first, where that is possible. Where it is not, because its node is silent and with it
every replica that was in sync, the salvage ends the attachment. Make sure then that this node is off: while it runs, cut off
from all others, its workload goes on with what is not the volume any more. When it reaches the others again its device fails for
good, and nothing that it wrote is kept. --force takes a replica although another would be better.`,
		Example: "  ballastctl salvage db-data\n  ballastctl salvage db-data --replica rep-0123 --accept-data-loss",
		Args:    arguments("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				l, err := a.ListCandidates(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if req.Replica == "" {
					if req.AcceptDataLoss || req.Force {
						return usage(errors.New("say which replica with --replica"))
					}
					return c.showCandidates(l)
				}
				if !req.AcceptDataLoss {
					return usage(errors.New("what other replicas have and this one has not is lost for good; say --accept-data-loss"))
				}
				if err := c.confirmByName(yes, l, req.Replica); err != nil {
					return err
				}
				req.Ref = l.Volume.Id
				v, err := a.SalvageVolume(ctx, &req)
				if err != nil {
					return err
				}
				return volumes(new(string)).done(c, viewVolume(v), "Volume %s is what replica %s has (lineage %d). It can be attached; check what is on it.", safe(v.Name), req.Replica, v.Lineage)
			})
		},
		ValidArgsFunction: c.completeFirst(completeVolumes),
	}
	f := cmd.Flags()
	f.StringVar(&req.Replica, "replica", "", "the `replica` to take")
	f.BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "what it has not is lost")
	f.BoolVar(&req.Force, "force", false, "although another replica would be better")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask for the volume's name")
	must(cmd.RegisterFlagCompletionFunc("replica", func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return c.completions(cmd, func(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
			if len(args) == 0 {
				return nil, nil
			}
			r, err := a.ListReplicas(ctx, &adminpb.ListReplicasRequest{Volume: args[0]})
			var out []cobra.Completion
			for _, x := range r.GetReplicas() {
				out = append(out, cobra.CompletionWithDesc(x.Id, x.Role+" on "+x.Node))
			}
			return out, err
		}, prefix)
	}))
	return cmd
}

func (c *cli) showCandidates(l *adminpb.ListCandidatesReply) error {
	vs := views(l.Candidates, viewCandidate)
	if !c.forPeople() {
		return c.data(vs)
	}
	t := &table{head: []string{"REPLICA", "NODE", "ROLE", "CONFIG", "EPOCH", "LAST FLUSH", "SIZE", "AGAINST IT"}}
	for _, v := range vs {
		row := []cell{plain(v.Replica.ID), plain(v.Replica.Node), roleCell(v.Replica.Role)}
		if v.Answers {
			row = append(row, plain(fmt.Sprint(v.ConfigVersion)), plain(fmt.Sprint(v.Epoch)), agoCell(v.LastFlush), sizeCell(v.SizeBytes))
		} else {
			row = append(row, orDash(""), orDash(""), orDash(""), orDash(""))
		}
		against := orDash(v.Against)
		if v.Against != "" {
			against.style = styleBad
		}
		t.add(append(row, against))
	}
	if err := t.print(c.out); err != nil {
		return err
	}
	if len(l.Volume.Conditions) == 0 {
		_, err := fmt.Fprintf(c.err, "Volume %s is healthy: there is nothing to salvage.\n", safe(l.Volume.Name))
		return err
	}
	return nil
}

// confirmByName has a person type the name of the volume: a y is typed too easily.
func (c *cli) confirmByName(yes bool, l *adminpb.ListCandidatesReply, replica string) error {
	if yes {
		return nil
	}
	if !isPerson(c.in) {
		return usage(errors.New("this gives data up and nobody is there to ask; say --yes"))
	}
	fmt.Fprintf(c.err, "What other replicas of volume %s have and %s has not will be lost for good.\nType the volume's name to go on: ", safe(l.Volume.Name), safe(replica))
	line, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != l.Volume.Name {
		return errNotConfirmed
	}
	return nil
}
