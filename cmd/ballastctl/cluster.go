package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/pki"
)

type clusterView struct {
	// Alone: the node is the whole cluster.
	Alone        bool             `json:"alone"`
	Controllers  []controllerView `json:"controllers"`
	Nodes        []nodeView       `json:"nodes"`
	Healthy      int64            `json:"healthyVolumes"`
	Degraded     int64            `json:"degradedVolumes"`
	Inaccessible int64            `json:"inaccessibleVolumes"`
	DataLoss     int64            `json:"dataLossVolumes"`
	Unsettled    int64            `json:"unsettledVolumes"`
	Resyncing    int64            `json:"replicasNotInSync"`
	Attention    []string         `json:"attention"`
	// Unreadable says why there are controllers and attention only.
	Unreadable string `json:"unreadable,omitempty"`
}

type controllerView struct {
	Node     string `json:"node"`
	Address  string `json:"address"`
	Voter    bool   `json:"voter"`
	Leader   bool   `json:"leader"`
	Answers  bool   `json:"answers"`
	LogIndex uint64 `json:"logIndex"`
}

type tokenView struct {
	ID        string     `json:"id"`
	Roles     []string   `json:"roles"`
	Node      string     `json:"node,omitempty"`
	Uses      int32      `json:"uses"`
	UsedBy    []string   `json:"usedBy"`
	CreatedAt *time.Time `json:"createdAt,omitempty"`
	ExpiresAt *time.Time `json:"expiresAt,omitempty"`
	CreatedBy string     `json:"createdBy,omitempty"`
	// Token and Command are shown once, when it is made.
	Token   string `json:"token,omitempty"`
	Command string `json:"command,omitempty"`
}

func viewController(c *adminpb.Controller) controllerView {
	return controllerView{Node: c.Node, Address: c.Address, Voter: c.Voter, Leader: c.Leader, Answers: c.Answers, LogIndex: c.LogIndex}
}

func viewToken(t *adminpb.JoinToken) tokenView {
	return tokenView{
		ID: t.Id, Roles: t.Roles, Node: t.Node, Uses: t.Uses, UsedBy: append([]string{}, t.UsedBy...), CreatedAt: timeView(t.CreatedAt),
		ExpiresAt: timeView(t.ExpiresAt), CreatedBy: t.CreatedBy,
	}
}

func clusterCommand(c *cli) *cobra.Command {
	cmd := group("cluster", "The cluster: its status, who may join and administer it, its controllers")
	tokens := group("join-token", "Tokens that let nodes into the cluster: create, list, revoke", "join-tokens")
	tokens.AddCommand(tokenCreate(c), tokenList(c), tokenRevoke(c))
	cmd.AddCommand(clusterStatusCommand(c), tokens, removeController(c), adminCert(c))
	return cmd
}

func clusterStatusCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show controllers, nodes and volumes, and what needs attention",
		Long: `Show controllers, nodes and volumes, and what needs attention, the worst first, each with the next step.

A controller with a vote counts for the majority without which nothing can be changed. LOG is how far it has got: equal
numbers are up to date. Where there is no majority only the controllers are shown, and the exit code is 4.`,
		Example: "  ballastctl cluster status\n  ballastctl cluster status -o json | jq -r '.attention[]'",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.Cluster(ctx, &adminpb.ClusterRequest{})
				if err != nil {
					return err
				}
				v := clusterView{
					Alone: r.Alone, Controllers: views(r.Controllers, viewController), Nodes: views(r.Nodes, viewNode), Healthy: r.Healthy, Degraded: r.Degraded,
					Inaccessible: r.Inaccessible, DataLoss: r.DataLoss, Unsettled: r.Unsettled, Resyncing: r.Resyncing, Attention: append([]string{}, r.Attention...),
					Unreadable: r.Unreadable,
				}
				var unreadable error
				if v.Unreadable != "" {
					unreadable = unreachableError{fmt.Errorf("the cluster's state cannot be read: %s", v.Unreadable)}
				}
				if !c.forPeople() {
					return errors.Join(c.data(v), unreadable)
				}
				return errors.Join(c.showCluster(v), unreadable)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

