package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command says what it is for, and shows how it is used, with itself and flags that it has.
func TestHelpOfEveryCommand(t *testing.T) {
	root := newRoot(&cli{})
	var check func(cmd *cobra.Command)
	check = func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: short %q", path, cmd.Short)
		}
		if cmd.Long != "" && !strings.HasSuffix(cmd.Long, ".") && !strings.Contains(cmd.Long, "\n") {
			t.Errorf("%s: long %q", path, cmd.Long)
		}
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "completion" && sub.Name() != "help" {
				check(sub)
			}
		}
		if cmd.HasAvailableSubCommands() {
			return
		}
		if !strings.Contains(cmd.Example, path) {
			t.Errorf("%s: no example of it: %q", path, cmd.Example)
		}
		for _, line := range strings.Split(cmd.Example, "\n") {
			if line != strings.TrimRight(line, " ") || !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: example %q", path, line)
			}
			for _, call := range strings.FieldsFunc(line, func(r rune) bool { return r == '|' || r == '&' || r == '#' }) {
				words := strings.Fields(call)
				if len(words) == 0 || words[0] != "ballastctl" {
					continue
				}
				found, rest, err := root.Find(words[1:])
				if err != nil || !found.HasParent() {
					t.Errorf("%s: example %q: %v", path, call, err)
					continue
				}
				found.InheritedFlags() // has the parents' flags known
				for _, w := range rest {
					if name, ok := strings.CutPrefix(w, "--"); ok {
						if name, _, _ = strings.Cut(name, "="); found.Flag(name) == nil {
							t.Errorf("%s: example %q: there is no --%s", path, call, name)
						}
					}
				}
			}
		}
	}
	check(root)
}
