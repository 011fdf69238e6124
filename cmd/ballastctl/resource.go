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

// column of a table.
type column[V any] struct {
	head string
	// wide columns are shown with -o wide only.
	wide bool
	cell func(v V, now time.Time) cell
}

// resource is a kind of thing with list, get, watch and why. V is its view.
type resource[V any] struct {
	kind         adminpb.Kind
	one, many    string
	arg          string // how usage calls a reference
	columns      []column[V]
	ref          func(V) string
	list         func(context.Context, adminpb.AdminClient) ([]V, error)
	get          func(context.Context, adminpb.AdminClient, string) (V, error)
	describe     func(v V, now time.Time) []field
	event        func(*adminpb.Event) V
	complete     func(context.Context, adminpb.AdminClient) ([]cobra.Completion, error)
	listFlags    func(*cobra.Command)
	listExample  string
	whyExample   string
	emptyMessage string
	// progress is a last column of watch; its cell is empty where nothing is under way. nil: there is no such column.
	progress func(V) cell
}

func (r resource[V]) columnsFor(c *cli) []column[V] {
	var out []column[V]
	for _, col := range r.columns {
		if !col.wide || c.output == "wide" {
			out = append(out, col)
		}
	}
	return out
}

func (r resource[V]) row(c *cli, v V, now time.Time) []cell {
	var row []cell
	for _, col := range r.columnsFor(c) {
		row = append(row, col.cell(v, now))
	}
	return row
}

func (r resource[V]) heads(c *cli) []string {
	var out []string
	for _, col := range r.columnsFor(c) {
		out = append(out, col.head)
	}
	return out
}

// now is a variable for the tests' sake: ages in golden tables stay the same.
var now = time.Now

func (r resource[V]) printList(c *cli, vs []V) error {
	if !c.forPeople() {
		return c.data(vs)
	}
	if len(vs) == 0 {
		_, err := fmt.Fprintln(c.err, r.emptyMessage)
		return err
	}
	t := &table{head: r.heads(c)}
	for _, v := range vs {
		t.add(r.row(c, v, now()))
	}
	return t.print(c.out)
}

func (r resource[V]) print(c *cli, v V) error {
	if !c.forPeople() {
		return c.data(v)
	}
	return c.describe(r.describe(v, now()))
}

// done reports a change: a sentence to people, the thing itself as data.
func (r resource[V]) done(c *cli, v V, format string, args ...any) error {
	if !c.forPeople() {
		return c.data(v)
	}
	return c.say(format, args...)
}

func (r resource[V]) commands(c *cli) []*cobra.Command {
	list := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List " + r.many,
		Example: r.listExample,
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				vs, err := r.list(ctx, a)
				if err != nil {
					return err
				}
				return r.printList(c, vs)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	if r.listFlags != nil {
		r.listFlags(list)
	}
	get := &cobra.Command{
		Use:   "get " + r.arg,
		Short: "Show one " + r.one + " in full",
		// The example of why, which names one too.
		Example: strings.ReplaceAll(r.whyExample, " why ", " get ") + " -o yaml",
		Args:    arguments(r.arg),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				v, err := r.get(ctx, a, args[0])
				if err != nil {
					return err
				}
				return r.print(c, v)
			})
		},
		ValidArgsFunction: c.completeFirst(r.complete),
	}
	watch := &cobra.Command{
		Use:   "watch [" + r.arg + "]",
		Short: "Show " + r.many + ", then each change, until interrupted",
		Long: "Show " + r.many + ", then each change, until interrupted. With an argument it ends when that " + r.one + ` is deleted.

With -o json each event is one line: {"type":"added|changed|deleted","object":{...}}.`,
		Example: strings.ReplaceAll(r.whyExample, " why ", " watch "),
		Args:    cobra.MatchAll(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &adminpb.WatchRequest{Kind: r.kind}
			if len(args) > 0 {
				req.Ref = args[0]
			}
			return r.watch(cmd.Context(), c, req)
		},
		ValidArgsFunction: c.completeFirst(r.complete),
	}
	why := &cobra.Command{
		Use:     "why " + r.arg,
		Short:   "Say in a paragraph what keeps a " + r.one + " from being used, and the safe way out",
		Example: r.whyExample,
		Args:    arguments(r.arg),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				w, err := a.Why(ctx, &adminpb.WhyRequest{Kind: r.kind, Ref: args[0]})
				if err != nil {
					return err
				}
				if !c.forPeople() {
					return c.data(struct {
						Text string `json:"text"`
					}{w.Text})
				}
				return c.say("%s", paragraph(w.Text))
			})
		},
		ValidArgsFunction: c.completeFirst(r.complete),
	}
	return []*cobra.Command{list, get, watch, why}
}

