package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// waitEvery is how often what is waited for is looked at; a variable for the tests' sake.
var waitEvery = 2 * time.Second

// refusal is an error of the command line's own, told apart by its exit code.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// waiting shows what is waited for: on a terminal in one place, elsewhere a line for each change.
type waiting struct {
	w    io.Writer
	last string
}

func (w *waiting) show(text string) {
	if text == w.last {
		return
	}
	if w.last != "" && colours(w.w) {
		fmt.Fprint(w.w, overwrite)
	}
	w.last = text
	fmt.Fprintln(w.w, safe(text))
}

// poll calls done now and then, until it returns true or fails.
func (c *cli) poll(cmd *cobra.Command, done func(context.Context, adminpb.AdminClient) (bool, error)) error {
	for {
		var ended bool
		err := c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) (err error) {
			ended, err = done(ctx, a)
			return err
		})
		if err != nil || ended {
			return err
		}
		select {
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		case <-time.After(waitEvery):
		}
	}
}

// blockersText names what keeps a node from being drained.
func blockersText(bs []*adminpb.DrainBlocker) string {
	const most = 3
	var out []string
	for _, b := range bs[:min(most, len(bs))] {
		text := fmt.Sprintf("volume %s: %s", b.VolumeName, b.Reason)
		if b.Snapshot != "" {
			of := b.VolumeName
			if of == "" {
				of = b.Volume + ", which was deleted"
			}
			text = fmt.Sprintf("snapshot %s of volume %s: %s", b.SnapshotName, of, b.Reason)
		}
		for _, r := range b.Resyncs {
			text += fmt.Sprintf(" (%s: %s)", r.Node, strings.Join(strings.Fields(progressCell(*viewReplica(r).Resync).text), " "))
		}
		out = append(out, text)
	}
	if len(bs) > most {
		out = append(out, fmt.Sprintf("and %d more", len(bs)-most))
	}
	return strings.Join(out, "; ")
}

// drainAdvice says what helps with the first volume or snapshot.
func drainAdvice(bs []*adminpb.DrainBlocker, node string) string {
	if b := bs[0]; b.Snapshot != "" {
		if b.VolumeName == "" {
			return fmt.Sprintf("bring the nodes of its other holders back, if it has any, or wait until another holds it: ballastctl node drain %s --wait; or restore it, or delete it", node)
		}
		return fmt.Sprintf("bring the nodes of its other holders back, if it has any, or give its volume another replica, which is given the snapshot "+
			"(ballastctl volume set %s --replicas N), and wait: ballastctl node drain %s --wait; or delete it", b.VolumeName, node)
	}
	if len(bs[0].Resyncs) > 0 {
		return fmt.Sprintf("wait for its resync: ballastctl node drain %s --wait", node)
	}
	return fmt.Sprintf("bring the nodes of its other replicas back or undrain them, if it has any, or give it more (ballastctl volume set %s --replicas N), and wait: ballastctl node drain %s --wait", bs[0].VolumeName, node)
}

func nodeDrain(c *cli, r resource[nodeView]) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Ask that a node may be stopped, for maintenance",
		Long: `Ask that a node may be stopped, for maintenance. It is granted only while every volume with a copy in sync there keeps
enough of them on nodes that stay up, and every snapshot a copy, and until ` + "`node undrain`" + ` nothing new is placed on the node. Another node is not drained
where the two together would leave a volume with too few.

Copies are not moved: they catch up when the node is back. To take a node away for good use ` + "`node empty`" + `. Workloads are
moved by their orchestrator.

Where it is refused, the volumes and snapshots that need the node are named. With --wait the command waits until it is granted.`,
		Example: "  ballastctl node drain node-2 --wait && ssh node-2 reboot\n  ballastctl node undrain node-2",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			shown, refused := &waiting{w: c.err}, false
			return c.poll(cmd, func(ctx context.Context, a adminpb.AdminClient) (bool, error) {
				if refused { // each refusal is in the audit log: the next time it is asked for when nothing is known to be in its way
					bs, err := a.ListDrainBlockers(ctx, &adminpb.GetRequest{Ref: args[0]})
					if err != nil {
						return false, err
					}
					if len(bs.Blockers) > 0 {
						shown.show("waiting: " + blockersText(bs.Blockers))
						return false, nil
					}
				}
				n, err := a.DrainNode(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err == nil {
					return true, r.done(c, viewNode(n), "Node %s is drained: it may be stopped. When it is back: ballastctl node undrain %s", n.Id, n.Id)
				}
				if status.Code(err) != codes.FailedPrecondition {
					return false, err
				}
				bs, listErr := a.ListDrainBlockers(ctx, &adminpb.GetRequest{Ref: args[0]})
				switch {
				case listErr != nil:
					return false, listErr
				case wait:
					refused = true
					if len(bs.Blockers) > 0 {
						shown.show("waiting: " + blockersText(bs.Blockers))
					}
					return false, nil
				case len(bs.Blockers) == 0: // it was granted a moment later
					return false, err
				}
				return false, refusal{fmt.Errorf("node %s must stay up: %s; %s", args[0], safe(blockersText(bs.Blockers)), safe(drainAdvice(bs.Blockers, args[0])))}
			})
		},
		ValidArgsFunction: c.completeFirst(completeNodes),
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it is granted")
	return cmd
}

