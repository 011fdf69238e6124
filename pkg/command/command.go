// Package command holds the commands of the state machine: plain values that say everything a change needs, the time and
// the new ids included, so that applying them is deterministic.
package command

// Command is one of the types of this package.
type Command interface{ command() }

// Result is what the state machine answers to a command.
type Result interface{ result() }