func (c *cli) showCluster(v clusterView) error {
	if v.Alone {
		if err := c.say("This node is alone: it is the whole cluster.\n"); err != nil {
			return err
		}
	} else {
		t := &table{head: []string{"CONTROLLER", "ADDRESS", "VOTE", "ROLE", "ANSWERS", "LOG"}}
		for _, x := range v.Controllers {
			role, vote, answers, log := cell{"follower", stylePlain}, cell{"yes", stylePlain}, cell{"yes", styleGood}, orDash("")
			if x.Leader {
				role = cell{"leader", styleGood}
			}
			if !x.Voter {
				vote = cell{"not yet", styleWarn}
			}
			if x.Answers {
				log = plain(fmt.Sprint(x.LogIndex))
			} else {
				answers = cell{"no", styleBad}
			}
			t.add([]cell{plain(x.Node), plain(x.Address), vote, role, answers, log})
		}
		if err := t.print(c.out); err != nil {
			return err
		}
		if err := c.say(""); err != nil {
			return err
		}
	}
	if v.Unreadable != "" {
		return c.describe(attentionFields(v))
	}
	if err := nodes().printList(c, v.Nodes); err != nil {
		return err
	}
	fs := []field{{"Volumes", plain(fmt.Sprintf("%d healthy, %d degraded, %d waiting, %d with data lost, %d being made or deleted",
		v.Healthy, v.Degraded, v.Inaccessible, v.DataLoss, v.Unsettled))}}
	if v.Resyncing > 0 {
		fs = append(fs, field{"Replicas", cell{fmt.Sprintf("%d not in sync; see ballastctl replica list", v.Resyncing), styleWarn}})
	}
	if err := c.say(""); err != nil {
		return err
	}
	return c.describe(append(fs, attentionFields(v)...))
}

func attentionFields(v clusterView) []field {
	var fs []field
	name := "Attention"
	for _, text := range v.Attention {
		fs = append(fs, field{name, cell{text, styleBad}})
		name = ""
	}
	if len(fs) == 0 && v.Unreadable == "" {
		fs = append(fs, field{name, cell{"nothing needs it", styleGood}})
	}
	return fs
}

// clusterPort is what the command for a new node suggests where no controller says another.
const clusterPort = "9820"

// joinCommand is what is to be run on the new node.
func joinCommand(r *adminpb.CreateJoinTokenReply) string {
	port, addresses := clusterPort, []string{}
	for _, e := range r.Controllers {
		if e.Address == "" {
			continue
		}
		addresses = append(addresses, e.Address)
		if i := strings.LastIndexByte(e.Address, ':'); i >= 0 && len(addresses) == 1 {
			port = e.Address[i+1:]
		}
	}
	words := []string{"ballastd"}
	if r.Token.Node != "" {
		words = append(words, "--node-id", r.Token.Node)
	}
	words = append(words, "--listen", "ADDRESS:"+port, "--join", r.Text, "--controllers", strings.Join(addresses, ","))
	return strings.Join(words, " ")
}

