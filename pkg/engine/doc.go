// Package engine carries out what the machines of package replication decide.
//
// Engine is the one writer of an attached volume: a block.Device whose operations go to every replica. Replica is one copy:
// it carries out what engines ask of it on its Store. Where both are in one process they call each other directly; else a
// Transport carries their messages.
//
// Locks: a machine is stepped under the mutex of its carrier, and its effects are carried out after that is released. So
// no carrier's mutex is held while another's is taken.
package engine