func nodeUndrain(c *cli, r resource[nodeView]) *cobra.Command {
	return &cobra.Command{
		Use:     "undrain NODE",
		Aliases: []string{"uncordon"},
		Short:   "Use a node again after drain or empty",
		Long:    "Use a node again after `node drain` or `node empty`. What moved away in the meantime stays where it is.",
		Example: "  ballastctl node undrain node-2",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				n, err := a.UndrainNode(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				return r.done(c, viewNode(n), "Node %s is used again.", n.Id)
			})
		},
		ValidArgsFunction: c.completeFirst(completeNodes),
	}
}

func nodeEmpty(c *cli, r resource[nodeView]) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "empty NODE",
		Short: "Move all copies from a node to others, before it is removed",
		Long: `Move all copies from a node to others, in the background, and place nothing new on it. A copy leaves the node when there
is another in its place; where no other node has room for one it stays, until one has or the volume is to have fewer
(` + "`volume set --replicas`" + `). Volumes that are attached there stay attached: their orchestrator must move the workloads.

With --wait the command waits until the node holds nothing. ` + "`node undrain`" + ` takes it back.`,
		Example: "  ballastctl node empty node-4 --wait && ballastctl node remove node-4",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			asked, shown := false, &waiting{w: c.err}
			return c.poll(cmd, func(ctx context.Context, a adminpb.AdminClient) (bool, error) {
				ask := a.EmptyNode
				if asked {
					ask = a.GetNode
				}
				n, err := ask(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return false, err
				}
				asked = true
				left := n.Replicas + n.Snapshots + n.Attached
				switch {
				case left == 0:
					return true, r.done(c, viewNode(n), "Node %s is empty: ballastctl node remove %s", n.Id, n.Id)
				case wait && n.State != "emptying" && n.State != "silent":
					return false, refusal{fmt.Errorf("node %s is not being emptied any more: it is %s", n.Id, n.State)}
				case wait:
					shown.show(fmt.Sprintf("waiting: %d replicas and %d snapshots are left, %d volumes are attached", n.Replicas, n.Snapshots, n.Attached))
					return false, nil
				}
				return true, r.done(c, viewNode(n), "Node %s is being emptied: %d replicas and %d snapshots are left, %d volumes are attached. See ballastctl node watch %s",
					n.Id, n.Replicas, n.Snapshots, n.Attached, n.Id)
			})
		},
		ValidArgsFunction: c.completeFirst(completeNodes),
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it holds nothing")
	return cmd
}

func nodeRemove(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Take a node that holds nothing out of the cluster for good",
		Long: `Take a node that holds nothing out of the cluster for good: its certificate is refused from then on, and it comes back only
with a new join token. Empty it first; of a controller, take its vote first with ` + "`cluster remove-controller`" + `.

The disks of a node that is gone: see ` + "`node why`" + `.`,
		Example: "  ballastctl node remove node-4",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				n, err := a.GetNode(ctx, &adminpb.GetRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				if err := c.confirm(yes, "Remove node %s from the cluster for good?", n.Id); err != nil {
					return err
				}
				if _, err := a.RemoveNode(ctx, &adminpb.DeleteRequest{Ref: n.Id}); err != nil {
					return err
				}
				if !c.forPeople() {
					return c.data(removedView{n.Id, true})
				}
				return c.say("Node %s is removed. Stop ballastd there.", n.Id)
			})
		},
		ValidArgsFunction: c.completeFirst(completeNodes),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

type removedView struct {
	Node    string `json:"node"`
	Removed bool   `json:"removed"`
}

var errNotConfirmed = errors.New("not confirmed; nothing was changed")