func tokenCreate(c *cli) *cobra.Command {
	var req adminpb.CreateJoinTokenRequest
	var life time.Duration
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token that lets nodes in, and show how to use it",
		Long: `Make a token that lets nodes in, and show how to use it. The token is a secret and shown this once only; it also names the
cluster's CA, so that the node knows whom it joins.

  --role   storage: the node has pools and runs volumes
           controller: it keeps the cluster's state and serves the APIs. Have 3 or 5 of them
  --node   lets in only the node of that name, also where there is one already: to bring back a node whose disk was lost

On the node the token may be given as --join @FILE instead, which keeps it out of the list of processes.`,
		Example: "  ballastctl cluster join-token create --role storage --uses 5 --ttl 2h\n  ballastctl cluster join-token create --role controller,storage --node node-3",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if life <= 0 || life%time.Second != 0 {
				return usage(fmt.Errorf("--ttl %s is not one second or more, in whole seconds", life))
			}
			if req.Uses < 1 {
				return usage(fmt.Errorf("--uses %d lets nobody in", req.Uses))
			}
			req.LifetimeSeconds = int64(life / time.Second)
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.CreateJoinToken(ctx, &req)
				if err != nil {
					return err
				}
				v := viewToken(r.Token)
				v.Token, v.Command = r.Text, joinCommand(r)
				if !c.forPeople() {
					return c.data(v)
				}
				who := fmt.Sprintf("%d node(s)", v.Uses)
				if v.Node != "" {
					who = "node " + v.Node
				}
				return c.say("Token %s lets in %s as %s until %s. It is not shown again.\n\n%s\n\nOn the new node, with the address at which others reach it:\n\n  %s",
					v.ID, who, strings.Join(v.Roles, " and "), v.ExpiresAt.Local().Format(time.DateTime), v.Token, v.Command)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringSliceVar(&req.Roles, "role", []string{"storage"}, "`role,...` of the nodes: controller, storage or both")
	f.Int32Var(&req.Uses, "uses", 1, "how many nodes it lets in, up to 100")
	f.DurationVar(&life, "ttl", 24*time.Hour, "how long it is valid, up to 720h")
	f.StringVar(&req.Node, "node", "", "`name` of the only node that may use it")
	must(cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"storage", "controller", "controller,storage"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("node", c.completeFlag(completeNodes)))
	return cmd
}

func completeTokens(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
	r, err := a.ListJoinTokens(ctx, &adminpb.ListJoinTokensRequest{})
	var out []cobra.Completion
	for _, t := range r.GetTokens() {
		out = append(out, cobra.CompletionWithDesc(t.Id, strings.Join(t.Roles, ", ")))
	}
	return out, err
}

func tokenList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the join tokens that have not expired",
		Long:    "List the join tokens that have not expired, without their secrets.",
		Example: "  ballastctl cluster join-token list",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.ListJoinTokens(ctx, &adminpb.ListJoinTokensRequest{})
				if err != nil {
					return err
				}
				vs := views(r.Tokens, viewToken)
				if !c.forPeople() {
					return c.data(vs)
				}
				if len(vs) == 0 {
					_, err := fmt.Fprintln(c.err, "There are no join tokens: nobody can join.")
					return err
				}
				t := &table{head: []string{"ID", "ROLES", "FOR", "USED", "EXPIRES", "MADE BY", "USED BY"}}
				for _, v := range vs {
					forWhom, expires := v.Node, "-"
					if forWhom == "" {
						forWhom = "any"
					}
					if v.ExpiresAt != nil {
						expires = "in " + durationText(v.ExpiresAt.Sub(now()))
					}
					t.add([]cell{plain(v.ID), plain(strings.Join(v.Roles, ",")), plain(forWhom), plain(fmt.Sprintf("%d of %d", len(v.UsedBy), v.Uses)),
						plain(expires), orDash(v.CreatedBy), orDash(strings.Join(v.UsedBy, ","))})
				}
				return t.print(c.out)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

func tokenRevoke(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "revoke TOKEN",
		Short:   "Make a join token worthless",
		Long:    "Make a join token worthless. TOKEN is its id, or the token itself. Nodes that it let in stay.",
		Example: "  ballastctl cluster join-token revoke 0123456789abcdef",
		Args:    arguments("TOKEN"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.RevokeJoinToken(ctx, &adminpb.DeleteRequest{Ref: args[0]})
				if err != nil {
					return err
				}
				return c.deleted(r.Id, "Join token "+r.Id)
			})
		},
		ValidArgsFunction: c.completeFirst(completeTokens),
	}
}

