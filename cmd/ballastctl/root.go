package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

const (
	defaultSocket = "/run/ballast/admin.sock"
	socketEnv     = "BALLAST_ADMIN_SOCKET"
	serverEnv     = "BALLAST_ADMIN_SERVER"
	certEnv       = "BALLAST_ADMIN_CERT"
)

// streams of the process.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// cli is what the commands share.
type cli struct {
	streams
	socket string
	// server, where it is given, is asked with the certificate in cert instead of the socket.
	server  string
	cert    string
	output  string
	timeout time.Duration
	conn    *grpc.ClientConn
	// started is set once the command line was understood.
	started bool
}

// run carries out a command line and returns the process's exit code.
func run(ctx context.Context, args []string, s streams) int {
	c := &cli{streams: s}
	root := newRoot(c)
	root.SetArgs(args)
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	err := root.ExecuteContext(ctx)
	if c.conn != nil {
		err = c.elsewhere(ctx, err)
		err = errors.Join(err, c.conn.Close())
	}
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil {
		return exitInterrupted
	}
	if !c.started {
		err = usage(err)
	}
	message, code := explain(err)
	fmt.Fprintf(s.err, "%s %s\n", paint(s.err, styleBad, "ballastctl:"), message)
	return code
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "ballastctl",
		Short: "Look at and look after a Ballast cluster",
		Long: `ballastctl looks at and looks after the volumes, snapshots, replicas, pools, nodes and quotas of a Ballast cluster.

It talks to a running ballastd through its admin socket, which only root may open; in a cluster any controller will do.
From elsewhere it goes over the network with --server and a certificate that ` + "`cluster admin-cert`" + ` makes. ` + "`pool show`" + `,
` + "`pool check`" + ` and ` + "`pool export`" + ` work on a pool's directory instead, with no daemon.

Wherever a volume, a snapshot or a pool is asked for, its name or its id will do.

Output:
  -o table   columns for people, sizes rounded (the default)
  -o wide    more columns
  -o json    exact values under stable field names, and nothing else on stdout
  -o yaml    the same as YAML
Colours are used on a terminal only, and not where NO_COLOR is set.

Exit codes:
  0    done
  1    failed
  2    the command line is wrong
  3    what was named does not exist
  4    the daemon does not answer, or is not ready
  5    refused as things are: in use, already there, out of space, over quota, not allowed
  130  interrupted`,
		Example: `  ballastctl status
  ballastctl volume list
  ballastctl volume why db-data
  ballastctl quota set team-a --logical 100Gi --volumes 20
  ballastctl volume list -o json | jq '.[] | {name, sizeBytes}'`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			switch c.output {
			case "table", "wide", "json", "yaml":
				return nil
			}
			return usage(fmt.Errorf("output %q is none of table, wide, json, yaml", c.output))
		},
	}
	socket := os.Getenv(socketEnv)
	if socket == "" {
		socket = defaultSocket
	}
	f := root.PersistentFlags()
	f.StringVar(&c.socket, "socket", socket, "admin `socket` of ballastd; $"+socketEnv+" sets the default")
	f.StringVar(&c.server, "server", os.Getenv(serverEnv), "`host:port` of a controller's admin API, instead of the socket; $"+serverEnv+" sets the default")
	f.StringVar(&c.cert, "cert", os.Getenv(certEnv), "`file` with the certificate for --server; $"+certEnv+" sets the default")
	must(root.RegisterFlagCompletionFunc("server", cobra.NoFileCompletions))
	f.StringVarP(&c.output, "output", "o", "table", "`format`: table, wide, json or yaml")
	f.DurationVar(&c.timeout, "timeout", time.Minute, "how long to wait for an answer")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp)))

	root.AddGroup(
		&cobra.Group{ID: "things", Title: "What there is:"},
		&cobra.Group{ID: "other", Title: "Further:"},
	)
	for _, cmd := range []*cobra.Command{volumeCommand(c), snapshotCommand(c), replicaCommand(c), poolCommand(c), nodeCommand(c), clusterCommand(c), quotaCommand(c)} {
		cmd.GroupID = "things"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{statusCommand(c), salvageCommand(c), auditCommand(c), versionCommand(c)} {
		cmd.GroupID = "other"
		root.AddCommand(cmd)
	}
	root.AddCommand(docsCommand())
	c.noteStart(root)
	root.SetHelpCommandGroupID("other")
	root.SetCompletionCommandGroupID("other")
	return root
}

// noteStart tells mistakes in the command line, which cobra finds in several ways, from failures of the work.
func (c *cli) noteStart(cmd *cobra.Command) {
	if work := cmd.RunE; work != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			c.started = true
			return work(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		c.noteStart(sub)
	}
}

// must is for what only a mistake in this program makes fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// group returns a command that only has others below it.
func group(use, short string, aliases ...string) *cobra.Command {
	return &cobra.Command{
		Use:     use,
		Aliases: aliases,
		Short:   short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			m := fmt.Sprintf("%q is no command of `%s`; see `%s --help`", args[0], cmd.CommandPath(), cmd.CommandPath())
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				m += ". Did you mean " + strings.Join(s, " or ") + "?"
			}
			return usage(errors.New(m))
		},
		RunE:                       func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SuggestionsMinimumDistance: 2,
	}
}

// arguments asks for the named ones, and says so where they are missing.
func arguments(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usage(fmt.Errorf("%s is missing; usage: %s", names[len(args)], cmd.UseLine()))
		case len(args) > len(names):
			return usage(fmt.Errorf("%q is one argument too many; usage: %s", args[len(names)], cmd.UseLine()))
		}
		return nil
	}
}

// call connects and runs fn. Each answer is waited for as long as --timeout says: the time that a person takes to answer a
// question does not count.
func (c *cli) call(cmd *cobra.Command, fn func(context.Context, adminpb.AdminClient) error) error {
	a, err := c.client(cmd.Context())
	if err != nil {
		return err
	}
	return fn(cmd.Context(), a)
}