func (r resource[V]) watch(ctx context.Context, c *cli, req *adminpb.WatchRequest) error {
	a, err := c.client(ctx)
	if err != nil {
		return err
	}
	stream, err := a.Watch(ctx, req)
	if err != nil {
		return err
	}
	t := &table{head: append([]string{"TIME", "EVENT"}, r.heads(c)...)}
	if r.progress != nil {
		t.head = append(t.head, "PROGRESS")
	}
	var last watched
	// Rows are shown as they come: columns are as wide as what is there at first will make them.
	widen := []cell{plain("15:04:05"), plain("changed")}
	if c.forPeople() {
		vs, err := r.list(ctx, a)
		if err != nil {
			return err
		}
		for _, v := range vs {
			t.fit(append(widen[:2:2], r.row(c, v, now())...))
		}
		if err := t.header(c.out); err != nil {
			return err
		}
	}
	for {
		e, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF), ctx.Err() != nil:
			return nil // interrupting is how a watch ends
		case err != nil:
			return err
		}
		if err := r.event1(c, t, &last, e); err != nil {
			return err
		}
	}
}

// watched is the line that was written last.
type watched struct {
	ref       string
	advancing bool
}

// event1 shows one event. On a terminal progress takes the place of the progress before it.
func (r resource[V]) event1(c *cli, t *table, last *watched, e *adminpb.Event) error {
	v := r.event(e)
	view := eventView{Type: strings.ToLower(e.Type.String()), Object: v}
	switch c.output {
	case "json":
		return json.NewEncoder(c.out).Encode(view)
	case "yaml":
		if _, err := fmt.Fprintln(c.out, "---"); err != nil {
			return err
		}
		return c.data(view)
	}
	styles := map[adminpb.Event_Type]style{adminpb.Event_ADDED: styleGood, adminpb.Event_CHANGED: styleWarn, adminpb.Event_DELETED: styleBad}
	row := append([]cell{{now().Format(time.TimeOnly), styleDim}, {view.Type, styles[e.Type]}}, r.row(c, v, now())...)
	this := watched{ref: r.ref(v)}
	if r.progress != nil {
		p := r.progress(v)
		row = append(row, p)
		this.advancing = p.text != ""
	}
	for i := range row {
		row[i].text = safe(row[i].text)
	}
	t.fit(row)
	if this.advancing && *last == this && colours(c.out) {
		if _, err := io.WriteString(c.out, overwrite); err != nil {
			return err
		}
	}
	*last = this
	return t.line(c.out, row)
}

// overwrite has a terminal write the next line over the last one: one line up, erase it.
const overwrite = "\x1b[1A\x1b[2K"

// completeFirst completes the first argument with what the daemon knows; where it does not answer at once, with nothing.
func (c *cli) completeFirst(names func(context.Context, adminpb.AdminClient) ([]cobra.Completion, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 || names == nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return c.completions(cmd, names, prefix)
	}
}

// completeFlag is completeFirst for the value of a flag.
func (c *cli) completeFlag(names func(context.Context, adminpb.AdminClient) ([]cobra.Completion, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return c.completions(cmd, names, prefix)
	}
}

func (c *cli) completions(cmd *cobra.Command, names func(context.Context, adminpb.AdminClient) ([]cobra.Completion, error), prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	a, err := c.client(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	all, err := names(ctx, a)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, n := range all {
		if strings.HasPrefix(n, prefix) {
			out = append(out, n)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completion of a thing with a name and an id: the name, and the id once that is what is being typed.
func nameAndID(name, id, note string) []cobra.Completion {
	return []cobra.Completion{
		cobra.CompletionWithDesc(safe(name), safe(note)),
		cobra.CompletionWithDesc(id, safe(name)),
	}
}