func removeController(c *cli) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "remove-controller NODE",
		Short: "Take the vote from a controller that is gone for good",
		Long: `Take the vote from a controller, which may be gone. The others then need a majority among themselves only. It must not come
back with the disk that it had: it joins again as a new one, with a join token and an empty data directory.

A node that is a storage node too keeps its replicas: ` + "`node empty`" + ` and ` + "`node remove`" + ` end that.`,
		Example: "  ballastctl cluster remove-controller node-3",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				if err := c.confirm(yes, "Take the vote from controller %s for good?", args[0]); err != nil {
					return err
				}
				if _, err := a.RemoveController(ctx, &adminpb.DeleteRequest{Ref: args[0]}); err != nil {
					return err
				}
				if !c.forPeople() {
					return c.data(removedView{args[0], true})
				}
				return c.say("Node %s is no controller any more.", safe(args[0]))
			})
		},
		ValidArgsFunction: c.completeFirst(func(ctx context.Context, a adminpb.AdminClient) ([]cobra.Completion, error) {
			r, err := a.Cluster(ctx, &adminpb.ClusterRequest{})
			var out []cobra.Completion
			for _, x := range r.GetControllers() {
				out = append(out, safe(x.Node))
			}
			return out, err
		}),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func adminCert(c *cli) *cobra.Command {
	var req adminpb.IssueCertificateRequest
	var life time.Duration
	var out string
	cmd := &cobra.Command{
		Use:   "admin-cert NAME",
		Short: "Make a certificate with which an admin reaches the cluster over the network",
		Long: `Make a certificate with which an admin reaches the cluster over the network. The file has the certificate and its key, which
never leaves this process: whoever has it is that admin. It cannot be extended; make another in time.

  viewer     may look at everything but secrets
  operator   may also make, change, detach and delete volumes and snapshots, set quotas, and drain nodes
  admin      may also change the cluster's members, let others in, and give data up`,
		Example: "  ballastctl cluster admin-cert alice --role operator --out alice.pem\n  ballastctl --server node-1:9823 --cert alice.pem volume list",
		Args:    arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if life < 0 || life%time.Second != 0 {
				return usage(fmt.Errorf("--ttl %s is not a time ahead, in whole seconds", life))
			}
			file := out
			if file == "" {
				if file = args[0] + ".pem"; filepath.Base(file) != file {
					return usage(fmt.Errorf("%q is no name of a file; say --out FILE", file))
				}
			}
			if _, err := os.Lstat(file); err == nil {
				return usage(fmt.Errorf("%s exists and is not overwritten; say --out FILE", file))
			}
			key, err := pki.NewKey()
			if err != nil {
				return err
			}
			if req.CertificateRequest, err = key.Request(); err != nil {
				return err
			}
			req.Name, req.LifetimeSeconds = args[0], int64(life/time.Second)
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				r, err := a.IssueCertificate(ctx, &req)
				if err != nil {
					return err
				}
				if err := pki.Save(file, r.Chain, key); err != nil {
					return err
				}
				if !c.forPeople() {
					return c.data(struct {
						Name      string     `json:"name"`
						Role      string     `json:"role"`
						File      string     `json:"file"`
						ExpiresAt *time.Time `json:"expiresAt,omitempty"`
					}{req.Name, req.Role, file, timeView(r.ExpiresAt)})
				}
				return c.say("%s has the certificate and key of %s %s, valid until %s.", file, req.Role, safe(req.Name), r.ExpiresAt.AsTime().Local().Format(time.DateOnly))
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&req.Role, "role", "viewer", "`role`: viewer, operator or admin")
	f.StringVar(&out, "out", "", "`file` to write (default: NAME.pem)")
	f.DurationVar(&life, "ttl", 0, "how long it is valid (default: a year, which is the most)")
	must(cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"viewer", "operator", "admin"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}
