package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// docsCommand writes the reference pages of docs/cli from the help texts.
func docsCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "docs DIRECTORY",
		Short:  "Write the reference of all commands as Markdown",
		Hidden: true,
		Args:   arguments("DIRECTORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			var index strings.Builder
			fmt.Fprintf(&index, "# ballastctl\n\n%s\n\n```\n%s\n```\n\n| Command | |\n|---|---|\n", escapeAngles(cmd.Root().Long), cmd.Root().Example)
			for _, sub := range cmd.Root().Commands() {
				if !sub.IsAvailableCommand() || sub.Name() == "help" || sub.Name() == "completion" {
					continue
				}
				fmt.Fprintf(&index, "| [%s](%s.md) | %s |\n", sub.Name(), sub.Name(), sub.Short)
				var page strings.Builder
				describeCommand(&page, sub, 1)
				if err := os.WriteFile(filepath.Join(args[0], sub.Name()+".md"), []byte(page.String()), 0o644); err != nil {
					return err
				}
			}
			index.WriteString("\n`ballastctl completion bash|zsh|fish` writes a completion script for the shell.\n")
			return os.WriteFile(filepath.Join(args[0], "README.md"), []byte(index.String()), 0o644)
		},
	}
}

func escapeAngles(s string) string { return strings.ReplaceAll(s, "<", "\\<") }

func describeCommand(b *strings.Builder, cmd *cobra.Command, level int) {
	fmt.Fprintf(b, "%s %s\n\n", strings.Repeat("#", level), cmd.CommandPath())
	text := cmd.Long
	if text == "" {
		text = cmd.Short + "."
	}
	fmt.Fprintf(b, "%s\n\n```\n%s\n```\n\n", escapeAngles(text), cmd.UseLine())
	if cmd.Example != "" {
		fmt.Fprintf(b, "Examples:\n\n```\n%s\n```\n\n", cmd.Example)
	}
	if cmd.HasAvailableLocalFlags() {
		fmt.Fprintf(b, "Flags:\n\n```\n%s```\n\n", cmd.LocalFlags().FlagUsages())
	}
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			describeCommand(b, sub, level+1)
		}
	}
}
